/* portable/level.c: plain C for the compiler's base instruction set. It defines the bits (NUMERICS). */
#define DM_LEVEL portable
#define DM_LANES 4

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
#include "../portable/matmul_int.h"
#include "../portable/rope.h"
#include "../portable/kv_store.h"
#include "../portable/attention.h"
#include "../portable/route.h"
#include "../portable/vocabulary.h"
#include "../table.h"
