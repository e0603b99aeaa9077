"""`dist-moe bench`: times prefill and decode, and compares each figure with what the machine allows in the same run.

Tokens are random, so that routing varies. A decode at a depth runs on a KV cache that was filled with random numbers
through the kernel that always fills it: attention takes as long on those as on any others. Which experts a step hits is
counted in an untimed pass over the same steps, which give the same bits every time.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dist_moe.engine.measuring.bench_bound import Machine, StepWork, Work, step_work
from dist_moe.engine.measuring.bench_machine import Measurement, ReadSpeed, order_argument, read_speed
from dist_moe.engine.requests.request import Completion, Request, describe_fault
from dist_moe.engine.requests.sampling import Sampler
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import DistMoeError, Interrupted
from dist_moe.huge_pages import huge_page_share
from dist_moe.kernels import NO_FAULT, KvFormat
from dist_moe.model.step import Slice, Step

FIRST_PROMPT_TOKENS = 8
OVERHEAD_STEPS = 40
LARGEST_SHARE = 1.02  # above it a figure is wrong: the clock and the reading loop are better than 2 %

Shown = Callable[[str], None]  # told what is being measured


@dataclass(frozen=True)
class Case:
    """One line of the table: `tokens` of each of `batch` sequences that hold `depth` tokens already."""

    test: str  # "prefill" or "decode"
    tokens: int
    batch: int
    depth: int


@dataclass(frozen=True)
class BenchPlan:
    """What to measure, how often, and how many bytes each host reads to find its bandwidth."""

    cases: tuple[Case, ...]
    repetitions: int
    read_bytes: int
    prefill_chunk: int
    kv: KvFormat
    seed: int


@dataclass(frozen=True)
class Limits:
    """What the machine allows: reading, bare arithmetic, and our own matmul in the L1 cache; operations per second."""

    read: ReadSpeed
    other_read: ReadSpeed  # the source that was slower, or of which there was too little
    wanted_bytes: int
    int8: float
    f32: float
    matmul: float

    @property
    def machine(self) -> Machine:
        """What the bound is made of."""
        return Machine(self.read.rate, self.int8, self.f32)

    @property
    def memory_gain(self) -> float:
        """How many times as fast anonymous memory is read as the store's mapped pages; 0 if one was not measured."""
        rates = {speed.source: speed.rate for speed in (self.read, self.other_read)}
        return rates["memory"] / rates["store"] if rates["store"] else 0.0


@dataclass(frozen=True)
class Timing:
    """One case's repetitions, and what each of them must do."""

    case: Case
    seconds: tuple[float, ...]  # of each repetition
    steps: tuple[StepWork, ...]
    picked_experts: float  # of a layer with a router, mean over layers and steps; 0 for a dense model
    disk_faults: int = 0  # pages that rank 0 had to wait for, in all repetitions

    @property
    def total(self) -> Work:
        """Of one repetition."""
        return sum((step.total for step in self.steps), Work())

    def tokens_per_s(self, seconds: float) -> float:
        """The rate of one repetition."""
        return self.case.tokens * self.case.batch / seconds

    def share(self, machine: Machine) -> float:
        """The least time over the median one."""
        return sum(step.seconds(machine) for step in self.steps) / median(self.seconds)


@dataclass(frozen=True)
class BenchReport:
    """All that was measured."""

    limits: Limits
    timings: tuple[Timing, ...]
    load_s: float
    first_step_s: float  # a prompt of FIRST_PROMPT_TOKENS, up to the first token drawn
    overhead_s: float  # per step of one token: Python, calls, messages
    huge_share: float | None  # of rank 0's mapped weights, in huge pages; None: copied, or unknown

    def worst_share(self) -> tuple[float, Case]:
        """The highest share and its case; there is at least one."""
        return max(((timing.share(self.limits.machine), timing.case) for timing in self.timings), key=lambda p: p[0])


class Bench:
    """One measuring session on rank 0; the other ranks serve."""

    def __init__(self, engine: Runtime, plan: BenchPlan, shown: Shown, interrupted: Callable[[], bool]) -> None:
        """Prepare.

        Args:
            engine: Ready to run.
            plan: What to measure.
            shown: Told in a few words what is being done.
            interrupted: Asked after each step whether to give up.
        """
        self._engine = engine
        self._crew = engine.crew
        self._greedy = Sampler(Request((0,), 1))
        self._plan = plan
        self._shown = shown
        self._interrupted = interrupted
        self._manifest = engine.model.weights.store.manifest
        self._vocabulary = engine.config.vocabulary
        self._filled: dict[int, int] = {}  # positions of each sequence's cache that hold numbers

    def run(self) -> BenchReport:
        """Measure everything.

        Raises:
            Interrupted: `interrupted` said so.
            DistMoeError: The model's numbers overflowed.
            AgreedError: As `Runtime.generate`.
        """
        self._shown("the first token")
        first_step_s = self._time(self._prefill_steps(FIRST_PROMPT_TOKENS))
        self._shown("the machine")
        before = self._read()
        peaks = self._peaks()
        overhead_s = float(self._measure(Measurement.OVERHEAD, OVERHEAD_STEPS)[0, 0])
        timings = tuple(self._run_case(case) for case in self._plan.cases)
        self._shown("the machine again")
        read = self._better(*before, *self._read())
        peaks = [max(pair) for pair in zip(peaks, self._peaks(), strict=True)]
        return BenchReport(
            limits=Limits(*read, self._plan.read_bytes, *peaks),
            timings=timings,
            load_s=self._engine.statistics().load_s,
            first_step_s=first_step_s,
            overhead_s=overhead_s,
            huge_share=self._huge_share(),
        )

    def _huge_share(self) -> float | None:
        weights = self._engine.model.weights
        if weights.copy is not None:
            return None
        return huge_page_share(weights.store.present_paths)

    # ---- the machine ----

    def _measure(self, what: Measurement, value: int = 0, name: int = 0) -> np.ndarray:
        return self._crew.measure(order_argument(what, value, name))

    def _peaks(self) -> list[float]:
        return [self._peak(what) for what in (Measurement.INT8, Measurement.F32, Measurement.MATMUL)]

    def _peak(self, what: Measurement) -> float:
        return float(self._measure(what).sum())

    def _read(self) -> tuple[ReadSpeed, ReadSpeed]:
        nodes, size = self._engine.model.exchange.world.node_of_rank, max(1, self._plan.read_bytes >> 20)
        store = read_speed(self._measure(Measurement.READ_STORE, size), nodes, "store")
        return store, read_speed(self._measure(Measurement.READ_MEMORY, size), nodes, "memory")

    def _better(self, *found: ReadSpeed) -> tuple[ReadSpeed, ReadSpeed]:
        """The best of each source, the faster one first.

        A store smaller than what was wanted is read as a run reads it, from the caches where they hold it; a piece of
        anonymous memory that is smaller proves nothing.
        """
        store, memory = (
            max((one for one in found if one.source == source), key=lambda one: one.rate)
            for source in ("store", "memory")
        )
        enough_bytes = 0.9 * self._plan.read_bytes * self._engine.model.exchange.world.nodes
        return (memory, store) if memory.bytes >= enough_bytes and memory.rate > store.rate else (store, memory)

    # ---- the model ----

    def _run_case(self, case: Case) -> Timing:
        steps = self._prefill_steps(case.tokens) if case.test == "prefill" else self._decode_steps(case)
        self._shown(f"{case.test} {case.tokens}, batch {case.batch}, depth {case.depth}")
        for sequence in range(case.batch):
            if self._filled.get(sequence, 0) < case.depth:
                self._measure(Measurement.FILL, case.depth, sequence)
            self._filled[sequence] = max(self._filled.get(sequence, 0), case.depth + case.tokens)
        picked = self._count(steps)
        faults = _disk_faults()
        seconds = tuple(self._time(steps) for _ in range(self._plan.repetitions))
        faults = _disk_faults() - faults
        work = tuple(
            step_work(self._manifest, self._plan.kv, step, counts) for step, counts in zip(steps, picked, strict=True)
        )
        every = [count for counts in picked for count in counts]
        return Timing(case, seconds, work, float(np.mean(every)) if every else 0.0, faults)

    def _prefill_steps(self, tokens: int) -> list[Step]:
        ids = self._random_ids(tokens)
        chunk = self._plan.prefill_chunk
        starts = range(0, tokens, chunk)
        return [self._step([Slice(0, at, ids[at : at + chunk])], draws=at + chunk >= tokens) for at in starts]

    def _decode_steps(self, case: Case) -> list[Step]:
        ids = self._random_ids(case.tokens * case.batch)
        rows = range(case.batch)
        return [
            self._step([Slice(b, case.depth + i, (ids[i * case.batch + b],)) for b in rows], draws=True)
            for i in range(case.tokens)
        ]

    def _step(self, slices: Sequence[Slice], draws: bool) -> Step:
        ends = np.cumsum([len(part.ids) for part in slices]) - 1
        rows = tuple(ends.tolist()) if draws else ()
        return Step(tuple(slices), rows, (0.0,) * len(rows), False, self._vocabulary)

    def _random_ids(self, count: int) -> tuple[int, ...]:
        generator = np.random.default_rng((self._plan.seed, count))
        return tuple(generator.integers(0, self._vocabulary, count).tolist())

    def _count(self, steps: Sequence[Step]) -> list[list[int]]:
        """Run the steps once without a clock; per step and layer with a router, how many experts got a token."""
        model, config = self._engine.model, self._engine.config
        counts: list[list[int]] = []

        def observe(layer: int, half: str, _: np.ndarray) -> None:
            if half == "experts" and not config.is_dense(layer):
                counts[-1].append(len(np.unique(model.picked_TK)))

        model.observer = observe
        try:
            for step in steps:
                counts.append([])
                self._run(step)
        finally:
            model.observer = None
        return counts

    def _time(self, steps: Sequence[Step]) -> float:
        """Seconds of the steps, each from its words to the tokens drawn."""
        started_s = time.perf_counter()
        for step in steps:
            self._run(step)
        return time.perf_counter() - started_s

    def _run(self, step: Step) -> None:
        result = self._crew.run(step)
        fault = int(result.fault_T.min())
        if fault != NO_FAULT:
            raise DistMoeError(
                f"random tokens overflow this model: {describe_fault(fault, self._engine.config.layers)}"
            )
        for row, candidates in enumerate(result.candidates):
            self._greedy.draw(
                self._engine.kernels,
                Completion(),
                candidates,
                lambda row=row: self._crew.fetch_row(row),  # type: ignore[misc]
                self._vocabulary,
            )
        if self._interrupted():
            raise Interrupted("interrupted: the bench is incomplete and shows nothing")


def _disk_faults() -> int:
    """How often this process has waited for a page from the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
