/* amx/level.c: AVX-512 with VNNI and AMX tiles (Sapphire Rapids and later): integer matrices by tdpbssd. */
#include "permission.h"

#if defined(DM_BUILDS_AMX)
#define DM_LEVEL amx
#define DM_LANES 16

#include <immintrin.h>

#include "../formats.h"
#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                      \
    __attribute__((                                                                                                \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni,amx-tile,amx-int8,prefer-vector-width=512")
#endif

#include "../vector_types.h"
#include "../avx512/primitives.h"
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
#include "../x86/weights.h"
#include "../x86/keep_weights.h"
#include "../avx512vnni/dot.h"
#include "../x86/dot_vnni.h"
#include "matmul_int.h"
#include "../portable/rope.h"
#include "../portable/kv_store.h"
#include "../portable/row_products.h"
#include "../x86/key_dots_vnni.h"
#include "../portable/attention.h"
#include "../portable/route.h"
#include "../portable/vocabulary.h"
#include "int8_peak.h"
#include "../table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
