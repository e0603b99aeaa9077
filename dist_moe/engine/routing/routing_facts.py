"""What a model and a job say about routing: enough to read a record of it without the model."""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.model.transformer import Transformer


@dataclass(frozen=True)
class RoutingFacts:
    """Facts of the model, equal for all records that can be merged, and of the job that made the record.

    Attributes:
        model: The model's name.
        layers: L, dense ones included.
        experts: E of each routed layer.
        experts_per_token: K.
        routed_layers: The layers with experts, ascending.
        chunks_per_expert: Chunks of one expert in a routed layer; ranks own chunks.
        ranks: Of the job.
        layout: How the job's ranks divided the chunks: whole, sliced or shared.
    """

    model: str
    layers: int
    experts: int
    experts_per_token: int
    routed_layers: tuple[int, ...]
    chunks_per_expert: int
    ranks: int
    layout: str

    @property
    def of_the_model(self) -> tuple[object, ...]:
        """What has to be equal in records that are merged."""
        sizes = (self.layers, self.experts, self.experts_per_token, self.chunks_per_expert)
        return (self.model, *sizes, *self.routed_layers)


def routing_facts(model: Transformer, name: str) -> RoutingFacts:
    """The facts of a model that runs.

    Args:
        model: One rank's part; it has experts.
        name: What to call the model.
    """
    config, plan = model.config, model.share.plan
    routed = tuple(layer for layer in range(config.layers) if not config.is_dense(layer))
    experts = model.weights.layers[routed[0]].experts
    return RoutingFacts(
        model=name,
        layers=config.layers,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        routed_layers=routed,
        chunks_per_expert=experts.chunk_count // experts.experts,
        ranks=plan.ranks,
        layout=plan.layout,
    )
