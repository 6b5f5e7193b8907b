#include "isa/avx512.h"
#include "kernels/table.inl.h"

namespace lc {
const KernelTable& kernels_avx512_bf16() { return make_table<Avx512<true, false>>(); }
}  // namespace lc
