"""model.py: blocks that are computed again in the backward pass, so that their activations need not be stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from config import IGNORE, ModelConfig
from kindling.data.shards import document_position_ids
from kindling.device import has_compiler
from model import LanguageModel, build_model
from presets import preset

SMALL = {"block_size": 32, "vocab_size": 101, "n_layer": 3, "n_head": 4, "n_embd": 32, "d_ff": 64}
GPT2 = replace(preset("code-50m").model, **SMALL)
MODELS = {
    "learned positions": GPT2,
    "learned positions, dropout": replace(GPT2, dropout=0.2),
    "rotary, grouped": replace(preset("smallcoder-1").model, **SMALL | {"n_kv_head": 2}, dropout=0.1),
    "transformers": replace(GPT2, backbone="transformers"),
    "transformers, dropout": replace(GPT2, backbone="transformers", dropout=0.2),
}
EOS = 5


def build(cfg: ModelConfig, recompute: bool) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.checkpoint_activations = recompute
    return model


def batch(cfg: ModelConfig, masked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Two rows, the first with three documents, and their positions if documents are masked from each other."""
    idx = torch.randint(EOS + 1, cfg.vocab_size, (2, cfg.block_size), generator=torch.Generator().manual_seed(1))
    idx[0, [7, 20]] = EOS
    targets = idx.roll(-1, 1)
    targets[:, -1] = IGNORE
    return idx, targets, torch.from_numpy(document_position_ids(idx.numpy(), EOS)) if masked else None


def step(model: LanguageModel, masked: bool = False, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Return the loss and the gradients of one forward and backward pass, and a random number drawn after it."""
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss, _ = model(*batch(model.cfg, masked))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters()), torch.rand(3)]


def assert_same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved_bytes(model: LanguageModel) -> int:
    """Return the bytes that a forward pass stores for the backward pass, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch(model.cfg, False)[0])
    assert hidden.requires_grad  # and still alive, so that no storage address was used twice
    return sum(saved.values())


@pytest.mark.parametrize("masked", [False, True], ids=["", "document mask"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_the_same_bits(name, masked):
    cfg = MODELS[name]
    if masked and cfg.backbone == "transformers":
        pytest.skip("transformers' GPT-2 has no document mask")
    assert_same_bits(step(build(cfg, False), masked), step(build(cfg, True), masked))


@pytest.mark.parametrize("name", ["rotary, grouped", "transformers, dropout"])
def test_the_gradients_are_the_same_bits_in_bf16(name):
    cfg = MODELS[name]
    plain, again = (step(build(cfg, recompute), dtype=torch.bfloat16) for recompute in (False, True))
    assert_same_bits(plain, again)
    assert not torch.equal(plain[0], step(build(cfg, False))[0])  # the precision was really another


@pytest.mark.parametrize("name", MODELS)
def test_a_block_keeps_its_input_alone(name):
    cfg = replace(MODELS[name], n_layer=6)
    with_all, inputs = saved_bytes(build(cfg, False)), saved_bytes(build(cfg, True))
    x = 2 * cfg.block_size * cfg.n_embd * 4
    assert 6 * x <= inputs < 12 * x and with_all > 5 * inputs


@pytest.mark.parametrize("name", ["learned positions, dropout", "transformers, dropout"])
def test_every_block_is_computed_twice_in_training_and_once_in_evaluation(name):
    model = build(MODELS[name], True)
    calls = []
    for block in model.modules_to_compile():
        next(block.children()).register_forward_hook(lambda *_: calls.append(1))  # its first norm
    step(model)
    assert len(calls) == 2 * 3
    calls.clear()
    with torch.no_grad():
        model(*batch(model.cfg, False))
    model.eval()(*batch(model.cfg, False))
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("name", ["learned positions, dropout", "transformers, dropout"])
def test_it_can_be_switched_off_again(name):
    model = build(MODELS[name], False)
    plain = saved_bytes(model)
    model.checkpoint_activations = True
    assert model.checkpoint_activations and saved_bytes(model) < plain
    model.checkpoint_activations = False
    assert not model.checkpoint_activations and saved_bytes(model) == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary, grouped", "transformers, dropout"])
def test_compiled_blocks_give_the_same_gradients(name):
    if not has_compiler("cpu"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    cfg = MODELS[name]
    masked = cfg.backbone == "kindling"
    plain = build(cfg, False)
    plain.enable_compile()
    expected = step(plain, masked)
    again = build(cfg, True)
    again.enable_compile()
    assert_same_bits(expected, step(again, masked))
    assert saved_bytes(again) < saved_bytes(plain)
