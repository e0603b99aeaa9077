"""dist-moe profile and place, and the store that comes of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli.main import execute
from dist_moe.errors import DistMoeError, StoreError, UsageError
from helpers import launching
from helpers.tiny_model import TinyModel

PROGRAM = (sys.executable, "-m", "dist_moe")
SPLIT_HOST = Path(__file__).parents[1] / "helpers" / "split_host.py"
TEXT = "Once upon a time, a quiet girl named Anna had a little dog. " * 12
STORY = ("run", "-p", "Once upon a time", "-n", "30", "--temperature", "0", "--quiet")

Command = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a text, its profile, and a placement of the demo on three nodes."""
    path = tmp_path_factory.mktemp("place")
    (path / "text.txt").write_text(TEXT)
    dist_moe(path, "profile", "text.txt", "-o", "routing.npz")
    line = ("place", "--nodes", "3", "--profile", "routing.npz", "--budget", "1.5x", "-o", "placement.json")
    dist_moe(path, *line, "--weights", "2,2,1")
    return path


def dist_moe(cwd: Path, *arguments: str) -> launching.Finished:
    environment = {"DIST_MOE_CACHE": str(cwd / "cache"), "DIST_MOE_THREADS": "1"}
    done = launching.run(*PROGRAM, *arguments, env=environment, cwd=cwd)
    assert done.code == 0, done.output
    return done


def refused(*arguments: object) -> str:
    """What a command says when it refuses its arguments."""
    with pytest.raises(DistMoeError) as caught:
        execute([str(argument) for argument in arguments])
    assert isinstance(caught.value, (UsageError, StoreError))
    return str(caught.value)


def test_a_profile_is_the_same_on_any_ranks_and_in_any_exchange(home: Path, mpirun: Command) -> None:
    for exchange in ("allreduce", "alltoall"):
        line = ("profile", "text.txt", "-o", f"{exchange}.npz", "--exchange", exchange, "--threads", "1")
        done = mpirun(2, *PROGRAM, *line, cwd=home, env={"DIST_MOE_CACHE": str(home / "cache")})
        assert done.code == 0, done.output
        with np.load(home / "routing.npz") as one, np.load(home / f"{exchange}.npz") as two:
            assert (one["counts"] == two["counts"]).all()
            assert (one["sets"] == two["sets"]).all()


def test_a_long_text_is_read_in_pieces(home: Path) -> None:
    done = dist_moe(home, "profile", "text.txt", "text.txt", "-o", "pieces.npz", "--ctx", "50")
    with np.load(home / "pieces.npz") as pieces, np.load(home / "routing.npz") as whole:
        assert pieces["counts"].sum() == 2 * whole["counts"].sum()
    assert "next: dist-moe place MODEL --nodes N --profile pieces.npz" in done.stderr


def test_the_record_of_a_run_serves_as_a_profile(home: Path) -> None:
    dist_moe(home, *STORY, "--routing", "run.npz")
    done = dist_moe(home, "place", "--nodes", "2", "--profile", "run.npz", "--simulate", "--json")
    found = json.loads(done.stdout)
    assert found["routing"] == "run.npz"
    assert [result["batch"] for result in found["straggling"]] == [1, 16]
    assert all(1.0 <= result["after"] <= result["before"] for result in found["straggling"])


def test_a_placed_store_tells_the_same_story(home: Path) -> None:
    dist_moe(home, "shard", "--placement", "placement.json", "--quant", "q8", "-o", "placed", "--quiet")
    expected = dist_moe(home, *STORY, "--quant", "q8").stdout
    assert dist_moe(home, *STORY, "-m", "placed").stdout == expected
    facts = json.loads(dist_moe(home, "inspect", "placed", "--json").stdout)["store"]
    assert facts["node_weights"] == [2, 2, 1]
    assert facts["chunk_copies"]["mean"] == 1.5


def test_without_a_profile_it_says_what_is_assumed(home: Path) -> None:
    shown = dist_moe(home, "place", "--weights", "2,1", "--simulate").stdout.splitlines()
    assert shown[0] == "demo on 2 nodes; routing: assumed, all experts equally likely"
    assert [line.split()[:2] for line in shown[3:5]] == [["1", "2"], ["2", "1"]]
    skewed = dist_moe(home, "place", "--nodes", "2", "--zipf", "1.5", "--simulate").stdout
    assert "assumed, Zipf routing with exponent 1.5" in skewed


def test_the_same_input_gives_the_same_placement(home: Path) -> None:
    line = ("place", "--weights", "2,2,1", "--profile", "routing.npz", "--budget", "1.5x", "-o", "again.json")
    shown = dist_moe(home, *line).stdout.splitlines()
    assert (home / "again.json").read_bytes() == (home / "placement.json").read_bytes()
    assert shown[-1] == "next: dist-moe shard --placement again.json"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--simulate",), "how many nodes? Give --nodes N, or --weights"),
        (("--nodes", "2"), "neither -o placement.json nor --simulate"),
        (("--nodes", "3", "--weights", "1,1", "--simulate"), "--weights 1,1: 2 numbers for 3 nodes"),
        (("--nodes", "2", "--weights", "1,0", "--simulate"), "--weights: expected whole numbers from 1"),
        (("--nodes", "9", "--simulate"), "9 nodes: this model has 8 query heads"),
        (("--nodes", "2", "--simulate", "--budget", "much"), "--budget much: expected copies of the experts like 2x"),
        (("--nodes", "2", "--simulate", "--budget", "0.0001GB"), "are too few for node 1"),
        (("--nodes", "2", "--simulate", "--profile", "none.npz"), "none.npz: expected the profile"),
        (("--nodes", "2", "--simulate", "--profile", "x", "--zipf", "1"), "--zipf is for trying out"),
        (("--nodes", "2", "-o", "no/such/place.json"), "no/such"),
        (("no-model", "--nodes", "2", "--simulate"), "no-model: expected a store"),
    ],
)
def test_what_place_cannot_do_is_said(arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused("place", *arguments)


def test_measured_weights_need_several_hosts(home: Path, mpirun: Command) -> None:
    done = mpirun(2, *PROGRAM, "place", "--weights", "measured", "--simulate", cwd=home)
    assert done.code == 2, done.output
    assert done.stderr.count("--weights measured: all ranks are on") == 1
    assert "mpirun -f hosts dist-moe place" in done.stderr


def test_a_profile_of_another_model_is_refused(home: Path, tmp_path: Path) -> None:
    other = TinyModel(experts=6).write(tmp_path / "other")
    said = refused("place", other, "--nodes", "2", "--simulate", "--profile", home / "routing.npz")
    assert "is of demo (4 layers with 16 experts, 4 per token), not of this model" in said


def test_a_damaged_profile_is_refused(home: Path, tmp_path: Path) -> None:
    data = (home / "routing.npz").read_bytes()
    for name, text in (("short.npz", data[: len(data) // 2]), ("text.npz", b"words")):
        (tmp_path / name).write_bytes(text)
        said = refused("place", "--nodes", "2", "--simulate", "--profile", tmp_path / name)
        assert f"{name}: not the profile of a model's routing" in said
        assert "dist-moe profile TEXT -o OUT.npz" in said


def test_profile_refuses_what_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = launching.run(*PROGRAM, "profile", "empty.txt", "-o", "routing.npz", cwd=tmp_path)
    assert done.code == 2, done.output
    assert "empty.txt: holds no text" in done.stderr
    done = launching.run(*PROGRAM, "profile", "missing.txt", "-o", "routing.npz", cwd=tmp_path)
    assert done.code == 2, done.output
    assert "missing.txt cannot be read" in done.stderr


def test_a_dense_model_is_placed_but_has_no_profile(tmp_path: Path) -> None:
    dense = TinyModel(experts=0, dense_layers=(0, 1)).write(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    done = launching.run(*PROGRAM, "place", dense, "--weights", "2,1", "-o", tmp_path / "placement.json")
    assert done.code == 0, done.output
    assert "this model has no experts" in done.stdout
    said = refused("place", dense, "--nodes", "2", "--zipf", "1", "--simulate")
    assert "this model has no experts: leave them out" in said


def test_a_profile_does_not_replace_a_text_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "link.npz").symlink_to("text.txt")
    for output in ("text.txt", "link.npz"):
        with pytest.raises(DistMoeError, match=f"{output}: that is the text .*text.txt, which would be lost") as caught:
            execute(["profile", str(tmp_path / "text.txt"), "-o", str(tmp_path / output)])
        assert caught.value.exit_code == 2
    assert (tmp_path / "text.txt").read_text() == TEXT


@pytest.mark.parametrize("budget", ["0.0001GB", "0.16GB"])
def test_a_budget_below_what_a_node_gets_without_experts_is_refused(budget: str) -> None:
    dense = Path(__file__).resolve().parents[2] / "configs" / "qwen3-0.6b.toml"
    said = refused("place", dense, "--nodes", "2", "--simulate", "--budget", budget)
    found = re.search(r"too few for node 1, .* take (\S+ GB): give more", said)
    assert found is not None, said
    assert execute(["place", str(dense), "--nodes", "2", "--simulate", "--budget", found[1]]) == 0


def test_the_budget_that_a_refusal_names_is_enough() -> None:
    said = refused("place", "--nodes", "4", "--simulate", "--budget", "0.0003GB", "--quant", "q8")
    found = re.search(r"hold \d+ of 16 experts of each layer: give (\S+ GB), ", said)
    assert found is not None, said
    assert execute(["place", "--nodes", "4", "--simulate", "--quant", "q8", "--budget", found[1]]) == 0


def test_after_a_store_the_next_command_cuts_it_again(home: Path) -> None:
    dist_moe(home, "shard", "--nodes", "2", "-o", "cut", "--quiet")
    shown = dist_moe(home, "place", "cut", "--nodes", "2", "-o", "cut.json").stdout
    assert re.search(r" \d+\.\d MB$", shown, re.MULTILINE)
    line = shown.splitlines()[-1].removeprefix("next: dist-moe ").split()
    assert line == ["reshard", "cut", "--placement", "cut.json"]
    dist_moe(home, *line, "-o", "cut-again", "--quiet")
    assert (home / "cut-again" / "shard-00002-of-00002.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--nodes", "3", "--simulate"), "--nodes 3: this job has 2 hosts to measure"),
        (("-o", "/dev/full"), "/dev/full is a device or pipe: name a file"),
        (("no-model", "--simulate"), "no-model: expected a store"),
    ],
)
def test_measured_weights_and_a_mistake_end_all_ranks_alike(
    arguments: tuple[str, ...], sentence: str, mpirun: Command
) -> None:
    env = {"DIST_MOE_YIELD": "1"}
    done = mpirun(2, sys.executable, str(SPLIT_HOST), "0,1", "place", "--weights", "measured", *arguments, env=env)
    assert done.code == 2, done.output
    assert done.stderr.count("dist-moe: error: ") == 1
    assert sentence in done.stderr
    assert "Abort" not in done.output
