"""Attention's bits, on every ISA level and with 1 to 3 threads, are those of the first version of rule 10."""

import json
from pathlib import Path

import pytest

from dist_moe.kernels import KvFormat
from helpers.attention_cases import CASES, CaseRun

EXPECTED = json.loads((Path(__file__).parent / "attention_bits.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fmt", list(KvFormat), ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_the_first_version_s(kernels, bench, case, fmt):
    assert CaseRun(case, fmt, kernels, bench.empty).digest() == EXPECTED[f"{fmt.label}, {case.name}"]
