// Embedding, norms, linear, per-head products and the dense MLP.
#pragma once

#include "kernels/math.inl.h"

namespace {

template <class Plan, class Args>
size_t scratch_of(const void* args, int nt) {
  Bump b{nullptr};
  Plan plan(b, *static_cast<const Args*>(args), nt);
  return static_cast<size_t>(b.used);
}
inline size_t no_scratch(const void*, int) { return 0; }

void embedding(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const EmbeddingArgs*>(p);
  const Range r = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = r.begin; i < r.end; ++i) {
    int64_t id = a.ids[i];
    if (id < 0 || id >= a.vocab) id = 0;  // ids are checked where they enter; memory stays safe anyway
    std::memcpy(a.out + i * a.hidden, a.table + id * a.hidden, 2 * static_cast<size_t>(a.hidden));
  }
}

struct NormPlan {
  float* row;  // one a thread
  NormPlan(Bump& b, const NormArgs& a, int nt) { row = b.take<float>(nt * round_up(a.hidden, 16)); }
};

template <bool Add>
void norm(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const NormArgs*>(p);
  Bump b{ctx.scratch};
  NormPlan plan(b, a, ctx.nt);
  float* row = plan.row + ctx.tid * round_up(a.hidden, 16);
  const Range r = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = r.begin; i < r.end; ++i) {
    bf16* x = a.residual + i * a.hidden;
    for (int64_t k = 0; k < a.hidden; k += 16) {
      const int n = static_cast<int>(tmin<int64_t>(16, a.hidden - k));
      vf v = vload_bf16_n(x + k, n);
      if constexpr (Add) {
        // The stream is bf16: it is rounded before it is normed.
        vstore_bf16_n(x + k, vadd(v, vload_bf16_n(a.delta + i * a.hidden + k, n)), n);
        v = vload_bf16_n(x + k, n);
      }
      vstore(row + k, v);
    }
    norm_row(row, a.weight, a.eps, a.hidden, a.out + i * a.hidden);
  }
}

// ---- one matrix whose panels do not share out evenly --------------------------------------------

// Threads then share panels along K, in pieces of 128: int8 sums are exact, and FP8 adds 128-blocks in order
// anyway, so that the bits are those of a panel that one thread computes. Chains of bf16 cannot be cut.
constexpr int64_t kPieceRows = 3;

template <Format F>
constexpr int64_t kPieceBlocks = kFp8Block / block_k(F);

struct PiecesPlan {
  float* sums;  // [panels, pieces, rows, 16]; none where the matrix is not cut
  int64_t pieces;
  PiecesPlan(Bump& b, const Layout& l, int64_t n, int nt) : pieces(ceil_div(l.cols, kFp8Block)) {
    const bool cut = (l.format == Format::INT8 || l.format == Format::FP8) && n <= kPieceRows;
    sums = cut && uneven(l.panels(), nt) ? b.take<float>(l.panels() * pieces * n * 16) : nullptr;
  }
};

// Sums of pieces [k0, k1) of a panel: in FP8 each for itself, in int8 all at k0.
template <class Isa, Format F>
void piece_sums(const Panels& w, int64_t panel, int64_t k0, int64_t k1, const Act& a, int m, float* sums) {
  constexpr int64_t kBlockBytes = block_k(F) / k_per_line(F) * 64;
  const int64_t blocks = w.lines * 64 / kBlockBytes, most = F == Format::FP8 ? 1 : k1 - k0;
  alignas(64) float c[kPieceRows * kTileCols];
  for (int64_t k = k0; k < k1; k += most) {
    const int64_t block = k * kPieceBlocks<F>, count = tmin(most * kPieceBlocks<F>, blocks - block);
    Act at = a;
    at.base += block * a.block_stride;
    run_tile<Isa, F>(m, 1, at, w.base + panel * w.stride + block * kBlockBytes, w.stride, count, {count, 0}, c);
    for (int i = 0; i < m; ++i) vstore(sums + (k * m + i) * 16, vload(c + i * kTileCols));
  }
}

// The results of a panel from the sums of its pieces; those of int8 stand where a thread's share begins.
template <Format F, class Begins>
void join_pieces(const Panels& w, int64_t panel, int64_t pieces, const Begins& begins, const Act& a, int m,
                 const float* sums, const Sink& sink) {
  alignas(64) float c[kPieceRows * kTileCols] = {};
  const uint8_t* at = w.base + panel * w.stride;
  for (int64_t k = 0; k < pieces; ++k) {
    if (F == Format::INT8 && !begins(k)) continue;
    for (int i = 0; i < m; ++i) {
      const float* from = sums + (k * m + i) * 16;
      float* to = c + i * kTileCols;
      if constexpr (F == Format::FP8) {
        const vf scale = vset1(*block_scale(w, at, k));
        vstore(to, k == 0 ? vmul(vload(from), scale) : vfma(vload(from), scale, vload(to)));
      } else {
        int32_t sum[16], more[16];
        std::memcpy(sum, from, 64);
        std::memcpy(more, to, 64);
        for (int j = 0; k > 0 && j < 16; ++j) sum[j] += more[j];
        std::memcpy(to, sum, 64);
      }
    }
  }
  finish<F>(w, at, 1, a.scale, m, c);
  sink(0, m, panel, 1, c);
}

template <class Isa, Format F>
void pieces_gemm(const Ctx& ctx, const Weight& weight, const Act& a, int64_t n, const PiecesPlan& plan,
                 const Sink& sink) {
  const Panels w = panels_of(weight, 0);
  const int64_t panels = weight.layout.panels(), pieces = plan.pieces;
  const int m = static_cast<int>(n);
  const auto own = [&](int t) { return owned_pieces(panels, pieces, t, ctx.nt); };
  const auto sums_of = [&](int64_t panel) { return plan.sums + panel * pieces * n * 16; };
  const Range mine = own(ctx.tid);
  for (int64_t u = mine.begin; u < mine.end;) {
    const int64_t panel = u / pieces, end = tmin(mine.end, (panel + 1) * pieces);
    if (end - u < pieces) piece_sums<Isa, F>(w, panel, u % pieces, end - panel * pieces, a, m, sums_of(panel));
    u = end;
  }
  const auto whole = [&](int64_t, int t) {
    const Range r = own(t);
    const int64_t begin = ceil_div(r.begin, pieces);
    return Range{begin, tmax(begin, r.end / pieces)};
  };
  each_share(ctx, 1, Take{kPanelsAtOnce}, whole,
             [&](int, int64_t, int64_t p0, int64_t p1) { gemm<Isa>(w, p0, p1, a, n, sink); });
  ctx.barrier();
  // Panels of several threads, by the one that computed the last piece.
  const int64_t panel = mine.begin / pieces;
  if (mine.size() == 0 || mine.begin % pieces == 0 || mine.end < (panel + 1) * pieces) return;
  const auto begins = [&](int64_t k) {
    if (k == 0) return true;
    int t = ctx.tid;
    while (own(t).begin > panel * pieces + k) --t;
    return own(t).begin == panel * pieces + k;
  };
  join_pieces<F>(w, panel, pieces, begins, a, m, sums_of(panel), sink);
}

// A whole matrix by n rows, shared out among the threads. Without a barrier behind; where it is cut, there is
// one inside.
template <class Isa>
void linear_gemm(const Ctx& ctx, const Weight& w, const Act& a, int64_t n, int64_t turn, const PiecesPlan& plan,
                 const Sink& sink) {
  if (plan.sums == nullptr) return shared_gemm<Isa>(ctx, w, a, n, 1, turn, sink);
  if (w.layout.format == Format::FP8) return pieces_gemm<Isa, Format::FP8>(ctx, w, a, n, plan, sink);
  pieces_gemm<Isa, Format::INT8>(ctx, w, a, n, plan, sink);
}

template <class Isa>
struct LinearPlan {
  ActSlot<Isa> x;
  PiecesPlan cut;
  LinearPlan(Bump& b, const LinearArgs& a, int nt)
      : x(b, nt, a.w.layout.format, a.n, a.w.layout.cols), cut(b, a.w.layout, a.n, nt) {}
};

template <class Isa>
void linear(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const LinearArgs*>(p);
  Bump b{ctx.scratch};
  LinearPlan<Isa> plan(b, a, ctx.nt);
  const Layout& l = a.w.layout;
  const Act x = plan.x.fill(ctx, a.x, l.cols);
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    if (a.out_f32)
      store_tile_f32(static_cast<float*>(a.out), l.rows, l.rows, m0, m, panel, np, c);
    else
      store_tile_bf16(static_cast<bf16*>(a.out), l.rows, l.rows, m0, m, panel, np, c);
  };
  linear_gemm<Isa>(ctx, a.w, x, a.n, 0, plan.cut, sink_of(store));
}

// (matrix, panels) units of a stack of matrices that share out evenly: calls f(matrix, p0, p1).
template <class Fn>
LC_INLINE void each_unit(const Ctx& ctx, int64_t batch, int64_t panels, const Fn& f) {
  each_share(
      ctx, 1, Take{panels}, [&](int64_t, int t) { return owned(batch * panels, t, ctx.nt, 0); },
      [&](int, int64_t, int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end;) {
          const int64_t item = u / panels, p0 = u % panels, p1 = tmin(panels, p0 + end - u);
          f(item, p0, p1);
          u += p1 - p0;
        }
      });
}

// x[:, h, :] * w[h]^T for every head: rows of `x` prepared a head by the thread that needs them.
template <class Isa>
struct HeadsPlan {
  int64_t bytes;
  uint8_t* act;
  HeadsPlan(Bump& b, const Layout& l, int64_t n, int nt) : bytes(act_size<Isa>(l.format, n, l.cols)) {
    act = b.take<uint8_t>(nt * bytes);
  }
  HeadsPlan(Bump& b, const HeadsArgs& a, int nt) : HeadsPlan(b, a.w.layout, a.n, nt) {}
};

template <class Isa>
void heads(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const HeadsArgs*>(p);
  Bump b{ctx.scratch};
  HeadsPlan<Isa> plan(b, a, ctx.nt);
  const Layout& l = a.w.layout;
  const Act x = act_at<Isa>(l.format, plan.act + ctx.tid * plan.bytes, a.n, l.cols);
  float row[4096];
  each_unit(ctx, l.batch, l.panels(), [&](int64_t h, int64_t p0, int64_t p1) {
    const Panels w = panels_of(a.w, h);
    for (int64_t i = 0; i < a.n; ++i) {
      const bf16* src = a.x + (i * l.batch + h) * l.cols;
      if (w.column_scale != nullptr) {
        for (int64_t k = 0; k < l.cols; k += 16) {
          const int n = static_cast<int>(tmin<int64_t>(16, l.cols - k));
          vstore(row + k, vload_bf16_n(src + k, n));
        }
        act_prepare_row_f32<Isa>(x, i, row, w.column_scale, l.cols);
      } else {
        act_prepare_row<Isa>(l.format, x, i, src, l.cols);
      }
    }
    auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_tile_bf16(a.out + h * l.rows, l.batch * l.rows, l.rows, m0, m, panel, np, c);
    };
    gemm<Isa>(w, p0, p1, x, a.n, sink_of(store));
  });
}

// h = silu(gate) * up for tiles whose panels alternate between gate and up; rows from `row0` of h.
LC_INLINE void store_gated(bf16* h, int64_t stride, int64_t cols, int64_t row0, int m, int64_t panel, int np,
                           const float* c) {
  for (int q = 0; q < np; q += 2) {
    const int64_t col = (panel + q) / 2 * 16;
    const int n = static_cast<int>(tmin<int64_t>(16, cols - col));
    for (int i = 0; i < m; ++i) {
      const float* at = c + i * kTileCols + q * 16;
      vstore_bf16_n(h + (row0 + i) * stride + col, vmul(vsilu(vload(at)), vload(at + 16)), n);
    }
  }
}

// A product by panels that alternate between gate and up, gated into h.
struct GateUp {
  Panels w;
  Act x;
  int64_t rows;
  bf16* h;
  int64_t cols;    // of h, and its stride
  float* parted;   // [rows, threads, 32]: gate and up of a pair that two threads share
};

// The products at(0..count), of pairs_of(0..count) pairs, where these do not share out evenly: two threads
// may each compute a panel of a pair, which is gated when both are there. Ends with a barrier.
template <class Isa, class Pairs, class At>
void parted_gate_up(const Ctx& ctx, int64_t count, const Pairs& pairs_of, const At& at) {
  const int nt = ctx.nt;
  const auto own = [&](int64_t list, int t) { return owned_panels(pairs_of(list), list, count, t, nt); };
  const auto pairs = [&](int64_t list, int t) {
    const Range r = own(list, t);
    return r.size() > 0 ? Range{r.begin / 2, ceil_div(r.end, 2)} : Range{0, 0};
  };
  each_share(ctx, count, Take{kPanelsAtOnce / 2}, pairs, [&](int of, int64_t list, int64_t begin, int64_t end) {
    const GateUp g = at(list);
    const Range r = own(list, of);
    int64_t p0 = tmax(r.begin, 2 * begin);
    const int64_t p1 = tmin(r.end, 2 * end), whole = p1 / 2 * 2;
    // One panel of a pair, kept in the place of the thread that owns `up`.
    const auto part = [&](int64_t panel, int owner, int half) {
      auto keep = [&](int64_t m0, int m, int64_t, int, float* c) {
        for (int i = 0; i < m; ++i)
          vstore(g.parted + ((m0 + i) * nt + owner) * 32 + half * 16, vload(c + i * kTileCols));
      };
      gemm<Isa>(g.w, panel, panel + 1, g.x, g.rows, sink_of(keep));
    };
    if (p0 % 2 != 0) part(p0++, of, 1);
    if (p0 < whole) {
      auto gate = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
        store_gated(g.h, g.cols, g.cols, m0, m, panel, np, c);
      };
      const uint8_t* next = g.w.base + whole * g.w.stride;
      if (p1 == r.end && whole == p1 && list + 1 < count) {
        const Panels then = at(list + 1).w;
        next = then.base + own(list + 1, of).begin * then.stride;
      }
      gemm<Isa>(g.w, p0, whole, next, g.x, g.rows, 2, sink_of(gate));
    }
    if (p0 <= whole && whole < p1) {
      int owner = of + 1;
      while (own(list, owner).size() == 0) ++owner;
      part(whole, owner, 0);
    }
  });
  ctx.barrier();
  for (int64_t list = 0; list < count; ++list) {
    const Range r = own(list, ctx.tid);
    if (r.size() == 0 || r.begin % 2 == 0) continue;
    const GateUp g = at(list);
    const int64_t col = r.begin / 2 * 16;
    for (int64_t i = 0; i < g.rows; ++i) {
      const float* both = g.parted + (i * nt + ctx.tid) * 32;
      vstore_bf16_n(g.h + i * g.cols + col, vmul(vsilu(vload(both)), vload(both + 16)),
                    static_cast<int>(tmin<int64_t>(16, g.cols - col)));
    }
  }
  ctx.barrier();
}

template <class Isa>
struct MlpPlan {
  ActSlot<Isa> x;
  bf16* h;
  ActSlot<Isa> hq;
  PiecesPlan cut;
  float* parted;  // none where pairs share out evenly
  MlpPlan(Bump& b, const MlpArgs& a, int nt)
      : x(b, nt, a.gate_up.layout.format, a.n, a.gate_up.layout.cols),
        h(b.take<bf16>(a.n * a.gate_up.layout.rows)),
        hq(b, nt, a.down.layout.format, a.n, a.down.layout.cols),
        cut(b, a.down.layout, a.n, nt),
        parted(a.n <= kPartRows && pairs_part(a.gate_up.layout.row_panels(), 1, nt) ? b.take<float>(a.n * nt * 32)
                                                                                    : nullptr) {}
};

template <class Isa>
void mlp(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MlpArgs*>(p);
  Bump b{ctx.scratch};
  MlpPlan<Isa> plan(b, a, ctx.nt);
  const Layout &g = a.gate_up.layout, &d = a.down.layout;
  const Act x = plan.x.fill(ctx, a.x, g.cols);
  if (plan.parted != nullptr) {
    const GateUp whole{panels_of(a.gate_up, 0), x, a.n, plan.h, g.rows, plan.parted};
    parted_gate_up<Isa>(ctx, 1, [&](int64_t) { return g.row_panels(); }, [&](int64_t) { return whole; });
  } else {
    auto gate = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_gated(plan.h, g.rows, g.rows, m0, m, panel, np, c);
    };
    shared_gemm<Isa>(ctx, a.gate_up, x, a.n, 2, 0, sink_of(gate));
    ctx.barrier();
  }
  const Act h = plan.hq.fill(ctx, plan.h, g.rows);
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_tile_bf16(a.out, d.rows, d.rows, m0, m, panel, np, c);
  };
  linear_gemm<Isa>(ctx, a.down, h, a.n, 1, plan.cut, sink_of(store));
}

}  // namespace
