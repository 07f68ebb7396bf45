import copy
from dataclasses import replace

import pytest
import torch

from config import ModelConfig
from kindling.errors import KindlingError
from kindling.generation.decoding import stream
from kindling.generation.inference import prepare_for_inference
from kindling.generation.int8_linear import Int8Linear
from kindling.generation.sampling import Sampling
from model import GPT, TransformersGPT2

CFG = ModelConfig(block_size=64, vocab_size=300, n_layer=2, n_head=4, n_embd=64, init_std=0.1)
SHAPES = {
    "gpt2": CFG,
    "llama": replace(
        CFG, position="rope", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=2, tie_embeddings=False
    ),
    "fixed": replace(
        CFG, position="sinusoidal", attn_out_proj=False, final_norm=False, tie_embeddings=False, head_bias=True
    ),
}
IDS = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(1))


def model_of(cfg: ModelConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(cfg).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=p.detach().mean().item(), std=0.1)
    return model


def logits(model: GPT) -> torch.Tensor:
    """The logits after IDS, of which the last five were read one by one."""
    cache = model.new_cache(1)
    model.forward_cached(IDS[:, :15], cache)
    for i in range(15, 20):
        out = model.forward_cached(IDS[:, i : i + 1], cache)
    return out.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.04)])
def test_the_logits_stay_within_what_the_precision_holds(shape, precision, tolerance):
    model = model_of(SHAPES[shape])
    with torch.no_grad():
        expected = model(IDS)[:, -1]
    found = logits(prepare_for_inference(model, precision))
    assert (found - expected).norm() < tolerance * expected.norm()
    assert precision == "fp32" or not torch.equal(found, expected)


def test_float32_keeps_every_name_and_shape_and_the_tie():
    model = model_of(CFG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare_for_inference(model, "fp32")
    assert model.head.weight is model.wte.weight
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tall_matrices_are_laid_out_by_columns_on_a_cpu():
    model = prepare_for_inference(model_of(CFG), "fp32")
    assert model.blocks[0].mlp.up.weight.stride() == (1, 256) and model.blocks[0].mlp.down.weight.is_contiguous()


def test_rotary_angles_and_the_cache_stay_float32():
    model = prepare_for_inference(model_of(SHAPES["llama"]), "bf16")
    assert model.rope_cos.dtype == torch.float32 and model.wte.weight.dtype == torch.bfloat16
    assert model.new_cache(1).keys.dtype == torch.float32


def test_int8_replaces_every_linear_layer_and_takes_a_quarter_of_the_room():
    model = prepare_for_inference(model_of(SHAPES["llama"]), "int8")
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 2 * 5 + 1 and all(layer.weight.dtype == torch.int8 for layer in layers)


def test_an_int8_layer_multiplies_by_the_rounded_weights():
    linear = torch.nn.Linear(64, 96)
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Int8Linear(linear)
    assert (layer.weight * layer.scale.float()[:, None] - linear.weight).abs().max() < linear.weight.abs().max() / 127
    expected = torch.nn.functional.linear(x.float(), layer.weight * layer.scale.float()[:, None], linear.bias)
    assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("width", [36, 40, 50, 100])
def test_an_int8_layer_of_any_width_is_right(width):
    linear = torch.nn.Linear(width, 33)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Int8Linear(linear)
    expected = linear(x.float())
    assert (layer(x).float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_int8_on_another_device_is_refused():
    with pytest.raises(KindlingError, match=r"int8 must run on the CPU"):
        prepare_for_inference(model_of(CFG).to("meta"), "int8")


def test_a_transformers_backbone_is_copied_and_its_text_stays():
    torch.manual_seed(0)
    backbone = TransformersGPT2(replace(CFG, backbone="transformers")).eval()
    before = copy.deepcopy(backbone.state_dict())
    greedy = Sampling(greedy=True, max_new_tokens=20)
    text = list(stream(prepare_for_inference(backbone, "fp32"), IDS[0].tolist(), greedy, -1))
    assert text == list(stream(backbone, IDS[0].tolist(), greedy, -1))
    assert all(torch.equal(p, before[name]) for name, p in backbone.state_dict().items())
