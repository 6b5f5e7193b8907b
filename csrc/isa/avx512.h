// The AVX-512 vocabulary: F, BW, DQ, VL, VNNI; BF16 and VBMI where HasBf16 and HasVbmi say so.
#pragma once

#include "isa/common.h"

namespace {

// 16 floats.
struct vf {
  __m512 v;
};
LC_INLINE vf vset1(float x) { return {_mm512_set1_ps(x)}; }
LC_INLINE vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
LC_INLINE vf vload_n(const float* p, int n) {
  lc::sees_read(p, 4 * static_cast<size_t>(n));
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
LC_INLINE void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
LC_INLINE void vstore_n(float* p, vf a, int n) {
  lc::sees_write(p, 4 * static_cast<size_t>(n));
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
LC_INLINE vf vload_i32(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
// fp32(a + b) of 16 int32 sums.
LC_INLINE vf vload_i32_sum(const int32_t* a, const int32_t* b) {
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)))};
}
LC_INLINE vf widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
LC_INLINE vf vload_bf16(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LC_INLINE vf vload_bf16_n(const bf16* p, int n) {
  lc::sees_read(p, 2 * static_cast<size_t>(n));
  return widen_bf16(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
LC_INLINE __m256i narrow_bf16(vf a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
LC_INLINE void vstore_bf16(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
LC_INLINE void vstore_bf16_n(bf16* p, vf a, int n) {
  lc::sees_write(p, 2 * static_cast<size_t>(n));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow_bf16(a));
}
LC_INLINE vf vadd(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
LC_INLINE vf vsub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
LC_INLINE vf vmul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
LC_INLINE vf vdiv(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
// 1 / a for |a| from 2^-125 to 2^125, within two units of the last place: 14 bits and a step of Newton's.
LC_INLINE vf vrecip(vf a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.0f)))};
}
LC_INLINE vf vfma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LC_INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
LC_INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
LC_INLINE vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
LC_INLINE float vhsum(vf a) { return _mm512_reduce_add_ps(a.v); }
LC_INLINE float vhmax(vf a) { return _mm512_reduce_max_ps(a.v); }
// Nearest integers, halves to even.
LC_INLINE vf vround(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n.
LC_INLINE vf vscale2(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Values at even and odd places of 32 consecutive floats.
LC_INLINE void vsplit_pairs(vf a, vf b, vf& even, vf& odd) {
  const __m512i ie = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i io = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  even.v = _mm512_permutex2var_ps(a.v, ie, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, io, b.v);
}
// The reverse: even and odd places side by side.
LC_INLINE void vjoin_pairs(vf even, vf odd, vf& a, vf& b) {
  const __m512i ia = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i ib = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  a.v = _mm512_permutex2var_ps(even.v, ia, odd.v);
  b.v = _mm512_permutex2var_ps(even.v, ib, odd.v);
}
// The larger magnitude; a NaN counts as the largest.
LC_INLINE vf vmax_magnitude(vf most, vf a) {
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(most.v), _mm512_castps_si512(vabs(a).v)))};
}
// One truth value a lane. Comparisons with NaN are false.
struct vm {
  __mmask16 m;
};
LC_INLINE vm vgt(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
LC_INLINE vm vge(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
LC_INLINE vm vand(vm a, vm b) { return {static_cast<__mmask16>(a.m & b.m)}; }
// a where true, else 0.
LC_INLINE vf vkeep(vm m, vf a) { return {_mm512_maskz_mov_ps(m.m, a.v)}; }
// Lane i as bit i.
LC_INLINE uint32_t vbits(vm m) { return m.m; }
// Stores the true lanes of a side by side and returns their number; may write 16 floats all the same.
LC_INLINE int vpack(float* p, vm m, vf a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.m, a.v));
  return __builtin_popcount(m.m);
}
LC_INLINE void vprefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
LC_INLINE void vprefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Stores round(v) as the int8 activation form of this tier: unsigned, +128.
using I8Act = uint8_t;
constexpr int kI8ActBias = 128;
LC_INLINE void vstore_i8act(I8Act* p, vf rounded) {
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(rounded.v), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(q));
}

// 16 codes, row-major, to floats and back: int8 of whole numbers within +-127; e4m3fn of values within
// +-448, rounded half to even.
LC_INLINE vf vload_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
LC_INLINE void vstore_i8(int8_t* p, vf whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole.v)));
}
LC_INLINE vf vload_fp8(const uint8_t* p) {
  const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  const __m512i size = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  __m512i v = _mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0x1p-9f));
  v = _mm512_mask_mov_epi32(v, _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8)), _mm512_castps_si512(small));
  v = _mm512_mask_mov_epi32(v, _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f)),
                            _mm512_set1_epi32(0x7fc00000));
  return {_mm512_castsi512_ps(_mm512_or_si512(v, sign))};
}
LC_INLINE void vstore_fp8(uint8_t* p, vf a) {
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(a.v), 24), _mm512_set1_epi32(0x80));
  const __m512i bits = _mm512_castps_si512(vabs(a).v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i large = _mm512_sub_epi32(_mm512_srli_epi32(up, 20), _mm512_set1_epi32(120 << 3));
  const __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(vabs(a).v, _mm512_set1_ps(512.0f)));
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(121 << 23));
  const __m512i code = _mm512_or_si512(_mm512_mask_mov_epi32(large, subnormal, small), sign);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
}

// Sixteen rows of 16 dwords -> their transpose, stored as 16 lines of 64 bytes.
LC_INLINE void transpose_16x16(const __m512i r[16], uint8_t* dst) {
  __m512i t[16], u[16];
  LC_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  LC_UNROLL
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // u[4g + c] lane l holds column 4l + c of rows 4g..4g+3.
  LC_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
    const __m512i e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xee);
    _mm512_storeu_si512(dst + (0 * 4 + c) * 64, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_storeu_si512(dst + (1 * 4 + c) * 64, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_storeu_si512(dst + (2 * 4 + c) * 64, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_storeu_si512(dst + (3 * 4 + c) * 64, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}
// 16 rows, 64 bytes of each (row i at rows[i]), to 16 lines: line j = dword j of every row.
LC_INLINE void transpose_block(const uint8_t* const* rows, size_t offset, uint8_t* dst) {
  __m512i r[16];
  LC_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  transpose_16x16(r, dst);
}
// A line of four codes a row, [16][4], to the order of wide_byte().
LC_INLINE void to_wide_order(uint8_t* line) {
  _mm512_storeu_si512(line, _mm512_shuffle_epi8(_mm512_loadu_si512(line), _mm512_load_si512(kWideOrder.from)));
}
// Adds up the int8 codes of each row of 16 lines [16][4].
LC_INLINE void add_block_sums(const uint8_t* block, int32_t* sums) {
  __m512i s = _mm512_loadu_si512(sums);
  for (int i = 0; i < 16; ++i) s = _mm512_dpbusd_epi32(s, _mm512_set1_epi8(1), _mm512_loadu_si512(block + i * 64));
  _mm512_storeu_si512(sums, s);
}
// Two rows of 16 bf16 -> one line of 16 pairs.
LC_INLINE void interleave_rows(const bf16* a, const bf16* b, uint8_t* dst) {
  const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(dst, _mm512_or_epi32(lo, _mm512_slli_epi32(hi, 16)));
}

// Two bf16 lines: k 0..1 and k 2..3 of one line of byte codes.
struct WideLine {
  __m512i k01, k23;
};

template <bool HasBf16, bool HasVbmi>
struct Avx512 {
  static constexpr bool kBf16Act = HasBf16;  // bf16-like formats take bf16 activations, else fp32
  static constexpr bool kTiles = false;
  static void enter() {}  // at the start of every kernel
  // Rows above which FP8 codes are widened once for many rows, not once a register tile: with a byte table
  // widening hides behind the products of any number.
  static constexpr int64_t kWidenRows = HasVbmi ? INT64_MAX : 48;
  // Most rows of a register tile of `np` panels.
  template <Format F>
  static constexpr int max_rows(int np) {
    return np == 4 ? 6 : 12;
  }
  // Panels that `rows` rows pass over side by side. A processor reads one stream faster than several
  // (Zen 4: four reach 0.8 of what one does), but byte codes that are widened wait too long in one chain of
  // sums, and many rows share the loads of their activations.
  template <Format F>
  static constexpr int panels_at(int64_t rows) {
    if (rows > 6) return 2;
    return F == Format::FP8 || F == Format::INT8_WIDE ? 4 : 1;
  }
  // Where a line waits for many products, the second-level cache must be well ahead of them.
  template <Format F>
  static constexpr Fetch fetch(int m, int np) {
    if (np > 1 || m > 4) return {8192, Into::kSecond};
    return {4096, m <= 2 ? Into::kTurns : Into::kFirst};
  }

  // As vstore_bf16, but subnormals become zero, which is what the products take them for.
  LC_INLINE void store_bf16_act(bf16* p, vf a) {
    if constexpr (HasBf16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
    else
      vstore_bf16(p, a);
  }

  LC_INLINE WideLine widen_fp8(__m512i codes) {
    const __m512i zero = _mm512_setzero_si512();
    if constexpr (HasVbmi) {
      const __m512i l0 = _mm512_load_si512(kFp8.low), l1 = _mm512_load_si512(kFp8.low + 64);
      const __m512i h0 = _mm512_load_si512(kFp8.high), h1 = _mm512_load_si512(kFp8.high + 64);
      const __m512i low = _mm512_permutex2var_epi8(l0, codes, l1);
      __m512i high = _mm512_permutex2var_epi8(h0, codes, h1);
      // high | (codes & 0x80)
      high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
      return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    } else {
      return {widen_words(_mm512_unpacklo_epi8(codes, zero)), widen_words(_mm512_unpackhi_epi8(codes, zero))};
    }
  }
  LC_INLINE __m512i widen_words(__m512i w) {
    const __m512i t0 = _mm512_load_si512(kFp8.word), t1 = _mm512_load_si512(kFp8.word + 32);
    const __m512i t2 = _mm512_load_si512(kFp8.word + 64), t3 = _mm512_load_si512(kFp8.word + 96);
    const __m512i a = _mm512_permutex2var_epi16(t0, w, t1);
    const __m512i b = _mm512_permutex2var_epi16(t2, w, t3);
    const __mmask32 upper = _mm512_test_epi16_mask(w, _mm512_set1_epi16(0x40));
    const __m512i mag = _mm512_mask_blend_epi16(upper, a, b);
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(mag, sign);
  }
  // int8 codes to bf16: every int8 is exact in bf16.
  LC_INLINE WideLine widen_int8(__m512i codes) {
    const __m512i zero = _mm512_setzero_si512();
    // Sign-extended words, in the order that unpacking gives.
    const __m512i lo = _mm512_srai_epi16(_mm512_unpacklo_epi8(zero, codes), 8);
    const __m512i hi = _mm512_srai_epi16(_mm512_unpackhi_epi8(zero, codes), 8);
    return {int16_to_bf16(lo), int16_to_bf16(hi)};
  }
  LC_INLINE __m512i int16_to_bf16(__m512i w) {
    const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(w, 16), 16);
    const __m512i odd = _mm512_srai_epi32(w, 16);
    const __m512i e = _mm512_castps_si512(_mm512_cvtepi32_ps(even));
    const __m512i o = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
    return _mm512_or_si512(_mm512_srli_epi32(e, 16),
                           _mm512_and_si512(o, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <Format F>
  LC_INLINE WideLine widen(const uint8_t* p) {
    const __m512i codes = _mm512_loadu_si512(p);
    if constexpr (F == Format::FP8)
      return widen_fp8(codes);
    else
      return widen_int8(codes);
  }
  // One line of codes to two bf16 lines in memory.
  template <Format F>
  LC_INLINE void widen_to(const uint8_t* p, uint8_t* dst) {
    const WideLine w = widen<F>(p);
    _mm512_storeu_si512(dst, w.k01);
    _mm512_storeu_si512(dst + 64, w.k23);
  }

  LC_INLINE __m512 dot2(__m512 acc, __m512i line, const uint8_t* a) {
    if constexpr (HasBf16) {
      int pair;
      std::memcpy(&pair, a, 4);
      return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line);
    } else {
      const float* f = reinterpret_cast<const float*>(a);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
      const __m512 odd = _mm512_castsi512_ps(
          _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
      acc = _mm512_fmadd_ps(_mm512_set1_ps(f[0]), even, acc);
      return _mm512_fmadd_ps(_mm512_set1_ps(f[1]), odd, acc);
    }
  }
  static constexpr int kPairBytes = HasBf16 ? 4 : 8;  // two activations

  // Operations of `iters` rounds of the format's best instruction, in registers.
  template <Format F>
  static int64_t peak_round(int64_t iters) {
    constexpr Format kOf = F == Format::INT8 || (F == Format::BF16 && HasBf16) ? F : Format::F32;
    alignas(64) uint32_t operands[32];
    random_operands<kOf>(operands, 32);
    const __m512i a = _mm512_load_si512(operands), w = _mm512_load_si512(operands + 16);
    if constexpr (kOf == Format::INT8) {
      __m512i acc[12] = {};
      for (int64_t i = 0; i < iters; ++i) {
        LC_UNROLL
        for (int j = 0; j < 12; ++j) {
          acc[j] = _mm512_dpbusd_epi32(acc[j], a, w);
          __asm__ volatile("" : "+v"(acc[j]));
        }
      }
      return iters * 12 * 128;
    } else {
      __m512 acc[12] = {};
      for (int64_t i = 0; i < iters; ++i) {
        LC_UNROLL
        for (int j = 0; j < 12; ++j) {
          if constexpr (kOf == Format::BF16)
            acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)a, (__m512bh)w);
          else
            acc[j] = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(w), acc[j]);
          __asm__ volatile("" : "+v"(acc[j]));
        }
      }
      return iters * 12 * (kOf == Format::BF16 ? 64 : 32);
    }
  }

  // How one line of a format is read and multiplied. Acc: 16 sums, one a row of the panel.
  template <Format F>
  struct Unit {
    static constexpr bool kInt = F == Format::INT8;
    static constexpr bool kWide = F == Format::FP8 || F == Format::INT8_WIDE;
    static constexpr int kActBytes = F == Format::INT8  ? 4
                                     : F == Format::F32 ? 4
                                     : kWide            ? 2 * kPairBytes
                                                        : kPairBytes;
    struct Acc {
      __m512 f;
      __m512i i;
    };
    struct Line {
      __m512i a, b;
    };
    static constexpr int parts(int) { return 1; }  // in which a line is loaded and multiplied
    LC_INLINE void zero(Acc& acc) {
      if constexpr (kInt)
        acc.i = _mm512_setzero_si512();
      else
        acc.f = _mm512_setzero_ps();
    }
    // Behind every block of K (k_multiple).
    LC_INLINE void end_block(Acc&) {}
    template <int Part, int Parts>
    LC_INLINE Line load(const uint8_t* p) {
      if constexpr (kWide) {
        const WideLine w = widen<F>(p);
        return {w.k01, w.k23};
      } else {
        return {_mm512_loadu_si512(p), _mm512_setzero_si512()};
      }
    }
    template <int Part, int Parts>
    LC_INLINE void fma(Acc& acc, const Line& line, const uint8_t* a) {
      if constexpr (kInt) {
        int four;
        std::memcpy(&four, a, 4);
        acc.i = _mm512_dpbusd_epi32(acc.i, _mm512_set1_epi32(four), line.a);
      } else if constexpr (F == Format::F32) {
        float x;
        std::memcpy(&x, a, 4);
        acc.f = _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_castsi512_ps(line.a), acc.f);
      } else {
        acc.f = dot2(acc.f, line.a, a);
        if constexpr (kWide) acc.f = dot2(acc.f, line.b, a + kPairBytes);
      }
    }
    LC_INLINE void store(const Acc& acc, float* c) {
      if constexpr (kInt)
        _mm512_storeu_si512(c, acc.i);
      else
        _mm512_storeu_ps(c, acc.f);
    }
  };
};

}  // namespace
