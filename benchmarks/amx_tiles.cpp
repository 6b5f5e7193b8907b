// How fast this machine's AMX tiles are, on all threads together, with and without what a product needs
// around them: what docs/performance.md says of prompts under AMX comes from here.
//
//     g++ -O3 -std=c++17 -march=sapphirerapids -pthread benchmarks/amx_tiles.cpp -o amx_tiles && ./amx_tiles
//     [THREADS]
//
// int8 (TDPBUSD). Cases take turns, nine rounds, medians. A step is four loads and four products, or what of them
// a case has. "Paced": a dozen other instructions stand behind every tile instruction. Prints Top/s, a step's
// time, and the ratio to paced products in registers, which is the peak that `latentcore bench` measures.
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
constexpr int64_t kSteps = kRows / 32 * (kPanels / 2) * (kK / 64);  // of four products, a matrix of kRows
constexpr double kOps = 2.0 * 32 * 32 * 64;                           // of a step

struct Data {
  const uint8_t* rows;     // activations: tiles of [16][64], K within 16 rows
  const uint8_t* weights;  // of this thread: kMatrices of kPanels panels
  float* sums;
};

template <bool Paced>
inline __attribute__((always_inline)) void pace() {
  if constexpr (Paced) __asm__ volatile("nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop");
}
#define LOAD(T, P)       \
  _tile_loadd(T, P, 64); \
  pace<Paced>()
#define DOT(C, A, B)     \
  _tile_dpbusd(C, A, B); \
  pace<Paced>()
#define PRODUCTS \
  DOT(0, 4, 6);  \
  DOT(1, 4, 7);  \
  DOT(2, 5, 6);  \
  DOT(3, 5, 7)
#define LOADS(A0, A1, B0, B1) \
  LOAD(4, A0);                \
  LOAD(6, B0);                \
  LOAD(5, A1);                \
  LOAD(7, B1)
#define ZERO_SUMS \
  _tile_zero(0);  \
  _tile_zero(1);  \
  _tile_zero(2);  \
  _tile_zero(3)

template <bool Paced>
void products(const Data& d) {
  ZERO_SUMS;
  LOADS(d.rows, d.rows + kTile, d.weights, d.weights + kTile);
  for (int64_t s = 0; s < kMatrices * kSteps; ++s) {
    PRODUCTS;
  }
}
// Tiles from a first-level cache (8 KiB of each operand) or a second-level one (64 KiB).
template <bool Paced, bool Products, int64_t Each>
void loads(const Data& d) {
  ZERO_SUMS;
  for (int64_t s = 0, at = 0; s < kMatrices * kSteps; ++s, at = (at + 2 * kTile) % Each) {
    const uint8_t *a = d.rows + at, *b = d.weights + at;
    LOADS(a, a + kTile, b, b + kTile);
    if constexpr (Products) {
      PRODUCTS;
    }
  }
}
// Vector loads of as many bytes beside the products, whose tiles stay.
template <int64_t Each>
void vector_loads(const Data& d) {
  ZERO_SUMS;
  constexpr bool Paced = false;
  LOADS(d.rows, d.rows + kTile, d.weights, d.weights + kTile);
  const auto tile = [](const uint8_t* p) {
    for (int64_t l = 0; l < 16; ++l) {
      __m512i line;
      __asm__ volatile("vmovdqa64 %1, %0" : "=v"(line) : "m"(*reinterpret_cast<const __m512i*>(p + l * 64)));
    }
  };
  for (int64_t s = 0, at = 0; s < kMatrices * kSteps; ++s, at = (at + 2 * kTile) % Each) {
    DOT(0, 4, 6);
    tile(d.rows + at);
    DOT(1, 4, 7);
    tile(d.rows + at + kTile);
    DOT(2, 5, 6);
    tile(d.weights + at);
    DOT(3, 5, 7);
    tile(d.weights + at + kTile);
  }
}
inline __attribute__((always_inline)) void hint_lines(const uint8_t* p) {
  for (int64_t l = 0; l < 4; ++l) _mm_prefetch(p + l * 64, _MM_HINT_T0);
}
inline __attribute__((always_inline)) void touch_lines(const uint8_t* p) {
  for (int64_t l = 0; l < 4; ++l) {
    uint64_t line;
    __asm__ volatile("movq %1, %0" : "=r"(line) : "m"(*reinterpret_cast<const uint64_t*>(p + l * 64)));
  }
}
enum class Ahead { kHints, kTouches };
// The loop of a product: two panels of `Chunk` tiles stay while `Rows` rows pass. Two steps ahead, rows are
// fetched by hints, or rows and weights are loaded; weights that come after are fetched into the second-level
// cache. All this in a burst before each step or, paced, a few lines behind every tile instruction.
template <bool Paced, Ahead How, int64_t Chunk, int64_t Rows>
void matrix(const Data& d) {
  constexpr int64_t kTiles = kK / 64, kAhead = 2, kLine = 32 * 4;
  constexpr int64_t kFetched = 16 * 32 / Rows;  // lines of each panel, a step
  for (int64_t m = 0; m < kMatrices; ++m)
    for (int64_t p = 0; p < kPanels; p += 2) {
      const uint8_t* panel = d.weights + (m * kPanels + p) * kStride;
      for (int64_t t = 0; t < kTiles; t += Chunk) {
        const uint8_t *b0 = panel + t * kTile, *b1 = b0 + kStride;
        const uint8_t* fetch = t + Chunk < kTiles ? b0 + Chunk * kTile : panel + 2 * kStride;
        for (int64_t i = 0; i < Rows; i += 32) {
          float* sums = d.sums + i * 32;
          if (t == 0) {
            ZERO_SUMS;
          } else {
            _tile_loadd(0, sums, kLine);
            _tile_loadd(1, sums + 16, kLine);
            _tile_loadd(2, sums + 16 * 32, kLine);
            _tile_loadd(3, sums + 16 * 32 + 16, kLine);
          }
          const uint8_t* a0 = d.rows + i * kK + t * kTile;
          const uint8_t* a1 = a0 + 16 * kK;
          for (int64_t s = 0; s < Chunk; ++s) {
            const int64_t k = s + kAhead;
            const uint8_t* soon = a0 + (k < Chunk ? k * kTile : 32 * kK + (k - Chunk) * kTile);
            const uint8_t* weights = b0 + k % Chunk * kTile;
            const auto fetch_part = [&](int part) {
              const int64_t at = part % 4 * 256;
              if (How == Ahead::kHints) {
                hint_lines(soon + part / 4 * 16 * kK + at);
              } else {
                touch_lines(soon + part / 4 * 16 * kK + at);
                touch_lines(weights + part / 4 * kStride + at);
              }
              if (part % 4 == 1)
                for (int64_t l = 0; l < kFetched; ++l)
                  _mm_prefetch(fetch + part / 4 * kStride + l * 64, _MM_HINT_T1);
            };
            const auto between = [&](int part) {
              if constexpr (Paced) fetch_part(part);
            };
            if constexpr (!Paced)
              for (int part = 0; part < 8; ++part) fetch_part(part);
            LOAD(4, a0 + s * kTile);
            between(0);
            LOAD(6, b0 + s * kTile);
            between(1);
            LOAD(5, a1 + s * kTile);
            between(2);
            LOAD(7, b1 + s * kTile);
            between(3);
            DOT(0, 4, 6);
            between(4);
            DOT(1, 4, 7);
            between(5);
            DOT(2, 5, 6);
            between(6);
            DOT(3, 5, 7);
            between(7);
            fetch += kFetched * 64;
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
  int64_t rows = kRows;
  double steps() const { return static_cast<double>(kMatrices * kSteps * rows / kRows); }
};
constexpr Case kCases[] = {
    {"products, random tiles in registers, paced", products<true>},
    {"products, not paced", products<false>},
    {"loads, first-level cache", loads<true, false, 8192>},
    {"loads, second-level cache", loads<true, false, 65536>},
    {"loads and products, first-level, not paced", loads<false, true, 8192>},
    {"loads and products, first-level", loads<true, true, 8192>},
    {"loads and products, second-level", loads<true, true, 65536>},
    {"vector loads and products, first-level", vector_loads<8192>},
    {"vector loads and products, second-level", vector_loads<65536>},
    {"256 rows, hints, not paced", matrix<false, Ahead::kHints, 32, 256>},
    {"256 rows, hints", matrix<true, Ahead::kHints, 32, 256>},
    {"256 rows, touched", matrix<true, Ahead::kTouches, 32, 256>},
    {"256 rows, touched, chunks of 16 tiles", matrix<true, Ahead::kTouches, 16, 256>},
    {"256 rows, touched, chunks of 8 tiles", matrix<true, Ahead::kTouches, 8, 256>},
    {"64 rows, hints", matrix<true, Ahead::kHints, 32, 64>, 64},
    {"64 rows, touched", matrix<true, Ahead::kTouches, 32, 64>, 64},
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
  double times[kCount];  // of a step
  for (int c = 0; c < kCount; ++c) {
    std::sort(seconds[c].begin(), seconds[c].end());
    times[c] = seconds[c][kRounds / 2] / kCases[c].steps();
  }
  for (int c = 0; c < kCount; ++c)
    std::printf("%-44s %6.2f Top/s  %6.1f ns a step  %.2f\n", kCases[c].name, kOps * threads / times[c] / 1e12,
                times[c] * 1e9, times[0] / times[c]);
}
