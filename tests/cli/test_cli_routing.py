"""--debug and --routing of run and logits, and the routing command on what they write."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli import heat_map
from dist_moe.cli.main import execute
from dist_moe.cli.npz_arrays import NpzArrays
from dist_moe.cli.routing_file import RoutingFile, RoutingReader, read_records
from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.engine.routing.routing_record import RoutingBatch
from dist_moe.errors import UsageError
from helpers import launching
from helpers.tiny_model import TinyModel

PROGRAM = (sys.executable, "-m", "dist_moe")
FACTS = RoutingFacts("tiny", 2, 4, 2, (1,), 3, 2, "whole")

MpiRun = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}


@pytest.fixture
def alone(environment: dict[str, str]) -> MpiRun:
    """Run a command without a launcher; it must succeed."""

    def run(*arguments: str) -> launching.Finished:
        done = launching.run(*PROGRAM, *arguments, env=environment)
        assert done.code == 0, done.output
        return done

    return run


@pytest.fixture(scope="module")
def record(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the demo wrote."""
    path = tmp_path_factory.mktemp("record") / "run.npz"
    line = ("run", "-p", "Once upon a time", "-s", "5", "--temperature", "0", "--ignore-eos", "--routing", str(path))
    done = launching.run(*PROGRAM, *line, env=environment)
    assert done.code == 0, done.output
    return path


def batch(step: int, experts_TK: list[list[int]]) -> RoutingBatch:
    """A step of the model of FACTS, whose layer 0 is dense."""
    count = len(experts_TK)
    experts_TLK = np.full((count, 2, 2), -1, np.int16)
    experts_TLK[:, 1] = experts_TK
    numbers = np.arange(count, dtype=np.int32)
    return RoutingBatch(step, numbers * 0, numbers, numbers + 7, experts_TLK, np.ones((count, 2, 2), np.float32))


def write(path: Path, facts: RoutingFacts = FACTS, *steps: list[list[int]]) -> Path:
    with RoutingFile(path, facts) as file:
        for number, experts_TK in enumerate(steps or ([[0, 1], [1, 2]], [[1, 0]])):
            file.append(batch(number, experts_TK))
    return path


# ---- what a run writes and prints ----


def test_a_run_writes_its_routing(record: Path, alone: MpiRun, tmp_path: Path) -> None:
    with np.load(record) as npz:
        arrays = dict(npz)
    facts = json.loads(str(arrays["facts"]))
    tokens = len(arrays["ids"])
    shape = (tokens, facts["layers"], facts["experts_per_token"])
    assert (arrays["experts"].dtype, arrays["experts"].shape) == (np.int16, shape)
    assert (arrays["weights"].dtype, arrays["weights"].shape) == (np.float32, shape)
    assert (facts["model"], facts["ranks"], facts["format_version"]) == ("demo", 1, 1)
    assert arrays["positions"].tolist() == list(range(tokens))
    assert arrays["experts"].max() < facts["experts"]
    # The same tokens by `logits`, in one step: the same picks, bit by bit.
    ids = ",".join(map(str, arrays["ids"].tolist()))
    again = tmp_path / "logits.npz"
    alone("logits", "--ids", ids, "-o", str(tmp_path / "logits.npy"), "--routing", str(again))
    with np.load(again) as npz:
        for name in ("experts", "weights", "ids", "positions", "facts"):
            assert np.array_equal(npz[name], arrays[name]), name
        assert set(npz["step"].tolist()) == {0}
    assert len(set(arrays["step"].tolist())) == 5


@pytest.mark.parametrize(("ranks", "exchange"), [(2, "allreduce"), (3, "allreduce"), (3, "alltoall")])
def test_more_ranks_write_the_same_record(
    ranks: int, exchange: str, record: Path, mpirun: MpiRun, environment, tmp_path: Path
) -> None:
    path = tmp_path / "ranks.npz"
    line = ("run", "-p", "Once upon a time", "-s", "5", "--temperature", "0", "--ignore-eos", "--routing", str(path))
    done = mpirun(ranks, *PROGRAM, *line, "--debug", "routing", "--exchange", exchange, env=environment)
    assert done.code == 0, done.output
    with np.load(path) as found, np.load(record) as expected:
        for name in ("experts", "weights", "ids", "positions", "sequence", "step"):
            assert np.array_equal(found[name], expected[name]), name
        layers = expected["experts"].shape[1]
        assert json.loads(str(found["facts"]))["ranks"] == ranks
        # Rank 0 alone prints.
        assert done.stderr.count("routing: ") == len(expected["ids"]) * layers


def test_debug_prints_what_the_record_holds(record: Path, alone: MpiRun) -> None:
    done = alone("run", "-p", "Once upon a time", "-s", "5", "--temperature", "0", "--ignore-eos", "--debug", "routing")
    lines = [line for line in done.stderr.splitlines() if line.startswith("routing: ")]
    with np.load(record) as npz:
        experts, weights, ids = npz["experts"], npz["weights"], npz["ids"]
    layers = experts.shape[1]
    assert len(lines) == len(ids) * layers
    for number, line in enumerate(lines):
        t, layer = divmod(number, layers)
        pairs = zip(experts[t, layer].tolist(), weights[t, layer].tolist(), strict=True)
        picks = " ".join(f"{expert}:{weight:.4f}" for expert, weight in pairs)
        assert line.startswith(f"routing: sequence 0 position {t} [{ids[t]}] -> ")
        assert line.endswith(f" layer {layer}: {picks}")


@pytest.mark.parametrize(
    "given", [("--debug", "timing,routing"), ("--debug", "timing", "--debug", "routing"), "environment", "config"]
)
def test_debug_words_come_from_anywhere(given, environment, tmp_path: Path) -> None:
    variables, arguments = dict(environment), ()
    if given == "environment":
        variables["DIST_MOE_DEBUG"] = "timing, routing"
    elif given == "config":
        (tmp_path / "c.toml").write_text('debug = "timing,routing"\n')
        arguments = ("--config", str(tmp_path / "c.toml"))
    else:
        arguments = given
    done = launching.run(*PROGRAM, "run", "-p", "Once", "-s", "3", "--ignore-eos", *arguments, env=variables)
    assert done.code == 0, done.output
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("timing: step ")]) == 3
    assert any(line.startswith("routing: ") for line in lines)
    for part in ("embedding", "attention", "experts", "exchange", "lm_head", "sampling", "other", "all"):
        assert any(line.startswith(f"timing: {part} ") for line in lines), part


def test_a_dense_model_has_no_routing(environment, tmp_path: Path) -> None:
    dense = TinyModel(dense_layers=(0, 1)).config_json() | {"model_type": "qwen3", "num_experts": 0}
    dense["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(dense))
    for option in (("--routing", str(tmp_path / "o.npz")), ("--debug", "routing")):
        line = ("run", "-m", str(tmp_path / "hf"), "--prompt-ids", "1", *option)
        done = launching.run(*PROGRAM, *line, env=environment)
        assert done.code == 2, done.output
        assert "this model is dense" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_record_that_cannot_be_written_is_refused_before_the_weights(environment, tmp_path: Path) -> None:
    line = ("run", "-p", "Once", "--routing", str(tmp_path / "nowhere" / "o.npz"))
    done = launching.run(*PROGRAM, *line, env=environment)
    assert done.code == 2, done.output
    assert "cannot be written (No such file or directory)" in done.stderr


# ---- the file ----


def test_records_come_back_step_by_step(tmp_path: Path) -> None:
    reader = RoutingReader(write(tmp_path / "r.npz"))
    assert (reader.facts, reader.tokens) == (FACTS, 3)
    steps = [experts_TLK[:, 1].tolist() for experts_TLK in reader.steps()]
    assert steps == [[[0, 1], [1, 2]], [[1, 0]]]


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RoutingFile(tmp_path / "r.npz", FACTS) as file:
            file.append(batch(0, [[0, 1]]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "r.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_moe.cli.npz_arrays.shutil.copyfileobj", full)
    with pytest.raises(UsageError, match=r"r\.npz: cannot be written \(No space left"):
        write(tmp_path / "r.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_ends_the_run_in_one_line(environment, tmp_path: Path) -> None:
    # The limit on a file's size stands in for a full disk: the rows that are still buffered are refused once more.
    program = (
        "import resource, sys\n"
        "from dist_moe.cli.start import main\n"
        "from dist_moe.cli import probes\n"
        "record = probes.RoutingFile.append\n"
        "def limited(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "    record(*arguments)\n"
        "probes.RoutingFile.append = limited\n"
        "sys.exit(main())\n"
    )
    line = ("run", "-p", "Once", "-n", "600", "--ignore-eos", "--quiet", "--routing", str(tmp_path / "r.npz"))
    done = launching.run(sys.executable, "-c", program, *line, env=environment)
    assert done.code == 2, done.output
    assert "r.npz: cannot be written (File too large): make room" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def _swap(path: Path, **arrays: np.ndarray) -> None:
    with np.load(path) as npz:
        np.savez(path, **(dict(npz) | arrays))


def _garble(path: Path) -> None:
    """Compress the archive, then damage the compressed bytes."""
    with np.load(path) as archive:
        np.savez_compressed(path, **dict(archive))
    data = bytearray(path.read_bytes())
    data[70:110] = b"\xff" * 40
    path.write_bytes(data)


def _change(path: Path, **facts: object) -> None:
    with np.load(path) as npz:
        found = json.loads(str(npz["facts"]))
    _swap(path, facts=np.array(json.dumps(found | facts)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b"no archive"), "not a record of a run's routing"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "not a record of a run's routing"),
        (lambda path: _garble(path), "not a record of a run's routing"),
        (lambda path: np.savez(path, x=np.ones(3)), "not a record of a run's routing"),
        (lambda path: _swap(path, step=np.zeros(9, np.int32)), "experts has the shape"),
        (lambda path: _swap(path, experts=np.full((3, 2, 2), 4, np.int16)), "not one of 0 to 3"),
        (lambda path: _swap(path, facts=np.array('{"format_version": 2}')), "of version 2"),
        (lambda path: _swap(path, facts=np.array('{"format_version": 1}')), "not a record of a run's routing"),
        (lambda path: _swap(path, facts=np.array({"a": 1})), "not a record of a run's routing"),
        (lambda path: _swap(path, facts=np.array("[" * 10**5)), "not a record of a run's routing"),
        (lambda path: _swap(path, experts=np.zeros((3, 2, 2))), "its experts are float64, not integers"),
        (lambda path: _change(path, ranks=0), "ranks: expected a number from 1 to 32767, found 0"),
        (lambda path: _change(path, experts=10**12), "experts: expected a number from 1"),
        (lambda path: _change(path, experts=4.0), "experts: expected a number from 1"),
        (lambda path: _change(path, model=5), "expected texts for model and layout"),
        (lambda path: _change(path, routed_layers=[2]), "routed_layers: expected layers below 2"),
    ],
)
def test_what_is_no_record_is_refused(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.npz")
    damage(path)
    with pytest.raises(UsageError, match=words) as caught:
        execute(["routing", str(path)])
    assert len(str(caught.value).splitlines()) == 1


def test_records_of_one_model_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "1.npz")
    second = write(tmp_path / "2.npz", RoutingFacts("tiny", 2, 4, 2, (1,), 3, 4, "shared"), [[3, 1]])
    execute(["routing", str(first), str(second), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["steps"], found["counts"]) == (4, 3, [[2, 4, 1, 1]])
    assert found["balance"][0]["ranks"] == 2  # as the first job had
    other = write(tmp_path / "3.npz", RoutingFacts("other", 2, 4, 2, (1,), 3, 2, "whole"))
    with pytest.raises(UsageError, match="another model"):
        read_records([first, other])
    with pytest.raises(UsageError, match="twice"):
        read_records([first, first])


# ---- the command ----


def test_the_command_shows_layers_and_balance(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["routing", str(record), "--ranks", "3"])
    text = capsys.readouterr().out
    with np.load(record) as npz:
        experts = npz["experts"]
        facts = json.loads(str(npz["facts"]))
    lines = text.splitlines()
    assert lines[0].startswith(f"demo: {len(experts)} tokens in 5 steps")
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:] if line}
    for layer in range(facts["layers"]):
        counts = np.bincount(experts[:, layer].ravel(), minlength=facts["experts"])
        assert int(rows[str(layer)][0]) == counts.argmax()
        assert int(rows[str(layer)][4]) == (counts == 0).sum()
    assert {"whole", "sliced", "shared", "all"} <= set(rows)
    execute(["routing", str(record), "--ranks", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [balance["ranks"] for balance in found["balance"]] == [3, 3, 3]
    assert all(sum(balance["rank_shares"]) == pytest.approx(1) for balance in found["balance"])
    assert found["layers"][0]["entropy_bits"] <= math.log2(facts["experts"])


def test_the_plot_is_a_picture_of_layers_and_experts(record: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    execute(["routing", str(record), "--plot", str(tmp_path / "heat.png")])
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]
    with pytest.raises(UsageError, match=r"expected a name that ends in one of .*\.png"):
        execute(["routing", str(record), "--plot", str(tmp_path / "heat.txt")])


def test_without_matplotlib_the_extra_is_named(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'dist-moe\[plot\]'"):
        heat_map.require_matplotlib(tmp_path / "heat.png")
    execute(["routing", str(record)])


def test_rows_that_grow_keep_their_order_and_type(tmp_path: Path) -> None:
    with NpzArrays(tmp_path / "a.npz", {"fixed": np.array("ä")}) as arrays:
        for first in range(0, 9, 3):
            arrays.append({"x": np.arange(first, first + 3, dtype=np.int32).reshape(3, 1)})
    with np.load(tmp_path / "a.npz") as npz:
        assert (npz["x"].dtype, npz["x"].ravel().tolist(), str(npz["fixed"])) == (np.int32, list(range(9)), "ä")
    shutil.rmtree(tmp_path)
