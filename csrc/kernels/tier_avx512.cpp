#include "isa/avx512.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_avx512() { return make_table<Avx512<false, false>>(); }
}  // namespace lc
