// Products on AMX tiles. A panel's 16 lines are one weight tile as they lie.
#pragma once

#include "kernels/gemm.inl.h"

namespace {

LC_INLINE void tile_fence() { __asm__ volatile("" : : : "memory"); }

// Where many threads multiply tiles at a time, tile instructions that follow one another closely are held back: a
// loop of them takes up to 1.7 times as long as with other instructions between (benchmarks/amx_tiles.cpp).
LC_INLINE void pace() {
  __asm__ volatile("nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop" : : : "memory");
}

// The tile instructions name their registers in the assembly text, so these are macros. They do not
// tell the compiler which memory they touch: a fence stands between ordinary accesses and them.
#define LC_LOAD(T, P, STRIDE)    \
  do {                           \
    _tile_loadd(T, (P), STRIDE); \
    pace();                      \
  } while (0)
#define LC_PRODUCT(C, A, B)          \
  do {                               \
    if constexpr (F == Format::INT8) \
      _tile_dpbusd(C, A, B);         \
    else                             \
      _tile_dpbf16ps(C, A, B);       \
  } while (0)
#define LC_DOT(C, A, B)  \
  do {                   \
    LC_PRODUCT(C, A, B); \
    pace();              \
  } while (0)

// Reads a line to have it in the first-level cache. Where many threads multiply tiles, tile loads that miss it
// cost much; loads ahead of them cure that, hints do not (benchmarks/amx_tiles.cpp).
LC_INLINE void touch(const uint8_t* p) {
  uint64_t line;
  __asm__ volatile("movq %1, %0" : "=r"(line) : "m"(*reinterpret_cast<const uint64_t*>(p)));
}

// Operands of four products: tiles of two groups of 16 rows, and of two panels.
struct Operands {
  const uint8_t *a0, *a1, *b0, *b1;
};
constexpr int64_t kTouchAhead = 2;  // steps

// A step of such products. Behind each tile instruction stand an eighth of the touches of the operands of a later
// step, `soon`, and more(part). Rows of activations lie `stride` bytes apart.
template <Format F, bool TouchWeights, class Stride, class More>
__attribute__((always_inline)) inline void tile_step(const Operands& now, const Operands& soon, Stride stride,
                                                     const More& more) {
  const auto between = [&]<int Part>(std::integral_constant<int, Part>) __attribute__((always_inline)) {
    const uint8_t *a = Part < 4 ? soon.a0 : soon.a1, *b = Part < 4 ? soon.b0 : soon.b1;
    LC_UNROLL
    for (int l = Part % 4 * 4; l < Part % 4 * 4 + 4; ++l) {
      touch(a + l * stride);
      if constexpr (TouchWeights) touch(b + l * 64);
    }
    __asm__ volatile("nop; nop; nop; nop" : : : "memory");
    more(Part);
  };
  using std::integral_constant;
  _tile_loadd(4, now.a0, stride);
  between(integral_constant<int, 0>{});
  _tile_loadd(6, now.b0, 64);
  between(integral_constant<int, 1>{});
  _tile_loadd(5, now.a1, stride);
  between(integral_constant<int, 2>{});
  _tile_loadd(7, now.b1, 64);
  between(integral_constant<int, 3>{});
  LC_PRODUCT(0, 4, 6);
  between(integral_constant<int, 4>{});
  LC_PRODUCT(1, 4, 7);
  between(integral_constant<int, 5>{});
  LC_PRODUCT(2, 5, 6);
  between(integral_constant<int, 6>{});
  LC_PRODUCT(3, 5, 7);
  between(integral_constant<int, 7>{});
}

// `n` steps from `now` on, whose operands lie one tile behind the other (of activations, `a_step` bytes apart);
// then those at `then` will be multiplied, of which there are `then_n` at least.
template <Format F, bool TouchWeights, class Stride, class Step, class More>
__attribute__((always_inline)) inline void tile_steps(Operands now, const Operands& then, int64_t n,
                                                      int64_t then_n, Stride stride, Step a_step,
                                                      const More& more) {
  const auto behind = [&](const Operands& o, int64_t steps) __attribute__((always_inline)) {
    return Operands{o.a0 + steps * a_step, o.a1 + steps * a_step, o.b0 + steps * 1024, o.b1 + steps * 1024};
  };
  int64_t j = 0;
  for (; j + kTouchAhead < n; ++j) {
    tile_step<F, TouchWeights>(now, behind(now, kTouchAhead), stride, more);
    now = behind(now, 1);
  }
  for (int64_t k = 0; j < n; ++j, ++k) {
    tile_step<F, TouchWeights>(now, behind(then, k < then_n ? k : 0), stride, more);
    now = behind(now, 1);
  }
}

// The sums of two groups of 16 rows by two panels, tiles 0..3, and where they lie: of the second panel `panel`
// floats, of the second group `group` floats further. Groups and panels that do not exist are left out.
struct TileSums {
  float* c;
  int64_t panel, group, stride;  // stride: bytes from row to row
  bool both, two;                // panels, groups

  LC_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  __attribute__((always_inline)) void load() const {
    _tile_loadd(0, c, stride);
    if (both) _tile_loadd(1, c + panel, stride);
    if (two) _tile_loadd(2, c + group, stride);
    if (two && both) _tile_loadd(3, c + group + panel, stride);
  }
  __attribute__((always_inline)) void store(float* to) const {
    _tile_stored(0, to, stride);
    if (both) _tile_stored(1, to + panel, stride);
    if (two) _tile_stored(2, to + group, stride);
    if (two && both) _tile_stored(3, to + group + panel, stride);
  }
  // Adds one tile of each group by one of each panel, where not all four exist.
  template <Format F>
  __attribute__((always_inline)) void add_some(const uint8_t* a0, const uint8_t* a1, int64_t a_stride,
                                               const uint8_t* b0, const uint8_t* b1) const {
    LC_LOAD(4, a0, a_stride);
    LC_LOAD(6, b0, 64);
    LC_DOT(0, 4, 6);
    if (both) {
      LC_LOAD(7, b1, 64);
      LC_DOT(1, 4, 7);
    }
    if (two) {
      LC_LOAD(5, a1, a_stride);
      LC_DOT(2, 5, 6);
      if (both) LC_DOT(3, 5, 7);
    }
  }
};

// Up to 16 rows: one activation tile, four panels in flight.
template <Format F>
void tile_few_rows(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                   const Sink& sink) {
  alignas(64) float c[16 * kTileCols];
  alignas(64) float sums[16 * kTileCols];
  alignas(64) uint8_t wide[byte_coded(F) ? 4 * kWideStride : 64];
  const int rows = static_cast<int>(m);
  configure_tiles(rows);
  tile_fence();
  constexpr int64_t kTileBytes = 1024;
  const int64_t tiles = w.lines * (byte_coded(F) ? 2 : 1) / 16;  // along K, of bf16 or int8
  constexpr int64_t kChunk = kFp8Block / 32;
  for (int64_t p = p0; p < p1; p += 4) {
    const int np = static_cast<int>(tmin<int64_t>(4, p1 - p));
    const uint8_t* panel = w.base + p * w.stride;
    const uint8_t* then = p + np < p1 ? panel + np * w.stride : next;
    const auto zero = [] {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    };
    const auto store = [np](float* to) {
      constexpr int64_t stride = kTileCols * 4;
      _tile_stored(0, to, stride);
      if (np > 1) _tile_stored(1, to + 16, stride);
      if (np > 2) _tile_stored(2, to + 32, stride);
      if (np > 3) _tile_stored(3, to + 48, stride);
      tile_fence();
    };
    const auto step = [np, &a](const uint8_t* at, const uint8_t* b, int64_t stride) {
      LC_LOAD(4, at, a.row_stride);
      LC_LOAD(6, b, 64);
      LC_DOT(0, 4, 6);
      if (np > 1) {
        LC_LOAD(7, b + stride, 64);
        LC_DOT(1, 4, 7);
      }
      if (np > 2) {
        LC_LOAD(6, b + 2 * stride, 64);
        LC_DOT(2, 4, 6);
      }
      if (np > 3) {
        LC_LOAD(7, b + 3 * stride, 64);
        LC_DOT(3, 4, 7);
      }
    };
    zero();
    if constexpr (byte_coded(F)) {
      for (int64_t t = 0; t < tiles; t += kChunk) {
        const int64_t n = tmin(kChunk, tiles - t);
        widen_panels<Amx, F>(w, panel, np, t * 8, n * 8, ahead_of(panel, w.stride, w.lines, 64, then), wide,
                             kWideStride);
        tile_fence();
        for (int64_t j = 0; j < n; ++j)
          step(a.base + (t + j) * a.block_stride, wide + j * kTileBytes, kWideStride);
        if constexpr (F == Format::FP8) {
          store(sums);
          zero();
          add_block(c, sums, rows, np, block_scale(w, panel, t / kChunk), w.stride / 4, t == 0);
        }
      }
      if constexpr (F != Format::FP8) store(c);
    } else {
      const Ahead fetch = ahead_of(panel, w.stride, w.lines, kTileBytes, then);
      constexpr Fetch kFetch = Amx::fetch<F>(16, 4);
      const int64_t turn = fetch.at(kFetch, kTileBytes);
      for (int64_t t = 0; t < tiles; ++t) {
        const uint8_t* b = panel + t * kTileBytes;
        const int64_t ahead = kFetch.bytes + (t < turn ? 0 : fetch.jump);
        for (int q = 0; q < np; ++q)
          for (int l = 0; l < 16; ++l) prefetch<kFetch.into>(b + q * w.stride + ahead + l * 64);
        step(a.base + t * a.block_stride, b, w.stride);
      }
      store(c);
    }
    finish<F>(w, panel, np, a.scale, rows, c);
    sink(0, rows, p, np, c);
  }
}

// Byte codes of a chunk of one or two panels that are widened while tiles multiply the chunk before.
struct Codes {
  const uint8_t* from;
  int np;
  int64_t lines, done;  // of each panel
};

// Sums of 32 rows by a 128-block of FP8 codes that are scaled and added to what the blocks before gave, a row at a
// time while tiles multiply the next 32 rows.
struct BlockSums {
  static constexpr int64_t kStride = 32;  // floats from row to row
  alignas(64) float sums[2][32 * kStride];
  int into = 0;  // what tiles are stored to; the other is added
  float* to;
  const float* scale;  // of the first panel
  int64_t scale_stride;
  int rows = 0, done = 0, np;
  bool first;

  __attribute__((always_inline)) void add_row() {
    add_block(to + done * kTileCols, sums[into ^ 1] + done * kStride, 1, np, scale, scale_stride, first);
    ++done;
  }
  void add_rest() {
    while (done < rows) add_row();
  }
};

// Many rows: 32 rows by 2 panels a time, K in chunks whose weights stay near while all rows of a block pass
// over them. Rows of the second half of a block keep their sums in the half of the buffer's columns that two
// panels leave free, so that the sums lie close together.
template <Format F>
void tile_many_rows(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                    const Sink& sink) {
  constexpr int64_t kRows = 256, kHalf = kRows / 2;
  constexpr int64_t kTileBytes = 1024;
  constexpr bool kCoded = byte_coded(F);
  constexpr int64_t kChunk = kCoded ? kFp8Block / 32 : 32;
  constexpr int64_t kLines = kCoded ? 8 : 16;  // lines of weights in memory for a tile
  alignas(64) float total[kHalf * kTileCols];
  const auto total_of = [&total](int64_t i) { return total + i % kHalf * kTileCols + i / kHalf * 32; };
  BlockSums blocks;  // of FP8
  alignas(64) uint8_t wide[2][kCoded ? 2 * kWideStride : 64];
  configure_tiles(16);
  const int64_t tiles = w.lines * (kCoded ? 2 : 1) / 16;
  const auto codes_at = [&](int64_t p, int64_t t) {
    return Codes{w.base + p * w.stride + t * kLines * 64, static_cast<int>(tmin<int64_t>(2, p1 - p)),
                 tmin(kChunk, tiles - t) * kLines, 0};
  };
  Codes codes = codes_at(p0, 0);  // for wide[soon]
  int64_t soon = 0;
  for (int64_t i0 = 0; i0 < m; i0 += kRows) {
    const int64_t mi = tmin(kRows, m - i0);
    for (int64_t p = p0; p < p1; p += 2) {
      const int np = static_cast<int>(tmin<int64_t>(2, p1 - p));
      const uint8_t* panel = w.base + p * w.stride;
      const uint8_t* then = p + np < p1 ? panel + np * w.stride : next;
      for (int64_t t = 0; t < tiles; t += kChunk) {
        const int64_t n = tmin(kChunk, tiles - t);
        const uint8_t* b = panel + t * kTileBytes;
        int64_t b_stride = w.stride;
        // Weights that come later, a few lines at each step: the next chunk or, of codes, which are widened by
        // then, the one after it.
        const int64_t t_fetch = t + (kCoded ? 2 * kChunk : n);
        const uint8_t* fetch = t_fetch < tiles ? panel + t_fetch * kLines * 64
                                               : then + (kCoded ? t_fetch - tiles : 0) * kLines * 64;
        const int64_t lines = ceil_div(kLines, ceil_div(mi, 32)), fetch_second = w.stride;
        const auto widen = [&](int q, int64_t line) __attribute__((always_inline)) {
          Amx::template widen_to<F>(codes.from + q * w.stride + line * 64,
                                    wide[soon] + q * kWideStride + line * 128);
        };
        if constexpr (kCoded) {
          widen_panels<Amx, F>(w, codes.from, codes.np, codes.done, codes.lines - codes.done, {w.lines, 0},
                               wide[soon] + codes.done * 128, kWideStride);
          b = wide[soon];
          b_stride = kWideStride;
          soon ^= 1;
          codes.lines = codes.done = 0;
          if (t + n < tiles)
            codes = codes_at(p, t + n);
          else if (p + np < p1)
            codes = codes_at(p + np, 0);
          else if (i0 + kRows < m)
            codes = codes_at(p0, 0);
        }
        tile_fence();
        for (int64_t i = 0; i < mi; i += 32) {
          const bool two = i + 16 < mi;
          float* at = total_of(i);
          constexpr int64_t kRow = F == Format::FP8 ? BlockSums::kStride : kTileCols;
          const TileSums four{at, 16, 16 * kRow, kRow * 4, np > 1, two};
          if (F == Format::FP8 || t == 0)
            four.zero();
          else
            four.load();
          const uint8_t* a0 = a.row(i0 + i) + t * a.block_stride;
          const uint8_t* a1 = a0 + a.group_stride;
          if (two && np > 1) {
            // Behind the chunk follow the same chunk of the next 32 rows or, behind the last, the first of the
            // next.
            const bool last = i + 48 >= mi;
            const int64_t t_then = !last ? t : t + n < tiles ? t + n : 0;
            const uint8_t* a_then = a.row(last ? i0 : i0 + i + 32) + t_then * kTileBytes;
            const uint8_t* b_then = b;
            if (!kCoded && last && t + n < tiles) b_then = b + n * kTileBytes;
            if (!kCoded && last && t + n == tiles && p + 4 <= p1) b_then = panel + 2 * w.stride;
            const auto more = [&](int part) __attribute__((always_inline)) {
              if constexpr (kCoded) {
                if (codes.np == 2 && codes.done < codes.lines) {
                  widen(part / 4, codes.done + part % 4);
                  if (part == 7) codes.done += 4;
                }
              }
              if constexpr (F == Format::FP8)
                if (blocks.done < blocks.rows) blocks.add_row();
              if (part == 2)
                for (const uint8_t* end = fetch + lines * 64; fetch < end; fetch += 64) {
                  vprefetch_l2(fetch);
                  vprefetch_l2(fetch + fetch_second);
                }
            };
            tile_steps<F, !kCoded>({a0, a1, b, b + b_stride},
                                   {a_then, a_then + a.group_stride, b_then, b_then + b_stride}, n,
                                   tmin(n, tiles - t_then), std::integral_constant<int64_t, 64>{},
                                   std::integral_constant<int64_t, 1024>{}, more);
          } else {
            for (int64_t j = 0; j < n; ++j) {
              for (int64_t l = 0; l < lines; ++l)
                for (int q = 0; q < np; ++q) vprefetch_l2(fetch + q * w.stride + l * 64);
              fetch += lines * 64;
              four.add_some<F>(a0 + j * a.block_stride, a1 + j * a.block_stride, a.row_stride, b + j * kTileBytes,
                               b + b_stride + j * kTileBytes);
            }
          }
          if constexpr (F == Format::FP8) {
            blocks.add_rest();
            four.store(blocks.sums[blocks.into]);
            tile_fence();
            blocks.into ^= 1;
            blocks.to = at;
            blocks.scale = block_scale(w, panel, t / kChunk);
            blocks.scale_stride = w.stride / 4;
            blocks.rows = static_cast<int>(tmin<int64_t>(32, mi - i));
            blocks.done = 0;
            blocks.np = np;
            blocks.first = t == 0;
          } else {
            four.store(at);
            tile_fence();
          }
        }
      }
      if constexpr (F == Format::FP8) blocks.add_rest();
      for (int64_t i = 0; i < mi; i += 32) {
        const int mb = static_cast<int>(tmin<int64_t>(32, mi - i));
        float* c = total_of(i);
        finish<F>(w, panel, np, a.scale == nullptr ? nullptr : a.scale + i0 + i, mb, c);
        sink(i0 + i, mb, p, np, c);
      }
    }
  }
}

// bf16 panels by m rows, in groups of 16 that exist as a whole: results as they are, of panel p and row i to
// c + i * row_stride + p * panel_stride. `Add`: the chains begin with what lies there.
template <bool Add>
void Amx::plain_product(const Panels& w, int64_t panels, const Act& a, int64_t m, float* c, int64_t row_stride,
                        int64_t panel_stride) {
  constexpr Format F = Format::BF16;
  constexpr int64_t kTileBytes = 1024;
  const int64_t tiles = w.lines / 16, bytes = row_stride * 4;
  configure_tiles(16);
  tile_fence();
  for (int64_t p = 0; p < panels; p += 2) {
    const bool both = p + 1 < panels;
    const uint8_t *b0 = w.base + p * w.stride, *b1 = b0 + w.stride;
    for (int64_t i = 0; i < m; i += 32) {
      const bool two = i + 16 < m;
      float* const at = c + i * row_stride + p * panel_stride;
      const TileSums four{at, panel_stride, 16 * row_stride, bytes, both, two};
      const uint8_t *a0 = a.row(i), *a1 = a0 + a.group_stride;
      if constexpr (Add)
        four.load();
      else
        four.zero();
      if (two && both) {
        const bool last = i + 64 > m;
        const uint8_t* a_then = last ? a.base : a.row(i + 32);
        const uint8_t* b_then = last && p + 4 <= panels ? b0 + 2 * w.stride : b0;
        const int64_t group = a.group_stride;
        const Operands now{a0, a1, b0, b1}, then{a_then, a_then + group, b_then, b_then + w.stride};
        const auto more = [](int) {};
        if (a.row_stride == 64)
          tile_steps<F, true>(now, then, tiles, tiles, std::integral_constant<int64_t, 64>{},
                              std::integral_constant<int64_t, 1024>{}, more);
        else
          tile_steps<F, true>(now, then, tiles, tiles, a.row_stride, a.block_stride, more);
      } else {
        for (int64_t t = 0; t < tiles; ++t)
          four.add_some<F>(a0 + t * a.block_stride, a1 + t * a.block_stride, a.row_stride, b0 + t * kTileBytes,
                           b1 + t * kTileBytes);
      }
      four.store(at);
    }
  }
  tile_fence();
}

template <Format F>
int64_t Amx::peak_round(int64_t iters) {
  if constexpr (F == Format::F32) return Avx512<true, true>::peak_round<F>(iters);
  alignas(64) uint32_t operands[4 * 256];
  random_operands<F == Format::INT8 ? F : Format::BF16>(operands, 4 * 256);
  configure_tiles(16);
  tile_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  LC_LOAD(4, operands, 64);
  LC_LOAD(5, operands + 256, 64);
  LC_LOAD(6, operands + 512, 64);
  LC_LOAD(7, operands + 768, 64);
  for (int64_t i = 0; i < iters; ++i) {
    LC_DOT(0, 4, 6);
    LC_DOT(1, 4, 7);
    LC_DOT(2, 5, 6);
    LC_DOT(3, 5, 7);
  }
  return iters * 4 * 16 * 16 * (F == Format::INT8 ? 64 : 32) * 2;
}

template <Format F>
void Amx::tile_product(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                       int multiple, const Sink& sink) {
  if (m <= kVectorRows<F>)
    vector_product<Amx, F>(w, p0, p1, next, a, m, multiple, sink);
  else if (m <= 16)
    tile_few_rows<F>(w, p0, p1, next, a, m, sink);
  else
    tile_many_rows<F>(w, p0, p1, next, a, m, sink);
}

}  // namespace
