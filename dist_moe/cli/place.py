"""`dist-moe place`: which node gets which experts, heads and vocabulary blocks, into placement.json."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_moe.cli.counting import CountProgress
from dist_moe.cli.values import Number, OneOf, PathName, Whole, WholeList
from dist_moe.errors import UsageError
from dist_moe.files import NewFile, is_file, require_writable
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.engine.planning.placement_report import Straggling
    from dist_moe.engine.routing.routing_profile import RoutingProfile
    from dist_moe.store.manifest import Manifest
    from dist_moe.store.placement import Placement

LARGEST_WEIGHT = 1 << 20
MOST_NODES = 4096

MEASURED = "measured"
START_TIMEOUT_S = STALL_TIMEOUT_S = 60.0


class _Weights(WholeList):
    """Whole numbers with commas between them, or the word `measured`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        return value if value == MEASURED else super().convert(value, param, ctx)


@click.command("place")
@click.argument("model", required=False, metavar="[MODEL]", type=PathName())
@click.option("--nodes", type=Whole(min=1, max=MOST_NODES), help="Hosts.  [default: as many as --weights]")
@click.option(
    "--weights",
    metavar="3,3,2,1|measured",
    type=_Weights(1, LARGEST_WEIGHT),
    help="How much work each node does in the same time; or the word measured, under mpirun on these hosts: how fast "
    "they read memory.  [default: all alike]",
)
@click.option(
    "--profile",
    "profile_file",
    metavar="FILE.npz",
    type=PathName(),
    help="Routing, as dist-moe profile or run --routing wrote it.  [default: all experts equally likely]",
)
@click.option(
    "--zipf", type=Number(min=0, max=4), help="Without a profile: skewed routing by chance, to try things out."
)
@click.option(
    "--budget",
    default="2x",
    show_default=True,
    metavar="2x|12GB",
    help="Copies of the experts over all nodes, or what each node's shard may take (GB is 10^9 bytes); the KV cache "
    "and the common file come on top.",
)
@click.option("--quant", type=OneOf(["f32", "bf16", "q8", "q4"]), help="Format, for a model that is no store yet.")
@click.option("-o", "--output", metavar="placement.json", type=PathName(), help="Where the placement goes.")
@click.option("--simulate", is_flag=True, help="Report the expected straggling without and with the placement.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def place(
    model: str | None,
    nodes: int | None,
    weights: str | None,
    profile_file: str | None,
    zipf: float | None,
    budget: str,
    quant: str | None,
    output: str | None,
    simulate: bool,
    as_json: bool,
) -> None:
    """Decide what each node gets of MODEL: hot experts go to several nodes, so that all are alike busy at each token.

    MODEL is a store, a Hugging Face directory, a GGUF or QW3W file or a file of configs/ (default: the bundled demo).
    Obeyed by dist-moe shard --placement. Straggling is the busiest node's time with experts over the mean of all; 1
    is best.

    \b
    Examples:
      dist-moe place Qwen3-30B-A3B/ --nodes 4 --profile routing.npz --budget 12GB -o placement.json
      dist-moe place configs/qwen3-30b-a3b.toml --nodes 4 --zipf 1 --simulate
      mpirun -f hosts dist-moe place store/ --weights measured -o placement.json
    """  # noqa: D301  click wants the character
    wish = _Wish(model, nodes, profile_file, zipf, budget, quant, output, simulate, as_json)
    if weights == MEASURED:
        _place_as_measured(wish)
    elif detect_launcher(os.environ).is_first:
        wish.check()
        _place(wish, _weights(nodes, weights))


@dataclass(frozen=True)
class _Wish:
    """The options but for the weights."""

    model: str | None
    nodes: int | None
    profile_file: str | None
    zipf: float | None
    budget: str
    quant: str | None
    output: str | None
    simulate: bool
    as_json: bool

    def check(self) -> None:
        """What can be found out without the model.

        Raises:
            UsageError: Nothing would come of it, or the file cannot be written.
        """
        from dist_moe.engine.planning.placing import parse_budget

        parse_budget(self.budget)
        if self.output is None and not self.simulate:
            raise UsageError("place: neither -o placement.json nor --simulate is given: nothing would come of it")
        if self.output is not None:
            require_writable(Path(self.output))


def _place(wish: _Wish, node_weights: tuple[int, ...]) -> None:
    from dist_moe.demo import demo_model_directory
    from dist_moe.engine.planning.placement_report import simulate_straggling
    from dist_moe.engine.planning.placing import parse_budget, place_model
    from dist_moe.store.described import describe_model
    from dist_moe.store.placement_json import render_placement

    manifest = describe_model(wish.model or str(demo_model_directory()), wish.quant)
    routing = _routing(manifest, wish.profile_file, wish.zipf)
    placement = place_model(manifest, routing, node_weights, parse_budget(wish.budget), CountProgress("placing layer"))
    found = simulate_straggling(manifest, routing, placement) if wish.simulate and routing is not None else []
    if wish.output is not None:
        with NewFile(Path(wish.output)) as file:
            file.write(render_placement(placement).encode())
            file.commit()
    if wish.as_json:
        click.echo(json.dumps(_as_json(manifest, routing, placement, found)))
        return
    click.echo("\n".join(_as_text(manifest, routing, placement, found)))
    if wish.output is not None:
        click.echo(f"next: {shlex.join([*_packing(wish.model), '--placement', wish.output])}")


def _packing(model: str | None) -> list[str]:
    """The command that obeys a placement; what has no weights to pack stands as a word for them."""
    from dist_moe.checkpoint.qw3w_directory import is_qw3w_directory
    from dist_moe.store.manifest import MANIFEST_NAME

    if model is None:
        return ["dist-moe", "shard"]
    if is_file(Path(model) / MANIFEST_NAME) and not is_qw3w_directory(Path(model)):
        return ["dist-moe", "reshard", model]
    return ["dist-moe", "shard", "MODEL" if model.endswith(".toml") else model]


def _place_as_measured(wish: _Wish) -> None:
    """With the weights of this job's hosts; rank 0 says which host got which, and every error is all ranks'."""
    from dist_moe.engine.planning.plan_machine import reading_weights
    from dist_moe.engine.start.job import Job

    job = Job(None, START_TIMEOUT_S, lambda _: STALL_TIMEOUT_S)
    try:
        job.on_leader(lambda: _check_measured(wish, job.world.nodes))
        found = reading_weights(job)

        def tell() -> None:
            words = [f"{number} {host}: {speed / 1e9:.1f} GB/s" for number, (host, speed, _) in enumerate(found, 1)]
            click.echo(f"measured: {', '.join(words)}", err=True)
            _place(wish, tuple(weight for _, _, weight in found))

        job.on_leader(tell)
    finally:
        job.leave()


def _check_measured(wish: _Wish, hosts: int) -> None:
    wish.check()
    if wish.nodes not in (None, hosts):
        raise UsageError(f"--nodes {wish.nodes}: this job has {hosts} hosts to measure: give that, or leave it out")


def _weights(nodes: int | None, weights: str | None) -> tuple[int, ...]:
    if weights is None and nodes is None:
        raise UsageError("place: how many nodes? Give --nodes N, or --weights with a number for each")
    given = tuple(int(number) for number in weights.split(",")) if weights else (1,) * (nodes or 1)
    if nodes is not None and len(given) != nodes:
        raise UsageError(f"--weights {weights}: {len(given)} numbers for {nodes} nodes: give one for each")
    return given


def _routing(manifest: Manifest, profile_file: str | None, zipf: float | None) -> RoutingProfile | None:
    from dist_moe.cli.profile_file import read_profile
    from dist_moe.engine.planning.placing import routed_layers
    from dist_moe.engine.routing.routing_profile import assumed_profile

    config = manifest.config
    if profile_file is not None and zipf is not None:
        raise UsageError("--zipf is for trying out without a --profile: give one of them")
    layers = routed_layers(config)
    if not layers:
        if profile_file is not None or zipf is not None:
            raise UsageError("--profile, --zipf: this model has no experts: leave them out")
        return None
    if profile_file is not None:
        return read_profile(Path(profile_file), config)
    return assumed_profile(layers, config.experts, config.experts_per_token, zipf or 0.0)


def _as_json(
    manifest: Manifest, routing: RoutingProfile | None, placement: Placement, found: list[Straggling]
) -> dict[str, Any]:
    from dist_moe.engine.planning.placement_report import node_facts

    return {
        "model": manifest.source_name,
        "routing": routing.origin if routing else None,
        "tokens": routing.tokens if routing else 0,
        "nodes": [vars(facts) for facts in node_facts(manifest, placement)],
        "straggling": [vars(result) for result in found],
    }


def _as_text(
    manifest: Manifest, routing: RoutingProfile | None, placement: Placement, found: list[Straggling]
) -> list[str]:
    from dist_moe.engine.planning.placement_report import node_facts
    from dist_moe.engine.start.record import show_bytes

    counted = f"{routing.tokens} tokens of {routing.origin}" if routing else "this model has no experts"
    if routing is not None and routing.assumed:
        counted = f"assumed, {routing.origin}"
    lines = [f"{manifest.source_name} on {_count(placement)}; routing: {counted}", ""]
    lines.append("node  weight  heads  vocabulary blocks  experts per layer       shard")
    for number, facts in enumerate(node_facts(manifest, placement), 1):
        lines.append(
            f"{number:4}  {facts.weight:6}  {facts.heads:5}  {facts.vocabulary_blocks:17}  "
            f"{facts.experts_per_layer:17.1f}  {show_bytes(facts.shard_bytes):>10}"
        )
    if found:
        lines += ["", "straggling, expected: tokens per step  without placement  with it"]
        lines += [f"{result.batch:37}  {result.before:17.3f}  {result.after:7.3f}" for result in found]
    return lines


def _count(placement: Placement) -> str:
    return "1 node" if len(placement.shards) == 1 else f"{len(placement.shards)} nodes"
