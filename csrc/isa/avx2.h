// The AVX2 vocabulary: AVX2, FMA, F16C. A "vector" is 16 floats in two registers.
#pragma once

#include "isa/common.h"

namespace {

struct vf {
  __m256 lo, hi;
};
LC_INLINE vf vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LC_INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LC_INLINE vf vload_n(const float* p, int n) {
  alignas(32) float t[16] = {};
  std::memcpy(t, p, 4 * static_cast<size_t>(n));
  return vload(t);
}
LC_INLINE void vstore(float* p, vf a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
LC_INLINE void vstore_n(float* p, vf a, int n) {
  alignas(32) float t[16];
  vstore(t, a);
  std::memcpy(p, t, 4 * static_cast<size_t>(n));
}
LC_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LC_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LC_INLINE vf vload_i32(const int32_t* p) {
  return {_mm256_cvtepi32_ps(load256(p)), _mm256_cvtepi32_ps(load256(p + 8))};
}
LC_INLINE vf vload_i32_sum(const int32_t* a, const int32_t* b) {
  return {_mm256_cvtepi32_ps(_mm256_add_epi32(load256(a), load256(b))),
          _mm256_cvtepi32_ps(_mm256_add_epi32(load256(a + 8), load256(b + 8)))};
}
LC_INLINE __m256 widen8(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
LC_INLINE vf vload_bf16(const bf16* p) { return {widen8(load128(p)), widen8(load128(p + 8))}; }
LC_INLINE vf vload_bf16_n(const bf16* p, int n) {
  alignas(32) bf16 t[16] = {};
  std::memcpy(t, p, 2 * static_cast<size_t>(n));
  return vload_bf16(t);
}
LC_INLINE __m256i round_bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(quiet), nan)), 16);
}
LC_INLINE __m256i narrow_bf16(vf a) {
  const __m256i p = _mm256_packus_epi32(round_bf16_bits(a.lo), round_bf16_bits(a.hi));
  return _mm256_permute4x64_epi64(p, 0xd8);
}
LC_INLINE void vstore_bf16(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
LC_INLINE void vstore_bf16_n(bf16* p, vf a, int n) {
  alignas(32) bf16 t[16];
  vstore_bf16(t, a);
  std::memcpy(p, t, 2 * static_cast<size_t>(n));
}
LC_INLINE vf vadd(vf a, vf b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LC_INLINE vf vsub(vf a, vf b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LC_INLINE vf vmul(vf a, vf b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LC_INLINE vf vdiv(vf a, vf b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LC_INLINE vf vrecip(vf a) { return vdiv({_mm256_set1_ps(1.0f), _mm256_set1_ps(1.0f)}, a); }
LC_INLINE vf vfma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LC_INLINE vf vmax(vf a, vf b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LC_INLINE vf vmin(vf a, vf b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LC_INLINE vf vabs(vf a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
LC_INLINE float vhsum(vf a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
LC_INLINE float vhmax(vf a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
LC_INLINE vf vround(vf a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
LC_INLINE __m256 scale2_8(__m256 a, __m256 n) {
  // In two halves, so that results near the ends of the range come out right.
  const __m256i i = _mm256_cvtps_epi32(n);
  const __m256i h = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, h);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23));
  const __m256 q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, p), q);
}
LC_INLINE vf vscale2(vf a, vf n) { return {scale2_8(a.lo, n.lo), scale2_8(a.hi, n.hi)}; }
LC_INLINE void vsplit_pairs(vf a, vf b, vf& even, vf& odd) {
  const auto split = [](__m256 x, __m256 y, int which) {
    const __m256 s = which == 0 ? _mm256_shuffle_ps(x, y, 0x88) : _mm256_shuffle_ps(x, y, 0xdd);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(s), 0xd8));
  };
  even = {split(a.lo, a.hi, 0), split(b.lo, b.hi, 0)};
  odd = {split(a.lo, a.hi, 1), split(b.lo, b.hi, 1)};
}
LC_INLINE void vjoin_pairs(vf even, vf odd, vf& a, vf& b) {
  const auto join = [](__m256 e, __m256 o, vf& to) {
    const __m256 lo = _mm256_unpacklo_ps(e, o), hi = _mm256_unpackhi_ps(e, o);
    to = {_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31)};
  };
  join(even.lo, odd.lo, a);
  join(even.hi, odd.hi, b);
}
LC_INLINE vf vmax_magnitude(vf most, vf a) {
  const auto half = [](__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
  };
  const vf size = vabs(a);
  return {half(most.lo, size.lo), half(most.hi, size.hi)};
}
// One truth value a lane. Comparisons with NaN are false.
struct vm {
  __m256 lo, hi;
};
LC_INLINE vm vgt(vf a, vf b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
LC_INLINE vm vge(vf a, vf b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}
LC_INLINE vm vand(vm a, vm b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
LC_INLINE vf vkeep(vm m, vf a) { return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)}; }
LC_INLINE uint32_t vbits(vm m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
struct PackTable {
  uint8_t lane[256][8];
};
constexpr PackTable make_pack_table() {
  PackTable t{};
  for (int m = 0; m < 256; ++m)
    for (int i = 0, n = 0; i < 8; ++i)
      if (m >> i & 1) t.lane[m][n++] = static_cast<uint8_t>(i);
  return t;
}
constexpr PackTable kPack = make_pack_table();
LC_INLINE int vpack(float* p, vm m, vf a) {
  const auto half = [](float* to, __m256 keep, __m256 v) {
    const int bits = _mm256_movemask_ps(keep);
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPack.lane[bits]));
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(lanes)));
    return __builtin_popcount(static_cast<unsigned>(bits));
  };
  const int n = half(p, m.lo, a.lo);
  return n + half(p + n, m.hi, a.hi);
}
LC_INLINE void vprefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
LC_INLINE void vprefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// int8 activations as int16, without bias: `vpmaddubsw` would saturate on products of u8 and s8.
using I8Act = int16_t;
constexpr int kI8ActBias = 0;
LC_INLINE void vstore_i8act(I8Act* p, vf rounded) {
  const __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(rounded.lo), _mm256_cvtps_epi32(rounded.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(q, 0xd8));
}

LC_INLINE vf vload_i8(const int8_t* p) {
  const __m128i codes = load128(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
// The low bytes of 16 dwords that lie within a byte's range.
template <bool Signed>
LC_INLINE __m128i narrow_bytes(__m256i lo, __m256i hi) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  const __m128i a = _mm256_castsi256_si128(words), b = _mm256_extracti128_si256(words, 1);
  return Signed ? _mm_packs_epi16(a, b) : _mm_packus_epi16(a, b);
}
LC_INLINE void vstore_i8(int8_t* p, vf whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   narrow_bytes<true>(_mm256_cvtps_epi32(whole.lo), _mm256_cvtps_epi32(whole.hi)));
}
LC_INLINE __m256 fp8_to_float_8(__m256i code) {
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  const __m256i size = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256i v = _mm256_add_epi32(_mm256_slli_epi32(size, 20), _mm256_set1_epi32(120 << 23));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-9f));
  const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), size));
  const __m256i nan = _mm256_cmpeq_epi32(size, _mm256_set1_epi32(0x7f));
  const __m256i value = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(v), small, is_small));
  const __m256i out = _mm256_blendv_epi8(value, _mm256_set1_epi32(0x7fc00000), nan);
  return _mm256_castsi256_ps(_mm256_or_si256(out, sign));
}
LC_INLINE vf vload_fp8(const uint8_t* p) {
  const __m128i codes = load128(p);
  return {fp8_to_float_8(_mm256_cvtepu8_epi32(codes)),
          fp8_to_float_8(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
}
LC_INLINE __m256i float_to_fp8_8(__m256 a) {
  const __m256i all = _mm256_castps_si256(a);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(all, 24), _mm256_set1_epi32(0x80));
  const __m256i bits = _mm256_and_si256(all, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i large = _mm256_sub_epi32(_mm256_srli_epi32(up, 20), _mm256_set1_epi32(120 << 3));
  const __m256i small = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(512.0f)));
  const __m256i subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), bits);
  return _mm256_or_si256(_mm256_blendv_epi8(large, small, subnormal), sign);
}
LC_INLINE void vstore_fp8(uint8_t* p, vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bytes<false>(float_to_fp8_8(a.lo), float_to_fp8_8(a.hi)));
}

LC_INLINE void transpose_8x8(const uint8_t* const* rows, size_t offset, uint8_t* dst) {
  __m256 r[8], t[8];
  LC_UNROLL
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + offset));
  LC_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  LC_UNROLL
  for (int g = 0; g < 2; ++g) {
    r[4 * g] = _mm256_shuffle_ps(t[4 * g], t[4 * g + 2], 0x44);
    r[4 * g + 1] = _mm256_shuffle_ps(t[4 * g], t[4 * g + 2], 0xee);
    r[4 * g + 2] = _mm256_shuffle_ps(t[4 * g + 1], t[4 * g + 3], 0x44);
    r[4 * g + 3] = _mm256_shuffle_ps(t[4 * g + 1], t[4 * g + 3], 0xee);
  }
  LC_UNROLL
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + c * 64), _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(dst + (4 + c) * 64), _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}
LC_INLINE void transpose_block(const uint8_t* const* rows, size_t offset, uint8_t* dst) {
  LC_UNROLL
  for (int half = 0; half < 2; ++half) {
    LC_UNROLL
    for (int g = 0; g < 2; ++g)
      transpose_8x8(rows + 8 * g, offset + static_cast<size_t>(half) * 32, dst + half * 8 * 64 + g * 32);
  }
}
LC_INLINE void to_wide_order(uint8_t* line) {
  for (int h = 0; h < 64; h += 32) {
    const __m256i codes = _mm256_shuffle_epi8(load256(line + h), load256(kWideOrder.from + h));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(line + h), codes);
  }
}
LC_INLINE void add_block_sums(const uint8_t* block, int32_t* sums) {
  for (int h = 0; h < 2; ++h) {
    __m256i s = load256(sums + 8 * h);
    for (int i = 0; i < 16; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load256(block + i * 64 + 32 * h));
      s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * h), s);
  }
}
LC_INLINE void interleave_rows(const bf16* a, const bf16* b, uint8_t* dst) {
  LC_UNROLL
  for (int h = 0; h < 2; ++h) {
    const __m256i lo = _mm256_cvtepu16_epi32(load128(a + 8 * h));
    const __m256i hi = _mm256_cvtepu16_epi32(load128(b + 8 * h));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 32 * h), _mm256_or_si256(lo, _mm256_slli_epi32(hi, 16)));
  }
}

struct Avx2 {
  static constexpr bool kBf16Act = false;
  static constexpr bool kTiles = false;
  static void enter() {}
  static constexpr int64_t kWidenRows = 12;  // above: FP8 codes are widened once for many rows
  template <Format F>
  static constexpr int max_rows(int np) {
    return np == 1 ? 3 : 0;
  }
  // Panels that rows pass over side by side: one stream is what is read fastest, and registers are few.
  template <Format F>
  static constexpr int panels_at(int64_t) {
    return 1;
  }
  template <Format F>
  static constexpr Fetch fetch(int, int) {
    return {4096, Into::kFirst};
  }

  LC_INLINE __m256 madd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

  // 8 words of e4m3 codes in their high bytes, as fp16 bits of 2^-8 times the value.
  LC_INLINE __m256i fp8_words(__m256i high_bytes) {
    return _mm256_and_si256(_mm256_srai_epi16(high_bytes, 1), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  }
  LC_INLINE __m256i fp8_nan_mask(__m256i codes) {
    const __m256i m = _mm256_set1_epi8(0x7f);
    return _mm256_cmpeq_epi8(_mm256_and_si256(codes, m), m);
  }
  // 32 codes -> 4 vectors of (row, k parity) floats: rows 0..3 and 4..7 at k 0..1, then k 2..3.
  template <Format F>
  LC_INLINE void widen32(__m256i codes, __m256 out[4]) {
    const __m256i zero = _mm256_setzero_si256();
    if constexpr (F == Format::FP8) {
      const __m256i lo = fp8_words(_mm256_unpacklo_epi8(zero, codes));
      const __m256i hi = fp8_words(_mm256_unpackhi_epi8(zero, codes));
      const __m256 two8 = _mm256_set1_ps(256.0f);
      out[0] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(lo)), two8);
      out[1] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(lo, 1)), two8);
      out[2] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(hi)), two8);
      out[3] = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(hi, 1)), two8);
      const __m256i nan = fp8_nan_mask(codes);
      if (__builtin_expect(!_mm256_testz_si256(nan, nan), 0)) {
        const __m256i nl = _mm256_unpacklo_epi8(nan, nan), nh = _mm256_unpackhi_epi8(nan, nan);
        out[0] = or_nan(out[0], _mm256_castsi256_si128(nl));
        out[1] = or_nan(out[1], _mm256_extracti128_si256(nl, 1));
        out[2] = or_nan(out[2], _mm256_castsi256_si128(nh));
        out[3] = or_nan(out[3], _mm256_extracti128_si256(nh, 1));
      }
    } else {
      const __m128i a = _mm256_castsi256_si128(codes), b = _mm256_extracti128_si256(codes, 1);
      out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a));
      out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
      out[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
      out[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)));
    }
  }
  LC_INLINE __m256 or_nan(__m256 v, __m128i words) {
    return _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(words)));
  }
  template <Format F>
  LC_INLINE void widen_to(const uint8_t* p, uint8_t* dst) {
    // The values are exact in bf16, so truncation loses nothing.
    LC_UNROLL
    for (int half = 0; half < 2; ++half) {
      __m256 v[4];
      widen32<F>(load256(p + 32 * half), v);
      LC_UNROLL
      for (int k = 0; k < 2; ++k) {
        const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(v[2 * k]), 16);
        const __m256i b = _mm256_srli_epi32(_mm256_castps_si256(v[2 * k + 1]), 16);
        const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 64 * k + 32 * half), w);
      }
    }
  }

  // Operations of `iters` rounds of the format's best instruction, in registers.
  template <Format F>
  static int64_t peak_round(int64_t iters) {
    constexpr Format kOf = F == Format::INT8 ? F : Format::F32;
    alignas(64) uint32_t operands[16];
    random_operands<kOf>(operands, 16);
    const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(operands));
    const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(operands + 8));
    if constexpr (kOf == Format::INT8) {
      __m256i acc[12] = {};
      for (int64_t i = 0; i < iters; ++i) {
        LC_UNROLL
        for (int j = 0; j < 12; ++j) {
          __m256i x = a;
          __asm__ volatile("" : "+x"(x));
          acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(x, w));
          __asm__ volatile("" : "+x"(acc[j]));
        }
      }
      return iters * 12 * 32;
    } else {
      __m256 acc[12] = {};
      for (int64_t i = 0; i < iters; ++i) {
        LC_UNROLL
        for (int j = 0; j < 12; ++j) {
          acc[j] = madd(_mm256_castsi256_ps(a), _mm256_castsi256_ps(w), acc[j]);
          __asm__ volatile("" : "+x"(acc[j]));
        }
      }
      return iters * 12 * 16;
    }
  }

  // Sums of two neighbouring lanes of a0..a3, in row order.
  LC_INLINE void store_pairs(const __m256 a[4], float* c) {
    LC_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256 s = _mm256_hadd_ps(a[2 * h], a[2 * h + 1]);
      _mm256_storeu_ps(c + 8 * h, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(s), 0xd8)));
    }
  }

  // Even and odd k are summed apart and added at the end, in every bf16-like format: widened and
  // direct products then give the same bits.
  template <Format F>
  struct Unit {
    static constexpr bool kInt = F == Format::INT8;
    static constexpr bool kWide = F == Format::FP8 || F == Format::INT8_WIDE;
    static constexpr int kActBytes = F == Format::INT8 ? 8 : F == Format::F32 ? 4 : F == Format::BF16 ? 8 : 16;
    struct Acc {
      __m256 f[4];
      __m256i i[4];
    };
    struct Line {
      __m256i w[4];
      __m256 f[8];
    };
    // A line is loaded and multiplied in so many parts: the sums of three rows leave registers for half of one.
    static constexpr int parts(int rows) { return rows > 2 && (kInt || F == Format::BF16) ? 2 : 1; }
    LC_INLINE void zero(Acc& acc) {
      LC_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (kInt)
          acc.i[j] = _mm256_setzero_si256();
        else
          acc.f[j] = _mm256_setzero_ps();
      }
    }
    // Behind every block of K (k_multiple).
    LC_INLINE void end_block(Acc&) {}
    template <int Part, int Parts>
    LC_INLINE Line load(const uint8_t* p) {
      Line line;
      if constexpr (kInt) {
        LC_UNROLL
        for (int j = 4 * Part / Parts; j < 4 * (Part + 1) / Parts; ++j)
          line.w[j] = _mm256_cvtepi8_epi16(load128(p + 16 * j));
      } else if constexpr (F == Format::BF16) {
        // Read again by the second part: kept, the line would drive a sum out of its register, into memory and
        // back.
        if constexpr (Part > 0) __asm__("" : "+r"(p));
        LC_UNROLL
        for (int h = 0; h < 2; ++h) {
          const __m256i w = load256(p + 32 * h);
          if constexpr (Part == 0) line.f[h] = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
          if constexpr (Part == Parts - 1)
            line.f[2 + h] = _mm256_castsi256_ps(
                _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
        }
      } else if constexpr (F == Format::F32) {
        line.f[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(p));
        line.f[1] = _mm256_loadu_ps(reinterpret_cast<const float*>(p) + 8);
      } else {
        widen32<F>(load256(p), line.f);
        widen32<F>(load256(p + 32), line.f + 4);
      }
      return line;
    }
    LC_INLINE __m256 pair(const uint8_t* a) {
      return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(a)));
    }
    template <int Part, int Parts>
    LC_INLINE void fma(Acc& acc, const Line& line, const uint8_t* a) {
      if constexpr (kInt) {
        // Read again by the second part, as lines of bf16 are.
        if constexpr (Part > 0) __asm__("" : "+r"(a));
        long long four;
        std::memcpy(&four, a, 8);
        const __m256i x = _mm256_set1_epi64x(four);
        LC_UNROLL
        for (int j = 4 * Part / Parts; j < 4 * (Part + 1) / Parts; ++j) {
          __m256i sum = _mm256_add_epi32(acc.i[j], _mm256_madd_epi16(x, line.w[j]));
          // In this order: all products first would drive the sums into memory.
          if constexpr (Parts > 1) __asm__ volatile("" : "+x"(sum));
          acc.i[j] = sum;
        }
      } else if constexpr (F == Format::F32) {
        const __m256 x = _mm256_broadcast_ss(reinterpret_cast<const float*>(a));
        acc.f[0] = madd(x, line.f[0], acc.f[0]);
        acc.f[1] = madd(x, line.f[1], acc.f[1]);
      } else if constexpr (F == Format::BF16) {
        const float* f = reinterpret_cast<const float*>(a);
        if constexpr (Part == 0) {
          const __m256 even = _mm256_broadcast_ss(f);
          acc.f[0] = madd(even, line.f[0], acc.f[0]);
          acc.f[1] = madd(even, line.f[1], acc.f[1]);
        }
        if constexpr (Part == Parts - 1) {
          const __m256 odd = _mm256_broadcast_ss(f + 1);
          acc.f[2] = madd(odd, line.f[2], acc.f[2]);
          acc.f[3] = madd(odd, line.f[3], acc.f[3]);
        }
      } else {
        // Rows 0..3, 4..7, 8..11, 12..15.
        const __m256 x = pair(a), y = pair(a + 8);
        acc.f[0] = madd(x, line.f[0], acc.f[0]);
        acc.f[1] = madd(x, line.f[1], acc.f[1]);
        acc.f[2] = madd(x, line.f[4], acc.f[2]);
        acc.f[3] = madd(x, line.f[5], acc.f[3]);
        acc.f[0] = madd(y, line.f[2], acc.f[0]);
        acc.f[1] = madd(y, line.f[3], acc.f[1]);
        acc.f[2] = madd(y, line.f[6], acc.f[2]);
        acc.f[3] = madd(y, line.f[7], acc.f[3]);
      }
    }
    LC_INLINE void store(const Acc& acc, float* c) {
      if constexpr (kInt) {
        LC_UNROLL
        for (int h = 0; h < 2; ++h) {
          const __m256i s = _mm256_hadd_epi32(acc.i[2 * h], acc.i[2 * h + 1]);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + 8 * h), _mm256_permute4x64_epi64(s, 0xd8));
        }
      } else if constexpr (F == Format::F32) {
        _mm256_storeu_ps(c, acc.f[0]);
        _mm256_storeu_ps(c + 8, acc.f[1]);
      } else if constexpr (F == Format::BF16) {
        _mm256_storeu_ps(c, _mm256_add_ps(acc.f[0], acc.f[2]));
        _mm256_storeu_ps(c + 8, _mm256_add_ps(acc.f[1], acc.f[3]));
      } else {
        store_pairs(acc.f, c);
      }
    }
  };
};

}  // namespace
