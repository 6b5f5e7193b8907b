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

template <class Isa>
struct LinearPlan {
  ActSlot<Isa> x;
  LinearPlan(Bump& b, const LinearArgs& a, int nt) : x(b, nt, a.w.layout.format, a.n, a.w.layout.cols) {}
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
  shared_gemm<Isa>(ctx, a.w, x, a.n, 1, 0, sink_of(store));
}

// (matrix, panels) units of a stack of matrices that share out evenly: calls f(matrix, p0, p1).
template <class Fn>
LC_INLINE void each_unit(const Ctx& ctx, int64_t batch, int64_t panels, const Fn& f) {
  each_share(
      ctx, 1, panels, [&](int64_t, int t) { return owned(batch * panels, t, ctx.nt, 0); },
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
template <class Isa>
struct MlpPlan {
  ActSlot<Isa> x;
  bf16* h;
  ActSlot<Isa> hq;
  MlpPlan(Bump& b, const MlpArgs& a, int nt)
      : x(b, nt, a.gate_up.layout.format, a.n, a.gate_up.layout.cols),
        h(b.take<bf16>(a.n * a.gate_up.layout.rows)),
        hq(b, nt, a.down.layout.format, a.n, a.down.layout.cols) {}
};

template <class Isa>
void mlp(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MlpArgs*>(p);
  Bump b{ctx.scratch};
  MlpPlan<Isa> plan(b, a, ctx.nt);
  const Layout &g = a.gate_up.layout, &d = a.down.layout;
  const Act x = plan.x.fill(ctx, a.x, g.cols);
  auto gate = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_gated(plan.h, g.rows, g.rows, m0, m, panel, np, c);
  };
  shared_gemm<Isa>(ctx, a.gate_up, x, a.n, 2, 0, sink_of(gate));
  ctx.barrier();
  const Act h = plan.hq.fill(ctx, plan.h, g.rows);
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_tile_bf16(a.out, d.rows, d.rows, m0, m, panel, np, c);
  };
  shared_gemm<Isa>(ctx, a.down, h, a.n, 1, 1, sink_of(store));
}

}  // namespace
