/* embed.h: one row of an embedding table. */
#ifndef DM_EMBED_H
#define DM_EMBED_H

static void embed(float *x_D, const void *row_D, size_t D, int bf16_table) {
    if (!bf16_table) {
        __builtin_memcpy(x_D, row_D, D * sizeof(float));
        return;
    }
    for (size_t d = 0; d < D; d++) x_D[d] = widen_bf16_one(((const uint16_t *)row_D)[d]);
}

#endif
