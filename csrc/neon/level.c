/* neon/level.c: AArch64, whose base instruction set has fma and float16 conversion. */
#if defined(__aarch64__)
#define DM_LEVEL neon
#define DM_LANES 4

#include <arm_neon.h>

#include "../formats.h"
#include "../kernels.h"
#include "../vector_types.h"
#include "primitives.h"
#include "../lanes.h"
#include "../portable/half.h"
#include "../portable/pack.h"
#include "../portable/embed.h"
#include "../portable/rmsnorm.h"
#include "../portable/quantize.h"
#include "../portable/fixed_point.h"
#include "../portable/silu.h"
#include "../portable/matmul_float.h"
#include "../portable/int_pairs.h"
#include "../portable/matmul_int.h"
#include "../portable/rope.h"
#include "../portable/kv_store.h"
#include "../portable/attention.h"
#include "../portable/route.h"
#include "../portable/vocabulary.h"
#include "../table.h"
#endif
