import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kindling.generation import numpy_sampling
from kindling.generation.numpy_sampling import apply_repetition_penalty, distribution, draw, log_total, most_likely
from kindling.generation.sampling import Sampling, next_token_probabilities

NEAR = 1e-5  # a sum of float32 may be on the other side of a threshold


def dense(logits: np.ndarray, sampling: Sampling, seen: list[int]) -> np.ndarray:
    """Return the distribution (V,) by NumPy."""
    if sampling.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    tokens, p = distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    assert (np.diff(tokens) > 0).all()
    out = np.zeros(len(logits))
    out[tokens] = p
    return out


def by_torch(logits: np.ndarray, sampling: Sampling, seen: list[int]) -> np.ndarray:
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[seen] = True
    return next_token_probabilities(torch.from_numpy(logits), sampling, mask).numpy()


@given(st.integers(0, 2**32), st.sampled_from([3, 40, 700]), st.sampled_from([0.0, 1.0, 8.0]), st.data())
def test_the_probabilities_are_those_of_torch(seed, n, spread, data):
    rng = np.random.default_rng(seed)
    # without ties: multiples of one number would meet again when the penalty doubles some of them
    logits = (rng.permutation(n) * 0.01 + rng.uniform(0, 0.005, n) + spread * rng.normal(size=n)).astype(np.float32)
    settings = {
        "temperature": data.draw(st.sampled_from([0.2, 1.0, 3.0])),
        "top_k": data.draw(st.sampled_from([None, 1, 2, 50, 2000])),
        "min_p": data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3, 0.5])),
    }
    top_p = data.draw(st.sampled_from([1.0, 0.95, 0.5, 0.01]))
    seen = rng.integers(0, n, 5).tolist()
    actual = dense(logits, Sampling(top_p=top_p, **settings), seen)
    assert actual.sum() == pytest.approx(1)
    near = (top_p, top_p * (1 - NEAR), min(1.0, top_p * (1 + NEAR)))
    expected = [by_torch(logits, Sampling(top_p=p, **settings), seen) for p in near]
    assert any(np.allclose(actual, e, atol=1e-5) for e in expected)


def test_of_equally_likely_tokens_no_more_than_top_k_are_kept():
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    assert most_likely(logits, 2).tolist() == [1, 2]
    assert most_likely(logits, 4).tolist() == [0, 1, 2, 3]
    tokens, p = distribution(logits, 1.0, top_k=2)
    assert tokens.tolist() == [1, 2] and p.tolist() == [0.5, 0.5]
    for n, expected in ((9, [0, 1, 2, 3, 4]), (4, [0, 1])):
        tokens, _ = distribution(np.zeros(n, np.float32), 1.0, top_p=0.5)
        assert tokens.tolist() == expected


def test_a_nucleus_of_many_tokens_is_found():
    tokens, p = distribution(np.zeros(5000, np.float32), 1.0, top_p=0.9)
    assert len(tokens) in (4500, 4501) and p.sum() == pytest.approx(1)  # a sum of 4,500 floats


def test_the_draws_have_the_probabilities_and_follow_the_seed():
    tokens, p = np.array([3, 5, 9]), np.array([0.5, 0.2, 0.3])
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(tokens, p, rng) for _ in range(4000)], minlength=10) / 4000
    assert np.abs(counts[tokens] - p).max() < 0.03 and counts.sum() == pytest.approx(1)
    drawn = [[draw(tokens, p, np.random.default_rng(seed)) for _ in range(9)] for seed in (1, 1)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("u, expected", [(0.0, 1), (0.5, 2), (1.0 - 2**-53, 2)])
def test_a_token_without_probability_is_never_drawn(u, expected, monkeypatch):
    class Says:
        def random(self):
            return u

    assert draw(np.array([0, 1, 2, 3]), np.array([0, 0.5, 0.5, 0]), Says()) == expected


def test_log_probabilities_are_those_of_float64():
    logits = np.random.default_rng(0).normal(0, 30, 8000).astype(np.float32)
    expected = torch.from_numpy(logits).double().logsumexp(0).item()
    assert log_total(logits) == pytest.approx(expected, abs=1e-5)
    assert log_total(np.array([-np.inf, 0.0], np.float32)) == 0


def test_the_file_needs_no_torch():
    assert "torch" not in vars(numpy_sampling)
