// Chooses the row arithmetic for this machine's instruction set.
#include <ATen/Version.h>

#include "ops.h"

namespace opsd {

const RowMath& row_math() {
#if OPSD_X86
  static const std::string isa = at::get_cpu_capability();
  if (isa.rfind("AVX512", 0) == 0) return rows_avx512();
  if (isa == "AVX2") return rows_avx2();
#endif
  return rows_plain();
}

}  // namespace opsd
