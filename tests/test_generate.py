import math
from pathlib import Path

import pytest
import torch
from conftest import assert_one_clear_line, script
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ModelConfig, TokenizerConfig
from generate import GenerationError, Sampling, complete, generate, next_token_probabilities
from model import GPT
from tokenizer import train_bpe

CFG = ModelConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=16, init_std=0.5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(CFG).eval()


def reference_probabilities(logits, temperature, top_k, top_p):
    """Transformers' own logits processors, in the same order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.1, 3), st.one_of(st.none(), st.integers(1, 60)), st.floats(0.05, 1))
def test_the_distribution_is_that_of_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    ours = next_token_probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert ours.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(ours, reference_probabilities(logits, temperature, top_k, top_p), atol=1e-5)


def test_ties_do_not_let_more_than_top_k_tokens_through():
    assert (next_token_probabilities(torch.zeros(10), Sampling(top_k=3)) > 0).sum() == 3


def test_greedy_takes_the_most_likely_token_each_time(model):
    ids = [5, 6, 7]
    expected = list(ids)
    for _ in range(10):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    for sampling in (Sampling(greedy=True, max_new_tokens=10), Sampling(temperature=0, max_new_tokens=10)):
        assert generate(model, ids, sampling, eos_id=-1) == expected[3:]


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    runs = [
        generate(model, [1], Sampling(seed=s, max_new_tokens=12, top_k=None, temperature=2.0), -1) for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_it_stops_at_end_of_text_and_leaves_it_out(model):
    greedy = Sampling(greedy=True, max_new_tokens=10)
    ids = generate(model, [5, 6, 7], greedy, eos_id=-1)
    stop = ids[4]
    assert generate(model, [5, 6, 7], greedy, eos_id=stop) == ids[: ids.index(stop)]


def test_generation_runs_past_the_context_by_cropping_from_the_left(model, capsys):
    long = list(range(40))
    new = generate(model, long, Sampling(greedy=True, max_new_tokens=20), -1)
    assert len(new) == 20 and new == generate(model, long[-16:], Sampling(greedy=True, max_new_tokens=20), -1)
    tokenizer = train_bpe(["some text"], TokenizerConfig(), 280)
    complete(model, tokenizer, "x y " * 30, Sampling(max_new_tokens=1))
    assert "its beginning is cropped" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_new_document(model):
    tokenizer = train_bpe(["some text"], TokenizerConfig(), 280)
    assert isinstance(complete(model, tokenizer, "", Sampling(max_new_tokens=3)), str)


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
    ],
)
def test_settings_that_nothing_can_be_sampled_with_are_refused(bad):
    with pytest.raises(GenerationError, match="--" + next(iter(bad)).replace("_", "-")):
        Sampling(**bad).check()


def test_a_run_that_is_not_there_is_one_clear_line(tmp_path):
    assert_one_clear_line(
        script("generate.py", "runs/none", "--prompt", "x", cwd=tmp_path), "runs/none", "there are: none"
    )
    assert_one_clear_line(script("generate.py", "--prompt", "x", cwd=tmp_path), "python main.py")
    assert_one_clear_line(script("evaluate.py", cwd=tmp_path), "python main.py")
    assert not list(Path(tmp_path).iterdir())
