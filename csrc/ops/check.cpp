#include "ops/check.h"

#include <cstring>
#include <stdexcept>

namespace lc {
namespace {

const char* dtype_name(DType t) {
  switch (t) {
    case DType::Byte: return "uint8";
    case DType::Char: return "int8";
    case DType::Int: return "int32";
    case DType::Long: return "int64";
    case DType::Float: return "float32";
    case DType::Double: return "float64";
    case DType::Half: return "float16";
    case DType::BFloat16: return "bfloat16";
    case DType::Bool: return "bool";
    case DType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return "another dtype";
  }
}

uintptr_t dtype_bytes(DType t) {
  switch (t) {
    case DType::Int:
    case DType::Float: return 4;
    case DType::BFloat16: return 2;
    case DType::Long:
    case DType::Double: return 8;
    default: return 1;
  }
}

std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::string s = "[";
  for (int64_t i = 0; i < rank; ++i) {
    if (i) s += ", ";
    s += sizes[i] == kAny ? "any" : std::to_string(sizes[i]);
  }
  return s + "]";
}

std::string layout_text(const Layout& l) {
  return std::string(format_name(l.format)) + " batch " + std::to_string(l.batch) + ", parts " +
         std::to_string(l.parts) + ", rows " + std::to_string(l.rows) + ", cols " + std::to_string(l.cols);
}

}  // namespace

void Call::fail(const char* name, const std::string& expected, const std::string& found) const {
  throw std::runtime_error(std::string("latentcore::") + op_ + ": argument '" + name + "': expected " + expected +
                           ", found " + found);
}

Call::View Call::view(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape,
                      bool written) const {
  if (!t.defined()) fail(name, "a tensor", "none");
  const AtenTensorHandle h = t.get();
  int32_t device = 0;
  aoti_torch_get_device_type(h, &device);
  // One meta tensor among real ones selects the Meta implementation, which would do nothing.
  if (device != (run_ ? aoti_torch_device_type_cpu() : aoti_torch_device_type_meta()))
    fail(name, run_ ? "a CPU tensor" : "a meta tensor like the others", "one on another device");
  int64_t rank = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_dim(h, &rank) != 0) fail(name, "a dense tensor", "one without dimensions");
  if (aoti_torch_get_sizes(h, &sizes) != 0 || aoti_torch_get_strides(h, &strides) != 0) {
    if (!run_) throw SymbolicShape{};
    fail(name, "a dense tensor", "one without sizes or strides");
  }
  const DType found = t.scalar_type();
  const auto expected = [&] {
    return std::string(dtype_name(dtype)) + " " + shape_text(shape.begin(), static_cast<int64_t>(shape.size()));
  };
  const auto actual = [&] { return std::string(dtype_name(found)) + " " + shape_text(sizes, rank); };
  bool ok = found == dtype && rank == static_cast<int64_t>(shape.size());
  if (ok) {
    int64_t i = 0;
    for (const int64_t want : shape) {
      if (want != kAny && want != sizes[i]) ok = false;
      ++i;
    }
  }
  if (!ok) fail(name, expected(), actual());
  int64_t count = 1;
  for (int64_t i = 0; i < rank; ++i) count *= sizes[i];
  int64_t step = 1;
  for (int64_t i = rank - 1; i >= 0 && count != 0; --i) {
    if (sizes[i] != 1 && strides[i] != step)
      fail(name, expected() + " contiguous", "strides " + shape_text(strides, rank));
    step *= sizes[i];
  }
  if (!run_) return {nullptr, sizes};
  void* data = nullptr;
  if (aoti_torch_get_data_ptr(h, &data) != 0) fail(name, "a tensor with memory", "none");
  if (count == 0) return {data, sizes};
  if (data == nullptr) fail(name, "a tensor with memory", "none");
  if (regions_ == kMaxRegions) fail(name, "at most 24 tensors", "more");
  const auto begin = reinterpret_cast<uintptr_t>(data);
  region_[regions_++] = {name, begin, begin + static_cast<uintptr_t>(count) * dtype_bytes(dtype), written};
  return {data, sizes};
}

void Call::apart() const {
  for (int i = 0; i < regions_; ++i) {
    if (!region_[i].written) continue;
    for (int j = 0; j < regions_; ++j)
      if (i != j && region_[i].begin < region_[j].end && region_[j].begin < region_[i].end)
        fail(region_[i].name, std::string("memory apart from '") + region_[j].name + "'",
             "memory that overlaps it");
  }
}

void Call::refuse_capture(const char* name) const {
  if (Graph::recording() != nullptr) fail(name, "eager execution: this op cannot be captured", "a capture");
}

void Call::bad_content(const char* name, int64_t row, int64_t low, int64_t high, int64_t found) const {
  fail(name, std::to_string(low) + ".." + std::to_string(high) + " at row " + std::to_string(row),
       std::to_string(found));
}

void Call::contents(const char* name, const int32_t* values, int64_t count, int64_t per_row, int64_t low,
                    int64_t high) const {
  if (!eager()) return;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < low || values[i] > high) bad_content(name, i / per_row, low, high, values[i]);
}

Layout Call::layout(const char* name, const Desc& desc) const {
  if (desc.size() != 5)
    fail(name, "a descriptor [format, batch, parts, rows, cols]", std::to_string(desc.size()) + " numbers");
  if (!is_format(desc[0])) fail(name, "a packed format in 1..5", "format " + std::to_string(desc[0]));
  const Layout l{static_cast<Format>(desc[0]), desc[1], desc[2], desc[3], desc[4]};
  constexpr int64_t kMax = int64_t{1} << 31;
  for (int i = 1; i < 5; ++i)
    if (desc[i] < 1 || desc[i] > (i == 2 ? 2 : kMax))
      fail(name, "sizes in 1..2^31 and parts in 1..2", layout_text(l));
  // Beyond, a row's compensation (128 times the sum of its weights) would not fit its 32 bits.
  if (l.format == Format::INT8 && l.cols >= 1 << 17) fail(name, "at most 131071 columns in INT8", layout_text(l));
  // Sizes whose product cannot be a real weight are refused before they are multiplied.
  if (double(l.batch) * double(l.panels()) * double(l.panel_stride()) > 1e15)
    fail(name, "a weight below 10^15 bytes", layout_text(l));
  return l;
}

Weight Call::weight(const char* name, const Tensor& t, const Desc& desc, unsigned formats, const WeightShape& want,
                    bool written) const {
  const Layout l = layout(name, desc);
  if (!(formats >> desc[0] & 1u)) {
    std::string names;
    for (int f = 1; f <= 5; ++f)
      if (formats >> f & 1u) names += (names.empty() ? "" : " or ") + std::string(format_name(Format(f)));
    fail(name, "format " + names, format_name(l.format));
  }
  const auto differs = [](int64_t w, int64_t v) { return w != kAny && w != v; };
  if (differs(want.batch, l.batch) || differs(want.parts, l.parts) || differs(want.rows, l.rows) ||
      differs(want.cols, l.cols)) {
    const int64_t w[4] = {want.batch, want.parts, want.rows, want.cols};
    fail(name, "[batch, parts, rows, cols] = " + shape_text(w, 4), layout_text(l));
  }
  const View v = view(name, t, DType::Byte, {l.bytes()}, written);
  if (run_) {
    if (reinterpret_cast<uintptr_t>(v.data) % 64 != 0)
      fail(name, "memory aligned to 64 bytes",
           "address ending in " + std::to_string(reinterpret_cast<uintptr_t>(v.data) % 64));
    const Header& h = *static_cast<const Header*>(v.data);
    if (std::memcmp(h.magic, kPackMagic, 8) != 0 || h.version != kPackVersion)
      fail(name, "a packed weight of version " + std::to_string(kPackVersion), "bytes with another header");
    const Layout found{static_cast<Format>(h.format), h.batch, h.parts, h.rows, h.cols};
    if (h.format != desc[0] || h.batch != l.batch || h.parts != l.parts || h.rows != l.rows || h.cols != l.cols)
      fail(name, layout_text(l) + " as its descriptor says",
           is_format(h.format) ? layout_text(found) + " in its header" : "another header");
  }
  return {static_cast<const uint8_t*>(v.data), l};
}

Cache Call::cache(const char* name, const Tensor& t, bool written) const {
  const View v = view(name, t, DType::BFloat16, {kAny, kAny, kAny}, written);
  if (v.size(1) < 1 || v.size(2) % 32 != 0 || v.size(2) < 32)
    fail(name, "[blocks, block_size, a multiple of 32]", shape_text(v.sizes, 3));
  return {static_cast<uint16_t*>(v.data), v.size(0), v.size(1), v.size(2)};
}

Places Call::places(const Tensor& positions, const Tensor& row_seq, const Tensor& tables, int64_t n,
                    const Cache& cache, int64_t max_position, Blocks blocks) const {
  Places p;
  p.positions = data<const int32_t>("positions", positions, DType::Int, {n});
  p.row_seq = data<const int32_t>("row_seq", row_seq, DType::Int, {n});
  const View t = tensor("block_tables", tables, DType::Int, {kAny, kAny});
  p.block_tables = static_cast<const int32_t*>(t.data);
  p.table_width = t.size(1);
  if (!eager()) return p;
  const int64_t sequences = t.size(0), reach = t.size(1) * cache.block_size;
  const int64_t top = (max_position < reach ? max_position : reach) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t pos = p.positions[i], seq = p.row_seq[i];
    if (pos < 0 || pos > top) bad_content("positions", i, 0, top, pos);
    if (seq < 0 || seq >= sequences) bad_content("row_seq", i, 0, sequences - 1, seq);
    const int32_t* row = p.block_tables + seq * t.size(1);
    const int64_t last = pos / cache.block_size;
    for (int64_t b = blocks == Blocks::All ? 0 : last; b <= last; ++b)
      if (row[b] < 0 || row[b] >= cache.blocks) bad_content("block_tables", seq, 0, cache.blocks - 1, row[b]);
  }
  return p;
}

void Call::positive(const char* name, double v) const {
  if (!(v > 0.0) || v > 1e30) fail(name, "a positive number", std::to_string(v));
}

void Call::range(const char* name, int64_t v, int64_t low, int64_t high) const {
  if (v < low || v > high) fail(name, std::to_string(low) + ".." + std::to_string(high), std::to_string(v));
}

}  // namespace lc
