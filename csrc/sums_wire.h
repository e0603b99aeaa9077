/* sums_wire.h: a part of dist_moe.h: exact sums as bytes for the network (sums_packing.c, sums_wire.c). */
#ifndef DM_SUMS_WIRE_H
#define DM_SUMS_WIRE_H
#include <stddef.h>
#include <stdint.h>

/* Forms of sums on the wire; only the first is lossless for sums that others are added to. */
enum dm_wire { DM_WIRE_EXACT, DM_WIRE_F32, DM_WIRE_BF16, DM_WIRE_Q8, DM_WIRE_COUNT };

/* Most bytes of `count` packed sums. */
size_t dm_packed_bound(size_t count);
/* Lossless, one byte width per 32 values; out has dm_packed_bound() bytes. Returns how many are used. */
size_t dm_pack_sums(uint8_t *out, const int64_t *values, size_t count);
/* Adds to the sums, or overwrites them. Returns the bytes read; 0 if these are no `count` packed sums, of which some
 * may have been unpacked then. */
size_t dm_unpack_sums(int64_t *sums, const uint8_t *packed, size_t packed_bytes, size_t count, int add);
/* The same in any form. A finished sum as f32 becomes an int64 that is used as the same f32, with the same fault. */
size_t dm_wire_bound(size_t count, int wire);
size_t dm_encode_sums(uint8_t *out, const int64_t *values, size_t count, int wire);
size_t dm_decode_sums(int64_t *sums, const uint8_t *bytes, size_t byte_count, size_t count, int wire, int add);

#endif
