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

  // A contiguous tensor of this dtype and shape; kAny matches any size.
  struct View {
    void* data;
    const int64_t* sizes;
    int64_t size(int i) const { return sizes[i]; }
  };
  View tensor(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const;
  template <class T>
  T* data(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> shape) const {
    return static_cast<T*>(tensor(name, t, dtype, shape).data);
  }
  // A float vector of this length.
  const float* vector(const char* name, const Tensor& t, int64_t n) const {
    return data<const float>(name, t, DType::Float, {n});
  }
  Weight weight(const char* name, const Tensor& t, const Desc& desc, unsigned formats,
                const WeightShape& shape) const;
  Cache cache(const char* name, const Tensor& t) const;
  Places places(const Tensor& positions, const Tensor& row_seq, const Tensor& tables, int64_t n) const;
  void positive(const char* name, double v) const;
  void range(const char* name, int64_t v, int64_t low, int64_t high) const;
  void disjoint(const char* a, const void* pa, const char* b, const void* pb) const;

  bool runs() const { return run_; }
  template <class Args>
  void launch(const Kernel& kernel, const Args& args) const {
    if (run_) lc::launch(kernel, args);
  }
  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& found) const;

 private:
  const char* op_;
  bool run_;
};

// Registers op<run> for tensors with data and op<check only> for tensors without.
#define LC_OP(name, schema)                                                          \
  STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) { m.def(#name schema); }               \
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
