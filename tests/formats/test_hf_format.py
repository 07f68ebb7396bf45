"""The hub's format against transformers itself: what it loads from a folder of ours, and what we load from its own."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import shared_file

from config import ModelConfig, TokenizerConfig
from kindling.formats import hf_format
from kindling.formats.fold_weights import fold_qk_norm
from kindling.formats.hf_format import difference, read, write
from kindling.formats.hf_layout import (
    CLASSES,
    HubFormatError,
    architecture,
    differing,
    nearest_stock,
    unsupported_settings,
)
from kindling.generation.decoding import stream
from kindling.generation.sampling import Sampling
from kindling.tokenization.tokenizer import from_json, load_json
from kindling.tokenization.train_tokenizer import train_bpe, train_handwritten, train_sentencepiece
from model import GPT, build_model
from presets import PRESETS, preset

ARCHITECTURES = {
    "demo-infill": "kindling",
    "demo": "kindling",
    "modern-5m": "kindling",
    "modern-50m": "kindling",
    "modern-150m": "kindling",
    "portable-5m": "qwen3",
    "portable-50m": "qwen3",
    "portable-150m": "qwen3",
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
SHAPES = [
    "demo",
    "portable-5m",
    "code-50m",
    "tinystories",
    "autocomplete",
    "fineweb-nano",
    "smallcoder-1",
]  # of the presets, each once
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
    "llama-stretched": small(replace(preset("smallcoder-1").model, rope_factors=(8.0, 1.0, 4.0, 32.0), d_head=16)),
    "qwen2-linear": small(replace(preset("smallcoder-1").model, qkv_bias=True, rope_factors=(4.0,), n_kv_head=2)),
    "ours-heads": small(replace(preset("demo").model, d_head=20, qkv_bias=True, rope_factors=(8.0, 1.0, 4.0, 32.0))),
    "ours-linear": small(replace(preset("demo").model, rope_factors=(4.0,))),
    "qwen3-grouped-tied": small(replace(preset("portable-5m").model, n_head=4, n_kv_head=1, tie_embeddings=True, norm_eps=1e-3,
                                        rope_theta=500_000.0)),
    "qwen3-folded": small(replace(preset("portable-5m").model, qk_norm=True, norm_eps=1e-3)),
    "ours-learned-qk-norm": small(replace(preset("demo").model, qk_norm="learned", n_kv_head=2, norm_eps=1e-3)),
    "ours-grouped-swiglu": small(replace(preset("demo").model, n_head=4, n_kv_head=2, activation="swiglu", bias=True)),
    "ours-learned-without-bias": small(replace(preset("tinystories").model, qk_norm=True, bias=False)),
    "ours-pairs": small(replace(preset("demo").model, bigram_rows=101)),
    "ours-pairs-sinusoidal": small(replace(preset("code-50m").model, bigram_rows=100, position="sinusoidal")),
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
    assert difference(folder, model, random_rows(cfg)).largest <= TOLERANCE


def test_every_preset_has_the_class_that_holds_it():
    made = {name: architecture(make().model) for name, make in PRESETS.items() if name not in ("docstrings", "alpaca")}
    assert made == ARCHITECTURES


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read_back_to_the_bit(folders, name):
    folder, model = folders(name)
    cfg, weights = read(folder)
    if name == "qwen3-folded":  # what the class holds, and not what was folded
        assert cfg.qk_norm == "learned" and differing(cfg, model.cfg) == ["qk_norm"]
        ours = fold_qk_norm(model.cfg, dict(model.named_parameters()))[1]
    else:
        assert cfg == model.cfg
        ours = dict(model.named_parameters())
    assert weights.keys() == ours.keys()
    assert all(torch.equal(weights[n], ours[n]) for n in ours)


def test_a_folder_of_before_the_table_of_pairs_is_read(tmp_path):
    model = written(tmp_path / "hub", replace(VARIANTS["demo"], bigram_rows=0))
    path = tmp_path / "hub" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["pair_rows"], content["kindling"]["pair_rows"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read(tmp_path / "hub")[0] == model.cfg
    assert difference(tmp_path / "hub", model, random_rows(model.cfg)).largest <= TOLERANCE


@pytest.mark.parametrize("name", ["demo", "tinystories", "smallcoder-1", "portable-5m", "fineweb-nano", "ours-pairs"])
def test_greedy_text_is_what_transformers_generates(folders, name):
    folder, model = folders(name)
    their = theirs(folder)
    for seed in range(3):
        ids = torch.randint(1, 300, (5,), generator=torch.Generator().manual_seed(seed))
        ours = list(stream(model, ids.tolist(), Sampling(greedy=True, max_new_tokens=64), tokenizer().eos_id))
        out = their.generate(ids[None], attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=64)[0, 5:]
        out = out.tolist()
        assert ours == (out[: out.index(tokenizer().eos_id)] if tokenizer().eos_id in out else out)


def test_a_batch_padded_on_the_left_continues_as_each_prompt_alone(folders):
    for name in ("demo", "fineweb-nano", "autocomplete", "ours-pairs"):
        folder, _ = folders(name)
        their = theirs(folder)
        prompts = [torch.arange(3, 3 + n) for n in (9, 2, 5)]
        ids, mask = torch.full((3, 9), 1), torch.zeros(3, 9, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
        settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 1, "eos_token_id": None}
        together = their.generate(ids, attention_mask=mask, **settings)[:, 9:]
        for row, prompt in enumerate(prompts):
            assert torch.equal(their.generate(prompt[None], **settings)[0, len(prompt) :], together[row])
        assert torch.isfinite(their(ids, attention_mask=mask).logits).all()


@pytest.mark.parametrize("name", ["demo", "autocomplete", "ours-pairs", "ours-pairs-sinusoidal"])
def test_a_padded_batch_has_the_logits_of_each_text_alone(folders, monkeypatch, name):
    their, text = theirs(folders(name)[0]), torch.arange(3, 12)[None]
    alone = their(text).logits
    attend, masks = F.scaled_dot_product_attention, []

    def noted(*args, **kwargs):
        masks.append(kwargs["attn_mask"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for left, right in ((4, 0), (0, 4)):
        ids, mask = F.pad(text, (left, right), value=1), F.pad(torch.ones_like(text), (left, right))
        logits = their(ids, attention_mask=mask).logits[:, left : left + 9]
        assert torch.allclose(logits, alone, atol=1e-5, rtol=0)
    assert all(mask.any(-1).all() for mask in masks)  # where a query sees nothing, older torch gives NaN


def test_beams_know_the_token_before(folders):
    their, prompt = theirs(folders("ours-pairs")[0]), torch.arange(3, 12)[None].repeat(2, 1)
    prompt[1, 4:] += 50
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": None,
    }
    cached, whole = (their.generate(prompt, **settings, num_beams=3, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)


def test_a_cache_without_the_token_before_is_refused(folders):
    their, text = theirs(folders("ours-pairs")[0]), torch.arange(3, 12)[None]
    whole = their(text).logits
    read = their(text[:, :5])
    with pytest.raises(ValueError, match="previous_ids must be the 1 tokens before input_ids"):
        their(text[:, 5:], past_key_values=read.past_key_values)
    rest = their(text[:, 5:], past_key_values=read.past_key_values, previous_ids=text[:, 4])
    assert torch.allclose(torch.cat((read.logits, rest.logits), 1), whole, atol=1e-5)


def test_our_class_gives_the_mean_loss_of_shifted_labels_and_its_gradient(folders):
    folder, model = folders("demo")
    their, rows = theirs(folder), random_rows(model.cfg)
    labels = rows.clone()
    labels[:, :10] = -100
    total, n = model(rows[:, :-1], labels[:, 1:])
    loss = their(rows, labels=labels).loss
    assert loss.item() == pytest.approx((total / n).item(), abs=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in their.parameters())


def test_our_class_refuses_a_text_beyond_the_context(folders):
    their = theirs(folders("demo")[0])
    with pytest.raises(ValueError, match="at most 96 tokens"):
        their(torch.zeros(1, 97, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 96 tokens"):
        their.generate(torch.ones(1, 90, dtype=torch.int64), do_sample=False, max_new_tokens=20, eos_token_id=None)


def test_our_class_is_saved_by_transformers_and_takes_another_vocabulary(folders, tmp_path):
    for name in ("demo", "ours-learned-without-bias"):
        their, model = theirs(folders(name)[0]), folders(name)[1]
        assert (their.head.weight is their.wte.weight) == model.cfg.tie_embeddings
        their.resize_token_embeddings(330)
        their.save_pretrained(tmp_path / name)
        cfg, weights = read(tmp_path / name)
        assert cfg.vocab_size == 330 and cfg.document_mask == model.cfg.document_mask
        assert torch.equal(weights["wte.weight"][:320], model.wte.weight)


# -- the tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = [
    TEXT,
    "",
    " ",
    "x",
    "\n\n  \t",
    "don 't . Is n't it ?",
    "²ﬁ…",
    "a\0b",
    "<|endoftext|>",
    "<bos>x<eos><pad><unk>",
    "😀 é é",
]
CONTROL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    "settings", [{}, {"kind": "handwritten"}, {"normalizer": "nfkc", **CONTROL}, {"pad_token": "<pad>"}], ids=str
)
def test_autotokenizer_gives_the_ids_of_ours(tmp_path, settings):
    ours = tokenizer(**settings)
    written(tmp_path / "hub", small(preset("code-50m").model), ours)
    their = auto(tmp_path / "hub")
    start = [] if ours.bos_id is None else [ours.bos_id]
    for text in TEXTS:
        ids = ours.encode(text)
        assert their(text).input_ids == start + ids
        assert their(text, add_special_tokens=False).input_ids == ids
        assert their.decode(ids) == ours.decode(ids)
    assert their.decode(range(ours.vocab_size)) == ours.decode(range(ours.vocab_size))
    assert (their.bos_token_id, their.eos_token_id, their.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert their.model_max_length == 96
    generation = json.loads((tmp_path / "hub" / "generation_config.json").read_text(encoding="utf-8"))
    named = [generation.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert named == [ours.bos_id, ours.eos_id, ours.pad_id]


def test_autotokenizer_gives_the_ids_of_a_pretrained_vocabulary(tmp_path):
    path = shared_file("starcoder2_tokenizer/tokenizer.json")
    ours = load_json(path, TokenizerConfig(kind="pretrained", path=str(path)))
    cfg = replace(small(preset("code-50m").model), vocab_size=ours.vocab_size)
    written(tmp_path / "hub", cfg, ours)
    their = auto(tmp_path / "hub")
    for text in [*TEXTS, "<fim_prefix>def f(x):\n        return 12345"]:
        assert their(text).input_ids == ours.encode(text)
    hf_format.require_same_tokenizer(tmp_path / "hub", ours)


def test_a_sentencepiece_tokenizer_is_refused(tmp_path):
    with pytest.raises(HubFormatError, match=r"tokenizer\.kind=sentencepiece"):
        write(tmp_path, random_model(small(preset("code-50m").model)), tokenizer(kind="sentencepiece"), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [100, 3_000, 150_000])
def test_a_full_disk_is_one_clear_line(tmp_path, limit):
    resource = pytest.importorskip("resource")
    # of many tokens, so that the tokenizer is larger than the weights
    ours = train_bpe([" ".join(f"{n * 7919 % 99991:x}" for n in range(9000))], TokenizerConfig(), 5000)
    model = random_model(replace(small(preset("code-50m").model), n_layer=1, n_embd=4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(HubFormatError, match="must be writable and have room") as caught:
            write(tmp_path, model, ours, "# a card")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)


def test_a_folders_tokenizer_is_the_runs_by_what_ids_depend_on(tmp_path):
    ours = tokenizer(**CONTROL)
    written(tmp_path / "hub", small(preset("code-50m").model), ours)  # with a post-processor that ours has not
    hf_format.require_same_tokenizer(tmp_path / "hub", ours)
    content = json.loads(ours.to_json())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    swapped = from_json(json.dumps(content), ours.cfg)
    for another in (tokenizer(), tokenizer(normalizer="nfkc", **CONTROL), swapped, tokenizer(kind="sentencepiece")):
        with pytest.raises(HubFormatError, match=r"--tokenizer\.kind pretrained --tokenizer\.path"):
            hf_format.require_same_tokenizer(tmp_path / "hub", another)
    content = json.loads(ours.to_json())
    content["pre_tokenizer"]["add_prefix_space"] = True  # which a run that loads it leaves out
    (tmp_path / "hub" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    hf_format.require_same_tokenizer(tmp_path / "hub", ours)
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(HubFormatError, match="must hold a tokenizer"):
        hf_format.require_same_tokenizer(tmp_path / "hub", ours)


# -- folders that others wrote ----------------------------------------------------------------------------------------


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 20, "rope_theta": 1000.0}  # fmt: skip


def published(folder, name: str, dtype=torch.float32, shards: bool = False, **settings):
    """Write a random model as transformers publishes it, and return it as transformers loads it, in float32."""
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    if name == "gpt2":
        cfg = GPT2Config(**{"vocab_size": 320, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4, **settings})
        model = GPT2LMHeadModel(cfg)
    else:
        shape = {"vocab_size": 320, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 96,
                 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
        its = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
        shape |= {"head_dim": 12} if name == "qwen3" else {}
        model = getattr(transformers, f"{its}ForCausalLM")(
            getattr(transformers, f"{its}Config")(**{**shape, **settings})
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "50KB"} if shards else {}))
    return theirs(folder)


def logits_of(folder) -> torch.Tensor:
    """Return the logits of our GPT with a folder's weights."""
    cfg, weights = read(folder)
    model = build_model(cfg).eval()
    model.load_state_dict(weights, strict=not cfg.tie_embeddings)
    return model(torch.arange(40)[None]).detach()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"shards": True, "n_inner": 80, "activation_function": "gelu", "tie_word_embeddings": False}),
        ("gpt2", {"dtype": torch.bfloat16, "layer_norm_epsilon": 1e-3}),
        ("llama", {}),
        ("llama", {"shards": True, "rope_theta": 500_000.0, "tie_word_embeddings": True}),
        ("llama", {"dtype": torch.float16, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
        ("llama", {"head_dim": 8}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LLAMA_3, "head_dim": 16, "tie_word_embeddings": True}),
        ("qwen2", {"shards": True}),
        ("qwen2", {"rope_parameters": LINEAR, "tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("qwen3", {}),
        ("qwen3", {"shards": True, "rope_theta": 500_000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ],
    ids=str,
)
def test_a_published_model_has_the_same_logits_here(tmp_path, name, settings):
    model = published(tmp_path, name, **settings)
    assert (tmp_path / "model.safetensors.index.json").exists() == settings.get("shards", False)
    assert torch.allclose(logits_of(tmp_path), model(torch.arange(40)[None]).logits, atol=TOLERANCE, rtol=0)


def change_weights(folder, change):
    """Rewrite a folder's weights as `change` makes them."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_gpt2_is_read_as_openai_laid_it_out(tmp_path):
    model = published(tmp_path, "gpt2")
    change_weights(
        tmp_path,
        lambda w: (
            {n.removeprefix("transformer."): t for n, t in w.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 40, 40).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        ),
    )
    assert torch.allclose(logits_of(tmp_path), model(torch.arange(40)[None]).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gpt2", {"activation_function": "mish"}, "activation_function must be"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True"),
        ("llama", {"attention_bias": True}, "attention_bias must be False"),
        ("llama", {"mlp_bias": True}, "mlp_bias must be False"),
        ("llama", {"head_dim": 8}, r"q_proj.weight must be \(32, 48\)"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "rope_type must .* 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type must .* 'dynamic'",
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures must be"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "code.Mine"}}, "auto_map must be None"),
        ("llama", {"model_type": "qwen3_moe"}, "but is of 'qwen3_moe'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types must be \['full_attention'\] .* \['full_attention', 'sliding_attention'\]",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        (
            "llama",
            {"model_type": "mistral"},
            r"model_type .*\(gpt2, llama, qwen2, qwen3, kindling\), but is of 'mistral'",
        ),
        ("llama", {"num_hidden_layers": "two"}, "must be a config of llama"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.* has no place in it"),
        ("llama", {"num_hidden_layers": 10**9}, "must be of 1000000000 layers"),
        ("llama", {"vocab_size": 10**18}, "config.json|overflow|embed_tokens"),
        ("llama", {"vocab_size": 321}, r"model.embed_tokens.weight must be \(321, 48\)"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight must be model.embed_tokens.weight"),
        ("gpt2", {"kindling": {"n_layers": 2}}, "delete that key"),
        ("gpt2", {"kindling": 3}, "delete that key"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_computed_otherwise_is_refused_by_its_name(folders_of_others, name, settings, said):
    folder = folders_of_others(name)
    before = (folder / "config.json").read_text(encoding="utf-8")
    change_config(folder, **settings)
    try:
        with pytest.raises(HubFormatError, match=said) as caught:
            read(folder)
    finally:
        (folder / "config.json").write_text(before, encoding="utf-8")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folders_of_others(tmp_path_factory):
    root = tmp_path_factory.mktemp("others")

    @cache
    def made(name: str):
        published(root / name, name)
        return root / name

    return made


def one_line_of(folder) -> str:
    with pytest.raises(HubFormatError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_and_missing_files_are_named(tmp_path):
    published(tmp_path, "gpt2")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, content = weights.read_bytes(), config.read_text(encoding="utf-8")
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        assert "model.safetensors must be a whole safetensors file" in one_line_of(tmp_path)
    weights.write_bytes(whole)
    for text in ("{", "[]", '"x"', "\xff"):
        config.write_text(text, encoding="latin-1")
        assert "config.json must" in one_line_of(tmp_path)
    config.unlink()
    assert "config.json must be a readable JSON file" in one_line_of(tmp_path)
    config.write_text(content, encoding="utf-8")
    weights.unlink()
    assert "holds neither" in one_line_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in one_line_of(tmp_path)


def test_a_missing_shard_and_one_outside_the_folder_are_refused(tmp_path):
    published(tmp_path / "m", "llama", shards=True)
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = index.read_text(encoding="utf-8")
    shard = sorted(tmp_path.glob("m/*.safetensors"))[0]
    shard.rename(tmp_path / "aside")
    assert f"{shard.name} is missing" in one_line_of(tmp_path / "m")
    index.write_text(whole.replace(shard.name, "../aside"), encoding="utf-8")
    assert "must name the files" in one_line_of(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_weights_of_another_kind_or_name_are_refused(tmp_path, dtype):
    published(tmp_path, "llama")
    name = "model.norm.weight"
    change_weights(tmp_path, lambda w: w | ({name: w[name].to(dtype)} if dtype == torch.int8 else {"x.y": w[name] + 1}))
    assert ("of torch.int8" if dtype == torch.int8 else "x.y has no place") in one_line_of(tmp_path)


def test_biases_that_were_trained_since_are_kept(tmp_path):
    model = written(tmp_path / "hub", VARIANTS["gpt2-without-biases"])
    name = "transformer.h.1.mlp.c_fc.bias"
    change_weights(tmp_path / "hub", lambda w: w | {name: torch.ones_like(w[name])})
    cfg, weights = read(tmp_path / "hub")
    assert cfg == replace(model.cfg, bias=True, d_ff=cfg.d_ff, n_kv_head=cfg.n_kv_head)
    assert weights["blocks.1.mlp.up.bias"].eq(1).all()


def test_obstacles_are_named_with_the_values_that_a_class_has():
    assert unsupported_settings(preset("autocomplete").model, "gpt2") == {"head_bias": False}
    assert unsupported_settings(preset("code-50m").model, "gpt2") == {}
    assert unsupported_settings(preset("demo").model, "llama") == {
        "activation": "swiglu", "qk_norm": False, "bigram_rows": 0
    }  # fmt: skip
    # QK-norm stays where a class has it
    assert nearest_stock(preset("demo").model) == ("qwen3", {"activation": "swiglu", "bigram_rows": 0})
    assert nearest_stock(preset("portable-5m").model) == ("qwen3", {})


def test_a_difference_is_seen_wherever_it_is(folders):
    folder, model = folders("smallcoder-1")
    for name, p in model.named_parameters():
        with torch.no_grad():
            at, before = (p.view(-1)[3:4], float(p.view(-1)[3]))
            at += 1.0
            rows = torch.zeros(1, 8, dtype=torch.int64) if name == "wte.weight" else random_rows(model.cfg, 1)
            assert difference(folder, model, rows).largest > TOLERANCE, name
            at.fill_(before)
    with torch.no_grad():
        before = float(model.norm_f.weight[0])
        model.norm_f.weight[0] = torch.nan
        assert math.isnan(difference(folder, model, random_rows(model.cfg, 1)).largest)
        model.norm_f.weight[0] = before  # other tests use this model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable-5m", "demo"])
def test_greedy_text_of_128_tokens_at_the_true_size_is_what_transformers_generates(tmp_path, name):
    model = written(tmp_path / "hub", preset(name).model)
    prompt = random_rows(model.cfg, 1)[:, :20]
    ours = list(stream(model, prompt[0].tolist(), Sampling(greedy=True, max_new_tokens=128), -1))
    settings = {"do_sample": False, "max_new_tokens": 128, "eos_token_id": None}
    out = theirs(tmp_path / "hub").generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert ours == out[0, 20:].tolist() and len(ours) == 128


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, "code-150m", "code-225m"])
def test_transformers_gives_the_same_logits_at_the_true_size(tmp_path, name):
    cfg = preset(name).model
    model = written(tmp_path / "hub", cfg)
    apart = difference(tmp_path / "hub", model, random_rows(cfg, 1)).largest
    print(f"{name}: {architecture(cfg)}, {model.n_parameters():,} parameters, difference {apart:.1e}")
    assert apart <= TOLERANCE
