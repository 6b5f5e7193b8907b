// Packing, and the formats' quantizers: one op a format, so that a scale can neither be missing nor too many.
#include "ops/check.h"

namespace lc {
namespace {

// The destination: a packed weight of this format, written in place.
PackArgs destination(const Call& c, const Tensor& dst, const Desc& desc, Format f, int64_t item, int64_t part) {
  PackArgs a{};
  const Weight w = c.weight("dst", dst, desc, 1u << static_cast<int>(f), {.parts = kAny}, true);
  a.dst = const_cast<uint8_t*>(w.data);
  a.layout = w.layout;
  c.range("item", item, 0, a.layout.batch - 1);
  c.range("part", part, 0, a.layout.parts - 1);
  a.item = item;
  a.part = part;
  return a;
}

template <Format F, bool Run>
void pack_plain(const char* op, const Tensor& dst, const Desc& desc, int64_t item, int64_t part, const Tensor& w,
                DType dtype) {
  checked(op, Run, [&](const Call& c) {
    PackArgs a = destination(c, dst, desc, F, item, part);
    a.src = c.data<const uint8_t>("w", w, dtype, {a.layout.rows, a.layout.cols});
    c.launch(kernels().pack, a);
  });
}
template <bool Run>
void pack_f32(Tensor dst, Desc desc, int64_t item, int64_t part, Tensor w) {
  pack_plain<Format::F32, Run>("pack_f32", dst, desc, item, part, w, DType::Float);
}
LC_OP(pack_f32, "(Tensor(a!) dst, int[] dst_desc, int item, int part, Tensor w) -> ()")
template <bool Run>
void pack_bf16(Tensor dst, Desc desc, int64_t item, int64_t part, Tensor w) {
  pack_plain<Format::BF16, Run>("pack_bf16", dst, desc, item, part, w, DType::BFloat16);
}
LC_OP(pack_bf16, "(Tensor(a!) dst, int[] dst_desc, int item, int part, Tensor w) -> ()")

template <bool Run>
void pack_int8(Tensor dst, Desc desc, int64_t item, int64_t part, Tensor w, Tensor scale) {
  checked("pack_int8", Run, [&](const Call& c) {
    PackArgs a = destination(c, dst, desc, Format::INT8, item, part);
    a.src = c.data<const uint8_t>("w", w, DType::Char, {a.layout.rows, a.layout.cols});
    a.scale = c.vector("scale", scale, a.layout.rows);
    c.launch(kernels().pack, a);
  });
}
LC_OP(pack_int8, "(Tensor(a!) dst, int[] dst_desc, int item, int part, Tensor w, Tensor scale) -> ()")

template <bool Run>
void pack_fp8(Tensor dst, Desc desc, int64_t item, int64_t part, Tensor w, Tensor scale_inv) {
  checked("pack_fp8", Run, [&](const Call& c) {
    PackArgs a = destination(c, dst, desc, Format::FP8, item, part);
    a.src = c.data<const uint8_t>("w", w, DType::Float8_e4m3fn, {a.layout.rows, a.layout.cols});
    a.scale = c.data<const float>("scale_inv", scale_inv, DType::Float,
                                  {ceil_div(a.layout.rows, kFp8Block), ceil_div(a.layout.cols, kFp8Block)});
    c.launch(kernels().pack, a);
  });
}
LC_OP(pack_fp8, "(Tensor(a!) dst, int[] dst_desc, int item, int part, Tensor w, Tensor scale_inv) -> ()")

template <bool Run>
void pack_int8_wide(Tensor dst, Desc desc, int64_t item, Tensor w, Tensor row_scale, Tensor column_scale) {
  checked("pack_int8_wide", Run, [&](const Call& c) {
    PackArgs a = destination(c, dst, desc, Format::INT8_WIDE, item, 0);
    a.src = c.data<const uint8_t>("w", w, DType::Char, {a.layout.rows, a.layout.cols});
    a.scale = c.vector("row_scale", row_scale, a.layout.rows);
    a.column_scale = c.vector("column_scale", column_scale, a.layout.cols);
    c.launch(kernels().pack, a);
  });
}
LC_OP(pack_int8_wide,
      "(Tensor(a!) dst, int[] dst_desc, int item, Tensor w, Tensor row_scale, Tensor column_scale) -> ()")

// From bf16 to a format's codes and scales, by its exact quantizer.
template <bool Run>
void quantize_int8(Tensor w, Tensor codes, Tensor scale) {
  checked("quantize_int8", Run, [&](const Call& c) {
    const Call::View from = c.tensor("w", w, DType::BFloat16, {kAny, kAny});
    const int64_t rows = from.size(0), cols = from.size(1);
    QuantizeArgs a{static_cast<const uint16_t*>(from.data), rows, cols, nullptr, nullptr};
    a.codes = c.output<uint8_t>("codes", codes, DType::Char, {rows, cols});
    a.scale = c.output<float>("scale", scale, DType::Float, {rows});
    c.launch(kernels().quantize_int8, a);
  });
}
LC_OP(quantize_int8, "(Tensor w, Tensor(a!) codes, Tensor(b!) scale) -> ()")
template <bool Run>
void quantize_fp8(Tensor w, Tensor codes, Tensor scale_inv) {
  checked("quantize_fp8", Run, [&](const Call& c) {
    const Call::View from = c.tensor("w", w, DType::BFloat16, {kAny, kAny});
    const int64_t rows = from.size(0), cols = from.size(1);
    QuantizeArgs a{static_cast<const uint16_t*>(from.data), rows, cols, nullptr, nullptr};
    a.codes = c.output<uint8_t>("codes", codes, DType::Float8_e4m3fn, {rows, cols});
    a.scale = c.output<float>("scale_inv", scale_inv, DType::Float,
                              {ceil_div(rows, kFp8Block), ceil_div(cols, kFp8Block)});
    c.launch(kernels().quantize_fp8, a);
  });
}
LC_OP(quantize_fp8, "(Tensor w, Tensor(a!) codes, Tensor(b!) scale_inv) -> ()")

// Code x scale in fp32, rounded once to bf16.
template <bool Run>
void dequantize_int8(Tensor codes, Tensor scale, Tensor out) {
  checked("dequantize_int8", Run, [&](const Call& c) {
    const Call::View from = c.tensor("codes", codes, DType::Char, {kAny, kAny});
    const int64_t rows = from.size(0), cols = from.size(1);
    DequantizeArgs a{static_cast<const uint8_t*>(from.data), c.vector("scale", scale, rows), rows, cols, nullptr};
    a.out = c.output<uint16_t>("out", out, DType::BFloat16, {rows, cols});
    c.launch(kernels().dequantize_int8, a);
  });
}
LC_OP(dequantize_int8, "(Tensor codes, Tensor scale, Tensor(a!) out) -> ()")
template <bool Run>
void dequantize_fp8(Tensor codes, Tensor scale_inv, Tensor out) {
  checked("dequantize_fp8", Run, [&](const Call& c) {
    const Call::View from = c.tensor("codes", codes, DType::Float8_e4m3fn, {kAny, kAny});
    const int64_t rows = from.size(0), cols = from.size(1);
    DequantizeArgs a{static_cast<const uint8_t*>(from.data), nullptr, rows, cols, nullptr};
    a.scale = c.data<const float>("scale_inv", scale_inv, DType::Float,
                                  {ceil_div(rows, kFp8Block), ceil_div(cols, kFp8Block)});
    a.out = c.output<uint16_t>("out", out, DType::BFloat16, {rows, cols});
    c.launch(kernels().dequantize_fp8, a);
  });
}
LC_OP(dequantize_fp8, "(Tensor codes, Tensor scale_inv, Tensor(a!) out) -> ()")

// Writes the descriptor into fresh memory of the right size.
template <bool Run>
void init_packed(Tensor dst, Desc desc) {
  checked("init_packed", Run, [&](const Call& c) {
    const Layout l = c.layout("dst_desc", desc);
    auto* p = c.output<uint8_t>("dst", dst, DType::Byte, {l.bytes()});
    c.refuse_capture("dst");
    if (!c.runs()) return;
    Header h{};
    std::memcpy(h.magic, kPackMagic, 8);
    h.version = kPackVersion;
    h.format = static_cast<int32_t>(l.format);
    h.batch = l.batch;
    h.parts = l.parts;
    h.rows = l.rows;
    h.cols = l.cols;
    std::memset(p, 0, kHeaderBytes);
    std::memcpy(p, &h, sizeof h);
  });
}
LC_OP(init_packed, "(Tensor(a!) dst, int[] dst_desc) -> ()")

}  // namespace
}  // namespace lc
