"""Where a step's time goes: every part is told, nothing is negative, nothing is told unasked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dist_moe.cli.probes import Probes
from dist_moe.cli.times_table import TimesTable, step_line
from dist_moe.engine.requests.request import Request
from dist_moe.errors import Interrupted, UsageError
from dist_moe.model.stopwatch import Part, StepTimes, Stopwatch
from helpers.chrome_trace import read_chrome_trace


def test_each_step_is_told_with_its_tokens_and_parts(make_store, make_engine, tiny_directory: Path) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"), prefill_chunk=8)
    told: list[StepTimes] = []
    engine.model.stopwatch.on_step = told.append
    engine.generate([Request(tuple(range(20)), 4)])
    assert [(times.prompt_tokens, times.decoded_tokens) for times in told] == [(8, 0), (8, 0), (4, 0), *[(0, 1)] * 3]
    for times in told:
        assert len(times.seconds) == len(Part)
        assert min(times.seconds) >= 0
        for part in (Part.EMBEDDING, Part.ATTENTION, Part.EXPERTS):
            assert times.seconds[part] > 0
    assert told[0].seconds[Part.LM_HEAD] == 0  # no row of logits yet
    assert told[2].seconds[Part.LM_HEAD] > 0
    assert told[2].seconds[Part.SAMPLING] > 0
    engine.model.stopwatch.on_step = None
    engine.generate([Request((1, 2), 4)])
    assert len(told) == 6


@pytest.mark.parametrize(
    ("owner", "method", "part"),
    [
        ("kernels", "embed", Part.EMBEDDING),
        ("kernels", "attention_half", Part.ATTENTION),
        ("kernels", "experts_half", Part.EXPERTS),
        ("exchange", "sum_exact", Part.EXCHANGE),
        ("kernels", "rmsnorm", Part.LM_HEAD),
        ("kernels", "vocabulary_blocks", Part.SAMPLING),
    ],
)
def test_each_part_is_booked_as_itself(
    owner: str, method: str, part: Part, make_store, make_engine, tiny_directory: Path, monkeypatch
) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"))
    target = getattr(engine.model, owner)
    original, calls = getattr(target, method), []

    def slow(*arguments, **named):
        calls.append(method)
        time.sleep(0.005)
        return original(*arguments, **named)

    monkeypatch.setattr(target, method, slow)
    told: list[StepTimes] = []
    engine.model.stopwatch.on_step = told.append
    engine.generate([Request((1, 2, 3), 2)])
    assert len(calls) >= 2
    assert sum(times.seconds[part] for times in told) >= 0.005 * len(calls)


def test_the_parts_of_a_step_leave_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(2**tick) for tick in range(10))
    monkeypatch.setattr("dist_moe.model.stopwatch.time.perf_counter", lambda: next(clock))
    told: list[StepTimes] = []
    watch = Stopwatch()
    watch.mark(Part.OTHER)  # nobody listens: the clock is not even read
    watch.on_step = told.append
    watch.start()
    for part in (Part.EMBEDDING, Part.ATTENTION, Part.EXPERTS, Part.ATTENTION):
        watch.mark(part)
    watch.finish(1, 0)
    expected = {Part.EMBEDDING: 1.0, Part.ATTENTION: 2.0 + 8.0, Part.EXPERTS: 4.0}
    assert told[0].seconds == tuple(expected.get(part, 0.0) for part in Part)


def test_the_table_adds_up_prefill_and_decode() -> None:
    table = TimesTable()
    assert table.lines() == []
    seconds = tuple(0.001 * (part + 1) for part in Part)
    table.add(StepTimes(10, 0, seconds))
    table.add(StepTimes(0, 2, seconds))
    table.add(StepTimes(0, 2, seconds))
    lines = table.lines()
    assert "prefill (10 tokens in 1 steps)" in lines[0]
    assert "decode (4 tokens in 2 steps)" in lines[0]
    rows = {line.split()[1]: line.replace("|", " ").split()[2:] for line in lines[2:]}
    assert list(rows) == [*(part.label for part in Part), "all"]
    assert rows["attention"] == ["2.000", "0.2000", "7.1%", "4.000", "1.0000", "7.1%"]
    assert rows["all"] == ["28.000", "2.8000", "100.0%", "56.000", "14.0000", "100.0%"]
    line = step_line(3, StepTimes(1, 2, (0.001, *[0.0] * (len(Part) - 1))))
    assert line == "timing: step 3, 1 prompt and 2 decoded tokens: 1.000 ms: embedding 1.000"


def test_notes_cost_no_clock_per_layer(make_store, make_engine, tiny_directory: Path, monkeypatch) -> None:
    """What is always on reads the clock three times a step of one rank alone; a timeline once more for each part."""
    engine = make_engine(make_store(tiny_directory, "q8"))
    reads: list[str] = []
    original = time.perf_counter_ns

    def counted() -> int:
        reads.append("read")
        return original()

    request = Request((1, 2, 3), 4)  # 4 steps
    engine.generate([request])
    monkeypatch.setattr("time.perf_counter_ns", counted)
    engine.generate([request])
    assert len(reads) == 3 * 4
    reads.clear()
    with engine.timeline():
        reads.clear()
        engine.generate([request])
        in_steps = len(reads)
    layers = engine.config.layers
    assert in_steps >= 4 * (3 + 4 * layers)
    reads.clear()
    engine.generate([request])
    assert len(reads) == 3 * 4


def test_an_interrupted_block_is_traced_and_a_failed_one_is_not(
    make_store, make_engine, tiny_directory: Path, tmp_path: Path
) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"))

    def fail(path: Path, error: Exception) -> None:
        with Probes(trace=path).attached(engine):
            engine.generate([Request((1, 2), 3)])
            raise error

    for error, is_written in ((Interrupted("by Ctrl-C"), True), (UsageError("wrong"), False)):
        path = tmp_path / f"{is_written}.json"
        with pytest.raises(type(error)):
            fail(path, error)
        assert path.exists() == is_written
        assert engine.model.stopwatch.log is None
    assert len(read_chrome_trace(tmp_path / "True.json").events[0]) >= 3
