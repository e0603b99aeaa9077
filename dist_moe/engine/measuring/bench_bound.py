"""What a step must at least do, and the least time for it: bytes to read and operations, phase by phase.

Each byte and each operation counts once, whatever the number of ranks; work that ranks repeat (norms, routers, KV heads
that two of them keep) is theirs to pay. T tokens, D model dim, P head dim, H query heads, G KV heads, E experts, F
hidden units of an expert, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_moe.kernels import BLOCK_POSITIONS, GROUP, KvFormat, WeightFormat, kv_block_bytes, packed_bytes
from dist_moe.model.step import Slice, Step
from dist_moe.split import VOCABULARY_BLOCK
from dist_moe.store.manifest import Manifest
from dist_moe.store.unit_parts import unit_parts
from dist_moe.store.units import UnitKind, unit_count


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
    attention = attention_work(manifest, kv, step.slices, H, G)
    for layer in range(config.layers):
        phases += [projections_work(manifest, layer, T, H, G), attention]
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


def projections_work(manifest: Manifest, layer: int, tokens: float, heads: int, kv_heads: int) -> Work:
    """q, k, v and o of some heads of a layer, and the norms before them."""
    D, P = manifest.config.model_dim, manifest.config.head_dim
    work = Work(bytes=4 * (D + 2 * P))
    kinds: tuple[tuple[UnitKind, int], ...] = (("head", heads), ("kv_head", kv_heads))
    for kind, units in kinds:
        work += _units_work(manifest, kind, layer, 0, units, tokens * D * P)
    return work


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
    config, chunks = manifest.config, manifest.layer_chunks_per_expert(layer)
    experts = config.layer_experts(layer)
    products = choices * config.model_dim * config.layer_hidden(layer) / max(1, picked * chunks)
    work = Work()
    for first, count in _alike_experts(manifest, layer):
        work += _units_work(manifest, "chunk", layer, first * chunks, picked * chunks * count / experts, products)
    return work


def logits_work(manifest: Manifest, rows: int, blocks: int) -> Work:
    """Some blocks of the vocabulary for some tokens."""
    if not rows:
        return Work()
    config = manifest.config
    width = min(config.vocabulary, blocks * VOCABULARY_BLOCK)
    return _units_work(manifest, "vocabulary", 0, 0, blocks, rows * config.model_dim * width / blocks)


def _product(fmt: WeightFormat, weight_bytes: float, products: float) -> Work:
    if fmt.quantized:
        return Work(weight_bytes, int8=2 * products)
    return Work(weight_bytes, f32=2 * products)


def _units_work(manifest: Manifest, kind: UnitKind, layer: int, index: int, units: float, products: float) -> Work:
    """Of some units like the one at `index`, each matrix of which makes so many products."""
    work = Work()
    for part in unit_parts(manifest, kind, layer, index):
        weight_bytes = part.bytes.stop - part.bytes.start
        work += _product(part.format.format, units * weight_bytes, units * products)
    return work


def _alike_experts(manifest: Manifest, layer: int) -> list[tuple[int, int]]:
    """The first of all experts of equal formats, and how many they are."""
    formats = manifest.formats.layers[layer]
    kinds = Counter(zip(formats.gate_up, formats.down, strict=True))
    firsts = dict[object, int]()
    for expert, kind in enumerate(zip(formats.gate_up, formats.down, strict=True)):
        firsts.setdefault(kind, expert)
    return [(firsts[kind], count) for kind, count in kinds.items()]


def _float_bytes(fmt: WeightFormat) -> int:
    return 2 if fmt == WeightFormat.BF16 else 4
