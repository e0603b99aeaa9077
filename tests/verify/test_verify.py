"""dist-moe verify: sound numbers pass, and each thing that can be wrong fails its own lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.main import execute
from dist_moe.cli.verify import Table, check_line
from dist_moe.engine.start.startup import open_exchange
from dist_moe.errors import EnvironmentMismatch, UsageError, VerificationFailed
from dist_moe.kernels import Kernels, LayerBuffers, LayerSizes, WeightFormat, isa_levels, reference
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.launching import output_of_ranks
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.reader import Store
from dist_moe.store.recipe_file import parse_recipe
from dist_moe.verify import definition
from dist_moe.verify.check import Check, close, differing, relative_deviation, rms_deviation, same
from dist_moe.verify.definition import SourceWeights
from dist_moe.verify.kernel_level import kernel_checks
from dist_moe.verify.rank_hashes import compare_hashes
from dist_moe.verify.session import LEVELS, Session, Wanted, checks_of_job, parse_hashes
from dist_moe.verify.subject import pick_layers
from helpers import launching
from helpers.models import model
from helpers.tiny_store import ODD, run_convert

PROGRAM = (sys.executable, "-m", "dist_moe")
STORE_LEVELS = LEVELS[1:]
BEST = isa_levels()[-1]
# Matrices of one layer, and of one expert, read floats and int8 at once.
MIXED = """
format = "q4"
[[rule]]
kind = ["q", "down"]
format = "bf16"
layers = "0"
[[rule]]
kind = ["v", "lm_head"]
format = "q8"
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(ODD.write(tmp_path_factory.mktemp("verify") / "odd"))


@pytest.fixture(scope="module")
def stores(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("stores")
    for fmt in (WeightFormat.F32, WeightFormat.Q4):
        run_convert(checkpoint, home / fmt.label, format=fmt)
    run_convert(checkpoint, home / "mixed", formats=parse_recipe(MIXED, "mixed").formats(checkpoint.config))
    return {name: home / name for name in ("f32", "q4", "mixed")}


def checks(
    store: Path | None,
    *levels: str,
    layers: tuple[int, ...] = (),
    expert: int | None = None,
    against: Path | None = None,
) -> list[Check]:
    """What one rank finds, in this process."""
    session = Session(Store.open(store, with_text=False), against, Wanted(levels, layers, expert, 9))
    try:
        return [*session.checks()]
    finally:
        session.close()


def failed(found: list[Check], expected: str | None = None) -> set[str]:
    return {check.what for check in found if not check.passed and expected in (None, check.expected)}


# ---- what is sound ----


def test_every_kernel_passes_at_every_level() -> None:
    found = [*kernel_checks()]
    assert not failed(found)
    names = " ".join(check.what for check in found)
    assert all(isa in names for isa in isa_levels())
    assert all(fmt.label in names for fmt in WeightFormat)
    assert {check.expected for check in found} == {"float64", "definition", "portable"}


@pytest.mark.parametrize("fmt", ["f32", "q4", "mixed"])
def test_a_store_passes_with_its_source(stores: dict[str, Path], checkpoint: Checkpoint, fmt: str) -> None:
    found = checks(stores[fmt], *STORE_LEVELS, against=checkpoint.path)
    assert not failed(found), [check_line(check) for check in found if not check.passed]
    assert {check.level for check in found} == set(STORE_LEVELS)
    for level in ("expert", "moe", "attn", "model"):
        of_level = [check for check in found if check.level == level]
        assert {"float64", "source"} <= {check.expected for check in of_level}, level
        assert any(check.tolerance is None for check in of_level), level
    if fmt == "f32":  # nothing is rounded but f32 sums
        assert max(check.deviation for check in found if check.tolerance) < 5e-6


# ---- what is broken ----


def test_a_wrong_bit_at_one_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.matmul

    def wrong(self: Kernels, out_TR: np.ndarray, *arguments: object) -> None:
        right(self, out_TR, *arguments)
        if self.isa == BEST and self.threads == 2:
            out_TR.view(np.uint32)[0, 3] ^= 1

    monkeypatch.setattr(Kernels, "matmul", wrong)
    found = [*kernel_checks([BEST])]
    assert failed(found) == {f"matmul, {name}, {BEST}, 2 threads" for name in matmul_variants(found)}


def matmul_variants(found: list[Check]) -> set[str]:
    return {check.what.removeprefix("matmul, ") for check in found if check.expected == "float64"
            and check.what.startswith("matmul, ")}  # fmt: skip


def test_a_kernel_that_is_wrong_everywhere_fails_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.rmsnorm
    monkeypatch.setattr(Kernels, "rmsnorm", lambda self, *a, **k: (right(self, *a, **k), a[0].__imul__(1.001))[0])
    assert failed([*kernel_checks([BEST])]) == {"rmsnorm"}


@pytest.mark.parametrize(
    ("name", "level"), [("hidden_units", "expert"), ("hidden_units", "moe"), ("rotate", "attn"), ("rmsnorm", "model")]
)
def test_another_definition_fails_its_level(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, level: str
) -> None:
    right = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *values: right(*values) * 1.01)
    found = checks(stores["f32"], level, layers=(0,))
    assert failed(found, "float64")
    assert not failed(found, "best level")


def test_another_source_fails(stores: dict[str, Path], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SourceWeights.tensor

    def swapped(self: SourceWeights, name: str) -> np.ndarray:
        return right(self, {"layers.0.experts.2.up": "layers.0.experts.3.up"}.get(name, name))

    monkeypatch.setattr(SourceWeights, "tensor", swapped)
    found = checks(stores["q4"], "expert", layers=(0,), expert=2, against=checkpoint.path)
    assert failed(found) == failed(found, "source") == {"layer 0, expert 2"}
    assert not failed(checks(stores["q4"], "expert", layers=(0,), expert=1, against=checkpoint.path))


@pytest.mark.parametrize("level", STORE_LEVELS)
def test_a_level_that_computes_other_bits_fails(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    halves = {name: getattr(Kernels, name) for name in ("attention_half", "experts_half", "compute_experts")}
    sums_of: dict[object, np.ndarray] = {}  # by the LayerBuffers that point at them

    def flip(buffers: object, kernels: Kernels) -> None:
        if kernels.isa == "portable":
            sums_of[buffers][0, 1] += 1 << 20

    def broken(half: Callable[..., None]) -> Callable[..., None]:
        def run(self: Kernels, buffers: object, *arguments: object) -> None:
            half(self, buffers, *arguments)
            flip(buffers, self)

        return run

    made = LayerBuffers.__init__

    def keep(self: LayerBuffers, sizes: LayerSizes, **arrays: Any) -> None:
        made(self, sizes, **arrays)
        sums_of[self] = arrays["sums_TD"]

    monkeypatch.setattr(LayerBuffers, "__init__", keep)
    for name, half in halves.items():
        monkeypatch.setattr(Kernels, name, broken(half))
    found = checks(stores["q4"], level, layers=(0,))
    assert failed(found) == failed(found, "best level")
    assert all("portable" in what for what in failed(found))
    assert len(failed(found)) == 1


def test_an_expert_that_should_not_have_been_chosen_fails(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = definition.router
    monkeypatch.setattr(definition, "router", lambda *values: right(*values)[:, ::-1])
    assert "layer 0, choice of experts" in failed(checks(stores["f32"], "moe", layers=(0,)))


# ---- ranks ----


def test_ranks_that_compute_other_bits_fail() -> None:
    expected = {"attn: residual": "ab", "model: logits": "cd"}
    assert [check.passed for check in compare_hashes(2, expected, expected)] == [True, True]
    found = [*compare_hashes(2, {"attn: residual": "ab", "model: logits": "ce"}, expected)]
    assert [(check.level, check.what, check.passed) for check in found] == [
        ("attn", "residual, 2 ranks", True),
        ("model", "logits, 2 ranks", False),
    ]
    assert not any(check.passed for check in compare_hashes(4, {}, expected))


def test_answers_of_ranks_are_found_among_other_lines() -> None:
    text = 'warning of a launcher\n{"ranks": 2, "hashes": {"a: b": "c"}}\n'
    assert parse_hashes(text, 2) == {"a: b": "c"}
    for wrong in ("", text.replace("2", "1"), text + text):
        with pytest.raises(EnvironmentMismatch, match="2 ranks were started"):
            parse_hashes(wrong, 2)


def test_ranks_are_started_and_agree(stores: dict[str, Path]) -> None:
    options = ("--level", "kernel,expert,layer,model", "--layer", "2", "--tokens", "5", "--ranks", "1,3", "-o", "json")
    done = launching.run(*PROGRAM, "verify", "-m", str(stores["q4"]), *options)
    assert done.code == 0, done.output
    found = json.loads(done.stdout)
    assert found["passed"]
    of_ranks = [check for check in found["checks"] if check["what"].endswith("3 ranks")]
    assert {check["level"] for check in of_ranks} == {"kernel", "expert", "layer", "model"}
    assert all(check["expected"] == "1 rank" and check["tolerance"] == "bits" for check in of_ranks)


def test_a_jobs_own_ranks_are_compared_with_one(stores: dict[str, Path]) -> None:
    command = (*PROGRAM, "verify", "-m", str(stores["q4"]), "--level", "attn", "--layer", "0", "--tokens", "5")
    done = launching.mpirun(2, *command)
    assert done.code == 0, done.output
    assert "residual after attention of layer 0, 2 ranks" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASS: ")


def test_ranks_that_fail_say_why(stores: dict[str, Path]) -> None:
    environ = launching.child_environment()
    with pytest.raises(EnvironmentMismatch, match=r"2 ranks started with .* exit code 2: .*--layer 99"):
        output_of_ranks(2, ["verify", "-m", str(stores["q4"]), "--layer", "99", "--hashes-of-ranks"], environ, 60)


# ---- the command ----


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--level kernels", "--level: expected kernel, expert, moe, attn, layer or model, or several"),
        ("--ranks 0", "--ranks: expected whole numbers from 1"),
        ("--layer 9", "--layer 9: the model has layers 0 to 2"),
        ("--layer 0 --expert 5", "--expert 5: layer 0 has experts 0 to 4"),
        ("--layer 1 --expert 1", "--expert 1: layer 1 has a dense MLP, which is expert 0"),
        ("--against OTHER", "is another model than the store's"),
        ("--ranks 2 trace x.npz", "--ranks: write options behind the word trace"),
    ],
)
def test_bad_input_is_one_sentence(stores: dict[str, Path], tmp_path: Path, line: str, words: str) -> None:
    other = ODD.write(tmp_path / "other", vocabulary=200)
    command = line.replace("OTHER", str(other)).split()
    given = [] if "trace" in line else ["-m", str(stores["f32"])]
    with pytest.raises((UsageError, AgreedError)) as caught:
        execute(["verify", *given, *command])
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_numbers_are_told_and_give_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(["verify", "--level", "kernel"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS: ")
    monkeypatch.setattr(reference, "silu", lambda a: np.maximum(a, 0))
    with pytest.raises(
        (VerificationFailed, AgreedError), match="checks failed, first kernel, expert chunks, f32"
    ) as caught:
        execute(["verify", "--level", "kernel"])
    assert caught.value.exit_code == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL: ")


def test_a_missing_mpirun_is_said_before_anything_is_computed(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(EnvironmentMismatch, match=r"no mpirun of it .*: mpirun -n N dist-moe verify"):
        execute(["verify", "-m", str(stores["q4"]), "--level", "expert", "--layer", "0", "--ranks", "1,2"])
    assert capsys.readouterr().out == ""


def test_ranks_inside_a_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_moe.cli.verify.detect_launcher", lambda _: Launcher("mpich", 0, 2, 2))
    with pytest.raises(UsageError, match="was started by mpich already: leave --ranks out"):
        execute(["verify", "--ranks", "2"])


def test_the_table_and_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Check("attn", "layer 0", "float64", 1e-7, 1e-5), Check("model", "logits, 2 ranks", "1 rank", 1, None)
    table = Table(as_json=False)
    table.show(good)
    table.end()
    table.show(bad)
    with pytest.raises(VerificationFailed, match="1 of 2 checks failed, first model, logits, 2 ranks") as caught:
        table.end()
    assert caught.value.exit_code == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["attn", "layer", "0", "float64", "1.0e-07", "1e-05", "PASS"]
    assert lines[2] == "PASS: 1 check"
    assert lines[3].split()[-4:] == ["1", "differ", "bits", "FAIL"]
    assert lines[4] == "FAIL: 1 of 2 checks"
    as_json = Table(as_json=True)
    as_json.show(Check("attn", "layer 0", "float64", np.inf, 1e-5))
    with pytest.raises(VerificationFailed):
        as_json.end()
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["checks"][0]["deviation"] is None


def test_errors_of_rank_0_end_the_checks(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    session = Session(Store.open(stores["f32"], with_text=False), None, Wanted(("attn",), (), None, 4))
    monkeypatch.setattr(definition, "attention", lambda *_: (_ for _ in ()).throw(UsageError("damaged")))
    with pytest.raises(AgreedError, match="damaged"):
        checks_of_job(session, world, open_exchange(world, False, {}), lambda _: None)
    session.close()


# ---- comparisons ----


def test_deviations() -> None:
    wanted = np.array([[1.0, -4.0]])
    assert relative_deviation(wanted + 0.1, wanted) == pytest.approx(0.025)
    assert rms_deviation(wanted * 1.5, wanted) == pytest.approx(0.5)
    assert relative_deviation(wanted * np.nan, wanted) == np.inf
    assert rms_deviation(wanted[0], wanted) == np.inf
    assert relative_deviation(np.zeros(2), np.zeros(2)) == 0
    assert rms_deviation(np.ones(2), np.zeros(2)) == np.inf
    assert not close("attn", "", "", wanted * np.nan, wanted, 1e9).passed


def test_bits() -> None:
    zeros = np.array([0.0, -0.0, np.nan], np.float32)
    assert differing([zeros], [zeros.copy()]) == 0
    assert differing([zeros], [np.abs(zeros)]) == 1
    assert differing([zeros], [zeros.astype(np.float64)]) == 3
    assert differing([], [zeros]) == 3
    assert not same("kernel", "", "", [zeros[:2]], [zeros]).passed


def test_layers_of_a_large_model_are_three() -> None:
    assert pick_layers(model(layers=48), ()) == (0, 24, 47)
    assert pick_layers(model(layers=3), ()) == (0, 1, 2)
    assert pick_layers(model(layers=48), (5, 2, 5)) == (2, 5)
