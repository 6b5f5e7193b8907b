// Elementwise functions on 16 floats.
#pragma once

#include "kernels/gemm.inl.h"
#include "runtime/sanitize.h"

namespace {

// e^x, relative error below 2e-7; 0 below -87.3, saturates above 88.
LC_INLINE vf vexp(vf x) {
  x = vmin(vmax(x, vset1(-104.0f)), vset1(88.0f));
  const vf n = vround(vmul(x, vset1(1.44269504f)));
  vf r = vfma(n, vset1(-0.693359375f), x);
  r = vfma(n, vset1(2.12194440e-4f), r);
  vf p = vset1(1.9875691500e-4f);
  p = vfma(p, r, vset1(1.3981999507e-3f));
  p = vfma(p, r, vset1(8.3334519073e-3f));
  p = vfma(p, r, vset1(4.1665795894e-2f));
  p = vfma(p, r, vset1(1.6666665459e-1f));
  p = vfma(p, r, vset1(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), vadd(r, vset1(1.0f)));
  return vscale2(p, n);
}
// 2^x for x up to 127, relative error below 2e-7; vanishes below -126. A minimax polynomial in x - round(x).
LC_INLINE vf vexp2(vf x) {
  x = vmax(x, vset1(-150.0f));
  const vf n = vround(x), r = vsub(x, n);
  vf p = vset1(1.32647261e-3f);
  p = vfma(p, r, vset1(9.67151299e-3f));
  p = vfma(p, r, vset1(5.55073358e-2f));
  p = vfma(p, r, vset1(2.40222424e-1f));
  p = vfma(p, r, vset1(6.93147004e-1f));
  return vscale2(vfma(p, r, vset1(1.0f)), n);
}
LC_INLINE float exp2_of(float x) {
  float t[16];
  vstore(t, vexp2(vset1(x)));
  return t[0];
}
LC_INLINE vf vsigmoid(vf x) { return vdiv(vset1(1.0f), vadd(vset1(1.0f), vexp(vsub(vset1(0.0f), x)))); }
// The argument of the exponential is held where its inverse is a normal number.
LC_INLINE vf vsilu(vf x) {
  const vf e = vexp(vmin(vsub(vset1(0.0f), x), vset1(80.0f)));
  return vmul(x, vrecip(vadd(vset1(1.0f), e)));
}

// Calls f(k, n) for n <= 16 values from k on.
template <class Fn>
LC_INLINE void each_16(int64_t begin, int64_t end, const Fn& f) {
  int64_t k = begin;
  for (; k + 16 <= end; k += 16) f(k, 16);
  if (k < end) f(k, static_cast<int>(end - k));
}
LC_INLINE void store_bf16(bf16* p, vf v, int n) {
  if (n == 16)
    vstore_bf16(p, v);
  else
    vstore_bf16_n(p, v, n);
}

// sum of squares of k values / k
LC_INLINE float mean_square(const float* x, int64_t k) {
  vf s = vset1(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const vf v = vload(x + i);
    s = vfma(v, v, s);
  }
  if (i < k) {
    const vf v = vload_n(x + i, static_cast<int>(k - i));
    s = vfma(v, v, s);
  }
  return vhsum(s) / static_cast<float>(k);
}
LC_INLINE float inv_sqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

// y = bf16(x * rsqrt(mean(x^2) + eps) * weight), fp32 in.
LC_INLINE void norm_row(const float* x, const float* weight, float eps, int64_t k, bf16* y) {
  const vf r = vset1(inv_sqrt(mean_square(x, k) + eps));
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) vstore_bf16(y + i, vmul(vmul(vload(x + i), r), vload(weight + i)));
  if (i < k) {
    const int n = static_cast<int>(k - i);
    vstore_bf16_n(y + i, vmul(vmul(vload_n(x + i, n), r), vload_n(weight + i, n)), n);
  }
}

// y = bf16(x)
LC_INLINE void round_row(const float* x, int64_t k, bf16* y) {
  each_16(0, k, [&](int64_t i, int n) { store_bf16(y + i, n == 16 ? vload(x + i) : vload_n(x + i, n), n); });
}

// Interleaved rope (pairs 2i, 2i+1) of `dim` values by the angles of one position.
LC_INLINE void rope_row(const float* x, const float* cos_sin, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    vf a, b, even, odd;
    vsplit_pairs(vload(x + 2 * i), vload(x + 2 * i + 16), a, b);
    const vf c = vload(cos_sin + i), s = vload(cos_sin + half + i);
    even = vsub(vmul(a, c), vmul(b, s));
    odd = vadd(vmul(b, c), vmul(a, s));
    vjoin_pairs(even, odd, a, b);
    vstore(y + 2 * i, a);
    vstore(y + 2 * i + 16, b);
  }
  for (; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i], a = x[2 * i], b = x[2 * i + 1];
    y[2 * i] = a * c - b * s;
    y[2 * i + 1] = b * c + a * s;
  }
}

// Hands out scratch, the same places in every thread; with a null base it only counts.
struct Bump {
  uint8_t* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    uint8_t* p = base + used;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), room = round_up(bytes, 64) + kScratchGap;
    used += room;
    if (base != nullptr) close_memory(p + bytes, static_cast<size_t>(room - bytes));
    return reinterpret_cast<T*>(p);
  }
};

// Prepared activations in scratch. Few rows are prepared by every thread for itself, which costs less
// than a barrier; many are shared.
template <class Isa>
struct ActSlot {
  uint8_t* mem;
  int64_t rows, k, bytes;
  Format format;
  bool own;

  ActSlot(Bump& b, int nt, Format f, int64_t n, int64_t cols)
      : rows(n), k(cols), bytes(act_size<Isa>(f, n, cols)), format(f), own(n <= 2) {
    mem = b.take<uint8_t>(own ? nt * bytes : bytes);
  }
  Act act(int tid) const { return act_at<Isa>(format, own ? mem + tid * bytes : mem, rows, k); }
  // Rows that thread tid prepares.
  Range share(const Ctx& ctx) const { return own ? Range{0, rows} : owned(rows, ctx.tid, ctx.nt, 0); }
  void meet(const Ctx& ctx) const {
    if (!own) ctx.barrier();
  }
  // Prepares rows of x and waits until all are there.
  Act fill(const Ctx& ctx, const bf16* x, int64_t stride) const {
    const Act a = act(ctx.tid);
    const Range r = share(ctx);
    for (int64_t i = r.begin; i < r.end; ++i) act_prepare_row<Isa>(format, a, i, x + i * stride, k);
    meet(ctx);
    return a;
  }
};

// Writes a tile of fp32 results as bf16 into out[m][col0...], at most `cols` columns wide.
LC_INLINE void store_tile_bf16(bf16* out, int64_t stride, int64_t cols, int64_t m0, int m, int64_t panel, int np,
                               const float* c) {
  for (int i = 0; i < m; ++i)
    for (int q = 0; q < np; ++q) {
      const int64_t col = (panel + q) * 16;
      const int n = static_cast<int>(tmin<int64_t>(16, cols - col));
      bf16* to = out + (m0 + i) * stride + col;
      store_bf16(to, vload(c + i * kTileCols + q * 16), n);
    }
}
LC_INLINE void store_tile_f32(float* out, int64_t stride, int64_t cols, int64_t m0, int m, int64_t panel, int np,
                              const float* c) {
  for (int i = 0; i < m; ++i)
    for (int q = 0; q < np; ++q) {
      const int64_t col = (panel + q) * 16;
      const int n = static_cast<int>(tmin<int64_t>(16, cols - col));
      float* to = out + (m0 + i) * stride + col;
      const vf v = vload(c + i * kTileCols + q * 16);
      if (n == 16)
        vstore(to, v);
      else
        vstore_n(to, v, n);
    }
}

}  // namespace
