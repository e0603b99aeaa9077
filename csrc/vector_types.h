/* vector_types.h: the vectors of one ISA level. A level defines DM_LANES (32-bit lanes of its registers) first.
 *
 * Sixteen lanes, the width that the numerics contract speaks of, are DM_PARTS registers. All arithmetic on these types
 * is the compiler's own vector extension (GCC >= 9, Clang): one IEEE operation per element and no contraction.
 */
#ifndef DM_VECTOR_TYPES_H
#define DM_VECTOR_TYPES_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__FAST_MATH__)
#error "dist-moe promises the same bits everywhere: build it without -ffast-math"
#endif
#if !defined(__FLT_EVAL_METHOD__) || __FLT_EVAL_METHOD__ != 0
#error "dist-moe needs float arithmetic in float precision (x87 and 32-bit x86 are not supported)"
#endif
#if defined(__arm__)
#error "dist-moe needs AArch64: 32-bit ARM flushes denormals"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "dist-moe's packed formats are little-endian"
#endif

#define DM_INLINE static inline __attribute__((always_inline))
#define DM_PARTS (16 / DM_LANES)

/* Every function that takes a vector is inlined, so its ABI does not matter. */
#pragma GCC diagnostic ignored "-Wpsabi"

typedef float f32v __attribute__((vector_size(4 * DM_LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * DM_LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * DM_LANES)));
typedef int16_t i16v __attribute__((vector_size(4 * DM_LANES)));
typedef uint16_t u16v __attribute__((vector_size(4 * DM_LANES)));

/* A register of 64-bit elements, and as many floats. */
typedef double f64v __attribute__((vector_size(4 * DM_LANES)));
typedef uint64_t u64v __attribute__((vector_size(4 * DM_LANES)));
typedef float f32_half __attribute__((vector_size(2 * DM_LANES)));

/* DM_LANES narrow elements. */
typedef uint16_t u16_lanes __attribute__((vector_size(2 * DM_LANES)));
typedef int16_t i16_lanes __attribute__((vector_size(2 * DM_LANES)));
typedef int8_t i8_lanes __attribute__((vector_size(DM_LANES)));

#endif
