// Packing: row-major source rows to panels.
#pragma once

#include "kernels/math.inl.h"

namespace {

constexpr int element_bytes(Format f) { return f == Format::F32 ? 4 : f == Format::BF16 ? 2 : 1; }

void pack(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const PackArgs*>(p);
  const Layout& l = a.layout;
  const int64_t row_bytes = l.cols * element_bytes(l.format);
  const int64_t k_bytes = l.k_padded() * element_bytes(l.format);
  uint8_t* base = a.dst + kHeaderBytes + a.item * l.item_stride();
  static const uint8_t kZeros[64] = {};
  const Range own = owned(l.row_panels(), ctx.tid, ctx.nt, 0);
  for (int64_t j = own.begin; j < own.end; ++j) {
    uint8_t* panel = base + (j * l.parts + a.part) * l.panel_stride();
    const int64_t row0 = j * 16;
    const int live = static_cast<int>(tmin<int64_t>(16, l.rows - row0));
    const uint8_t* rows[16];
    for (int r = 0; r < 16; ++r) rows[r] = r < live ? a.src + (row0 + r) * row_bytes : nullptr;
    alignas(64) int32_t sums[16] = {};  // of each row's int8 codes
    for (int64_t blk = 0; blk < ceil_div(k_bytes, 64); ++blk) {
      const int64_t at = blk * 64, n = tmin<int64_t>(64, row_bytes - at);
      alignas(64) uint8_t edge[16][64];
      const uint8_t* from[16];
      for (int r = 0; r < 16; ++r) {
        if (rows[r] == nullptr || n <= 0) {
          from[r] = kZeros;
        } else if (n < 64) {
          std::memset(edge[r], 0, 64);
          std::memcpy(edge[r], rows[r] + at, static_cast<size_t>(n));
          from[r] = edge[r];
        } else {
          from[r] = rows[r] + at;
        }
      }
      alignas(64) uint8_t block[1024];
      transpose_block(from, 0, block);
      if (byte_coded(l.format))
        for (int line = 0; line < 16; ++line) to_wide_order(block + line * 64);
      if (l.format == Format::INT8) add_block_sums(block, sums);
      // Byte codes padded to 32 may end with half a block.
      std::memcpy(panel + blk * 1024, block,
                  static_cast<size_t>(tmin<int64_t>(1024, l.lines() * 64 - blk * 1024)));
    }
    uint8_t* tail = panel + l.lines() * 64;
    float* scale = reinterpret_cast<float*>(tail);
    if (l.format == Format::INT8) {
      int32_t* comp = reinterpret_cast<int32_t*>(tail + 64);
      for (int r = 0; r < 16; ++r) {
        scale[r] = r < live ? a.scale[row0 + r] : 0.0f;
        comp[r] = -128 * sums[r];
      }
    } else if (l.format == Format::INT8_WIDE) {
      for (int r = 0; r < 16; ++r) scale[r] = r < live ? a.scale[row0 + r] : 0.0f;
    } else if (l.format == Format::FP8) {
      const int64_t grid = ceil_div(l.cols, kFp8Block);
      for (int64_t k = 0; k < round_up(grid, 16); ++k)
        scale[k] = k < grid ? a.scale[row0 / kFp8Block * grid + k] : 0.0f;
    }
  }
  if (l.format == Format::INT8_WIDE && a.part == 0 && ctx.tid == 0) {
    float* column = reinterpret_cast<float*>(base + l.column_scale_offset());
    for (int64_t k = 0; k < l.k_padded(); ++k) column[k] = k < l.cols ? a.column_scale[k] : 0.0f;
  }
}

}  // namespace
