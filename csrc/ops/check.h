// Entry checks: what every op does with its arguments before a kernel sees them. The same function
// serves the CPU and the Meta implementation, so that they cannot drift.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/args.h"
#include "kernels/kernels.h"
#include "runtime/graph.h"

namespace lc {

using torch::stable::Tensor;
using DType = torch::headeronly::ScalarType;
using Desc = std::vector<int64_t>;

constexpr int64_t kAny = -1;

// Thrown by the Meta implementation when shapes are symbolic: there is nothing to compare yet.
struct SymbolicShape {};

// The formats that an argument may have.
enum FormatSet : unsigned {
  kLinearFormats = 1u << int(Format::BF16) | 1u << int(Format::INT8) | 1u << int(Format::FP8),
  kRouterFormats = 1u << int(Format::BF16) | 1u << int(Format::F32),
  kHeadFormats = 1u << int(Format::BF16) | 1u << int(Format::INT8_WIDE),
  kAllFormats = 0x3e,
};

struct WeightShape {
  int64_t batch = kAny, parts = 1, rows = kAny, cols = kAny;
};

// The checks of one call.
class Call {
 public:
  Call(const char* op, bool run) : op_(op), run_(run) {}

  // A contiguous tensor of this dtype and shape that is read; kAny matches any size.
  struct View {
    void* data;
    const int64_t* sizes;
    int64_t size(int i) const { return sizes[i]; }
  };
  View tensor(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const {
    return view(name, t, dtype, shape, false);
  }
  template <class T>
  T* data(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const {
    return static_cast<T*>(view(name, t, dtype, shape, false).data);
  }
  // One that is written: its memory may not overlap any other argument's.
  View target(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const {
    return view(name, t, dtype, shape, true);
  }
  template <class T>
  T* output(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const {
    return static_cast<T*>(view(name, t, dtype, shape, true).data);
  }
  // A float vector of this length.
  const float* vector(const char* name, const Tensor& t, int64_t n) const {
    return data<const float>(name, t, DType::Float, {n});
  }
  Weight weight(const char* name, const Tensor& t, const Desc& desc, unsigned formats, const WeightShape& shape,
                bool written = false) const;
  // A descriptor's layout, once its numbers are sane.
  Layout layout(const char* name, const Desc& desc) const;
  Cache cache(const char* name, const Tensor& t, bool written) const;
  // Where n rows of a batch stand. In eager execution every position must lie below `max_position` and
  // within its sequence's table, and the blocks that are read, the last alone or all up to it, must be
  // blocks of the cache.
  enum class Blocks { Last, All };
  Places places(const Tensor& positions, const Tensor& row_seq, const Tensor& tables, int64_t n,
                const Cache& cache, int64_t max_position, Blocks blocks) const;
  // In eager execution every one of `count` values lies in low..high; `per_row` of them make a row.
  void contents(const char* name, const int32_t* values, int64_t count, int64_t per_row, int64_t low,
                int64_t high) const;
  void positive(const char* name, double v) const;
  void range(const char* name, int64_t v, int64_t low, int64_t high) const;

  bool runs() const { return run_; }
  // Whether contents can be checked now: in a capture they are not there yet, and are checked as
  // load_step copies them in.
  bool eager() const { return run_ && Graph::recording() == nullptr; }
  // For ops that run at once: refuses a capture, on tensors without data too.
  void refuse_capture(const char* name) const;
  template <class Args>
  void launch(const Kernel& kernel, const Args& args) const {
    if (!run_) return;
    apart();
    lc::launch(kernel, args);
  }
  // Fails if a written argument shares memory with another one.
  void apart() const;
  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& found) const;

 private:
  View view(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape,
            bool written) const;
  void bad_content(const char* name, int64_t row, int64_t low, int64_t high, int64_t found) const;

  struct Region {
    const char* name;
    uintptr_t begin, end;
    bool written;
  };
  static constexpr int kMaxRegions = 24;
  const char* op_;
  bool run_;
  mutable int regions_ = 0;
  mutable Region region_[kMaxRegions];
};

// Registers op<run> for tensors with data and op<check only> for tensors without.
#define LC_OP(name, schema)                                                                \
  STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) { m.def(#name schema); }                    \
  STABLE_TORCH_LIBRARY_IMPL(latentcore, CPU, m) { m.impl(#name, TORCH_BOX(&name<true>)); } \
  STABLE_TORCH_LIBRARY_IMPL(latentcore, Meta, m) { m.impl(#name, TORCH_BOX(&name<false>)); }

// Opens an op's body: defines `call`, and lets symbolic shapes pass on Meta.
template <class Body>
void checked(const char* op, bool run, const Body& body) {
  const Call call(op, run);
  try {
    body(call);
  } catch (const SymbolicShape&) {
  }
}

}  // namespace lc
