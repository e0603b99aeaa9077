"""Find the longest run of tokens that sampled stories have in common with the training text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64


def powers(base: int, count: int) -> np.ndarray:
    """base^0 .. base^(count-1) modulo 2^64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def window_hashes(values: np.ndarray, length: int) -> np.ndarray:
    """A hash of every run of `length` tokens, given a random 64-bit value per token."""
    if len(values) < length:
        return np.zeros(0, dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers(BASE, len(values)), dtype=np.uint64)])
    runs = sums[length:] - sums[:-length]
    return runs * powers(pow(BASE, -1, 2**64), len(runs))


def token_stream(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of all texts, one after another."""
    parts, texts = [], iter(texts)
    while chunk := list(islice(texts, 2000)):
        parts += [np.array(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch(chunk)]
    return np.concatenate(parts)


def longest_repeat(stories: list[str], training: Iterable[str], tokenizer: Tokenizer) -> int:
    """The length of the longest run of tokens of any story that also occurs in the training text."""
    values = np.random.default_rng(0).integers(1, 2**63, 65536, dtype=np.uint64)
    stream = values[token_stream(training, tokenizer)]
    samples = [values[token_stream([story], tokenizer)] for story in stories]
    low, high = 0, max(map(len, samples))
    while low < high:
        middle = (low + high + 1) // 2
        wanted = np.concatenate([window_hashes(sample, middle) for sample in samples])
        found = np.isin(window_hashes(stream, middle), wanted).any()
        low, high = (middle, high) if found else (low, middle - 1)
    return low
