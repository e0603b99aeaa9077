"""What a step must at least do, and the least time for it: bytes to read and operations, phase by phase.

Each byte and each operation counts once, whatever the number of ranks; work that ranks repeat (norms, routers, KV heads
that two of them keep) is theirs to pay. T tokens, D model dim, P head dim, H query heads, G KV heads, E experts, F
hidden units of an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_moe.kernels import BLOCK_POSITIONS, GROUP, KvFormat, WeightFormat, kv_block_bytes, packed_bytes
from dist_moe.model.step import Slice, Step
from dist_moe.split import VOCABULARY_BLOCK
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import UnitKind, unit_bytes, unit_count


@dataclass(frozen=True)
class Machine:
    """What all ranks' machines allow together.

    Attributes:
        read: Bytes per second.
        int8: Operations per second of bare int8 dot products.
        f32: Operations per second of bare f32 multiply-adds.
    """

    read: float
    int8: float
    f32: float


@dataclass(frozen=True)
class Work:
    """Bytes to read, and operations of int8 dot products and of f32 arithmetic (a multiply-add is two)."""

    bytes: float = 0
    int8: float = 0
    f32: float = 0

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(self.bytes + other.bytes, self.int8 + other.int8, self.f32 + other.f32)

    def seconds(self, machine: Machine) -> float:
        """The least time where reading and computing overlap perfectly."""
        return max(self.bytes / machine.read, self.compute_seconds(machine))

    def compute_seconds(self, machine: Machine) -> float:
        """The time of the operations alone."""
        return self.int8 / machine.int8 + self.f32 / machine.f32


@dataclass(frozen=True)
class StepWork:
    """A step's phases, one after another."""

    phases: tuple[Work, ...]

    @property
    def total(self) -> Work:
        """All phases together."""
        return sum(self.phases, Work())

    def seconds(self, machine: Machine) -> float:
        """The least time of the phases, one after another."""
        return sum(phase.seconds(machine) for phase in self.phases)


def step_work(manifest: Manifest, kv: KvFormat, step: Step, picked_experts: Sequence[int]) -> StepWork:
    """What a step must do.

    Args:
        manifest: The store's.
        kv: Format of the cache.
        step: The tokens and their positions.
        picked_experts: Per layer with a router, ascending: how many experts got at least one token.
    """
    config, T = manifest.config, step.tokens
    H, G = config.heads, config.kv_heads
    blocks = unit_count(config, manifest.group_size, "vocabulary", 0)
    picked = iter(picked_experts)
    phases = [_embedding(manifest, step.slices)]
    attention = (projections_work(manifest, T, H, G), attention_work(manifest, kv, step.slices, H, G))
    for layer in range(config.layers):
        phases += attention
        if config.is_dense(layer):
            phases.append(experts_work(manifest, layer, T, 1))
        else:
            choices = T * config.experts_per_token
            phases += [router_work(manifest, T), experts_work(manifest, layer, choices, next(picked))]
    phases.append(logits_work(manifest, len(step.logit_rows), blocks))
    return StepWork(tuple(phases))


def _embedding(manifest: Manifest, slices: Iterable[Slice]) -> Work:
    rows = len({token for part in slices for token in part.ids})
    return Work(bytes=rows * manifest.config.model_dim * _float_bytes(manifest.embedding_format))


def projections_work(manifest: Manifest, tokens: float, heads: int, kv_heads: int) -> Work:
    """q, k, v and o of some heads, and the norms before them."""
    D, P = manifest.config.model_dim, manifest.config.head_dim
    weight_bytes = heads * _unit(manifest, "head") + kv_heads * _unit(manifest, "kv_head") + 4 * (D + 2 * P)
    return _product(manifest.format, weight_bytes, tokens * D * P * (2 * heads + 2 * kv_heads))


def attention_work(manifest: Manifest, kv: KvFormat, slices: Iterable[Slice], heads: int, kv_heads: int) -> Work:
    """Reading what earlier steps left in the cache; the step's own K and V come out of registers."""
    P = manifest.config.head_dim
    position_bytes = kv_heads * kv_block_bytes(kv, P) / BLOCK_POSITIONS
    positions = pairs = 0
    for part in slices:
        n = len(part.ids)
        positions += part.position
        pairs += n * part.position + n * (n + 1) // 2
    products = 2 * pairs * heads * P  # of q k, and as many of p v
    int8 = products if kv == KvFormat.Q8 and P % GROUP == 0 else 0
    return Work(positions * position_bytes, int8, 2 * products - int8)


def router_work(manifest: Manifest, tokens: float) -> Work:
    """The norm before the experts, and the logits of all of them."""
    config = manifest.config
    weight_bytes = packed_bytes(manifest.router_format, config.experts, config.model_dim, 0) + 4 * config.model_dim
    return _product(manifest.router_format, weight_bytes, tokens * config.model_dim * config.experts)


def experts_work(manifest: Manifest, layer: int, choices: float, picked: float) -> Work:
    """The MLPs of `picked` experts with `choices` pairs of a token and an expert; a dense MLP is one expert."""
    config = manifest.config
    expert_bytes = manifest.layer_chunks_per_expert(layer) * _unit(manifest, "chunk", layer)
    products = choices * 3 * config.model_dim * config.layer_hidden(layer)
    return _product(manifest.format, picked * expert_bytes, products)


def logits_work(manifest: Manifest, rows: int, blocks: int) -> Work:
    """Some blocks of the vocabulary for some tokens."""
    if not rows:
        return Work()
    config = manifest.config
    width = min(config.vocabulary, blocks * VOCABULARY_BLOCK)
    return _product(manifest.format, blocks * _unit(manifest, "vocabulary"), rows * config.model_dim * width)


def _product(fmt: WeightFormat, weight_bytes: float, products: float) -> Work:
    if fmt.quantized:
        return Work(weight_bytes, int8=2 * products)
    return Work(weight_bytes, f32=2 * products)


def _unit(manifest: Manifest, kind: UnitKind, layer: int = 0) -> int:
    return unit_bytes(manifest.config, manifest.format, manifest.group_size, kind, layer)


def _float_bytes(fmt: WeightFormat) -> int:
    return 2 if fmt == WeightFormat.BF16 else 4
