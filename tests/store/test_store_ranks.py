"""Ranks that make a store together: the bytes of one rank, errors said once, and continued after a death."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.errors import PlaceError
from dist_moe.store import team
from dist_moe.store.lock import LOCK_NAME
from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME, read_manifest
from dist_moe.store.team import Task
from helpers.launching import Finished, mpirun
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents

MakeStore = Callable[..., Path]

# Rank 1 is killed when it begins its second file.
KILLED = """
import os, signal, sys
from dist_moe.cli.main import main
from dist_moe.store.convert import _Run
pack, made = _Run._pack, []
def packs(run, name, kernels):
    made.append(name)
    if run._team.rank == 1 and len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return pack(run, name, kernels)
_Run._pack = packs
sys.exit(main())
"""


def on_ranks(ranks: int, *arguments: object) -> Finished:
    words = [str(argument) for argument in arguments]
    return mpirun(ranks, sys.executable, "-m", "dist_moe", *words, env={"DIST_MOE_YIELD": "1"})


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bytes_are_those_of_one_rank(tmp_path: Path, make_store: MakeStore, ranks: int) -> None:
    one = make_store("one", nodes=3)
    done = on_ranks(ranks, "shard", tmp_path / "odd", "--nodes", 3, "-o", tmp_path / "several", "--quiet")
    assert done.code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"mpirun -n 3 dist-moe run -m {tmp_path / 'several'}"
    assert len(done.stdout.splitlines()) == 2
    assert contents(tmp_path / "several") == contents(one)
    again = on_ranks(ranks, "reshard", one, "--nodes", 1, "-o", tmp_path / "cut", "--quiet")
    assert again.code == 0, again.output
    assert contents(tmp_path / "cut") == contents(make_store("whole"))


def test_a_whole_store_needs_no_help_and_an_error_of_rank_0_is_every_ranks(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = make_store("store", nodes=2)
    done = on_ranks(2, "shard", tmp_path / "odd", "--nodes", 2, "-o", store)
    assert (done.code, "store: done" in done.stdout) == (0, True), done.output
    refused = on_ranks(2, "reshard", store, "--nodes", 7, "-o", tmp_path / "new")
    assert refused.code == 2, refused.output
    assert re.match(r"dist-moe: error: --nodes 7: this model has 6 query heads", refused.stderr)
    assert refused.stderr.count("dist-moe: error") == 1


def test_an_error_of_one_rank_ends_all_and_keeps_the_files_of_the_others(tmp_path: Path) -> None:
    model = TinyModel(dense_layers=())
    tensors = model.tensors()
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"][1, 7] = float("nan")
    source = model.write(tmp_path / "poisoned", tensors)
    command = ("shard", source, "--nodes", 2, "-o", tmp_path / "new", "--quiet")
    failed = on_ranks(3, *command)
    assert failed.code == 2, failed.output
    assert failed.stderr.count("are NaN, infinite or too large") == 1
    assert re.match(r"dist-moe: error: rank \d on \S+, packing: ", failed.stderr)
    assert not (tmp_path / "new" / MANIFEST_NAME).exists()
    kept = {entry.name for entry in read_manifest(tmp_path / "new" / PROGRESS_NAME).files}
    assert len(kept) == 2
    assert "common.safetensors" in kept
    done = on_ranks(3, *command, "--allow-nonfinite")
    assert done.code == 0, done.output
    alone = on_ranks(1, *command[:4], "-o", tmp_path / "alone", "--quiet", "--allow-nonfinite")
    assert alone.code == 0, alone.output
    assert contents(tmp_path / "new") == contents(tmp_path / "alone")


def test_a_store_is_continued_after_a_rank_has_died(tmp_path: Path, make_store: MakeStore) -> None:
    expected, command = (
        make_store("expected", nodes=4),
        ("shard", tmp_path / "odd", "--nodes", 4, "-o", tmp_path / "new"),
    )
    killed = mpirun(2, sys.executable, "-c", KILLED, *map(str, command), env={"DIST_MOE_YIELD": "1"})
    assert killed.code != 0, killed.output
    assert not (tmp_path / "new" / MANIFEST_NAME).exists()
    assert len(read_manifest(tmp_path / "new" / PROGRESS_NAME).files) == 2
    done = on_ranks(2, *command)
    assert done.code == 0, done.output
    written = len(contents(expected)) - 1 - 2
    assert f"{written} of them written now" in done.stdout
    assert contents(tmp_path / "new") == contents(expected)


def test_a_rank_that_sees_another_directory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_SEEN_WITHIN_S", 0.0)
    task = Task(str(tmp_path), str(tmp_path), "right", "", (), False)
    for token in (None, "wrong"):
        if token is not None:
            (tmp_path / LOCK_NAME).write_text(token)
        with pytest.raises(PlaceError, match="is not the directory that rank 0 writes to"):
            team.require_same_directory(task)
    (tmp_path / LOCK_NAME).write_text("right")
    team.require_same_directory(task)
