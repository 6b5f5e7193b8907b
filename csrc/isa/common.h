// What every vocabulary header shares. Included only by the kernel translation units, each built
// for its own instruction set: everything here has internal linkage, so that the linker can never
// pick one unit's code for another.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/format.h"
#include "runtime/sanitize.h"

#define LC_INLINE static inline __attribute__((always_inline))
// Register tiles exist only unrolled: left to itself the compiler keeps their arrays in memory.
#define LC_UNROLL _Pragma("GCC unroll 16")

namespace {

using namespace lc;

using bf16 = uint16_t;

template <class T>
constexpr T tmin(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T tmax(T a, T b) {
  return a < b ? b : a;
}

// How far ahead of their use weights are fetched, and into which cache. A processor that follows one stream
// by itself wants only the start of the next matrix fetched (kTurns), into the first-level cache.
enum class Into { kTurns, kFirst, kSecond };
struct Fetch {
  int64_t bytes;
  Into into;
};

LC_INLINE float bf16_to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Round half to even; NaN stays NaN.
LC_INLINE bf16 float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Fills operands of a peak measurement with random values: bytes (INT8), else fp32 or bf16 numbers of either
// sign from 1 to 2. A processor that draws less power for zeros or for the same value again and again may run
// faster on them than on any model: tiles of zeros were multiplied 1.4 to 2.7 times as fast as random ones.
template <Format F>
LC_INLINE void random_operands(uint32_t* to, int count) {
  uint32_t x = 2463534242u;  // xorshift32
  for (int i = 0; i < count; ++i) {
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    if (F == Format::INT8)
      to[i] = x;
    else if (F == Format::F32)
      to[i] = (x & 0x807fffffu) | 0x3f800000u;
    else
      to[i] = (x & 0x807f807fu) | 0x3f803f80u;
  }
}

// The byte-coded formats that are widened to bf16 (FP8, INT8_WIDE) hold, in one 64-byte line, 4 k
// of 16 rows. Row r, k j stands at this byte: unpacking the low and high halves of each 128-bit
// lane then gives the bf16 lines of k 0..1 and k 2..3 without crossing lanes.
constexpr int wide_byte(int row, int j) { return (row / 4) * 16 + (j / 2) * 8 + (row % 4) * 2 + (j % 2); }

// Byte i of a 128-bit lane in that order, taken from a lane of [4][4] codes, row by row.
struct WideOrder {
  alignas(64) uint8_t from[64];
};
constexpr WideOrder make_wide_order() {
  WideOrder t{};
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < 4; ++j) t.from[wide_byte(r, j)] = static_cast<uint8_t>(r % 4 * 4 + j);
  return t;
}
constexpr WideOrder kWideOrder = make_wide_order();

// e4m3fn code (magnitude, 7 bits) to bf16 bits; subnormals and NaN included.
constexpr uint16_t fp8_magnitude_to_bf16(int mag) {
  if (mag == 0x7f) return 0x7fc0;
  if (mag >= 8) return static_cast<uint16_t>((mag << 4) + (120 << 7));
  constexpr uint16_t subnormal[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  return subnormal[mag];
}

struct Fp8Tables {
  alignas(64) uint16_t word[128];
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};
constexpr Fp8Tables make_fp8_tables() {
  Fp8Tables t{};
  for (int i = 0; i < 128; ++i) {
    t.word[i] = fp8_magnitude_to_bf16(i);
    t.low[i] = static_cast<uint8_t>(t.word[i] & 0xff);
    t.high[i] = static_cast<uint8_t>(t.word[i] >> 8);
  }
  return t;
}
constexpr Fp8Tables kFp8 = make_fp8_tables();

}  // namespace
