// The row arithmetic for any machine.
#include "rows.h"

#define OPSD_LANES 4
#define OPSD_ISA isa_plain
#define OPSD_TABLE rows_plain
#include "rows_of.h"
#include "targets_of.h"

#include "gradients_of.h"
