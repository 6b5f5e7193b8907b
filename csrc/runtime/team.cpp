#include "runtime/team.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/sanitize.h"
#include "runtime/topology.h"

namespace lc {
namespace {

constexpr int kIdleSpins = 20000;       // pauses before an idle worker sleeps
constexpr size_t kHugePage = 2u << 20;

void pin(pthread_t thread, int cpu) {
  constexpr int kMax = 8192;
  cpu_set_t* set = CPU_ALLOC(kMax);
  const size_t bytes = CPU_ALLOC_SIZE(kMax);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(thread, bytes, set);  // best effort: a refusal only costs locality
  CPU_FREE(set);
}

// Keeps the calling thread on one logical processor while it lives.
class Pinned {
 public:
  explicit Pinned(int cpu) : before_(CPU_ALLOC(kMax)) {
    if (pthread_getaffinity_np(pthread_self(), CPU_ALLOC_SIZE(kMax), before_) == 0)
      pin(pthread_self(), cpu);
    else
      CPU_ZERO_S(CPU_ALLOC_SIZE(kMax), before_);
  }
  ~Pinned() {
    if (CPU_COUNT_S(CPU_ALLOC_SIZE(kMax), before_) > 0)
      pthread_setaffinity_np(pthread_self(), CPU_ALLOC_SIZE(kMax), before_);
    CPU_FREE(before_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  static constexpr int kMax = 8192;
  cpu_set_t* before_;
};

}  // namespace

void Barrier::wait() {
  const uint32_t epoch = epoch_.load(std::memory_order_acquire);
  if (count_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
    count_.store(0, std::memory_order_relaxed);
    epoch_.store(epoch + 1, std::memory_order_release);
    return;
  }
  for (Pause pause; epoch_.load(std::memory_order_acquire) == epoch;) pause.step();
}

struct Team::Impl {
  std::mutex mutex;  // one region at a time; callers from several threads queue here
  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint32_t> epoch{0};
  alignas(64) std::atomic<bool> stop{false};
  const Node* nodes = nullptr;
  size_t count = 0;
  uint8_t* scratch = nullptr;
  size_t scratch_bytes = 0;
  Barrier barrier;  // between kernels and at the end of a region
  std::unique_ptr<Profile> profile;
  std::unique_ptr<Shares> shares = std::make_unique<Shares>(1);
  struct alignas(64) Phase {
    uint32_t count = 0;
  };
  std::vector<Phase> phases = std::vector<Phase>(1);  // one a thread
  int n = 1;
  std::vector<Core> cores;  // of each thread; none where they are more than cores, and not pinned
  std::vector<Range> near = {{0, 1}};  // for each thread, those of its memory node
  bool several_nodes = false;

  void region(int tid) {
    Stamps* const stamps = profile == nullptr ? nullptr : &profile->thread(tid);
    if (stamps != nullptr) stamps->note();
    const Ctx ctx{tid,
                  n,
                  near[static_cast<size_t>(tid)],
                  scratch,
                  &barrier,
                  stamps,
                  shares.get(),
                  &phases[static_cast<size_t>(tid)].count};
    // Read once: behind the last barrier the caller may already have set the next region's nodes.
    const Node* const list = nodes;
    const size_t length = count;
    for (size_t i = 0; i < length; ++i) {
      if (stamps != nullptr && tid == 0) profile->begin_kernel(list[i].kernel->name);
      if constexpr (kScratchGap > 0) {
        if (tid == 0) renew_scratch(scratch, list[i].kernel->scratch(list[i].args, n), scratch_bytes);
        ctx.barrier();
      }
      list[i].kernel->run(ctx, list[i].args);
      if (i + 1 < length) ctx.barrier();
    }
    leave(ctx);
  }

  // The last barrier. Behind it the caller may read the others' stamps, so they go on as they arrive.
  static void leave(const Ctx& ctx) {
    if (ctx.stamps_ != nullptr) {
      ctx.stamps_->note();
      ctx.stamps_->note();
    }
    if (ctx.nt > 1) ctx.barrier_->wait();
    if (ctx.stamps_ != nullptr && ctx.tid == 0) ctx.stamps_->at.back() = __rdtsc();
  }

  void work(int tid) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch.load(std::memory_order_acquire) == seen) {
        if (++spins < kIdleSpins)
          _mm_pause();
        else
          epoch.wait(seen, std::memory_order_acquire);
      }
      seen = epoch.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_acquire)) return;
      region(tid);
    }
  }

  void start(int threads) {
    n = threads;
    barrier.reset(threads);
    shares = std::make_unique<Shares>(threads);
    phases.assign(static_cast<size_t>(threads), {});
    epoch.store(0);
    stop.store(false);
    const Topology topology = this_topology();
    cores.clear();
    if (threads <= static_cast<int>(topology.cores.size())) cores = topology.place(threads);
    near = cores.empty() ? std::vector<Range>(static_cast<size_t>(threads), {0, threads}) : node_mates(cores);
    several_nodes = topology.nodes() > 1;
    for (int t = 1; t < threads; ++t) {
      workers.emplace_back([this, t] { work(t); });
      if (!cores.empty()) pin(workers.back().native_handle(), cores[static_cast<size_t>(t)].cpu);
    }
  }

  void join() {
    stop.store(true, std::memory_order_release);
    epoch.fetch_add(1, std::memory_order_acq_rel);
    epoch.notify_all();
    for (std::thread& w : workers) w.join();
    workers.clear();
  }
};

Team::Team() : impl_(new Impl) {
  // A forked child has no workers: it starts with a team of one.
  pthread_atfork(nullptr, nullptr, [] {
    Team& team = Team::get();
    for (std::thread& w : team.impl_->workers) w.detach();
    team.impl_ = new Impl;
    team.n_ = 1;
  });
}

Team& Team::get() {
  // Leaked on purpose: workers may outlive static destruction.
  static Team* team = new Team;
  return *team;
}

void Team::resize(int n) {
  if (n < 1 || n > 1024) throw std::invalid_argument("threads must be in 1..1024, got " + std::to_string(n));
  std::lock_guard<std::mutex> lock(impl_->mutex);
  if (n == n_) return;
  if (impl_->profile != nullptr)
    throw std::runtime_error("the number of threads must stay while they are profiled");
  impl_->join();
  impl_->start(n);
  n_ = n;
}

void Team::run(const Node* nodes, size_t count) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  size_t need = 0;
  for (size_t i = 0; i < count; ++i) need = std::max(need, nodes[i].kernel->scratch(nodes[i].args, n_));
  reserve(need);
  impl_->scratch = scratch_;
  impl_->scratch_bytes = scratch_bytes_;
  impl_->nodes = nodes;
  impl_->count = count;
  if (impl_->profile != nullptr) impl_->profile->begin_region();
  if (n_ > 1) {
    impl_->epoch.fetch_add(1, std::memory_order_acq_rel);
    impl_->epoch.notify_all();
  }
  {
    // The caller is the embedding program's thread, not ours: it is pinned only where it matters in
    // whose memory it reads and writes, and only for the region.
    std::optional<Pinned> pinned;
    if (impl_->several_nodes && !impl_->cores.empty()) pinned.emplace(impl_->cores[0].cpu);
    impl_->region(0);
  }
  if (impl_->profile != nullptr) impl_->profile->end_region();
}

std::vector<int> Team::nodes() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  std::vector<int> out;
  for (const Core& core : impl_->cores) out.push_back(core.node);
  return out;
}

void Team::begin_profile() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  if (impl_->profile != nullptr) throw std::runtime_error("a profile is under way");
  impl_->profile = std::make_unique<Profile>(n_);
}

std::string Team::end_profile() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  if (impl_->profile == nullptr) throw std::runtime_error("no profile is under way");
  const std::string json = impl_->profile->json();
  impl_->profile.reset();
  return json;
}

void Team::reserve(size_t bytes) {
  if (bytes <= scratch_bytes_) return;
  release_scratch();
  const size_t size = (bytes + bytes / 4 + kHugePage - 1) / kHugePage * kHugePage;
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    throw std::runtime_error("cannot allocate " + std::to_string(size) + " bytes of scratch memory");
  madvise(p, size, MADV_HUGEPAGE);
  scratch_ = static_cast<uint8_t*>(p);
  scratch_bytes_ = size;
}

void Team::release_scratch() {
  if (scratch_ != nullptr) {
    open_memory(scratch_, scratch_bytes_);
    munmap(scratch_, scratch_bytes_);
  }
  scratch_ = nullptr;
  scratch_bytes_ = 0;
}

}  // namespace lc
