"""What is made of all ranks' notes, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.cli.ranks_table import ranks_table
from dist_moe.engine.watch.accounts import PHASES, WORK, Accounts, longest_over_even, max_over_mean, split_notes
from dist_moe.engine.watch.verdict import token_shares, verdict
from dist_moe.parallel.clocks import ClockSample
from dist_moe.parallel.ledger import CAPACITY, STEPS, Kind, Ledger, Notes
from dist_moe.parallel.progress import Phase, Progress

ALIKE = ClockSample(0, np.zeros(2, np.int64), 0)
MS = 1_000_000
PREFILL, DECODE = range(len(PHASES))


def place(layer: int, phase: Phase) -> int:
    return layer * 16 + phase


def two_steps() -> Notes:
    """Two ranks; a prompt of 4 tokens, then one decoded: a header before each, the sums of two halves inside.

    Milliseconds            rank 0                      rank 1
    header                  0-1                         -5 - 2 (idle, then 2 since rank 0 posted it)
    step of the prompt      2-30                        3-30
      attention             comes at 10, leaves at 14   comes at 12, leaves at 15
      experts               comes at 24, leaves at 26   comes at 20, leaves at 27
    header                  40-42                       31-43
    step of one token       43-50                       43-50
      attention             44-46                       45-46
      experts               47-49                       47-49
    """
    attention, experts = place(0, Phase.ATTENTION), place(0, Phase.EXPERTS)
    rank_0 = [(0, 1), (10, 14), (24, 26), (40, 42), (44, 46), (47, 49)]
    rank_1 = [(-5, 2), (12, 15), (20, 27), (31, 43), (45, 46), (47, 49)]
    begin_Rn, end_Rn = np.moveaxis(np.array([rank_0, rank_1]) * MS, -1, 0)
    return Notes(
        kind_n=np.array([Kind.HEADER, Kind.SUMS, Kind.SUMS] * 2),
        place_n=np.array([0, attention, experts] * 2),
        begin_n=begin_Rn,
        end_n=end_Rn,
        wire_n=np.array([[128, 0, 0] * 2, [0, 0, 0] * 2]),
        shared_n=np.array([[0, 800, 800, 0, 200, 200], [0, 800, 800, 0, 200, 200]]),
        first_S=np.array([1, 4]),
        stop_S=np.array([3, 6]),
        step_begin_S=np.array([[2, 43], [3, 43]]) * MS,
        step_end_S=np.array([[30, 50], [30, 50]]) * MS,
        prompt_S=np.array([4, 0]),
        decoded_S=np.array([0, 1]),
        drawn_S=np.array([33, 51]) * MS,
        # Chunks and products of the only layer: 10 + 8 * 2 = 26 and 6 + 8 * 1 = 14, then 9 and 27.
        work_SL2=np.array([[[[2, 10]], [[1, 1]]], [[[1, 6]], [[3, 3]]]]),
        dropped=0,
    )


def accounts_of(notes: Notes, nodes: tuple[int, ...] = (0, 0)) -> Accounts:
    accounts = Accounts(2, 1, nodes)
    accounts.add(split_notes(notes, ALIKE, ALIKE))
    return accounts


def test_an_exchange_is_waiting_until_the_last_rank_has_come_then_wire() -> None:
    split = split_notes(two_steps(), ALIKE, ALIKE)
    assert (split.wait_Rn / MS).tolist() == [[0, 2, 0, 0, 1, 0], [5, 0, 4, 9, 0, 0]]
    assert split.step_n.tolist() == [-1, 0, 0, -1, 1, 1]
    assert (split.compute_Rn / MS).tolist() == [[0, 8, 10, 0, 1, 1], [0, 9, 5, 0, 2, 1]]


def test_every_millisecond_of_a_step_is_booked_once() -> None:
    accounts = accounts_of(two_steps())
    assert (accounts.steps_P.tolist(), accounts.tokens_P.tolist()) == ([1, 1], [4, 1])
    assert accounts.step_PR * 1e3 == pytest.approx(np.array([[28, 27], [7, 7]]))
    compute = accounts.compute_PRW * 1e3
    assert compute[PREFILL] == pytest.approx(np.array([[8, 10, 4], [9, 5, 3]]))  # attention, experts, other
    assert compute[DECODE] == pytest.approx(np.array([[1, 1, 1], [2, 1, 1]]))
    sums, header = (accounts.wait_PRK[..., kind] * 1e3 for kind in (Kind.SUMS, Kind.HEADER))
    assert sums == pytest.approx(np.array([[2, 4], [1, 0]]))
    assert not header.any()  # a follower between steps is idle
    assert accounts.wire_PRK[..., Kind.SUMS] * 1e3 == pytest.approx(np.array([[4, 6], [3, 3]]))
    assert accounts.wire_PRK[..., Kind.HEADER] * 1e3 == pytest.approx(np.array([[1, 2], [2, 3]]))
    in_step = accounts.compute_PRW.sum(axis=2) + (accounts.wait_PRK + accounts.wire_PRK)[..., Kind.SUMS]
    assert in_step == pytest.approx(accounts.step_PR)
    # From 30 to 43 less the header's 2 and 3.
    assert accounts.between_PR * 1e3 == pytest.approx(np.array([[0, 0], [11, 10]]))


def test_bytes_are_counted_by_kind_and_way() -> None:
    accounts = accounts_of(two_steps())
    assert accounts.calls_PK[:, [Kind.HEADER, Kind.SUMS, Kind.FAULTS]].tolist() == [[1, 2, 0], [1, 2, 0]]
    assert accounts.sent_PRK2[PREFILL, 0, Kind.SUMS].tolist() == [0, 1600]
    assert accounts.sent_PRK2[DECODE, :, Kind.HEADER].tolist() == [[128, 0], [0, 0]]
    assert accounts.sent_bytes == 2 * 128 + 2 * 2000


def test_straggling_is_the_mean_over_steps_of_max_over_mean() -> None:
    notes = two_steps()
    split = split_notes(notes, ALIKE, ALIKE)
    accounts = accounts_of(notes, nodes=(0, 1))
    straggling = accounts.straggling
    assert straggling.work_PRL[:, :, 0].tolist() == [[26, 14], [9, 27]]
    assert straggling.of_ranks_PL == pytest.approx(np.array([[26 / 20], [27 / 18]]))
    assert straggling.of_nodes_PL == pytest.approx(straggling.of_ranks_PL)
    assert straggling.of_times_PL == pytest.approx(np.array([[10 / 7.5], [1.0]]))
    accounts.add(split)
    assert straggling.mean(straggling.of_ranks_PL, "decode") == pytest.approx(1.5)
    assert straggling.counts_PL.tolist() == [[2], [2]]
    on_one_node = accounts_of(notes).straggling
    assert on_one_node.of_nodes_PL.tolist() == [[1.0], [1.0]]
    assert max_over_mean(np.array([[0, 3], [0, 1]])).tolist() == [0.0, 1.5]


def test_a_node_that_is_given_more_work_may_have_more() -> None:
    """Of 40 units a node of speed 3 ought to have 30, and the other 10."""
    speed_N = np.array([3, 1])
    assert longest_over_even(np.array([[30, 20, 0], [10, 20, 0]]), speed_N).tolist() == [1.0, 2.0, 0.0]
    accounts = Accounts(2, 1, (0, 1), (1, 3))
    accounts.add(split_notes(two_steps(), ALIKE, ALIKE))
    assert accounts.straggling.of_nodes_PL[DECODE].tolist() == [1.0]  # 9 and 27
    assert accounts.straggling.of_nodes_PL[PREFILL] == pytest.approx([26 / 10])


def test_times_of_another_clock_are_brought_to_rank_0s() -> None:
    """Rank 1's clock is 7 s ahead at first and gains another 20 ms until the end."""
    begin, end = ClockSample(0, np.array([0, 7000 * MS]), 3), ClockSample(100 * MS, np.array([0, 7020 * MS]), 5)

    def by_their_clock(times_Rn: np.ndarray) -> np.ndarray:
        there_Rn = times_Rn.copy()
        there_Rn[1] += 7000 * MS + times_Rn[1] // 5
        return there_Rn

    honest = two_steps()
    shifted = honest.of_all_ranks(
        {
            name: by_their_clock(np.maximum(0, getattr(honest, name)))
            for name in ("begin_n", "end_n", "step_begin_S", "step_end_S")
        }
    )
    split = split_notes(shifted, begin, end)
    # Interpolation goes by rank 1's own, quicker clock: 20 ms in 100 is far more than clocks drift.
    assert (split.notes.end_n[1] / MS).tolist() == pytest.approx([2, 15, 27, 43, 46, 49], abs=2)
    slow = ClockSample(100 * MS, np.array([0, 7000 * MS]), 5)
    steady = honest.of_all_ranks(
        {name: getattr(honest, name) + np.array([[0], [7000 * MS]]) for name in ("begin_n", "end_n")}
        | {name: getattr(honest, name) + np.array([[0], [7000 * MS]]) for name in ("step_begin_S", "step_end_S")}
    )
    assert (split_notes(steady, begin, slow).wait_Rn == split_notes(honest, ALIKE, ALIKE).wait_Rn).all()


def test_a_clocks_error_makes_no_time_negative() -> None:
    notes = two_steps()
    late = ClockSample(0, np.array([0, -100 * MS]), 100 * MS)  # rank 1 seems to come 100 ms after the others left
    split = split_notes(notes, late, late)
    assert (split.wait_Rn >= 0).all()
    assert (split.wait_Rn <= split.notes.end_n - split.notes.begin_n).all()


def test_one_rank_alone_computes_all_the_time() -> None:
    nothing = np.zeros((1, 0), np.int64)
    notes = Notes(
        **dict.fromkeys(("kind_n", "place_n"), np.zeros(0, np.int64)),
        **dict.fromkeys(("begin_n", "end_n", "wire_n", "shared_n"), nothing),
        **dict.fromkeys(("first_S", "stop_S", "drawn_S", "prompt_S"), np.zeros(1, np.int64)),
        step_begin_S=np.array([[5 * MS]]),
        step_end_S=np.array([[9 * MS]]),
        decoded_S=np.ones(1, np.int64),
        work_SL2=np.array([[[[6, 6]]]]),
        dropped=0,
    )
    accounts = Accounts(1, 1)
    alone = ClockSample(0, np.zeros(1, np.int64), 0)
    accounts.add(split_notes(notes, alone, alone))
    assert accounts.compute_PRW[DECODE, 0] * 1e3 == pytest.approx(np.array([0, 0, 4]))
    assert token_shares(accounts, "decode")["compute"] == 1
    assert "computing, 100% of a token's time" in verdict(accounts, ("here",))
    assert not any("exchange" in line or "straggling" in line for line in ranks_table(accounts, ("here",)))


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        ("compute", "decode is limited by computing"),
        ("wire", "decode is limited by moving bytes, 88% of a token's time, most of it in sums (2 per step)"),
        ("wait", "rank 1 on b computes 1.97 times the mean, and the experts' work of a step is uneven (max/mean 1.50)"),
        ("between", "decode is limited by what rank 0 does between steps"),
    ],
)
def test_one_sentence_says_what_limits(slow: str, words: str) -> None:
    notes = two_steps()
    end_Rn, begin_Rn, step_end_RS = notes.end_n.copy(), notes.begin_n.copy(), notes.step_end_S.copy()
    if slow == "wire":
        end_Rn[:, -1] += 100 * MS
        step_end_RS[:, -1] += 100 * MS
    elif slow == "wait":
        begin_Rn[1, -1] += 200 * MS
        end_Rn[:, -1] += 200 * MS
        step_end_RS[:, -1] += 200 * MS
    elif slow == "compute":
        step_end_RS[:, -1] += 100 * MS
    notes = notes.of_all_ranks({"begin_n": begin_Rn, "end_n": end_Rn, "step_end_S": step_end_RS})
    assert words in verdict(accounts_of(notes), ("a", "b"))


def test_the_table_shows_each_rank_and_kind() -> None:
    lines = ranks_table(accounts_of(two_steps(), nodes=(0, 1)), ("alpha", "b"))
    decode = lines[next(i for i, line in enumerate(lines) if "decode: 1 tokens in 1 steps" in line) :]
    assert decode[1].split()[1:] == ["rank", "host", "compute", *WORK, "wait", "wire", "between", "experts'", "work"]
    figures = ["3.000", "1.000", "1.000", "1.000", "1.000", "5.000", "11.000", "25.0%"]
    assert decode[2].split()[1:] == ["0", "alpha", *figures]
    kinds = {line.split()[1]: line.split()[2:] for line in decode[5:7]}
    assert kinds["header"] == ["1.0", "128", "0", "0.000", "2.500"]
    assert kinds["sums"] == ["2.0", "0", "800", "0.500", "3.000"]
    assert "over 2 ranks 1.50, over 2 hosts 1.50; most in layer 0, 1.50; of their time 1.00" in decode[7]


# ---- taking notes ----


def test_an_exchange_inside_another_belongs_to_it() -> None:
    progress = Progress()
    ledger = Ledger(progress)
    progress.begin(Phase.EXPERTS)
    progress.layer = 3
    ledger.sent(5, 5)
    ledger.take()  # what was sent before is not this exchange's
    ledger.begin()
    ledger.begin()
    ledger.sent(100, 7)
    ledger.end(Kind.FAULTS)
    ledger.sent(20)
    ledger.end(Kind.SUMS)
    notes = ledger.take()
    assert (notes.kind_n.tolist(), notes.place_n.tolist()) == ([Kind.SUMS], [place(3, Phase.EXPERTS)])
    assert (notes.wire_n.tolist(), notes.shared_n.tolist()) == ([120], [7])
    assert notes.begin_n < notes.end_n


def test_a_full_ledger_says_so_and_counts_what_it_drops() -> None:
    ledger = Ledger(Progress())
    for _ in range(CAPACITY // 2):
        ledger.begin()
        ledger.end(Kind.SUMS)
    assert not ledger.is_full
    for _ in range(CAPACITY):
        ledger.begin()
        ledger.end(Kind.SUMS)
    assert ledger.is_full
    notes = ledger.take()
    assert (len(notes.kind_n), notes.dropped) == (CAPACITY, CAPACITY // 2)
    assert not ledger.is_full
    ledger.expect_layers(1)
    for _ in range(STEPS):
        assert not ledger.is_full
        ledger.begin_step(1, 1)
        ledger.end_step(np.array([[1, 1]]))
    assert ledger.is_full


def test_a_step_is_a_prompts_by_what_rank_0_says_else_by_its_size() -> None:
    ledger = Ledger(Progress())
    for told, tokens, sequences in ((None, 5, 2), (None, 2, 2), ((1, 0), 1, 1)):
        ledger.step_tokens = told
        ledger.begin_step(tokens, sequences)
        ledger.end_step(np.zeros((0, 2), np.int64))
    notes = ledger.take()
    assert (notes.prompt_S.tolist(), notes.decoded_S.tolist()) == ([5, 0, 1], [0, 2, 0])
