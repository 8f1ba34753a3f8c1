// The row arithmetic for AVX-512.
#include "rows.h"

#if OPSD_X86
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define OPSD_LANES 16
#define OPSD_STREAMS 1
#define OPSD_ISA isa_avx512
#define OPSD_TABLE rows_avx512
#include "rows_of.h"
#include "targets_of.h"

#include "gradients_of.h"
#endif
