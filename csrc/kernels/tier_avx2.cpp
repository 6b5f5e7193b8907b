#include "isa/avx2.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_avx2() { return make_table<Avx2>(); }
}  // namespace lc
