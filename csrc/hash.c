/* hash.c: a fast hash of floats, by which ranks notice that one of them holds other numbers: XXH64 of their bytes.
 *
 * Source: xxHash's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Not for adversaries.
 */
#include <string.h>

#include "dist_moe.h"

#define PRIME_1 0x9E3779B185EBCA87u
#define PRIME_2 0xC2B2AE3D27D4EB4Fu
#define PRIME_3 0x165667B19E3779F9u
#define PRIME_4 0x85EBCA77C2B2AE63u
#define PRIME_5 0x27D4EB2F165667C5u

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

/* A NaN's payload is not promised to be equal on all instruction sets, only its place. */
static uint32_t word_32(const float *at) {
    uint32_t bits;
    memcpy(&bits, at, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits;
}

static uint64_t word_64(const float *at) { return (uint64_t)word_32(at + 1) << 32 | word_32(at); }

static uint64_t mix(uint64_t lane, uint64_t word) { return rotate(lane + word * PRIME_2, 31) * PRIME_1; }

static uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ mix(0, lane)) * PRIME_1 + PRIME_4; }

uint64_t dm_hash_floats(const float *values, size_t count, uint64_t seed) {
    uint64_t hash = seed + PRIME_5;
    size_t i = 0;
    if (count >= 8) {
        uint64_t lane[4] = {seed + PRIME_1 + PRIME_2, seed + PRIME_2, seed, seed - PRIME_1};
        for (; i + 8 <= count; i += 8) {
            for (size_t j = 0; j < 4; j++) lane[j] = mix(lane[j], word_64(values + i + 2 * j));
        }
        hash = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
        for (size_t j = 0; j < 4; j++) hash = merge(hash, lane[j]);
    }
    hash += count * sizeof *values;
    for (; i + 2 <= count; i += 2) hash = rotate(hash ^ mix(0, word_64(values + i)), 27) * PRIME_1 + PRIME_4;
    if (i < count) hash = rotate(hash ^ word_32(values + i) * PRIME_1, 23) * PRIME_2 + PRIME_3;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}
