#include "isa/amx.h"
#include "kernels/gemm_amx.inl.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_amx() { return make_table<Amx>(); }
}  // namespace lc
