"""--check full: the ranks of a host verify their store together, each a share."""

from __future__ import annotations

import logging
import time

from dist_moe.engine.start.record import show_bytes
from dist_moe.errors import DistMoeError, StoreError
from dist_moe.parallel.world import World
from dist_moe.store.manifest import MANIFEST_NAME
from dist_moe.store.reader import Store
from dist_moe.store.shares import damages_in_share

logger = logging.getLogger(__name__)


def verify_together(world: World, store: Store) -> int:
    """Recompute the checksum of every unit on every host; collective.

    Returns:
        The bytes that this rank read.

    Raises:
        AgreedError: Some file is damaged; names the ranks' hosts, file and unit.
    """
    started_s = time.perf_counter()
    part, parts = share_of_rank(world, store_identity(store))
    error: DistMoeError | None = None
    read_bytes = 0
    try:
        damages, read_bytes = damages_in_share(store, part, parts)
        error = StoreError("\n".join(damages)) if damages else None
    except DistMoeError as own:
        error = own
    elapsed_s = time.perf_counter() - started_s
    logger.info("verified %s, part %d of %d, in %.2f s", show_bytes(read_bytes), part + 1, parts, elapsed_s)
    world.sleep_until_all()
    world.agree(error, "verifying the store")
    return read_bytes


def share_of_rank(world: World, identity: str) -> tuple[int, int]:
    """This rank's place among those of its host that see the very same files, and their number; collective."""
    return mates_of_rank(world, identity, False)[:2]


def mates_of_rank(world: World, identity: str, vote: bool) -> tuple[int, int, int]:
    """As `share_of_rank`, and how many of all ranks vote so; collective."""
    texts = [text.rsplit(" ", 1) for text in world.gather_texts(f"{world.node} {identity} {vote:d}")]
    mates = [rank for rank, (key, _) in enumerate(texts) if key == texts[world.rank][0]]
    return mates.index(world.rank), len(mates), sum(int(voted) for _, voted in texts)


def store_identity(store: Store) -> str:
    """What tells on one host whether two ranks map the very same files."""
    status = (store.directory / MANIFEST_NAME).stat()
    return f"{status.st_dev} {status.st_ino}"
