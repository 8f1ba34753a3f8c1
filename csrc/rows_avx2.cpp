// The row arithmetic for AVX2.
#include "rows.h"

#if OPSD_X86
#pragma GCC target("avx2,fma")
#define OPSD_LANES 8
#define OPSD_STREAMS 1
#define OPSD_ISA isa_avx2
#define OPSD_TABLE rows_avx2
#include "rows_of.h"
#include "targets_of.h"

#include "gradients_of.h"
#endif
