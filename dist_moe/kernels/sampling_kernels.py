"""Kernels from logits to tokens: block sums, candidates, the draw (NUMERICS rules 13 and 14).

Legend: T tokens, V vocabulary (this rank's columns), B blocks of 128 columns, N candidates. See native.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.kernels.arrays import F32, F64, I32, F32Array, F64Array, I32Array
from dist_moe.kernels.context import Context
from dist_moe.kernels.formats import VOCABULARY_BLOCK
from dist_moe.kernels.library import ffi, lib


@dataclass(frozen=True)
class SamplingParameters:
    """How to draw one token (`dm_sampling`, NUMERICS rules 13 and 14); filters apply in the order of the fields."""

    temperature: float = 0.0  # 0: the best token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # keep the smallest prefix that holds this share of what top_k left; 1: all
    min_p: float = 0.0  # keep tokens of at least this share of the best one's probability
    typical_p: float = 1.0  # keep the tokens of the most usual surprise that hold this share of the rest; 1: all
    seed: int = 0
    sample_index: int = 0
    position: int = 0


@dataclass(frozen=True)
class Penalties:
    """What `penalize` does to logits (`dm_penalize`)."""

    repetition: float = 1.0  # divides positive and multiplies negative logits of tokens that were seen
    presence: float = 0.0  # taken away from those that were generated
    frequency: float = 0.0  # taken away for each time that they were


class SamplingKernels(Context):
    """The chapter "logits and sampling" of dist_moe.h."""

    def vocabulary_blocks(
        self,
        max_TB: F32Array,
        sum_TB: F32Array,
        fault_T: I32Array,
        logits_TV: F32Array,
        temperature_T: F32Array,
        valid: int,
        layer: int,
        tokens: int | None = None,
    ) -> None:
        """Largest logit and sum of exp((logit - largest) / temperature) per 128 columns of `tokens` rows of logits_TV.

        Columns from `valid` on are masked; a masked block gives -infinity and 0; temperature 0 is read as 1 (rule 13).
        """
        vocabulary, tokens = logits_TV.shape[1], len(logits_TV) if tokens is None else tokens
        blocks = -(-vocabulary // VOCABULARY_BLOCK)
        largest, total = F32.write(max_TB, tokens, blocks), F32.write(sum_TB, tokens, blocks)
        fault, logits = I32.write(fault_T, tokens), F32.read(logits_TV, tokens, vocabulary)
        temperature = F32.read(temperature_T, tokens)
        lib.dm_vocabulary_blocks(
            self._context, largest, total, fault, logits, temperature, tokens, vocabulary, valid, layer
        )

    def top_logits(
        self,
        ids_TN: I32Array,
        logits_TN: F32Array,
        logits_TV: F32Array,
        max_TB: F32Array,
        block_B: I32Array,
        valid: int,
        tokens: int | None = None,
    ) -> None:
        """The N best columns below `valid` of `tokens` rows of logits_TV, by (logit descending, id ascending).

        The columns of block b have the ids from 128 block_B[b] on, which ascend; missing candidates get id -1 and logit
        -infinity. max_TB is that of `vocabulary_blocks` with the same `valid`.
        """
        vocabulary, count, tokens = logits_TV.shape[1], ids_TN.shape[1], len(logits_TV) if tokens is None else tokens
        blocks = -(-vocabulary // VOCABULARY_BLOCK)
        ids, best = I32.write(ids_TN, tokens, count), F32.write(logits_TN, tokens, count)
        logits, largest = F32.read(logits_TV, tokens, vocabulary), F32.read(max_TB, tokens, blocks)
        numbers = I32.read(block_B, blocks)
        lib.dm_top_logits(self._context, ids, best, logits, largest, numbers, tokens, vocabulary, valid, count)

    def merge_candidates(self, ids_TN: I32Array, logits_TN: F32Array, count: int) -> None:
        """Put the `count` best of each token's N candidates first, by (logit descending, id ascending), missing last.

        What stands behind them afterwards is not valid.
        """
        tokens, total = ids_TN.shape
        ids, logits = I32.write(ids_TN, tokens, total), F32.write(logits_TN, tokens, total)
        lib.dm_merge_candidates(self._context, ids, logits, tokens, total, count)

    def sample(
        self,
        how: SamplingParameters,
        ids_N: I32Array,
        logits_N: F32Array,
        max_B: F32Array,
        sum_B: F32Array,
        complete: bool,
    ) -> tuple[int, float]:
        """Draw one token from the N best candidates; the B block sums give the whole vocabulary's mass.

        Without block sums (B = 0) that mass is not known, and only what needs none of it is decided.

        Returns:
            The token's place in the list, or -1 if the candidates cannot decide (never if `complete`, no other token
            exists, and the mass is known or not needed: at temperature 0 and with top_k), and its share of that mass.
        """
        count, blocks = len(ids_N), len(max_B)
        struct = ffi.new(
            "dm_sampling *",
            (how.temperature, how.top_p, how.min_p, how.typical_p, how.top_k, how.seed, how.sample_index, how.position),
        )
        probability = ffi.new("float *")
        ids, logits = I32.read(ids_N, count), F32.read(logits_N, count)
        largest, total = F32.read(max_B, blocks), F32.read(sum_B, blocks)
        place = lib.dm_sample(self._context, probability, struct, ids, logits, largest, total, count, blocks, complete)
        return int(place), float(probability[0])

    @staticmethod
    def penalize(
        logits_N: F32Array, bias_N: F32Array, seen_N: I32Array, count_N: I32Array, dry_N: F32Array, how: Penalties
    ) -> None:
        """Change N logits in place: bias, repetition penalty, presence and frequency penalties, DRY, in this order.

        Args:
            logits_N: Changed.
            bias_N: Added to them.
            seen_N: Not 0 where the repetition penalty counts.
            count_N: How often each was generated.
            dry_N: Taken away from them.
            how: The penalties.
        """
        count = len(logits_N)
        logits, bias, dry = F32.write(logits_N, count), F32.read(bias_N, count), F32.read(dry_N, count)
        seen, counts = I32.read(seen_N, count), I32.read(count_N, count)
        lib.dm_penalize(logits, bias, seen, counts, dry, how.repetition, how.presence, how.frequency, count)

    def log_probabilities(self, out_N: F64Array, logits_N: F32Array, max_B: F32Array, sum_B: F32Array) -> None:
        """Log p of N logits; the B block sums are those at temperature 1."""
        count, blocks = len(logits_N), len(max_B)
        out, logits = F64.write(out_N, count), F32.read(logits_N, count)
        largest, total = F32.read(max_B, blocks), F32.read(sum_B, blocks)
        lib.dm_log_probabilities(self._context, out, logits, largest, total, count, blocks)

    @staticmethod
    def power(base: float, exponent: float) -> float:
        """`base` > 0 to the power of `exponent`, the same bits everywhere; 0 below 2^-1022."""
        return float(lib.dm_power(base, exponent))

    @staticmethod
    def uniform(seed: int, sample_index: int, position: int) -> float:
        """A number in [0, 1) with 53 random bits, a function of its arguments alone (rule 14)."""
        return float(lib.dm_uniform(seed, sample_index, position))
