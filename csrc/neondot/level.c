/* neondot/level.c: AArch64 with dot products (Neoverse N1, Cortex-A76 and later): integer matrices by sdot. */
#if defined(__aarch64__)
#define DM_LEVEL neondot
#define DM_LANES 4

#include <arm_neon.h>

#include "../formats.h"
#include "../kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "../vector_types.h"
#include "../neon/primitives.h"
#include "../lanes.h"
#include "../portable/half.h"
#include "../portable/pack.h"
#include "../portable/embed.h"
#include "../portable/rmsnorm.h"
#include "../portable/quantize.h"
#include "../portable/fixed_point.h"
#include "../portable/silu.h"
#include "../portable/matmul_float.h"
#include "int_pairs.h"
#include "dot_lane.h"
#include "dot_tile.h"
#include "matmul_int.h"
#include "../portable/rope.h"
#include "../portable/kv_store.h"
#include "../portable/attention.h"
#include "../portable/route.h"
#include "../portable/vocabulary.h"
#include "int8_peak.h"
#include "../table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
