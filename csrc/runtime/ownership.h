// Which part of a weight each thread owns: the one rule that packing, loading and kernels share. Its
// functions have internal linkage, as everything that is compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace lc {

struct Range {
  int64_t begin, end;
  constexpr int64_t size() const { return end - begin; }
};

// The contiguous share of `n` units that thread t of nt owns. `turn` shifts who carries the remainder,
// so that over many matrices no thread carries it always, and moves every bound by less than one unit:
// a thread's rows lie in the same place of every matrix, hence in its own memory node. Turns follow the
// golden ratio, so that any few that follow one another spread the remainder evenly.
static constexpr Range owned(int64_t n, int64_t t, int64_t nt, int64_t turn) {
  const uint64_t part = static_cast<uint32_t>(static_cast<uint64_t>(turn) * 2654435769u);
  const int64_t phase = nt - 1 - static_cast<int64_t>(part * static_cast<uint64_t>(nt) >> 32);
  return {(t * n + phase) / nt, ((t + 1) * n + phase) / nt};
}

// The share of units [first, first + n) of `total` that are shared out together: of a matrix among
// several that threads go through without a barrier between.
static constexpr Range owned_among(int64_t n, int64_t first, int64_t total, int64_t t, int64_t nt) {
  const Range all = owned(total, t, nt, 0);
  const auto clip = [&](int64_t at) { return at < first ? 0 : at - first > n ? n : at - first; };
  return {clip(all.begin), clip(all.end)};
}

// The thread that owns byte `at` of `bytes` that are `groups` equal pieces, each shared out over all
// threads (experts), or one (groups 1).
static constexpr int owner_of_byte(int64_t at, int64_t bytes, int64_t groups, int nt) {
  const int64_t each = bytes / groups > 0 ? bytes / groups : 1;
  const int64_t t = at % each * nt / each;
  return static_cast<int>(t < nt ? t : nt - 1);
}

}  // namespace lc
