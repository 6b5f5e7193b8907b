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

// Tiles 0..3 accumulate, 4..5 hold activations (`rows` of them), 6..7 weights.
LC_INLINE void configure_tiles(int rows) {
  static thread_local int configured = 0;
  if (configured == rows) return;
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
  configured = rows;
}

struct Amx : Avx512<true, true> {
  static constexpr bool kTiles = true;
  // Rows up to which the int8 product runs on VNNI: sums are exact, so both give the same bits.
  static constexpr int kVnniRows = 6;

  template <Format F>
  static void tile_product(const Panels& w, int64_t p0, int64_t p1, const Act& a, int64_t m, int multiple,
                           const Sink& sink);
  template <Format F>
  static int64_t peak_round(int64_t iters);
};

}  // namespace
