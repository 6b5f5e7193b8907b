#include "runtime/bandwidth.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/args.h"
#include "kernels/kernels.h"
#include "runtime/team.h"

namespace lc {
namespace {

// A buffer read again and again is found in part in the last-level cache, whose replacement is not by age: 0.6 GiB
// were read up to 18 % faster than 8 GiB beside a cache of 300 MiB. Of eight times its size it holds an eighth.
constexpr int64_t kCaches = 8, kLeastBytes = 512 << 20, kMostBytes = int64_t{4} << 30;
constexpr int kFastest = 4, kRounds = 3, kMostRounds = 15;

struct ReadArgs {
  const uint8_t* data;
  int64_t bytes;  // a thread's share: a multiple of streams * 64
  int streams;
  int64_t ahead;  // prefetch distance, bytes; into the second-level cache where negative
  uint64_t* sums;  // one line a thread, so that nothing is optimized away
};

template <int Streams, _mm_hint Into>
uint64_t read_streams(const uint8_t* p, int64_t bytes, int64_t ahead) {
  const int64_t each = bytes / Streams / 64 * 64;
  __m128i acc[Streams] = {};
  for (int64_t i = 0; i < each; i += 64)
    for (int s = 0; s < Streams; ++s) {
      const uint8_t* at = p + s * each + i;
      if (ahead != 0) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), Into);
      const __m128i* v = reinterpret_cast<const __m128i*>(at);
      const __m128i a = _mm_xor_si128(_mm_load_si128(v), _mm_load_si128(v + 1));
      const __m128i b = _mm_xor_si128(_mm_load_si128(v + 2), _mm_load_si128(v + 3));
      acc[s] = _mm_xor_si128(acc[s], _mm_xor_si128(a, b));
    }
  __m128i all = acc[0];
  for (int s = 1; s < Streams; ++s) all = _mm_xor_si128(all, acc[s]);
  return static_cast<uint64_t>(_mm_cvtsi128_si64(all));
}

template <int Streams>
uint64_t read_ahead(const uint8_t* p, int64_t bytes, int64_t ahead) {
  if (ahead < 0) return read_streams<Streams, _MM_HINT_T1>(p, bytes, -ahead);
  return read_streams<Streams, _MM_HINT_T0>(p, bytes, ahead);
}

void read_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const ReadArgs*>(p);
  const uint8_t* mine = a.data + ctx.tid * a.bytes;
  uint64_t& sum = a.sums[ctx.tid * 8];
  if (a.streams == 1)
    sum += read_ahead<1>(mine, a.bytes, a.ahead);
  else if (a.streams == 2)
    sum += read_ahead<2>(mine, a.bytes, a.ahead);
  else if (a.streams == 4)
    sum += read_ahead<4>(mine, a.bytes, a.ahead);
  else
    sum += read_ahead<8>(mine, a.bytes, a.ahead);
}
size_t nothing(const void*, int) { return 0; }

void touch_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const ReadArgs*>(p);
  uint8_t* mine = const_cast<uint8_t*>(a.data) + ctx.tid * a.bytes;
  for (int64_t i = 0; i < a.bytes; i += 4096) mine[i] = static_cast<uint8_t>(i >> 12);
}

// Puts a thread's share out of all caches.
void flush_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const ReadArgs*>(p);
  const uint8_t* mine = a.data + ctx.tid * a.bytes;
  for (int64_t i = 0; i < a.bytes; i += 64) _mm_clflush(mine + i);
  _mm_mfence();
}

struct MeetingArgs {
  std::chrono::steady_clock::time_point until;
  std::atomic<bool>* over;
  int64_t* rounds;
};
void meeting_kernel(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MeetingArgs*>(p);
  for (int64_t round = 1;; ++round) {
    uint64_t x = 1;
    for (int i = 0; i < 4000; ++i) __asm__ volatile("imul $3, %0, %0" : "+r"(x));
    ctx.barrier();
    if (ctx.tid == 0) {
      *a.rounds = round;
      a.over->store(std::chrono::steady_clock::now() >= a.until, std::memory_order_relaxed);
    }
    ctx.barrier();
    if (a.over->load(std::memory_order_relaxed)) return;
  }
}

}  // namespace

int64_t last_level_cache() {
  // Caches are told apart by level and by the processors that share them.
  std::set<std::pair<int, std::string>> seen;
  int last = 0;
  int64_t total = 0;
  for (int cpu = 0;; ++cpu) {
    const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
    if (access(base.c_str(), F_OK) != 0) return total;
    for (int index = 0;; ++index) {
      const std::string cache = base + "/cache/index" + std::to_string(index);
      int level;
      std::string shared, size;
      if (!(std::ifstream(cache + "/level") >> level)) break;
      std::ifstream(cache + "/shared_cpu_list") >> shared;
      std::ifstream(cache + "/size") >> size;
      if (level < last || !seen.insert({level, shared}).second) continue;
      if (level > last) total = 0;
      last = level;
      total += std::atoll(size.c_str()) << 10;  // "32768K"
    }
  }
}

double measure_read_bandwidth(double seconds, int64_t most_bytes) {
  Team& team = Team::get();
  const int64_t enough = kCaches * last_level_cache();
  const int64_t bytes = std::min(std::clamp(enough, kLeastBytes, kMostBytes), most_bytes);
  const int64_t share = std::max<int64_t>(bytes / team.size() / 4096 * 4096, 4096 * 8);
  const size_t total = static_cast<size_t>(share * team.size());
  void* mem = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mem == MAP_FAILED)
    throw std::runtime_error("cannot allocate " + std::to_string(total) + " bytes to measure the bandwidth");
  madvise(mem, total, MADV_HUGEPAGE);
  std::vector<uint64_t> sums(static_cast<size_t>(team.size()) * 8);
  const Kernel read{"read", read_kernel, nothing}, touch{"touch", touch_kernel, nothing},
      flush{"flush", flush_kernel, nothing};
  ReadArgs args{static_cast<const uint8_t*>(mem), share, 1, 0, sums.data()};
  const auto once = [&](const Kernel& k) {
    const auto start = std::chrono::steady_clock::now();
    const Node node{&k, &args};
    team.run(&node, 1);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  once(touch);

  struct Way {
    int streams;
    int64_t ahead;
    std::vector<double> times;
    double median() {
      std::nth_element(times.begin(), times.begin() + static_cast<long>(times.size() / 2), times.end());
      return times[times.size() / 2];
    }
  };
  std::vector<Way> ways;
  for (const int streams : {1, 2, 4, 8})
    for (const int64_t ahead : {0, 1024, 2048, 4096, -4096, -8192}) ways.push_back({streams, ahead, {}});
  double spent = 0;
  const auto read_once = [&](Way& way) {
    args.streams = way.streams;
    args.ahead = way.ahead;
    if (bytes < enough) once(flush);
    way.times.push_back(once(read));
    spent += way.times.back();
  };
  // All ways once, then the fastest again and again, in turns.
  for (Way& way : ways) read_once(way);
  std::sort(ways.begin(), ways.end(), [](Way& a, Way& b) { return a.median() < b.median(); });
  ways.resize(kFastest);
  for (int round = 1; round < kRounds || (spent < seconds && round < kMostRounds); ++round)
    for (Way& way : ways) read_once(way);
  double best = 0;
  for (Way& way : ways) best = std::max(best, static_cast<double>(total) / way.median());
  munmap(mem, total);
  return best;
}

double measure_peak(Format format, double seconds) {
  Team& team = Team::get();
  std::vector<int64_t> ops(static_cast<size_t>(team.size()) * 8);
  PeakArgs args{format, 1 << 14, ops.data()};
  const auto once = [&] {
    const auto start = std::chrono::steady_clock::now();
    const Node node{&kernels().peak, &args};
    team.run(&node, 1);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  while (once() < seconds / 6 && args.iters < (int64_t{1} << 40)) args.iters *= 2;
  double rates[5];
  for (double& rate : rates) {
    const double t = once();
    int64_t total = 0;
    for (int i = 0; i < team.size(); ++i) total += ops[static_cast<size_t>(i) * 8];
    rate = static_cast<double>(total) / t;
  }
  std::sort(rates, rates + 5);
  return rates[2];
}

double measure_meeting(double seconds) {
  std::atomic<bool> over{false};
  int64_t rounds = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto length = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(seconds));
  const MeetingArgs args{start + length, &over, &rounds};
  const Kernel meeting{"meeting", meeting_kernel, nothing};
  const Node node{&meeting, &args};
  Team::get().run(&node, 1);
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return took / static_cast<double>(rounds);
}

}  // namespace lc
