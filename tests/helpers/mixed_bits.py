"""Run a store of several formats in every way that must not change a bit; rank 0 prints the hashes, as same_bits.py.

mpirun -n N python mixed_bits.py STORE
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from dist_moe.engine.start.startup import open_exchange
from dist_moe.kernels import Kernels, KvFormat, isa_levels
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.plan import EXPERT_LAYOUTS
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.nodes import on_two_hosts
from helpers.same_bits import TOKENS, logits_hash, run_store, steps

WAYS = ((TOKENS, False), (7, True))  # tokens of a chunk, in a batch


def main() -> None:
    """Print {combination: hash} as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    there = {"one host": world, "two hosts": on_two_hosts(world)} if world.size > 1 else {"one host": world}
    exchanges = {
        name: open_exchange(hosts, may_spin(hosts, 2, os.environ), os.environ) for name, hosts in there.items()
    }
    levels, store = isa_levels(), Store.open(Path(sys.argv[1]))
    all_kernels = {f"{threads} threads": Kernels(threads) for threads in (1, 2)}
    if world.size == 1:
        all_kernels |= {level: Kernels(2, level) for level in levels}
    else:
        all_kernels["mixed levels"] = Kernels(1, levels[world.rank % len(levels)])
    hashes = {}
    for layout, (how, kernels), (chunk, in_batch) in itertools.product(EXPERT_LAYOUTS, all_kernels.items(), WAYS):
        worker = run_store(world, exchanges["one host"], store, kernels, layout, KvFormat.F16)
        found = logits_hash(worker, steps(chunk, in_batch, store.config.vocabulary))
        hashes[f"{layout}, {how}, chunk {chunk}"] = found
    kernels = all_kernels["1 threads"]
    for hosts, layout, (chunk, in_batch) in itertools.product(there, ("whole", "shared"), WAYS):
        worker = run_store(there[hosts], exchanges[hosts], store, kernels, layout, KvFormat.F16)
        whole_steps = steps(chunk, in_batch, store.config.vocabulary)
        found = logits_hash(worker, (replace(step, partitioned=True) for step in whole_steps))
        hashes[f"partitioned, {hosts}, {layout}, chunk {chunk}"] = found
    if world.is_leader:
        print(json.dumps(hashes))
    world.finalize()


if __name__ == "__main__":
    main()
