// Products of activations with packed weight panels: the one matrix routine of every kernel.
//
// Order of accumulation: each result is one chain over K (AVX2: one for even, one for odd k), in
// FP8 one chain a 128-block, blocks added in order. It depends on tier, format and K alone, never
// on how many rows there are or how they are tiled.
#pragma once

#include <utility>

#include "kernels/share.inl.h"

namespace {

constexpr int64_t kPrefetchBytes = 2048;
constexpr int kTileCols = 64;   // columns of the result buffer that a sink sees

// Activations ready for a product: row m, 64-byte (AVX2: up to 128-byte) block b of K stands at
// base + (m / 16) * group_stride + (m % 16) * row_stride + b * block_stride.
struct Act {
  uint8_t* base;
  float* scale;  // one a row; INT8 only
  int64_t row_stride, block_stride, group_stride;

  uint8_t* row(int64_t m) const { return base + m / 16 * group_stride + m % 16 * row_stride; }
  Act from(int64_t m) const {  // m a multiple of 16, or any m in row-major layouts
    return {row(m), scale == nullptr ? nullptr : scale + m, row_stride, block_stride, group_stride};
  }
};

// Bytes of one element of the prepared activations.
template <class Isa>
constexpr int act_bytes(Format f) {
  if (f == Format::INT8) return sizeof(I8Act);
  if (f == Format::F32) return 4;
  return Isa::kBf16Act ? 2 : 4;
}
// K elements in one block: 16 lines of a panel (8 of a byte-coded bf16-like format).
constexpr int block_k(Format f) { return static_cast<int>(k_multiple(f)); }

template <class Isa>
int64_t act_size(Format f, int64_t rows, int64_t k) {
  const int64_t kp = round_up(k, block_k(f)), row = kp * act_bytes<Isa>(f);
  const int64_t groups = ceil_div(rows, 16);
  const int64_t bytes = Isa::kTiles && f != Format::F32 ? groups * 16 * row : groups * 16 * (row + 64);
  return round_up(bytes, 64) + round_up(4 * groups * 16, 64);
}
template <class Isa>
Act act_at(Format f, uint8_t* mem, int64_t rows, int64_t k) {
  const int64_t kp = round_up(k, block_k(f)), row = kp * act_bytes<Isa>(f);
  const int64_t groups = ceil_div(rows, 16);
  Act a;
  a.base = mem;
  if (Isa::kTiles && f != Format::F32) {
    a.row_stride = 64;
    a.block_stride = 1024;
    a.group_stride = 16 * row;
  } else {
    a.row_stride = row + 64;  // keeps rows of power-of-two width off the same cache sets
    a.block_stride = static_cast<int64_t>(block_k(f)) * act_bytes<Isa>(f);
    a.group_stride = 16 * a.row_stride;
  }
  a.scale = reinterpret_cast<float*>(mem + round_up(groups * a.group_stride, 64));
  return a;
}

// Writes 16 values at k (a multiple of 16) of row m in the form that bf16-like formats multiply.
template <class Isa>
LC_INLINE void act_store16(const Act& a, int64_t m, int64_t k, vf v) {
  constexpr int kBlock = 32;
  uint8_t* p = a.row(m) + k / kBlock * a.block_stride;
  if constexpr (Isa::kBf16Act)
    Isa::store_bf16_act(reinterpret_cast<bf16*>(p) + k % kBlock, v);
  else {
    // Rounded to bf16 as well: every tier multiplies the same values.
    bf16 t[16];
    vstore_bf16(t, v);
    vstore(reinterpret_cast<float*>(p) + k % kBlock, vload_bf16(t));
  }
}

// Symmetric int8 by row: s = max|x| / 127, q = round-half-even(x / s); a row of zeros gives zeros.
template <class Isa>
void act_quantize_row(const Act& a, int64_t m, const bf16* x, int64_t k) {
  vf top = vset1(0.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) top = vmax(top, vabs(vload_bf16(x + i)));
  if (i < k) top = vmax(top, vabs(vload_bf16_n(x + i, static_cast<int>(k - i))));
  const float s = vhmax(top) / 127.0f;
  a.scale[m] = s;
  const vf vs = vset1(s > 0.0f ? s : 1.0f), vinv = vdiv(vset1(1.0f), vs);
  const bool tiny = s < 0x1p-120f;  // its inverse may be infinite
  const vf lim = vset1(127.0f), neg = vset1(-127.0f);
  uint8_t* row = a.row(m);
  const int64_t kp = round_up(k, 64);
  for (i = 0; i < kp; i += 16) {
    vf v = vset1(0.0f);
    if (i + 16 <= k)
      v = vload_bf16(x + i);
    else if (i < k)
      v = vload_bf16_n(x + i, static_cast<int>(k - i));
    // A product is as good as the quotient but next to a half, where the last bit decides.
    const vf near = vmul(v, vinv);
    vf whole = vround(near);
    if (tiny || vbits(vge(vabs(vsub(near, whole)), vset1(0.4999f))) != 0) whole = vround(vdiv(v, vs));
    const vf q = vmax(neg, vmin(lim, whole));
    vstore_i8act(reinterpret_cast<I8Act*>(row + i / 64 * a.block_stride) + i % 64, q);
  }
}

// One row of bf16 activations in the form that format f multiplies.
template <class Isa>
void act_prepare_row(Format f, const Act& a, int64_t m, const bf16* x, int64_t k) {
  if (f == Format::INT8) return act_quantize_row<Isa>(a, m, x, k);
  const int64_t kp = round_up(k, block_k(f));
  for (int64_t i = 0; i < kp; i += 16) {
    vf v = vset1(0.0f);
    if (i + 16 <= k)
      v = vload_bf16(x + i);
    else if (i < k)
      v = vload_bf16_n(x + i, static_cast<int>(k - i));
    if (f == Format::F32)
      vstore(reinterpret_cast<float*>(a.row(m)) + i, v);
    else
      act_store16<Isa>(a, m, i, v);
  }
}
// A prepared row again, at another place.
template <class Isa>
void act_copy_row(Format f, const Act& a, int64_t from, int64_t to, int64_t k) {
  const int64_t bytes = block_k(f) * act_bytes<Isa>(f), blocks = ceil_div(k, block_k(f));
  const uint8_t* src = a.row(from);
  uint8_t* dst = a.row(to);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t at = 0; at < bytes; at += 64)
      std::memcpy(dst + b * a.block_stride + at, src + b * a.block_stride + at, 64);
  }
  if (f == Format::INT8) a.scale[to] = a.scale[from];
}
// One row of fp32 activations, for bf16-like formats; `column_scale` (may be null) multiplies first.
template <class Isa>
void act_prepare_row_f32(const Act& a, int64_t m, const float* x, const float* column_scale, int64_t k) {
  const int64_t kp = round_up(k, 32);
  for (int64_t i = 0; i < kp; i += 16) {
    vf v = vset1(0.0f);
    const int n = static_cast<int>(tmin<int64_t>(16, k - i));
    if (n > 0) {
      v = n == 16 ? vload(x + i) : vload_n(x + i, n);
      if (column_scale != nullptr) v = vmul(v, vload_n(column_scale + i, n));
    }
    act_store16<Isa>(a, m, i, v);
  }
}

// ---- register tiles ---------------------------------------------------------------------------

// What to fetch while panels are read: kPrefetchBytes ahead of what is read, but from block `turn` on
// `jump` bytes further, where the panels that are read next begin.
struct Ahead {
  int64_t turn, jump;
  Ahead from(int64_t block) const { return {turn - block, jump}; }
  // `turn` where another distance is fetched ahead.
  int64_t at(const Fetch& fetch, int64_t block_bytes) const {
    return turn - (fetch.bytes - kPrefetchBytes) / block_bytes;
  }
};
template <Into I>
LC_INLINE void prefetch(const uint8_t* p) {
  if constexpr (I == Into::kSecond)
    vprefetch_l2(p);
  else
    vprefetch(p);
}
// For panels whose lines are followed by those of `next`.
LC_INLINE Ahead ahead_of(const uint8_t* panel, int64_t stride, int64_t lines, int64_t block_bytes,
                         const uint8_t* next) {
  return {(lines * 64 - kPrefetchBytes) / block_bytes, next - panel - stride};
}

// c[m][p*16 + r] for M rows and NP panels over `blocks` blocks of K, starting from zero.
template <class Isa, Format F, int M, int NP>
void tile(const Act& a, const uint8_t* w, int64_t panel_stride, int64_t blocks, const Ahead& fetch, float* c) {
  using U = typename Isa::template Unit<F>;
  constexpr int kLines = block_k(F) / k_per_line(F), kParts = U::parts(M);
  typename U::Acc acc[M][NP];
  LC_UNROLL
  for (int m = 0; m < M; ++m) {
    LC_UNROLL
    for (int p = 0; p < NP; ++p) U::zero(acc[m][p]);
  }
  const uint8_t* row[M];
  LC_UNROLL
  for (int m = 0; m < M; ++m) row[m] = a.base + m * a.row_stride;
  const int64_t step = a.block_stride;
  constexpr int64_t kBlockBytes = kLines * 64;
  constexpr Fetch kFetch = Isa::template fetch<F>(M, NP);
  const int64_t turn = fetch.at(kFetch, kBlockBytes);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t ahead = kFetch.bytes + (b < turn ? 0 : fetch.jump);
    const bool turned = b >= turn && fetch.jump != 0;
#pragma GCC unroll 4
    for (int u = 0; u < kLines; ++u) {
      LC_UNROLL
      for (int p = 0; p < NP; ++p) {
        const uint8_t* src = w + p * panel_stride + u * 64;
        if constexpr (kFetch.into == Into::kTurns) {
          if (turned) vprefetch(src + ahead);
        } else {
          prefetch<kFetch.into>(src + ahead);
        }
      }
      const auto multiply = [&]<int Part>(std::integral_constant<int, Part>) __attribute__((always_inline)) {
        typename U::Line line[NP];
        LC_UNROLL
        for (int p = 0; p < NP; ++p) line[p] = U::template load<Part, kParts>(w + p * panel_stride + u * 64);
        LC_UNROLL
        for (int m = 0; m < M; ++m) {
          LC_UNROLL
          for (int p = 0; p < NP; ++p)
            U::template fma<Part, kParts>(acc[m][p], line[p], row[m] + u * U::kActBytes);
        }
      };
      [&]<int... Part>(std::integer_sequence<int, Part...>) __attribute__((always_inline)) {
        (multiply(std::integral_constant<int, Part>{}), ...);
      }(std::make_integer_sequence<int, kParts>{});
    }
    w += kBlockBytes;
    LC_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m] += step;
      LC_UNROLL
      for (int p = 0; p < NP; ++p) U::end_block(acc[m][p]);
    }
  }
  LC_UNROLL
  for (int m = 0; m < M; ++m) {
    LC_UNROLL
    for (int p = 0; p < NP; ++p) U::store(acc[m][p], c + m * kTileCols + p * 16);
  }
}

using TileFn = void (*)(const Act&, const uint8_t*, int64_t, int64_t, const Ahead&, float*);

template <class Isa, Format F, int NP, int M>
constexpr TileFn tile_or_null() {
  if constexpr (M >= 1 && M <= Isa::template max_rows<F>(NP))
    return &tile<Isa, F, M, NP>;
  else
    return nullptr;
}
template <class Isa, Format F, int NP>
TileFn tile_for(int m) {
  // clang-format off
  static constexpr TileFn table[13] = {
      nullptr,
      tile_or_null<Isa, F, NP, 1>(),  tile_or_null<Isa, F, NP, 2>(),  tile_or_null<Isa, F, NP, 3>(),
      tile_or_null<Isa, F, NP, 4>(),  tile_or_null<Isa, F, NP, 5>(),  tile_or_null<Isa, F, NP, 6>(),
      tile_or_null<Isa, F, NP, 7>(),  tile_or_null<Isa, F, NP, 8>(),  tile_or_null<Isa, F, NP, 9>(),
      tile_or_null<Isa, F, NP, 10>(), tile_or_null<Isa, F, NP, 11>(), tile_or_null<Isa, F, NP, 12>()};
  // clang-format on
  return table[m];
}
template <class Isa, Format F>
LC_INLINE void run_tile(int m, int np, const Act& a, const uint8_t* w, int64_t stride, int64_t blocks,
                        const Ahead& fetch, float* c) {
  if (np == 4) return tile_for<Isa, F, 4>(m)(a, w, stride, blocks, fetch, c);
  if (np == 2) return tile_for<Isa, F, 2>(m)(a, w, stride, blocks, fetch, c);
  tile_for<Isa, F, 1>(m)(a, w, stride, blocks, fetch, c);
}

// ---- epilogues --------------------------------------------------------------------------------

// fp32(acc + compensation) * activation scale * weight scale: this order, no contraction, so the
// result is the same on every tier.
LC_INLINE void finish_int8(float* c, int m, int np, const uint8_t* w, int64_t stride, int64_t lines,
                           const float* act_scale) {
  for (int p = 0; p < np; ++p) {
    const uint8_t* tail = w + p * stride + lines * 64;
    const vf ws = vload(reinterpret_cast<const float*>(tail));
    const int32_t* comp = reinterpret_cast<const int32_t*>(tail + 64);
    for (int i = 0; i < m; ++i) {
      float* at = c + i * kTileCols + p * 16;
      const int32_t* sums = reinterpret_cast<const int32_t*>(at);
      const vf s = kI8ActBias != 0 ? vload_i32_sum(sums, comp) : vload_i32(sums);
      vstore(at, vmul(vmul(s, vset1(act_scale[i])), ws));
    }
  }
}
LC_INLINE void finish_wide(float* c, int m, int np, const uint8_t* w, int64_t stride, int64_t lines) {
  for (int p = 0; p < np; ++p) {
    const vf ws = vload(reinterpret_cast<const float*>(w + p * stride + lines * 64));
    for (int i = 0; i < m; ++i) {
      float* at = c + i * kTileCols + p * 16;
      vstore(at, vmul(vload(at), ws));
    }
  }
}
// total (+)= sums of one 128-block * its scale.
LC_INLINE void add_block(float* total, const float* sums, int m, int np, const float* scale, int64_t scale_stride,
                         bool first) {
  for (int p = 0; p < np; ++p) {
    const vf s = vset1(scale[p * scale_stride]);
    for (int i = 0; i < m; ++i) {
      float* t = total + i * kTileCols + p * 16;
      const vf v = vload(sums + i * kTileCols + p * 16);
      vstore(t, first ? vmul(v, s) : vfma(v, s, vload(t)));
    }
  }
}

// ---- driver -----------------------------------------------------------------------------------

// One matrix of a packed weight.
struct Panels {
  Format format;
  const uint8_t* base;  // first panel
  int64_t stride;       // bytes from panel to panel
  int64_t lines;        // 64-byte lines of a panel
  const float* column_scale;  // INT8_WIDE: multiplies the activations, [k]; else null
};
LC_INLINE Panels panels_of(const Weight& w, int64_t item) {
  const Layout& l = w.layout;
  const uint8_t* base = w.data + kHeaderBytes + item * l.item_stride();
  const float* cs = l.format == Format::INT8_WIDE ? reinterpret_cast<const float*>(base + l.column_scale_offset())
                                                  : nullptr;
  return {l.format, base, l.panel_stride(), l.lines(), cs};
}

// Receives finished tiles: row i and panel q of a tile, fp32 and fully scaled, stand at
// c[i * kTileCols + q * 16 ...]; the tile begins at row m0 and at panel `panel`.
struct Sink {
  void (*fn)(void* self, int64_t m0, int m, int64_t panel, int np, float* c);
  void* self;
  void operator()(int64_t m0, int m, int64_t panel, int np, float* c) const { fn(self, m0, m, panel, np, c); }
};
template <class F>
Sink sink_of(F& f) {
  return {[](void* self, int64_t m0, int m, int64_t panel, int np, float* c) {
            (*static_cast<F*>(self))(m0, m, panel, np, c);
          },
          &f};
}

constexpr bool byte_coded(Format f) { return f == Format::FP8 || f == Format::INT8_WIDE; }

// Epilogue of one tile whose rows are the first `m` of `act_scale`.
template <Format F>
LC_INLINE void finish(const Panels& w, const uint8_t* panel, int np, const float* act_scale, int m, float* c) {
  if constexpr (F == Format::INT8) finish_int8(c, m, np, panel, w.stride, w.lines, act_scale);
  if constexpr (F == Format::INT8_WIDE) finish_wide(c, m, np, panel, w.stride, w.lines);
}

LC_INLINE const float* block_scale(const Panels& w, const uint8_t* panel, int64_t block) {
  return reinterpret_cast<const float*>(panel + w.lines * 64) + block;
}

// `np` (4, 2 or 1) panels by `m` rows of one register tile, scaled, into c. The panels at `next` are
// read next.
template <class Isa, Format F>
void tile_product(const Panels& w, const uint8_t* panel, int np, const uint8_t* next, const Act& a, int m,
                  float* c) {
  constexpr int64_t kBlockBytes = block_k(F) / k_per_line(F) * 64;
  const int64_t blocks = w.lines * 64 / kBlockBytes;
  const Ahead fetch = ahead_of(panel, w.stride, w.lines, kBlockBytes, next);
  if constexpr (F == Format::FP8) {
    alignas(64) float sums[12 * kTileCols];
    constexpr int64_t kPer = kFp8Block / 32;
    for (int64_t b = 0; b < blocks; b += kPer) {
      Act at = a;
      at.base += b * a.block_stride;
      run_tile<Isa, F>(m, np, at, panel + b * kBlockBytes, w.stride, tmin(kPer, blocks - b), fetch.from(b), sums);
      add_block(c, sums, m, np, block_scale(w, panel, b / kPer), w.stride / 4, b == 0);
    }
  } else {
    run_tile<Isa, F>(m, np, a, panel, w.stride, blocks, fetch, c);
  }
  finish<F>(w, panel, np, a.scale, m, c);
}

// Widens lines [line0, line0 + lines) of `np` panels of byte codes to bf16 lines. `fetch` counts lines.
template <class Isa, Format F>
void widen_panels(const Panels& w, const uint8_t* panel, int np, int64_t line0, int64_t lines, const Ahead& fetch,
                  uint8_t* dst, int64_t dst_stride) {
  for (int p = 0; p < np; ++p)
    for (int64_t l = 0; l < lines; ++l) {
      const uint8_t* src = panel + p * w.stride + (line0 + l) * 64;
      vprefetch(src + kPrefetchBytes + (line0 + l < fetch.turn ? 0 : fetch.jump));
      Isa::template widen_to<F>(src, dst + p * dst_stride + l * 128);
    }
}

constexpr int64_t kRowBlock = 192;  // rows whose sums are held while K is walked; a multiple of 16
constexpr int64_t kWideLines = kFp8Block / 4;              // lines of codes in a 128-block
constexpr int64_t kWideStride = kWideLines * 128;          // a widened panel of one 128-block

// FP8 panels by many rows: K is walked in blocks of 128, each widened once.
template <class Isa>
void widened_product(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                     const Sink& sink) {
  alignas(64) uint8_t wide[2 * kWideStride];
  alignas(64) float total[kRowBlock * kTileCols];
  alignas(64) float sums[12 * kTileCols];
  constexpr int kNp = Isa::template max_rows<Format::BF16>(2) >= 3 ? 2 : 1;
  constexpr int64_t kCap = Isa::template max_rows<Format::BF16>(kNp);
  for (int64_t i0 = 0; i0 < m; i0 += kRowBlock) {
    const int64_t mi = tmin(kRowBlock, m - i0);
    const int64_t rows = ceil_div(mi, ceil_div(mi, kCap));
    for (int64_t p = p0; p < p1; p += 2) {
      const int np = static_cast<int>(tmin<int64_t>(2, p1 - p));
      const uint8_t* panel = w.base + p * w.stride;
      const Ahead fetch = ahead_of(panel, w.stride, w.lines, 64, p + np < p1 ? panel + np * w.stride : next);
      for (int64_t line = 0, blk = 0; line < w.lines; line += kWideLines, ++blk) {
        const int64_t lines = tmin(kWideLines, w.lines - line);
        widen_panels<Isa, Format::FP8>(w, panel, np, line, lines, fetch, wide, kWideStride);
        const int64_t blocks = lines / 8;  // of 32 k
        for (int64_t i = 0; i < mi; i += rows) {
          const int mb = static_cast<int>(tmin(rows, mi - i));
          Act at = a.from(i0 + i);
          at.base += blk * (kFp8Block / 32) * a.block_stride;
          for (int q = 0; q < np; q += tmin(kNp, np - q))
            run_tile<Isa, Format::BF16>(mb, tmin(kNp, np - q), at, wide + q * kWideStride, kWideStride, blocks,
                                        {blocks, 0}, sums + q * 16);
          add_block(total + i * kTileCols, sums, mb, np, block_scale(w, panel, blk), w.stride / 4, blk == 0);
        }
      }
      for (int64_t i = 0; i < mi; i += rows) {
        const int mb = static_cast<int>(tmin(rows, mi - i));
        sink(i0 + i, mb, p, np, total + i * kTileCols);
      }
    }
  }
}

// Panels [p0, p1) by `m` rows on vector registers. `multiple` 2 keeps pairs of panels (gate, up) in
// one tile; p0 and p1 are then even.
template <class Isa, Format F>
void vector_product(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m,
                    int multiple, const Sink& sink) {
  if constexpr (F == Format::FP8) {
    if (m > Isa::kWidenRows) return widened_product<Isa>(w, p0, p1, next, a, m, sink);
  }
  alignas(64) float c[12 * kTileCols];
  const int reg = Isa::template panels_at<F>(m);  // panels of a register tile
  const int64_t cap = Isa::template max_rows<F>(reg);
  const int64_t rows = ceil_div(m, ceil_div(m, cap));
  const int group = tmax(reg, multiple);
  for (int64_t p = p0; p < p1; p += group) {
    const int np = static_cast<int>(tmin<int64_t>(group, p1 - p));
    const uint8_t* panel = w.base + p * w.stride;
    for (int64_t i = 0; i < m; i += rows) {
      const int mb = static_cast<int>(tmin(rows, m - i));
      for (int q = 0; q < np;) {
        int use = tmin(reg, np - q);
        if (use == 3) use = 2;
        const uint8_t* at = panel + q * w.stride;
        q += use;
        tile_product<Isa, F>(w, at, use, p + q < p1 ? at + use * w.stride : next, a.from(i), mb,
                             c + (q - use) * 16);
      }
      sink(i, mb, p, np, c);
    }
  }
}

template <class Isa, Format F>
void product(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m, int multiple,
             const Sink& sink) {
  if constexpr (Isa::kTiles && F != Format::F32)
    Isa::template tile_product<F>(w, p0, p1, next, a, m, multiple, sink);
  else
    vector_product<Isa, F>(w, p0, p1, next, a, m, multiple, sink);
}

// Panels [p0, p1) by `m` rows. The panels at `next`, in most cases those behind p1, are read next.
template <class Isa>
void gemm(const Panels& w, int64_t p0, int64_t p1, const uint8_t* next, const Act& a, int64_t m, int multiple,
          const Sink& sink) {
  if (p0 >= p1 || m <= 0) return;
  switch (w.format) {
    case Format::F32: return product<Isa, Format::F32>(w, p0, p1, next, a, m, multiple, sink);
    case Format::BF16: return product<Isa, Format::BF16>(w, p0, p1, next, a, m, multiple, sink);
    case Format::INT8: return product<Isa, Format::INT8>(w, p0, p1, next, a, m, multiple, sink);
    case Format::FP8: return product<Isa, Format::FP8>(w, p0, p1, next, a, m, multiple, sink);
    case Format::INT8_WIDE: return product<Isa, Format::INT8_WIDE>(w, p0, p1, next, a, m, multiple, sink);
  }
}
template <class Isa>
void gemm(const Panels& w, int64_t p0, int64_t p1, const Act& a, int64_t m, const Sink& sink) {
  gemm<Isa>(w, p0, p1, w.base + p1 * w.stride, a, m, 1, sink);
}

constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kPartRows = 64;  // most rows for which shares are cut finer than whole work: decoding

// Panels taken `most` at once. Of a prompt's rows, more at once are worth more than an even end.
LC_INLINE Take take_panels(int64_t most, int64_t rows) { return {most, rows > kPartRows ? 2 : 1}; }

// Panels of a matrix as units that threads share out: as many panels a unit as stay together.
struct Units {
  int64_t panels, each;
  Units(const Layout& l, int64_t rows, int multiple)
      : panels(l.panels()), each(rows > kPanelRows && multiple == 1 ? 2 : multiple) {}
  int64_t count() const { return ceil_div(panels, each); }
  int64_t most() const { return kPanelsAtOnce / each; }
  int64_t first(int64_t unit) const { return tmin(panels, unit * each); }
};

// Rows whose activations stay in the second-level cache while panels pass over them.
LC_INLINE int64_t cached_rows(const Act& a) {
  return tmin<int64_t>(256, tmax<int64_t>(32, (int64_t{1} << 19) / a.group_stride * 16));
}

// A whole matrix by `m` rows, shared out among the threads; no barrier before or behind. By panels or,
// where the activations are too many for the cache, by blocks of rows for all panels of one thread.
// Thread t owns range(t) of its units.
template <class Isa, class Own>
void shared_gemm_by(const Ctx& ctx, const Weight& weight, const Act& a, int64_t m, int multiple, const Own& range,
                    const Sink& sink) {
  const Units u(weight.layout, m, multiple);
  const Panels w = panels_of(weight, 0);
  const int64_t block = cached_rows(a);
  if (m <= block) {
    each_share(
        ctx, 1, take_panels(u.most(), m), [&](int64_t, int t) { return range(t); },
        [&](int, int64_t, int64_t begin, int64_t end) {
          const int64_t p0 = u.first(begin), p1 = u.first(end);
          gemm<Isa>(w, p0, p1, w.base + p1 * w.stride, a, m, multiple, sink);
        });
    return;
  }
  each_share(
      ctx, ceil_div(m, block), take_panels(u.count(), m), [&](int64_t, int t) { return range(t); },
      [&](int of, int64_t list, int64_t begin, int64_t end) {
        const Range r = range(of);
        const int64_t i0 = list * block, then = end < r.end ? end : r.begin;
        auto shifted = [&](int64_t m0, int n, int64_t panel, int np, float* c) { sink(i0 + m0, n, panel, np, c); };
        gemm<Isa>(w, u.first(begin), u.first(end), w.base + u.first(then) * w.stride, a.from(i0),
                  tmin(block, m - i0), multiple, sink_of(shifted));
      });
}

template <class Isa>
void shared_gemm(const Ctx& ctx, const Weight& weight, const Act& a, int64_t m, int multiple, int64_t turn,
                 const Sink& sink) {
  const int64_t count = Units(weight.layout, m, multiple).count();
  const auto range = [&](int t) { return owned(count, t, ctx.nt, turn); };
  shared_gemm_by<Isa>(ctx, weight, a, m, multiple, range, sink);
}

}  // namespace
