// Where the time of regions goes: how long each thread worked between two barriers, and waited.
#pragma once

#include <immintrin.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lc {

// One thread's account: the time-stamp counter when it enters a region, then, at each barrier, when
// it arrives and when it goes on. What lies between entering or going on and arriving is a phase.
struct alignas(64) Stamps {
  std::vector<uint64_t> at;
  void note() { at.push_back(__rdtsc()); }
};

// What a team notes while it is profiled.
class Profile {
 public:
  explicit Profile(int threads);
  Stamps& thread(int tid) { return stamps_[static_cast<size_t>(tid)]; }
  // The caller of a region, before its start and after its end.
  void begin_region() { regions_.push_back({__rdtsc(), 0, runs_.size(), stamps_[0].at.size()}); }
  void end_region() { regions_.back().end = __rdtsc(); }
  // Thread 0, before it runs a kernel.
  void begin_kernel(const char* name) { runs_.push_back({name, stamps_[0].at.size() - 1}); }
  // JSON, times in seconds: a list of regions, each [time, kernels]; a kernel is [name, time, phases]
  // with the barrier behind it in its time; a phase is [mean over threads, slowest thread].
  std::string json() const;

 private:
  struct Region {
    uint64_t begin, end;
    size_t first_run, first_stamp;
  };
  struct Run {
    const char* name;
    size_t stamp;  // of every thread: where the kernel's first phase begins
  };
  std::vector<Stamps> stamps_;
  std::vector<Region> regions_;
  std::vector<Run> runs_;
  uint64_t start_ticks_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace lc
