// Arithmetic peaks, measured in registers.
#pragma once

#include "kernels/math.inl.h"

namespace {

template <class Isa>
void peak(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const PeakArgs*>(p);
  int64_t& ops = a.ops[ctx.tid * 8];
  switch (a.format) {
    case Format::INT8: ops = Isa::template peak_round<Format::INT8>(a.iters); break;
    case Format::F32: ops = Isa::template peak_round<Format::F32>(a.iters); break;
    default: ops = Isa::template peak_round<Format::BF16>(a.iters);
  }
}

}  // namespace
