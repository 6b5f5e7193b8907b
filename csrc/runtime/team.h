// A team of pinned threads that runs SPMD kernels: every thread executes the same function, takes
// the work it owns and meets the others at barriers.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "runtime/profile.h"

namespace lc {

// Spins, then yields: waits inside a region are a few microseconds unless threads outnumber cores.
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

// What a kernel sees of its thread. `scratch` is shared by the team; kernels lay it out themselves,
// identically in every thread.
struct Ctx {
  int tid;
  int nt;
  uint8_t* scratch;
  Barrier* barrier_;
  Stamps* stamps_;  // none unless the team is profiled
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

// Cores that this process may use: physical cores within the affinity mask and the cgroup's quota.
int default_threads();

}  // namespace lc
