/* neoni8mm/level.c: AArch64 with int8 matrix products (Neoverse V1, N2, Cortex-X2 and later): integer matrices by
 * usmmla. */
#if defined(__aarch64__)
#define DM_LEVEL neoni8mm
#define DM_LANES 4

#include <arm_neon.h>

#include "../formats.h"
#include "../kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
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
#include "../neondot/int_pairs.h"
#include "dot_lane.h"
#include "../neondot/dot_tile.h"
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
