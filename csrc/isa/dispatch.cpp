#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"
#include "kernels/kernels.h"

namespace lc {
namespace {

constexpr int kArchReqXcompPerm = 0x1023;
constexpr int kXfeatureXtiledata = 18;

unsigned long long xgetbv0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

CpuFeatures probe() {
  CpuFeatures f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const unsigned long long xcr0 = xgetbv0();
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
  const bool tiles = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const bool base512 = (b & (1u << 16)) && (b & (1u << 30)) && (b & (1u << 17)) && (b & (1u << 31));
  f.avx512 = f.avx2 && zmm && base512 && (c & (1u << 11));
  f.avx512_vbmi = f.avx512 && (c & (1u << 1));
  const bool amx_bits = (d & (1u << 24)) && (d & (1u << 25)) && (d & (1u << 22));
  unsigned a1, b1, c1, d1;
  if (__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) f.avx512_bf16 = f.avx512 && (a1 & (1u << 5));
  f.amx = f.avx512_bf16 && f.avx512_vbmi && amx_bits && tiles &&
          syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  return f;
}

Tier best() {
  const CpuFeatures& f = cpu_features();
  if (!f.avx2)
    throw std::runtime_error(
        "this CPU lacks AVX2, FMA or F16C, which latentcore needs (Intel Haswell or AMD Zen and "
        "newer have them)");
  return f.amx ? Tier::AMX : f.avx512 ? Tier::AVX512 : Tier::AVX2;
}

Tier parse(const std::string& name, const char* origin) {
  const Tier top = best();
  Tier t;
  if (name == "avx2")
    t = Tier::AVX2;
  else if (name == "avx512")
    t = Tier::AVX512;
  else if (name == "amx")
    t = Tier::AMX;
  else
    throw std::runtime_error(std::string(origin) + "=" + name + ": expected avx2, avx512 or amx");
  if (t > top)
    throw std::runtime_error(std::string(origin) + "=" + name + ": this CPU lacks it; the best tier here is " +
                             tier_name(top));
  return t;
}

Tier initial() {
  const char* forced = std::getenv("LATENTCORE_FORCE_ISA");
  return forced != nullptr && *forced != 0 ? parse(forced, "LATENTCORE_FORCE_ISA") : best();
}

Tier& current() {
  static Tier t = initial();
  return t;
}

// The features that pick a kernel table within a tier: the CPU's, or fewer for the tests' sake.
CpuFeatures& used() {
  static CpuFeatures f = cpu_features();
  return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures f = probe();
  return f;
}

Tier tier() { return current(); }

const char* tier_name(Tier t) { return t == Tier::AMX ? "amx" : t == Tier::AVX512 ? "avx512" : "avx2"; }

void force_tier(const std::string& name) {
  CpuFeatures f = cpu_features();
  const bool cascade = name == "avx512-cascadelake", ice = name == "avx512-icelake",
             cooper = name == "avx512-cooperlake";
  if (cascade || ice) f.avx512_bf16 = false;
  if (cascade || cooper) f.avx512_vbmi = false;
  current() = name.empty() ? initial() : parse(cascade || ice || cooper ? "avx512" : name, "tier");
  used() = f;
}

const KernelTable& kernels() {
  const CpuFeatures& f = used();
  switch (tier()) {
    case Tier::AMX: return kernels_amx();
    case Tier::AVX512:
      if (f.avx512_bf16) return f.avx512_vbmi ? kernels_avx512_bf16_vbmi() : kernels_avx512_bf16();
      return f.avx512_vbmi ? kernels_avx512_vbmi() : kernels_avx512();
    case Tier::AVX2: break;
  }
  return kernels_avx2();
}

}  // namespace lc
