"""What exchanges between nodes cost: bytes and seconds by hand, and the choice between two ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.engine.start.exchange_rule import describe_table, partition_rule
from dist_moe.parallel.cost import (
    EXCHANGES,
    LARGEST_STEP_TOKENS,
    LOOKED_AT_TOKENS,
    PACK_S,
    PRESET_LINKS,
    SUM_CALL_S,
    TOKEN_CALL_S,
    ExchangeKind,
    ExchangeTable,
    LinkCosts,
    Traffic,
    WireShape,
    allreduce_layer,
    alltoall_layer,
    choose_exchange,
    exchange_table,
    step_traffic,
    sum_traffic,
    touch_probability,
)

GIGABIT = PRESET_LINKS["1gbe"]
SMALL = WireShape(layers=3, dense_layers=1, model_dim=32, experts=4, experts_per_token=2, operand_bytes=1.125)
LARGE = WireShape(layers=48, dense_layers=0, model_dim=2048, experts=128, experts_per_token=8, operand_bytes=1.125)
links = st.builds(LinkCosts, st.floats(1e-6, 1e-3), st.floats(1e7, 1e11))


@pytest.mark.parametrize(
    ("experts", "picked", "nodes", "probability"),
    [
        (4, 1, 2, 1 / 2),
        (4, 2, 2, 5 / 6),  # of the 6 pairs one lies on the other node
        (3, 1, 2, 1 / 2),  # 2/3 for the node with two of them, 1/3 for the other
        (8, 8, 4, 1.0),
        (128, 8, 2, 0.997),  # the rest: table 2.1 of the design's sources, to three digits
        (128, 8, 4, 0.907),
        (128, 8, 8, 0.667),
        (128, 8, 16, 0.412),
    ],
)
def test_how_likely_a_node_is_touched(experts: int, picked: int, nodes: int, probability: float) -> None:
    assert touch_probability(experts, picked, nodes) == pytest.approx(probability, abs=5e-4)


def test_two_nodes_add_one_token_in_one_phase() -> None:
    # 2048 values of 4.5 bytes: 45 us + 9216 B / 117 MB/s = 124 us; two phases 90 us + 8704 B / 117 MB/s = 164 us.
    assert sum_traffic(2048, 2, GIGABIT) == Traffic(bytes=9216, phases=1, packed=4096, calls_s=SUM_CALL_S)


def test_four_nodes_add_one_token_in_two_phases() -> None:
    # One phase 45 us + 3 x 9216 B / 117 MB/s = 281 us; two 90 us + 3/4 x 2048 x 8.5 B / 117 MB/s = 202 us.
    assert sum_traffic(2048, 4, GIGABIT) == Traffic(bytes=13056, phases=2, packed=3072, calls_s=SUM_CALL_S)


def test_a_layer_by_allreduce_is_two_sums() -> None:
    # 26.1 KB per token of 2048 values on 4 nodes: 2 x 13056.
    assert allreduce_layer(LARGE, 4, 512, GIGABIT).bytes == 512 * 26112


def test_a_layer_by_alltoall() -> None:
    # Each of 2 nodes has 2 of 4 tokens, 64 values: operand x 1.125 = 72, sums x 4.5 = 288, routing 2 x 2 x 8 = 32, and
    # 5/6 of operand and sums again: 60 and 240.
    traffic = alltoall_layer(SMALL, 2, 4)
    assert traffic.bytes == pytest.approx(72 + 288 + 32 + 60 + 240)
    assert (traffic.phases, traffic.calls_s) == (5, pytest.approx(5 * TOKEN_CALL_S))
    assert traffic.packed == pytest.approx(2 * 64 * (1 + 5 / 6))
    dense = alltoall_layer(SMALL, 2, 4, dense=True)
    assert (dense.bytes, dense.phases) == (72 + 288 + 72 + 288, 4)


def test_one_token_of_four_nodes_has_one_owner_that_receives_from_all() -> None:
    # 3 x 1 token of 32 values, though 3/4 of a token would be each node's mean.
    assert alltoall_layer(SMALL, 4, 1, dense=True).bytes == 3 * 32 * 2 * (1.125 + 4.5)


def test_a_step_is_its_layers() -> None:
    routed, dense = alltoall_layer(SMALL, 2, 4), alltoall_layer(SMALL, 2, 4, dense=True)
    assert step_traffic(SMALL, 2, 4, "alltoall", GIGABIT).bytes == pytest.approx(2 * routed.bytes + dense.bytes)
    assert step_traffic(SMALL, 2, 4, "allreduce", GIGABIT) == allreduce_layer(SMALL, 2, 4, GIGABIT) * 3


def test_seconds_are_latencies_bytes_and_packing() -> None:
    traffic = Traffic(bytes=1000, phases=3, packed=1e6, calls_s=0.25)
    assert traffic.wire_seconds(LinkCosts(2e-3, 1e6)) == pytest.approx(7e-3)
    assert traffic.seconds(LinkCosts(2e-3, 1e6)) == pytest.approx(7e-3 + 1e6 * PACK_S + 0.25)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_node_sends_nothing(exchange: ExchangeKind) -> None:
    assert step_traffic(LARGE, 1, 99, exchange, GIGABIT) == Traffic()


@given(st.integers(2, 16), st.integers(1, 2000), st.integers(0, 500), links, st.sampled_from(EXCHANGES))
def test_more_tokens_never_take_less_time(
    nodes: int, tokens: int, more: int, link: LinkCosts, exchange: ExchangeKind
) -> None:
    fewer = step_traffic(LARGE, nodes, tokens, exchange, link).wire_seconds(link)
    assert step_traffic(LARGE, nodes, tokens + more, exchange, link).wire_seconds(link) >= fewer * (1 - 1e-12)


@given(st.integers(2, 16), st.integers(1, 2000), links, st.floats(1, 10), st.sampled_from(EXCHANGES))
def test_a_better_link_never_takes_more_time(
    nodes: int, tokens: int, link: LinkCosts, factor: float, exchange: ExchangeKind
) -> None:
    better = LinkCosts(link.latency_s / factor, link.bytes_per_s * factor)
    now = step_traffic(LARGE, nodes, tokens, exchange, link).wire_seconds(link)
    assert step_traffic(LARGE, nodes, tokens, exchange, better).wire_seconds(better) <= now * (1 + 1e-12)


@given(st.integers(2, 16), links, st.integers(1, LARGEST_STEP_TOKENS))
def test_the_choice_is_the_quicker_exchange(nodes: int, link: LinkCosts, tokens: int) -> None:
    seconds = {name: step_traffic(LARGE, nodes, tokens, name, link).seconds(link) for name in EXCHANGES}
    chosen = choose_exchange(tokens, exchange_table(LARGE, nodes, link))
    # Beyond the counts that are all looked at, a change may lie some tokens off.
    slack = 1 if tokens <= LOOKED_AT_TOKENS else 1.05
    assert seconds[chosen] <= min(seconds.values()) * slack


def test_a_table_is_read_from_its_changes() -> None:
    table = ExchangeTable((3, 10))
    assert [choose_exchange(tokens, table) for tokens in (1, 2, 3, 9, 10, 11)] == [
        *["allreduce"] * 2,
        *["alltoall"] * 2,
        *["allreduce"] * 2,
    ]


def test_the_rule_of_a_job() -> None:
    assert partition_rule("alltoall", LARGE, 1, None)(1)
    assert not partition_rule("auto", LARGE, 1, None)(999)
    assert not partition_rule("allreduce", LARGE, 4, GIGABIT)(512)
    automatic = partition_rule("auto", LARGE, 4, GIGABIT)
    assert not automatic(1)
    assert automatic(512)


def test_the_rule_is_logged_in_words() -> None:
    costs = "a message between hosts takes 45 us and 1 s per 117 MB"
    assert describe_table(ExchangeTable(()), GIGABIT) == f"{costs}; auto takes allreduce for every step"
    words = "auto takes allreduce for small steps, alltoall from 3 tokens, allreduce from 9 tokens"
    assert describe_table(ExchangeTable((3, 9)), GIGABIT) == f"{costs}; {words}"
