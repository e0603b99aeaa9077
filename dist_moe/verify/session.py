"""All levels over one store, in order: on one rank, on the ranks of this job, and on ranks that are started for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.source import open_source
from dist_moe.engine.start.startup import open_exchange
from dist_moe.errors import DistMoeError, EnvironmentMismatch
from dist_moe.kernels import Kernels, KvFormat, isa_levels
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.world import World
from dist_moe.store.against import check_same_model
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.reader import Store
from dist_moe.verify import layer_levels, model_level
from dist_moe.verify.check import Check
from dist_moe.verify.definition import SourceWeights, StoreWeights
from dist_moe.verify.kernel_level import kernel_checks
from dist_moe.verify.layer_levels import LAYER_LEVELS
from dist_moe.verify.model_level import Way, model_logits
from dist_moe.verify.parts import Parts
from dist_moe.verify.rank_hashes import compare_hashes, joint_hashes
from dist_moe.verify.subject import Subject, check_expert, pick_layers, token_ids

LEVELS = ("kernel", *LAYER_LEVELS, "model")
Show = Callable[[Check], object]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        levels: Of LEVELS.
        layers: Which; none: chosen by the model.
        expert: Which; None: of each layer the busiest.
        tokens: Length of the sequence.
    """

    levels: tuple[str, ...]
    layers: tuple[int, ...]
    expert: int | None
    tokens: int


class Session:
    """The checks of one store, or of the kernels alone if there is none."""

    def __init__(self, store: Store | None, source: Path | None, wanted: Wanted) -> None:
        """Check what is asked for before anything is computed.

        Args:
            store: All of which is on this machine; None if only kernels are asked for.
            source: What it was made from, or None.
            wanted: What is asked for.

        Raises:
            UsageError: There is no such layer or expert, or the source is another model.
            CheckpointError: The source cannot be read.
        """
        self._wanted, self._store, self._source = wanted, store, source
        self.layers = () if store is None else pick_layers(store.config, wanted.layers)
        if store is not None:
            check_expert(store.config, self.layers, wanted.expert)
            self.ids = token_ids(store.config.vocabulary, min(wanted.tokens, store.config.max_positions))
        self._kernels = Kernels(threads=1)
        if store is not None and source is not None:
            check_same_model(DecodedStore(store, self._kernels), open_source(source))

    def close(self) -> None:
        """End the kernels."""
        self._kernels.close()

    def checks(self) -> Iterator[Check]:
        """All that one rank can do, level by level."""
        levels = self._wanted.levels
        if "kernel" in levels:
            yield from kernel_checks()
        if self._store is not None:
            yield from self._store_checks(self._store, [level for level in levels if level != "kernel"])

    def hashes(self, world: World, exchange: Exchange) -> dict[str, str]:
        """What all ranks of a world compute together; collective. See `joint_hashes`."""
        levels = self._wanted.levels
        if self._store is None:
            own = f"{self._kernels.self_test():016x}"
            others = world.gather_texts(own)
            return {"kernel: self-test of each rank": own if set(others) == {own} else " ".join(others)}
        return joint_hashes(self._store, self._kernels, exchange, self.ids, self.layers, levels)

    def own_hashes(self) -> dict[str, str]:
        """The same of one rank alone."""
        world = World()
        return self.hashes(world, open_exchange(world, False, {}))

    def _store_checks(self, store: Store, levels: Sequence[str]) -> Iterator[Check]:
        source = None if self._source is None else SourceWeights(open_source(self._source))
        weights = StoreWeights(DecodedStore(store, self._kernels))
        subject = Subject(store, weights, source, self.layers, self._wanted.expert, self.ids)
        parts = Parts(store, self._kernels, self.ids)
        settings = [(isa, 1) for isa in isa_levels() if isa != self._kernels.isa] + [(self._kernels.isa, 2)]
        of_layers = [level for level in levels if level in LAYER_LEVELS]
        if of_layers:
            runs = layer_levels.run_layers(parts, subject)
            for level in of_layers:
                for layer, run in runs.items():
                    yield from layer_levels.value_checks(subject, layer, run, (level,))
            yield from layer_levels.bits_checks(subject, runs, of_layers, settings)
        if "model" in levels:
            exchange = open_exchange(World(), False, {})
            way = Way(kv=KvFormat.F32)
            logits_TV = model_logits(store, self._kernels, exchange, self.ids, way)
            assert logits_TV is not None
            yield from model_level.value_checks(subject, parts, logits_TV)
            yield from model_level.bits_checks(subject, exchange, settings)


def checks_of_job(session: Session, world: World, exchange: Exchange, show: Show) -> None:
    """All of a job's checks, told on rank 0 as they are made; collective.

    Raises:
        AgreedError: Something on rank 0 could not be read or computed.
    """
    error, expected = None, dict[str, str]()
    if world.is_leader:
        try:
            for check in session.checks():
                show(check)
            expected = session.own_hashes() if world.size > 1 else {}
        except DistMoeError as own:
            error = own
    world.sleep_until_all()
    world.agree(error, "verifying")
    if world.size > 1:
        found = session.hashes(world, exchange)
        for check in compare_hashes(world.size, found, expected) if world.is_leader else ():
            show(check)


def parse_hashes(text: str, ranks: int) -> dict[str, str]:
    """What a job of ranks printed: a JSON object on a line of its own, among what its launcher may say.

    Raises:
        EnvironmentMismatch: There is none, or the ranks were not as many as were started.
    """
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if len(lines) == 1 else {}
    if found.get("ranks") != ranks:
        seen = f"{len(lines)} jobs of {found.get('ranks', 'unknown')} ranks" if lines else "nothing"
        raise EnvironmentMismatch(
            f"{ranks} ranks were started, and answered as {seen}: mpirun does not belong to this Python's MPI library; "
            "look with mpirun -n 2 dist-moe doctor"
        )
    hashes: dict[str, str] = found["hashes"]
    return hashes
