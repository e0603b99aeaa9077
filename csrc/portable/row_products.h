/* row_products.h: rows of queries against K, and rows of weights against V (rule 10), in f32.
 *
 * sum[r][c] = fma(a[r][k], b[k][c], sum[r][c]) for ascending k from +0. A block of rows x registers of sums stays in
 * registers, so that a load of b serves all rows and enough chains hide the latency of fma.
 */
#ifndef DM_ROW_PRODUCTS_H
#define DM_ROW_PRODUCTS_H

/* Registers of sums, and rows of them at most: AVX2 has 16 registers, the others 32. */
#define DM_PRODUCT_SUMS (DM_LANES == 8 ? 8 : 16)
#define DM_PRODUCT_ROWS (DM_LANES == 16 ? 8 : 4)
/* Registers side by side for so many rows; 64 columns at most. */
#define DM_PRODUCT_WIDTH(rows) \
    (DM_PRODUCT_SUMS / (rows) * DM_LANES < 64 ? DM_PRODUCT_SUMS / (rows) : (size_t)64 / DM_LANES)

/* Register i behind column c of row k, n <= DM_LANES columns of it present; column c of K is position c of the block. A
 * multiple of the registers' columns stands at c. */
typedef f32v (*column_loader)(const void *b, size_t k, size_t c, size_t i, size_t n, size_t P);

DM_INLINE size_t key_element(size_t p, size_t position, size_t P) {
    return (position / 16 * P + p) * 16 + position % 16;
}

DM_INLINE f32v key_f32(const void *keys, size_t p, size_t position, size_t i, size_t n, size_t P) {
    (void)n;
    return load_f32((const float *)keys + key_element(p, position + i * DM_LANES, P));
}

DM_INLINE f32v key_f16(const void *keys, size_t p, size_t position, size_t i, size_t n, size_t P) {
    (void)n;
    return widen_f16((const uint16_t *)keys + key_element(p, position + i * DM_LANES, P));
}

DM_INLINE f32v value_f32(const void *values, size_t j, size_t p, size_t i, size_t n, size_t P) {
    return load_f32_part((const float *)values + j * P + p + i * DM_LANES, n);
}

DM_INLINE f32v value_f16(const void *values, size_t j, size_t p, size_t i, size_t n, size_t P) {
    const uint16_t *value = (const uint16_t *)values + j * P + p + i * DM_LANES;
    if (n >= DM_LANES) return widen_f16(value);
    uint16_t part[DM_LANES] = {0};
    for (size_t at = 0; at < n; at++) part[at] = value[at];
    return widen_f16(part);
}

/* Rows of int8 are padded to 32, so a whole register can be read. Registers within 32 dims share a scale. */
DM_INLINE f32v value_q8(const void *values, size_t j, size_t p, size_t i, size_t n, size_t P) {
    (void)n;
    const size_t groups = dm_divide_up(P, DM_GROUP);
    const int8_t *q = (const int8_t *)values + j * groups * DM_GROUP + p + i * DM_LANES;
    const float *scale = (const float *)((const uint8_t *)values + DM_BLOCK_POSITIONS * groups * DM_GROUP);
    const size_t group = p / DM_GROUP + i * DM_LANES / DM_GROUP;
    return all_f32(scale[j * groups + group]) * __builtin_convertvector(load_i8(q), f32v);
}

/* The part of a block, its K or its V, that is read next. Bytes [at + k * step, at + (k + 1) * step) are asked for at
 * k. */
typedef struct next_part {
    const uint8_t *first;
    size_t quarter_bytes, at, step;
} next_part;

DM_INLINE next_part next_part_at(const uint8_t *first, size_t bytes) {
    return (next_part){first, dm_round_up(dm_divide_up(bytes, 4), 64), 0, 0};
}

/* Asks for so many bytes from byte `at` on, counted line by line over four quarters in turn: a core's own requests
 * alone do not fill the memory's width, and the hardware's prefetch goes on in four pages side by side. */
DM_INLINE void fetch_bytes(const next_part *part, size_t at, size_t bytes) {
    for (size_t end = at + bytes; at < end; at += 64) {
        __builtin_prefetch(part->first + at / 64 % 4 * part->quarter_bytes + at / 256 * 64, 0, 2);
    }
}

/* Adds a[r][k] * b[k][c ...] for k from `first` to `last` to `width` registers of `rows` rows; rows of a lie a_stride
 * apart and begin with k = first. n lanes of a register are present. */
DM_INLINE void add_products(f32v *sum, const float *a, size_t a_stride, const void *b, size_t first, size_t last,
                            size_t c, size_t n, size_t P, const next_part *next, size_t rows, size_t width,
                            column_loader load) {
    for (size_t k = first; k < last; k++) {
        f32v column[16];
        for (size_t i = 0; i < width; i++) column[i] = load(b, k, c, i, n, P);
        fetch_bytes(next, next->at + k * next->step, next->step);
        for (size_t r = 0; r < rows; r++) {
            const f32v factor = all_f32(a[r * a_stride + k - first]);
            for (size_t i = 0; i < width; i++) sum[r * width + i] = fma_lanes(factor, column[i], sum[r * width + i]);
        }
    }
}

#endif
