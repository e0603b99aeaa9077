/* kv_store.h: K and V of one position of one KV head into its block, narrowed (rule 9). A row with a value that cannot
 * be stored is stored as zeros: its sequence ends anyway. Layout: formats.h. */
#ifndef DM_KV_STORE_H
#define DM_KV_STORE_H

/* Where position `place` of a block begins in the K tiles of [P][16] elements. */
DM_INLINE size_t key_start(size_t place, size_t P) { return place / 16 * 16 * P + place % 16; }

/* Whether a bit pattern of |x| of K or V reaches `limit`. */
DM_INLINE int reaches(const float *k_P, const float *v_P, size_t P, int32_t limit) {
    return absmax_bits(k_P, P) >= limit || absmax_bits(v_P, P) >= limit;
}

static int kv_store_f32(uint8_t *block, const float *k_P, const float *v_P, size_t place, size_t P) {
    const int bad = reaches(k_P, v_P, P, DM_INFINITY_BITS);
    float *key = (float *)block + key_start(place, P);
    float *value = (float *)(block + dm_key_bytes(DM_KV_F32, P)) + place * P;
    for (size_t p = 0; p < P; p++) {
        key[p * 16] = bad ? 0.0f : k_P[p];
        value[p] = bad ? 0.0f : v_P[p];
    }
    return bad ? DM_FAULT_KEY_VALUE : 0;
}

/* DM_LANES values, n of them present, as float16; zeros if the row is bad. */
DM_INLINE void narrow_part(uint16_t half[DM_LANES], const float *from, size_t n, int bad) {
    const u16_lanes lanes = narrow_f16_lanes(bad ? (f32v){0} : load_f32_part(from, n));
    __builtin_memcpy(half, &lanes, sizeof lanes);
}

static int kv_store_f16(uint8_t *block, const float *k_P, const float *v_P, size_t place, size_t P) {
    /* 65520 is the least magnitude that rounds to a float16 infinity. */
    const int bad = reaches(k_P, v_P, P, 0x477ff000);
    uint16_t *key = (uint16_t *)block + key_start(place, P);
    uint16_t *value = (uint16_t *)(block + dm_key_bytes(DM_KV_F16, P)) + place * P;
    for (size_t p = 0; p < P; p += DM_LANES) {
        const size_t n = P - p < DM_LANES ? P - p : DM_LANES;
        uint16_t half[DM_LANES];
        narrow_part(half, k_P + p, n, bad);
        for (size_t i = 0; i < n; i++) key[(p + i) * 16] = half[i];
        narrow_part(half, v_P + p, n, bad);
        __builtin_memcpy(value + p, half, n * sizeof(uint16_t));
    }
    return bad ? DM_FAULT_KEY_VALUE : 0;
}

static int kv_store_q8(uint8_t *block, const float *k_P, const float *v_P, size_t place, size_t P) {
    int bad = 0;
    size_t groups = dm_divide_up(P, DM_GROUP);
    uint8_t *keys = block + place / 16 * groups * DM_KEY_GROUP_BYTES;
    int8_t *value = (int8_t *)(block + dm_key_bytes(DM_KV_Q8, P)) + place * groups * DM_GROUP;
    float *value_scale = (float *)(block + dm_key_bytes(DM_KV_Q8, P) + DM_BLOCK_POSITIONS * groups * DM_GROUP);
    for (size_t g = 0; g < groups; g++) {
        size_t n = P - g * DM_GROUP < DM_GROUP ? P - g * DM_GROUP : DM_GROUP;
        int8_t key[DM_GROUP];
        int32_t unused_sum;
        float key_scale = quantize_group(key, &unused_sum, k_P + g * DM_GROUP, n, &bad);
        uint8_t *group = keys + g * DM_KEY_GROUP_BYTES;
        for (size_t j = 0; j < 8; j++) __builtin_memcpy(group + 64 * j + place % 16 * 4, key + 4 * j, 4);
        ((float *)(group + 512))[place % 16] = key_scale;
        value_scale[place * groups + g] =
            quantize_group(value + g * DM_GROUP, &unused_sum, v_P + g * DM_GROUP, n, &bad);
    }
    return bad ? DM_FAULT_KEY_VALUE : 0;
}

#endif
