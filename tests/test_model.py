import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import IGNORE, ModelConfig
from kindling.data.shards import document_position_ids
from kindling.device import has_compiler
from kindling.errors import ConfigError
from kindling.int8.model import bigram_ids as numpy_pair_ids
from kindling.positions import BIGRAM_PRIMES, bigram_ids, document_mask, rotary_tables, rotate, sinusoidal_positions
from model import GPT, Norm, TransformersGPT2, build_model
from presets import preset


def positions_of(idx, eos_id):
    return torch.from_numpy(document_position_ids(idx.numpy(), eos_id))


SMALL = dict(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)
SEEDS = {  # the five systems' architectures at toy size, and the demo's, also with a table of pairs
    name: replace(preset(name).model, **SMALL, n_kv_head=None, d_ff=64)
    for name in ("demo", "portable-5m", "code-50m", "tinystories", "autocomplete", "fineweb-nano", "smallcoder-1")
}
SEEDS["pairs"] = replace(SEEDS["demo"], bigram_rows=211)
shapes = st.builds(
    dict,
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([2, 4]),
    n_kv_head=st.sampled_from([None, 1, 2]),
    position=st.sampled_from(["learned", "sinusoidal", "rope"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    final_norm=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_new", "relu", "relu2", "swiglu"]),
    bias=st.booleans(),
    attn_out_proj=st.booleans(),
    qk_norm=st.sampled_from([False, True, "learned"]),
    tie_embeddings=st.booleans(),
    bigram_rows=st.sampled_from([0, 2, 50]),
)


def tokens(cfg, batch=2, length=None):
    return torch.randint(cfg.vocab_size, (batch, length or cfg.block_size), generator=torch.Generator().manual_seed(1))


def randomise(model, seed=0):
    """Give every parameter, biases and norms too, a random value, so that none can be left out unnoticed."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1 + (1.0 if p.ndim == 1 else 0.0))
    return model


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes, st.integers(1, 3), st.integers(1, 16))
def test_any_shape_gives_logits_of_its_shape_and_the_count_of_the_formula(shape, batch, length):
    cfg = ModelConfig(block_size=16, vocab_size=37, n_embd=16, d_ff=24, **shape)
    model = GPT(cfg)
    assert model(tokens(cfg, batch, length)).shape == (batch, length, 37)
    assert model.n_parameters() == cfg.n_parameters


@pytest.mark.parametrize("name", SEEDS)
def test_no_position_sees_a_later_one(name):
    cfg = SEEDS[name]
    model = randomise(GPT(cfg)).eval()
    idx = tokens(cfg)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % cfg.vocab_size
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("name", SEEDS)
def test_attention_weights_are_causal_distributions_and_the_ones_that_attention_uses(name):
    cfg = SEEDS[name]
    model = randomise(GPT(cfg)).eval()
    idx = tokens(cfg)
    weights = model.attention_weights(idx)
    assert weights.shape == (cfg.n_layer, 2, cfg.n_head, cfg.block_size, cfg.block_size)
    assert (weights.triu(1) == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    x, rope = model.embed(idx)
    attn = model.blocks[0].attn
    h = model.blocks[0].norm_1(x)
    y = (weights[0] @ attn.heads(h, rope)[2]).transpose(1, 2).flatten(2)
    assert torch.allclose(y if attn.proj is None else attn.proj(y), attn(h, rope), atol=1e-4)


def test_grouped_query_weights_are_the_ones_that_attention_uses():
    cfg = replace(SEEDS["smallcoder-1"], n_kv_head=2)
    attn = randomise(GPT(cfg)).eval().blocks[0].attn
    x = torch.randn(2, 16, cfg.n_embd)
    v = attn.heads(x, None)[2].repeat_interleave(2, dim=1)
    assert torch.allclose(attn.proj((attn.weights(x) @ v).transpose(1, 2).flatten(2)), attn(x), atol=1e-4)


@pytest.mark.parametrize("name", SEEDS)
def test_an_untrained_model_is_as_good_as_guessing(name):
    cfg = replace(SEEDS[name], vocab_size=1009)
    torch.manual_seed(0)
    with torch.no_grad():
        loss, n = GPT(cfg).eval()(tokens(cfg, 8), tokens(cfg, 8))
    assert float(loss / n) == pytest.approx(math.log(1009), rel=0.08)


def test_the_loss_is_the_sum_over_supervised_tokens():
    cfg = SEEDS["autocomplete"]
    model = randomise(GPT(cfg)).eval()
    idx, targets = tokens(cfg), tokens(cfg).roll(-1, 1)
    targets[0, 5:] = IGNORE
    loss, n = model(idx, targets)
    expected = torch.nn.functional.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert n == 5 + cfg.block_size
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_residual_projections_start_scaled_or_at_zero():
    cfg = replace(SEEDS["code-50m"], n_embd=128, n_layer=8)
    for proj in (GPT(cfg).blocks[3].attn.proj, GPT(cfg).blocks[3].mlp.down):
        assert proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert (GPT(replace(cfg, residual_init="zero")).blocks[0].mlp.down.weight == 0).all()


def test_dropout_acts_in_training_only():
    cfg = replace(SEEDS["tinystories"], dropout=0.5)
    model = randomise(GPT(cfg))
    idx = tokens(cfg)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_sinusoids_are_those_of_the_paper():
    table = sinusoidal_positions(50, 8).double()
    for pos in (0, 1, 49):
        for i in range(4):
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(pos / 10_000 ** (2 * i / 8)), abs=1e-6)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(pos / 10_000 ** (2 * i / 8)), abs=1e-6)


def test_rotation_depends_only_on_distance():
    cos, sin = rotary_tables(64, 16, 10_000.0)
    q, k = torch.randn(16), torch.randn(16)
    products = rotate(q.expand(1, 1, 64, 16), cos, sin)[0, 0] @ rotate(k.expand(1, 1, 64, 16), cos, sin)[0, 0].T
    assert torch.allclose(products.diagonal(-5), products.diagonal(-5)[0].expand(59), atol=1e-4)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="block_size=32"):
        GPT(SEEDS["demo"])(torch.zeros(1, 33, dtype=torch.long))


# -- against transformers: the same random weights, logits to 1e-4 ----------------------------------------------------


def as_gpt2(model: GPT):
    """Transformers' GPT-2 with the weights of ours; Conv1D keeps its matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = model.cfg
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size,
            n_positions=cfg.block_size,
            n_embd=cfg.n_embd,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            n_inner=cfg.ff_width,
            tie_word_embeddings=cfg.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    names = {
        "attn.qkv": "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "norm_1": "ln_1",
        "norm_2": "ln_2",
    }
    state = {
        "transformer.wte.weight": model.wte.weight,
        "transformer.wpe.weight": model.wpe.weight,
        "lm_head.weight": model.head.weight,
        "transformer.ln_f.weight": model.norm_f.weight,
        "transformer.ln_f.bias": model.norm_f.bias,
    }
    for i, block in enumerate(model.blocks):
        for name, p in block.named_parameters():
            part, kind = name.rsplit(".", 1)
            state[f"transformer.h.{i}.{names[part]}.{kind}"] = p.T if p.ndim == 2 else p
    theirs.load_state_dict(state)
    return theirs


def as_llama(model: GPT):
    """Transformers' Llama with the weights of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = model.cfg
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.n_embd,
            num_hidden_layers=cfg.n_layer,
            intermediate_size=cfg.ff_width,
            num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.kv_heads,
            max_position_embeddings=cfg.block_size,
            rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=cfg.tie_embeddings,
        )
    ).eval()
    state = {
        "model.embed_tokens.weight": model.wte.weight,
        "model.norm.weight": model.norm_f.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, b in enumerate(model.blocks):
        q, k, v = b.attn.qkv.weight.split([n * cfg.head_dim for n in (cfg.n_head, cfg.kv_heads, cfg.kv_heads)])
        state |= {
            f"model.layers.{i}.{name}.weight": w
            for name, w in (
                ("self_attn.q_proj", q),
                ("self_attn.k_proj", k),
                ("self_attn.v_proj", v),
                ("self_attn.o_proj", b.attn.proj.weight),
                ("mlp.up_proj", b.mlp.up.weight),
                ("mlp.gate_proj", b.mlp.gate.weight),
                ("mlp.down_proj", b.mlp.down.weight),
                ("input_layernorm", b.norm_1.weight),
                ("post_attention_layernorm", b.norm_2.weight),
            )
        }
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_gpt2(tied):
    cfg = replace(SEEDS["code-50m"], tie_embeddings=tied)
    model = randomise(GPT(cfg)).eval()
    with torch.no_grad():
        assert (model(tokens(cfg)) - as_gpt2(model)(tokens(cfg)).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_logits_equal_transformers_llama(tied, n_kv_head):
    cfg = replace(SEEDS["smallcoder-1"], tie_embeddings=tied, n_kv_head=n_kv_head)
    model = randomise(GPT(cfg)).eval()
    with torch.no_grad():
        assert (model(tokens(cfg)) - as_llama(model)(tokens(cfg)).logits).abs().max() <= 1e-4


def test_the_transformers_backbone_keeps_the_contract():
    cfg = replace(SEEDS["code-50m"], backbone="transformers")
    ours = randomise(GPT(replace(cfg, backbone="kindling"))).eval()
    theirs = build_model(cfg).eval()
    assert isinstance(theirs, TransformersGPT2)
    theirs.gpt2.load_state_dict(as_gpt2(ours).state_dict())
    assert theirs.n_parameters() == cfg.n_parameters
    idx, targets = tokens(cfg), tokens(cfg).roll(-1, 1)
    with torch.no_grad():
        assert torch.allclose(ours(idx), theirs(idx), atol=1e-4)
        assert torch.allclose(ours(idx, targets)[0], theirs(idx, targets)[0], rtol=1e-5)
    assert torch.allclose(ours.attention_weights(idx), theirs.attention_weights(idx), atol=1e-5)
    assert torch.allclose(ours(idx), theirs(idx), atol=1e-4)  # and the fused kernel is back


# -- pairs of tokens --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-1, 2**20 - 1), min_size=2, max_size=30), st.integers(2, 10**7))
def test_the_row_of_a_pair_is_that_of_exact_integers_also_in_numpy(ids, n_rows):
    idx = torch.tensor(ids).clamp(min=0)
    previous = torch.tensor(ids).roll(1)
    rows = bigram_ids(idx, previous, n_rows)
    first, second = BIGRAM_PRIMES
    expected = [
        0 if p < 0 else 1 + (p * first + i * second) % (n_rows - 1) for i, p in zip(idx.tolist(), previous.tolist())
    ]
    assert rows.tolist() == expected == numpy_pair_ids(idx.numpy(), previous.numpy(), n_rows).tolist()


def test_a_token_has_the_row_of_it_and_the_one_before_and_the_first_has_row_0():
    cfg = SEEDS["pairs"]
    model = GPT(cfg).eval()
    idx = tokens(cfg)
    plain = model.wte(idx)
    assert torch.equal(model.embed(idx)[0], plain)  # the table starts at zero
    added = randomise(model).embed(idx)[0] - model.wte(idx)
    assert torch.allclose(added[:, 0], model.wtp.weight[0].expand(2, -1), atol=1e-6)
    rows = bigram_ids(idx[:, 1:], idx[:, :-1], cfg.bigram_rows)
    assert torch.allclose(added[:, 1:], model.wtp.weight[rows], atol=1e-6)


# -- masking across the documents of a packed block -------------------------------------------------------------------

EOS = 7
ENDS = ((0, 9, 10, 25), (4, 31))  # where end-of-text tokens lie in the two rows of `packed`
MASKED = {  # a name per way of giving positions, and per number of key / value heads
    f"{position}-{n_kv_head or 4}": replace(SEEDS[name], position=position, n_kv_head=n_kv_head)
    for name, position in (("code-50m", "learned"), ("fineweb-nano", "sinusoidal"), ("smallcoder-1", "rope"))
    for n_kv_head in (None, 2, 1)
}
MASKED["pairs"] = SEEDS["pairs"]


def packed(cfg, ends=ENDS):
    """Rows of random tokens with EOS at `ends` only, and the (row, start, stop) of each segment that it opens."""
    idx = tokens(cfg, len(ends))
    idx[idx == EOS] = EOS + 1
    segments = []
    for row, places in enumerate(ends):
        idx[row, list(places)] = EOS
        cuts = sorted({0, *places, idx.size(1)})
        segments += [(row, a, b) for a, b in itertools.pairwise(cuts)]
    return idx, segments


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_positions_restart_at_each_end_of_text_as_a_plain_loop_counts_them(rows, eos_id):
    expected = []
    for row in rows:
        at = -1
        expected.append([at := 0 if token == eos_id else at + 1 for token in row])
    found = positions_of(torch.tensor(rows), eos_id)
    assert found.dtype == torch.int64 and found.tolist() == expected


def test_the_mask_shows_each_query_itself_and_what_precedes_it_in_its_document():
    mask = document_mask(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 6, 6)
    documents = [0, 0, 0, 1, 2, 2]
    assert mask[0, 0].tolist() == [[documents[q] == documents[k] and k <= q for k in range(6)] for q in range(6)]


@pytest.mark.parametrize("name", MASKED)
def test_a_packed_block_gives_the_logits_of_each_document_alone(name):
    cfg = MASKED[name]
    model = randomise(GPT(cfg)).eval()
    idx, segments = packed(cfg)
    with torch.no_grad():
        together = model(idx, None, positions_of(idx, EOS))
        for row, start, stop in segments:
            assert torch.allclose(together[row, start:stop], model(idx[row : row + 1, start:stop])[0], atol=1e-5)


@pytest.mark.parametrize("name", ["learned-4", "rope-2"])
def test_a_packed_block_gives_the_logits_of_transformers_on_each_document(name):
    cfg = MASKED[name]
    model = randomise(GPT(cfg)).eval()
    theirs = (as_gpt2 if cfg.position == "learned" else as_llama)(model)
    idx, segments = packed(cfg)
    with torch.no_grad():
        together = model(idx, None, positions_of(idx, EOS))
        for row, start, stop in segments:
            alone = theirs(idx[row : row + 1, start:stop]).logits[0]
            assert (together[row, start:stop] - alone).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MASKED)
def test_tokens_of_other_documents_change_nothing_with_the_mask_and_something_without(name):
    cfg = MASKED[name]
    model = randomise(GPT(cfg)).eval()
    idx, _ = packed(cfg)
    changed = idx.clone()
    outside = torch.ones(cfg.block_size, dtype=torch.bool)
    outside[10:25] = False  # the longest document of the first row
    outside &= idx[0] != EOS
    changed[0, outside] = (idx[0, outside] + 1) % 90 + EOS + 1  # still no EOS
    with torch.no_grad():
        masked = [model(i, None, positions_of(i, EOS))[0, 10:25] for i in (idx, changed)]
        plain = [model(i)[0, 10:25] for i in (idx, changed)]
    assert torch.equal(*masked)
    assert (plain[0] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MASKED)
def test_no_gradient_reaches_the_tokens_of_other_documents(name):
    cfg = replace(MASKED[name], tie_embeddings=False)
    model = randomise(GPT(cfg))
    idx = torch.arange(cfg.block_size)[None] + EOS + 1  # each token once, so that its row of the embedding is its own
    idx[0, [10, 25]] = EOS
    model(idx, None, positions_of(idx, EOS))[0, 11:25].square().sum().backward()
    reached = model.wte.weight.grad.abs().sum(1) > 0
    assert set(reached.nonzero().flatten().tolist()) == {EOS, *idx[0, 11:25].tolist()}


def test_documents_stay_apart_in_rows_longer_than_the_kernels_tiles():
    cfg = replace(SEEDS["smallcoder-1"], block_size=1100, n_layer=1)  # the CPU's kernel takes 512 keys at a time
    model = randomise(GPT(cfg)).eval()
    idx, segments = packed(cfg, ends=((5, 1050),))
    with torch.no_grad():
        together = model(idx, None, positions_of(idx, EOS))
        for _, start, stop in segments:
            assert torch.allclose(together[0, start:stop], model(idx[:, start:stop])[0], atol=1e-5)


def test_rotary_angles_restart_with_each_document():
    cfg = MASKED["rope-4"]  # on distances within a document alone, a restart shows in the rounding only
    model = GPT(cfg)
    idx, segments = packed(cfg)
    for table, full in zip(model.embed(idx, positions_of(idx, EOS))[1], (model.rope_cos, model.rope_sin)):
        assert table.shape == (2, 1, cfg.block_size, cfg.head_dim)
        for row, start, stop in segments:
            assert torch.equal(table[row, 0, start:stop], full[: stop - start])


@pytest.mark.parametrize("name", MASKED)
def test_attention_weights_are_exactly_zero_across_documents(name):
    cfg = MASKED[name]
    model = randomise(GPT(cfg)).eval()
    idx, segments = packed(cfg)
    weights = model.attention_weights(idx, positions_of(idx, EOS))
    assert weights.shape == (cfg.n_layer, 2, 4, cfg.block_size, cfg.block_size)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    for row, start, stop in segments:
        inside = weights[:, row, :, start:stop]
        assert (inside[..., :start] == 0).all() and (inside[..., stop:] == 0).all()
        assert torch.allclose(
            inside[..., start:stop], model.attention_weights(idx[row : row + 1, start:stop])[:, 0], atol=1e-5
        )


@pytest.mark.parametrize("name", ["learned-4", "rope-2"])
def test_without_positions_attention_is_plainly_causal_and_without_a_mask(name, monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("model.F.scaled_dot_product_attention", lambda *a, **k: (seen.append((a, k)), real(*a, **k))[1])
    cfg = MASKED[name]
    GPT(cfg)(tokens(cfg))
    assert len(seen) == cfg.n_layer
    for (_, k, _), kwargs in seen:
        assert kwargs["is_causal"] and kwargs["attn_mask"] is None and k.size(1) == cfg.kv_heads


@pytest.mark.parametrize("name", ["learned-4", "sinusoidal-4", "rope-4", "rope-2"])
def test_a_row_of_one_document_is_as_without_positions(name):
    cfg = MASKED[name]
    model = randomise(GPT(cfg)).eval()
    idx, _ = packed(cfg, ends=((), ()))
    with torch.no_grad():
        assert torch.allclose(model(idx, None, positions_of(idx, EOS)), model(idx), atol=1e-5)


def test_dropout_reaches_masked_attention_in_training_only():
    cfg = replace(MASKED["rope-2"], dropout=0.5)
    model = randomise(GPT(cfg))
    idx, _ = packed(cfg)
    attn, x, mask = model.blocks[0].attn, torch.randn(2, 32, cfg.n_embd), document_mask(positions_of(idx, EOS))
    assert not torch.equal(attn(x, None, mask), attn(x, None, mask))
    model.eval()
    assert torch.equal(attn(x, None, mask), attn(x, None, mask))


@pytest.mark.slow  # training in test_trainer.py compiles one architecture
@pytest.mark.parametrize("name", ["learned-4", "rope-2"])
def test_compiled_blocks_agree_with_eager_ones_and_compile_once_for_all_steps(name):
    if not has_compiler("cpu"):
        pytest.skip("needs a C++ compiler")
    from torch._dynamo.utils import counters

    cfg = MASKED[name]
    model = randomise(GPT(cfg))
    batches = [packed(cfg, ends)[0] for ends in (ENDS, ((3, 30), (11,)), ((), (0, 1, 2)))]

    def run(idx):
        model.zero_grad()
        loss, _ = model(idx, idx.roll(-1, 1), positions_of(idx, EOS))
        loss.backward()
        return loss.detach(), model.blocks[0].attn.qkv.weight.grad.clone()

    eager = [run(idx) for idx in batches]
    torch._dynamo.reset()
    counters.clear()
    model.enable_compile()
    compiled, graphs = [], []
    for idx in batches:
        compiled.append(run(idx))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2]  # the block, which all layers share, and the loss kernel
    for (loss, grad), (expected_loss, expected_grad) in zip(compiled, eager):
        assert torch.allclose(loss, expected_loss, rtol=1e-5)
        assert (grad - expected_grad).abs().max() <= 1e-4 * expected_grad.abs().max()


def test_documents_stay_apart_in_bf16():
    cfg = MASKED["rope-2"]
    model = randomise(GPT(cfg)).eval()
    idx, _ = packed(cfg)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = model(idx, None, positions_of(idx, EOS))
        changed = torch.where(idx == EOS, EOS, 50)
        changed[0, 10:25] = idx[0, 10:25]
        assert torch.equal(together[0, 10:25], model(changed, None, positions_of(changed, EOS))[0, 10:25])


def test_the_transformers_backbone_refuses_the_mask():
    with pytest.raises(ConfigError, match=r"model\.document_mask must be False on transformers' GPT-2, but is True"):
        replace(SEEDS["code-50m"], backbone="transformers", document_mask=True)
    model = build_model(replace(SEEDS["code-50m"], backbone="transformers"))
    with pytest.raises(ValueError, match="positions must be None"):
        model(tokens(model.cfg), None, torch.zeros(2, 32, dtype=torch.long))


def test_code_225m_has_the_same_count_on_both_backbones():
    with torch.device("meta"):
        model = build_model(replace(preset("code-225m").model, backbone="transformers"))
    assert model.n_parameters() == 225_317_760


def test_the_transformers_backbone_refuses_shapes_that_are_not_gpt2():
    with pytest.raises(ConfigError, match=r"model\.activation must be 'gelu_new'"):
        replace(SEEDS["tinystories"], backbone="transformers")


def test_rmsnorm_and_layernorm_equal_the_float64_formula():
    x = torch.randn(5, 32)
    for name, centre in (("demo", 0.0), ("code-50m", 1.0)):
        cfg = SEEDS[name]
        norm = randomise(Norm(cfg))
        d = x.double()
        d = d - centre * d.mean(-1, keepdim=True)
        expected = d / (d.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * norm.weight + (
            0 if norm.bias is None else norm.bias
        )
        assert torch.allclose(norm(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["demo", "code-50m"])
def test_the_parameters_that_multiply_are_those_of_the_linear_layers_and_norms(name):
    cfg = preset(name).model
    with torch.device("meta"):
        model = GPT(cfg)
    tables = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.n_embd
    positions = cfg.block_size * cfg.n_embd if cfg.position == "learned" else 0
    assert model.n_matmul_parameters() == model.n_parameters() - tables - positions - cfg.bigram_rows * cfg.n_embd
