"""Typical-p, penalties, log-probabilities and powers against their definitions; N logits, B blocks of 128."""

import math

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, Kernels, Penalties, SamplingParameters, reference

U = 2.0**-24  # half an ulp of f32 at 1
FILTERS = [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 40, "top_p": 0.95, "min_p": 0.01}]


class Row:
    """300 logits, of which 290 are tokens, ranked, and the sums of their blocks."""

    def __init__(self, kernels, bench, logits_V, temperature=1.0):
        self.kernels, self.logits_V, self.temperature = kernels, logits_V, temperature
        self.ids_TN, self.best_TN = bench.empty((1, 290), np.int32), bench.empty((1, 290), np.float32)
        self.max_TB, self.sum_TB = bench.empty((1, 3), np.float32), bench.empty((1, 3), np.float32)
        logits_TV, fault_T = bench.of(logits_V[None]), bench.faults(1)
        kernels.vocabulary_blocks(
            self.max_TB, self.sum_TB, fault_T, logits_TV, bench.of(np.array([temperature], np.float32)), 290, 0
        )
        kernels.top_logits(self.ids_TN, self.best_TN, logits_TV, self.max_TB, np.arange(3, dtype=np.int32), 290)
        assert (fault_T == NO_FAULT).all() or not np.isfinite(logits_V).all()

    def draw(self, position, count=290, blocks=3, **how):
        how = SamplingParameters(temperature=self.temperature, seed=5, position=position, **how)
        max_B, sum_B = self.max_TB[0, :blocks], self.sum_TB[0, :blocks]
        ids_N, best_N = self.ids_TN[0, :count], self.best_TN[0, :count]
        return self.kernels.sample(how, ids_N, best_N, max_B, sum_B, count == 290 and blocks == 3)[0]


def typical(logits_V, temperature, typical_p, top_k=0, top_p=1.0, min_p=0.0):
    """The places that are kept, and their probabilities."""
    _, p = reference.kept_tokens(logits_V, 290, temperature, top_k, top_p, min_p)
    kept = np.flatnonzero(reference.typical_tokens(p, typical_p))
    return kept, p[kept] / p[kept].sum()


@pytest.mark.parametrize("typical_p", [0.05, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_typical_draws_are_those_of_the_definition(kernels, bench, filters, typical_p):
    for scale, temperature in ((0.5, 1.0), (2.0, 0.8), (6.0, 1.3)):
        row = Row(kernels, bench, bench.floats(300, scale=scale), temperature)
        kept, p = typical(row.logits_V, temperature, typical_p, **filters)
        for position in range(60):
            place = row.draw(position, typical_p=typical_p, **filters)
            target = reference.uniform(5, 0, position)
            assert np.abs(np.cumsum(p)[:-1] - target).min(initial=1) > 1e-6
            assert place == kept[np.searchsorted(np.cumsum(p), target, side="right")]


def test_typical_keeps_a_set_that_may_lack_the_best_token(kernels, bench):
    """One token of 40 % and 60 equal ones of 1 %: the expected surprise is nearer to that of the 60."""
    logits_V = np.full(300, -np.inf, np.float32)
    logits_V[7], logits_V[100:160] = np.log(np.float32(40)), 0
    row = Row(kernels, bench, logits_V)
    drawn = {int(row.ids_TN[0, row.draw(position, typical_p=0.3)]) for position in range(900)}
    assert drawn == set(range(100, 160))  # 30 of them would do, but all are as close
    assert 7 in {int(row.ids_TN[0, row.draw(position, typical_p=0.9)]) for position in range(50)}


def test_typical_frequencies(portable, bench):
    """Chi-squared of 4000 draws within five standard deviations of its mean."""
    row = Row(portable, bench, bench.floats(300, scale=1.5))
    kept, p = typical(row.logits_V, 1.0, 0.6, top_k=50)
    places = np.array([row.draw(position, typical_p=0.6, top_k=50) for position in range(4000)])
    assert set(places) <= set(kept)
    observed = np.array([(places == place).sum() for place in kept])
    freedom = len(kept) - 1
    assert ((observed - p * 4000) ** 2 / (p * 4000)).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_levels_agree_on_typical_draws(portable, kernels, bench):
    for scale in (0.3, 3.0):
        rows = [Row(level, bench, logits_V, 0.9) for logits_V in [bench.floats(300, scale=scale)]
                for level in (portable, kernels)]  # fmt: skip
        for position in range(40):
            assert len({row.draw(position, typical_p=0.7, top_p=0.97) for row in rows}) == 1


def test_candidates_decide_typical_as_the_whole_does_or_not_at_all(kernels, bench):
    row, undecided = Row(kernels, bench, bench.floats(300, scale=3.0)), 0
    for position in range(60):
        for filters in FILTERS:
            whole = row.draw(position, typical_p=0.5, **filters)
            for count in (8, 64):
                found = row.draw(position, count, typical_p=0.5, **filters)
                assert found in (whole, -1)
                undecided += found == -1
                assert found == -1 if not filters else True
    assert 0 < undecided < 60 * 2 * len(FILTERS)


@pytest.mark.parametrize("filters", [*FILTERS, {"top_k": 5, "typical_p": 0.5}], ids=str)
def test_without_the_mass_only_what_needs_none_is_decided(kernels, bench, filters):
    row = Row(kernels, bench, bench.floats(300, scale=3.0), 0.9)
    needs_mass = filters in ({}, {"top_p": 0.9})
    for position in range(40):
        assert row.draw(position, 100, 0, **filters) == (-1 if needs_mass else row.draw(position, **filters))


def penalized(logits, bias, seen, count, dry, how):
    """The definition, in float64."""
    x = logits.astype(np.float64) + bias
    x = np.where(seen != 0, np.where(x > 0, x / how.repetition, x * how.repetition), x)
    return x - np.where(count != 0, how.presence + how.frequency * count, 0) - dry


@pytest.mark.parametrize("how", [Penalties(), Penalties(1.3), Penalties(0.8, 0.5), Penalties(1.1, -0.5, 0.25)], ids=str)
def test_penalties(bench, how):
    logits_N, bias_N = bench.floats(999, scale=5.0), bench.floats(999)
    bias_N[::3], dry_N = 0, bench.of(np.abs(bench.floats(999)))
    seen_N, count_N = (bench.of(bench.rng.integers(0, 3, 999).astype(np.int32)) for _ in range(2))
    expected = penalized(logits_N, bias_N, seen_N, count_N, dry_N, how)
    before, magnitude = logits_N.copy(), np.abs(logits_N) + np.abs(bias_N) + dry_N + 2
    Kernels.penalize(logits_N, bias_N, seen_N, count_N, dry_N, how)
    assert (np.abs(logits_N - expected) <= 8 * U * magnitude).all()
    alone = before[5:6].copy()
    Kernels.penalize(alone, *(array[5:6] for array in (bias_N, seen_N, count_N, dry_N)), how)
    assert alone == logits_N[5]


def test_what_does_not_apply_changes_no_bit_and_minus_infinity_bans(bench):
    logits_N = bench.floats(64, scale=9.0)
    before, zero, none = logits_N.copy(), np.zeros(64, np.float32), np.zeros(64, np.int32)
    Kernels.penalize(logits_N, zero, none, none, zero, Penalties(1.7, 0.3, 0.2))
    assert np.array_equal(logits_N, before)
    banned, some = zero.copy(), np.ones(64, np.int32)
    banned[9] = -np.inf
    Kernels.penalize(logits_N, banned, some, some, zero, Penalties(1.7, 0.3, 0.2))
    assert np.flatnonzero(~np.isfinite(logits_N)).tolist() == [9]


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_log_probabilities(portable, kernels, bench, same_bits, scale):
    row = Row(kernels, bench, bench.floats(300, scale=scale))
    out_N = bench.empty(290, np.float64)
    kernels.log_probabilities(out_N, row.best_TN[0], row.max_TB[0], row.sum_TB[0])
    x = row.best_TN[0].astype(np.float64)
    # The mass is an f32 sum of 300 terms (test_block_sums has their bound), whose logarithm is taken in f64.
    assert np.abs(out_N - (x - np.log(np.exp(x - x[0]).sum()) - x[0])).max() < 200 * U
    other_N = bench.empty(290, np.float64)
    portable.log_probabilities(other_N, row.best_TN[0], row.max_TB[0], row.sum_TB[0])
    same_bits(out_N, other_N)


def test_log_of_a_mass(kernels, bench):
    """Our logarithm alone: the logit is the largest, so what is left is -log of the sum."""
    zero = bench.of(np.zeros(1, np.float32))
    for mass in np.concatenate([1 + bench.rng.random(300), bench.rng.random(300) * 2e5]).astype(np.float32):
        out_N = bench.empty(1, np.float64)
        kernels.log_probabilities(out_N, zero, zero, bench.of(mass[None]))
        assert out_N[0] == pytest.approx(-math.log(mass), rel=2**-50, abs=2**-60)


def test_power(bench):
    for base in (1.0, 1.1, 1.75, 2.0, 7.0, 300.0, 40960.0):
        for exponent in (0.0, 1.0, -1.0, 0.5, 0.7, 3.0, -2.25, 20.0):
            assert Kernels.power(base, exponent) == pytest.approx(base**exponent, rel=2**-44)
    assert [Kernels.power(x, 0.0) for x in (1.0, 7.0)] == [1.0, 1.0]
    assert Kernels.power(3.0, 1e4) == math.inf
    assert Kernels.power(3.0, -1e4) == 0
