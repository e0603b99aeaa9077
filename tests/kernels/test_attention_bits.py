"""Attention's bits: those of rule 10 in NumPy, and on every ISA level and thread count those of its first version."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_moe.kernels import KvFormat
from helpers import rule10
from helpers.attention_cases import CASES, CaseRun

EXPECTED = json.loads((Path(__file__).parent / "attention_bits.json").read_text(encoding="utf-8"))
FORMATS = pytest.mark.parametrize("fmt", list(KvFormat), ids=lambda fmt: fmt.label)


@FORMATS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_the_first_version_s(kernels, bench, case, fmt):
    assert CaseRun(case, fmt, kernels, bench.empty).digest() == EXPECTED[f"{fmt.label}, {case.name}"]


@FORMATS
@pytest.mark.parametrize("case", [case for case in CASES if max(case.lengths) <= 200], ids=lambda case: case.name)
def test_bits_are_rule_10_s(portable, same_bits, case, fmt):
    run = CaseRun(case, fmt, portable)
    tokens = (case.tokens[0], case.tokens[-1])
    h, g, P = case.h, case.g, case.P
    for found_C, (sequence, position) in zip(run.attend(tokens), tokens, strict=True):
        rows = run.rows[sequence][: position + 1]
        k_SgP, v_SgP = (part.reshape(-1, g, P) for part in np.split(rows[:, h * P :], 2, axis=1))
        expected_hP = rule10.attention(
            rows[position, : h * P].reshape(h, P), k_SgP, v_SgP, np.array(case.kv_of_h), np.float32(P**-0.5), fmt
        )
        same_bits(found_C.reshape(h, P), expected_hP)


@FORMATS
@pytest.mark.parametrize("positions", [1, 64, 65, 130])
def test_what_follows_a_token_does_not_count(kernels, same_bits, positions, fmt):
    """Tokens of one step see their own past only: later rows are written, or NaN where they are not."""
    case = next(case for case in CASES if case.name == "prompt 7")
    run = CaseRun(case, fmt, kernels)
    together_TC = run.attend(case.tokens[:positions])
    alone_C = run.attend(case.tokens[positions - 1 : positions])[0]
    same_bits(together_TC[-1], alone_C)
