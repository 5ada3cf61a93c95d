"""Estimates against published values, enumeration and simulation."""

from itertools import combinations, product
from math import inf

import numpy as np
import pytest

from gspo_jax.numbers.statistics import (
    bootstrap_interval,
    difference,
    estimate,
    independent_difference,
    majority,
    mean_interval,
    pass_at_k,
    sign_flip,
    t_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Independent values: Newcombe (1998), Table I, and the closed form at 0 of n: z²/(n + z²).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_interval_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_samples_of_one_problem_do_not_count_as_independent():
    """Four problems, each always right or always wrong: n is 4, however many samples."""
    once = np.array([[1.0], [0.0], [1.0], [1.0]])
    often = np.repeat(once, 100, axis=1)
    assert mean_interval(often) == pytest.approx(mean_interval(once))
    # mean 0.75, sample deviation 0.5, half width 1.96 * 0.5 / 2 = 0.49
    assert mean_interval(once) == pytest.approx((0.26, 1.24), abs=1e-3)


def test_the_difference_of_two_shares_against_a_published_value():
    """Newcombe (1998), Statistics in Medicine 17:873, Table II (a), method 10: 56/70 - 48/80."""
    before, after = ((k / n, *wilson(k, n)) for k, n in ((48, 80), (56, 70)))
    assert independent_difference(before, after) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


# -------------------------------------------------------------------------------- bootstrap


def test_the_bootstrap_of_many_problems_is_the_normal_interval():
    """400 values with deviation 2: the half width is 1.96 * 2 / 20 = 0.196."""
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = bootstrap_interval(values, resamples=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=0.03)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)


def test_the_bootstrap_is_the_same_every_time_and_never_leaves_the_values():
    values = np.array([0.0, 0.0, 0.25, 1.0])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1, resamples=50)
    low, high = bootstrap_interval(values)
    assert low >= 0 and high <= 1
    assert bootstrap_interval(values[3:]) == (-inf, inf)


@pytest.mark.parametrize(("a", "b"), [(0.3, 1.2), (0.1, 2.0)])
def test_of_ten_problems_nineteen_intervals_in_twenty_hold_the_mean(a, b):
    """4 samples per problem, mean 0.2 and 0.05; percentiles alone would hold 0.87 and 0.74."""
    rng = np.random.default_rng(1)
    rounds = [rng.binomial(4, rng.beta(a, b, 10)) / 4 for _ in range(300)]
    held = np.mean([e.low <= a / (a + b) <= e.high for e in map(estimate, rounds)])
    assert held >= 0.94  # a standard error is 0.013


def test_problems_that_are_added_have_the_average_weight():
    """What is drawn is among 1/4, 20/36, 0/20 and 20/20."""
    ends = bootstrap_interval(np.array([1.0, 20.0]), np.array([4.0, 36.0]), added=(0, 1))
    assert ends == (0, 1)
    low, high = bootstrap_interval(np.full(40, 2.0), np.full(40, 4.0), added=(0, 1))
    # 41 of 42 times an equal one: the deviation of a mean is 0.5 * sqrt(2/42) / sqrt(42) = 0.0168
    assert (low, high) == pytest.approx((0.5 - 2.02 * 0.0168, 0.5 + 2.02 * 0.0168), abs=0.005)


def test_a_ratio_is_weighted_by_its_parts():
    """1 of 4 cells and 20 of 36: 21/40, and not the mean of 1/4 and 5/9."""
    right, cells = np.array([1.0, 20.0]), np.array([4.0, 36.0])
    found = estimate(right, cells)
    assert found.value == 21 / 40 and found.n == 2
    assert bootstrap_interval(right, cells) == (1 / 4, 20 / 36)  # every draw is possible
    same = np.array([0.0, 1.0, 2.0, 4.0, 4.0])
    assert bootstrap_interval(same, np.full(5, 4.0)) == bootstrap_interval(same / 4)


@pytest.mark.parametrize(("right", "cells"), [(0, None), (0, 6.0), (1, None)])
def test_twenty_equal_scores_are_not_certain(right, cells):
    scores = np.full(20, float(right))
    found = estimate(scores, None if cells is None else np.full(20, cells))
    assert found[1:3] == pytest.approx((0, 0.1611) if not right else (0.8389, 1), abs=5e-5)


def test_scores_that_are_right_or_wrong_have_wilsons_interval():
    scores = np.repeat([1.0, 0.0], [15, 133])
    assert estimate(scores) == pytest.approx((15 / 148, 0.0624, 0.1605, 148), abs=5e-5)
    assert estimate(scores * 0.5)[1:3] == bootstrap_interval(scores * 0.5, added=(0, 1))
    assert estimate(scores * 1.5)[1:3] == bootstrap_interval(scores * 1.5)  # no shares


# -------------------------------------------------------------------------------- differences


def test_pairs_tell_more_than_two_intervals():
    """Problems differ much, models little: 0.1 better on every second problem of 400."""
    before = np.tile([0.0, 0.1, 0.8, 0.9], 100)
    after = before + np.tile([0.1, 0.0], 200)
    found = difference(before, after)
    assert found.value == pytest.approx(0.05) and found.n == 400
    # Variance of the pairs 0.05² and 2/402 of those that are added: 1.96 * 0.0864 / 20 = 0.0085
    assert (found.low, found.high) == pytest.approx((0.0415, 0.0585), abs=0.002)
    _, low, high = independent_difference(estimate(before)[:3], estimate(after)[:3])
    assert low < -0.005 and high > 0.1
    back = difference(after, before)
    assert (back.low, back.high) == pytest.approx((-0.0585, -0.0415), abs=0.002)


def test_few_problems_that_differ_do_not_decide():
    """Of 200 problems one differs. Bonett and Price (2012): p₁₀ = 1/202, p₀₁ = 2/202, so
    0.00495 ± 1.96 sqrt((3/202 - 0.00495²) / 202) = 0.00495 ± 0.0168."""
    none, one = np.zeros(200), np.eye(200)[0]
    found = difference(none, one)
    assert found.value == 1 / 200
    assert (found.low, found.high) == pytest.approx((-0.0119, 0.0218), abs=0.004)
    same = difference(one, one)
    assert same.value == 0 and same.low == pytest.approx(-same.high, abs=0.004) != 0
    lengths = np.array([7.0, 9.0])
    assert difference(lengths, lengths)[:3] == (0, 0, 0)


def test_the_difference_of_ratios_has_their_weights():
    right, cells = np.array([1.0, 20.0, 3.0]), np.array([4.0, 36.0, 4.0])
    better = right + np.array([2.0, 0, 0])
    found = difference(right, better, cells)
    assert found.value == pytest.approx(2 / 44)
    assert found[1:3] == bootstrap_interval(better - right, cells, added=(-1, 1))


# ------------------------------------------------------------------------------ pass@k, maj@k


def test_pass_at_k_is_the_mean_of_the_best_over_all_choices_of_k():
    scores = np.array([[0, 1, 0, 0, 1.0], [0, 0, 0, 0, 0], [0.5, 0.25, 2, 0, 1]])
    for k in range(1, 6):
        tried = [[max(chosen) for chosen in combinations(row, k)] for row in scores]
        np.testing.assert_allclose(pass_at_k(scores, k), np.mean(tried, 1), rtol=1e-12)


def test_pass_at_k_of_right_and_wrong_is_the_formula_of_the_paper():
    # c = 2 right of K = 5: 1 - C(3, 2)/C(5, 2) = 1 - 3/10;  c = 1 of 200, k = 100: 1/2
    assert pass_at_k(np.array([[1, 0, 0, 1.0, 0]]), 2) == pytest.approx([0.7])
    many = np.zeros((1, 200))
    many[0, 7] = 1
    assert pass_at_k(many, 100) == pytest.approx([0.5])
    with pytest.raises(ValueError, match=r"pass@6 of 5 samples: k must be from 1 to 5"):
        pass_at_k(np.zeros((1, 5)), 6)


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["7", "8", "8"], "8"),
        (["7", "8", "8", "7"], "7"),  # a tie: the first
        ([None, None, None, "3"], "3"),  # what gives no answer does not vote
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority(answers, wanted):
    assert majority(answers) == wanted


def test_the_interval_is_students():
    # 1 ... 5: mean 3, sd sqrt(2.5); t(0.975, 4) = 2.776445 in the tables.
    mean, low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)
    np.testing.assert_allclose([mean, low, high], [3, 3 - half, 3 + half], rtol=1e-6)
    assert t_interval([7.0]) == (7, -np.inf, np.inf)


def test_the_sign_flip_test_is_exact():
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8  # only +++ and --- are as far from 0
    assert sign_flip([0.1, 0.2, 0.3]) == 2 / 8  # in floats 0.1 + 0.2 is not 0.3
    x = [0.3, -0.1, 0.25, 0.07, -0.02]
    far = [abs(np.dot(s, x)) >= abs(sum(x)) - 1e-12 for s in product((1, -1), repeat=5)]
    assert sign_flip(x) == np.mean(far)
    assert sign_flip([0.0, 0.0]) == 1
