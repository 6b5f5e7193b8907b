// Who computes what: fixed shares, and the help of threads that have finished theirs.
#pragma once

#include "kernels/args.h"
#include "runtime/ownership.h"
#include "runtime/team.h"

namespace {

// How many units of its share a thread takes at once: at most `most`, and no more than so many eighths of what is
// left, so that there is something to help with. Units that read the same rows are better taken together.
struct Take {
  int64_t most, eighths = 1;
  int64_t of(int64_t left) const { return tmax<int64_t>(1, tmin(most, left * eighths / 8)); }
};

// Runs fn(owner, list, begin, end) over every unit of every list. Thread t owns share(list, t) of each and
// takes it front to back, list by list. Then it helps other threads of its memory node, so that a
// thread that the system held up does not hold up all. Who computes a unit never changes its result.
template <class Share, class Fn>
LC_INLINE void each_share(const Ctx& ctx, int64_t lists, Take take, const Share& share, const Fn& fn) {
  Shares::Share* const shares = ctx.open_phase();
  each_helped(ctx.node, ctx.tid, [&](int of) {
    std::atomic<int64_t>& taken = shares[of].taken;
    int64_t total = 0;
    for (int64_t list = 0; list < lists; ++list) total += share(list, of).size();
    int64_t list = 0, before = 0;  // units of the lists before this one
    int64_t at = taken.load(std::memory_order_relaxed);
    while (at < total) {
      Range r = share(list, of);
      while (at >= before + r.size()) {
        before += r.size();
        r = share(++list, of);
      }
      const int64_t count = tmin(take.of(total - at), before + r.size() - at);
      if (!taken.compare_exchange_weak(at, at + count, std::memory_order_relaxed)) continue;
      const int64_t begin = r.begin + at - before;
      fn(of, list, begin, begin + count);
      at = taken.load(std::memory_order_relaxed);
    }
  });
}

}  // namespace
