"""`dist-moe plan` as its user sees it: every option, both forms, every kind of model, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.main import execute
from dist_moe.errors import DistMoeError
from helpers import launching
from helpers.tiny_gguf import write_gguf
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = str(CONFIGS / "qwen3-30b-a3b.toml")
GIVEN = ("--bandwidth", "40", "--memory", "64", "--threads", "1")
MpiRun = Callable[..., launching.Finished]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("DIST_MOE_")]:
        monkeypatch.delenv(name)


def plan(*arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert execute(["plan", *arguments, *(() if "--bandwidth" in arguments else GIVEN)]) == 0
    return output.getvalue()


def planned(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(MODEL, *arguments, "-o", "json"))
    return found


def test_the_table_names_every_way_and_the_best() -> None:
    lines = plan(MODEL, "--nodes", "1-2").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["1", "shared"], ["2", "whole"], ["2", "sliced"]]
    assert {len(row) for row in rows} == {8}
    assert lines[0].startswith("qwen3-30b-a3b in q4, KV f16 for 4096 positions; prompt 512, 1 decoding; 1 rank x 1 ")
    assert "40.0 GB/s" in lines[1]
    assert "64.0 GB of memory. The net (1gbe): 45 us and 0.117 GB/s." in lines[1]
    assert lines[-1].startswith("Best for a prompt of 512 tokens and 256 of an answer: ")


def test_the_json_has_the_same_and_more() -> None:
    found = planned("--nodes", "4", "--net", "10gbe")
    assert (found["model"], found["weights"], found["net"], found["read_gb_s"]) == ("qwen3-30b-a3b", "q4", "10gbe", 40)
    assert found["memory_bytes"] == 64e9
    whole = found["ways"][0]
    assert (whole["nodes"], whole["experts"], whole["decode_exchange"]) == (4, "whole", "allreduce")
    allreduce, alltoall = whole["prefill"]
    # 2 x 3/4 x 2048 x 8.5 bytes, and 3/4 x (2048 x (1 + 0.907) x 5.625 + 64)
    assert allreduce["bytes_per_token_and_layer"] == 26112
    assert alltoall["bytes_per_token_and_layer"] == pytest.approx(16526, abs=2)
    assert found["best"] in found["ways"]
    assert found["sentence"].startswith("Best for")


def test_without_nodes_one_to_eight_are_compared() -> None:
    assert {way["nodes"] for way in planned()["ways"]} == set(range(1, 9))


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        (("--net", "ib100"), "decode_tokens_per_s"),
        (("--bandwidth", "80", "--memory", "64", "--threads", "1"), "decode_tokens_per_s"),
        (("--quant", "q8"), "weights_bytes"),
        (("--kv", "q8"), "kv_bytes"),
        (("--ctx", "8192"), "kv_bytes"),
        (("--prompt", "1024"), "prefill_tokens_per_s"),
        (("--batch", "8"), "decode_tokens_per_s"),
        (("--prefill-chunk", "64"), "buffer_bytes"),
        (("--ranks-per-node", "2"), "buffer_bytes"),
    ],
)
def test_every_option_counts(option: tuple[str, ...], changed: str) -> None:
    assert planned("--nodes", "2", *option)["best"][changed] != planned("--nodes", "2")["best"][changed]


def test_memory_and_threads_are_taken_from_this_machine_or_the_options() -> None:
    small = str(CONFIGS / "qwen3-0.6b.toml")
    found = json.loads(plan(small, "--nodes", "1", "--bandwidth", "40", "-o", "json"))
    assert found["memory_bytes"] > 1e6
    assert found["threads"] == len(os.sched_getaffinity(0))


def test_bandwidth_is_measured_if_it_is_not_given() -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute(["plan", MODEL, "--nodes", "2", "--memory", "64", "-o", "json"])
    assert json.loads(output.getvalue())["read_gb_s"] > 0.1


def test_a_further_node_that_slows_decoding_is_warned_of(tmp_path: Path) -> None:
    # So little to read and compute that messages decide.
    tiny = str(TinyModel().write(tmp_path / "checkpoint"))
    text = plan(tiny, "--nodes", "1-2", "--ctx", "64", "--prompt", "8")
    assert "Warning: 2 nodes decode slower than 1: " in text
    assert "answer: one node: " in text.splitlines()[-1]


def test_stores_directories_and_gguf_files(tmp_path: Path) -> None:
    checkpoint = TinyModel().write(tmp_path / "checkpoint")
    store = tmp_path / "store"
    run_convert(Checkpoint.open(checkpoint), store)
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf, TinyModel(dense_layers=()))
    for path, weights in ((checkpoint, "q4"), (store, "q4"), (gguf, "q4")):
        found = json.loads(plan(str(path), "--nodes", "1", "--ctx", "64", "--prompt", "8", "-o", "json"))
        assert found["weights"] == weights
        assert found["best"]["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", "0"), "--nodes: expected a whole number from 1 to 1024, or two like 1-8, found '0'"),
        (("--nodes", "4-2"), "--nodes: expected a whole number from 1 to 1024, or two like 1-8, found '4-2'"),
        (("--nodes", "1-2-3"), "--nodes: expected a whole number"),
        (("--nodes", "many"), "--nodes: expected a whole number"),
        (("--nodes", "30-33"), "33 nodes: this model has 32 query heads and each node needs one: take fewer"),
        (("--ranks-per-node", "0"), "--ranks-per-node: expected a whole number from 1 to 1024, found '0'"),
        (("--threads", "0"), "--threads: expected a whole number from 1"),
        (("--net", "wifi"), "--net: expected 1gbe, 10gbe, ib100 or measured, found 'wifi'"),
        (("--bandwidth", "nan"), "--bandwidth: expected a number from 0.1"),
        (("--memory", "-1"), "--memory: expected a number from 0.001"),
        (("--quant", "q5"), "--quant: expected f32, bf16, q8 or q4, found 'q5'"),
        (("--kv", "q4"), "--kv: expected f32, f16 or q8, found 'q4'"),
        (("--ctx", "0"), "--ctx: expected a whole number from 1"),
        (("--ctx", "99999"), "--ctx 99999: the model has 40960 positions; give at most that"),
        (("--prompt", "4096"), "--prompt 4096: leaves no room to answer in 4096 positions: raise --ctx"),
        (("--batch", "17"), "--batch: expected a whole number from 1 to 16, found '17'"),
        (("--prefill-chunk", "0"), "--prefill-chunk: expected a whole number from 1"),
        (("-o", "csv"), "--format: expected md or json, found 'csv'"),
        (("--nodes", "1", "--memory", "10"), "does not fit on 1 node of 10.0 GB: each needs 18.1 GB (weights 17.6 GB"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(DistMoeError) as caught:
        execute(["plan", MODEL, "--bandwidth", "40", *arguments])
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing", None, "expected a store (with manifest.json), a GGUF file or a Hugging Face directory"),
        ("model.toml", "layers = 3", "expected a table [architecture]"),
        ("model.toml", "layers =", "is not valid TOML"),
        ("model.bin", "GGML", "is a file that does not begin with GGUF"),
    ],
)
def test_models_that_are_none_are_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DistMoeError) as caught:
        execute(["plan", str(tmp_path / name), *GIVEN])
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_store_keeps_its_format(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_convert(Checkpoint.open(TinyModel().write(tmp_path / "checkpoint")), store)
    with pytest.raises(DistMoeError, match="--quant q8"):
        execute(["plan", str(store), "--quant", "q8", *GIVEN])


def test_one_host_has_no_net_to_measure(mpirun: MpiRun) -> None:
    done = mpirun(2, sys.executable, "-m", "dist_moe", "plan", MODEL, "--net", "measured")
    assert done.code == 2, done.output
    assert done.stderr.count("--net measured: all ranks are on ") == 1
