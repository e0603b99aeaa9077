"""`dist-moe bench` for real: its three forms, random weights in the cache, several ranks, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.cli.bench import find, plan_cases, refuse_impossible
from dist_moe.cli.bench_output import Facts, render
from dist_moe.cli.options import BenchOptions
from dist_moe.engine.bench import BenchReport, Case, Limits, Timing
from dist_moe.engine.measuring.bench_bound import StepWork, Work
from dist_moe.engine.measuring.bench_machine import ReadSpeed
from dist_moe.errors import BoundError, UsageError
from helpers import launching
from helpers.command_options import MODEL
from helpers.tiny_model import TinyModel

PROGRAM = (sys.executable, "-m", "dist_moe")
QUICK = ("--read-gib", "0.002", "--prefill", "20", "--decode", "3", "--depth", "0,70", "--repeat", "2")
KEYS = {"test", "tokens", "batch", "depth", "ranks", "threads", "tokens_per_s", "bytes_per_step", "share"}
OPTIONS = BenchOptions(
    **vars(MODEL),
    stats=False,
    synthetic=None,
    layers=None,
    synthetic_dir=None,
    prefill="256,2048",
    decode=64,
    depth=None,
    batch="1",
    repeat=3,
    format="md",
    read_gib=4.0,
    seed=0,
)

MpiRun = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a file of configs/ would have it."""
    path = tmp_path_factory.mktemp("architecture") / "tiny.toml"
    keys = {key: value for key, value in TinyModel().config_json().items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path.write_text("max_tokens = 3\n\n[architecture]\n" + "\n".join(lines) + "\n")
    return path


def bench(environment: dict[str, str], *arguments: str) -> launching.Finished:
    done = launching.run(*PROGRAM, "bench", *arguments, env=environment)
    assert done.code == 0, done.output
    return done


def stores(environment: dict[str, str]) -> list[Path]:
    return sorted(Path(environment["DIST_MOE_CACHE"]).glob("synthetic-*"))


def test_random_weights_are_written_once_and_run(environment: dict[str, str], architecture: Path) -> None:
    model = ("--synthetic", str(architecture), "--quant", "q8", *QUICK)
    rows = json.loads(bench(environment, *model, "--batch", "1,3", "-o", "json").stdout)
    cases = [(row["test"], row["tokens"], row["batch"], row["depth"]) for row in rows]
    decodes = [("decode", 3, batch, depth) for batch in (1, 3) for depth in (0, 70)]
    assert cases == [("prefill", 20, 1, 0), *decodes]
    for row in rows:
        assert row.keys() >= KEYS
        assert (row["ranks"], row["threads"], row["weights"], row["repetitions"]) == (1, 1, "q8 g32", 2)
        assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
        assert 0 < row["share"] <= 1.02
    (store,) = stores(environment)
    written = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    table = bench(environment, *model, "-o", "csv").stdout
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == written
    assert [row["depth"] for row in csv.DictReader(io.StringIO(table))] == ["0", "0", "70"]
    ids = ("run", "-m", str(store), "--prompt-ids", "1,2,3", "-n", "4", "--temperature", "0", "--quiet")
    assert launching.run(*PROGRAM, *ids, env=environment).stdout.count(",") == 3
    verified = launching.run(*PROGRAM, "inspect", str(store), "--verify", env=environment)
    assert "every checksum agrees" in verified.stdout, verified.output


def test_a_table_for_people(environment: dict[str, str]) -> None:
    lines = bench(environment, *QUICK, "--decode", "0").stdout.splitlines()
    assert lines[0].startswith("demo, q8 g32, KV f16, ")
    assert lines[2].startswith("| test | tokens | batch |")
    assert lines[4].startswith("| prefill | 20 | 1 | 0 |")
    assert any(line.startswith("The machine reads ") for line in lines)


def test_several_ranks_print_once(
    environment: dict[str, str], architecture: Path, tmp_path: Path, mpirun: MpiRun
) -> None:
    model = ("--synthetic", str(architecture), "--synthetic-dir", str(tmp_path / "store"), "--layers", "1")
    done = mpirun(2, *PROGRAM, "bench", *model, *QUICK, "--stats", "-o", "json", env=environment)
    assert done.code == 0, done.output
    assert done.stderr.count("stats: decode: ") == 1
    rows = json.loads(done.stdout)
    assert {row["ranks"] for row in rows} == {2}
    assert {row["model"] for row in rows} == {"synthetic-tiny-1-layers"}
    assert (tmp_path / "store" / "manifest.json").exists()


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return read_hf_config(TinyModel().write(tmp_path / "tiny"))


def test_depths_beyond_the_model_are_left_out_unless_asked_for(config: Any) -> None:
    cases = plan_cases(OPTIONS, config)
    assert cases == (Case("prefill", 256, 1, 0), Case("prefill", 2048, 1, 0), Case("decode", 64, 1, 0))
    with pytest.raises(UsageError, match="at depth 4096: the model has 4096 positions"):
        plan_cases(replace(OPTIONS, depth="0,4096"), config)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prefill": "0", "decode": 0}, "there is nothing to measure"),
        ({"prefill": "5000"}, "prefill of 5000 tokens at depth 0: the model has 4096 positions"),
        ({"batch": "1,300"}, "--batch 300: a step has at most 256 tokens: raise --prefill-chunk"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(config: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        plan_cases(replace(OPTIONS, **options), config)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layers": 3}, "--layers belongs to --synthetic"),
        ({"synthetic_dir": "x"}, "--synthetic-dir belongs to --synthetic"),
        ({"synthetic": "tiny.toml", "model": "store"}, "exclude each other"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        find(replace(OPTIONS, **options))


@pytest.mark.parametrize("value", ["", "1,,2", "1;2", "-1", "x", "1.5", "0"])
def test_a_list_of_batches_holds_numbers(environment: dict[str, str], value: str) -> None:
    done = launching.run(*PROGRAM, "bench", "--batch", value, env=environment)
    assert done.code == 2, done.output
    assert "--batch: expected whole numbers from 1 to 65536 with commas between them" in done.stderr


def test_better_than_the_machine_is_an_error() -> None:
    speed = ReadSpeed(100.0, "store", 1000, 1, 0)
    limits = Limits(speed, speed, 1000, 1.0, 1.0, 1.0)
    steps = (StepWork((Work(bytes=103),)),)
    good = Timing(Case("decode", 1, 1, 0), (1.1,), steps, 0.0)
    report = BenchReport(limits, (good,), 0.0, 0.0, 0.0, None)
    refuse_impossible(report)
    with pytest.raises(BoundError, match="prefill of 9 tokens, batch 1, depth 0: 103% of what the machine allows"):
        refuse_impossible(replace(report, timings=(good, Timing(Case("prefill", 9, 1, 0), (1.0,), steps, 0.0))))
    assert BoundError.exit_code == 1


@pytest.mark.parametrize(
    ("share", "store_rate", "warned"),
    [(0.5, 30e9, True), (0.95, 30e9, False), (0.5, 34e9, False), (0.5, 0.0, False), (None, 30e9, False)],
)
def test_weights_in_small_pages_are_worth_a_word(share: float | None, store_rate: float, warned: bool) -> None:
    memory, store = ReadSpeed(35e9, "memory", 1000, 1, 0), ReadSpeed(store_rate, "store", 1000, 1, 0)
    limits = Limits(memory, store, 1000, 1.0, 1.0, 1.0)
    timing = Timing(Case("decode", 1, 1, 0), (1.1,), (StepWork((Work(bytes=103),)),), 0.0)
    facts = Facts("m", "q4", "f16", "avx2", "none", "whole", 1, 1, 2, 256, 0.0)
    text = render("md", BenchReport(limits, (timing,), 0.1, 0.0, 0.0, share), facts)
    assert ("of rank 0's weights lie in huge pages" in text and "is read 17% faster" in text) == warned
    assert ("Weights loaded in 100 ms; the first" in text) == (share is None)
    if share is not None:
        assert f"Weights loaded in 100 ms, {share:.0%} of them in huge pages; the first" in text
    (row,) = json.loads(render("json", BenchReport(limits, (timing,), 0.1, 0.0, 0.0, share), facts))
    assert row["huge_page_share"] == share
