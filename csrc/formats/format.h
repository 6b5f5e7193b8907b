// Packed weight formats: how a matrix lies in memory, independent of the instruction set.
//
// A packed weight is `batch` stacked matrices (experts, heads; 1 for a plain linear), each made of
// `parts` equal parts of `rows` rows (2 for gate and up, whose panels alternate) by `cols` columns.
// Rows lie in panels of 16. Inside a panel K runs slowest, so one 64-byte line holds all 16 rows
// for 4 consecutive k (one byte codes), 2 (bf16) or 1 (fp32). What belongs to a panel's rows
// (scales, compensation) follows the panel's lines, so a thread streams one contiguous range.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lc {

enum class Format : int32_t { F32 = 1, BF16 = 2, INT8 = 3, FP8 = 4, INT8_WIDE = 5 };

constexpr int kPanelRows = 16;
constexpr int kFp8Block = 128;
constexpr int64_t kHeaderBytes = 256;
// Raised with every change of the bytes: packs on disk are found by it.
constexpr uint32_t kPackVersion = 1;
constexpr char kPackMagic[8] = {'L', 'C', 'P', 'A', 'C', 'K', 'E', 'D'};

constexpr int64_t round_up(int64_t v, int64_t m) { return (v + m - 1) / m * m; }
constexpr int64_t ceil_div(int64_t v, int64_t m) { return (v + m - 1) / m; }

constexpr bool is_format(int64_t f) { return f >= 1 && f <= 5; }

constexpr const char* format_name(Format f) {
  switch (f) {
    case Format::F32: return "F32";
    case Format::BF16: return "BF16";
    case Format::INT8: return "INT8";
    case Format::FP8: return "FP8";
    case Format::INT8_WIDE: return "INT8_WIDE";
  }
  return "?";
}

// K is padded with zeros to this multiple: one 64-byte block of activations a row.
constexpr int64_t k_multiple(Format f) { return f == Format::INT8 ? 64 : f == Format::F32 ? 16 : 32; }
// k values in one 64-byte line of a panel.
constexpr int k_per_line(Format f) { return f == Format::F32 ? 1 : f == Format::BF16 ? 2 : 4; }
// Bytes after a panel's lines. INT8: fp32 scale[16], int32 compensation[16]. FP8: fp32 scale per
// 128 k. INT8_WIDE: fp32 scale[16].
constexpr int64_t panel_tail(Format f, int64_t cols) {
  switch (f) {
    case Format::INT8: return 128;
    case Format::FP8: return round_up(4 * ceil_div(cols, kFp8Block), 64);
    case Format::INT8_WIDE: return 64;
    default: return 0;
  }
}

struct Layout {
  Format format;
  int64_t batch, parts, rows, cols;

  constexpr int64_t k_padded() const { return round_up(cols, k_multiple(format)); }
  constexpr int64_t row_panels() const { return ceil_div(rows, kPanelRows); }
  constexpr int64_t panels() const { return parts * row_panels(); }
  constexpr int64_t lines() const { return k_padded() / k_per_line(format); }
  constexpr int64_t panel_stride() const { return lines() * 64 + panel_tail(format, cols); }
  // INT8_WIDE keeps a scale along K (fp32 [cols]) behind the panels of each matrix.
  constexpr int64_t column_scale_offset() const { return panels() * panel_stride(); }
  constexpr int64_t item_stride() const {
    const int64_t tail = format == Format::INT8_WIDE ? round_up(4 * k_padded(), 64) : 0;
    return column_scale_offset() + tail;
  }
  constexpr int64_t bytes() const { return kHeaderBytes + batch * item_stride(); }
};

// First bytes of every packed weight.
struct Header {
  char magic[8];
  uint32_t version;
  int32_t format;
  int64_t batch, parts, rows, cols;
};
static_assert(sizeof(Header) <= static_cast<size_t>(kHeaderBytes));

}  // namespace lc
