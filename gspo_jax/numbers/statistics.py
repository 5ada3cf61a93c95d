"""Scores as numbers that can be trusted: shares, means, pass@k, votes and differences, with 95 %
intervals over problems; and means over seeds. Arrays and plain Python; no JAX.

Samples of one problem are not independent, so n is a number of problems, or of seeds.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, stdtrit

Z95 = 1.959964
RESAMPLES = 4000
_AT_ONCE = 2**22  # numbers drawn at a time


class Estimate(NamedTuple):
    """A mean over n problems with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def estimate(
    scores: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"] | None = None
) -> Estimate:
    """The mean of one number per problem, or the ratio Σ scores / Σ weights.

    The interval is Wilson's where every score is 0 or 1, else the bootstrap's. What lies between 0
    and 1 is resampled together with one problem more that scores 0 and one that scores 1, so that
    a few rare successes do not pass for certainty, as in the interval of Agresti and Coull, 1998.

    Args:
        weights: what each score is a part of, as right cells are a part of a grid's cells.
    """
    w = np.ones(len(scores)) if weights is None else weights
    rates, n = scores / w, len(scores)
    value = float(scores.sum() / w.sum())
    if np.isin(rates, (0, 1)).all() and np.ptp(w) == 0:
        return Estimate(value, *wilson(int(rates.sum()), n), n)
    shares = ((rates >= 0) & (rates <= 1)).all()
    return Estimate(value, *bootstrap_interval(scores, w, added=(0, 1) if shares else ()), n)


def difference(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"] | None = None,
) -> Estimate:
    """`after` minus `before` on the same problems: the bootstrap of the pairs.

    Differences of shares are resampled together with one problem more that `before` alone solves
    and one that `after` alone solves, after Bonett and Price, 2012: otherwise a single problem
    that differs would already show which is better, and none would show that they are the same.
    """
    w = np.ones(len(before)) if weights is None else weights
    pairs = after - before
    shares = (np.minimum(before, after) >= 0).all() and (np.maximum(before, after) <= w).all()
    ends = bootstrap_interval(pairs, w, added=(-1, 1) if shares else ())
    return Estimate(float(pairs.sum() / w.sum()), *ends, len(pairs))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927); it stays inside [0, 1]."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(scores: Float[np.ndarray, "N K"]) -> tuple[float, float]:
    """95 % interval of the mean over problems, by the normal distribution."""
    per_problem = scores.mean(1)
    n = len(per_problem)
    half = Z95 * per_problem.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(per_problem.mean() - half), float(per_problem.mean() + half)


def bootstrap_interval(
    values: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"] | None = None,
    *,
    added: Sequence[float | int] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a mean, or of Σ values / Σ weights: problems drawn anew, with replacement.

    The ends are percentiles of the resampled means. With few problems these lie too close, by
    √((n-1)/n) and for want of Student's t; so the percentiles are Φ(±√(n/(n-1)) t), the "expanded"
    ones of Hesterberg, 2015, https://arxiv.org/abs/1411.5279. One problem tells nothing.

    Args:
        added: means of problems of average weight that are drawn from, too.
    """
    w = np.ones(len(values)) if weights is None else weights
    if len(values) < 2:
        return -math.inf, math.inf
    values = np.concatenate([values, np.array(added, float) * w.mean()])
    w = np.concatenate([w, np.full(len(added), w.mean())])
    rng, n = np.random.default_rng(seed), len(values)
    means, rows = [], max(_AT_ONCE // n, 1)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, n, (min(rows, resamples - start), n), dtype=np.int32)
        means.append(values[drawn].sum(1) / w[drawn].sum(1))
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def independent_difference(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> tuple[float, float, float]:
    """after - before of two (value, low, high), with its 95 % interval if they are independent.

        low = d - √((p₂ - l₂)² + (u₁ - p₁)²),  high = d + √((u₂ - p₂)² + (p₁ - l₁)²)

    The square-and-add interval (Newcombe, 1998, method 10; Zou and Donner, 2008). For two
    measurements of the same problems it is wider than that of the pairs, of which it needs to know
    nothing.
    """
    (a, a_low, a_high), (b, b_low, b_high) = before, after
    below, above = math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    return b - a, b - a - below, b - a + above


def pass_at_k(scores: Float[np.ndarray, "N K"], k: int) -> Float[np.ndarray, " N"]:
    """The best score of k of a problem's K samples, averaged over all choices of k; unbiased.

        Σᵢ s₍ᵢ₎ C(i-1, k-1) / C(K, k)  over sorted scores;  for c ones and else zeros
        1 - C(K-c, k) / C(K, k)

    The latter is pass@k of Chen et al., 2021, https://arxiv.org/abs/2107.03374.
    """
    samples = scores.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must be from 1 to {samples}.")
    # Row i is the best of a choice when the other k - 1 are among the i before it.
    best = [math.comb(i, k - 1) / math.comb(samples, k) for i in range(samples)]
    return np.sort(scores, 1) @ np.array(best)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of equally frequent ones the first; None where there is none."""
    given = [answer for answer in answers if answer is not None]
    return Counter(given).most_common(1)[0][0] if given else None


# -------------------------------------------------------------------------------- over seeds


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean, 95 % interval and n."""
    mean, low, high = t_interval(values)
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def t_interval(values: Sequence[float | int]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean; infinitely wide for one value."""
    x = np.asarray(values, float)
    n, mean = len(x), float(np.mean(x))
    half = float(stdtrit(n - 1, 0.975) * x.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    return mean, mean - half, mean + half


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p that the mean is 0, if each difference could as well have the other sign.

    Exact, over all 2^n choices of signs; so 5 pairs give 0.0625 at the least.
    """
    x = np.asarray(differences, float)
    signs = np.array(list(product((1, -1), repeat=len(x))))
    # Rounding must not part sums that are equal.
    return float(np.mean(np.abs(signs @ x) >= abs(x.sum()) * (1 - 1e-9)))
