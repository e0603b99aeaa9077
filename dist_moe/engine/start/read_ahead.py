"""A cold start: this rank's weights are read in file order, before a kernel waits for them page by page."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from dist_moe.engine.start.record import show_bytes
from dist_moe.engine.start.verification import mates_of_rank, store_identity
from dist_moe.errors import StoreError
from dist_moe.kernels import describe_address, is_absent, populate
from dist_moe.model.own_spans import Span, dealt, own_spans, pieces
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.plan import Plan
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from dist_moe.store.verify import ADVICE

logger = logging.getLogger(__name__)

# Told of reading: bytes that are done, and all that this rank reads.
ReadProgress = Callable[[int, int], object]

PIECE_BYTES = 16 << 20
# Looking at every page takes 0.1 s per GB; what falls out of memory falls out in long runs.
_LOOK_EVERY_BYTES = 1 << 20
# Two readers reach the rate of one long direct read; more only disturb each other (measured at 1.7 to 2 GB/s).
_MOST_READERS = 2


def bring_in_weights(world: World, model: Transformer, *, routed_layers: int, on_reading: ReadProgress | None) -> None:
    """Read or copy this rank's weights before the first step waits for them; collective.

    Args:
        world: All ranks.
        model: This rank's part of the model.
        routed_layers: Of so many layers, from the first on, the host's memory holds the routed experts.
        on_reading: Told from this thread, now and then, how far it is.

    Raises:
        AgreedError: A file cannot be read; raised on all ranks alike.
    """
    weights, threads = model.weights, model.kernels.threads
    if weights.copy is None:
        _read_ahead(world, weights.store, model.share.plan, routed_layers, threads, on_reading)
        return
    for done_bytes, total_bytes in weights.copy.fill(threads):
        _moved(world, done_bytes, total_bytes, on_reading)
    world.sleep_until_all()


def _read_ahead(
    world: World, store: Store, plan: Plan, routed_layers: int, threads: int, on_reading: ReadProgress | None
) -> None:
    """Read what is not in memory; what the ranks of a host share is read by one of them.

    Costs a few milliseconds where all is in memory. Then, and afterwards, a thread enters the pages into this process's
    page table while the rank goes on. Experts of layers for which there is no room would only push others out.
    """
    spans = own_spans(store, plan, routed_layers)
    everything = (*spans.shared, *spans.own)
    cold = bool(_absent(everything, store))
    part, parts, cold_ranks = mates_of_rank(world, store_identity(store), cold)
    if cold_ranks:
        own = sorted((*dealt(spans.shared, part, parts), *spans.own))
        error = None
        try:
            _read(world, _absent(own, store), min(threads, _MOST_READERS), on_reading)
        except StoreError as unreadable:
            error = unreadable
        world.sleep_until_all()
        world.agree(error, "reading the weights")
    threading.Thread(target=_enter_pages, args=(store, everything), name="page tables", daemon=True).start()


def _absent(spans: Iterable[Span], store: Store) -> list[Span]:
    """The pieces that are not wholly in memory, as samples tell; all of them where the system does not tell."""
    found = list(pieces(spans, PIECE_BYTES))
    if not all(_tells(path) for path in store.weight_paths()):
        return found
    return [piece for piece in found if is_absent(*piece, _LOOK_EVERY_BYTES)]


def _tells(path: Path) -> bool:
    """Whether Linux tells this user which pages of a file are in memory, instead of calling them all present."""
    try:
        return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)
    except OSError:
        return True  # whoever uses the file meets the error


def _read(world: World, wanted: Sequence[Span], readers: int, on_reading: ReadProgress | None) -> None:
    started_s = time.perf_counter()
    total_bytes, done_bytes = sum(piece.bytes for piece in wanted), 0
    executor = ThreadPoolExecutor(readers, "read ahead")
    try:
        reads = {executor.submit(populate, *piece): piece for piece in wanted}
        for read in as_completed(reads):
            if read.result() in (errno.EFAULT, errno.EIO):
                raise StoreError(_unreadable(reads[read]))
            done_bytes += reads[read].bytes
            _moved(world, done_bytes, total_bytes, on_reading)
    finally:
        executor.shutdown(cancel_futures=True)
    elapsed_s = time.perf_counter() - started_s
    rate = total_bytes / elapsed_s / 1e9
    logger.info("read %s of weights in %.2f s, %.2f GB/s", show_bytes(total_bytes), elapsed_s, rate)


def _moved(world: World, done_bytes: int, total_bytes: int, on_reading: ReadProgress | None) -> None:
    world.progress.layer += 1  # for the watchdog
    if on_reading is not None:
        on_reading(done_bytes, total_bytes)


def _enter_pages(store: Store, spans: Iterable[Span]) -> None:
    """Faults on first touch slow the first tokens down; `store` keeps the mapping for as long as this takes."""
    del store
    for piece in pieces(spans, PIECE_BYTES):
        if populate(*piece):
            return


def _unreadable(piece: Span) -> str:
    place = describe_address(piece.address) or "a file of the store"
    return (
        f"{place}, or what follows it, cannot be read: the disk failed, or the file became shorter after it was "
        f"opened; {ADVICE}"
    )
