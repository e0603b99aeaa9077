"""benchmarks/matmul.py: every kernel runs, its errors are those of rounding, and a wrong kernel's are not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dist_moe.kernels import Kernels

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ARITHMETIC = 2e-6
ROUNDING = {"f32": 2e-6, "bf16": 1e-2, "q8/64": 3e-2, "q4/32": 0.3, "f16": 2e-3, "q8": 3e-2}


@pytest.fixture
def matmul(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("matmul")
    monkeypatch.setattr(module, "MODELS", (module.Model("tiny", 96, 4, 2, 64, 8, 192, 512),))
    return module


def options(matmul: ModuleType, *more: str) -> object:
    given = "--models tiny --formats f32,bf16,q8/64,q4/32 --kv f32,f16,q8 --tokens 1,3 --depth 70 --mib 1 --threads 1"
    args = matmul.arguments([*given.split(), *more])
    args.repetitions = 1
    return args


def test_every_kernel_is_as_exact_as_its_format(matmul: ModuleType) -> None:
    rows = list(matmul.rows(options(matmul)))
    kernels = {"matmul qkv", "matmul router", "matmul lm_head", "sums over heads", "expert chunks", "attention"}
    assert {row.kernel for row in rows} == kernels
    for row in rows:
        assert row.error < ARITHMETIC, row
        assert row.error <= row.rounding * 1.01 < 1.01 * ROUNDING[row.format], row
        assert row.gops > 0
        assert row.gb_per_s > 0
    assert {row.format for row in rows} == set(ROUNDING)


def test_a_wrong_kernel_shows(matmul: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.matmul

    def wrong(self: Kernels, out_TR: np.ndarray, *arguments: object) -> None:
        right(self, out_TR, *arguments)
        out_TR[:, 3] *= 1.01

    monkeypatch.setattr(Kernels, "matmul", wrong)
    rows = list(matmul.rows(options(matmul, "--kernels", "matmul", "--tokens", "2")))
    assert all(row.error > 10 * ARITHMETIC for row in rows)


@pytest.mark.parametrize("form", ["md", "json", "text"])
def test_forms(
    matmul: ModuleType, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--models tiny --formats q4/32 --kernels heads --tokens 1 --mib 1 --threads 1 -o {form}"
    monkeypatch.setattr("sys.argv", ["matmul.py", *words.split()])
    matmul.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (3 if form == "md" else 1)
    if form == "json":
        assert json.loads(lines[0])["kernel"] == "sums over heads"
    with pytest.raises(SystemExit):
        matmul.arguments(["--formats", "q5"])
