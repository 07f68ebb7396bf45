"""What is drawn, against torch's own decompositions and the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import ModelConfig, TokenizerConfig
from kindling.device import Runtime
from kindling.errors import TokenizerError
from kindling.plots.inspection import (
    FEWEST,
    LABELLED,
    InspectionError,
    Matrix,
    Text,
    attention,
    curves_of,
    given_text,
    histograms,
    joined,
    matrices,
    pieces,
    spectrum,
    units,
)
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT, build_model

CPU = Runtime(torch.device("cpu"), "fp32")
CFG = ModelConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=16, init_std=0.5, dropout=0.1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(CFG).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def f(x):\n    return x\n" * 20], TokenizerConfig(), 280)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1e-12, 1e-3, 1.0, 1e9]), st.integers(0, 10**6))
def test_norm_and_stable_rank_are_those_of_the_singular_values(rows, columns, scale, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    values = torch.linalg.svdvals(w.double())
    found = spectrum(Matrix("up", 0, w))
    assert found.norm == pytest.approx(values[0].item(), rel=1e-5)
    assert found.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-4)
    assert found.full == min(rows, columns)


def test_a_matrix_of_zeros_has_a_gap_and_not_an_error():
    m = Matrix("proj", 0, torch.zeros(4, 4))
    assert math.isnan(spectrum(m).norm) and math.isnan(spectrum(m).stable_rank)
    assert histograms({"proj": [m]})["proj"][0].std == 0


def test_densities_integrate_to_one_and_no_weight_is_left_out(model):
    for found in histograms(matrices(model)).values():
        for h in found:
            assert (h.density * np.diff(h.edges)).sum() == pytest.approx(1)


def test_a_histogram_ends_at_the_extreme_weights_and_has_no_bin_that_is_nearly_empty():
    w = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    (h,) = histograms({"up": [Matrix("up", 0, w)]})["up"]
    assert [h.edges[0], h.edges[-1]] == pytest.approx([w.min().item(), w.max().item()])
    counts = h.density * np.diff(h.edges) * w.numel()
    assert counts.min() >= FEWEST - 0.01 and len(counts) > 40


@settings(max_examples=100)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=200))
@example([0.0] * 20 + [0.25] * 20)  # the largest is on an edge
def test_joined_bins_lose_no_weight_and_their_edges_rise(values):
    found, edges = np.histogram(values, 8, (-1, 1))
    counts, ends = joined(found.astype(float), edges, min(values), max(values))
    assert counts.sum() == len(values) and (np.diff(ends) > 0).all() and len(ends) == len(counts) + 1


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(InspectionError, match="must be finite, but some of up"):
        histograms({"up": [Matrix("up", 0, torch.tensor([[1.0, math.nan]]))]})


def test_every_weight_matrix_is_found_once_and_a_tied_head_is_its_embedding():
    cfg = ModelConfig(
        block_size=8,
        vocab_size=20,
        n_layer=2,
        n_head=2,
        n_embd=8,
        tie_embeddings=True,
        position="learned",
        bigram_rows=6,
    )
    built = build_model(cfg)
    found = matrices(built)
    assert list(found) == [
        "token embedding, tied to the head", "pair embedding", "position embedding", "qkv", "proj", "up", "down"
    ]  # fmt: skip
    total = sum(m.weight.numel() for own in found.values() for m in own)
    assert total == sum(p.numel() for p in built.parameters() if p.dim() == 2)


def test_null_and_missing_values_are_gaps_and_validation_has_its_steps_tokens():
    curves = curves_of(
        [
            {"step": 0, "val_loss": 9.0},
            {"step": 10, "tokens": 1000, "loss": None, "lr": 0.1},
            {"step": 20, "tokens": 2000, "loss": 3.0, "lr": 0.2, "grad_norm": 1.0, "skipped_steps": 2},
            {"step": 20, "val_loss": None, "val_perplexity": 2.0},
        ]
    )
    assert curves.val_tokens.tolist() == [0, 2000]
    np.testing.assert_array_equal(curves.loss, [math.nan, 3.0])
    np.testing.assert_array_equal(curves.grad_norm, [math.nan, 1.0])
    np.testing.assert_array_equal(curves.val_loss, [9.0, math.nan])


def test_validation_losses_that_are_drawn_together_are_of_the_same_texts():
    evaluated = [(0, 9.0, 64), (10, 8.0, 64), (20, 7.0, 64), (20, 7.5, 1000)]  # the last: the whole split, at the end
    curves = curves_of([{"step": step, "val_loss": loss, "val_tokens": n} for step, loss, n in evaluated])
    assert curves.val_loss.tolist() == [9.0, 8.0, 7.0]


def test_a_run_of_an_earlier_version_that_goes_on_keeps_its_whole_validation_curve():
    earlier, later = {"step": 10, "val_loss": 8.0}, {"step": 20, "val_loss": 7.0, "val_tokens": 1000}
    assert curves_of([earlier, later]).val_loss.tolist() == [8.0, 7.0]


def test_no_lines_are_empty_curves():
    assert len(curves_of([]).steps) == len(curves_of([]).val_tokens) == 0


def test_each_tokens_loss_is_the_cross_entropy_of_the_logits(model, tokenizer):
    text = given_text(tokenizer, "def f(x):\n", 64, "--text")
    logits = model(torch.tensor([text.ids]))[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text.ids[1:]), reduction="none")
    found = units(model, tokenizer, text, CPU)
    assert [u.loss for u in found] == pytest.approx(expected.tolist(), rel=1e-4)
    assert "".join(u.text for u in found) == "def f(x):\n"


def test_tokens_that_spell_one_character_are_one_and_their_losses_add_up(model, tokenizer):
    text = given_text(tokenizer, "é中x", 64, "--text")
    found = units(model, tokenizer, text, CPU)
    assert [u.text for u in found] == ["é", "中", "x"] and len(text.ids) == 7
    single = Text(text.ids, text.predicted, "", started=False)
    losses = model(torch.tensor([single.ids]), torch.tensor([[*single.ids[1:], -100]]))[0]
    assert sum(u.loss for u in found) == pytest.approx(losses.item(), rel=1e-4)


def test_what_is_not_predicted_has_no_loss(model, tokenizer):
    ids = tokenizer.encode("def f")
    found = units(model, tokenizer, Text(ids, [False] * (len(ids) - 1) + [True], "", started=False), CPU)
    assert [math.isfinite(u.loss) for u in found] == [False] * (len(found) - 1) + [True]


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_the_pieces_of_a_text_are_the_text(tokenizer, text):
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text


def test_attention_is_of_the_first_tokens_and_its_rows_sum_to_one(model, tokenizer):
    text = given_text(tokenizer, "é" * 31, 64, "--text")
    assert len(text.ids) > LABELLED
    weights, names = attention(model, tokenizer, text)
    assert weights.shape == (2, 2, LABELLED, LABELLED) and len(names) == LABELLED and names[0] == "(start)"
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    whole = model.attention_weights(torch.tensor([text.ids[:64]]))[:, 0].numpy()
    np.testing.assert_allclose(weights, whole[..., :LABELLED, :LABELLED], atol=1e-5)


def test_a_text_may_just_fill_the_context_and_be_no_longer(model, tokenizer):
    fits = given_text(tokenizer, "é" * 32, 64, "--text")
    assert len(units(model, tokenizer, fits, CPU)) == 32
    with pytest.raises(InspectionError, match="64 tokens, but has 66"):
        given_text(tokenizer, "é" * 33, 64, "--text")
    assert given_text(tokenizer, "é" * 33, 64, "it", crop=True).what == "the first 64 tokens of it"


def test_text_that_the_tokenizer_cannot_hold_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        given_text(tokenizer, "x\ud800", 64, "--text")
