/* tiles.h: tile registers, and what is loaded into them: 32 columns of 16 rows and of up to 16 tokens. */
#ifndef DM_AMX_TILES_H
#define DM_AMX_TILES_H

#define GROUP_TILE_BYTES 512

/* Tile registers: two of each, so that one is filled while the other is read. */
#define EVEN_DOTS 0
#define ODD_DOTS 1
#define EVEN_X 4
#define ODD_X 5
#define EVEN_W 6
#define ODD_W 7

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* GCC's intrinsic reads 8 bytes of the configuration as far as the optimizer knows, and its tile loads none at all. */
DM_INLINE void configure_tiles(const tile_config *config) { __asm__ volatile("ldtilecfg %0" : : "m"(*config)); }
DM_INLINE void compiler_barrier(void) { __asm__ volatile("" : : : "memory"); }

/* An address that instructions use as it is: with an index they would take two micro-operations. */
DM_INLINE const void *plain_address(const void *address) {
    __asm__("" : "+r"(address));
    return address;
}

/* Tiles for `tokens` tokens; nothing is read or written beyond them. */
DM_INLINE void configure_for(size_t tokens) {
    tile_config config = {.palette = 1};
    for (size_t i = 0; i < 8; i++) {
        config.row_bytes[i] = i == EVEN_X || i == ODD_X ? DM_GROUP : 64;
        config.rows[i] = (uint8_t)(i == EVEN_W || i == ODD_W ? DM_GROUP / 4 : tokens);
    }
    configure_tiles(&config);
}

/* The right tile of vpermb and vgf2p8affineqb; each has a port of its own. Bits 0-2 of the high nibble, and bit 3 in
 * 3-7; a constant flips those: n - 8. */
#define HIGH_NIBBLE 0x1020408080808080
#define NIBBLE_SIGN 0xf8

DM_INLINE void unpack_group_q4(int8_t *weights, const uint8_t *vectors) {
    const __m512i high = _mm512_set1_epi64((int64_t)HIGH_NIBBLE);
    const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
    for (size_t j = 0; j < 4; j++) {
        __m512i both = _mm512_load_si512(vectors + 64 * j);
        _mm512_store_si512(weights + 64 * j, _mm512_permutexvar_epi8(both, low));
        _mm512_store_si512(weights + 256 + 64 * j, _mm512_gf2p8affine_epi64_epi8(both, high, NIBBLE_SIGN));
    }
}

DM_INLINE void unpack_group_q8(int8_t *weights, const uint8_t *vectors) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (size_t j = 0; j < 8; j++) {
        _mm512_store_si512(weights + 64 * j, _mm512_xor_si512(_mm512_load_si512(vectors + 64 * j), sign));
    }
}

/* The dot products of one group begin; those of the group before it are stored. */
DM_INLINE void multiply(int32_t *before_TR, const int8_t *q, const int8_t *weights, size_t odd) {
    if (odd == 0) {
        _tile_loadd(EVEN_X, q, DM_GROUP);
        _tile_loadd(EVEN_W, weights, 64);
        _tile_zero(EVEN_DOTS);
        _tile_dpbssd(EVEN_DOTS, EVEN_X, EVEN_W);
        if (before_TR != NULL) _tile_stored(ODD_DOTS, before_TR, 64);
    } else {
        _tile_loadd(ODD_X, q, DM_GROUP);
        _tile_loadd(ODD_W, weights, 64);
        _tile_zero(ODD_DOTS);
        _tile_dpbssd(ODD_DOTS, ODD_X, ODD_W);
        if (before_TR != NULL) _tile_stored(EVEN_DOTS, before_TR, 64);
    }
}

DM_INLINE void store_last(int32_t *dots_TR, size_t odd) {
    if (odd == 0) {
        _tile_stored(ODD_DOTS, dots_TR, 64);
    } else {
        _tile_stored(EVEN_DOTS, dots_TR, 64);
    }
}

#endif
