"""Straggling of a run with skewed routing: what the simulation says, and what the ledger found.

    mpirun -n 4 python benchmarks/straggling.py [--zipf 1.0] [--budget 2x] [--tokens 300]

Every rank is taken for a node of its own, with its own shard file alone. A small random model routes by a Zipf law:
its residual has a constant component, by which the routers prefer some experts. Two stores of it: one shard per node
as `shard --nodes` makes them, and with replicas as `place` decides from a profile of other texts. Both figures are
max/mean over nodes of the experts' work of a step and layer, and their mean, while single tokens are decoded. Exit
code 1 if one of them is more than 10 % off.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.planning.placement_report import expected_straggling, placed, unplaced
from dist_moe.engine.planning.placing import parse_budget, place_model
from dist_moe.engine.requests.request import Request, SamplingOptions
from dist_moe.engine.routing.routing_facts import routing_facts
from dist_moe.engine.routing.routing_profile import ProfileCounter, RoutingProfile
from dist_moe.engine.routing.routing_record import RoutingBatch, recorded_routing
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.kernels import WeightFormat
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store

LAYERS, D, HEADS, P, E, K, F, V = 4, 64, 8, 32, 128, 8, 96, 512
CONTEXT = 128
CONSTANT = 8.0  # of the residual; the rest of it is 1 on average
MOST_OFF = 0.1
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": F,
    "moe_intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": P,
    "num_experts": E,
    "num_experts_per_tok": K,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": V,
}


def write_model(directory: Path, zipf: float) -> None:
    """A checkpoint whose routers give expert e of each layer a weight of rank^-zipf, by chance, for every token."""
    rng = np.random.default_rng(1)

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal((rows, columns))).astype(np.float32)

    embedding_VD = matrix(V, D, 1.0)
    embedding_VD[:, 0] = CONSTANT
    normed_constant = CONSTANT / np.sqrt((D - 1 + CONSTANT**2) / D)
    noise = np.sqrt(1 - (normed_constant**2 / D))  # what the rest of a normed residual is on average
    tensors = {"model.embed_tokens.weight": embedding_VD, "lm_head.weight": matrix(V, D, 0.3)}
    tensors["model.norm.weight"] = np.ones(D, np.float32)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for gain, size in (("input_layernorm", D), ("post_attention_layernorm", D)):
            tensors[f"{name}{gain}.weight"] = np.ones(size, np.float32)
        for part in "qk":
            tensors[f"{name}self_attn.{part}_norm.weight"] = np.ones(P, np.float32)
        for part in "qkv":
            tensors[f"{name}self_attn.{part}_proj.weight"] = matrix(HEADS * P, D, 0.1)
        tensors[f"{name}self_attn.o_proj.weight"] = matrix(D, HEADS * P, 0.005)
        router_ED = matrix(E, D, 1.28 / (noise * np.sqrt(D - 1)))  # 1.28: of the Gumbel noise that draws by weight
        router_ED[:, 0] = -zipf * np.log(rng.permutation(E) + 1.0) / normed_constant
        tensors[f"{name}mlp.gate.weight"] = router_ED
        for expert in range(E):
            for part, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                tensors[f"{name}mlp.experts.{expert}.{part}_proj.weight"] = matrix(*shape, 0.02)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def own_part(store: Path, node: int) -> Path:
    """The store as the host `node` has it: with its own shard file alone."""
    part = store.with_name(f"{store.name}-{node}")
    part.mkdir()
    for path in store.iterdir():
        if not path.name.startswith("shard-") or path.name.startswith(f"shard-{node + 1:05d}-"):
            (part / path.name).hardlink_to(path)
    return part


def texts(tokens: int, seed: int) -> list[Request]:
    """Requests that make so many tokens in all, each of random ids."""
    ids = np.random.default_rng(seed).integers(0, V, (max(1, tokens // 60), 4))
    return [
        Request(tuple(row.tolist()), 60, SamplingOptions(temperature=1.0, seed=seed + i)) for i, row in enumerate(ids)
    ]


def decode(world: World, store: Path, requests: Sequence[Request]) -> tuple[RoutingProfile, float] | None:
    """Run the requests one after another; on rank 0 the routing of the decoded tokens, and the ledger's straggling."""
    runtime = Runtime(Store.open(own_part(store, world.node)), world, EngineOptions(context=CONTEXT, resident=0))
    if not world.is_leader:
        runtime.serve()
        return None
    counter = ProfileCounter(routing_facts(runtime.model, store.name), most_samples=1 << 20)

    def take(batch: RoutingBatch) -> None:
        if len(batch.experts_TLK) == 1:
            counter.add(batch)

    with recorded_routing(runtime.model, take):
        for request in requests:
            runtime.generate([request])
    straggling = runtime.accounts().straggling
    runtime.stop()
    return counter.profile("these texts"), straggling.mean(straggling.of_nodes_PL, "decode")


def agreed_directory(world: World) -> Path:
    """A new directory for all ranks."""
    return Path(world.gather_texts(tempfile.mkdtemp() if world.is_leader else "")[0])


def every_rank_a_node(world: World) -> World:
    """The world as if no two ranks shared a host."""
    there = copy.copy(world)
    there.node_of_rank = tuple(range(world.size))
    there.local_rank, there.local_size = 0, 1
    return there


def main() -> int:
    """Measure, print a line per store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the law; 0 is even")
    parser.add_argument("--budget", default="2x", help="of `place`: copies of all experts")
    parser.add_argument("--tokens", type=int, default=300, help="to decode from each store")
    options = parser.parse_args()
    os.environ["DIST_MOE_YIELD"] = "1"
    world = every_rank_a_node(World.start(detect_launcher(os.environ)))
    directory, nodes = agreed_directory(world), world.size
    source, weights = directory / "model", (1,) * nodes
    plain = StoreOptions(nodes=nodes, format=WeightFormat.Q8)
    if world.is_leader:
        write_model(source, options.zipf)
        convert(Checkpoint.open(source), directory / "plain", plain, lambda *_: None)
    world.barrier()
    learned = decode(world, directory / "plain", texts(2 * options.tokens, seed=100))
    if learned is not None:
        manifest = Store.open(directory / "plain").manifest
        placement = place_model(manifest, learned[0], weights, parse_budget(options.budget))
        convert(Checkpoint.open(source), directory / "placed", replace(plain, placement=placement), lambda *_: None)
        convert(Checkpoint.open(source), directory / "again", plain, lambda *_: None)
    world.barrier()
    found = {name: decode(world, directory / name, texts(options.tokens, seed=1)) for name in ("again", "placed")}
    worst = 0.0
    if learned is not None:
        held_of = {"again": unplaced(manifest, nodes), "placed": placed(placement)}
        titles = {"again": "one copy of each expert", "placed": f"{options.budget} of all experts"}
        print(f"{nodes} nodes, Zipf {options.zipf:g}, {E} experts, {K} per token, {LAYERS} layers, one token per step")
        print(f"{'':<26} {'simulated from':>15} {'simulated from':>15} {'the ledger':>11} {'ledger /':>9}")
        print(f"{'':<26} {'other texts':>15} {'the same run':>15} {'of the run':>11} {'simulated':>9}")
        for name, run in found.items():
            assert run is not None
            profile, ledger = run
            others, same = (
                expected_straggling(manifest, source_of, held_of[name], weights, 1)
                for source_of in (learned[0], profile)
            )
            worst = max(worst, abs(ledger / others - 1), abs(ledger / same - 1))
            print(f"{titles[name]:<26} {others:15.3f} {same:15.3f} {ledger:11.3f} {ledger / others:9.3f}")
    world.barrier()
    if world.is_leader:
        shutil.rmtree(directory)
    world.finalize()
    return int(worst > MOST_OFF)


if __name__ == "__main__":
    sys.exit(main())
