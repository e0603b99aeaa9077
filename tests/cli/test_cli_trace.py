"""`--stats` and `--trace` of run and logits."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli.chrome_trace import dropped_steps_line, write_chrome_trace
from dist_moe.engine.watch.accounts import split_notes
from dist_moe.engine.watch.timeline import Timeline
from dist_moe.errors import UsageError
from dist_moe.model.stopwatch import Marks, Part
from dist_moe.parallel.clocks import ClockSample
from dist_moe.parallel.ledger import Kind, Notes
from dist_moe.parallel.progress import Phase
from helpers import launching
from helpers.chrome_trace import read_chrome_trace
from helpers.jobs import Job, slow
from helpers.launching import flavour

PROGRAM = (sys.executable, "-m", "dist_moe")
LINE = ("run", "-p", "Once upon a time", "-n", "4", "--temperature", "0", "--ignore-eos")
GOLDEN = str(Path(__file__).parents[1] / "golden" / "models" / "base")
LAYERS = 4  # of the demo model
ALIKE = ClockSample(0, np.zeros(2, np.int64), 0)

MpiRun = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1", "DIST_MOE_YIELD": "1"}
    assert launching.run(*PROGRAM, *LINE, env=env).code == 0
    return env


def one_step(number: int) -> tuple[Notes, Marks]:
    """Two ranks: 10 us of attention (rank 1: 14), a sum, 1 us for adding it, then the draw; a ms per number later."""
    zero = number * 1_000_000
    exchange_R = np.array([[[10_000, 15_000]], [[14_000, 15_500]]]) + zero
    notes = Notes(
        kind_n=np.array([Kind.SUMS]),
        place_n=np.array([3 * 16 + Phase.ATTENTION]),
        begin_n=exchange_R[..., 0],
        end_n=exchange_R[..., 1],
        wire_n=np.array([[100], [0]]),
        shared_n=np.array([[7], [7]]),
        first_S=np.array([0]),
        stop_S=np.array([1]),
        step_begin_S=np.array([[zero], [zero + 500]]),
        step_end_S=np.array([[zero + 20_000], [zero + 20_000]]),
        prompt_S=np.array([0]),
        decoded_S=np.array([2]),
        drawn_S=np.array([zero + 30_000]),
        work_SL2=np.zeros((2, 1, 4, 2), np.int64),
        dropped=0,
    )
    marks = Marks(
        part_M=np.array([Part.ATTENTION, Part.EXCHANGE, Part.ATTENTION]),
        layer_M=np.array([3, 3, 3]),
        time_M=np.array([[9_900, 15_100, 16_100], [13_900, 15_600, 16_600]]) + zero,
        first_S=np.array([0]),
        stop_S=np.array([3]),
    )
    return notes, marks


def timeline_of(steps: int, most_spans: int = 1000) -> Timeline:
    timeline = Timeline(most_spans)
    for number in range(steps):
        notes, marks = one_step(number)
        timeline.add(split_notes(notes, ALIKE, ALIKE), marks, ALIKE, ALIKE)
    return timeline


def test_a_step_is_drawn_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(path, timeline_of(2), ("alpha", "beta"))
    trace = read_chrome_trace(path)
    assert trace.names == {0: "rank 0 on alpha", 1: "rank 1 on beta"}
    assert trace.other == {"steps": 2, "dropped_steps": 0}
    first, drawn, second, _ = trace.events[0]
    assert (first.name, first.begin_ns, first.end_ns) == ("step 0", 0, 20_000)
    assert first.args == {"prompt tokens": 0, "decoded tokens": 2}
    assert (drawn.name, drawn.begin_ns, drawn.end_ns) == ("draw and print", 20_000, 30_000)
    assert (second.name, second.begin_ns) == ("step 1", 1_000_000)
    half, sums, added = first.children
    assert (half.name, half.begin_ns, half.end_ns, half.args) == ("attention 3", 0, 9_900, {"layer": 3})
    assert (sums.name, sums.begin_ns, sums.end_ns) == ("sums", 10_000, 15_000)
    assert sums.args == {"layer": 3, "bytes": 107, "wait_us": 4.0, "wire_us": 1.0}
    assert [(wait.name, wait.begin_ns, wait.end_ns) for wait in sums.children] == [("wait", 10_000, 14_000)]
    assert (added.name, added.begin_ns, added.end_ns) == ("attention 3", 15_100, 16_100)
    (step_1,) = (event for event in trace.events[1] if event.name == "step 0")
    (late,) = step_1.named("sums")
    assert (late.args["wait_us"], late.args["wire_us"], late.children) == (0.0, 1.5, [])


def test_a_long_run_keeps_its_end_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = timeline_of(10, most_spans=3 * timeline_of(1).spans_at_most + 1)
    write_chrome_trace(path, timeline, ("a", "a"))
    trace = read_chrome_trace(path)
    assert [event.name for event in trace.events[1]] == ["step 7", "step 8", "step 9"]
    assert trace.other == {"steps": 3, "dropped_steps": 7}
    assert "the last 3 steps, 7 earlier ones are left out" in dropped_steps_line(path, timeline)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_chrome_trace(tmp_path / "absent" / "trace.json", timeline_of(1), ("a", "a"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_a_run_writes_a_lane_per_rank(ranks: int, mpirun: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    command = (*PROGRAM, *LINE, "--trace", str(path), "--stats")
    done = mpirun(ranks, *command, env=environment) if ranks else launching.run(*command, env=environment)
    assert done.code == 0, done.output
    trace = read_chrome_trace(path)
    lanes = max(1, ranks)
    assert trace.names == {rank: f"rank {rank} on {socket.gethostname()}" for rank in range(lanes)}
    for rank in range(lanes):
        steps = [event for event in trace.events[rank] if event.category == "step"]
        assert [step.name for step in steps] == [f"step {n}" for n in range(4)]  # the prompt's, then three decodes
        for step in steps:
            assert len(step.named("lm_head")) == 1
            assert len(step.named("sums")) == (2 * LAYERS if ranks > 1 else 0)
            for layer in range(LAYERS):
                assert step.named(f"attention {layer}")
                assert step.named(f"experts {layer}")
    assert [event.name for event in trace.events[0]].count("draw and print") == 4
    table = [line for line in done.stderr.splitlines() if line.startswith("stats: ")]
    assert table[0].startswith("stats: prefill: ")
    assert any(line.startswith("stats: decode: 3 tokens in 3 steps") for line in table)
    assert " is limited by " in table[-1]
    assert any("straggling" in line for line in table) == (ranks > 1)


def test_the_table_as_data(mpirun: MpiRun, environment: dict[str, str]) -> None:
    done = mpirun(2, *PROGRAM, *LINE, "--stats", "--json", env=environment)
    assert done.code == 0, done.output
    stats = json.loads(done.stdout)["stats"]
    assert (stats["decode"]["tokens"], stats["decode"]["steps"]) == (3, 3)
    assert [rank["host"] for rank in stats["decode"]["ranks"]] == [socket.gethostname()] * 2
    assert stats["decode"]["exchanges"]["sums"]["calls"] == 3 * 2 * LAYERS
    assert stats["decode"]["straggling"]["ranks"] >= 1
    assert min(min(v for v in rank.values() if v != rank["host"]) for rank in stats["prefill"]["ranks"]) >= 0


def test_nothing_is_printed_unasked(environment: dict[str, str]) -> None:
    assert "stats:" not in launching.run(*PROGRAM, *LINE, env=environment).output


def test_a_reference_trace_and_a_trace_of_the_run_are_two_things(environment: dict[str, str], tmp_path: Path) -> None:
    """`run STORE STEPS TRACE` compares tokens; --trace beside it writes times."""
    ids, out = tmp_path / "ids.npy", tmp_path / "times.json"
    np.save(ids, np.arange(5))
    done = launching.run(*PROGRAM, "run", GOLDEN, "2", str(ids), "--trace", str(out), env=environment)
    assert "2 steps as in" in done.stdout, done.output
    assert len(read_chrome_trace(out).events[0]) >= 1


def test_logits_can_be_traced(environment: dict[str, str], tmp_path: Path) -> None:
    ids, out = tmp_path / "ids.npy", tmp_path / "times.json"
    np.save(ids, np.arange(9))
    command = ("logits", "--ids", str(ids), "--output", str(tmp_path / "l.npy"), "--trace", str(out), "--stats")
    done = launching.run(*PROGRAM, *command, env=environment)
    assert done.code == 0, done.output
    assert read_chrome_trace(out).events[0][0].args == {"prompt tokens": 9, "decoded tokens": 0}
    assert "stats: prefill: 9 tokens in 1 steps" in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_the_run(environment: dict[str, str], tmp_path: Path) -> None:
    done = launching.run(*PROGRAM, *LINE, "--trace", str(tmp_path), env=environment)
    assert done.code == 2
    assert done.stdout == ""


def test_a_disk_that_is_full_at_the_end_takes_the_trace_alone(environment: dict[str, str], tmp_path: Path) -> None:
    path, kept = tmp_path / "trace.json", tmp_path / "kept"
    launching.run(*PROGRAM, *LINE, env=environment)  # the packed model is there
    options = ("--trace", str(path), "--stats", "--json", "--prompt-cache", str(kept))
    limit = "import os, resource, sys"
    limit += "\nresource.setrlimit(resource.RLIMIT_FSIZE, (11000, 11000))"
    limit += "\nos.execv(sys.argv[1], sys.argv[1:])"
    done = launching.run(sys.executable, "-c", limit, *PROGRAM, *LINE, *options, env=environment)
    assert done.code == 2, done.output
    assert len(json.loads(done.stdout)["ids"]) == 4
    assert done.stderr.count("dist-moe: error: ") == 1
    assert f"{path}: cannot be written (File too large)" in done.stderr
    assert sorted(tmp_path.iterdir()) == [kept]


@pytest.mark.faults
@pytest.mark.skipif(flavour() == "openmpi", reason="prterun kills the ranks itself")
def test_control_c_writes_the_trace(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Job(2, *slow(), "--trace", str(path), env=environment) as job:
        job.wait_for_text()
        job.hit(job.process.pid, signal.SIGINT)
        ended = job.end(45)
    assert ended.code == 130, ended
    trace = read_chrome_trace(path)
    assert set(trace.events) == {0, 1}
