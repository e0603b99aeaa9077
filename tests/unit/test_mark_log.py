"""The marks of steps: whole steps in their order, and none of a step that an exception left."""

from __future__ import annotations

from dist_moe.model.stopwatch import MarkLog, Marks, Part
from dist_moe.parallel.progress import Progress


def steps_of(marks: Marks) -> list[list[Part]]:
    """The parts of each step."""
    bounds = zip(marks.first_S, marks.stop_S, strict=True)
    assert len(marks.part_M) == len(marks.layer_M) == len(marks.time_M)
    return [[Part(part) for part in marks.part_M[first:stop]] for first, stop in bounds]


def step(log: MarkLog, *parts: Part, ends: bool = True) -> None:
    log.begin_step()
    for part in parts:
        log.add(part)
    if ends:
        log.end_step()


def test_marks_between_steps_are_not_kept() -> None:
    log = MarkLog(Progress())
    log.add(Part.SAMPLING)
    step(log, Part.EMBEDDING, Part.ATTENTION)
    log.add(Part.SAMPLING)
    step(log, Part.EXPERTS)
    assert steps_of(log.take()) == [[Part.EMBEDDING, Part.ATTENTION], [Part.EXPERTS]]
    assert steps_of(log.take()) == []


def test_a_step_that_an_exception_left_is_forgotten_with_what_came_after_it() -> None:
    log = MarkLog(Progress())
    step(log, Part.EMBEDDING)
    step(log, Part.ATTENTION, ends=False)
    log.add(Part.SAMPLING)
    step(log, Part.EXPERTS)
    assert steps_of(log.take()) == [[Part.EMBEDDING], [Part.EXPERTS]]
    step(log, Part.ATTENTION, ends=False)
    assert steps_of(log.take()) == []
    log.add(Part.SAMPLING)
    step(log, Part.LM_HEAD)
    marks = log.take()
    assert steps_of(marks) == [[Part.LM_HEAD]]
    assert len(marks.part_M) == 1
