// Which instruction sets this machine offers and which one is used.
#pragma once

#include <string>

namespace lc {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA, F16C
  bool avx512 = false;       // F, BW, DQ, VL, VNNI
  bool avx512_bf16 = false;
  bool avx512_vbmi = false;
  bool amx = false;          // tile, int8, bf16, and the operating system's permission
};

enum class Tier { AVX2, AVX512, AMX };

const CpuFeatures& cpu_features();
// The tier in use: the best one, or LATENTCORE_FORCE_ISA. Throws std::runtime_error where the CPU
// lacks AVX2 or the forced tier.
Tier tier();
const char* tier_name(Tier t);
// Changes the tier for the tests' sake; throws where the CPU lacks it. "" returns to the default.
// avx512-cascadelake, avx512-icelake and avx512-cooperlake are the avx512 tier without BF16 and VBMI,
// without BF16, and without VBMI.
void force_tier(const std::string& name);

}  // namespace lc
