"""From logits to a token: block sums, candidates, filters, the draw, the random numbers.

T tokens, V vocabulary, B blocks of 128, N candidates.
"""

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, Kernels, SamplingParameters, reference

U = 2.0**-24  # half an ulp of f32 at 1
EXP_ULPS = 2  # half ulps of our exp; test_exponential checks it


def blocks(kernels, bench, logits_TV, temperature_T, valid):
    T, B = len(logits_TV), -(-logits_TV.shape[1] // 128)
    max_TB, sum_TB, fault_T = bench.empty((T, B), np.float32), bench.empty((T, B), np.float32), bench.faults(T)
    kernels.vocabulary_blocks(max_TB, sum_TB, fault_T, logits_TV, temperature_T, valid, 0)
    assert (fault_T == NO_FAULT).all()
    return max_TB, sum_TB


def top(kernels, bench, logits_TV, valid, first_block, count, step=1):
    """Block b has the ids from 128 (first_block + b * step) on."""
    ids_TN = bench.empty((len(logits_TV), count), np.int32)
    best_TN = bench.empty((len(logits_TV), count), np.float32)
    T, B = len(logits_TV), -(-logits_TV.shape[1] // 128)
    max_TB, sum_TB, fault_T = bench.empty((T, B), np.float32), bench.empty((T, B), np.float32), bench.faults(T)
    kernels.vocabulary_blocks(max_TB, sum_TB, fault_T, logits_TV, bench.of(np.ones(T, np.float32)), valid, 0)
    block_B = bench.of(np.arange(B, dtype=np.int32) * np.int32(step) + np.int32(first_block))
    kernels.top_logits(ids_TN, best_TN, logits_TV, max_TB, block_B, valid)
    return ids_TN, best_TN


@pytest.mark.parametrize(
    ("T", "V", "valid"), [(1, 1, 1), (3, 127, 127), (2, 128, 100), (2, 129, 129), (3, 300, 130), (2, 300, 128),
                          (1, 40, 0), (2, 40_000, 39_990)]
)  # fmt: skip
def test_block_sums(portable, kernels, bench, same_bits, T, V, valid):
    logits_TV, temperature_T = bench.floats(T, V, scale=5.0), bench.of(np.array([0.7, 0, 1.3], np.float32)[:T])
    logits_TV[0, V // 2] = -300  # vanishes
    logits_TV[:, valid:] = 1e9  # masked
    found = blocks(portable, bench, logits_TV, temperature_T, valid)
    same_bits(blocks(kernels, bench, logits_TV, temperature_T, valid), found)
    for t in range(T):
        max_B, sum_B = reference.vocabulary_blocks(logits_TV[t], float(temperature_T[t]), valid)
        assert np.array_equal(found[0][t], max_B)
        # Terms: a difference and a quotient of at most 87 are rounded; a lane adds 8 of them, the tree 4.
        bound_B = sum_B * (2 * 87 + EXP_ULPS + 8 + 4) * U + 1e-35
        assert (np.abs(found[1][t] - sum_B) <= bound_B).all()
        alone = blocks(kernels, bench, bench.of(logits_TV[t : t + 1]), bench.of(temperature_T[t : t + 1]), valid)
        same_bits(alone, (found[0][t : t + 1], found[1][t : t + 1]))


def test_temperature_zero_is_read_as_one(portable, bench, same_bits):
    logits_TV = bench.floats(2, 200)
    logits_TV[1] = logits_TV[0]
    max_TB, sum_TB = blocks(portable, bench, logits_TV, bench.of(np.array([0, 1], np.float32)), 200)
    same_bits(sum_TB[0], sum_TB[1])
    same_bits(max_TB[0], max_TB[1])


@pytest.mark.parametrize(("V", "valid", "count"), [(1, 1, 1), (33, 33, 5), (130, 100, 64), (300, 7, 16), (50, 50, 50)])
def test_top_logits(kernels, bench, V, valid, count):
    logits_TV = bench.floats(3, V)
    logits_TV[1] = np.rint(logits_TV[1])  # many ties, zeros of both signs
    logits_TV[2] = np.sort(logits_TV[2])
    logits_TV[:, valid:] = 1e9
    ids_TN, best_TN = top(kernels, bench, logits_TV, valid, 8, count)
    for t in range(3):
        expected = reference.ranked(logits_TV[t], valid)[:count]
        present = len(expected)
        assert np.array_equal(ids_TN[t, :present], expected + 1024)
        assert np.array_equal(best_TN[t, :present], logits_TV[t, expected])
        assert (ids_TN[t, present:] == -1).all()
        assert (best_TN[t, present:] == -np.inf).all()


def awkward_rows(bench, V):
    """Rows of ties, zeros of both signs, NaN, infinities, blocks without a number, every magnitude and order."""
    x_TV = np.stack([bench.floats(V) for _ in range(9)])
    x_TV[0] = 2.5
    x_TV[1] = np.where(x_TV[1] < 0.5, np.copysign(0, x_TV[1]), -1)
    x_TV[2, bench.rng.random(V) < 0.3] = np.nan
    x_TV[2, :200] = -np.nan
    x_TV[3, V // 3 : V // 3 + 300] = -np.inf
    x_TV[4] = -np.inf
    x_TV[4, V // 2] = np.nan
    x_TV[5, bench.rng.random(V) < 0.02] = np.inf
    x_TV[6] = np.sort(np.rint(x_TV[6] * 4))
    x_TV[7] = -np.sort(-x_TV[7])
    x_TV[8] = bench.wild(V)
    return x_TV


@pytest.mark.parametrize(
    ("V", "valid", "count"),
    [(1, 1, 3), (127, 127, 1), (128, 128, 128), (300, 300, 400), (300, 5, 16), (300, 0, 4), (1000, 1000, 8),
     (1000, 1000, 7), (2000, 1290, 3), (2000, 1999, 16), (2000, 1281, 11), (5000, 4990, 25), (5000, 4990, 300)]
)  # fmt: skip
def test_top_logits_are_those_of_the_definition(kernels, bench, same_bits, V, valid, count):
    logits_TV = awkward_rows(bench, V)
    expected_ids, expected = np.full((9, count), -1, np.int32), np.full((9, count), -np.inf, np.float32)
    for t, row_V in enumerate(logits_TV):
        best = np.argsort(-np.where(np.isnan(row_V), -np.inf, row_V)[:valid], kind="stable")[:count]
        expected_ids[t, : len(best)] = 128 * (5 + best // 128 * 3) + best % 128
        expected[t, : len(best)] = row_V[best]
    logits_TV[:, valid:] = 1e9  # masked
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 9)):
        found = top(kernels, bench, bench.of(logits_TV[rows]), valid, 5, count, step=3)
        same_bits(found, (expected_ids[rows], expected[rows]))


@pytest.mark.parametrize(("N", "count"), [(1, 1), (50, 7), (50, 50), (200, 64), (5, 9)])
def test_merged_candidates_are_those_of_the_definition(kernels, bench, same_bits, N, count):
    ids_TN = bench.of(np.stack([bench.rng.permutation(900)[:N].astype(np.int32) for _ in range(4)]))
    logits_TN = bench.of(np.rint(bench.floats(4, N, scale=3.0)))
    logits_TN[1], logits_TN[2, : N // 2] = -np.inf, np.nan
    missing_TN = bench.rng.random((4, N)) < 0.2
    ids_TN[missing_TN], logits_TN[missing_TN] = -1, -np.inf
    ranked_TN = np.where(np.isnan(logits_TN), -np.inf, logits_TN)
    order_TN = np.stack([np.lexsort((ids_TN[t], -ranked_TN[t], ids_TN[t] < 0))[:count] for t in range(4)])
    expected = np.take_along_axis(ids_TN, order_TN, 1), np.take_along_axis(logits_TN, order_TN, 1)
    kernels.merge_candidates(ids_TN, logits_TN, count)
    same_bits((ids_TN[:, :count], logits_TN[:, :count]), expected)


def test_candidates_of_ranks_merge_to_those_of_the_whole(kernels, bench, same_bits):
    logits_TV = bench.of(np.rint(bench.floats(1, 300, scale=3.0)))
    logits_TV[0, 130:140] = -np.inf
    parts = []
    for first, last in ((256, 300), (0, 128), (128, 256)):
        parts.append(top(kernels, bench, bench.of(logits_TV[:, first:last]), last - first, first // 128, 60))
    ids_N = bench.of(np.concatenate([ids[0] for ids, _ in parts]))
    logits_N = bench.of(np.concatenate([best[0] for _, best in parts]))
    kernels.merge_candidates(ids_N[None], logits_N[None], len(ids_N))
    ids_TN, best_TN = top(kernels, bench, logits_TV, 300, 0, 60)
    same_bits((ids_N[:60], logits_N[:60]), (ids_TN[0], best_TN[0]))
    assert (ids_N[44 + 120 :] == -1).all()


class Draws:
    """One distribution of 300 logits, of which 290 are tokens, and its candidates."""

    def __init__(self, kernels, bench, temperature, scale=2.0):
        self.kernels, self.bench, self.valid = kernels, bench, 290
        self.logits_TV = bench.floats(1, 300, scale=scale)
        self.max_TB, self.sum_TB = blocks(
            kernels, bench, self.logits_TV, bench.of(np.array([temperature], np.float32)), self.valid
        )
        self.lists = {n: top(kernels, bench, self.logits_TV, self.valid, 0, n) for n in (4, 16, 64, 300)}

    def draw(self, how, count=300):
        ids_TN, best_TN = self.lists[count]
        return self.kernels.sample(how, ids_TN[0], best_TN[0], self.max_TB[0], self.sum_TB[0], count == 300)


FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 400},
]


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_are_those_of_the_definition(kernels, bench, filters, temperature):
    draws = Draws(kernels, bench, temperature)
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    ids, p = reference.kept_tokens(draws.logits_TV[0], draws.valid, temperature, **full)
    softmax = reference.kept_tokens(draws.logits_TV[0], draws.valid, temperature, 0, 1.0, 0.0)[1]
    # No draw may hang on rounding, which moves the cumulative mass by some 1e-7.
    for position in range(150):
        how = SamplingParameters(temperature=temperature, seed=2**63 + 7, sample_index=3, position=position, **filters)
        place, share = draws.draw(how)
        target = reference.uniform(how.seed, how.sample_index, position)
        expected = int(np.searchsorted(np.cumsum(p), target, side="right"))
        assert np.abs(np.cumsum(p)[:-1] - target).min(initial=1) > 1e-6
        assert place == expected
        assert place < len(ids)
        assert share == pytest.approx(softmax[place], rel=300 * U)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_candidates_decide_the_same_or_not_at_all(portable, kernels, bench, filters):
    draws = Draws(kernels, bench, 1.0, scale=4.0)
    undecided = {4: 0, 16: 0, 64: 0}
    for position in range(60):
        how = SamplingParameters(temperature=1.0, seed=11, position=position, **filters)
        whole = draws.draw(how)
        if how.top_k:  # the mass of all tokens decides nothing
            ids_TN, best_TN = draws.lists[300]
            no_B = np.empty(0, np.float32)
            assert draws.kernels.sample(how, ids_TN[0], best_TN[0], no_B, no_B, True)[0] == whole[0]
        for count in undecided:
            found = draws.draw(how, count)
            undecided[count] += found[0] == -1
            assert found in (whole, (-1, 0.0))
        draws.kernels = portable
        assert draws.draw(how) == whole
        draws.kernels = kernels
    for count, times in undecided.items():
        if filters.get("top_k", 400) <= count:
            assert times == 0
        if filters.get("top_k", 0) > count:
            assert times == 60
    if not filters:
        assert 0 < undecided[4] < 60
        assert undecided[4] >= undecided[16] >= undecided[64]


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_frequencies(portable, bench, filters):
    """Chi-squared of 4000 draws within five standard deviations of its mean."""
    draws, counts = Draws(portable, bench, 0.9), np.zeros(300)
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    p = reference.kept_tokens(draws.logits_TV[0], draws.valid, 0.9, **full)[1]
    for position in range(4000):
        how = SamplingParameters(temperature=0.9, seed=77, position=position, **filters)
        counts[draws.draw(how)[0]] += 1
    common = p * 4000 >= 5
    observed = np.append(counts[: len(p)][common], counts.sum() - counts[: len(p)][common].sum())
    expected = np.append(p[common], 1 - p[common].sum()) * 4000
    observed, expected = observed[expected > 1e-6], expected[expected > 1e-6]
    freedom = len(observed) - 1
    assert counts[len(p) :].sum() == 0
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_takes_the_best(kernels, bench):
    draws = Draws(kernels, bench, 1.0)
    softmax = reference.kept_tokens(draws.logits_TV[0], draws.valid, 1.0, 0, 1.0, 0.0)[1]
    for count in (4, 300):
        for seed in range(20):
            place, share = draws.draw(SamplingParameters(temperature=0.0, seed=seed), count)
            assert place == 0
            assert share == pytest.approx(softmax[0], rel=300 * U)


def test_exponential(kernels, bench):
    """Our exp, seen through a probability: at most 2 half ulps off (EXP_ULPS), +0 below -87."""
    ids_N, zero, one = bench.of(np.zeros(1, np.int32)), bench.of(np.zeros(1, np.float32)), np.ones(1, np.float32)
    inputs = np.concatenate([[0, -1e-30, -86.99999, -87], -87 * bench.rng.random(500), -bench.rng.random(500)])
    for x in inputs.astype(np.float32):
        place, found = kernels.sample(SamplingParameters(), ids_N, bench.of(x[None]), zero, one, True)
        assert place == 0
        assert abs(found - np.exp(np.float64(x))) <= EXP_ULPS * U * np.exp(np.float64(x))
    assert kernels.sample(SamplingParameters(), ids_N, np.array([-87.00001], np.float32), zero, one, True) == (0, 0.0)


def test_a_target_beyond_the_last_sum(kernels, bench):
    """Block sums are f32, terms are added in f64: what Z has too much goes to the last token that has any mass."""
    logits_N, ids_N = bench.of(np.array([2, 1, 0, -200], np.float32)), bench.of(np.arange(4, dtype=np.int32))
    max_B, sum_B = bench.of(np.array([2], np.float32)), bench.of(np.array([3.2], np.float32))  # twice the true sum
    beyond = [p for p in range(40) if Kernels.uniform(0, 0, p) > 0.55]
    assert beyond
    for position in beyond:
        how = SamplingParameters(temperature=1.0, position=position)
        assert kernels.sample(how, ids_N, logits_N, max_B, sum_B, True)[0] == 2
        assert kernels.sample(how, ids_N, logits_N, max_B, sum_B, False) == (-1, 0.0)


def test_no_candidates_give_no_token(kernels, bench):
    ids_N, logits_N = bench.of(np.full(3, -1, np.int32)), bench.of(np.full(3, -np.inf, np.float32))
    masked, zero = bench.of(np.array([-np.inf], np.float32)), bench.of(np.zeros(1, np.float32))
    for temperature in (0.0, 1.0):
        how = SamplingParameters(temperature=temperature)
        assert kernels.sample(how, ids_N, logits_N, masked, zero, True) == (-1, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_block_sums_are_merged_by_rule_10(kernels, bench, temperature):
    """In ascending order, masked blocks left out, and one rounding per operation."""
    how, ids_N, one = SamplingParameters(temperature, top_k=1), np.zeros(1, np.int32), np.ones(1, np.float32)
    max_B, sum_B = bench.floats(60, scale=2.0), bench.of(np.float32(1) + bench.rng.random(60, np.float32))
    max_B[20:] += np.float32(6)
    max_B[[0, 7]], sum_B[[0, 7]] = -np.inf, 0
    most, mass = max_B[1], sum_B[1]
    for largest, total in zip(max_B[2:], sum_B[2:], strict=True):
        before, most = most, max(most, largest)
        alpha, beta = (kernels.sample(how, ids_N, x[None], most[None], one, True)[1] for x in (before, largest))
        if largest > -np.inf:
            mass = np.float32(float(total) * beta + float(mass * np.float32(alpha)))  # the product is exact
    assert kernels.sample(how, ids_N, most[None], max_B, sum_B, True) == (0, np.float32(1) / mass)


# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), PHILOX)
def test_philox_known_answers(counter, key, result):
    assert reference.philox4x32(counter, key) == result
    sample_index, position, seed = (low | high << 32 for low, high in (counter[:2], counter[2:], key))
    expected = ((result[1] << 32 | result[0]) >> 11) * 2.0**-53
    assert Kernels.uniform(seed, sample_index, position) == expected
    assert reference.uniform(seed, sample_index, position) == expected


def test_uniform_numbers_depend_on_every_argument():
    numbers = {
        Kernels.uniform(seed, sample, position)
        for seed in (0, 1, 2**32, 2**63)
        for sample in (0, 1, 2**32)
        for position in (0, 1, 2**40)
    }
    assert len(numbers) == 36
    assert all(0 <= number < 1 for number in numbers)
