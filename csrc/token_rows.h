/* token_rows.h: a part of dist_moe.h: some tokens' operands and sums as bytes, on their way between hosts. */
#ifndef DM_TOKEN_ROWS_H
#define DM_TOKEN_ROWS_H
#include <stddef.h>
#include <stdint.h>

struct dm_buffers;
struct dm_operand;

/* The tokens of which each node computes some expert, as the picks of a step say: the first count_N of its row_NT,
 * ascending; what follows them is undefined. */
void dm_list_tokens(int32_t *row_NT, int32_t *count_N, const struct dm_buffers *buffers, size_t nodes, size_t T);

/* Bytes of these parts of one token's operand: the floats, then all scales and the int8. */
size_t dm_operand_row_bytes(const struct dm_operand *operand, int parts);
/* The operands of tokens row_N, one after another. */
void dm_pack_operand_rows(uint8_t *out, const struct dm_operand *operand, const int32_t *row_N, size_t N, int parts);
/* The inverse; the sums of the groups are computed anew. */
void dm_unpack_operand_rows(const struct dm_operand *operand, const uint8_t *packed, const int32_t *row_N, size_t N,
                            int parts);
/* The sums of tokens row_N, each row packed by dm_pack_sums: most bytes, and bytes used. */
size_t dm_sum_rows_bound(size_t N, size_t D);
size_t dm_pack_sum_rows(uint8_t *out, const int64_t *sums_TD, const int32_t *row_N, size_t N, size_t D);
/* Adds them to sums_TD. Returns 0 if these are no N packed rows; some may have been added then. */
int dm_add_sum_rows(int64_t *sums_TD, const uint8_t *packed, size_t packed_bytes, const int32_t *row_N, size_t N,
                    size_t D);

#endif
