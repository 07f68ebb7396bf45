"""Computes unbiased pass@k, and 95% intervals of proportions, means, ratios and differences.

    from kindling.evaluation.intervals import pass_at_k, wilson
    pass_at_k(n=5, c=1, k=1)        # 0.2
    wilson(61, 100)                 # Interval(low=0.512, high=0.700)

Resampling draws the units that were measured, problems or documents, never tokens. Intervals say how much a figure would
change with other units of the same kind, not with another training seed. Samples of one prompt resemble each other, so prompts
are resampled rather than samples. Where no interval can be given, both its ends are nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

Z = 1.959963984540054  # the 97.5% quantile of the standard normal distribution
# the range of 5 values contains a distribution's median with a probability of 1 - 2 * 0.5**5 = 93.75%, that of 6 values with
# 96.9%; so with fewer than 6 units no resampling gives a 95% interval
FEWEST = 6
_CHUNK = 1 << 20  # numbers drawn at a time, to limit memory

Numbers = Sequence[float] | np.ndarray
LossLines = list[dict[str, Any]]
"""The lines of losses.jsonl, one for each document, with its `nll` in nats, `tokens` and `bytes`."""


class Interval(NamedTuple):
    """The two ends of a 95% interval; both nan where there is none."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference, the ends of its 95% interval, and whether the interval excludes 0 (False where there is no interval).

    A paired difference is significant only if at least 6 units also differ. Of 164 problems, let one model solve four and the
    other none: the bootstrap excludes 0, but four heads of four coins are not rare.
    """

    difference: float
    low: float
    high: float
    significant: bool


NONE = Interval(math.nan, math.nan)


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...


@overload
def pass_at_k(n: Numbers, c: Numbers, k: int) -> np.ndarray: ...


def pass_at_k(n: int | Numbers, c: int | Numbers, k: int) -> float | np.ndarray:
    """Return the unbiased estimate of the probability that at least one of `k` samples passes, if `c` of `n` samples passed.

    n and c are integers, or arrays with one integer for each problem. For two integers the result is a float, else a float64
    array. The estimate is 1 - C(n - c, k) / C(n, k), computed as a product of ratios to avoid overflow and cancellation (Chen
    et al. 2021, arXiv:2107.03374, eq. 1). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    n_array, c_array = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    for name, array in (("n", n_array), ("c", c_array), ("k", np.asarray(k))):
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers, but is of type {array.dtype}")
    total, correct = n_array.astype(np.int64), c_array.astype(np.int64)
    if (correct < 0).any() or (correct > total).any():
        raise ValueError(f"0 <= c <= n must hold, but n is {n} and c is {c}")
    if k < 1 or (k > total).any():
        raise ValueError(f"1 <= k <= n must hold, but k is {k} and n is {n}")
    missed = np.ones(total.shape)
    for i in range(
        k
    ):  # the probability that the next sample fails, after i have failed; once it is 0, the product stays 0
        missed = missed * (total - correct - i) / (total - i)
    return 1.0 - missed if missed.shape else float(1.0 - missed)


def pass_interval(n: Numbers, c: Numbers, k: int, seed: int = 0, clusters: Sequence[str] | None = None) -> Interval:
    """Return the 95% interval of the mean pass@k over problems, by the bootstrap.

    `clusters` names one for each problem: whole clusters are then resampled, as the problems in one resemble each other. If the
    pass@k of every problem is 0, or of every problem 1, resampling finds no spread and would claim certainty. The interval is
    then Wilson's for that number of problems, or clusters. Raises what pass_at_k raises.
    """
    values = np.atleast_1d(pass_at_k(n, c, k))
    units = len(values) if clusters is None else len(set(clusters))
    if len(values) and (values == values[0]).all() and values[0] in (0, 1):
        return wilson(units * int(values[0]), units)
    if clusters is None:
        return bootstrap_mean(values, seed)
    passed, problems = cluster_sums(clusters, values, np.ones(len(values)))
    return bootstrap_ratio(passed, problems, seed)


def cluster_sums(clusters: Sequence[str], *columns: Numbers) -> list[np.ndarray]:
    """Return the sums of each column over the units of each cluster, (clusters,), in one order for all columns."""
    _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    return [np.bincount(numbers, weights=np.asarray(column, dtype=np.float64)) for column in columns]


def rate_interval(successes: Numbers, n: Numbers, seed: int = 0) -> Interval:
    """Return the 95% interval of sum(successes) / sum(n). A unit is a prompt with n samples; units are resampled.

    With one sample for each prompt, or without any spread, it is Wilson's interval over the units.
    """
    successes, n = np.asarray(successes, dtype=np.int64), np.asarray(n, dtype=np.int64)
    if (n == 1).all() or successes.sum() in (0, n.sum()):
        return wilson(int((successes > 0).sum()), len(n))
    return bootstrap_ratio(successes, n, seed)


def wilson(successes: int, n: int) -> Interval:
    """Return Wilson's 95% interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22); none for n = 0.

    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"0 <= successes <= n must hold, but they are {successes} of {n}")
    if n == 0:
        return NONE
    middle = (successes + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(successes * (n - successes) / n + Z**2 / 4)
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def bootstrap_mean(values: Numbers, seed: int = 0, n: int = 10_000) -> Interval:
    """Return the 95% percentile interval of the mean of `values`, by `n` resamples.

    There is none for fewer than 6 values (see FEWEST). The same seed gives the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < FEWEST:
        return NONE
    return _percentiles(_resampled_sums(values[None], seed, n)[0] / len(values))


def bootstrap_ratio(numerators: Numbers, denominators: Numbers, seed: int = 0, n: int = 10_000) -> Interval:
    """Return the 95% percentile interval of sum(numerators) / sum(denominators). Pairs are resampled together.

    For bits per byte, numerators are the documents' bits and denominators their bytes. There is none for fewer than 6 pairs, or
    if all denominators are 0. Raises ValueError unless both have the same length and no denominator is negative.
    """
    pairs = np.stack(_same_length(numerators, denominators))  # (2, units)
    if (pairs[1] < 0).any():
        raise ValueError("no denominator may be negative")
    if pairs.shape[1] < FEWEST or not pairs[1].any():
        return NONE
    sums = _resampled_sums(pairs, seed, n)  # (2, n)
    drawn = sums[1] > 0  # without the resamples of zeros only
    return _percentiles(sums[0, drawn] / sums[1, drawn])


def paired_difference(a: Numbers, b: Numbers, seed: int = 0, n: int = 10_000) -> Difference:
    """Return mean(a) - mean(b) for two measurements of the same units, which are resampled together.

    Without units, everything is nan. With fewer than 6 units, or if none differs, the ends are nan. Raises ValueError unless
    both have the same length.
    """
    first, second = _same_length(a, b)
    if not len(first):
        return Difference(math.nan, *NONE, False)
    differences = first - second
    return _paired(float(np.mean(differences)), bootstrap_mean(differences, seed, n), differences)


def paired_ratio_difference(
    a: Numbers, b: Numbers, denominators: Numbers, seed: int = 0, n: int = 10_000
) -> Difference:
    """Return sum(a) / sum(denominators) - sum(b) / sum(denominators). Units are resampled together.

    For bits per byte of two models, a and b are their bits on each of the same documents, and denominators the documents'
    bytes. If there are no denominators, or all are 0, everything is nan. With fewer than 6 pairs, or if none differs, the ends
    are nan. Raises what bootstrap_ratio raises.
    """
    first, second = _same_length(a, b)
    differences = first - second
    interval = bootstrap_ratio(differences, denominators, seed, n)
    total = float(np.sum(denominators))
    difference = float(np.sum(differences)) / total if total else math.nan
    return _paired(difference, interval, differences)


def _same_length(a: Numbers, b: Numbers) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"both must be as long, but are {len(first)} and {len(second)}")
    return first, second


def _resampled_sums(columns: np.ndarray, seed: int, n: int) -> np.ndarray:
    """Return the sums of `n` resamples, each as large as the original, of columns (m, units): (m, n)."""
    rng = np.random.default_rng(seed)
    m, units = columns.shape
    sums = np.empty((m, n))
    at_once = max(1, _CHUNK // units)
    for start in range(0, n, at_once):
        drawn = rng.integers(units, size=(min(at_once, n - start), units))
        for column, out in zip(columns, sums):
            out[start : start + len(drawn)] = column[drawn].sum(axis=1)  # (resamples, units) -> (resamples,)
    return sums


def _percentiles(means: np.ndarray) -> Interval:
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def _paired(difference: float, interval: Interval, differences: np.ndarray) -> Difference:
    """Return a paired difference; without an interval if no unit differs, when resampling would claim certainty."""
    differ = np.count_nonzero(differences)
    low, high = interval if differ else NONE
    return Difference(difference, low, high, bool(differ >= FEWEST and (low > 0 or high < 0)))


def count(value: int | None) -> str:
    """Return a count with separators, or "-" for None."""
    return "-" if value is None else f"{value:,}"


def number(value: float | None, interval: Interval = NONE, form: str = ",.4f") -> str:
    """Return a figure, with its interval in brackets if there is one."""
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if math.isnan(interval.low) else f" [{interval.low:{form}}, {interval.high:{form}}]")


def percent(value: float | None, interval: Interval = NONE) -> str:
    """Return a fraction in per cent, with its interval in brackets if there is one."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1%}" + (
        "" if math.isnan(interval.low) else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )


def bits_interval(losses: LossLines) -> Interval:
    """Return the interval of bits per byte, resampling documents; none if a loss is not finite."""
    low, high = _interval(losses, "bytes")
    return Interval(low / math.log(2), high / math.log(2))


def perplexity_interval(losses: LossLines) -> Interval:
    """Return the interval of the perplexity, resampling documents; none if a loss is not finite."""
    low, high = _interval(losses, "tokens")
    return Interval(math.exp(low), math.exp(high))


def _interval(losses: LossLines, unit: str) -> Interval:
    if not all_finite(losses):
        return NONE
    return bootstrap_ratio([line["nll"] for line in losses], [line[unit] for line in losses])


def all_finite(losses: LossLines) -> bool:
    """Return whether the loss of each document is a finite number."""
    return all(line["nll"] is not None and math.isfinite(line["nll"]) for line in losses)
