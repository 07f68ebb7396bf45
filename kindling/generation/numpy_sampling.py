"""Samples the next token from logits in NumPy, with the filters of sampling.py in their order. Imports no torch.

    tokens, probabilities = distribution(logits, temperature=0.8, top_k=50, min_p=0.05)

Only what is kept is looked at: with top-k, a draw costs a pass over the logits and no sort of them. Limit: the same seed gives
other texts than in sampling.py, whose random numbers are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUCLEUS = 256  # tokens in which top-p first looks for its probability


def most_likely(values: np.ndarray, n: int) -> np.ndarray:
    """Return the ids of the `n` largest of values (V,), in the order of the ids. Of equal ones, the first are taken."""
    if n >= len(values):
        return np.arange(len(values))
    if n == 0:
        return np.arange(0)
    least = np.partition(values, len(values) - n)[len(values) - n]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.sort(np.concatenate((above, equal[: n - len(above)])))


def distribution(
    logits: np.ndarray, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may come, in the order of their ids, and their probabilities float64, given logits (V,).

    Sources: nucleus sampling, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
    """
    tokens = np.arange(len(logits)) if top_k is None else most_likely(logits, top_k)
    p = (logits if len(tokens) == len(logits) else logits[tokens]).astype(np.float64) / temperature
    p -= p.max()
    np.exp(p, out=p)
    p /= p.sum()
    if top_p < 1:
        kept = _nucleus(p, top_p)
        tokens, p = tokens[kept], p[kept] / p[kept].sum()
    if min_p > 0:
        kept = np.flatnonzero(p >= min_p * p.max())
        tokens, p = tokens[kept], p[kept] / p[kept].sum()
    return tokens, p


def _nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """Return the places of the fewest of the largest probabilities that together have `top_p`, in their order."""
    n = NUCLEUS
    while p[largest := most_likely(p, n)].sum() < top_p and n < len(p):
        n *= 8
    order = largest[np.argsort(-p[largest], kind="stable")]
    before = p[order].cumsum() - p[order]  # of the tokens before; so the first is always kept
    return np.sort(order[before < top_p])


def draw(tokens: np.ndarray, probabilities: np.ndarray, rng: np.random.Generator) -> int:
    """Return one of the tokens, drawn with their probabilities."""
    up_to = probabilities.cumsum()
    return int(tokens[up_to.searchsorted(rng.random() * up_to[-1], side="right")])


def apply_repetition_penalty(logits: np.ndarray, seen: Iterable[int], penalty: float) -> np.ndarray:
    """Return the logits (V,), lowered for the tokens that were `seen`, as sampling.py does."""
    ids = np.fromiter(seen, np.int64)
    lowered, logits = logits[ids], logits.copy()
    logits[ids] = np.where(lowered > 0, lowered / np.float32(penalty), lowered * np.float32(penalty))
    return logits


def log_total(logits: np.ndarray) -> float:
    """Return the logarithm of the sum of the exponentials of logits (V,): what a logit exceeds its log-probability by."""
    largest = logits.max()
    return float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
