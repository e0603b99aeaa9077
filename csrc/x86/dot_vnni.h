/* dot_vnni.h: byte dot products by vpdpbusd: a register of rows x 4 columns, unsigned weights times signed activations.
 *
 * Bounds: 32 products of at most 255 * 127 stay far inside int32; vpdpbusd does not saturate. Each token is one chain
 * of eight; the tokens of a step are interleaved, which hides the latency (5 cycles).
 */
#ifndef DM_X86_DOT_VNNI_H
#define DM_X86_DOT_VNNI_H

/* dot[i][r] = start[i] + sum over 32 columns of weights[r] * q[i], for n tokens. */
DM_INLINE void dot_tokens(i32v *dot, const group_weights *weights, const int8_t *q, const int32_t *start, size_t n,
                          size_t registers, int format) {
    for (size_t i = 0; i < n * registers; i++) dot[i] = all_i32(start[i / registers]);
    for (size_t j = 0; j < 8; j++) {
        i32v weight[DM_STRIP_ONE];
        for (size_t r = 0; r < registers; r++) weight[r] = four_weights(&weights[r], j, format);
        for (size_t i = 0; i < n; i++) {
            i32v x = four_activations(q + DM_GROUP * i + 4 * j);
            for (size_t r = 0; r < registers; r++)
                dot[i * registers + r] = dot_four(dot[i * registers + r], weight[r], x);
        }
    }
}

#endif
