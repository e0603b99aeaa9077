/* avx512/level.c: x86-64 with 16 lanes: AVX-512 F, BW, VL and DQ (Skylake-X, Zen 4 and later). */
#if defined(__x86_64__)
#define DM_LEVEL avx512
#define DM_LANES 16

#include <immintrin.h>

#include "../formats.h"
#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif

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
#include "../x86/weights.h"
#include "../x86/keep_weights.h"
#include "dot.h"
#include "../x86/dot_pairs.h"
#include "../x86/matmul_int.h"
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
