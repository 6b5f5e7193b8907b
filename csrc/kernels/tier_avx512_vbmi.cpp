#include "isa/avx512.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_avx512_vbmi() { return make_table<Avx512<false, true>>(); }
}  // namespace lc
