"""Bytes of a sum on the network: what the codecs of `kernels` make, and what the cost model of `parallel` counts."""

EXACT_SUM_BYTES = 4.5  # packed, as a rule: one width of 4 or 5 bytes for 32 values, and the width itself
FINISHED_SUM_BYTES = 4.0  # converted: f32
BF16_SUM_BYTES = 2.0
Q8_SUM_BYTES = 34 / 32  # int8, and an f16 scale for 32 of them
