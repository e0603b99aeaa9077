/* int8_peak.h: tdpbssd of 32 columns, as much as one exact dot product has (rule 6); four tiles hide its latency. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    int8_t tile[1024] __attribute__((aligned(64)));
    for (size_t i = 0; i < sizeof tile; i++) tile[i] = (int8_t)data[i % 16];
    configure_for(16);
    compiler_barrier();
    _tile_loadd(EVEN_X, tile, DM_GROUP);
    _tile_loadd(ODD_X, tile, DM_GROUP);
    _tile_loadd(EVEN_W, tile, 64);
    _tile_loadd(ODD_W, tile, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t round = 0; round < rounds; round++) {
        _tile_dpbssd(0, EVEN_X, EVEN_W);
        _tile_dpbssd(1, ODD_X, EVEN_W);
        _tile_dpbssd(2, EVEN_X, ODD_W);
        _tile_dpbssd(3, ODD_X, ODD_W);
    }
    int32_t sum[4][256] __attribute__((aligned(64)));
    _tile_stored(0, sum[0], 64);
    _tile_stored(1, sum[1], 64);
    _tile_stored(2, sum[2], 64);
    _tile_stored(3, sum[3], 64);
    _tile_release();
    for (size_t i = 0; i < 4; i++) data[i] ^= sum[i][17 * i];
    return rounds * 4 * 16 * 16 * DM_GROUP * 2;
}
