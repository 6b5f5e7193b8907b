// A team of pinned threads that runs SPMD kernels: every thread executes the same function, takes
// the work it owns and meets the others at barriers.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/ownership.h"
#include "runtime/profile.h"

namespace lc {

// One wait, a step at a time: spins, then yields. Waits inside a region are a few microseconds unless threads
// outnumber cores.
class Pause {
 public:
  __attribute__((always_inline)) void step() {
    if (spins_ < kSpins) {
      ++spins_;
      _mm_pause();
    } else {
      sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;
  int spins_ = 0;
};

class alignas(64) Barrier {
 public:
  void reset(int n) {
    n_ = n;
    count_.store(0, std::memory_order_relaxed);
    epoch_.store(0, std::memory_order_relaxed);
  }
  __attribute__((noinline)) void wait();

 private:
  alignas(64) std::atomic<int> count_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  int n_ = 1;
};

// How much of each thread's share of the current phase is taken, by itself or by a thread that had
// finished its own. Every thread opens the same phases in the same order; between two barriers there are
// fewer than kPhases / 2.
class Shares {
 public:
  static constexpr uint32_t kPhases = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> taken{0};
  };
  explicit Shares(int threads) : threads_(static_cast<uint32_t>(threads)), all_(new Share[threads_ * kPhases]) {}
  ~Shares() { delete[] all_; }
  Shares(const Shares&) = delete;
  Shares& operator=(const Shares&) = delete;
  // The shares of this thread's next phase, one a thread, untaken. Its own of a phase far behind is
  // reset for one far ahead.
  __attribute__((always_inline)) Share* open(int tid, uint32_t& phase) {
    const uint32_t ahead = (phase + kPhases / 2) % kPhases;
    all_[ahead * threads_ + static_cast<uint32_t>(tid)].taken.store(0, std::memory_order_relaxed);
    return all_ + phase++ % kPhases * threads_;
  }

 private:
  uint32_t threads_;
  Share* all_;
};

// What a kernel sees of its thread. `scratch` is shared by the team; kernels lay it out themselves,
// identically in every thread.
struct Ctx {
  int tid;
  int nt;
  Range node;  // the threads of this one's memory node
  uint8_t* scratch;
  Barrier* barrier_;
  Stamps* stamps_;  // none unless the team is profiled
  Shares* shares_;
  uint32_t* phase_;  // of this thread, counted over all kernels
  __attribute__((always_inline)) Shares::Share* open_phase() const { return shares_->open(tid, *phase_); }
  void barrier() const {
    if (stamps_ != nullptr) stamps_->note();
    if (nt > 1) barrier_->wait();
    if (stamps_ != nullptr) stamps_->note();
  }
};

using KernelFn = void (*)(const Ctx&, const void* args);

// A kernel and the scratch bytes that it needs for given arguments and team size.
struct Kernel {
  const char* name;
  KernelFn run;
  size_t (*scratch)(const void* args, int nt);
};

// One thing to run: a kernel with its arguments.
struct Node {
  const Kernel* kernel;
  const void* args;
};

class Team {
 public:
  static Team& get();
  // Threads incl. the caller, 1..1024. Stops running workers first. Must not be called in a region.
  void resize(int n);
  int size() const { return n_; }
  // The memory node of each thread's core; empty for threads that are not pinned.
  std::vector<int> nodes();
  // Runs nodes in order in one parallel region, a barrier between two nodes.
  void run(const Node* nodes, size_t count);
  // Makes at least `bytes` of scratch available to the next regions.
  void reserve(size_t bytes);
  size_t scratch_bytes() const { return scratch_bytes_; }
  void release_scratch();
  // Notes where the time of all regions goes until it is ended; the size must stay. Throws where
  // one is under way (begin) or none (end). Gives Profile::json.
  void begin_profile();
  std::string end_profile();

  struct Impl;

 private:
  Team();
  Impl* impl_;
  int n_ = 1;
  uint8_t* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
};

}  // namespace lc
