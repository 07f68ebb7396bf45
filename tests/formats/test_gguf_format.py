import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ModelConfig, TokenizerConfig
from kindling.formats.fold_weights import fold_qk_norm
from kindling.formats.gguf_format import GGUFError, architecture, difference, halves, interleave, read, write
from kindling.tokenization.handwritten_bpe import ByteLevelBPE
from kindling.tokenization.tokenizer import Tokenizer, from_json
from kindling.tokenization.train_tokenizer import train, train_bpe
from model import GPT
from presets import preset

TEXTS = ["def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n", "x = 'naïve' != 12345  # ü\n"] * 3
SIZES = {"block_size": 48, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 64}
GPT2 = ModelConfig(**SIZES)
LLAMA = ModelConfig(
    **SIZES,
    n_kv_head=2,
    d_ff=96,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
SHAPES = {
    "gpt2": GPT2,
    "gpt2 untied, without biases, grouped queries": replace(GPT2, tie_embeddings=False, bias=False, n_kv_head=2),
    "llama": LLAMA,
    "llama tied, with biases": replace(LLAMA, tie_embeddings=True, bias=True),
    "qwen3": replace(LLAMA, qk_norm="learned", norm_eps=1e-3),
    "qwen3 tied, folded": replace(LLAMA, qk_norm=True, tie_embeddings=True, norm_eps=1e-3),
    "llama with biases of queries, keys and values, stretched": replace(
        LLAMA, qkv_bias=True, rope_factors=(8.0, 1.0, 4.0, 32.0)
    ),
    "llama with wide heads, linear": replace(LLAMA, d_head=32, rope_factors=(4.0,)),
    "arcee": replace(LLAMA, activation="relu2", norm_eps=1e-6, rope_theta=5e4),
}


def random_model(cfg: ModelConfig) -> GPT:
    """A model none of whose weights is 0 or 1, biases and norms included."""
    torch.manual_seed(0)
    model = GPT(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.02).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def rows(cfg: ModelConfig, n: int = 2) -> torch.Tensor:
    return torch.randint(0, 300, (n, cfg.block_size), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, TokenizerConfig(), 300)


@pytest.fixture(scope="module")
def code_tokenizer() -> Tokenizer:
    """Splits digits, as StarCoder2's does, and has its tokens for filling in the middle."""
    special = [
        "<|endoftext|>",
        "<fim_prefix>",
        "<fim_middle>",
        "<fim_suffix>",
        "<fim_pad>",
        "<repo_name>",
        "<file_sep>",
    ]
    return from_json(ByteLevelBPE.train(TEXTS, 300, special, split_digits=True).to_json(), TokenizerConfig())


def fields(path) -> dict:
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


# -- which shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_each_architecture_holds_its_shapes(shape):
    assert architecture(SHAPES[shape]) == shape.split()[0]


def test_what_none_would_derive_is_no_other_shape():
    from kindling.formats.hf_layout import architecture as hub_class

    written = replace(LLAMA, qk_norm="learned", d_head=16, qkv_bias=False), replace(GPT2, d_head=16, qkv_bias=True)
    assert [architecture(cfg) for cfg in written] == [hub_class(cfg) for cfg in written] == ["qwen3", "gpt2"]
    with pytest.raises(GGUFError, match=r"model\.d_head=None \(is 20\)"):
        architecture(replace(GPT2, d_head=20))


def test_a_model_with_a_table_of_pairs_is_refused_by_its_name():
    with pytest.raises(GGUFError, match=r"model\.bigram_rows=0 \(is 64\); export it with --to hf or --to int8"):
        architecture(replace(GPT2, bigram_rows=64))


@pytest.mark.parametrize(
    "name, named",
    [
        ("code-50m", "gpt2"),
        ("smallcoder-1", "llama"),
        ("portable-5m", "qwen3"),
        ("portable-150m", "qwen3"),
        ("demo", ["qwen3", "activation=swiglu (is relu2)", "bigram_rows=0 (is 32768)"]),
        ("tinystories", ["gpt2", "activation=gelu_new (is gelu)"]),
        ("autocomplete", ["gpt2", "activation=gelu_new (is gelu)", "head_bias=False (is True)"]),
        ("fineweb-nano", ["position=learned (is sinusoidal)", "(is relu)", "head_bias", "attn_out_proj", "final_norm"]),
    ],
)
def test_a_preset_is_held_or_refused_in_one_line_that_names_every_setting_in_the_way(name, named):
    cfg = preset(name).model
    if isinstance(named, str):
        assert architecture(cfg) == named
        return
    with pytest.raises(GGUFError) as e:
        architecture(cfg)
    assert all(word in str(e.value) for word in [*named, "--to hf"]) and "\n" not in str(e.value)
    assert str(e.value).count("(is ") == len([word for word in named if word not in SHAPES])


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_in_f32_gives_back_every_weight_bit_for_bit(shape, tokenizer, tmp_path):
    model = random_model(SHAPES[shape])
    assert write(tmp_path / "m.gguf", model, tokenizer, "f32", "m") == []
    held, ours = read(tmp_path / "m.gguf"), fold_qk_norm(model.cfg, dict(model.named_parameters()))[1]
    every = dict(GPT(replace(model.cfg, bias=True)).named_parameters())
    assert held.keys() == (every if shape.startswith("gpt2") else ours).keys()  # gpt2 always has biases
    assert not any(held[name].any() for name in held if name not in ours)
    assert all(torch.equal(held[name], p) for name, p in ours.items())
    found = difference(tmp_path / "m.gguf", model, rows(model.cfg))
    assert found.largest <= (1e-5 if "folded" in shape else 0) and found.loss == pytest.approx(found.changed, abs=1e-6)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_f16_rounds_matrices_and_leaves_norms_biases_and_positions_as_they_are(shape, tokenizer, tmp_path):
    model = random_model(SHAPES[shape])
    write(tmp_path / "m.gguf", model, tokenizer, "f16", "m")
    held = read(tmp_path / "m.gguf")
    for name, p in model.named_parameters():
        exact = p.dim() == 1 or name == "wpe.weight"
        assert torch.equal(held[name], p if exact else p.half().float()), name


@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "arcee"])
def test_q8_0_is_within_half_a_step_of_its_block_of_32_weights(shape, tokenizer, tmp_path):
    model = random_model(SHAPES[shape])
    assert write(tmp_path / "m.gguf", model, tokenizer, "q8_0", "m") == []
    held = read(tmp_path / "m.gguf")
    for name, p in model.named_parameters():
        if p.dim() == 1 or name == "wpe.weight":
            assert torch.equal(held[name], p), name
            continue
        step = p.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        error = (held[name] - p).unflatten(1, (-1, 32)).abs()
        assert (error <= step * (0.5 + 127 * 2**-11 + 1e-4)).all(), name  # the step itself is rounded to half precision
        assert error.max() > 0


def test_the_difference_grows_from_f32_over_f16_to_q8_0_and_stays_small(tokenizer, tmp_path):
    model = random_model(LLAMA)
    largest = {}
    for kind in ("f32", "f16", "q8_0"):
        write(tmp_path / kind, model, tokenizer, kind, "m")
        largest[kind], loss, changed = difference(tmp_path / kind, model, rows(LLAMA))
        assert abs(changed - loss) < 1e-3
    assert 0 == largest["f32"] < largest["f16"] < largest["q8_0"] < 0.02


def test_the_difference_is_that_of_the_weights_in_the_file(tokenizer, tmp_path):
    model, other = random_model(GPT2), random_model(GPT2)
    with torch.no_grad():
        other.norm_f.bias += 0.5
    write(tmp_path / "m.gguf", other, tokenizer, "f32", "m")
    idx = rows(GPT2)
    with torch.no_grad():
        want = float((other(idx) - model(idx)).abs().max())
        losses = [m(idx[:, :-1], idx[:, 1:])[0] / idx[:, 1:].numel() for m in (other, model)]
    largest, loss, changed = difference(tmp_path / "m.gguf", model, idx)
    assert largest == pytest.approx(want, rel=1e-5)
    assert changed - loss == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)


def test_rows_that_q8_0_cannot_hold_are_in_f16_and_reported(tokenizer, tmp_path):
    model = random_model(replace(GPT2, n_embd=80, d_ff=96))
    in_f16 = write(tmp_path / "m.gguf", model, tokenizer, "q8_0", "m")
    assert sorted(in_f16) == sorted(
        ["token_embd.weight", *(f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_qkv", "attn_output", "ffn_up"))]
    )
    held = read(tmp_path / "m.gguf")
    assert torch.equal(held["wte.weight"], model.wte.weight.half().float())


@pytest.mark.parametrize("kind, value", [("f16", 1e5), ("q8_0", 1e8), ("f32", float("nan"))])
def test_weights_that_the_type_cannot_hold_are_refused_before_anything_is_written(kind, value, tokenizer, tmp_path):
    model = random_model(GPT2)
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 5] = value
    with pytest.raises(GGUFError, match=rf"finite in {kind}, but blk\.1\.ffn_up\.weight"):
        write(tmp_path / "m.gguf", model, tokenizer, kind, "m")
    assert not any(tmp_path.iterdir())


@given(st.integers(1, 4), st.integers(1, 6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_queries_and_keys_are_permuted_as_llama_cpps_converter_does(n_head, half, bias):
    width = n_head * 2 * half
    weight = torch.arange(width).float() if bias else torch.arange(width * 3).float().view(width, 3)
    w = weight.numpy()  # LlamaModel.permute of convert_hf_to_gguf.py
    want = w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    assert np.array_equal(interleave(weight, n_head).numpy(), want)
    assert torch.equal(halves(interleave(weight, n_head), n_head), weight)


def test_qwen3_has_queries_and_keys_in_our_order_and_llama_has_not(tokenizer, tmp_path):
    from gguf import GGUFReader

    for shape, same in (("qwen3", True), ("llama", False)):
        model = random_model(SHAPES[shape])
        write(tmp_path / shape, model, tokenizer, "f32", "m")
        held = {t.name: t.data for t in GGUFReader(tmp_path / shape).tensors}
        q, k, v = model.blocks[1].attn.qkv.weight.detach().split([64, 32, 32])
        assert np.array_equal(held["blk.1.attn_v.weight"], v)
        assert np.array_equal(held["blk.1.attn_q.weight"], q) == np.array_equal(held["blk.1.attn_k.weight"], k) == same


# -- names and keys ---------------------------------------------------------------------------------------------------


def transformers_names(arch: str) -> list[str]:
    """The names of the weights of GPT2LMHeadModel (tied), and of Llama, Qwen3 and Arcee, with two blocks."""
    if arch == "gpt2":
        modules = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
        block = [f"{module}.{which}" for module in modules for which in ("weight", "bias")]
        outside = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
        return [f"transformer.{name}" for name in outside + [f"h.{i}.{name}" for i in (0, 1) for name in block]]
    block = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
    block += ["mlp.up_proj", "mlp.down_proj"] + ([] if arch == "arcee" else ["mlp.gate_proj"])
    block += ["self_attn.q_norm", "self_attn.k_norm"] if arch == "qwen3" else []
    outside = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return outside + [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in block]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "arcee"])
def test_tensors_have_the_names_that_llama_cpps_converter_gives_transformers_weights(arch, tokenizer, tmp_path):
    import gguf

    write(tmp_path / "m.gguf", random_model(SHAPES[arch]), tokenizer, "f32", "m")
    mapped = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    want = {mapped.get_name(name, try_suffixes=(".weight", ".bias")) for name in transformers_names(arch)}
    assert {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == want


def test_the_keys_say_what_llama_cpp_needs_of_the_shape(tokenizer, tmp_path):
    write(tmp_path / "g.gguf", random_model(GPT2), tokenizer, "f16", "my run")
    write(tmp_path / "a.gguf", random_model(SHAPES["arcee"]), tokenizer, "q8_0", "m")
    gpt2, arcee = fields(tmp_path / "g.gguf"), fields(tmp_path / "a.gguf")
    assert {k.removeprefix("gpt2."): v for k, v in gpt2.items() if k.startswith("gpt2.")} == {
        "context_length": 48, "embedding_length": 64, "block_count": 2, "feed_forward_length": 256, "vocab_size": 320,
        "attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    assert {k.removeprefix("arcee."): v for k, v in arcee.items() if k.startswith("arcee.")} == {
        "context_length": 48, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "vocab_size": 320,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "rope.dimension_count": 16, "rope.freq_base": 5e4,
    }  # fmt: skip
    general = {k.removeprefix("general."): v for k, v in gpt2.items() if k.startswith("general.")}
    assert general == {
        "architecture": "gpt2", "type": "model", "name": "my run", "size_label": "124K", "file_type": 1,
        "quantization_version": 2,
    }  # fmt: skip
    assert arcee["general.file_type"] == 7
    write(tmp_path / "q.gguf", random_model(SHAPES["qwen3"]), tokenizer, "f32", "m")
    qwen3 = {k.removeprefix("qwen3."): v for k, v in fields(tmp_path / "q.gguf").items() if k.startswith("qwen3.")}
    assert qwen3 == {
        "context_length": 48, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "vocab_size": 320,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-3), "rope.dimension_count": 16, "rope.freq_base": 1e4,
    }  # fmt: skip


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_tokenizers_and_ids_of_no_token_are_unused(tokenizer, tmp_path):
    write(tmp_path / "m.gguf", random_model(GPT2), tokenizer, "f32", "m")
    held = fields(tmp_path / "m.gguf")
    content = json.loads(tokenizer.to_json())
    vocab = {i: token for token, i in content["model"]["vocab"].items()}
    n = tokenizer.vocab_size
    assert held["tokenizer.ggml.tokens"][:n] == [vocab[i] for i in range(n)]
    assert held["tokenizer.ggml.tokens"][n:] == [f"[PAD{i}]" for i in range(n, 320)]
    assert held["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (n - 5) + [5] * (320 - n)  # control, normal, unused
    assert held["tokenizer.ggml.merges"] == [" ".join(m) for m in content["model"]["merges"]]
    assert held["tokenizer.ggml.model"] == "gpt2" and held["tokenizer.ggml.pre"] == "gpt-2"


def test_without_a_begin_token_none_is_added_and_with_one_it_is(tokenizer, tmp_path):
    cfg = TokenizerConfig(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    for name, its in (("without", tokenizer), ("with", train_bpe(TEXTS, cfg, 300))):
        write(tmp_path / name, random_model(GPT2), its, "f32", "m")
    keys = ["add_bos_token", "add_eos_token", "add_space_prefix"]
    keys += [f"{key}_token_id" for key in ("bos", "eos", "eot", "padding")]
    values = [[fields(tmp_path / n).get(f"tokenizer.ggml.{key}") for key in keys] for n in ("without", "with")]
    assert values == [[False, False, False, 0, 0, 0, None], [True, False, False, 1, 2, 2, 0]]


def test_a_tokenizer_that_splits_digits_is_starcoders_and_its_fim_tokens_have_keys(code_tokenizer, tmp_path):
    write(tmp_path / "m.gguf", random_model(GPT2), code_tokenizer, "f32", "m")
    held = fields(tmp_path / "m.gguf")
    assert held["tokenizer.ggml.pre"] == "starcoder"
    ids = [held[f"tokenizer.ggml.fim_{key}_token_id"] for key in ("pre", "mid", "suf", "pad", "rep", "sep")]
    assert ids == [1, 2, 3, 4, 5, 6]
    assert held["tokenizer.ggml.token_type"][:8] == [3] * 7 + [1]


@pytest.mark.parametrize(
    "cfg, words",
    [
        (TokenizerConfig(normalizer="nfkc"), "normalizer of type NFKC"),
        (TokenizerConfig(kind="sentencepiece"), "SentencePiece"),
    ],
)
def test_another_tokenizer_is_refused_by_name_before_anything_is_written(cfg, words, tmp_path):
    its = train([" ".join(TEXTS)], cfg, 300)
    with pytest.raises(GGUFError, match=rf"{words}.*--to hf"):
        write(tmp_path / "m.gguf", random_model(GPT2), its, "f32", "m")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(GGUFError, match=r"fit in model\.vocab_size=270, but has \d+ ids"):
        write(tmp_path / "m.gguf", random_model(replace(GPT2, vocab_size=270)), tokenizer, "f32", "m")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused_in_one_line(kept, tokenizer, tmp_path):
    write(tmp_path / "m.gguf", random_model(LLAMA), tokenizer, "f32", "m")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(GGUFError, match=r"^[^\n]*m\.gguf must be a whole GGUF file[^\n]*$"):
        read(tmp_path / "m.gguf")


def test_a_missing_file_text_and_another_projects_file_are_refused(tokenizer, tmp_path):
    import gguf

    (tmp_path / "text").write_text("x = 1\n" * 100, encoding="utf-8")
    writer = gguf.GGUFWriter(tmp_path / "bert", "bert")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    for name in ("none", "text", "bert"):
        with pytest.raises(GGUFError, match=rf"^[^\n]*{name} must be[^\n]*$"):
            read(tmp_path / name)


def test_a_file_of_another_shape_has_no_difference(tokenizer, tmp_path):
    write(tmp_path / "m.gguf", random_model(GPT2), tokenizer, "f32", "m")
    for other in (replace(GPT2, block_size=40), replace(GPT2, n_layer=3), replace(GPT2, bias=False), LLAMA):
        with pytest.raises(GGUFError, match=r"must be of the model's shape, but \S+ is not"):
            difference(tmp_path / "m.gguf", random_model(other), rows(GPT2)[:, :40])


# -- llama.cpp --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    """Loads a file into llama.cpp; keys and values are in float32, as ours are, and not in half precision."""
    library = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is not installed")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False}
    return partial(library.Llama, n_ctx=48, n_threads=1, logits_all=True, verbose=False, **exact)


def half_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu_new as llama.cpp has it: a table from half precision to half precision, between -10 and 10."""
    x = x.half().double()
    y = 0.5 * x * (1 + torch.tanh(0.79788456080286535587989211986876 * x * (1 + 0.044715 * x * x)))
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y)).half().float()


@pytest.mark.parametrize("kind, most", [("f32", 1e-4), ("f16", 1e-2), ("q8_0", 5e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_our_logits(shape, kind, most, llama_cpp, tokenizer, tmp_path, monkeypatch):
    model = random_model(SHAPES[shape])
    write(tmp_path / "m.gguf", model, tokenizer, kind, "m")
    theirs = llama_cpp(str(tmp_path / "m.gguf"))
    idx = rows(model.cfg)[0]
    theirs.eval(idx.tolist())
    model, held = GPT(fold_qk_norm(model.cfg, {})[0]).eval(), read(tmp_path / "m.gguf")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(held[name])
        monkeypatch.setattr(torch.nn.functional, "gelu", half_gelu)
        ours = model(idx[None])[0].numpy()
    largest = np.abs(np.array(theirs.scores[: len(idx)]) - ours).max()
    print(f"{shape} {kind}: largest difference {largest:.2e} of logits up to {np.abs(ours).max():.2f}")
    assert largest < most


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_continues_greedily_as_ours_does(shape, llama_cpp, tokenizer, tmp_path):
    model = random_model(SHAPES[shape])
    write(tmp_path / "m.gguf", model, tokenizer, "f32", "m")
    theirs = llama_cpp(str(tmp_path / "m.gguf"))
    prompt = rows(model.cfg)[0, :10].tolist()
    ours = list(prompt)
    with torch.no_grad():
        for _ in range(32):
            ours.append(int(model(torch.tensor([ours]))[0, -1].argmax()))
    generated = theirs.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [next(generated) for _ in range(32)] == ours[10:]


@pytest.mark.parametrize("which", ["tokenizer", "code_tokenizer"])
def test_llama_cpp_gives_our_token_ids_and_the_text_back(which, llama_cpp, corpus, request, tmp_path):
    its = request.getfixturevalue(which)
    write(tmp_path / "m.gguf", random_model(GPT2), its, "f32", "m")
    theirs = llama_cpp(str(tmp_path / "m.gguf"), vocab_only=True)
    code = [p.read_text(encoding="utf-8") for p in sorted(corpus.rglob("*.py"))[:12]]
    hard = [
        "",
        " ",
        "\n\n\n   x",
        "a  1  b",
        "it's 3.14 != x ,y",
        "<|endoftext|><fim_prefix>",
        "日本語 é🙂\t\r\n ",
        "１２３ ½",
    ]
    for text in code + hard:
        ids = theirs.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        assert ids == its.encode(text), text[:80]
        assert theirs.detokenize(ids).decode("utf-8") == text


def test_llama_cpp_gives_starcoder2s_token_ids(llama_cpp, corpus, tmp_path):
    text = shared_file("starcoder2_tokenizer/tokenizer.json").read_text(encoding="utf-8")
    its = from_json(text, TokenizerConfig())
    cfg = ModelConfig(block_size=48, vocab_size=49_152, n_layer=1, n_head=1, n_embd=32)
    write(tmp_path / "m.gguf", random_model(cfg), its, "f16", "m")
    theirs = llama_cpp(str(tmp_path / "m.gguf"), vocab_only=True)
    for path in sorted(corpus.rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        assert theirs.tokenize(code.encode("utf-8"), add_bos=False, special=False) == its.encode(code), path.name
