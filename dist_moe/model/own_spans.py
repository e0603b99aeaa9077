"""Where in the mapped files one rank's weights lie: what it will read, as few long runs of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.plan import Plan
from dist_moe.store.reader import Store
from dist_moe.store.unit_parts import unit_sizes
from dist_moe.store.units import UnitKind

_GAP_BYTES = 4096  # tensors are padded to less; nobody skips less than a page


class Span(NamedTuple):
    """A run of mapped bytes."""

    address: int
    bytes: int


@dataclass(frozen=True)
class OwnSpans:
    """What a rank reads, ascending: `own` by itself, `shared` together with all ranks of its host."""

    own: tuple[Span, ...]
    shared: tuple[Span, ...]


def own_spans(store: Store, plan: Plan, routed_layers: int) -> OwnSpans:
    """This rank's part of the mapped files.

    Args:
        store: The open store, with all that the plan needs.
        plan: The rank's share.
        routed_layers: Of so many layers, from the first on, the chunks of routed experts belong to it; with 0 it is
            what every token reads.
    """
    config = store.config
    own: list[Span] = []
    shared = [store.common_span()]
    for layer in range(config.layers):
        own += _spans(store, "head", layer, plan.heads)
        own += _spans(store, "kv_head", layer, plan.kv_heads)
        if layer >= routed_layers and not config.is_dense(layer):
            continue
        dealt_out = plan.owned_chunks(layer) is None
        (shared if dealt_out else own).extend(_spans(store, "chunk", layer, plan.readable_chunks(layer)))
    own += _spans(store, "vocabulary", 0, plan.vocabulary_blocks)
    return OwnSpans(tuple(joined(own)), tuple(joined(Span(*span) for span in shared)))


def joined(spans: Iterable[tuple[int, int]]) -> Iterator[Span]:
    """Runs of bytes, ascending, those that touch as one."""
    first = end = 0
    for address, count in sorted(spans):
        if address > end + _GAP_BYTES:
            if end:
                yield Span(first, end - first)
            first = address
        end = max(end, address + count)
    if end:
        yield Span(first, end - first)


def dealt(spans: Sequence[Span], part: int, parts: int) -> Iterator[Span]:
    """One of `parts` equal parts of some runs of bytes; all of them together are the whole."""
    total = sum(span.bytes for span in spans)
    first, last = total * part // parts, total * (part + 1) // parts
    before = 0
    for span in spans:
        begin, end = max(first, before), min(last, before + span.bytes)
        if begin < end:
            yield Span(span.address + begin - before, end - begin)
        before += span.bytes


def pieces(spans: Iterable[Span], most_bytes: int) -> Iterator[Span]:
    """The same bytes in pieces of at most `most_bytes`."""
    for span in spans:
        for first in range(0, span.bytes, most_bytes):
            yield Span(span.address + first, min(most_bytes, span.bytes - first))


def _spans(store: Store, kind: UnitKind, layer: int, wanted: Iterable[int] | npt.NDArray[np.int64]) -> list[Span]:
    """The runs of bytes in which some units of one kind and layer lie."""
    indices = np.fromiter(wanted, np.int64)
    addresses = store.unit_addresses(kind, layer)[indices].astype(np.int64)
    here = np.flatnonzero(addresses > 0)
    order = here[np.argsort(addresses[here])]
    if not len(order):
        return []
    first_n, stop_n = addresses[order], addresses[order] + unit_sizes(store.manifest, kind, layer)[indices[order]]
    breaks = np.flatnonzero(first_n[1:] != stop_n[:-1]) + 1
    firsts, lasts = first_n[[0, *breaks]], stop_n[[*(breaks - 1), -1]]
    return [Span(first, stop - first) for first, stop in zip(firsts.tolist(), lasts.tolist(), strict=True)]
