"""The scaling law L(N, D) = E + A / N^a + B / D^b of the loss, fitted to runs (Hoffmann et al. 2022, approach 3).

    fit = fit_law(parameters, tokens, losses)          # three arrays, (runs,) each
    fit.law.optimum(1e18)                              # the best N and D for a budget of FLOP, with C = 6 N D
    fit.predict(1e8, 2e9)                              # a loss and its 95% interval

The objective is the paper's (section 3.3, equation 3): the sum over runs of a Huber loss, with delta 1e-3, of the difference of
log losses. Of many starts the lowest end counts. Its authors minimise it by L-BFGS, which ended early for them (Besiroglu et al.
2024, arXiv:2404.10102). Here it is Levenberg-Marquardt in float64, on all starts and resamples at once. A test compares it with
L-BFGS.

Intervals are percentiles of a bootstrap over runs. They say how much a figure would change with other runs of this kind. They
know nothing of what bends the law beyond the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from kindling.errors import KindlingError
from kindling.evaluation.intervals import Interval

DELTA = 1e-3  # of the Huber loss, in nats of log loss
EXPONENTS = (0.1, 0.3, 0.6, 1.0, 1.5)  # starts, for a and b alike
SHARES = (0.1, 0.5, 0.9)  # starts: E as a share of the lowest loss
PARTS = (0.3, 0.7)  # starts: the term in N, as a part of the two
MOST_EXPONENT, LEAST_LOG_E = 3.0, -12.0  # the fit stays within these
FEWEST_RUNS, FEWEST_LEVELS = 8, 3  # levels: different sizes, and different numbers of tokens
RESAMPLES = 1000
RESAMPLE_STARTS = 2  # the best end of all runs, and one that is far from it
STEPS, TOLERANCE = 400, 1e-13
TINY = 1e-300  # instead of 0, where a logarithm or a quotient is taken
NAMES = ("E", "A", "B", "a", "b")


class ScalingError(KindlingError):
    """Runs that no law can be fitted to, or a law that cannot be used."""


class TooFewRuns(ScalingError):
    """No law can be fitted to so few runs."""


class Law(NamedTuple):
    """The five constants."""

    E: float
    A: float
    B: float
    a: float
    b: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a model of so many parameters after so many tokens."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b

    def optimum(self, flop: float) -> tuple[float, float]:
        """Return the parameters and tokens of the lowest loss for a budget of 6 N D FLOP (Hoffmann et al. 2022, equation 4).

        Each is at least 1. A resample of few runs may have an exponent of 0, whose equation gives 0 or infinity.
        """
        most = math.log(flop / 6)
        of_n, of_d = (math.log(max(TINY, x)) for x in (self.a * self.A, self.b * self.B))
        logarithm = (of_n - of_d + self.b * most) / max(TINY, self.a + self.b)
        parameters = math.exp(min(most, max(0.0, logarithm)))
        return parameters, flop / 6 / parameters


class Prediction(NamedTuple):
    """A loss, and the 95% interval in which one run is expected to end."""

    loss: float
    interval: Interval


@dataclass(frozen=True)
class Fit:
    """A law, the same fitted to resampled runs, and how far the runs lie from it."""

    law: Law
    resamples: np.ndarray  # (resamples, 5), the columns in the order of NAMES
    residuals: np.ndarray  # (runs,) log of measured over predicted loss

    def interval(self, name: str) -> Interval:
        """Return the 95% interval of a constant."""
        return _percentiles(self.resamples[:, NAMES.index(name)])

    def optimum_intervals(self, flop: float) -> tuple[Interval, Interval]:
        """Return the 95% intervals of the best parameters and tokens for a budget."""
        found = np.array([Law(*row).optimum(flop) for row in self.resamples])  # (resamples, 2)
        return _percentiles(found[:, 0]), _percentiles(found[:, 1])

    def predict(self, parameters: float, tokens: float) -> Prediction:
        """Return the loss of a run that was not fitted, and its 95% interval.

        The interval holds what resampling changes in the law, and the scatter of single runs around it.
        """
        losses = np.array([Law(*row).loss(parameters, tokens) for row in self.resamples])
        runs = len(self.residuals)
        scatter = self.residuals * (runs / (runs - len(NAMES))) ** 0.5  # five constants were fitted to them
        drawn = np.random.default_rng(0).choice(scatter, len(losses))
        return Prediction(self.law.loss(parameters, tokens), _percentiles(losses * np.exp(drawn)))


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def best_for_seconds(
    law: Law, seconds: float, parameters: Sequence[float], seconds_per_token: Sequence[float]
) -> tuple[float, float]:
    """Return the parameters and tokens of the lowest loss in so much time, by measured seconds per token of some sizes.

    Between the sizes, log time is interpolated over log size. Nothing beyond the smallest and the largest of them is considered.
    """
    order = np.argsort(parameters)
    logs, times = np.log(np.asarray(parameters))[order], np.log(np.asarray(seconds_per_token))[order]
    grid = np.linspace(logs[0], logs[-1], 2001)
    tokens = seconds / np.exp(np.interp(grid, logs, times))
    losses = law.E + law.A * np.exp(-law.a * grid) + law.B * tokens**-law.b
    best = int(np.argmin(losses))
    return float(np.exp(grid[best])), float(tokens[best])


# -- the fit ----------------------------------------------------------------------------------------------------------


def fit_law(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], n: int = RESAMPLES, seed: int = 0
) -> Fit:
    """Fit the law to runs, and to `n` resamples of them. Raises ScalingError for too few runs, or too few different ones."""
    N, D, L = (np.asarray(column, dtype=np.float64) for column in (parameters, tokens, losses))
    _require_usable(N, D, L)
    problem = _Problem(N, D, L)
    ends, costs = problem.minimise(problem.starts(), np.ones((1, len(L))))
    best = ends[np.argmin(costs)]
    others = ends[np.argsort(costs)][:: len(ends) // RESAMPLE_STARTS][1:]  # a resample may be best in another valley
    counts = _resampled_counts(N, D, n, seed)  # (n, runs)
    starts = np.tile(np.vstack([best, others]), (n, 1))  # (n * k, 5)
    k = 1 + len(others)
    ends, costs = problem.minimise(starts, np.repeat(counts, k, axis=0))
    chosen = np.argmin(costs.reshape(n, k), axis=1)
    resamples = np.array([problem.law(row) for row in ends.reshape(n, k, 5)[np.arange(n), chosen]])
    law = problem.law(best)
    return Fit(law, resamples, np.log(L) - np.log([law.loss(x, y) for x, y in zip(N, D)]))


def _require_usable(N: np.ndarray, D: np.ndarray, L: np.ndarray) -> None:
    if not all(np.isfinite(column).all() and (column > 0).all() for column in (N, D, L)):
        raise ScalingError(
            "parameters, tokens and losses must be finite and above 0, but some are not; leave out the runs that diverged"
        )
    sizes, lengths = len(np.unique(N)), len(np.unique(D))
    if len(L) < FEWEST_RUNS or sizes < FEWEST_LEVELS or lengths < FEWEST_LEVELS:
        raise TooFewRuns(
            f"a scaling law must be fitted to at least {FEWEST_RUNS} runs of {FEWEST_LEVELS} sizes and {FEWEST_LEVELS} numbers "
            f"of tokens, but there are {len(L)} of {sizes} and {lengths}; train more runs"
        )


def _resampled_counts(N: np.ndarray, D: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return how often each run is in each resample, (n, runs). A resample that no law can be fitted to is drawn again."""
    rng, counts = np.random.default_rng(seed), np.zeros((n, len(N)))
    for row in counts:
        while True:
            drawn = rng.integers(len(N), size=len(N))
            levels = min(len(np.unique(N[drawn])), len(np.unique(D[drawn])))
            if levels >= FEWEST_LEVELS and len(np.unique(drawn)) > len(NAMES):
                break
        np.add.at(row, drawn, 1)
    return counts


class _Problem:
    """The runs, and points (S, 5) in its own coordinates: log E, log A', log B', a, b.

    A' and B' are A and B for N and D as multiples of their geometric means. With A and B themselves, the constants of a term
    could hardly be told apart.
    """

    def __init__(self, N: np.ndarray, D: np.ndarray, L: np.ndarray):
        self.mean_n, self.mean_d = np.log(N).mean(), np.log(D).mean()
        self.x, self.y, self.log_loss = np.log(N) - self.mean_n, np.log(D) - self.mean_d, np.log(L)
        self.low = np.array([LEAST_LOG_E, -np.inf, -np.inf, 0.0, 0.0])
        self.high = np.array([self.log_loss.min(), np.inf, np.inf, MOST_EXPONENT, MOST_EXPONENT])

    def law(self, point: np.ndarray) -> Law:
        """Return the law of one point."""
        e, a0, b0, a, b = (float(value) for value in point)
        return Law(math.exp(e), math.exp(a0 + a * self.mean_n), math.exp(b0 + b * self.mean_d), a, b)

    def starts(self) -> np.ndarray:
        """Return a grid of starts: for each pair of exponents and each E, what is left is shared by the two terms."""
        lowest, typical = np.exp(self.log_loss.min()), np.exp(np.median(self.log_loss))
        grid = product(SHARES, PARTS, EXPONENTS, EXPONENTS)
        rest = [(share * lowest, typical - share * lowest, part, a, b) for share, part, a, b in grid]
        return np.array([(np.log(e), np.log(r * part), np.log(r * (1 - part)), a, b) for e, r, part, a, b in rest])

    def residuals(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return predicted minus measured log losses (S, runs), and their derivatives (S, runs, 5)."""
        e, a0, b0, a, b = (column[:, None] for column in points.T)  # (S, 1) each
        terms = np.stack([np.broadcast_to(e, (len(e), len(self.x))), a0 - a * self.x, b0 - b * self.y])  # (3, S, runs)
        top = terms.max(axis=0)
        parts = np.exp(terms - top)
        total = parts.sum(axis=0)
        pe, pa, pb = parts / total
        return top + np.log(total) - self.log_loss, np.stack([pe, pa, pb, -pa * self.x, -pb * self.y], axis=-1)

    def minimise(self, points: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends (S, 5) of a descent from each point, and the objective there, (S,).

        `counts` (S, runs) or (1, runs) says how often each run counts. Levenberg-Marquardt; the Huber loss enters as weights,
        which bound it from above, so each accepted step lowers it (iteratively reweighted least squares).
        """
        points = np.clip(points, self.low, self.high)
        counts = np.broadcast_to(counts, (len(points), counts.shape[1]))
        damping, moving = np.full(len(points), 1e-2), np.arange(len(points))
        r, J = self.residuals(points)
        costs = _huber(r, counts)
        for _ in range(STEPS):
            p, c, lam = points[moving], counts[moving], damping[moving]
            r, J = self.residuals(p)
            W = c * np.minimum(1, DELTA / np.maximum(np.abs(r), DELTA))  # (S, runs)
            H = np.einsum("sri,sr,srj->sij", J, W, J)
            g = np.einsum("sri,sr->si", J, W * r)
            diagonal = np.einsum("sii->si", H)
            H = H + (lam[:, None] * diagonal + 1e-14)[:, :, None] * np.eye(5)
            tried = np.clip(p - np.linalg.solve(H, g[:, :, None])[:, :, 0], self.low, self.high)
            new = _huber(self.residuals(tried)[0], c)
            better = new < costs[moving]
            gain = np.where(better, costs[moving] - new, np.inf)
            points[moving[better]], costs[moving[better]] = tried[better], new[better]
            damping[moving] = np.where(better, lam / 4, lam * 5)
            moving = moving[(gain > TOLERANCE * costs[moving]) & (damping[moving] < 1e12)]
            if not len(moving):
                break
        return points, costs


def _huber(r: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the sum of the Huber losses of residuals (S, runs): (S,)."""
    size = np.abs(r)
    return (counts * np.where(size <= DELTA, r**2 / 2, DELTA * (size - DELTA / 2))).sum(axis=1)
