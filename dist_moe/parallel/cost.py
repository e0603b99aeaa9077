"""What a step's exchanges between nodes cost: bytes on the wire, exchanges one after another, seconds. Pure, no MPI.

Every node takes part with one contribution, and links are full duplex: what counts is what one node sends, which is
what it receives. T tokens · D model dim · N nodes · E experts · K experts per token
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb
from typing import Literal, get_args

from dist_moe.model_config import ModelConfig
from dist_moe.sum_bytes import EXACT_SUM_BYTES, FINISHED_SUM_BYTES

ExchangeKind = Literal["allreduce", "alltoall"]
EXCHANGES: tuple[ExchangeKind, ...] = get_args(ExchangeKind)

QUANTIZED_OPERAND_BYTES = 1.125  # of a value that a kernel takes: int8, and one f32 scale for 32 of them
FLOAT_OPERAND_BYTES = 4.0
ROUTING_BYTES = 8.0  # of one choice: the expert's number, and the weight of what it makes
PACK_S = 0.35e-9  # to pack one value, or to unpack and add it
SUM_CALL_S = 50e-6  # of a sum over nodes beside wire and packing: calls, and speakers that wait for each other
TOKEN_CALL_S = 90e-6  # likewise of one exchange of tokens, which finds out who needs which

# Much travels in messages that keep the wire busy for so long: then packing, the wire and adding overlap.
MESSAGE_S = 1.5e-4

LARGEST_STEP_TOKENS = 65536
LOOKED_AT_TOKENS = 256  # up to here every count is looked at: few tokens do not divide evenly


@dataclass(frozen=True)
class LinkCosts:
    """What a message between two hosts costs: `latency_s` + bytes / `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    @property
    def message_bytes(self) -> float:
        """Bytes of a message where much travels."""
        return self.bytes_per_s * MESSAGE_S

    def seconds(self, messages: float, sent_bytes: float) -> float:
        """Of messages one after the other, and their bytes."""
        return messages * self.latency_s + sent_bytes / self.bytes_per_s


# Of MPI over TCP, or verbs for the last: latency with the software's part, and payload rate.
PRESET_LINKS = {
    "1gbe": LinkCosts(45e-6, 0.117e9),
    "10gbe": LinkCosts(20e-6, 1.15e9),
    "ib100": LinkCosts(2e-6, 11e9),
}


@dataclass(frozen=True)
class WireShape:
    """What of a model decides its exchanges."""

    layers: int
    dense_layers: int
    model_dim: int
    experts: int
    experts_per_token: int
    operand_bytes: float  # of a value, as the kernels take it

    @classmethod
    def of(cls, config: ModelConfig, quantized: bool) -> WireShape:
        """Of a model whose weights are quantized, or not."""
        return cls(
            layers=config.layers,
            dense_layers=len(config.dense_layers),
            model_dim=config.model_dim,
            experts=config.experts,
            experts_per_token=config.experts_per_token,
            operand_bytes=QUANTIZED_OPERAND_BYTES if quantized else FLOAT_OPERAND_BYTES,
        )


@dataclass(frozen=True)
class Traffic:
    """What one node sends.

    Attributes:
        bytes: On the wire.
        phases: Exchanges one after another; each pays the link's latency.
        packed: Values that the node packs and unpacks.
        calls_s: Seconds of the software around all that.
    """

    bytes: float = 0.0
    phases: float = 0.0
    packed: float = 0.0
    calls_s: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        """One after the other."""
        return Traffic(
            self.bytes + other.bytes,
            self.phases + other.phases,
            self.packed + other.packed,
            self.calls_s + other.calls_s,
        )

    def __mul__(self, count: float) -> Traffic:
        """As often as `count`."""
        return Traffic(self.bytes * count, self.phases * count, self.packed * count, self.calls_s * count)

    def wire_seconds(self, link: LinkCosts) -> float:
        """Latencies and bytes / rate."""
        return link.seconds(self.phases, self.bytes)

    def seconds(self, link: LinkCosts) -> float:
        """The wire's time, and that of packing and calls."""
        return self.wire_seconds(link) + self.packed * PACK_S + self.calls_s


@lru_cache(maxsize=64)
def touch_probability(experts: int, picked: int, nodes: int) -> float:
    """How likely a node owns at least one of the experts that a token picks, if all are equally likely; mean of nodes.

    Args:
        experts: Of the layer, dealt out in runs whose lengths differ by at most one.
        picked: Different experts that a token picks.
        nodes: That share them.
    """
    length, longer = divmod(experts, nodes)
    missed = longer * comb(experts - length - 1, picked) + (nodes - longer) * comb(experts - length, picked)
    return 1.0 - missed / (nodes * comb(experts, picked))


def sum_traffic(values: float, nodes: int, link: LinkCosts) -> Traffic:
    """An exact sum over nodes of so many values: in one phase or in two, as `HostSums` chooses."""
    if nodes == 1:
        return Traffic()
    others = nodes - 1
    one_phase = Traffic(others * values * EXACT_SUM_BYTES, 1, 2 * others * values, SUM_CALL_S)
    share = others / nodes * values
    two_phases = Traffic(share * (EXACT_SUM_BYTES + FINISHED_SUM_BYTES), 2, 2 * share, SUM_CALL_S)
    if nodes == 2:
        return one_phase
    return one_phase if one_phase.wire_seconds(link) <= two_phases.wire_seconds(link) else two_phases


def allreduce_layer(shape: WireShape, nodes: int, tokens: float, link: LinkCosts) -> Traffic:
    """A layer whose sums of attention and of the experts reach every node."""
    return sum_traffic(tokens * shape.model_dim, nodes, link) * 2


def alltoall_layer(shape: WireShape, nodes: int, tokens: int, dense: bool = False) -> Traffic:
    """A layer whose tokens are dealt out to nodes.

    The operand of attention goes to all, its sums to the tokens' owners, the routing to all, the experts' operand to
    the nodes that own some of a token's experts, and their sums back.
    """
    if nodes == 1:
        return Traffic()
    # The node that has most tokens decides: at T < N one of them receives all that there is.
    rows = (nodes - 1) * ceil(tokens / nodes)
    values = rows * shape.model_dim
    touched = 1.0 if dense else touch_probability(shape.experts, shape.experts_per_token, nodes)
    call_s = TOKEN_CALL_S
    gathered = Traffic(values * shape.operand_bytes, 1, 0, call_s)
    scattered = Traffic(values * EXACT_SUM_BYTES, 1, 2 * values, call_s)
    routed = Traffic() if dense else Traffic(rows * shape.experts_per_token * ROUTING_BYTES, 1, 0, call_s)
    dispatched = Traffic(values * touched * shape.operand_bytes, 1, 0, call_s)
    returned = Traffic(values * touched * EXACT_SUM_BYTES, 1, 2 * values * touched, call_s)
    return gathered + scattered + routed + dispatched + returned


def step_traffic(shape: WireShape, nodes: int, tokens: int, exchange: ExchangeKind, link: LinkCosts) -> Traffic:
    """All layers of a step; the few bytes of its words and of the drawn candidates are not counted."""
    if exchange == "allreduce":
        return allreduce_layer(shape, nodes, tokens, link) * shape.layers
    routed = alltoall_layer(shape, nodes, tokens) * (shape.layers - shape.dense_layers) if shape.experts else Traffic()
    return routed + alltoall_layer(shape, nodes, tokens, dense=True) * shape.dense_layers


@dataclass(frozen=True)
class ExchangeTable:
    """Ascending token counts at which the quicker exchange changes; below the first one it is allreduce."""

    changes: tuple[int, ...]


def exchange_table(shape: WireShape, nodes: int, link: LinkCosts) -> ExchangeTable:
    """For every number of tokens the exchange that costs less, found once; ties go to allreduce."""

    def wins(tokens: int) -> bool:
        return step_traffic(shape, nodes, tokens, "alltoall", link).seconds(link) < step_traffic(
            shape, nodes, tokens, "allreduce", link
        ).seconds(link)

    return ExchangeTable(tuple(_changes(wins)))


def choose_exchange(tokens: int, table: ExchangeTable) -> ExchangeKind:
    """The exchange for a step of so many tokens; the same on every rank that has the same table."""
    return "alltoall" if bisect_right(table.changes, tokens) % 2 else "allreduce"


def _changes(wins: Callable[[int], bool]) -> Iterator[int]:
    """Where a yes/no function of tokens changes, from no: looked at one by one, then between powers of two."""
    before = False
    for tokens in range(1, LOOKED_AT_TOKENS + 1):
        if wins(tokens) != before:
            before = not before
            yield tokens
    first = LOOKED_AT_TOKENS
    while first < LARGEST_STEP_TOKENS:
        last = 2 * first
        if wins(last) != before:
            before, low, high = not before, first, last
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if wins(middle) == before else (middle, high)
            yield high
        first = last
