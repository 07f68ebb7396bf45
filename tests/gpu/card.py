"""What the tests of a GPU share: models of the presets' shapes, and how far results may be from float64."""

import copy
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import IGNORE, ModelConfig, TrainConfig
from kindling import device
from kindling.device import Runtime
from model import LanguageModel, build_model
from presets import preset

PRECISIONS = ("fp32", "bf16", "fp16")
NAMES = ("demo", "modern-5m", "modern-50m", "modern-150m", "code-50m", "code-150m", "code-225m", "tinystories")
NAMES += ("portable-5m", "autocomplete", "fineweb-nano", "smallcoder-1", "grouped")
ONLY_WIDER = (
    "modern-5m",
    "modern-150m",
    "code-50m",
    "code-225m",
)  # than another shape, so compiling them shows no more
LIMITS = {  # relative errors of logits, of the loss and of the gradient
    "fp32": (5e-5, 1e-5, 1e-4),
    "bf16": (5e-2, 1e-2, 8e-2),
    "fp16": (8e-3, 2e-3, 2e-2),
}
ROWS, TOKENS = 2, 128
SCALE = 2.0**10  # of the loss: gradients in float16 would underflow


class Results(NamedTuple):
    """What a model says of a batch, on the CPU in float64."""

    logits: torch.Tensor  # (B, T, V)
    loss: torch.Tensor  # summed, in nats
    gradient: torch.Tensor  # of all parameters, (n,)


def runtime_of(kind: str, precision: str) -> Runtime:
    return device.resolve(TrainConfig(device=kind, precision=precision))


def shape_of(name: str, kind: str) -> ModelConfig:
    """A preset's shape with two layers, a short context and a small vocabulary; on a CPU also narrow."""
    cfg = preset("smallcoder-1" if name == "grouped" else name).model
    if name == "grouped":
        cfg = replace(cfg, n_kv_head=2)
    narrow = {"n_embd": 16 * cfg.n_head, "d_ff": None} if kind == "cpu" else {}
    pairs = {"bigram_rows": 1000} if cfg.bigram_rows else {}
    vocab_size = 1024 + cfg.vocab_size % 8
    return replace(cfg, n_layer=2, block_size=TOKENS, vocab_size=vocab_size, dropout=0.0, **narrow, **pairs)


def model_of(cfg: ModelConfig) -> LanguageModel:
    """A model whose every parameter has a random value, so that none can be left out unnoticed."""
    model, g = build_model(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.03 + (1.0 if p.ndim == 1 else 0.0))
    return model


def batch_of(cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, some of them not supervised, (B, T) both."""
    rows = torch.randint(cfg.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(2))
    targets = rows[:, 1:].clone()
    targets[0, :40] = IGNORE
    return rows[:, :-1], targets


@lru_cache
def reference(cfg: ModelConfig) -> Results:
    """The results by the plain formula in float64, on the CPU."""
    model = model_of(cfg).double()
    idx, targets = batch_of(cfg)
    logits = model(idx)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return Results(logits.detach(), loss.detach(), gradient_of(model))


def results(cfg: ModelConfig, runtime: Runtime, compiled: bool) -> Results:
    """The results of the same model and batch on the device."""
    model = model_of(cfg).to(runtime.device)
    if compiled:
        torch.compiler.reset()
        device.skip_vector_isa_test()
        model.enable_compile()
    idx, targets = (rows.to(runtime.device) for rows in batch_of(cfg))
    with runtime.autocast():
        logits = model(idx).detach()  # with gradients, so that a compiled block serves the loss too
    scale = SCALE if runtime.precision == "fp16" else 1.0
    with runtime.autocast():
        loss, count = model(idx, targets)
    assert int(count) == int((targets != IGNORE).sum())
    (loss * scale / count).backward()
    return Results(logits.cpu().double(), loss.detach().cpu().double(), gradient_of(model) * int(count) / scale)


def gradient_of(model: LanguageModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def copies(model: LanguageModel, runtime: Runtime) -> tuple[LanguageModel, LanguageModel]:
    """The model on the CPU, and a copy of it on the device."""
    return model, copy.deepcopy(model).to(runtime.device)
