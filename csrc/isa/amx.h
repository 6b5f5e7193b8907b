// The AMX vocabulary: AVX-512 with BF16 and VBMI for everything elementwise, tiles for products.
#pragma once

#include "isa/avx512.h"

namespace {

struct Panels;
struct Act;
struct Sink;

// Loaded only through this type: the compiler must not drop or reorder stores to it.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

// Rows of this thread's tiles; 0 where they may be of any shape or none.
thread_local int configured_rows = 0;

// Tiles 0..3 accumulate, 4..5 hold activations (`rows` of them), 6..7 weights.
LC_INLINE void configure_tiles(int rows) {
  if (configured_rows == rows) return;
  static thread_local TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.colsb[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : 16);
  }
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  __asm__ volatile("" : : "r"(&config) : "memory");
  configured_rows = rows;
}

// FP8 by few rows on vector registers, in the order in which TDPBF16PS adds up a tile (Intel SDM): even
// and odd k of 32 apart, from zero, then both onto the sum. The bits are those of the tiles.
struct TileOrderFp8 {
  using Base = Avx512<true, true>;
  static constexpr bool kInt = false;
  static constexpr int kActBytes = 8;
  struct Acc {
    __m512 sum, even, odd;
  };
  using Line = WideLine;
  static constexpr int parts(int) { return 1; }
  LC_INLINE void zero(Acc& acc) { acc.sum = acc.even = acc.odd = _mm512_setzero_ps(); }
  template <int Part, int Parts>
  LC_INLINE Line load(const uint8_t* p) {
    return Base::widen<Format::FP8>(p);
  }
  LC_INLINE void pair(Acc& acc, __m512i line, uint32_t a) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a << 16)));
    const __m512 y = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a & 0xffff0000u)));
    acc.even = _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(line, 16)), acc.even);
    acc.odd = _mm512_fmadd_ps(y, _mm512_castsi512_ps(_mm512_and_si512(line, high)), acc.odd);
  }
  template <int Part, int Parts>
  LC_INLINE void fma(Acc& acc, const Line& line, const uint8_t* a) {
    uint32_t p[2];
    std::memcpy(p, a, 8);
    pair(acc, line.k01, p[0]);
    pair(acc, line.k23, p[1]);
  }
  LC_INLINE void end_block(Acc& acc) {
    acc.sum = _mm512_add_ps(acc.sum, _mm512_add_ps(acc.even, acc.odd));
    acc.even = acc.odd = _mm512_setzero_ps();
  }
  LC_INLINE void store(const Acc& acc, float* c) { _mm512_storeu_ps(c, acc.sum); }
};
template <Format F>
struct AmxUnit {
  using Type = Avx512<true, true>::Unit<F>;
};
template <>
struct AmxUnit<Format::FP8> {
  using Type = TileOrderFp8;
};

struct Amx : Avx512<true, true> {
  static constexpr bool kTiles = true;
  // Other libraries that ran on this thread since the last kernel may have released its tiles.
  static void enter() { configured_rows = 0; }
  template <Format F>
  using Unit = typename AmxUnit<F>::Type;
  template <Format F>
  static constexpr int max_rows(int np) {
    if (F == Format::FP8) return np == 4 ? 1 : 4;
    return Avx512<true, true>::max_rows<F>(np);
  }
  // Panels side by side and what is fetched as they were measured on processors with AMX, where four streams
  // are read as fast as one.
  template <Format F>
  static constexpr int panels_at(int64_t rows) {
    return rows <= max_rows<F>(4) ? 4 : 2;
  }
  // Codes that are widened are waited for by arithmetic, all else by memory.
  template <Format F>
  static constexpr Fetch fetch(int, int) {
    if (F == Format::FP8 || F == Format::INT8_WIDE) return {2048, Into::kFirst};
    return {F == Format::INT8 ? 8192 : 4096, Into::kSecond};
  }
  // Rows up to which a product runs on vector registers, with the same bits as on tiles: int8 sums
  // are exact, FP8 keeps the tiles' order.
  template <Format F>
  static constexpr int kVectorRows = F == Format::INT8  ? 6
                                     : F == Format::FP8 ? 4
                                                        : 0;

  template <Format F>
  static void tile_product(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                           int multiple, const Sink& sink);
  template <bool Add>
  static void plain_product(const Panels& w, int64_t panels, const Act& a, int64_t m, float* c, int64_t row_stride,
                            int64_t panel_stride);
  template <Format F>
  static int64_t peak_round(int64_t iters);
};

}  // namespace
