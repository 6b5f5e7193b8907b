// The kernels of each tier.
#pragma once

#include "runtime/team.h"

namespace lc {

struct KernelTable {
  Kernel linear, embedding, rms_norm, add_rms_norm, mla_input, mla_decode, mla_prefill, mlp, route, moe, heads,
      peak, pack, quantize_int8, quantize_fp8, dequantize_int8, dequantize_fp8, restrict_tokens, add_bias,
      penalize, sample, greedy, logprobs;
};

const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512_vbmi();
const KernelTable& kernels_avx512_bf16();
const KernelTable& kernels_avx512_bf16_vbmi();
const KernelTable& kernels_amx();
// The table of the tier in use.
const KernelTable& kernels();

}  // namespace lc
