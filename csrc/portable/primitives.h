/* portable/primitives.h: what the vector extension cannot say, in plain C. It defines the bits for every level. */
#ifndef DM_PORTABLE_PRIMITIVES_H
#define DM_PORTABLE_PRIMITIVES_H

/* DM_LANES doubles: two registers, which the compiler splits. */
typedef double f64_wide __attribute__((vector_size(8 * DM_LANES)));
typedef uint64_t u64_wide __attribute__((vector_size(8 * DM_LANES)));

/* a * b + c, rounded once. The product of two floats is exact in double; the sum is rounded to odd (its error is known
 * from Knuth's two-sum); rounding 53 odd-rounded bits to 24 is then correct. Source: Boldo and Melquiond 2008. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) {
    f64_wide product = __builtin_convertvector(a, f64_wide) * __builtin_convertvector(b, f64_wide);
    f64_wide addend = __builtin_convertvector(c, f64_wide);
    f64_wide sum = product + addend;
    f64_wide shadow = sum - product;
    f64_wide error = (product - (sum - shadow)) + (addend - shadow);
    /* step = 1 if the error is neither 0 nor NaN (which infinities leave in it) and the sum is even. Integer form,
     * because baseline compilers make scalar loops of comparisons this wide. */
    u64_wide size = (u64_wide)error & 0x7fffffffffffffff;
    u64_wide step = (((0 - size) & (size - 0x7ff0000000000000)) >> 63) & ~(u64_wide)sum;
    u64_wide away = ((u64_wide)sum ^ (u64_wide)error) >> 63;
    sum = (f64_wide)((u64_wide)sum + step - ((step & away) << 1));
    return __builtin_convertvector(sum, f32v);
}

/* float16 to float32, for finite values (nothing else is ever stored). */
DM_INLINE f32v widen_f16(const uint16_t *half) {
    u16_lanes narrow;
    __builtin_memcpy(&narrow, half, sizeof narrow);
    u32v bits = __builtin_convertvector(narrow, u32v);
    u32v sign = (bits & 0x8000) << 16;
    u32v magnitude = (bits & 0x7fff) << 13;
    u32v normal = magnitude + ((u32v){0} + (112u << 23));
    /* A denormal half is mantissa * 2^-24: put it behind the bits of 2^-14, then take 2^-14 away. */
    f32v denormal = (f32v)(magnitude + ((u32v){0} + (113u << 23))) - 0x1p-14f;
    u32v is_denormal = (u32v)((i32v)magnitude < (1 << 23));
    return (f32v)(sign | (normal & ~is_denormal) | ((u32v)denormal & is_denormal));
}

#endif
