// The formats' exact quantizers, and their way back to bf16: row-major on both sides.
#pragma once

#include "kernels/math.inl.h"

namespace {

LC_INLINE vf load_weights(const bf16* p, int n) { return n == 16 ? vload_bf16(p) : vload_bf16_n(p, n); }
// The n codes that f reads from, or writes to, 16 bytes.
template <class T, class Fn>
LC_INLINE vf load_codes(const T* p, int n, const Fn& f) {
  if (n == 16) return f(p);
  alignas(16) T t[16] = {};
  std::memcpy(t, p, static_cast<size_t>(n));
  return f(t);
}
template <class T, class Fn>
LC_INLINE void store_codes(T* p, int n, const Fn& f) {
  if (n == 16) return f(p);
  alignas(16) T t[16];
  f(t);
  std::memcpy(p, t, static_cast<size_t>(n));
}

// The largest of 16 magnitudes; NaN, always the same one, where there is any.
LC_INLINE float largest(vf magnitudes) {
  float t[16];
  vstore(t, magnitudes);
  uint32_t most = 0;
  for (const float f : t) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    most = tmax(most, bits);
  }
  if (most > 0x7f800000u) most = 0x7fc00000u;
  float out;
  std::memcpy(&out, &most, 4);
  return out;
}
// Whether values can be divided by this scale: else their codes are zeros.
LC_INLINE bool divides(float scale) { return scale > 0.0f && scale <= __FLT_MAX__; }
LC_INLINE vf clamped(vf v, float most) { return vmax(vmin(v, vset1(most)), vset1(-most)); }

void quantize_int8(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const QuantizeArgs*>(p);
  const Range r = owned(a.rows, ctx.tid, ctx.nt, 0);
  for (int64_t i = r.begin; i < r.end; ++i) {
    const bf16* w = a.w + i * a.cols;
    int8_t* codes = reinterpret_cast<int8_t*>(a.codes) + i * a.cols;
    vf most = vset1(0.0f);
    each_16(0, a.cols, [&](int64_t k, int n) { most = vmax_magnitude(most, load_weights(w + k, n)); });
    const float scale = largest(most) / 127.0f;
    a.scale[i] = scale;
    if (!divides(scale)) {
      std::memset(codes, 0, static_cast<size_t>(a.cols));
      continue;
    }
    const vf s = vset1(scale);
    each_16(0, a.cols, [&](int64_t k, int n) {
      const vf v = clamped(vround(vdiv(load_weights(w + k, n), s)), 127.0f);
      store_codes(codes + k, n, [&](int8_t* to) { vstore_i8(to, v); });
    });
  }
}

void quantize_fp8(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const QuantizeArgs*>(p);
  const int64_t across = ceil_div(a.cols, kFp8Block), blocks = ceil_div(a.rows, kFp8Block) * across;
  const Range r = owned(blocks, ctx.tid, ctx.nt, 0);
  for (int64_t b = r.begin; b < r.end; ++b) {
    const int64_t row0 = b / across * kFp8Block, row1 = tmin(a.rows, row0 + kFp8Block);
    const int64_t col0 = b % across * kFp8Block, col1 = tmin(a.cols, col0 + kFp8Block);
    vf most = vset1(0.0f);
    for (int64_t i = row0; i < row1; ++i) {
      const bf16* w = a.w + i * a.cols;
      each_16(col0, col1, [&](int64_t k, int n) { most = vmax_magnitude(most, load_weights(w + k, n)); });
    }
    const float scale = largest(most) / 448.0f;
    a.scale[b] = scale;
    const vf s = vset1(scale);
    for (int64_t i = row0; i < row1; ++i) {
      const bf16* w = a.w + i * a.cols;
      uint8_t* codes = a.codes + i * a.cols;
      if (!divides(scale)) {
        std::memset(codes + col0, 0, static_cast<size_t>(col1 - col0));
        continue;
      }
      each_16(col0, col1, [&](int64_t k, int n) {
        const vf v = clamped(vdiv(load_weights(w + k, n), s), 448.0f);
        store_codes(codes + k, n, [&](uint8_t* to) { vstore_fp8(to, v); });
      });
    }
  }
}

void dequantize_int8(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const DequantizeArgs*>(p);
  const Range r = owned(a.rows, ctx.tid, ctx.nt, 0);
  for (int64_t i = r.begin; i < r.end; ++i) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(a.codes) + i * a.cols;
    const vf s = vset1(a.scale[i]);
    each_16(0, a.cols, [&](int64_t k, int n) {
      store_bf16(a.out + i * a.cols + k, vmul(load_codes(codes + k, n, vload_i8), s), n);
    });
  }
}

void dequantize_fp8(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const DequantizeArgs*>(p);
  const int64_t across = ceil_div(a.cols, kFp8Block);
  const Range r = owned(a.rows, ctx.tid, ctx.nt, 0);
  for (int64_t i = r.begin; i < r.end; ++i) {
    const uint8_t* codes = a.codes + i * a.cols;
    for (int64_t b = 0; b < across; ++b) {
      const vf s = vset1(a.scale[i / kFp8Block * across + b]);
      each_16(b * kFp8Block, tmin(a.cols, (b + 1) * kFp8Block), [&](int64_t k, int n) {
        store_bf16(a.out + i * a.cols + k, vmul(load_codes(codes + k, n, vload_fp8), s), n);
      });
    }
  }
}

}  // namespace
