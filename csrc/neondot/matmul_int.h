/* neondot/matmul_int.h: q4 and q8 weights by sdot: 16 rows at a time for one token, 8 rows for four. */
#ifndef DM_NEONDOT_MATMUL_INT_H
#define DM_NEONDOT_MATMUL_INT_H

DM_INLINE void matmul_dot(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                          size_t out_stride, size_t group, int format) {
    const size_t tile_bytes = dm_tile_bytes(format, x->columns, group);
    for (size_t first = 0; first < T; first += DM_TOKEN_BLOCK) {
        const size_t last = T - first < DM_TOKEN_BLOCK ? T : first + DM_TOKEN_BLOCK;
        for (size_t row = 0; row < rows; row += 16) {
            const uint8_t *tile = packed + row / 16 * tile_bytes;
            float *out = out_TR + row;
            const size_t left = rows - row;
            size_t t = first;
            for (; t + 4 <= last; t += 4) {
                dot_tile(out, tile, x, t, 4, 0, 2, left, out_stride, group, format);
                if (left > 8) dot_tile(out, tile, x, t, 4, 8, 2, left, out_stride, group, format);
            }
            if (t + 2 <= last) {
                dot_tile(out, tile, x, t, 2, 0, 4, left, out_stride, group, format);
                t += 2;
            }
            if (t < last) dot_tile(out, tile, x, t, 1, 0, 4, left, out_stride, group, format);
        }
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    (void)scratch;
    matmul_dot(out_TR, packed, x, T, rows, out_stride, group, DM_Q8);
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    (void)scratch;
    matmul_dot(out_TR, packed, x, T, rows, out_stride, group, DM_Q4);
}

#endif
