"""From an open store to a model whose weights are where the first step wants them."""

from __future__ import annotations

from collections.abc import Sequence

from dist_moe.engine.start.agreement import StartRecord
from dist_moe.engine.start.memory import Demand, check_memory, layers_with_room
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.start.read_ahead import ReadProgress, bring_in_weights
from dist_moe.engine.start.startup import agreed
from dist_moe.engine.start.verification import verify_together
from dist_moe.kernels import Kernels
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import JobPlan
from dist_moe.store.reader import Store


def demand_of(options: EngineOptions, step_tokens: int) -> Demand:
    """What an engine's options make of its memory; `step_tokens` are those of the largest step."""
    context = max(options.context, options.resident_positions)
    return Demand(options.kv, context, step_tokens, options.copy_weights)


def load_model(
    exchange: Exchange,
    store: Store,
    job: JobPlan,
    kernels: Kernels,
    options: EngineOptions,
    demand: Demand,
    records: Sequence[StartRecord],
    on_reading: ReadProgress | None,
) -> Transformer:
    """Make sure that the weights fit and are whole, map this rank's share and read or copy it; collective.

    Args:
        exchange: The collectives.
        store: The open store.
        job: All ranks' shares.
        kernels: What will compute.
        options: How the engine runs.
        demand: What they make of its memory (`demand_of`).
        records: What the ranks reported, by rank.
        on_reading: Told while this rank's weights are read from the disk or copied.

    Raises:
        AgreedError: A host lacks memory or units, or a file is damaged or cannot be read; raised on all ranks alike.
    """
    world, copy, step_tokens = exchange.world, options.copy_weights, demand.step_tokens
    needs = check_memory(world, store.manifest, job.plans, demand, records)
    if options.check == "full":
        verify_together(world, store)
    model = agreed(world, "load", lambda: Transformer(store, job, exchange, kernels, options.kv, step_tokens, copy))
    layers = layers_with_room(world, needs[world.node], records, store.config.layers)
    bring_in_weights(world, model, routed_layers=layers, on_reading=on_reading)
    return model
