"""The hub's format against transformers itself: what it loads from a folder of ours, and what we load from its own."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import shared_file

import hf_format
from config import PRESETS, ModelConfig, TokenizerConfig, preset
from generate import Sampling, generate
from hf_format import difference, read, require_tokenizer_of, write
from hf_layout import HubFormatError, architecture, obstacles
from model import GPT, build_model
from tokenizer import from_json, load_json, train_bpe, train_handwritten, train_sentencepiece

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "kindling": "KindlingForCausalLM"}
ARCHITECTURES = {
    "demo": "kindling",
    "code-50m": "gpt2",
    "code-150m": "gpt2",
    "code-225m": "gpt2",
    "tinystories": "gpt2",
    "autocomplete": "kindling",
    "fineweb-nano": "kindling",
    "smallcoder-1": "llama",
    "smallcoder-2": "llama",
    "smallcoder-3": "llama",
    "smallcoder-4": "llama",
}
SHAPES = ["demo", "code-50m", "tinystories", "autocomplete", "fineweb-nano", "smallcoder-1"]  # of the presets, each once
TEXT = "def naïve(x):\n    return x  # <|endoftext|>, <eos> and <bos> are text here , n't it ?\n" * 3
TOLERANCE = 1e-4


@cache
def tokenizer(**settings):
    cfg = TokenizerConfig(**settings)
    maker = {"bpe": train_bpe, "handwritten": train_handwritten, "sentencepiece": train_sentencepiece}[cfg.kind]
    return maker([TEXT], cfg, 300 if cfg.kind != "sentencepiece" else 290)


def small(cfg: ModelConfig) -> ModelConfig:
    """Return the same settings at a size for tests."""
    heads = min(cfg.n_head, 4)
    d_ff = None if cfg.d_ff is None else 96
    n_kv_head = None if cfg.n_kv_head is None else min(cfg.n_kv_head, heads)
    sizes = {"block_size": 96, "vocab_size": 320, "n_layer": 2, "n_embd": 48, "d_ff": d_ff}
    return replace(cfg, **sizes, n_head=heads, n_kv_head=n_kv_head)


def random_model(cfg: ModelConfig) -> GPT:
    """Return a model in which no weight is what it starts from, so that one left out or confused is seen."""
    torch.manual_seed(1)
    model = GPT(cfg).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape) * 0.2 + ("norm" in name and name.endswith("weight")))
            elif not p.any():
                p.normal_(std=cfg.init_std)
    return model


def random_rows(cfg: ModelConfig, n_rows: int = 2) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (n_rows, cfg.block_size), generator=torch.Generator().manual_seed(2))


def written(folder, cfg: ModelConfig, tok=None) -> GPT:
    """Write a random model of a shape into a new folder and return it."""
    folder.mkdir()
    model = random_model(cfg)
    write(folder, model, tok or tokenizer(), "# a card\n")
    return model


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


VARIANTS = {
    **{name: small(preset(name).model) for name in SHAPES},
    "gpt2-without-biases": small(replace(preset("code-50m").model, bias=False)),
    "gpt2-untied-relu2": small(replace(preset("code-50m").model, tie_embeddings=False, activation="relu2")),
    "llama-grouped-tied": small(replace(preset("smallcoder-1").model, n_head=4, n_kv_head=2, tie_embeddings=True,
                                        rope_theta=500_000.0)),
    "ours-grouped-swiglu": small(replace(preset("demo").model, n_head=4, n_kv_head=2, activation="swiglu", bias=True)),
    "ours-learned-without-bias": small(replace(preset("tinystories").model, qk_norm=True, bias=False)),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")

    @cache
    def made(name: str):
        folder = root / name
        return folder, written(folder, VARIANTS[name])

    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_gives_the_same_logits(folders, name):
    folder, model = folders(name)
    cfg = model.cfg
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert content["architectures"] == [CLASSES[architecture(cfg)]]
    assert (folder / "modeling_kindling.py").exists() == (architecture(cfg) == "kindling")
    assert difference(folder, model, random_rows(cfg)) <= TOLERANCE


def test_every_preset_has_the_class_that_holds_it():
    made = {name: architecture(make().model) for name, make in PRESETS.items() if name not in ("docstrings", "alpaca")}
    assert made == ARCHITECTURES


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read_back_to_the_bit(folders, name):
    folder, model = folders(name)
    cfg, weights = read(folder)
    assert cfg == model.cfg
    ours = dict(model.named_parameters())
    assert weights.keys() == ours.keys()
    assert all(torch.equal(weights[n], ours[n]) for n in ours)


@pytest.mark.parametrize("name", ["demo", "tinystories", "smallcoder-1", "fineweb-nano"])
def test_greedy_text_is_what_transformers_generates(folders, name):
    folder, model = folders(name)
    their = theirs(folder)
    for seed in range(3):
        ids = torch.randint(1, 300, (5,), generator=torch.Generator().manual_seed(seed))
        ours = generate(model, ids.tolist(), Sampling(greedy=True, max_new_tokens=64), tokenizer().eos_id)
        out = their.generate(ids[None], attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=64)[0, 5:]
        out = out.tolist()
        assert ours == (out[: out.index(tokenizer().eos_id)] if tokenizer().eos_id in out else out)
