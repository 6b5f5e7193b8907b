// The kernel table of one instruction set: included by each tier's translation unit.
#pragma once

#include "kernels/kernels.h"
#include "kernels/mla.inl.h"
#include "kernels/moe.inl.h"
#include "kernels/pack.inl.h"
#include "kernels/peak.inl.h"
#include "kernels/quantize.inl.h"
#include "kernels/sampling.inl.h"

namespace {

template <class Isa, KernelFn Run>
void entered(const Ctx& ctx, const void* args) {
  Isa::enter();
  Run(ctx, args);
}

template <class Isa>
const KernelTable& make_table() {
  static const KernelTable table = {
      .linear = {"linear", entered<Isa, linear<Isa>>, scratch_of<LinearPlan<Isa>, LinearArgs>},
      .embedding = {"embedding", embedding, no_scratch},
      .rms_norm = {"rms_norm", norm<false>, scratch_of<NormPlan, NormArgs>},
      .add_rms_norm = {"add_rms_norm", norm<true>, scratch_of<NormPlan, NormArgs>},
      .mla_input = {"mla_input", entered<Isa, mla_input<Isa>>, scratch_of<MlaInputPlan<Isa>, MlaInputArgs>},
      .mla_decode = {"mla_decode", entered<Isa, mla_decode<Isa>>, scratch_of<MlaDecodePlan<Isa>, MlaDecodeArgs>},
      .mla_prefill = {"mla_prefill", entered<Isa, mla_prefill<Isa>>,
                      scratch_of<MlaPrefillPlan<Isa>, MlaPrefillArgs>},
      .mlp = {"mlp", entered<Isa, mlp<Isa>>, scratch_of<MlpPlan<Isa>, MlpArgs>},
      .route = {"route", entered<Isa, route<Isa>>, scratch_of<RoutePlan<Isa>, RouteArgs>},
      .moe = {"moe", entered<Isa, moe<Isa>>, moe_scratch<Isa>},
      .heads = {"heads", entered<Isa, heads<Isa>>, scratch_of<HeadsPlan<Isa>, HeadsArgs>},
      .peak = {"peak", entered<Isa, peak<Isa>>, no_scratch},
      .pack = {"pack", pack, no_scratch},
      .quantize_int8 = {"quantize_int8", quantize_int8, no_scratch},
      .quantize_fp8 = {"quantize_fp8", quantize_fp8, no_scratch},
      .dequantize_int8 = {"dequantize_int8", dequantize_int8, no_scratch},
      .dequantize_fp8 = {"dequantize_fp8", dequantize_fp8, no_scratch},
      .restrict_tokens = {"restrict", restrict_tokens, no_scratch},
      .add_bias = {"add_bias", add_bias, no_scratch},
      .penalize = {"penalize", penalize, scratch_of<PenalizePlan, PenalizeArgs>},
      .sample = {"sample", sample, scratch_of<SamplePlan, SampleArgs>},
      .greedy = {"greedy", greedy, scratch_of<GreedyPlan, GreedyArgs>},
      .logprobs = {"logprobs", logprobs, no_scratch},
  };
  return table;
}

}  // namespace
