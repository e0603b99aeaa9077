/* sums_packing.c: exact sums (int64 in units of 2^-32) as bytes for the network, without loss.
 *
 * Per 32 values one byte w, 0 to 8, then the w low bytes of each value in two's complement, lowest byte first. Sums of
 * a layer lie far below 2^63: 4 or 5 bytes as a rule instead of 8.
 */
#include <string.h>

#include "dist_moe.h"

#define BLOCK 32
#define WIDEST 8

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed sums are little-endian"
#endif

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

size_t dm_packed_bound(size_t count) { return (count + BLOCK - 1) / BLOCK + count * WIDEST; }

/* The bytes that hold every value with its sign; 0 if all are 0. */
static size_t width_of(const int64_t *values, size_t n) {
    uint64_t any = 0, magnitude = 0;
    for (size_t i = 0; i < n; i++) {
        any |= (uint64_t)values[i];
        magnitude |= (uint64_t)(values[i] ^ (values[i] >> 63));
    }
    if (any == 0) return 0;
    return magnitude == 0 ? 1 : (64 - (size_t)__builtin_clzll(magnitude)) / 8 + 1;
}

/* Writes 8 bytes per value, of which the next value overwrites the upper ones: up to 8 - w bytes after the last one. */
static inline __attribute__((always_inline)) void store(uint8_t *out, const int64_t *values, size_t n, size_t width) {
    for (size_t i = 0; i < n; i++) memcpy(out + i * width, &values[i], sizeof values[i]);
}

static void store_block(uint8_t *out, const int64_t *values, size_t n, size_t width) {
    switch (width) {
        case 0: return;
        case 1: store(out, values, n, 1); return;
        case 2: store(out, values, n, 2); return;
        case 3: store(out, values, n, 3); return;
        case 4: store(out, values, n, 4); return;
        case 5: store(out, values, n, 5); return;
        case 6: store(out, values, n, 6); return;
        case 7: store(out, values, n, 7); return;
        default: store(out, values, n, 8); return;
    }
}

size_t dm_pack_sums(uint8_t *out, const int64_t *values, size_t count) {
    uint8_t *at = out;
    for (size_t first = 0; first < count; first += BLOCK) {
        const size_t n = least(BLOCK, count - first), width = width_of(values + first, n);
        *at++ = (uint8_t)width;
        store_block(at, values + first, n, width); /* ends at most where n values of 8 bytes would */
        at += n * width;
    }
    return (size_t)(at - out);
}

/* Reads 8 bytes per value. */
static inline __attribute__((always_inline)) void load(int64_t *sums, const uint8_t *packed, size_t n, size_t width,
                                                       int add) {
    const int unused = (int)(64 - 8 * width);
    for (size_t i = 0; i < n; i++) {
        uint64_t word;
        memcpy(&word, packed + i * width, sizeof word);
        const int64_t value = (int64_t)(word << unused) >> unused;
        sums[i] = add ? (int64_t)((uint64_t)sums[i] + (uint64_t)value) : value;
    }
}

static inline __attribute__((always_inline)) void load_block(int64_t *sums, const uint8_t *packed, size_t n,
                                                             size_t width, int add) {
    switch (width) {
        case 1: load(sums, packed, n, 1, add); return;
        case 2: load(sums, packed, n, 2, add); return;
        case 3: load(sums, packed, n, 3, add); return;
        case 4: load(sums, packed, n, 4, add); return;
        case 5: load(sums, packed, n, 5, add); return;
        case 6: load(sums, packed, n, 6, add); return;
        case 7: load(sums, packed, n, 7, add); return;
        default: load(sums, packed, n, 8, add); return;
    }
}

static void unpack_block(int64_t *sums, const uint8_t *packed, size_t left, size_t n, size_t width, int add) {
    uint8_t copy[BLOCK * WIDEST + WIDEST];
    if (width == 0) {
        if (!add) memset(sums, 0, n * sizeof *sums);
        return;
    }
    if (left < n * width + WIDEST - width) { /* the last loads would pass the end */
        memcpy(copy, packed, n * width);
        packed = copy;
    }
    if (add)
        load_block(sums, packed, n, width, 1);
    else
        load_block(sums, packed, n, width, 0);
}

size_t dm_unpack_sums(int64_t *sums, const uint8_t *packed, size_t packed_bytes, size_t count, int add) {
    size_t at = 0;
    for (size_t first = 0; first < count; first += BLOCK) {
        const size_t n = least(BLOCK, count - first);
        if (at >= packed_bytes || packed[at] > WIDEST) return 0;
        const size_t width = packed[at++];
        if (packed_bytes - at < n * width) return 0;
        unpack_block(sums + first, packed + at, packed_bytes - at, n, width, add);
        at += n * width;
    }
    return at;
}
