"""optim.py: which parameter gets which optimiser, and Muon against torch's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from config import ModelConfig, TrainConfig
from kindling.studies.shared_steps import untrained
from kindling.training.optim import Muon, make_optimizers, orthogonalize
from model import build_model
from presets import preset


def test_decay_touches_matrices_only_and_muon_the_blocks_matrices_only(corpus):
    model = build_model(replace(tiny_config(corpus).model, qk_norm="learned"))
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon"), torch.float32)
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {names[id(p)].split(".")[-2] for g in muon.param_groups for p in g["params"]}
    assert inside == {"qkv", "proj", "up", "down"}
    for optimizer in (adamw, *make_optimizers(model, TrainConfig(), torch.float32)):
        for group in optimizer.param_groups:
            assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    counted = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(counted) == sorted(names)


def test_embeddings_and_head_have_rates_of_their_own_and_without_them_the_groups_of_before(corpus):
    model = build_model(replace(tiny_config(corpus).model, tie_embeddings=False))
    adamw, _ = make_optimizers(model, TrainConfig(optimizer="muon", lr=1e-3, embd_lr=0.3, head_lr=0.02), torch.float32)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["peak_lr"] for g in adamw.param_groups for p in g["params"]}
    assert (rates.pop("wte.weight"), rates.pop("wpe.weight"), rates.pop("head.weight")) == (0.3, 0.3, 0.02)
    assert set(rates.values()) == {1e-3}
    (adamw,) = make_optimizers(model, TrainConfig(), torch.float32)
    assert [len(g["params"]) for g in adamw.param_groups] == [
        sum(p.ndim == n for p in model.parameters()) for n in (2, 1)
    ]


def test_a_tied_head_is_an_embedding(corpus):
    (adamw,) = make_optimizers(build_model(tiny_config(corpus).model), TrainConfig(head_lr=9.0), torch.float32)
    assert {g["peak_lr"] for g in adamw.param_groups} == {TrainConfig().lr}


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = orthogonalize(x, torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ v.mT  # diagonal, if the singular vectors are the same
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-9
    assert diagonal[s > s.max() * 0.05].min() > 0.5 and diagonal.max() < 1.3


def test_muon_does_the_steps_of_torchs_muon_but_for_its_rounding_to_bfloat16():
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(s, generator=generator) for s in ((16, 48), (16, 48), (48, 16), (24, 24))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = Muon(ours, 0.02, 0.1, torch.float32), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() / (b - p).norm() < 0.02 < (b - p).norm()


def test_an_optimiser_that_is_told_of_a_bad_step_changes_neither_weights_nor_state():
    p = torch.nn.Parameter(torch.eye(4))
    muon = Muon([p], 0.1, 0.1, torch.float32)
    p.grad = torch.ones(4, 4)
    muon.step()
    before, momentum = p.detach().clone(), muon.state[p]["momentum_buffer"].clone()
    p.grad = torch.full((4, 4), math.nan)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    assert torch.equal(p, before) and torch.equal(muon.state[p]["momentum_buffer"], momentum)
    p.grad, muon.found_inf = torch.ones(4, 4), torch.tensor(0.0)
    muon.step()
    assert not torch.equal(p, before)


def test_the_step_of_an_untrained_run_changes_no_weight_by_more_than_its_rate():
    """A study evaluates it as the model before training. A bias of 0 is no longer 0, but no figure shows it."""
    cfg = untrained(preset("tinystories"))
    assert (cfg.train.max_steps, cfg.train.warmup_steps, cfg.train.sample_every) == (1, 0, None)
    model = build_model(ModelConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8, activation="gelu"))
    before = [p.detach().clone() for p in model.parameters()]
    (adamw,) = make_optimizers(model, cfg.train, torch.float32)
    model(torch.arange(8)[None], targets=torch.arange(8)[None])[0].sum().backward()
    adamw.step()
    changed = [(p - old).abs().max().item() for p, old in zip(model.parameters(), before)]
    assert all(p.grad is not None for p in model.parameters()) and 0 < max(changed) < 1.001e-30
    assert torch.equal(model.head.weight, before[0])
