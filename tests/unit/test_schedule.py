"""Continuous batching: what each step computes, without a model."""

from __future__ import annotations

import pytest

from dist_moe.engine.requests.prefix_index import PrefixIndex
from dist_moe.engine.requests.request import Request
from dist_moe.engine.requests.schedule import Part, Schedule
from dist_moe.model.step import MAX_LOGIT_ROWS, Fork


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
    index = PrefixIndex(0)
    requests = [request(2, 9), request(30, 9)]
    schedule = Schedule(requests, 7, context=100, step_tokens=8, prefill_chunk=8, prefixes=index)
    first = schedule.next_parts()
    assert sizes(first) == [(0, 2, 0), (1, 6, None)]
    advance(schedule, first)
    second = schedule.next_parts()
    assert sizes(second) == [(0, 1, 0), (1, 7, None)]
    index.release(3)
    step = schedule.step(second, 50)
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
    index = PrefixIndex(0)
    requests = [request(5, 100), request(8, 3), request(3, 0)]
    schedule = Schedule(requests, 0, context=8, step_tokens=64, prefill_chunk=64, prefixes=index)
    while parts := schedule.next_parts():
        advance(schedule, parts)
    assert [len(completion.ids) for completion in schedule.completions] == [3, 0, 0]
    assert sorted(index.take_orders()[1]) == [0, 1, 2]
    schedule.abandon()
    assert index.take_orders() == ((), ())


def test_many_sequences_decode_in_turns() -> None:
    schedule = Schedule([request(1, 9)] * 20, 0, context=99, step_tokens=64, prefill_chunk=64)
    for _ in range(8):
        advance(schedule, schedule.next_parts())
    made = [len(completion.ids) for completion in schedule.completions]
    assert max(made) - min(made) <= 3


def test_abandoned_requests_give_up_their_caches() -> None:
    index = PrefixIndex(0)
    requests = [request(3, 1), request(3, 9), request(3, 9)]
    schedule = Schedule(requests, 5, context=99, step_tokens=7, prefill_chunk=4, prefixes=index)
    advance(schedule, schedule.next_parts())
    schedule.abandon()
    assert index.take_orders() == ((), (5, 6, 7))
    assert schedule.next_parts() == []


def test_requests_wait_for_the_one_that_computes_what_they_share() -> None:
    """The second shares 100 tokens with the first, the third too little, the fourth is the second again."""
    shared = tuple(range(100))
    prompts = [(*shared, 1, 2), (*shared, 3), (*shared[:60], *range(500, 550)), (*shared, 3)]
    requests = [Request(ids, 2) for ids in prompts]
    index = PrefixIndex(0)
    schedule = Schedule(requests, 0, context=999, step_tokens=4096, prefill_chunk=80, prefixes=index)
    seen, forks = [], []
    while parts := schedule.next_parts():
        seen.append(sizes(parts))
        forks.append(schedule.step(parts, 50).forks)
        advance(schedule, parts)
    assert forks == [(), (), (Fork(1, 0, 100), Fork(3, 0, 100)), ()]
    assert seen[0] == [(0, 80, None), (2, 80, None)]
    assert seen[1] == [(0, 22, 0), (2, 30, 1)]
    assert seen[2] == [(0, 1, 0), (2, 1, 1), (1, 1, 2), (3, 1, 3)]
    assert [completion.reused_tokens for completion in schedule.completions] == [0, 100, 0, 100]


@pytest.mark.parametrize("reached", [False, True])
def test_a_request_goes_on_alone_if_the_one_it_waits_for_fails(reached: bool) -> None:
    requests = [Request((*range(100), token), 1) for token in (1, 2)]
    index = PrefixIndex(999)
    schedule = Schedule(
        requests, 0, context=999, step_tokens=4096, prefill_chunk=300 if reached else 90, prefixes=index
    )
    parts = schedule.next_parts()
    assert [part.active.index for part in parts] == [0]
    parts[0].active.cached += parts[0].count
    schedule.finish(parts[0].active, "error", "a NaN")
    [part] = schedule.next_parts()
    step = schedule.step([part], 50)
    assert (part.active.index, step.slices[0].position, step.forks, step.released) == (1, 0, (), (0,))


def test_waiting_requests_do_not_take_the_turns_of_others() -> None:
    """40 equal requests: only the first may run, and the window of 16 must not close over the others."""
    requests = [Request(tuple(range(70)), 3)] * 40
    schedule = Schedule(requests, 0, context=99, step_tokens=64, prefill_chunk=16)
    while parts := schedule.next_parts():
        schedule.step(parts, 50)
        advance(schedule, parts)
    assert [completion.finish_reason for completion in schedule.completions] == ["length"] * 40
    assert [completion.reused_tokens for completion in schedule.completions] == [0] + [69] * 39


def test_a_resident_is_evicted_before_the_running_sequences_need_its_room() -> None:
    index = PrefixIndex(256)  # four blocks
    index.keep(7, tuple(range(1000, 1130)))  # three
    schedule = Schedule([request(200, 9)], 8, context=256, step_tokens=999, prefill_chunk=64, prefixes=index)
    released = []
    while parts := schedule.next_parts():
        released.append(schedule.step(parts, 50).released)
        advance(schedule, parts)
    assert released[:3] == [(), (7,), ()]
