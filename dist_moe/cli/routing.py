"""`dist-moe routing`: load of experts and balance of ranks, from what `run --routing` wrote."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_moe.cli.values import PathName, Whole
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.engine.routing.routing_facts import RoutingFacts
    from dist_moe.engine.routing.routing_load import Balance, LayerLoad, LoadCounter

LARGEST_RANKS = 4096


@click.command("routing")
@click.argument("records", metavar="OUT.npz...", nargs=-1, required=True, type=PathName("the name of a .npz file"))
@click.option(
    "--ranks",
    type=Whole(min=1, max=LARGEST_RANKS),
    help="Ranks to compute the balance for.  [default: as many as the first record's job had]",
)
@click.option("--plot", metavar="FILE.png", type=PathName(), help="Draw experts and layers as a heat map (matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def routing(records: tuple[str, ...], ranks: int | None, plot: str | None, as_json: bool) -> None:
    """Show how tokens spread over experts in each layer, and what each layout of experts makes of it on N ranks.

    Records of the same model are added up.

    \b
    Examples:
      dist-moe run -p "Once" --routing once.npz
      dist-moe routing once.npz --ranks 4
      dist-moe routing once.npz twice.npz --plot heat.png
    """  # noqa: D301  click wants the character
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.cli.heat_map import draw_heat_map, require_matplotlib
    from dist_moe.cli.routing_file import read_records
    from dist_moe.engine.routing.routing_load import LoadCounter
    from dist_moe.files import require_writable

    if plot is not None:
        require_matplotlib(Path(plot))
        require_writable(Path(plot))
    readers = read_records([Path(record) for record in records])
    facts = readers[0].facts
    counter = LoadCounter(facts, ranks or facts.ranks)
    for reader in readers:
        for experts_TLK in reader.steps():
            counter.add_step(experts_TLK)
    if as_json:
        click.echo(json.dumps(_as_json(facts, counter), ensure_ascii=False))
    else:
        click.echo("\n".join(_as_text(facts, counter)))
    if plot is not None:
        title = f"{facts.model}: {counter.tokens} tokens, {facts.experts_per_token} of {facts.experts} experts each"
        draw_heat_map(Path(plot), counter.counts_LE, facts.routed_layers, title)


def _as_json(facts: RoutingFacts, counter: LoadCounter) -> dict[str, Any]:
    from dist_moe.engine.routing.routing_load import layer_loads, total_load

    return {
        "facts": asdict(facts),
        "tokens": counter.tokens,
        "steps": counter.steps,
        "layers": [_load_json(load) for load in layer_loads(counter.counts_LE, facts.routed_layers)],
        "all_layers": _load_json(total_load(counter.counts_LE)),
        "balance": [asdict(balance) for balance in counter.balances()],
        "counts": counter.counts_LE.tolist(),
    }


def _load_json(load: LayerLoad) -> dict[str, Any]:
    named = {"hottest": load.hottest, "coldest": load.coldest}
    pairs = {name: {"expert": expert, "share": share} for name, (expert, share) in named.items()}
    return asdict(load) | pairs


def _as_text(facts: RoutingFacts, counter: LoadCounter) -> list[str]:
    import math

    from dist_moe.engine.routing.routing_load import layer_loads, total_load

    most = math.log2(facts.experts)
    lines = [
        f"{facts.model}: {counter.tokens} tokens in {counter.steps} steps; {len(facts.routed_layers)} of "
        f"{facts.layers} layers with {facts.experts} experts, {facts.experts_per_token} per token",
        "",
        f"layer  hottest  share  coldest  share  never  entropy (of {most:.2f} bits)  max/mean",
    ]
    loads = [*layer_loads(counter.counts_LE, facts.routed_layers), total_load(counter.counts_LE)]
    lines += [_load_line(load) for load in loads]
    lines += ["", f"balance on {_plural(counter.balances()[0].ranks)}, by the work of each step's layers (1 is best):"]
    lines += [_balance_line(balance) for balance in counter.balances()]
    return lines


def _load_line(load: LayerLoad) -> str:
    name = "all" if load.layer is None else str(load.layer)
    (hot, hot_share), (cold, cold_share) = load.hottest, load.coldest
    picked = f"{hot:7}  {hot_share:5.1%}  {cold:7}  {cold_share:5.1%}"
    return f"{name:>5}  {picked}  {load.never:5}  {load.entropy_bits:24.2f}  {load.max_over_mean:8.2f}"


def _balance_line(balance: Balance) -> str:
    shares = balance.rank_shares
    spread = f"ranks do {min(shares):.1%} to {max(shares):.1%} of all work"
    return f"{balance.layout:<7} {balance.slowdown:6.3f} x the time of equal work; {spread}"


def _plural(ranks: int) -> str:
    return f"{ranks} rank" if ranks == 1 else f"{ranks} ranks"
