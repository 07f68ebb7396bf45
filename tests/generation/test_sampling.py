import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.generation.sampling import (
    GenerationError,
    Sampling,
    SamplingState,
    next_token_probabilities,
    sample_tokens,
)

V = 50


def reference_probabilities(logits, sampling: Sampling, ids=()):
    """Transformers' own logits processors, in its order."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids, scores = torch.tensor([list(ids)], dtype=torch.int64), logits[None].clone()
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores.softmax(-1)[0]


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3),
    top_k=st.one_of(st.none(), st.integers(1, 60)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.3, 3)),
)
texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=20)


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 10**6), samplings, texts)
def test_the_distribution_is_that_of_transformers(seed, sampling, ids):
    logits = random_logits(seed)
    seen = torch.zeros(V, dtype=torch.bool)
    seen[ids] = True
    ours = next_token_probabilities(logits, sampling, seen)
    assert ours.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(ours, reference_probabilities(logits, sampling, ids), atol=1e-5)


def test_ties_do_not_let_more_than_top_k_tokens_through():
    assert (next_token_probabilities(torch.zeros(10), Sampling(top_k=3)) > 0).sum() == 3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), samplings, st.floats(1.01, 3), texts)
def test_a_penalty_makes_no_token_of_the_text_more_likely_and_no_other_less(seed, sampling, penalty, ids):
    sampling = replace(sampling, top_k=None, top_p=1.0, min_p=0.0)
    seen = torch.zeros(V, dtype=torch.bool)
    seen[ids] = True
    logits = random_logits(seed)
    without = next_token_probabilities(logits, replace(sampling, repetition_penalty=1.0), seen)
    its = next_token_probabilities(logits, replace(sampling, repetition_penalty=penalty), seen)
    assert (its[~seen] >= without[~seen] - 1e-6).all()
    assert its[seen].sum() <= without[seen].sum() + 1e-6


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.1, 3))
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(seed, min_p, temperature):
    logits = random_logits(seed)
    whole = next_token_probabilities(logits, Sampling(temperature=temperature, top_k=None))
    kept = next_token_probabilities(logits, Sampling(temperature=temperature, top_k=None, min_p=min_p)) > 0
    assert kept[whole.argmax()] and torch.equal(kept, (whole >= min_p * whole.max()) & (whole > 0))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_penalty_counts_the_prompt_and_each_token_that_is_drawn(temperature):
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    sampling = Sampling(temperature=temperature, top_k=1, repetition_penalty=100.0)
    sampling_state = SamplingState.of(sampling, 0, [1], 4, eos_id=3)
    # 0 is new and the largest, then 2; of what is left all are penalised but the end of text
    assert [sample_tokens(logits, sampling, [sampling_state])[0] for _ in range(4)] == [0, 2, 0, 0]


def test_the_end_of_text_is_never_penalised():
    sampling = Sampling(greedy=True, repetition_penalty=100.0)
    sampling_state = SamplingState.of(sampling, 0, [3, 1, 3], 4, eos_id=3)
    assert sample_tokens(torch.tensor([[0.5, 0.5, 0.5, 1.0]]), sampling, [sampling_state]) == [3]


def test_rows_have_penalties_of_their_own():
    sampling = Sampling(greedy=True, repetition_penalty=10.0)
    sampling_states = [SamplingState.of(sampling, 0, ids, 4, eos_id=3) for ids in ([0], [1])]
    assert sample_tokens(torch.tensor([[2.0, 1.5, 0.0, 0.0]]).expand(2, 4), sampling, sampling_states) == [1, 0]


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(min_p=math.nan),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=math.inf),
        dict(stop=("a", "")),
    ],
)
def test_settings_that_nothing_can_be_sampled_with_are_refused(bad):
    with pytest.raises(GenerationError, match="--" + next(iter(bad)).replace("_", "-")) as e:
        Sampling(**bad).check()
    assert "\n" not in str(e.value)


def test_the_command_line_is_parsed_without_torch():
    code = "import sys, generate; generate.parse(['runs/x', '--complete', 'y']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
