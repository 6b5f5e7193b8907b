// Choosing tokens from rows of logits.
//
// A row is cut into chunks at fixed places; each chunk gives partial results that are combined in
// order. What a thread does therefore never shows in the result, and few rows still use all threads.
//
// Logits are taken as they stand, with two exceptions: NaN counts as -inf, and +inf as the largest
// float. Which tokens are kept is decided on the logits, so that tokens are ranked exactly; weights
// are e^((x - max) / temperature) in fp32.
#pragma once

#include "kernels/dense.inl.h"

namespace {

constexpr int64_t kChunk = 8192;
constexpr float kLargest = 3.402823466e38f;
constexpr float kLowest = -kLargest;  // below it is only -inf
constexpr float kNoLogit = -__builtin_inff();

// Calls f(i, v) for 16 values at a time, `fill` in place of those beyond the end.
template <class F>
LC_INLINE void each16(const float* x, int64_t n, float fill, const F& f) {
  float rest[16];
  for (int64_t i = 0; i < n; i += 16) {
    const float* from = x + i;
    if (i + 16 > n) {
      vstore(rest, vset1(fill));
      std::memcpy(rest, from, 4 * static_cast<size_t>(n - i));
      from = rest;
    }
    f(i, vload(from));
  }
}
// +inf becomes the largest float; NaN stays, and is false in every comparison.
LC_INLINE vf finite_top(vf x) { return vmin(vset1(kLargest), x); }

// The largest value; NaN never wins.
LC_INLINE float largest(const float* x, int64_t n) {
  vf top = vset1(kNoLogit);
  each16(x, n, kNoLogit, [&](int64_t, vf v) { top = vmax(v, top); });
  return vhmax(top);
}
// Where the first value that equals `top`, their largest, stands.
LC_INLINE int64_t first_of(const float* x, int64_t n, float top) {
  const vf t = vset1(top);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    if (const uint32_t hit = vbits(vge(vload(x + i), t))) return i + __builtin_ctz(hit);
  while (i < n && !(x[i] >= top)) ++i;
  return i < n ? i : 0;
}

// (row, chunk) units of a batch of rows.
struct Chunks {
  int64_t vocab, per_row;
  explicit Chunks(int64_t v) : vocab(v), per_row(ceil_div(v, kChunk)) {}
  int64_t begin(int64_t c) const { return c * kChunk; }
  int64_t size(int64_t c) const { return tmin(kChunk, vocab - c * kChunk); }
  // Calls f(row, first chunk, end) for this thread's share of `rows` rows.
  template <class F>
  void share(const Ctx& ctx, int64_t rows, const F& f) const {
    const Range r = owned(rows * per_row, ctx.tid, ctx.nt, 0);
    for (int64_t u = r.begin; u < r.end;) {
      const int64_t c0 = u % per_row, c1 = tmin(per_row, c0 + r.end - u);
      f(u / per_row, c0, c1);
      u += c1 - c0;
    }
  }
};

// ---- restrict, add_bias, penalize

void restrict_tokens(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const RestrictArgs*>(p);
  const Chunks chunks(a.vocab);
  const int64_t words = ceil_div(a.vocab, 32);
  chunks.share(ctx, a.m, [&](int64_t row, int64_t c0, int64_t c1) {
    float* x = a.logits + a.rows[row] * a.vocab;
    const int32_t* mask = a.allowed + row * words;
    const int64_t end = tmin(chunks.begin(c1), a.vocab);
    for (int64_t i = chunks.begin(c0); i < end; i += 32) {
      uint32_t out = ~static_cast<uint32_t>(mask[i / 32]);
      const int64_t n = tmin<int64_t>(32, end - i);
      if (out == ~0u && n == 32) {
        vstore(x + i, vset1(kNoLogit));
        vstore(x + i + 16, vset1(kNoLogit));
        continue;
      }
      if (n < 32) out &= (1u << n) - 1;
      for (; out != 0; out &= out - 1) x[i + __builtin_ctz(out)] = kNoLogit;
    }
  });
}

void add_bias(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const BiasArgs*>(p);
  const Range rows = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = rows.begin; i < rows.end; ++i)
    for (int64_t j = a.offsets[i]; j < a.offsets[i + 1]; ++j) a.logits[i * a.vocab + a.token_ids[j]] += a.bias[j];
}

struct PenalizePlan {
  int32_t* counts;  // [threads, vocab]
  PenalizePlan(Bump& b, const PenalizeArgs& a, int nt) { counts = b.take<int32_t>(nt * round_up(a.vocab, 16)); }
};

void penalize(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const PenalizeArgs*>(p);
  Bump b{ctx.scratch};
  PenalizePlan plan(b, a, ctx.nt);
  // Only the counts of tokens that occur are ever set or read.
  int32_t* counts = plan.counts + ctx.tid * round_up(a.vocab, 16);
  constexpr int32_t kDone = -1;
  const Range rows = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float repetition = a.repetition[i], presence = a.presence[i], frequency = a.frequency[i];
    if (repetition == 1.0f && presence == 0.0f && frequency == 0.0f) continue;
    const int64_t begin = a.offsets[i], output = a.output_offsets[i], end = a.offsets[i + 1];
    for (int64_t j = begin; j < end; ++j) counts[a.token_ids[j]] = 0;
    for (int64_t j = output; j < end; ++j) ++counts[a.token_ids[j]];
    for (int64_t j = begin; j < end; ++j) {
      int32_t& count = counts[a.token_ids[j]];
      if (count == kDone) continue;
      float& x = a.logits[i * a.vocab + a.token_ids[j]];
      x = x > 0.0f ? x / repetition : x * repetition;
      x -= frequency * static_cast<float>(count);
      if (count > 0) x -= presence;
      count = kDone;
    }
  }
}

// ---- greedy

struct GreedyPlan {
  float* top;  // a unit
  GreedyPlan(Bump& b, const GreedyArgs& a, int) { top = b.take<float>(a.n * Chunks(a.vocab).per_row); }
};

LC_INLINE void largest_of_chunks(const Chunks& chunks, const float* x, int64_t c0, int64_t c1, float* top) {
  for (int64_t c = c0; c < c1; ++c) top[c] = largest(x + chunks.begin(c), chunks.size(c));
}
// The first of a row's largest logits, 0 if there are none; `top` holds those of its chunks.
LC_INLINE int32_t argmax_row(const Chunks& chunks, const float* x, const float* top) {
  const float best = largest(top, chunks.per_row);
  if (best == kNoLogit) return 0;
  const int64_t c = first_of(top, chunks.per_row, best);
  return static_cast<int32_t>(chunks.begin(c) + first_of(x + chunks.begin(c), chunks.size(c), best));
}

void greedy(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const GreedyArgs*>(p);
  Bump b{ctx.scratch};
  GreedyPlan plan(b, a, ctx.nt);
  const Chunks chunks(a.vocab);
  chunks.share(ctx, a.n, [&](int64_t row, int64_t c0, int64_t c1) {
    largest_of_chunks(chunks, a.logits + row * a.vocab, c0, c1, plan.top + row * chunks.per_row);
  });
  ctx.barrier();
  const Range rows = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = rows.begin; i < rows.end; ++i)
    a.token_ids[i] = argmax_row(chunks, a.logits + i * a.vocab, plan.top + i * chunks.per_row);
}

// ---- sample

// Two words of Philox4x32-10 (Salmon et al. 2011), counter {counter, 0}, key seed, as a number in [0, 1).
inline double uniform(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xd2511f53u} * c[0], p1 = uint64_t{0xcd9e8d57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return static_cast<double>((uint64_t{c[1]} << 32 | c[0]) >> 11) * 0x1p-53;
}

// e^((x - max) / temperature) of logits of at least `least`, 0 for others. Far below the likeliest it
// stops falling, at e^-80: denormal numbers would cost time and change nothing.
struct Weight16 {
  vf max, inverse, least;
  Weight16(float top, float temperature, float lowest)
      : max(vset1(top)), inverse(vset1(tmin(1.0f / temperature, kLargest))), least(vset1(lowest)) {}
  vm counts(vf x) const { return vge(x, least); }
  vf operator()(vf x) const {
    const vf z = vmul(vsub(x, max), inverse);
    return vkeep(counts(x), vexp(vmax(z, vset1(-80.0f))));
  }
};
struct Count16 {
  vf operator()(vf x) const { return vkeep(vge(x, vset1(kLowest)), vset1(1.0f)); }
};

// Values summed in fp32 before their sum is added to others in fp64: small weights must not be lost beside a
// large one.
constexpr int64_t kSummed = 512;

// above[j] += the weight of the values above pivot[j], and total that of all.
constexpr int kPivots = 7;
template <class W>
LC_INLINE void add_above(const float* x, int64_t n, const float* pivot, const W& weight, double* above,
                         double* total) {
  for (int64_t begin = 0; begin < n; begin += kSummed) {
    vf at[kPivots], sum[kPivots + 1];
    LC_UNROLL
    for (int j = 0; j < kPivots; ++j) {
      at[j] = vset1(pivot[j]);
      sum[j] = vset1(0.0f);
    }
    sum[kPivots] = vset1(0.0f);
    each16(x + begin, tmin(kSummed, n - begin), kNoLogit, [&](int64_t, vf v) {
      v = finite_top(v);
      const vf w = weight(v);
      sum[kPivots] = vadd(sum[kPivots], w);
      LC_UNROLL
      for (int j = 0; j < kPivots; ++j) sum[j] = vadd(sum[j], vkeep(vgt(v, at[j]), w));
    });
    for (int j = 0; j < kPivots; ++j) above[j] += vhsum(sum[j]);
    *total += vhsum(sum[kPivots]);
  }
}
template <class W>
LC_INLINE double weight_of(const float* x, int64_t n, const W& weight) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSummed) {
    vf sum = vset1(0.0f);
    each16(x + begin, tmin(kSummed, n - begin), kNoLogit, [&](int64_t, vf v) {
      v = finite_top(v);
      if (vbits(weight.counts(v)) != 0) sum = vadd(sum, weight(v));
    });
    total += vhsum(sum);
  }
  return total;
}
// Moves the values above `low` and up to `high` to `to`, in order, and returns their number. `to` may
// be `x`; it has room for n, rounded up to 16.
LC_INLINE int64_t pack_between(const float* x, int64_t n, float low, float high, float* to) {
  const vf lo = vset1(low), hi = vset1(high);
  int64_t count = 0;
  each16(x, n, kNoLogit, [&](int64_t, vf v) {
    v = finite_top(v);
    const vm inside = vand(vgt(v, lo), vge(hi, v));
    if (vbits(inside) != 0) count += vpack(to + count, inside, v);
  });
  return count;
}
LC_INLINE float below(float x) { return __builtin_nextafterf(x, kNoLogit); }

// The smallest value v of the list such that above + the weight of values > v stays below `need`; the
// largest if there is none. The list is narrowed between pivots until it is short enough to be sorted.
template <class W>
float smallest_kept(float* x, int64_t n, double above, double need, const W& weight) {
  constexpr int64_t kShort = 64;
  while (n > kShort) {
    vf low = vset1(kLargest), high = vset1(kLowest);
    each16(x, n, x[0], [&](int64_t, vf v) {
      low = vmin(low, v);
      high = vmax(high, v);
    });
    const float hi = vhmax(high), lo = -vhmax(vsub(vset1(0.0f), low));
    if (lo == hi) return hi;
    float pivot[kPivots];
    double sum[kPivots] = {}, total = 0.0;
    for (int j = 0; j < kPivots; ++j) {
      const double t = (j + 1.0) / (kPivots + 1);
      pivot[j] = tmin(static_cast<float>(lo * (1.0 - t) + hi * t), below(hi));
    }
    add_above(x, n, pivot, weight, sum, &total);
    int j = 0;  // the lowest pivot with little enough above it: all of that is kept
    while (j < kPivots && !(above + sum[j] < need)) ++j;
    if (j < kPivots) above += sum[j];
    n = pack_between(x, n, j > 0 ? pivot[j - 1] : below(lo), j < kPivots ? pivot[j] : hi, x);
  }
  for (int64_t i = 1; i < n; ++i) {
    const float v = x[i];
    int64_t j = i;
    for (; j > 0 && x[j - 1] < v; --j) x[j] = x[j - 1];
    x[j] = v;
  }
  float w[kShort];
  each16(x, n, kNoLogit, [&](int64_t i, vf v) { vstore(w + i, weight(v)); });
  int64_t i = 0;
  for (;;) {
    const float v = x[i];
    for (; i < n && x[i] == v; ++i) above += w[i];
    if (i == n || !(above < need)) return v;
  }
}

struct SamplePlan {
  float* top;       // a chunk: its largest logit
  double* sums;     // a chunk: weight above each pivot, and of all
  int64_t* counts;  // a chunk: how many values it put on its list
  double* kept;     // a chunk: weight of its tokens that are kept
  float* least;     // a row: the smallest logit kept
  float* list;      // a chunk: kChunk

  // No more rows are sampled at a time than there are threads.
  SamplePlan(Bump& b, const SampleArgs& a, int nt) {
    const int64_t units = nt * Chunks(a.vocab).per_row;
    top = b.take<float>(units);
    sums = b.take<double>(units * (kPivots + 1));
    counts = b.take<int64_t>(units);
    kept = b.take<double>(units);
    least = b.take<float>(nt);
    list = b.take<float>(units * kChunk);
  }
};

// One row: what it asks for, and the steps to its token. Each step reads what all chunks left in the
// steps before; `slot` is the row's place in the plan.
struct SampleRow {
  const SampleArgs& a;
  const Chunks chunks;
  int64_t row;
  const float* x;
  float temperature, top_p;
  int64_t top_k;
  float* top;
  double* sums;
  int64_t* counts;
  double* kept;
  float* least;
  float* list;

  SampleRow(const SampleArgs& args, const SamplePlan& p, int64_t r, int64_t slot)
      : a(args),
        chunks(args.vocab),
        row(r),
        x(args.logits + r * args.vocab),
        temperature(args.temperature[r]),
        top_p(args.top_p[r]),
        top_k(args.top_k[r]) {
    const int64_t unit = slot * chunks.per_row;
    top = p.top + unit;
    sums = p.sums + unit * (kPivots + 1);
    counts = p.counts + unit;
    kept = p.kept + unit;
    least = p.least + slot;
    list = p.list + unit * kChunk;
  }
  bool exists() const { return true; }
  bool draws() const { return temperature > 0.0f; }
  bool ranks() const { return top_k > 0 && top_k < a.vocab; }
  bool filters() const { return draws() && (ranks() || top_p < 1.0f); }

  float max() const { return tmin(largest(top, chunks.per_row), kLargest); }
  // The smallest logit that min_p keeps.
  float floor() const {
    const double least_kept = double{max()} + double{temperature} * __builtin_log(double{a.min_p[row]});
    return static_cast<float>(tmax(least_kept, double{kLowest}));
  }
  Weight16 weight(float least_kept) const { return {max(), temperature, least_kept}; }
  // The share of a weight that top_p keeps; never nothing.
  double need(double total) const { return tmax(double{top_p} * total, 1e-300); }
  // Logits that part a row's values roughly, from the largest downwards.
  void pivots(float* at) const {
    constexpr float kBelow[kPivots] = {0.75f, 1.5f, 2.5f, 4.0f, 6.0f, 9.0f, 14.0f};
    const float step = ranks() ? 1.0f : temperature, m = max();  // ranks do not depend on temperature
    for (int j = 0; j < kPivots; ++j) at[j] = tmax(m - step * kBelow[j], kLowest);
  }

  // All steps in order, by one thread.
  void run() const {
    const int64_t all = chunks.per_row;
    find_largest(0, all);
    if (draws()) weigh(0, all);
    if (filters()) {
      collect(0, all);
      decide();
      weigh_kept(0, all);
    }
    choose();
  }
  void find_largest(int64_t c0, int64_t c1) const { largest_of_chunks(chunks, x, c0, c1, top); }
  // Without a filter, weighs what is kept; else what lies above the pivots.
  void weigh(int64_t c0, int64_t c1) const {
    const Weight16 w = weight(floor());
    float at[kPivots];
    pivots(at);
    for (int64_t c = c0; c < c1; ++c) {
      const float* v = x + chunks.begin(c);
      const int64_t n = chunks.size(c);
      double* s = sums + c * (kPivots + 1);
      for (int j = 0; j <= kPivots; ++j) s[j] = 0.0;
      if (!filters())
        kept[c] = weight_of(v, n, w);
      else if (ranks())
        add_above(v, n, at, Count16{}, s, s + kPivots);
      else
        add_above(v, n, at, w, s, s + kPivots);
    }
  }
  // The smallest value kept lies above `low` and up to `high`; what lies above `high` weighs `above`.
  struct Bracket {
    float low, high;
    double above, need;
  };
  Bracket bracket() const {
    double s[kPivots + 1] = {};
    for (int64_t c = 0; c < chunks.per_row; ++c)
      for (int j = 0; j <= kPivots; ++j) s[j] += sums[c * (kPivots + 1) + j];
    float at[kPivots];
    pivots(at);
    const float bottom = ranks() ? kNoLogit : below(floor());
    const double n = ranks() ? static_cast<double>(top_k) : need(s[kPivots]);
    int j = 0;
    while (j < kPivots && s[j] < n) ++j;
    return {j < kPivots ? tmax(at[j], bottom) : bottom, j > 0 ? at[j - 1] : kLargest, j > 0 ? s[j - 1] : 0.0, n};
  }
  // Lists the values of the bracket.
  void collect(int64_t c0, int64_t c1) const {
    const Bracket b = bracket();
    for (int64_t c = c0; c < c1; ++c)
      counts[c] = pack_between(x + chunks.begin(c), chunks.size(c), b.low, b.high, list + c * kChunk);
  }
  // Finds the smallest logit that is kept.
  void decide() const {
    const Bracket b = bracket();
    int64_t n = 0;
    for (int64_t c = 0; c < chunks.per_row; ++c) {
      std::memmove(list + n, list + c * kChunk, 4 * static_cast<size_t>(counts[c]));
      n += counts[c];
    }
    *least = floor();
    if (!ranks()) {
      if (n > 0) *least = smallest_kept(list, n, b.above, b.need, weight(*least));
      return;
    }
    if (n > 0) *least = tmax(*least, smallest_kept(list, n, b.above, b.need, Count16{}));
    if (top_p >= 1.0f) return;
    n = pack_between(x, a.vocab, below(*least), kLargest, list);
    const Weight16 w = weight(*least);
    if (n > 0) *least = smallest_kept(list, n, 0.0, need(weight_of(list, n, w)), w);
  }
  // Weighs what is kept.
  void weigh_kept(int64_t c0, int64_t c1) const {
    const Weight16 w = weight(*least);
    for (int64_t c = c0; c < c1; ++c) kept[c] = weight_of(x + chunks.begin(c), chunks.size(c), w);
  }

  void choose() const {
    int32_t& id = a.token_ids[row];
    float& logprob = a.logprobs[row];
    const float m = max();
    if (!draws() || m == kNoLogit) {
      id = argmax_row(chunks, x, top);
      logprob = m == kNoLogit ? kNoLogit : 0.0f;
      return;
    }
    double total = 0.0;
    for (int64_t c = 0; c < chunks.per_row; ++c) total += kept[c];
    const auto seed = static_cast<uint64_t>(a.seeds[row]), counter = static_cast<uint64_t>(a.counters[row]);
    id = static_cast<int32_t>(draw(uniform(seed, counter) * total));
    const double z = (double{tmin(x[id], kLargest)} - m) * tmin(1.0 / temperature, double{kLargest});
    logprob = static_cast<float>(z - __builtin_log(total));
  }
  // The token at `point` of the weights kept, laid end to end. Sums of different grouping round
  // differently: past the end of a group stands its last token of any weight.
  int64_t draw(double point) const {
    const Weight16 w = weight(filters() ? *least : floor());
    int64_t chunk = 0;
    for (int64_t c = 0; c < chunks.per_row; ++c) {
      if (kept[c] > 0.0) {
        chunk = c;
        if (point < kept[c]) break;
        point -= kept[c];
      }
    }
    constexpr int64_t kGroup = 256;
    const float* v = x + chunks.begin(chunk);
    const int64_t n = chunks.size(chunk);
    int64_t group = 0;
    for (int64_t g = 0; g < n; g += kGroup) {
      const double s = weight_of(v + g, tmin(kGroup, n - g), w);
      if (s > 0.0) {
        group = g;
        if (point < s) break;
        point -= s;
      }
    }
    float weights[kGroup];
    const int64_t size = tmin(kGroup, n - group);
    each16(v + group, size, kNoLogit, [&](int64_t i, vf t) { vstore(weights + i, w(finite_top(t))); });
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (weights[i] > 0.0f) {
        found = i;
        if (point < weights[i]) break;
        point -= weights[i];
      }
    }
    return chunks.begin(chunk) + group + found;
  }
};

// As many rows as all threads have alike are each sampled by one thread, without waiting for others; the
// threads share the chunks of those left over.
void sample(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const SampleArgs*>(p);
  Bump b{ctx.scratch};
  const SamplePlan plan(b, a, ctx.nt);
  const int64_t rest = a.n % ctx.nt, whole = a.n - rest;
  for (int64_t i = ctx.tid; i < whole; i += ctx.nt) SampleRow(a, plan, i, ctx.tid).run();
  if (rest == 0) return;
  ctx.barrier();
  const Chunks chunks(a.vocab);
  const auto row = [&](int64_t slot) { return SampleRow(a, plan, whole + slot, slot); };
  // A step over the chunks of those rows that want it; none waits where no row does.
  using Wants = bool (SampleRow::*)() const;
  const auto step = [&](Wants wants, void (SampleRow::*take)(int64_t, int64_t) const) {
    bool any = false;
    for (int64_t slot = 0; slot < rest; ++slot) any |= (row(slot).*wants)();
    if (!any) return;
    chunks.share(ctx, rest, [&](int64_t slot, int64_t c0, int64_t c1) {
      const SampleRow r = row(slot);
      if ((r.*wants)()) (r.*take)(c0, c1);
    });
    ctx.barrier();
  };
  const bool owns = ctx.tid < rest;
  step(&SampleRow::exists, &SampleRow::find_largest);
  step(&SampleRow::draws, &SampleRow::weigh);
  step(&SampleRow::filters, &SampleRow::collect);
  if (owns && row(ctx.tid).filters()) row(ctx.tid).decide();
  ctx.barrier();
  step(&SampleRow::filters, &SampleRow::weigh_kept);
  if (owns) row(ctx.tid).choose();
}

// ---- logprobs

// One row by one thread: the rows of a prompt are many.
void logprobs(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const LogprobsArgs*>(p);
  const Range rows = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* x = a.logits + i * a.vocab;
    const float top = tmin(largest(x, a.vocab), kLargest);
    const double norm = top + __builtin_log(weight_of(x, a.vocab, Weight16(top, 1.0f, kLowest)));
    const auto logprob = [&](float v) {
      return v >= kLowest ? static_cast<float>(double{tmin(v, kLargest)} - norm) : kNoLogit;
    };
    for (int64_t j = i * a.m; j < (i + 1) * a.m; ++j) {
      const float v = x[a.token_ids[j]];
      a.values[j] = logprob(v);
      const vf own = vset1(v >= kLowest ? v : kNoLogit);
      int32_t likelier = 0;
      each16(x, a.vocab, kNoLogit, [&](int64_t, vf t) { likelier += __builtin_popcount(vbits(vgt(t, own))); });
      a.ranks[j] = 1 + likelier;
    }
    if (a.k == 0) continue;
    int32_t* ids = a.top_ids + i * a.k;
    float* best = a.top_values + i * a.k;
    int64_t count = 0;
    float last = kNoLogit;  // a value must be larger to be listed
    each16(x, a.vocab, kNoLogit, [&](int64_t at, vf t) {
      for (uint32_t hit = vbits(vgt(t, vset1(last))); hit != 0; hit &= hit - 1) {
        const int64_t id = at + __builtin_ctz(hit);
        if (!(x[id] > last)) continue;  // the list has changed since
        if (count < a.k) ++count;
        int64_t j = count - 1;
        for (; j > 0 && best[j - 1] < x[id]; --j) {
          best[j] = best[j - 1];
          ids[j] = ids[j - 1];
        }
        best[j] = x[id];
        ids[j] = static_cast<int32_t>(id);
        if (count == a.k) last = best[count - 1];
      }
    });
    for (int32_t id = 0; count < a.k; ++id)
      if (!(x[id] >= kLowest)) {
        best[count] = kNoLogit;
        ids[count++] = id;
      }
    for (int64_t j = 0; j < a.k; ++j) best[j] = logprob(best[j]);
  }
}

}  // namespace
