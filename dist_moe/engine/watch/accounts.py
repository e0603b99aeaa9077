"""The ranks' notes laid side by side: what each rank computed, whom it waited for, and what moving the bytes took.

On a rank, **waiting** is the time from its own coming to an exchange until the last rank has come, or until its own
leaving if that is sooner (not every rank has a message for every other one), and **wire** the rest: moving the bytes,
in shared memory or between hosts, and waking up. Where rank 0 alone has something to say, it is waited for and nobody
else. What a rank spends in a step outside of exchanges is **computing**. Times of one host are of one clock and have
no error; between hosts up to `ClockSample.error_ns` per exchange may stand as waiting that is wire, or the other way
round.

R ranks · N nodes · n exchanges · S steps · L layers · P phases (prefill, decode) · K kinds · W what is computed
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.clocks import ClockSample, to_leaders_clock
from dist_moe.parallel.ledger import Kind, Notes, layer_of, phase_of
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS
from dist_moe.parallel.progress import Phase

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PHASES = ("prefill", "decode")
# What a rank computes before an exchange, by the step's phase in which that is.
WORK = ("attention", "experts", "other")

_WORK_OF_PHASE = np.full(len(Phase), WORK.index("other"))
_WORK_OF_PHASE[Phase.ATTENTION] = WORK.index("attention")
_WORK_OF_PHASE[Phase.EXPERTS] = WORK.index("experts")


@dataclass(frozen=True)
class SplitNotes:
    """All ranks' notes on rank 0's clock, each exchange divided into waiting and wire.

    Attributes:
        notes: With a first axis R where ranks differ: begin, end, wire, shared, step_begin, step_end, work.
        wait_Rn: Nanoseconds that each rank waited in each exchange.
        step_n: The step that each exchange lies in, -1 between steps.
        compute_Rn: Nanoseconds that each rank computed before each exchange of a step; 0 between steps.
    """

    notes: Notes
    wait_Rn: Int64s
    step_n: Int64s
    compute_Rn: Int64s

    @property
    def is_decode_S(self) -> npt.NDArray[np.bool_]:
        """Which steps have no prompt tokens."""
        is_decode_S: npt.NDArray[np.bool_] = self.notes.prompt_S == 0
        return is_decode_S


def split_notes(notes: Notes, before: ClockSample, after: ClockSample) -> SplitNotes:
    """Divide exchanges into waiting and wire.

    Args:
        notes: Of all ranks, as `SplitNotes` says, each on its own clock.
        before: The clocks at the beginning of the notes.
        after: And at their end.
    """
    begin_Rn, end_Rn, step_begin_RS, step_end_RS = (
        to_leaders_clock(times, before, after)
        for times in (notes.begin_n, notes.end_n, notes.step_begin_S, notes.step_end_S)
    )
    notes = replace(notes, begin_n=begin_Rn, end_n=end_Rn, step_begin_S=step_begin_RS, step_end_S=step_end_RS)
    by_leader = np.isin(notes.kind_n, [kind for kind in Kind if kind.begins_on_leader])
    came_n = np.where(by_leader, begin_Rn[0], begin_Rn.max(axis=0, initial=-(1 << 62)))
    wait_Rn = np.clip(came_n - begin_Rn, 0, end_Rn - begin_Rn)
    step_n = np.full(len(notes.kind_n), -1)
    compute_Rn = np.zeros_like(begin_Rn)
    for s, (first, stop) in enumerate(zip(notes.first_S.tolist(), notes.stop_S.tolist(), strict=True)):
        if first == stop:
            continue
        step_n[first:stop] = s
        compute_Rn[:, first] = begin_Rn[:, first] - step_begin_RS[:, s]
        compute_Rn[:, first + 1 : stop] = begin_Rn[:, first + 1 : stop] - end_Rn[:, first : stop - 1]
    return SplitNotes(notes, wait_Rn, step_n, compute_Rn)


class Accounts:
    """Adds up split notes. Seconds, unless a name says otherwise.

    Attributes:
        steps_P, tokens_P: By phase.
        step_PR: In steps; `between_PR`: from a decoding step's predecessor to its beginning (draws, printing; the
            header's exchange left out).
        compute_PRW: Before exchanges, by what is computed. On one rank alone, which has none, all is "other".
        wait_PRK, wire_PRK, calls_PK: Of exchanges, with those that begin a step.
        sent_PRK2: Bytes that went by MPI, and into shared memory.
        straggling: See `Straggling`.
        error_ns: The largest error of a clock so far.
        dropped: Exchanges that were not noted for want of room.
    """

    def __init__(
        self,
        ranks: int,
        layers: int,
        node_of_rank: tuple[int, ...] | None = None,
        speeds: tuple[int, ...] | None = None,
    ) -> None:
        """Nothing so far.

        Args:
            ranks: How many there are.
            layers: Of the model.
            node_of_rank: Each rank's node; None: all on one.
            speeds: Work that each node is given for the same time; None: alike.
        """
        R, P, K = ranks, len(PHASES), len(Kind)
        self.ranks = R
        self.node_R = np.array(node_of_rank or (0,) * R)
        self.steps_P, self.tokens_P = np.zeros(P, np.int64), np.zeros(P, np.int64)
        self.step_PR, self.between_PR = np.zeros((P, R)), np.zeros((P, R))
        self.compute_PRW = np.zeros((P, R, len(WORK)))
        self.wait_PRK, self.wire_PRK = np.zeros((P, R, K)), np.zeros((P, R, K))
        self.calls_PK = np.zeros((P, K), np.int64)
        self.sent_PRK2 = np.zeros((P, R, K, 2), np.int64)
        self.straggling = Straggling(self.node_R, layers, speeds)
        self.error_ns = 0
        self.dropped = 0
        self._last_end_R: Int64s | None = None

    def add(self, split: SplitNotes, error_ns: int = 0) -> None:
        """Take the notes since the last ones; every exchange belongs to its step, or to the next one."""
        notes, is_decode_S = split.notes, split.is_decode_S
        self.error_ns = max(self.error_ns, error_ns)
        self.dropped += notes.dropped
        if len(is_decode_S) == 0:
            return
        owner_n = np.searchsorted(notes.stop_S, np.arange(len(split.step_n)), side="right")
        phase_n = is_decode_S[np.minimum(owner_n, len(is_decode_S) - 1)].astype(np.int64)
        self._add_exchanges(split, phase_n, owner_n < len(is_decode_S))
        self._add_steps(split)
        self.straggling.add(split)

    @property
    def sent_bytes(self) -> int:
        """By all ranks."""
        return int(self.sent_PRK2.sum())

    def _add_exchanges(self, split: SplitNotes, phase_n: Int64s, has_step_n: npt.NDArray[np.bool_]) -> None:
        """What follows the last step is another order's: its bytes count, its time does not."""
        notes = split.notes
        inside_n = split.step_n >= 0
        wire_Rn = np.where(has_step_n, notes.end_n - notes.begin_n - split.wait_Rn, 0)
        # Between steps a follower waits for the user or a draw, which is nobody's straggling.
        wait_Rn = np.where(inside_n, split.wait_Rn, 0)
        work_n = _WORK_OF_PHASE[phase_of(notes.place_n)]
        np.add.at(self.calls_PK, (phase_n, notes.kind_n), has_step_n.astype(np.int64))
        for rank in range(self.ranks):
            np.add.at(self.wait_PRK[:, rank], (phase_n, notes.kind_n), wait_Rn[rank] * 1e-9)
            np.add.at(self.wire_PRK[:, rank], (phase_n, notes.kind_n), wire_Rn[rank] * 1e-9)
            np.add.at(self.compute_PRW[:, rank], (phase_n, work_n), split.compute_Rn[rank] * 1e-9)
            np.add.at(self.sent_PRK2[:, rank, :, 0], (phase_n, notes.kind_n), notes.wire_n[rank])
            np.add.at(self.sent_PRK2[:, rank, :, 1], (phase_n, notes.kind_n), notes.shared_n[rank])

    def _add_steps(self, split: SplitNotes) -> None:
        notes, is_decode_S = split.notes, split.is_decode_S
        length_RS = notes.step_end_S - notes.step_begin_S
        inside_n = split.step_n >= 0
        in_exchange_RS = np.zeros_like(length_RS)
        for rank in range(self.ranks):
            spent_n = (notes.end_n - notes.begin_n)[rank][inside_n]
            np.add.at(in_exchange_RS[rank], split.step_n[inside_n], spent_n + split.compute_Rn[rank][inside_n])
        last_R = notes.step_begin_S[:, 0] if self._last_end_R is None else self._last_end_R
        before_RS = np.concatenate([last_R[:, np.newaxis], notes.step_end_S[:, :-1]], axis=1)
        between_RS = notes.step_begin_S - before_RS - self._header_RS(split)
        for phase, chosen_S in enumerate((~is_decode_S, is_decode_S)):
            self.steps_P[phase] += int(chosen_S.sum())
            self.tokens_P[phase] += int((notes.prompt_S + notes.decoded_S)[chosen_S].sum())
            self.step_PR[phase] += length_RS[:, chosen_S].sum(axis=1) * 1e-9
            # What follows a step's last exchange is neither attention's nor the experts'.
            tail_RS = length_RS - in_exchange_RS
            self.compute_PRW[phase, :, WORK.index("other")] += tail_RS[:, chosen_S].sum(axis=1) * 1e-9
        self.between_PR[PHASES.index("decode")] += np.maximum(0, between_RS[:, is_decode_S]).sum(axis=1) * 1e-9
        self._last_end_R = notes.step_end_S[:, -1]

    def _header_RS(self, split: SplitNotes) -> Int64s:
        """Wire time between steps, by the step that follows."""
        notes = split.notes
        wire_RS = np.zeros_like(notes.step_begin_S)
        outside = np.flatnonzero(split.step_n < 0)
        owner = np.searchsorted(notes.stop_S, outside, side="right")
        outside, owner = outside[owner < len(notes.stop_S)], owner[owner < len(notes.stop_S)]
        for rank in range(self.ranks):
            wire_n = notes.end_n[rank] - notes.begin_n[rank] - split.wait_Rn[rank]
            np.add.at(wire_RS[rank], owner, wire_n[outside])
        return wire_RS


class Straggling:
    """How unevenly the experts' work of each step and layer falls on ranks and on nodes.

    Work is what was really computed: products of a chunk with a token, and for each chunk the tokens that reading it
    costs (`CHUNK_READ_COST_TOKENS`). A step's layer takes as long as its busiest participant, so the figure is max over
    mean, and its mean over steps and layers. Of nodes it is the longest time over that of an even division, a node
    that is given more work being that much quicker.
    """

    def __init__(self, node_R: Int64s, layers: int, speeds: tuple[int, ...] | None = None) -> None:
        """Nothing so far; node_R: each rank's node; speeds: of the nodes."""
        P, L = len(PHASES), layers
        self._node_R = node_R
        self._nodes = int(node_R.max()) + 1
        self._speed_N = np.array(speeds or (1,) * self._nodes)
        self.counts_PL = np.zeros((P, L), np.int64)
        self._rank_sums_PL, self._node_sums_PL = np.zeros((P, L)), np.zeros((P, L))
        self.work_PRL = np.zeros((P, len(node_R), L), np.int64)
        self.time_counts_PL = np.zeros((P, L), np.int64)
        self._time_sums_PL = np.zeros((P, L))

    def add(self, split: SplitNotes) -> None:
        """Count the steps of split notes."""
        notes = split.notes
        work_RSL = notes.work_SL2[..., 0] * CHUNK_READ_COST_TOKENS + notes.work_SL2[..., 1]
        node_NSL = np.zeros((self._nodes, *work_RSL.shape[1:]), np.int64)
        np.add.at(node_NSL, self._node_R, work_RSL)
        rank_SL = max_over_mean(work_RSL)
        node_SL = longest_over_even(node_NSL, self._speed_N)
        is_decode_S = split.is_decode_S
        for phase, chosen_S in enumerate((~is_decode_S, is_decode_S)):
            self.counts_PL[phase] += (work_RSL.sum(axis=0)[chosen_S] > 0).sum(axis=0)
            self._rank_sums_PL[phase] += rank_SL[chosen_S].sum(axis=0)
            self._node_sums_PL[phase] += node_SL[chosen_S].sum(axis=0)
            self.work_PRL[phase] += work_RSL[:, chosen_S].sum(axis=1)
        self._add_times(split)

    def _add_times(self, split: SplitNotes) -> None:
        notes = split.notes
        inside = np.flatnonzero((split.step_n >= 0) & (phase_of(notes.place_n) == Phase.EXPERTS))
        shape = (split.notes.step_begin_S.shape[0], len(notes.first_S), self.counts_PL.shape[1])
        seconds_RSL = np.zeros(shape)
        where = (split.step_n[inside], layer_of(notes.place_n[inside]))
        for rank in range(shape[0]):
            np.add.at(seconds_RSL[rank], where, split.compute_Rn[rank, inside] * 1e-9)
        ratio_SL = max_over_mean(seconds_RSL)
        for phase, chosen_S in enumerate((~split.is_decode_S, split.is_decode_S)):
            self.time_counts_PL[phase] += (ratio_SL[chosen_S] > 0).sum(axis=0)
            self._time_sums_PL[phase] += ratio_SL[chosen_S].sum(axis=0)

    @property
    def of_ranks_PL(self) -> Floats:
        """Mean over steps of max over mean of the ranks' work; 0 where there was none."""
        return self._rank_sums_PL / np.maximum(1, self.counts_PL)

    @property
    def of_nodes_PL(self) -> Floats:
        """The same of the nodes' work."""
        return self._node_sums_PL / np.maximum(1, self.counts_PL)

    @property
    def of_times_PL(self) -> Floats:
        """The same of the ranks' seconds in the experts' half, norm and router included; 0 on one rank alone."""
        return self._time_sums_PL / np.maximum(1, self.time_counts_PL)

    def mean(self, ratios_PL: Floats, phase: str) -> float:
        """One figure over all layers and steps of a phase; 0 if there were none."""
        counts_L = self.counts_PL[PHASES.index(phase)]
        total = int(counts_L.sum())
        return float((ratios_PL[PHASES.index(phase)] * counts_L).sum() / total) if total else 0.0


def max_over_mean(work: npt.NDArray[np.int64] | Floats) -> Floats:
    """Over the first axis; 0 where nothing was done."""
    mean = work.mean(axis=0)
    return np.where(mean > 0, work.max(axis=0) / np.where(mean > 0, mean, 1), 0.0)


def longest_over_even(work_NX: npt.NDArray[np.int64], speed_N: npt.NDArray[np.int64]) -> Floats:
    """The longest time of a node over that of an even division; 0 where nothing was done."""
    total = work_NX.sum(axis=0)
    longest = (work_NX / speed_N.reshape(-1, *(1,) * total.ndim)).max(axis=0)
    return np.where(total > 0, longest * speed_N.sum() / np.where(total > 0, total, 1), 0.0)
