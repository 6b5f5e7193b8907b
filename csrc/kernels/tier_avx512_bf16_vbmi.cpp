#include "isa/avx512.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_avx512_bf16_vbmi() { return make_table<Avx512<true, true>>(); }
}  // namespace lc
