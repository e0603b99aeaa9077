"""dist-moe shard: names, exit codes, progress, the first rank alone, and little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dist_moe
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.shard import shard
from dist_moe.cli.shard_progress import ShardProgress
from dist_moe.errors import CheckpointError, Interrupted, StoreError, UsageError
from dist_moe.store.reader import Store
from helpers.private_memory import LARGE, LARGE_BYTES, peak_bytes
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(dist_moe.__file__).parents[1])}


def run_shard(*arguments: object) -> Result:
    return CliRunner().invoke(shard, [str(argument) for argument in arguments])


@pytest.fixture
def here(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the checkpoint in `odd`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_store_is_named_after_source_format_and_nodes(here: Path) -> None:
    result = run_shard("odd", "--nodes", 3, "--quant", "q8")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "mpirun -n 3 dist-moe run -m odd-q8-3"
    assert Store.open(here / "odd-q8-3").manifest.format.label == "q8"
    assert run_shard("odd").stdout.splitlines()[-1] == "mpirun -n 1 dist-moe run -m odd-q4-1"


def test_options_reach_the_store(here: Path) -> None:
    result = run_shard("odd", "--group-size", 0, "--experts", "sliced", "--nodes", 2, "-o", "a b", "--quiet")
    assert result.exit_code == 0
    manifest = Store.open(here / "a b").manifest
    assert (manifest.group_size, manifest.experts, manifest.nodes) == (0, "sliced", 2)
    assert result.stdout.splitlines()[-1] == "mpirun -n 2 dist-moe run -m 'a b'"


def test_the_same_again_says_done(here: Path) -> None:
    run_shard("odd")
    result = run_shard("odd")
    assert result.exit_code == 0
    assert "odd-q4-1: done" in result.stdout
    assert result.stdout.splitlines()[-1] == "mpirun -n 1 dist-moe run -m odd-q4-1"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("odd", "--nodes", 7), UsageError, "this model has 6 query heads"),
        (("odd", "--group-size", 64), UsageError, "use --group-size 32 or 0"),
        (("nowhere",), CheckpointError, "nowhere"),
        (("odd", "-o", "odd"), StoreError, "is not empty and not a store"),
        (("odd", "-o", "odd/config.json"), StoreError, "cannot be used as a directory"),
    ],
)
def test_errors_are_sentences_with_exit_code_2(
    here: Path, arguments: tuple[object, ...], error: type[StoreError], message: str
) -> None:
    result = run_shard(*arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert result.exception.exit_code == 2


def test_a_head_dim_that_cannot_be_quantized_is_refused_before_anything_is_written(here: Path) -> None:
    TinyModel().write(here / "narrow", head_dim=24)
    assert "head_dim 24" in str(run_shard("narrow").exception)
    assert not (here / "narrow-q4-1").exists()
    assert run_shard("narrow", "--quant", "bf16").exit_code == 0


@pytest.mark.parametrize("option", [("--quant", "q5"), ("--group-size", "16"), ("--nodes", "0"), ("--bogus",)])
def test_wrong_options_are_clicks_errors(here: Path, option: tuple[str, ...]) -> None:
    assert run_shard("odd", *option).exit_code == 2
    assert not list(here.glob("odd-*"))


def test_ranks_other_than_the_first_return_at_once_where_nothing_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    result = run_shard("odd", "--dry-run")
    assert (result.exit_code, result.output) == (0, "")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert "all files" in run_shard("odd", "--dry-run").output
    assert not (here / "odd-q4-1").exists()


def test_mpi_is_never_imported(here: Path) -> None:
    program = (
        "import sys; from dist_moe.cli.shard import shard; shard(['odd'], standalone_mode=False);"
        "from dist_moe.cli.inspect import inspect; inspect(['odd-q4-1'], standalone_mode=False);"
        "assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def test_ctrl_c_ends_with_130_and_a_store_that_can_be_continued(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: ShardProgress, done_bytes: int, total_bytes: int, what: str) -> None:
        if what.startswith("shard"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardProgress, "__call__", interrupt)
        result = run_shard("odd")
    assert isinstance(result.exception, Interrupted)
    assert result.exception.exit_code == 130
    assert "repeat the same command" in str(result.exception)
    with pytest.raises(StoreError, match=r"incomplete"):
        Store.open(here / "odd-q4-1")
    assert run_shard("odd").exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_that_ends_it_leaves_a_store_that_can_be_continued(here: Path, number: int, code: int) -> None:
    program = (
        "import os, sys; from dist_moe.cli.shard_progress import ShardProgress; from dist_moe.cli.start import main\n"
        "def hit(self, done_bytes, total_bytes, what):\n"
        f"    if what.startswith('shard-00002'): os.kill(os.getpid(), {int(number)})\n"
        "ShardProgress.__call__ = hit; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "shard", "odd", "--nodes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    said = "odd-q4-2: interrupted; repeat the same command to continue where it stopped"
    assert done.stderr == f"dist-moe: error: {said}\n"
    store = here / "odd-q4-2"
    assert {path.name for path in store.iterdir()} == {
        "common.safetensors",
        "shard-00001-of-00002.safetensors",
        ".progress.json",
    }
    with pytest.raises(StoreError, match=r"incomplete"):
        Store.open(store)
    kept = (store / "shard-00001-of-00002.safetensors").stat().st_mtime_ns
    assert run_shard("odd", "--nodes", 2).exit_code == 0
    assert (store / "shard-00001-of-00002.safetensors").stat().st_mtime_ns == kept
    assert run_shard("odd", "--nodes", 2, "-o", "fresh").exit_code == 0
    assert contents(here / "fresh") == contents(store)


def test_weights_that_are_not_finite_are_reported_when_they_are_allowed(here: Path) -> None:
    model = TinyModel(dense_layers=())
    tensors = model.tensors()
    tensors["model.layers.1.self_attn.v_proj.weight"][5, 5] = float("nan")
    model.write(here / "poisoned", tensors)
    assert "layers.1.v: 1" in str(run_shard("poisoned", "--nodes", 4).exception)
    result = run_shard("poisoned", "--nodes", 4, "--allow-nonfinite")
    assert result.exit_code == 0
    assert "warning: layers.1.v has 1 weights that are NaN" in result.stderr


def test_progress_is_a_bar_on_a_terminal(here: Path) -> None:
    text = run_on_terminal(["odd"])
    assert "packing" in text
    assert "100%" in text
    assert "GB" in text
    assert "packing" not in run_on_terminal(["odd", "--force", "--quiet"])


def run_on_terminal(arguments: list[str]) -> str:
    """What the command writes to a terminal on stderr."""
    program = "import sys; from dist_moe.cli.shard import shard; shard(sys.argv[1:])"
    master, slave = os.openpty()
    command = [sys.executable, "-c", program, *arguments]
    subprocess.run(command, stderr=slave, stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)
    os.close(slave)
    text = b""
    try:
        while piece := os.read(master, 4096):
            text += piece
    except OSError:
        pass  # Linux: the other end is closed
    os.close(master)
    return text.decode()


def test_progress_is_a_line_every_few_seconds_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with ShardProgress(quiet=False) as progress:
        for step in range(5):
            progress(step * 10**9, 10 * 10**9, "common.safetensors")
    assert capsys.readouterr().err.splitlines() == [
        "common.safetensors: 2.00 of 10.00 GB, 24 s left",
        "common.safetensors: 4.00 of 10.00 GB, 18 s left",
    ]


@pytest.mark.parametrize("group_size", [32, 0])
def test_private_memory_does_not_grow_with_the_model(tmp_path: Path, group_size: int) -> None:
    source = LARGE.write(tmp_path / "large")
    assert (source / "model.safetensors").stat().st_size > LARGE_BYTES
    work = f"convert(opened, there, StoreOptions(group_size={group_size}, nodes=2, threads=2), watch)"
    assert peak_bytes("Checkpoint.open(source)", work, source, tmp_path / "store", ENVIRONMENT) < 40e6


def test_a_killed_conversion_can_be_repeated(here: Path) -> None:
    program = "import sys; from dist_moe.cli.shard import shard; shard(sys.argv[1:])"
    TinyModel().write(here / "longer", experts=32, model_dim=128, dense_layers=())
    command = [sys.executable, "-c", program, "longer", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while process.poll() is None and not list(here.glob("longer-q4-1/.shard*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (here / "longer-q4-1" / "manifest.json").exists()
    assert run_shard("longer").exit_code == 0
    fresh = run_shard("longer", "-o", "fresh")
    assert fresh.exit_code == 0
    assert contents(here / "fresh") == contents(here / "longer-q4-1")
