"""The logits of one store's tiny model, in some layouts, on the ranks that mpirun started; rank 0 prints the hashes.

mpirun ... python hosts_bits.py STORE LAYOUT...
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from dist_moe.engine.startup import open_exchange
from dist_moe.kernels import Kernels, KvFormat
from dist_moe.parallel.entry import guarded
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers import same_bits


def main() -> int:
    """Print {"hosts": host of each rank, "hashes": {layout and chunk: hash}} on rank 0."""
    world = World.start(detect_launcher(os.environ))
    exchange = open_exchange(world, False, os.environ)
    store, kernels = Store.open(Path(sys.argv[1])), Kernels(1)
    hashes: dict[str, str] = {}
    for layout in sys.argv[2:]:
        for (chunk, in_batch), partitioned in itertools.product(((7, True), (same_bits.TOKENS, False)), (False, True)):
            worker = same_bits.run_store(world, exchange, store, kernels, layout, KvFormat.F16)
            found = same_bits.logits_hash(worker, chunk, in_batch, store.config.vocabulary, partitioned)
            hashes[f"{layout}, chunk {chunk}, {'alltoall' if partitioned else 'allreduce'}"] = found
    if world.is_leader:
        print(json.dumps({"hosts": world.hosts, "hashes": hashes}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))  # a rank without its shard ends all
