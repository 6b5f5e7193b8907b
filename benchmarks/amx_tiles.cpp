// How fast this machine's AMX tiles are, on all threads together, with and without what a product needs
// around them: what docs/performance.md says of prompts under AMX comes from here.
//
//     g++ -O3 -march=sapphirerapids -pthread benchmarks/amx_tiles.cpp -o amx_tiles && ./amx_tiles [THREADS]
//
// int8 (TDPBUSD). Cases take turns, nine rounds, medians. Prints Top/s and the ratio to random tiles that
// stay in registers, which is the peak that `latentcore bench` measures.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kTile = 1024;                            // bytes
constexpr int64_t kRows = 256, kK = 2048, kPanels = 12;    // of one matrix: 256 x 2048 by 2048 x 192
constexpr int64_t kStride = kK * 16 + 128;                 // of a panel
constexpr int64_t kMatrices = 40, kRounds = 9;
constexpr double kOps = 2.0 * kRows * kK * kPanels * 16 * kMatrices;  // of a case, a thread
constexpr int64_t kSteps = kRows / 32 * (kPanels / 2) * (kK / 64);    // of four products, a matrix

struct Data {
  const uint8_t* rows;     // activations: tiles of [16][64], K within 16 rows
  const uint8_t* weights;  // of this thread: kMatrices of kPanels panels
  float* sums;
};

#define PRODUCTS         \
  _tile_dpbusd(0, 4, 6); \
  _tile_dpbusd(1, 4, 7); \
  _tile_dpbusd(2, 5, 6); \
  _tile_dpbusd(3, 5, 7)
#define LOADS(A0, A1, B0, B1) \
  _tile_loadd(4, A0, 64);     \
  _tile_loadd(6, B0, 64);     \
  _tile_loadd(5, A1, 64);     \
  _tile_loadd(7, B1, 64)
#define ZERO_SUMS \
  _tile_zero(0);  \
  _tile_zero(1);  \
  _tile_zero(2);  \
  _tile_zero(3)

void products_of_zeros(const Data&) {
  ZERO_SUMS;
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t s = 0; s < kMatrices * kSteps; ++s) {
    PRODUCTS;
  }
}
void products(const Data& d) {
  ZERO_SUMS;
  LOADS(d.rows, d.rows + kTile, d.weights, d.weights + kTile);
  for (int64_t s = 0; s < kMatrices * kSteps; ++s) {
    PRODUCTS;
  }
}
// Tiles that lie in the first-level cache.
void loads_and_products(const Data& d) {
  ZERO_SUMS;
  for (int64_t s = 0; s < kMatrices * kSteps; ++s) {
    const uint8_t *a = d.rows + s % 4 * kTile, *b = d.weights + s % 4 * kTile;
    LOADS(a, a + 4 * kTile, b, b + 4 * kTile);
    PRODUCTS;
  }
}
// The loop of a product: two panels of `Chunk` tiles stay while 256 rows pass. `Hot`: always the same rows,
// panels and sums.
template <int64_t Chunk, bool Hot>
void matrix(const Data& d) {
  constexpr int64_t kTiles = kK / 64, kAhead = 2, kLine = 32 * 4;
  for (int64_t m = 0; m < kMatrices; ++m)
    for (int64_t p = 0; p < kPanels; p += 2) {
      const uint8_t* panel = d.weights + (Hot ? 0 : (m * kPanels + p) * kStride);
      for (int64_t t = 0; t < kTiles; t += Chunk) {
        const uint8_t *b0 = panel + t * kTile, *b1 = b0 + kStride;
        const uint8_t* fetch = Hot ? b0 : t + Chunk < kTiles ? b0 + Chunk * kTile : panel + 2 * kStride;
        for (int64_t i = 0; i < kRows; i += 32) {
          float* sums = d.sums + (Hot ? 0 : i * 32);
          if (t == 0) {
            ZERO_SUMS;
          } else {
            _tile_loadd(0, sums, kLine);
            _tile_loadd(1, sums + 16, kLine);
            _tile_loadd(2, sums + 16 * 32, kLine);
            _tile_loadd(3, sums + 16 * 32 + 16, kLine);
          }
          const uint8_t* a0 = d.rows + (Hot ? 0 : i * kK) + t * kTile;
          const uint8_t* a1 = a0 + 16 * kK;
          for (int64_t s = 0; s < Chunk; ++s) {
            const int64_t k = s + kAhead;
            const uint8_t* soon = a0 + (k < Chunk ? k * kTile : 32 * kK + (k - Chunk) * kTile);
            if (!Hot)
              for (int64_t l = 0; l < kTile; l += 64) {
                _mm_prefetch(soon + l, _MM_HINT_T0);
                _mm_prefetch(soon + 16 * kK + l, _MM_HINT_T0);
              }
            for (int64_t l = 0; l < 2; ++l, fetch += 64) {
              _mm_prefetch(fetch, _MM_HINT_T0);
              _mm_prefetch(fetch + kStride, _MM_HINT_T0);
            }
            LOADS(a0 + s * kTile, a1 + s * kTile, b0 + s * kTile, b1 + s * kTile);
            PRODUCTS;
          }
          _tile_stored(0, sums, kLine);
          _tile_stored(1, sums + 16, kLine);
          _tile_stored(2, sums + 16 * 32, kLine);
          _tile_stored(3, sums + 16 * 32 + 16, kLine);
        }
      }
    }
}

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};
void configure() {
  static thread_local TileConfig c;
  std::memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int t = 0; t < 8; ++t) {
    c.colsb[t] = 64;
    c.rows[t] = 16;
  }
  __asm__ volatile("" : : "r"(&c) : "memory");  // gcc 12 may drop the stores
  _tile_loadconfig(&c);
}

// Random bytes in huge pages; xorshift64.
uint8_t* random_bytes(size_t bytes, uint64_t seed) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(p, bytes, MADV_HUGEPAGE);
  uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    std::memcpy(static_cast<uint8_t*>(p) + i, &x, 8);
  }
  return static_cast<uint8_t*>(p);
}

struct Case {
  const char* name;
  void (*run)(const Data&);
};
constexpr Case kCases[] = {
    {"products, random tiles in registers", products},
    {"products, tiles of zeros in registers", products_of_zeros},
    {"loads and products, first-level cache", loads_and_products},
    {"matrix, chunks of 16 tiles, all hot", matrix<16, true>},
    {"matrix, chunks of 16 tiles", matrix<16, false>},
    {"matrix, chunks of 32 tiles", matrix<32, false>},
};
constexpr int kCount = sizeof kCases / sizeof kCases[0];

}  // namespace

int main(int argc, char** argv) {
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) != 0) {
    std::fprintf(stderr, "error: this machine has no AMX tiles\n");
    return 2;
  }
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const uint8_t* rows = random_bytes(kRows * kK + 65536, 1);
  std::atomic<int> turn{0}, done{0};
  const Case* now = nullptr;
  const auto prepare = [&](int t) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(t, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    configure();
    const size_t bytes = kMatrices * kPanels * kStride + 2 * kStride;
    return Data{rows, random_bytes(bytes, t + 2), reinterpret_cast<float*>(random_bytes(kRows * 128, 0))};
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t)
    others.emplace_back([&, t] {
      const Data d = prepare(t);
      ++done;
      for (int seen = 1;; ++seen) {
        while (turn.load() < seen) _mm_pause();
        if (now == nullptr) return;
        now->run(d);
        ++done;
      }
    });
  const Data d = prepare(0);
  const auto wait = [&] {
    while (done.load() < threads - 1) _mm_pause();
    done = 0;
  };
  wait();
  std::vector<double> seconds[kCount];
  for (int64_t round = 0; round < kRounds; ++round)
    for (int c = 0; c < kCount; ++c) {
      now = &kCases[c];
      const auto begin = std::chrono::steady_clock::now();
      ++turn;
      now->run(d);
      wait();
      seconds[c].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
  now = nullptr;
  ++turn;
  for (auto& t : others) t.join();
  std::printf("%d threads\n", threads);
  for (auto& s : seconds) std::sort(s.begin(), s.end());
  for (int c = 0; c < kCount; ++c)
    std::printf("%-40s %6.2f Top/s  %.2f\n", kCases[c].name, kOps * threads / seconds[c][kRounds / 2] / 1e12,
                seconds[0][kRounds / 2] / seconds[c][kRounds / 2]);
}
