// Multi-head latent attention (DeepSeek-V2 technical report, section 2.1).
#pragma once

#include <atomic>
#include <new>

#include "kernels/dense.inl.h"

namespace {

constexpr int64_t kTileTokens = 128;   // tokens of the context that are attended at a time
constexpr int64_t kSplitTokens = 512;  // tokens whose tiles are merged before they join the rest

LC_INLINE const bf16* cache_row(const Cache& cache, const Places& at, int64_t seq, int64_t pos) {
  const int64_t block = at.block_tables[seq * at.table_width + pos / cache.block_size];
  return cache.data + (block * cache.block_size + pos % cache.block_size) * cache.dim;
}

// ---- input: projections, norms, rope, absorption, cache write ----------------------------------

template <class Isa>
struct MlaInputPlan {
  int64_t q_rank, kv_rank, q_dim;
  ActSlot<Isa> x_q, x_kv;
  float* qa;   // [n, q_lora_rank]
  float* kv;   // [n, latent + rope]
  float* q;    // [n, heads * (nope + rope)]
  ActSlot<Isa> qn;
  bf16* normed;  // a row a thread
  HeadsPlan<Isa> absorb;

  static const Weight& first_q(const MlaInputArgs& a) { return a.lora ? a.q_a : a.q_b; }
  MlaInputPlan(Bump& b, const MlaInputArgs& a, int nt)
      : q_rank(a.lora ? a.q_a.layout.rows : 0),
        kv_rank(a.kv_a.layout.rows),
        q_dim(a.q_b.layout.rows),
        x_q(b, nt, first_q(a).layout.format, a.n, a.hidden),
        x_kv(b, nt, a.kv_a.layout.format, a.n, a.hidden),
        qa(b.take<float>(a.n * q_rank)),
        kv(b.take<float>(a.n * kv_rank)),
        q(b.take<float>(a.n * q_dim)),
        qn(b, nt, a.q_b.layout.format, a.n, a.q_b.layout.cols),
        normed(b.take<bf16>(nt * round_up(q_rank + kv_rank, 32))),
        absorb(b, a.w_kc.layout, tmax<int64_t>(a.absorbed, 1), nt) {}
};

// Norms the latent, ropes the shared key and writes both to the row's place in the cache.
LC_INLINE void write_latent(const MlaInputArgs& a, int64_t i, const float* kv) {
  const int64_t latent = a.shape.latent, rope = a.shape.rope, pos = a.places.positions[i];
  bf16* to = const_cast<bf16*>(cache_row(a.cache, a.places, a.places.row_seq[i], pos));
  norm_row(kv, a.kv_norm, a.eps, latent, to);
  float key[1024];
  rope_row(kv + latent, a.rope_table + pos * rope, rope, key);
  round_row(key, rope, to + latent);
  for (int64_t j = latent + rope; j < a.cache.dim; ++j) to[j] = 0;
}

template <class Isa>
void mla_input(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MlaInputArgs*>(p);
  Bump b{ctx.scratch};
  MlaInputPlan<Isa> plan(b, a, ctx.nt);
  const MlaShape& s = a.shape;

  // Both projections of x, their panels shared out together.
  const Weight& wq = plan.first_q(a);
  const Act xq = plan.x_q.fill(ctx, a.x, a.hidden);
  const Act xkv = a.kv_a.layout.format == wq.layout.format ? xq : plan.x_kv.fill(ctx, a.x, a.hidden);
  float* q_to = a.lora ? plan.qa : plan.q;
  auto store_q = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_tile_f32(q_to, wq.layout.rows, wq.layout.rows, m0, m, panel, np, c);
  };
  auto store_kv = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_tile_f32(plan.kv, plan.kv_rank, plan.kv_rank, m0, m, panel, np, c);
  };
  const int64_t of_kv = Units(a.kv_a.layout, a.n, 1).count(), of_q = Units(wq.layout, a.n, 1).count();
  const auto own_kv = [&](int t) { return owned_among(of_kv, 0, of_kv + of_q, t, ctx.nt); };
  const auto own_q = [&](int t) { return owned_among(of_q, of_kv, of_kv + of_q, t, ctx.nt); };
  shared_gemm_by<Isa>(ctx, a.kv_a, xkv, a.n, 1, own_kv, sink_of(store_kv));
  shared_gemm_by<Isa>(ctx, wq, xq, a.n, 1, own_q, sink_of(store_q));
  ctx.barrier();

  // Norms. The last threads take the latents, so that the first are free for the queries.
  const Range kv_rows = owned(a.n, ctx.nt - 1 - ctx.tid, ctx.nt, 0);
  for (int64_t i = kv_rows.begin; i < kv_rows.end; ++i) write_latent(a, i, plan.kv + i * plan.kv_rank);
  if (a.lora) {
    bf16* row = plan.normed + ctx.tid * round_up(plan.q_rank + plan.kv_rank, 32);
    const Act qn = plan.qn.act(ctx.tid);
    const Range rows = plan.qn.share(ctx);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      norm_row(plan.qa + i * plan.q_rank, a.q_norm, a.eps, plan.q_rank, row);
      act_prepare_row<Isa>(a.q_b.layout.format, qn, i, row, plan.q_rank);
    }
    plan.qn.meet(ctx);
    auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_tile_f32(plan.q, plan.q_dim, plan.q_dim, m0, m, panel, np, c);
    };
    shared_gemm<Isa>(ctx, a.q_b, qn, a.n, 1, 1, sink_of(store));
    ctx.barrier();
  }

  // Rope, then plain queries (prefill rows) or absorption by w_kc (decode rows).
  const int64_t dim = s.nope + s.rope;
  const Range plain = owned(a.n - a.absorbed, ctx.tid, ctx.nt, 0);
  for (int64_t i = a.absorbed + plain.begin; i < a.absorbed + plain.end; ++i)
    for (int64_t h = 0; h < s.heads; ++h) {
      const float* src = plan.q + i * plan.q_dim + h * dim;
      float key[1024];
      rope_row(src + s.nope, a.rope_table + a.places.positions[i] * s.rope, s.rope, key);
      bf16* to = a.q + (i * s.heads + h) * dim;
      round_row(src, s.nope, to);
      round_row(key, s.rope, to + s.nope);
    }
  if (a.absorbed == 0) return;
  const Layout& l = a.w_kc.layout;
  const Act qh = act_at<Isa>(l.format, plan.absorb.act + ctx.tid * plan.absorb.bytes, a.absorbed, s.nope);
  each_unit(ctx, s.heads, l.panels(), [&](int64_t h, int64_t p0, int64_t p1) {
    const Panels w = panels_of(a.w_kc, h);
    float key[1024];
    if (p0 == 0) {
      for (int64_t i = 0; i < a.absorbed; ++i) {
        const float* src = plan.q + i * plan.q_dim + h * dim;
        rope_row(src + s.nope, a.rope_table + a.places.positions[i] * s.rope, s.rope, key);
        bf16* to = a.q_latent + (i * s.heads + h) * a.cache.dim;
        round_row(key, s.rope, to + s.latent);
        for (int64_t j = s.latent + s.rope; j < a.cache.dim; ++j) to[j] = 0;
      }
    }
    for (int64_t i = 0; i < a.absorbed; ++i)
      act_prepare_row_f32<Isa>(qh, i, plan.q + i * plan.q_dim + h * dim, w.column_scale, s.nope);
    auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_tile_bf16(a.q_latent + h * a.cache.dim, s.heads * a.cache.dim, s.latent, m0, m, panel, np, c);
    };
    gemm<Isa>(w, p0, p1, qh, a.absorbed, sink_of(store));
  });
}

// ---- attention over tiles ----------------------------------------------------------------------

// Weights of softmax are powers of two: scores are scaled by this too, and so are the maxima below.
constexpr float kLog2E = 1.44269504f;

// Softmax attention state of `rows` query rows: running maximum, sum and weighted values.
struct AttendState {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* out;  // [rows, stride]
  int64_t width;

  // From row to row: an odd number of cache lines, so that a few columns of many rows do not share few sets.
  static constexpr int64_t stride_of(int64_t width) { return round_up(width, 32) + 16; }
  int64_t stride() const { return stride_of(width); }
  float* row(int64_t i) const { return out + i * stride(); }
};

LC_INLINE void attend_forget(const AttendState& st, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    st.max[i] = -__builtin_inff();
    st.sum[i] = 0.0f;
  }
}
LC_INLINE void attend_reset(const AttendState& st, int64_t rows) {
  attend_forget(st, rows);
  std::memset(st.out, 0, 4 * static_cast<size_t>(rows * st.stride()));
}

// Keys and values of one tile, packed as panels: keys [token panel][k/2][16][2], values [column
// panel][token/2][16][2]. Rows of tokens that do not exist must point at zeros.
struct KvTile {
  uint8_t* keys;
  uint8_t* values;
  int64_t key_dim;    // multiple of 32
  int64_t value_dim;  // columns; panels cover round_up(value_dim, 16)

  // Bytes of so many panels.
  static int64_t key_bytes(int64_t key_dim, int64_t panels) { return panels * key_dim * 32; }
  static int64_t value_bytes(int64_t panels) { return panels * value_stride(); }
  static int64_t value_stride() { return kTileTokens * 32 + 64; }  // off the power of two

  int64_t key_stride() const { return key_dim * 32; }
  int64_t panels() const { return ceil_div(value_dim, 16); }  // of values

  // Panels [g0, g1) of 16 tokens of keys, to `keys` on.
  void pack_keys(const bf16* const* rows, int64_t g0, int64_t g1) const {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t k = 0; k < key_dim / 32; ++k)
        transpose_block(reinterpret_cast<const uint8_t* const*>(rows + g * 16), static_cast<size_t>(k) * 64,
                        keys + (g - g0) * key_stride() + k * 1024);
  }
  // Panels [c0, c1) of 16 columns of the values of `tokens` tokens, to `values` on.
  void pack_values(const bf16* const* rows, int64_t tokens, int64_t c0, int64_t c1) const {
    const int64_t pairs = round_up(tokens, 32) / 2;
    for (int64_t t = 0; t < pairs; ++t)
      for (int64_t c = c0; c < c1; ++c)
        interleave_rows(rows[2 * t] + c * 16, rows[2 * t + 1] + c * 16,
                        values + (c - c0) * value_stride() + t * 64);
  }
};

// What attend_tile multiplies: a tile that lies packed as a whole, for many blocks of query rows.
struct WholeTile {
  KvTile kv;
  int64_t key_panels() const { return kTileTokens / 16; }  // how many it has ready at a time
  int64_t value_panels() const { return kv.panels(); }
  const uint8_t* keys(int64_t, int64_t) const { return kv.keys; }
  const uint8_t* values(int64_t, int64_t) const { return kv.values; }
};
// A tile that is attended once: a few panels are packed, used, and packed over, so that they never leave the
// first-level cache.
template <class Isa>
struct PassingTile {
  KvTile kv;
  const bf16* const* rows;
  int64_t tokens;
  static constexpr int64_t key_panels() { return Isa::kTiles ? 2 : 1; }
  static constexpr int64_t value_panels() { return 2; }
  const uint8_t* keys(int64_t p0, int64_t p1) const {
    // The rows behind, while these are packed and multiplied.
    for (int64_t j = p1 * 16; j < tmin(tokens, (2 * p1 - p0) * 16); ++j)
      for (int64_t k = 0; k < kv.key_dim; k += 32) vprefetch_l2(rows[j] + k);
    kv.pack_keys(rows, p0, p1);
    return kv.keys;
  }
  const uint8_t* values(int64_t p0, int64_t p1) const {
    kv.pack_values(rows, tokens, p0, p1);
    return kv.values;
  }
};

// Most heads that attend to a tile together in decoding. More share the packing of values, but their states have
// to lie close.
template <class Isa>
constexpr int64_t kMaxGroup = Isa::kTiles ? 128 : 64;

constexpr int64_t kScoreStride = kTileTokens + 16;  // an odd number of cache lines, as above

struct AttendScratch {
  float* scores;  // [rows, kScoreStride]
  float* alpha;   // [rows]
  uint8_t* probs;  // prepared activations [rows, kTileTokens]
};
template <class Isa>
int64_t attend_scratch_bytes(int64_t rows) {
  return round_up(rows * kScoreStride * 4, 64) + round_up(rows * 4, 64) +
         act_size<Isa>(Format::BF16, rows, kTileTokens);
}
template <class Isa>
AttendScratch attend_scratch(uint8_t* mem, int64_t rows) {
  const int64_t s = round_up(rows * kScoreStride * 4, 64);
  return {reinterpret_cast<float*>(mem), reinterpret_cast<float*>(mem + s), mem + s + round_up(rows * 4, 64)};
}

// Scores of the first `tokens` of a tile: [rows, kScoreStride].
template <class Isa, class Tile>
void tile_scores(const Act& q, int64_t rows, const Tile& tile, int64_t tokens, float* scores) {
  const KvTile& kv = tile.kv;
  int64_t at = 0;  // the first of the panels that are multiplied
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < np; ++j)
        vstore(scores + (m0 + i) * kScoreStride + (at + panel + j) * 16, vload(c + i * kTileCols + j * 16));
  };
  for (const int64_t end = ceil_div(tokens, 16); at < end; at += tile.key_panels()) {
    const int64_t n = tmin(tile.key_panels(), end - at);
    const Panels keys{Format::BF16, tile.keys(at, at + n), kv.key_stride(), kv.key_dim / 2, nullptr};
    if constexpr (Isa::kTiles) {
      if (rows >= 16) {
        Isa::template plain_product<false>(keys, n, q, rows, scores + at * 16, kScoreStride, 16);
        continue;
      }
    }
    gemm<Isa>(keys, 0, n, keys.base, q, rows, 1, sink_of(store));
  }
}

// Online softmax of a tile's scores: st.max and st.sum go on, mem.probs are the weights. Row i sees the first
// visible(i) tokens.
template <class Isa, class Visible>
void tile_softmax(int64_t rows, int64_t tokens, float scale, const Visible& visible, const AttendScratch& mem,
                  const AttendState& st) {
  const Act probs = act_at<Isa>(Format::BF16, mem.probs, rows, kTileTokens);
  const int64_t width = round_up(tokens, 32);
  scale *= kLog2E;
  const vf vscale = vset1(scale);
  const auto seen_by = [&](int64_t i) { return tmax<int64_t>(0, tmin<int64_t>(tokens, visible(i))); };
  for (int64_t i0 = 0; i0 < rows; i0 += 16) {
    const int64_t i1 = tmin(rows, i0 + 16);
    // Maxima of 16 rows, so that one exponential rescales them all; a row that sees nothing stays as it is.
    float before[16] = {}, after[16] = {};
    for (int64_t i = i0; i < i1; ++i) {
      float* s = mem.scores + i * kScoreStride;
      const int64_t seen = seen_by(i);
      if (seen == 0) continue;
      for (int64_t k = seen; k % 16 != 0; ++k) s[k] = -__builtin_inff();
      vf top = vload(s);
      for (int64_t k = 16; k < seen; k += 16) top = vmax(top, vload(s + k));
      before[i - i0] = st.max[i];
      st.max[i] = after[i - i0] = tmax(st.max[i], vhmax(top) * scale);
    }
    vstore(mem.alpha + i0, vexp2(vsub(vload(before), vload(after))));
    for (int64_t i = i0; i < i1; ++i) {
      const float* s = mem.scores + i * kScoreStride;
      const int64_t seen = seen_by(i), whole = seen / 16 * 16;
      const vf less = vset1(-st.max[i]);
      vf sum = vset1(0.0f);
      int64_t k = 0;
      for (; k < whole; k += 16) {
        const vf e = vexp2(vfma(vload(s + k), vscale, less));
        sum = vadd(sum, e);
        act_store16<Isa>(probs, i, k, e);
      }
      // Hidden tokens weigh nothing at all: exp of the clamped argument would leave a trace.
      if (k < seen) {
        float t[16] = {};
        vstore_n(t, vexp2(vfma(vload(s + k), vscale, less)), static_cast<int>(seen - k));
        sum = vadd(sum, vload(t));
        act_store16<Isa>(probs, i, k, vload(t));
        k += 16;
      }
      for (; k < width; k += 16) act_store16<Isa>(probs, i, k, vset1(0.0f));
      if (seen != 0) st.sum[i] = st.sum[i] * mem.alpha[i] + vhsum(sum);
    }
  }
}

// Panels [at, end) of the tile's values, weighted by mem.probs: sums(row, column, sums of 16 columns).
template <class Isa, class Tile, class Sums>
void tile_values(int64_t rows, const Tile& tile, int64_t tokens, int64_t at, int64_t end, const AttendScratch& mem,
                 const Sums& sums) {
  const KvTile& kv = tile.kv;
  const Act probs = act_at<Isa>(Format::BF16, mem.probs, rows, kTileTokens);
  auto each = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < np; ++j) sums(m0 + i, (at + panel + j) * 16, vload(c + i * kTileCols + j * 16));
  };
  for (; at < end; at += tile.value_panels()) {
    const int64_t n = tmin(tile.value_panels(), end - at);
    const Panels values{Format::BF16, tile.values(at, at + n), kv.value_stride(), round_up(tokens, 32) / 2,
                        nullptr};
    if constexpr (Isa::kTiles) {
      if (rows >= 16) {
        alignas(64) float c[kMaxGroup<Isa> * 32];
        Isa::template plain_product<false>(values, n, probs, rows, c, 32, 16);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < n; ++j) sums(i, (at + j) * 16, vload(c + i * 32 + j * 16));
        continue;
      }
    }
    gemm<Isa>(values, 0, n, values.base, probs, rows, 1, sink_of(each));
  }
}

// One tile: scores, online softmax, weighted values added to what st holds.
template <class Isa, class Tile, class Visible>
void attend_tile(const Act& q, int64_t rows, const Tile& tile, int64_t tokens, float scale, const Visible& visible,
                 const AttendScratch& mem, const AttendState& st) {
  tile_scores<Isa>(q, rows, tile, tokens, mem.scores);
  tile_softmax<Isa>(rows, tokens, scale, visible, mem, st);
  if constexpr (Isa::kTiles) {
    // Tiles add to what st holds themselves. Most maxima stay, and with them most rows.
    for (int64_t i = 0; i < rows; ++i) {
      if (mem.alpha[i] == 1.0f) continue;
      const vf alpha = vset1(mem.alpha[i]);
      float* row = st.row(i);
      for (int64_t k = 0; k < st.width; k += 16) vstore(row + k, vmul(vload(row + k), alpha));
    }
    const Panels values{Format::BF16, tile.kv.values, KvTile::value_stride(), round_up(tokens, 32) / 2, nullptr};
    const Act probs = act_at<Isa>(Format::BF16, mem.probs, rows, kTileTokens);
    Isa::template plain_product<true>(values, tile.value_panels(), probs, rows, st.out, st.stride(), 16);
    return;
  }
  tile_values<Isa>(rows, tile, tokens, 0, tile.kv.panels(), mem, [&](int64_t i, int64_t column, vf sums) {
    float* to = st.row(i) + column;
    vstore(to, vfma(vload(to), vset1(mem.alpha[i]), sums));
  });
}

// acc <- acc merged with part, both unnormalized. The order of merges is that of the context.
LC_INLINE void merge_state(const AttendState& acc, int64_t i, float max, float sum, const float* out) {
  const float m = tmax(acc.max[i], max);
  const vf a = vset1(exp2_of(acc.max[i] - m)), b = vset1(exp2_of(max - m));
  float* to = acc.row(i);
  for (int64_t k = 0; k < acc.width; k += 16) vstore(to + k, vfma(vload(to + k), a, vmul(vload(out + k), b)));
  acc.sum[i] = acc.sum[i] * exp2_of(acc.max[i] - m) + sum * exp2_of(max - m);
  acc.max[i] = m;
}
LC_INLINE void merge_states(const AttendState& acc, const AttendState& part, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) merge_state(acc, r, part.max[r], part.sum[r], part.row(r));
}

// ---- decode: absorbed, in latent space ---------------------------------------------------------

// Rows of the cache that are attended next, fetched into the second-level cache a few lines at a time while
// those before them are worked on.
struct RowsAhead {
  const bf16* rows[kTileTokens];
  int64_t count = 0, dim, row = 0, at = 0;

  void fetch(int64_t lines) {
    for (; lines > 0 && row < count; --lines) {
      vprefetch_l2(rows[row] + at);
      at += 32;
      if (at >= dim) {
        at = 0;
        ++row;
      }
    }
  }
};

// Scores of a tile by whole panels of heads: [panel][kTileTokens][16 heads]. Rows of the cache are multiplied as
// they lie, by queries packed as panels: no key is transposed. A score has the bits of tile_scores.
template <class Isa>
void scores_by_head(const Panels& q, int64_t panels, const bf16* const* rows, int64_t tokens, int64_t dim,
                    uint8_t* widened, float* scores, RowsAhead& ahead) {
  int64_t at = 0;
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < np; ++j)
        vstore(scores + ((panel + j) * kTileTokens + at + m0 + i) * 16, vload(c + i * kTileCols + j * 16));
  };
  for (int64_t m = 0; at < tokens; at += m) {
    Act a;
    if constexpr (Isa::kBf16Act) {
      const auto follows = [&](int64_t j) { return j < tokens && rows[j] == rows[at] + (j - at) * dim; };
      const int64_t most = Isa::kTiles ? kTileTokens : 32;
      for (m = 1; m < most && follows(at + m); ++m) continue;
      // Tiles read 16 rows at a time, and behind these may be none.
      if (Isa::kTiles && m > 16) m = m / 16 * 16;
      a = {reinterpret_cast<uint8_t*>(const_cast<bf16*>(rows[at])), nullptr, dim * 2, 64, dim * 32};
    } else {
      m = tmin<int64_t>(16, tokens - at);
      a = act_at<Isa>(Format::BF16, widened, 16, dim);
      for (int64_t j = 0; j < m; ++j) act_prepare_row<Isa>(Format::BF16, a, j, rows[at + j], dim);
    }
    if constexpr (Isa::kTiles) {
      if (m >= 16) {  // what is fetched in a burst would hold up the tiles
        Isa::template plain_product<false>(q, panels, a, m, scores + at * 16, 16, kTileTokens * 16);
        continue;
      }
    }
    ahead.fetch(m * 8);
    gemm<Isa>(q, 0, panels, q.base, a, m, 1, sink_of(store));
  }
}

// Softmax of such scores within the tile: maxima and sums of 16 heads a panel, weights into mem.probs. Lane by
// lane the order is that of tile_softmax.
template <class Isa>
void softmax_by_head(int64_t panels, int64_t tokens, float scale, const AttendScratch& mem, float* max, float* sum,
                     RowsAhead& ahead) {
  const Act probs = act_at<Isa>(Format::BF16, mem.probs, panels * 16, kTileTokens);
  scale *= kLog2E;
  const vf vscale = vset1(scale);
  for (int64_t p = 0; p < panels; ++p) {
    float* s = mem.scores + p * kTileTokens * 16;
    vf top = vload(s);
    for (int64_t t = 1; t < tokens; ++t) top = vmax(top, vload(s + t * 16));
    top = vmul(top, vscale);
    vstore(max + p * 16, top);
    const vf less = vsub(vset1(0.0f), top);
    alignas(64) float sums[16][16] = {};  // by token modulo 16
    for (int64_t t0 = 0; t0 < round_up(tokens, 32); t0 += 16) {
      const uint8_t* lines[16];
      for (int64_t j = 0; j < 16; ++j) {
        float* at = s + (t0 + j) * 16;
        const vf e = t0 + j < tokens ? vexp2(vfma(vload(at), vscale, less)) : vset1(0.0f);
        vstore(sums[j], vadd(vload(sums[j]), e));
        vstore(at, e);
        lines[j] = reinterpret_cast<const uint8_t*>(at);
      }
      ahead.fetch(16);
      alignas(64) float by_head[256];
      transpose_block(lines, 0, reinterpret_cast<uint8_t*>(by_head));
      for (int64_t h = 0; h < 16; ++h) act_store16<Isa>(probs, p * 16 + h, t0, vload(by_head + h * 16));
    }
    for (int64_t half = 8; half > 0; half /= 2)  // as vhsum adds
      for (int64_t j = 0; j < half; ++j) vstore(sums[j], vadd(vload(sums[j]), vload(sums[j + half])));
    vstore(sum + p * 16, vload(sums[0]));
  }
}

// How the work is cut into items: a row's heads in groups, and its context in spans. `group` heads attend
// together: many share the packing of a tile, few feed more threads. Where there are fewer tiles than threads,
// these share each tile: its tokens for the scores, its columns for the values. The cut never changes a result:
// each tile is attended by itself, a split's tiles are merged in order, then a row's splits.
enum class Span { kTile, kSplit, kRow };
struct DecodeShape {
  int64_t group, groups;
  Span span;
  int64_t items;
  bool share_tiles;

  int64_t spans(int64_t context) const { return spans_of(span, context); }
  static int64_t spans_of(Span span, int64_t context) {
    if (span == Span::kRow) return 1;
    return ceil_div(context, span == Span::kTile ? kTileTokens : kSplitTokens);
  }
};

LC_INLINE int64_t spans_in(const MlaDecodeArgs& a, Span span) {
  int64_t count = 0;
  for (int64_t i = 0; i < a.n; ++i) count += DecodeShape::spans_of(span, a.places.positions[i] + 1);
  return count;
}
// Items enough for all threads, of spans as long as possible: what lies between them is stored.
LC_INLINE DecodeShape decode_shape(const MlaDecodeArgs& a, int64_t group, int nt) {
  const int64_t heads = a.shape.heads, tiles = spans_in(a, Span::kTile);
  if (heads >= 16 && tiles * ceil_div(heads, 16) < nt)
    return {group, ceil_div(heads, group), Span::kTile, tiles, true};
  const auto groups = [&] { return ceil_div(heads, group); };
  while (group > 16 && tiles * groups() < 2 * nt) group = ceil_div(group, 2);
  while (group > 2 && tiles * groups() < nt) group = ceil_div(group, 2);
  Span span = Span::kTile;
  if (a.n * groups() >= 4 * nt)
    span = Span::kRow;
  else if (spans_in(a, Span::kSplit) * groups() >= 2 * nt)
    span = Span::kSplit;
  return {group, groups(), span, spans_in(a, span) * groups(), false};
}
// Most spans whose results are stored, for positions that are not known yet.
LC_INLINE int64_t most_spans(const MlaDecodeArgs& a, int nt) {
  const int64_t context = a.places.table_width * a.cache.block_size;
  const int64_t tiles = a.n * DecodeShape::spans_of(Span::kTile, context);
  const int64_t splits = a.n * DecodeShape::spans_of(Span::kSplit, context);
  // Tiles are stored where there are fewer than 2 * nt splits, so at most 4 times as many tiles.
  return tmax(splits, tmin(tiles, int64_t{8} * nt + a.n));
}

template <class Isa>
struct MlaDecodePlan {
  int64_t group;  // most heads of an item
  int64_t width;  // latent, in whole panels
  int64_t q_bytes, scratch_bytes, act_bytes;
  bf16* zeros;  // a row a thread
  uint8_t *q, *keys, *scratch;  // a thread's; values stand behind the keys
  float *part, *split, *acc;  // a thread's states: max, sum, out of `group` rows; of `part`, no out
  int64_t state_floats;
  float* shared_scores;      // of tiles that threads share: [nt, kTileTokens, 16], by tile and panel of heads
  float* stored;             // [spans, heads, width + 16] (sum, max behind the values)
  uint8_t* latent_act;       // [heads] prepared activations [n, latent]

  // With what register tiles fetch behind them, so that no thread fetches what another one writes.
  static int64_t tile_bytes(int64_t dim) {
    using Tile = PassingTile<Isa>;
    return keys_bytes(dim) + KvTile::value_bytes(Tile::value_panels()) + 8192;
  }
  // Keys in panels or, where heads are, rows widened to fp32.
  static int64_t keys_bytes(int64_t dim) {
    const int64_t panels = KvTile::key_bytes(dim, PassingTile<Isa>::key_panels());
    return round_up(Isa::kBf16Act ? panels : tmax(panels, act_size<Isa>(Format::BF16, 16, dim)), 64);
  }
  static int64_t state_size(int64_t rows, int64_t width) {
    return 2 * round_up(rows, 16) + rows * AttendState::stride_of(width);
  }
  MlaDecodePlan(Bump& b, const MlaDecodeArgs& a, int nt) {
    group = tmin(a.shape.heads, kMaxGroup<Isa>);
    width = round_up(a.shape.latent, 16);
    q_bytes = act_size<Isa>(Format::BF16, group, a.cache.dim);
    scratch_bytes = round_up(attend_scratch_bytes<Isa>(round_up(group, 16)), 64);
    act_bytes = act_size<Isa>(a.w_vc.layout.format, a.n, a.shape.latent);
    zeros = b.take<bf16>(nt * a.cache.dim);
    q = b.take<uint8_t>(nt * q_bytes);
    keys = b.take<uint8_t>(nt * tile_bytes(a.cache.dim));
    scratch = b.take<uint8_t>(nt * scratch_bytes);
    state_floats = round_up(state_size(group, width), 16);
    part = b.take<float>(nt * 2 * round_up(group, 16));
    split = b.take<float>(nt * state_floats);
    acc = b.take<float>(nt * state_floats);
    shared_scores = b.take<float>(nt * kTileTokens * 16);
    stored = a.n * ceil_div(a.shape.heads, group) < 4 * nt
                 ? b.take<float>(most_spans(a, nt) * a.shape.heads * (width + 16))
                 : nullptr;
    latent_act = b.take<uint8_t>(a.shape.heads * act_bytes);
  }
  AttendState state(float* base, int tid) const {
    float* s = base + tid * state_floats;
    const int64_t r = round_up(group, 16);
    return {s, s + r, s + 2 * r, width};
  }
  float* slot(const MlaDecodeArgs& a, int64_t span, int64_t head) const {
    return stored + (span * a.shape.heads + head) * (width + 16);
  }
};

// The normalized latent of (row, head), as activations of w_vc.
template <class Isa>
LC_INLINE void finish_latent(const MlaDecodeArgs& a, const MlaDecodePlan<Isa>& plan, int64_t row, int64_t head,
                             float* out, float sum) {
  const vf r = vset1(1.0f / sum);
  for (int64_t k = 0; k < plan.width; k += 16) vstore(out + k, vmul(vload(out + k), r));
  const Act act = act_at<Isa>(a.w_vc.layout.format, plan.latent_act + head * plan.act_bytes, a.n, a.shape.latent);
  act_prepare_row_f32<Isa>(act, row, out, panels_of(a.w_vc, head).column_scale, a.shape.latent);
}

template <class Isa>
void mla_decode(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MlaDecodeArgs*>(p);
  Bump b{ctx.scratch};
  MlaDecodePlan<Isa> plan(b, a, ctx.nt);
  const DecodeShape d = decode_shape(a, plan.group, ctx.nt);
  const int64_t heads = a.shape.heads, dim = a.cache.dim;
  bf16* zeros = plan.zeros + ctx.tid * dim;
  std::memset(zeros, 0, 2 * static_cast<size_t>(dim));

  uint8_t* const keys = plan.keys + ctx.tid * plan.tile_bytes(dim);
  const KvTile tile{keys, keys + plan.keys_bytes(dim), dim, plan.width};
  // By whole panels of heads where they are so many; where threads share a panel of them, by tokens.
  const bool by_head = d.group >= 16;
  const int64_t padded = round_up(plan.group, 16);
  uint8_t* const q_mem = plan.q + ctx.tid * plan.q_bytes;
  const Act q = act_at<Isa>(Format::BF16, q_mem, plan.group, dim);
  const Panels q_panels{Format::BF16, q_mem, dim * 32, dim / 2, nullptr};
  const AttendScratch mem = attend_scratch<Isa>(plan.scratch + ctx.tid * plan.scratch_bytes, padded);
  const AttendState split = plan.state(plan.split, ctx.tid), acc = plan.state(plan.acc, ctx.tid);
  float* const part_max = plan.part + ctx.tid * 2 * padded;
  const AttendState part{part_max, part_max + padded, nullptr, 0};

  int64_t prepared_row = -1, prepared_head = -1;  // the queries in q
  const auto prepare = [&](int64_t row, int64_t h0, int64_t rows) {
    if (row == prepared_row && h0 == prepared_head) return;
    prepared_row = row;
    prepared_head = h0;
    const auto query = [&](int64_t r) { return a.q_latent + (row * heads + h0 + r) * dim; };
    for (int64_t r = 0; r < rows && !by_head; ++r) act_prepare_row<Isa>(Format::BF16, q, r, query(r), dim);
    for (int64_t r0 = 0; r0 < rows && by_head; r0 += 16) {
      const bf16* of[16];
      for (int64_t r = 0; r < 16; ++r) of[r] = r0 + r < rows ? query(r0 + r) : zeros;
      KvTile{q_mem + r0 * dim * 2, nullptr, dim, 0}.pack_keys(of, 0, 1);
    }
  };
  const auto run_item = [&](int64_t row, int64_t g, int64_t s, int64_t span) {
    const int64_t context = a.places.positions[row] + 1, seq = a.places.row_seq[row];
    const int64_t h0 = g * d.group, rows = tmin(d.group, heads - h0);
    prepare(row, h0, rows);
    // The tile of tokens from t on joins `split`, or is its first.
    const auto attend = [&](int64_t t, bool first) {
      const int64_t tokens = tmin(kTileTokens, context - t);
      const bf16* rows_at[kTileTokens];
      for (int64_t j = 0; j < kTileTokens; ++j)
        rows_at[j] = j < tokens ? cache_row(a.cache, a.places, seq, t + j) : zeros;
      const PassingTile<Isa> passing{tile, rows_at, tokens};
      RowsAhead ahead;
      ahead.dim = dim;
      for (int64_t j = t + tokens; j < context && ahead.count < kTileTokens; ++j)
        ahead.rows[ahead.count++] = cache_row(a.cache, a.places, seq, j);
      if (by_head) {
        const int64_t panels = ceil_div(rows, 16);
        scores_by_head<Isa>(q_panels, panels, rows_at, tokens, dim, keys, mem.scores, ahead);
        softmax_by_head<Isa>(panels, tokens, a.scale, mem, part.max, part.sum, ahead);
      } else {
        attend_forget(part, rows);
        tile_scores<Isa>(q, rows, passing, tokens, mem.scores);
        tile_softmax<Isa>(rows, tokens, a.scale, [&](int64_t) { return tokens; }, mem, part);
      }
      // As merge_state: what the values so far and the tile's are worth.
      float* const worth = part.max;
      for (int64_t i = 0; i < rows; i += 16) {
        const vf before = vload(split.max + i), top = vload(part.max + i), m = vmax(before, top);
        const vf old = vexp2(vsub(before, m)), more = vexp2(vsub(top, m));
        vstore(split.sum + i, vadd(vmul(vload(split.sum + i), old), vmul(vload(part.sum + i), more)));
        vstore(split.max + i, m);
        vstore(mem.alpha + i, old);
        vstore(worth + i, more);
      }
      tile_values<Isa>(rows, passing, tokens, 0, tile.panels(), mem, [&](int64_t i, int64_t column, vf sums) {
        float* to = split.row(i) + column;
        const vf more = vmul(sums, vset1(worth[i]));
        vstore(to, first ? more : vfma(vload(to), vset1(mem.alpha[i]), more));
        ahead.fetch(1);
      });
    };
    const auto attend_split = [&](int64_t t0) {
      attend_forget(split, rows);
      for (int64_t t = t0; t < tmin(context, t0 + kSplitTokens); t += kTileTokens) attend(t, t == t0);
    };
    if (d.span == Span::kRow) {
      attend_reset(acc, rows);
      for (int64_t t = 0; t < context; t += kSplitTokens) {
        attend_split(t);
        merge_states(acc, split, rows);
      }
      for (int64_t r = 0; r < rows; ++r) finish_latent<Isa>(a, plan, row, h0 + r, acc.row(r), acc.sum[r]);
      return;
    }
    if (d.span == Span::kTile) {
      attend_forget(split, rows);
      attend(s * kTileTokens, true);
    } else {
      attend_split(s * kSplitTokens);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = plan.slot(a, span + s, h0 + r);
      std::memcpy(to, split.row(r), 4 * static_cast<size_t>(plan.width));
      to[plan.width] = split.sum[r];
      to[plan.width + 1] = split.max[r];
    }
  };
  const auto each_item = [&](int64_t items, const auto& fn) {
    each_share(
        ctx, 1, Take{1}, [&](int64_t, int t) { return owned(items, t, ctx.nt, 0); },
        [&](int, int64_t, int64_t item, int64_t) { fn(item); });
  };
  if (d.share_tiles) {
    const int64_t panels = ceil_div(heads, 16);
    const auto scores_of = [&](int64_t number, int64_t panel) {
      return plan.shared_scores + (number * panels + panel) * kTileTokens * 16;
    };
    RowsAhead ahead;  // nothing
    ahead.dim = dim;
    // Tile `number` of all rows: f(row, tokens, rows of the cache).
    const auto with_tile = [&](int64_t number, const auto& f) {
      int64_t row = 0, s = number;
      for (; s >= d.spans(a.places.positions[row] + 1); ++row) s -= d.spans(a.places.positions[row] + 1);
      const int64_t tokens = tmin(kTileTokens, a.places.positions[row] + 1 - s * kTileTokens);
      const bf16* rows_at[kTileTokens];
      for (int64_t j = 0; j < kTileTokens; ++j)
        rows_at[j] = j < tokens ? cache_row(a.cache, a.places, a.places.row_seq[row], s * kTileTokens + j) : zeros;
      f(row, tokens, rows_at);
    };
    constexpr int64_t kParts = kTileTokens / 16;
    each_item(d.items * d.groups * kParts, [&](int64_t item) {
      const int64_t number = item / (d.groups * kParts), h0 = item / kParts % d.groups * d.group;
      const int64_t t = item % kParts * 16;
      with_tile(number, [&](int64_t row, int64_t tokens, const bf16* const* rows_at) {
        if (t >= tokens) return;
        const int64_t rows = tmin(d.group, heads - h0);
        prepare(row, h0, rows);
        scores_by_head<Isa>(q_panels, ceil_div(rows, 16), rows_at + t, tmin<int64_t>(16, tokens - t), dim, keys,
                            scores_of(number, h0 / 16) + t * 16, ahead);
      });
    });
    ctx.barrier();
    int64_t weighed = -1;  // the tile and panel whose weights are in mem.probs
    const int64_t each = PassingTile<Isa>::value_panels(), columns = ceil_div(tile.panels(), each);
    each_item(d.items * panels * columns, [&](int64_t item) {
      const int64_t of = item / columns, number = of / panels, h0 = of % panels * 16;
      const int64_t rows = tmin<int64_t>(16, heads - h0), at = item % columns * each;
      with_tile(number, [&](int64_t, int64_t tokens, const bf16* const* rows_at) {
        if (of != weighed) {
          std::memcpy(mem.scores, scores_of(number, h0 / 16), 4 * kTileTokens * 16);
          softmax_by_head<Isa>(1, tokens, a.scale, mem, part.max, part.sum, ahead);
          weighed = of;
        }
        tile_values<Isa>(
            rows, PassingTile<Isa>{tile, rows_at, tokens}, tokens, at, tmin(tile.panels(), at + each), mem,
            [&](int64_t i, int64_t column, vf sums) { vstore(plan.slot(a, number, h0 + i) + column, sums); });
        for (int64_t i = 0; i < rows && at == 0; ++i) {
          float* to = plan.slot(a, number, h0 + i) + plan.width;
          to[0] = part.sum[i];
          to[1] = part.max[i];
        }
      });
    });
  } else {
    // In order of (row, group, span).
    each_item(d.items, [&](int64_t item) {
      for (int64_t row = 0, span = 0;; ++row) {
        const int64_t spans = d.spans(a.places.positions[row] + 1);
        if (item < spans * d.groups) return run_item(row, item / spans, item % spans, span);
        item -= spans * d.groups;
        span += spans;
      }
    });
  }
  ctx.barrier();
  if (d.span != Span::kRow) {
    const Range r = owned(a.n * heads, ctx.tid, ctx.nt, 0);
    int64_t span = 0, row = 0;
    for (int64_t u = r.begin; u < r.end; ++u) {
      const int64_t i = u / heads, h = u % heads;
      for (; row < i; ++row) span += d.spans(a.places.positions[row] + 1);
      const int64_t spans = d.spans(a.places.positions[i] + 1);
      const int64_t joined = d.span == Span::kTile ? kSplitTokens / kTileTokens : 1;
      attend_reset(acc, 1);
      for (int64_t s = 0; s < spans; s += joined) {
        const auto merge = [&](const AttendState& into, int64_t from) {
          const float* p = plan.slot(a, span + from, h);
          merge_state(into, 0, p[plan.width + 1], p[plan.width], p);
        };
        if (joined == 1) {
          merge(acc, s);
          continue;
        }
        attend_reset(split, 1);
        for (int64_t t = s; t < tmin(spans, s + joined); ++t) merge(split, t);
        merge_states(acc, split, 1);
      }
      finish_latent<Isa>(a, plan, i, h, acc.out, acc.sum[0]);
    }
    ctx.barrier();
  }
  const Layout& l = a.w_vc.layout;
  each_unit(ctx, heads, l.panels(), [&](int64_t h, int64_t p0, int64_t p1) {
    const Act x = act_at<Isa>(l.format, plan.latent_act + h * plan.act_bytes, a.n, a.shape.latent);
    auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_tile_bf16(a.out + h * a.shape.v, heads * a.shape.v, a.shape.v, m0, m, panel, np, c);
    };
    gemm<Isa>(panels_of(a.w_vc, h), p0, p1, x, a.n, sink_of(store));
  });
}

// ---- prefill: keys and values un-absorbed tile by tile -------------------------------------------

// Query rows attended at a time: whole register tiles, and on AMX, where many rows gain nothing, few enough
// that their scores, values and queries stay close. A multiple of 16.
template <class Isa>
constexpr int64_t kQueryRows = Isa::kTiles ? 64 : 96;
// Tiles of a head's keys and values that lie in the second-level cache while all its query rows pass over
// them: the rows and their states, which are larger, are read once for so many tiles.
constexpr int64_t kTilesAtOnce = 4;

// The unit that a thread is at: a head's query rows, in blocks, and keys and values that are ready for them. The
// thread itself and those that have no unit left take the blocks one by one.
struct Station {
  std::atomic<uint64_t> next{0};  // 32 bits of turn, 16 of blocks, 16 of the next block
  alignas(64) std::atomic<int64_t> left{0};  // blocks of this turn that are not done
  std::atomic<bool> busy{true};
  int64_t head, row, pos, rows;  // the first row, where it stands in its sequence, and how many
  int64_t t0, t1;                // the tokens whose keys and values are ready

  // Blocks [first, count) of what stands in the fields now.
  void open(int64_t first, int64_t count) {
    left.store(count - first, std::memory_order_relaxed);
    const uint64_t turn = (next.load(std::memory_order_relaxed) >> 32) + 1;
    next.store(turn << 32 | static_cast<uint64_t>(count << 16 | first), std::memory_order_release);
  }
  // A block that nobody else has; -1 where there is none. The fields stay until it is done.
  int64_t take() {
    uint64_t at = next.load(std::memory_order_acquire);
    while ((at & 0xffff) < (at >> 16 & 0xffff))
      if (next.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        return static_cast<int64_t>(at & 0xffff);
    return -1;
  }
  void done() { left.fetch_sub(1, std::memory_order_release); }
  void wait() const {
    for (Pause pause; left.load(std::memory_order_acquire) != 0;) pause.step();
  }
};

template <class Isa>
struct MlaPrefillPlan {
  int64_t parts;  // pieces of a head's query rows, where there are fewer heads than threads
  int64_t rows;   // most query rows of a unit
  int64_t key_dim, v_pad;
  int64_t q_bytes, tile_bytes, kt_bytes, vt_bytes, scratch_bytes, state_floats;
  uint8_t* latents;  // prepared activations of kv_b: [max_context, latent]
  uint8_t *q, *keys, *values, *scratch;
  bf16 *kt, *vt;
  float* state;
  Station* stations;

  MlaPrefillPlan(Bump& b, const MlaPrefillArgs& a, int nt) {
    parts = tmax<int64_t>(1, nt / tmax<int64_t>(1, a.shape.heads));
    rows = round_up(ceil_div(a.max_rows, parts), 16);
    key_dim = round_up(a.shape.nope + a.shape.rope, 32);
    v_pad = round_up(a.shape.v, 16);
    q_bytes = act_size<Isa>(Format::BF16, rows, key_dim);
    kt_bytes = kTileTokens * key_dim * 2;
    vt_bytes = kTileTokens * v_pad * 2;
    scratch_bytes = round_up(attend_scratch_bytes<Isa>(kQueryRows<Isa>), 64);
    state_floats = rows * (2 + AttendState::stride_of(v_pad));
    latents = b.take<uint8_t>(
        act_size<Isa>(a.kv_b.layout.format, round_up(a.max_context, kTileTokens), a.shape.latent));
    q = b.take<uint8_t>(nt * q_bytes);
    keys = b.take<uint8_t>(nt * kTilesAtOnce * KvTile::key_bytes(key_dim, kTileTokens / 16));
    values = b.take<uint8_t>(nt * kTilesAtOnce * KvTile::value_bytes(v_pad / 16));
    scratch = b.take<uint8_t>(nt * scratch_bytes);
    kt = b.take<bf16>(nt * kt_bytes / 2);
    vt = b.take<bf16>(nt * vt_bytes / 2);
    state = b.take<float>(nt * state_floats);
    stations = b.take<Station>(nt);
  }
  // What thread t has of each.
  Act q_of(int t) const { return act_at<Isa>(Format::BF16, q + t * q_bytes, rows, key_dim); }
  AttendState state_of(int t) const {
    float* base = state + t * state_floats;
    return {base, base + rows, base + 2 * rows, v_pad};
  }
  KvTile tile_of(int t, int64_t number) const {  // of kTilesAtOnce
    const int64_t i = t * kTilesAtOnce + number;
    return {keys + i * KvTile::key_bytes(key_dim, kTileTokens / 16), values + i * KvTile::value_bytes(v_pad / 16),
            key_dim, v_pad};
  }
};

template <class Isa>
void mla_prefill(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MlaPrefillArgs*>(p);
  Bump b{ctx.scratch};
  MlaPrefillPlan<Isa> plan(b, a, ctx.nt);
  const MlaShape& sh = a.shape;
  const Layout& l = a.kv_b.layout;
  const int64_t dim = sh.nope + sh.rope, per_head = sh.nope + sh.v;
  const Panels w = panels_of(a.kv_b, 0);

  const Act q = plan.q_of(ctx.tid);
  const AttendState st = plan.state_of(ctx.tid);
  const AttendScratch mem = attend_scratch<Isa>(plan.scratch + ctx.tid * plan.scratch_bytes, kQueryRows<Isa>);
  bf16* kt = plan.kt + ctx.tid * plan.kt_bytes / 2;
  bf16* vt = plan.vt + ctx.tid * plan.vt_bytes / 2;
  Station& mine = *new (plan.stations + ctx.tid) Station;
  const bf16 *key_rows[kTileTokens], *value_rows[kTileTokens];
  for (int64_t j = 0; j < kTileTokens; ++j) {
    key_rows[j] = kt + j * plan.key_dim;
    value_rows[j] = vt + j * plan.v_pad;
  }

  for (int64_t sgm = 0; sgm < a.segment_count; ++sgm) {
    const int32_t* seg = a.segments + sgm * 4;
    const int64_t row0 = seg[0], count = seg[1], seq = seg[2], pos0 = seg[3], context = pos0 + count;
    const Act latents = act_at<Isa>(l.format, plan.latents, round_up(a.max_context, kTileTokens), sh.latent);
    if (sgm > 0) ctx.barrier();  // the last segment's latents are still read
    mine.busy.store(true, std::memory_order_relaxed);
    const Range prepared = owned(context, ctx.tid, ctx.nt, 0);
    for (int64_t t = prepared.begin; t < prepared.end; ++t)
      act_prepare_row<Isa>(l.format, latents, t, cache_row(a.cache, a.places, seq, t), sh.latent);
    ctx.barrier();

    const auto tokens_at = [&](int64_t t) { return tmin(kTileTokens, context - t); };
    // A block of rows of the unit that thread t is at.
    const auto attend_rows = [&](int t, int64_t block) {
      const Station& of = plan.stations[t];
      const int64_t i = block * kQueryRows<Isa>, n = tmin(kQueryRows<Isa>, of.rows - i), pos = of.pos + i;
      const AttendState all = plan.state_of(t);
      const AttendState at{all.max + i, all.sum + i, all.row(i), plan.v_pad};
      const Act queries = plan.q_of(t).from(i);
      for (int64_t t0 = of.t0; t0 < tmin(of.t1, pos + n); t0 += kTileTokens)  // what lies behind is the future
        attend_tile<Isa>(
            queries, n, WholeTile{plan.tile_of(t, (t0 - of.t0) / kTileTokens)}, tokens_at(t0), a.scale,
            [&](int64_t r) { return pos + r + 1 - t0; }, mem, at);
      if (of.t1 < pos + n) return;
      for (int64_t r = 0; r < n; ++r) {
        const vf inv = vset1(1.0f / at.sum[r]);
        bf16* to = a.out + ((of.row + i + r) * sh.heads + of.head) * sh.v;
        for (int64_t k = 0; k < sh.v; k += 16)
          vstore_bf16_n(to + k, vmul(vload(at.row(r) + k), inv), static_cast<int>(tmin<int64_t>(16, sh.v - k)));
      }
    };
    const auto help = [&](int t) {
      Station& of = plan.stations[t];
      for (int64_t block; (block = of.take()) >= 0; of.done()) attend_rows(t, block);
    };

    const int64_t piece = round_up(ceil_div(count, plan.parts), 16);
    const auto units = [&](int64_t, int t) { return owned(sh.heads * plan.parts, t, ctx.nt, 0); };
    each_share(ctx, 1, Take{1}, units, [&](int, int64_t, int64_t u, int64_t) {
      const int64_t h = u / plan.parts, r0 = u % plan.parts * piece, r1 = tmin(count, r0 + piece);
      if (r0 >= r1) return;
      const int64_t rows = r1 - r0;
      for (int64_t i = 0; i < rows; ++i)
        act_prepare_row<Isa>(Format::BF16, q, i, a.q + ((row0 + r0 + i) * sh.heads + h) * dim, dim);
      attend_reset(st, rows);
      const int64_t first = h * per_head, p0 = first / 16, p1 = ceil_div(first + per_head, 16);
      const int64_t last = pos0 + r1;  // tokens that the last row sees
      // Keys and values of this head.
      const auto unabsorb = [&](int64_t t, const KvTile& tile) {
        const int64_t tokens = tokens_at(t);
        auto split = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
          for (int i = 0; i < m; ++i)
            for (int j = 0; j < np; ++j) {
              const int64_t col = (panel + j) * 16 - first;
              const float* from = c + i * kTileCols + j * 16;
              bf16* k = kt + (m0 + i) * plan.key_dim;
              bf16* v = vt + (m0 + i) * plan.v_pad - sh.nope;
              if (col >= 0 && col + 16 <= sh.nope) {
                vstore_bf16(k + col, vload(from));
              } else if (col >= sh.nope && col + 16 <= per_head) {
                vstore_bf16(v + col, vload(from));
              } else {
                for (int e = 0; e < 16; ++e) {
                  const int64_t x = col + e;
                  if (x < 0 || x >= per_head) continue;
                  (x < sh.nope ? k : v)[x] = float_to_bf16(from[e]);
                }
              }
            }
        };
        gemm<Isa>(w, p0, p1, latents.from(t), tokens, sink_of(split));
        for (int64_t j = 0; j < kTileTokens; ++j) {
          bf16* k = kt + j * plan.key_dim;
          if (j < tokens) {
            const bf16* key = cache_row(a.cache, a.places, seq, t + j) + sh.latent;
            std::memcpy(k + sh.nope, key, 2 * static_cast<size_t>(sh.rope));
            std::memset(k + dim, 0, 2 * static_cast<size_t>(plan.key_dim - dim));
            std::memset(vt + j * plan.v_pad + sh.v, 0, 2 * static_cast<size_t>(plan.v_pad - sh.v));
          } else {
            std::memset(k, 0, 2 * static_cast<size_t>(plan.key_dim));
            std::memset(vt + j * plan.v_pad, 0, 2 * static_cast<size_t>(plan.v_pad));
          }
        }
        tile.pack_keys(key_rows, 0, ceil_div(tokens, 16));
        tile.pack_values(value_rows, tokens, 0, plan.v_pad / 16);
      };
      mine.head = h;
      mine.row = row0 + r0;
      mine.pos = pos0 + r0;
      mine.rows = rows;
      for (int64_t t0 = 0; t0 < last; t0 += kTilesAtOnce * kTileTokens) {
        mine.t0 = t0;
        mine.t1 = tmin(last, t0 + kTilesAtOnce * kTileTokens);
        for (int64_t t = t0; t < mine.t1; t += kTileTokens)
          unabsorb(t, plan.tile_of(ctx.tid, (t - t0) / kTileTokens));
        // Rows before t0 see none of these.
        mine.open(tmax<int64_t>(0, t0 - mine.pos) / kQueryRows<Isa>, ceil_div(rows, kQueryRows<Isa>));
        help(ctx.tid);
        mine.wait();
      }
    });
    mine.busy.store(false, std::memory_order_release);
    Pause pause;
    for (bool busy = true; busy;) {
      busy = false;
      for (int64_t k = 1; k < ctx.node.size(); ++k) {
        const int64_t t = ctx.node.begin + (ctx.tid - ctx.node.begin + k) % ctx.node.size();
        if (!plan.stations[t].busy.load(std::memory_order_acquire)) continue;
        busy = true;
        help(static_cast<int>(t));
      }
      if (busy) pause.step();
    }
  }
}

}  // namespace
