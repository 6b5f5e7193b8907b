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

// Whether the busiest of nt threads carries more than a thirty-second above the mean of `units`.
static constexpr bool uneven(int64_t units, int64_t nt) { return (units + nt - 1) / nt * nt * 32 > units * 33; }

// The share of matrix `at` of `of` equal ones that threads go through without a barrier between: shares
// move by equal steps of a unit in all, so that over all of them no thread carries more than one unit above
// the mean.
static constexpr Range owned_in_turn(int64_t n, int64_t at, int64_t of, int64_t t, int64_t nt) {
  const int64_t phase = nt - 1 - at * nt / of;
  return {(t * n + phase) / nt, ((t + 1) * n + phase) / nt};
}

// Whether `pairs` of panels (gate, up) in each of `of` matrices are so few beside the threads that the two
// panels of a pair may have different owners.
static constexpr bool pairs_part(int64_t pairs, int64_t of, int64_t nt) { return uneven(pairs * of, nt); }

// The panels that thread t owns of such a matrix.
static constexpr Range owned_panels(int64_t pairs, int64_t at, int64_t of, int64_t t, int64_t nt) {
  if (pairs_part(pairs, of, nt)) return owned_in_turn(2 * pairs, at, of, t, nt);
  const Range r = owned_in_turn(pairs, at, of, t, nt);
  return {2 * r.begin, 2 * r.end};
}

// The columns, in panels, that thread t owns of matrix `at` of `of` whose results are added up. Where they
// share out evenly it owns the same ones of each, and adds them up by itself.
static constexpr Range owned_columns(int64_t n, int64_t at, int64_t of, int64_t t, int64_t nt) {
  return uneven(n, nt) ? owned_in_turn(n, at, of, t, nt) : owned(n, t, nt, 0);
}

// Shares of one matrix in pieces along K, `pieces` a panel: whole panels where these share out evenly.
static constexpr Range owned_pieces(int64_t panels, int64_t pieces, int64_t t, int64_t nt) {
  if (uneven(panels, nt)) return owned(panels * pieces, t, nt, 0);
  const Range r = owned(panels, t, nt, 0);
  return {r.begin * pieces, r.end * pieces};
}

// The share of units [first, first + n) of `total` that are shared out together: of a matrix among
// several that threads go through without a barrier between.
static constexpr Range owned_among(int64_t n, int64_t first, int64_t total, int64_t t, int64_t nt) {
  const Range all = owned(total, t, nt, 0);
  const auto clip = [&](int64_t at) { return at < first ? 0 : at - first > n ? n : at - first; };
  return {clip(all.begin), clip(all.end)};
}

// Calls fn(thread) for those whose work thread t takes, in order: its own, then that of the threads of its
// memory node [begin, end) whose number within the node differs from its own in the last four bits, or in one
// of the others. So help goes both ways, each helps another one first, and where the node has many threads
// nobody has to look at all of them. Rows of other nodes would come from far memory.
template <class Fn>
static constexpr void each_helped(Range node, int t, const Fn& fn) {
  constexpr int kNear = 16;
  for (int64_t differs = 0; differs < 2 * node.size(); differs = differs < kNear ? differs + 1 : 2 * differs) {
    const int64_t of = node.begin + ((t - node.begin) ^ differs);
    if (of < node.end) fn(static_cast<int>(of));
  }
}

// The thread that owns byte `at` of `bytes` that are `groups` equal pieces, each shared out over all
// threads (experts), or one (groups 1).
static constexpr int owner_of_byte(int64_t at, int64_t bytes, int64_t groups, int nt) {
  const int64_t each = bytes / groups > 0 ? bytes / groups : 1;
  const int64_t t = at % each * nt / each;
  return static_cast<int>(t < nt ? t : nt - 1);
}

}  // namespace lc
