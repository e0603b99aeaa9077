/* dot_pairs.h: byte dot products without VNNI: products of unsigned nibbles and signed activations, added in int16.
 *
 * Bounds: a lane adds the pairs of eight steps, 8 * 2 * 15 * 127 = 30480, which int16 holds. A q8 byte is its high
 * nibble times 16 plus its low one: two such sums.
 */
#ifndef DM_X86_DOT_PAIRS_H
#define DM_X86_DOT_PAIRS_H

/* sum + weights * x, here and now: compilers would rather keep all products, far more than there are registers. */
DM_INLINE i16v add_product(i16v sum, i32v weights, i32v x) {
    sum += multiply_bytes(weights, x);
    __asm__("" : "+v"(sum));
    return sum;
}

DM_INLINE void dot_nibbles(i32v *dot, const group_weights *weights, const int8_t *q, const int32_t *start, size_t n,
                           size_t registers) {
    i16v sum[DOT_REGISTERS];
    for (size_t i = 0; i < n * registers; i++) sum[i] = (i16v){0};
    for (size_t j = 0; j < 8; j++) {
        i32v weight[DM_STRIP_ONE];
        for (size_t r = 0; r < registers; r++) weight[r] = four_weights(&weights[r], j, DM_Q4);
        for (size_t i = 0; i < n; i++) {
            i32v x = four_activations(q + DM_GROUP * i + 4 * j);
            for (size_t r = 0; r < registers; r++)
                sum[i * registers + r] = add_product(sum[i * registers + r], weight[r], x);
        }
    }
    for (size_t i = 0; i < n * registers; i++) dot[i] = all_i32(start[i / registers]) + add_pairs(sum[i], 1);
}

DM_INLINE void dot_bytes_by_nibbles(i32v *dot, const group_weights *weights, const int8_t *q, const int32_t *start,
                                    size_t n, size_t registers) {
    i16v low_sum[DOT_REGISTERS], high_sum[DOT_REGISTERS];
    for (size_t i = 0; i < n * registers; i++) low_sum[i] = high_sum[i] = (i16v){0};
    for (size_t j = 0; j < 8; j++) {
        i32v low[DM_STRIP_ONE], high[DM_STRIP_ONE];
        for (size_t r = 0; r < registers; r++) {
            i32v weight = four_weights(&weights[r], j, DM_Q8);
            low[r] = weight & 0x0f0f0f0f;
            high[r] = (i32v)((u32v)weight >> 4) & 0x0f0f0f0f;
        }
        for (size_t i = 0; i < n; i++) {
            i32v x = four_activations(q + DM_GROUP * i + 4 * j);
            for (size_t r = 0; r < registers; r++) {
                low_sum[i * registers + r] = add_product(low_sum[i * registers + r], low[r], x);
                high_sum[i * registers + r] = add_product(high_sum[i * registers + r], high[r], x);
            }
        }
    }
    for (size_t i = 0; i < n * registers; i++) {
        dot[i] = all_i32(start[i / registers]) + add_pairs(low_sum[i], 1) + add_pairs(high_sum[i], 16);
    }
}

/* dot[i][r] = start[i] + sum over 32 columns of weights[r] * q[i], for n tokens. */
DM_INLINE void dot_tokens(i32v *dot, const group_weights *weights, const int8_t *q, const int32_t *start, size_t n,
                          size_t registers, int format) {
    if (format == DM_Q4)
        dot_nibbles(dot, weights, q, start, n, registers);
    else
        dot_bytes_by_nibbles(dot, weights, q, start, n, registers);
}

#endif
