"""Continuous batching: what each step computes, without a model."""

from __future__ import annotations

from dist_moe.engine.request import Request
from dist_moe.engine.schedule import Part, Schedule
from dist_moe.model.step import MAX_LOGIT_ROWS


def request(length: int, max_tokens: int = 2) -> Request:
    return Request(tuple(range(length)), max_tokens)


def advance(schedule: Schedule, parts: list[Part], token: int = 99) -> None:
    """What the engine does after a step: every part that reached its end draws a token."""
    for part in parts:
        part.active.cached += part.count
        if part.row is not None:
            part.active.completion.ids.append(token)
            if len(part.active.completion.ids) == part.active.limit:
                schedule.finish(part.active, "length")


def sizes(parts: list[Part]) -> list[tuple[int, int, int | None]]:
    return [(part.active.index, part.count, part.row) for part in parts]


def test_prefill_is_cut_into_chunks_and_only_the_last_token_gets_a_row() -> None:
    schedule = Schedule([request(10)], 0, context=100, step_tokens=16, prefill_chunk=4)
    seen = []
    while parts := schedule.next_parts():
        seen.append(sizes(parts))
        advance(schedule, parts)
    assert seen == [[(0, 4, None)], [(0, 4, None)], [(0, 2, 0)], [(0, 1, 0)]]


def test_decodes_come_before_prefills_and_share_the_step() -> None:
    schedule = Schedule([request(2, 9), request(30, 9)], 7, context=100, step_tokens=8, prefill_chunk=8)
    first = schedule.next_parts()
    assert sizes(first) == [(0, 2, 0), (1, 6, None)]
    advance(schedule, first)
    second = schedule.next_parts()
    assert sizes(second) == [(0, 1, 0), (1, 7, None)]
    step = schedule.step(second, 50, (3,))
    assert [(part.sequence, part.position, part.ids) for part in step.slices] == [
        (7, 2, (99,)),
        (8, 6, tuple(range(6, 13))),
    ]
    assert (step.logit_rows, step.valid_vocabulary, step.released) == ((0,), 50, (3,))


def test_a_step_never_asks_for_more_rows_than_fit() -> None:
    schedule = Schedule([request(1)] * 40, 0, context=9, step_tokens=64, prefill_chunk=64)
    done = 0
    while parts := schedule.next_parts():
        assert len([part for part in parts if part.row is not None]) <= MAX_LOGIT_ROWS
        advance(schedule, parts)
        done += 1
    assert done == 5
    assert [completion.finish_reason for completion in schedule.completions] == ["length"] * 40


def test_the_context_limits_what_is_generated() -> None:
    schedule = Schedule([request(5, 100), request(8, 3), request(3, 0)], 0, context=8, step_tokens=64, prefill_chunk=64)
    while parts := schedule.next_parts():
        advance(schedule, parts)
    assert [len(completion.ids) for completion in schedule.completions] == [3, 0, 0]
    assert sorted(schedule.take_released()) == [0, 1, 2]
    assert schedule.abandon() == ()
    assert schedule.take_released() == ()


def test_many_sequences_decode_in_turns() -> None:
    schedule = Schedule([request(1, 9)] * 20, 0, context=99, step_tokens=64, prefill_chunk=64)
    for _ in range(8):
        advance(schedule, schedule.next_parts())
    made = [len(completion.ids) for completion in schedule.completions]
    assert max(made) - min(made) <= 3


def test_abandoned_requests_give_up_their_caches() -> None:
    schedule = Schedule([request(3, 1), request(3, 9), request(3, 9)], 5, context=99, step_tokens=7, prefill_chunk=4)
    advance(schedule, schedule.next_parts())
    assert schedule.abandon() == (5, 6, 7)
    assert schedule.next_parts() == []
