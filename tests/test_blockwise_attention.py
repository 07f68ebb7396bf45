"""Attention block by block is F.scaled_dot_product_attention, forward and backward, with and without a mask."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kindling import blockwise_attention as attention
from kindling.data.shards import document_position_ids
from kindling.device import Runtime, has_compiler
from kindling.positions import document_mask
from model import build_model
from presets import preset

END = 5


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(attention, "_compiled", lambda function: function)


def mask_of(B: int, T: int) -> torch.Tensor:
    ids = torch.full((B, T), 7)
    ids[0, T // 3] = ids[-1, T // 2] = END  # each end begins another document
    return document_mask(torch.from_numpy(document_position_ids(ids.numpy(), END)))


def case(B=2, H=3, T=64, D=16, scale=1.0, seed=0) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the result in bfloat16; q, k and v as slices of one tensor, as the model has them."""
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3 * H, D, generator=g).bfloat16().transpose(1, 2)
    q, k, v = (t.detach().requires_grad_() for t in qkv.split(H, 1))
    return [(q * scale).detach().requires_grad_(), k, v, torch.randn(B, H, T, D, generator=g).bfloat16()]


def results(attend, q, k, v, dy, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Return the result of attention and its three gradients."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    y = attend(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy.to(dtype))]


def errors(found, exact) -> list[float]:
    """Return the error of each tensor, as a share of its norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 15, 16, 64, 65, 200])  # blocks: one, a whole one, several, a short last one
def test_results_and_gradients_are_those_of_float64(T, masked, uncompiled, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    mask = mask_of(2, T) if masked else None
    q, k, v, dy = case(T=T)

    def reference(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    exact = results(reference, q, k, v, dy, torch.float64)
    ours = results(lambda q, k, v: attention.blockwise_attention(q, k, v, mask), q, k, v, dy)
    if T == 1:  # one weight, which is 1 whatever q and k are
        assert torch.equal(ours[0], v) and max(ours[1].abs().max(), ours[2].abs().max()) < 0.05
    else:
        assert max(errors(ours, exact)) < 0.01  # bfloat16 rounds by up to 0.004


def test_the_error_is_a_few_times_that_of_the_fused_kernel_though_scores_are_rounded(uncompiled):
    q, k, v, dy = case(T=256, D=64, scale=3.0)  # scores of up to 15

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    exact = results(fused, q, k, v, dy, torch.float64)
    theirs = errors(results(fused, q, k, v, dy), exact)
    ours = errors(results(attention.blockwise_attention, q, k, v, dy), exact)
    assert all(a < 5 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_no_token_sees_another_document_or_the_future(uncompiled, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    q, k, v, _ = case(B=1, T=64)
    mask = mask_of(1, 64)  # the second document begins at 21, the third at 32
    y = attention.blockwise_attention(q, k, v, mask)
    changed = v.detach().clone()
    changed[:, :, 10] += 1
    difference = (attention.blockwise_attention(q, k, changed, mask) - y).abs().amax(dim=(0, 1, 3))  # (T,)
    assert (difference > 0).nonzero().flatten().tolist() == list(range(10, 21))


# -- dropout ----------------------------------------------------------------------------------------------------------------


def kept(N: int, T: int, dropout: float, seed: int) -> torch.Tensor:
    """Return the factors (N, T, T) of all weights."""
    return attention._kept(torch.empty(N, T, T), slice(0, T), T, dropout, torch.tensor(seed, dtype=torch.int32))


@pytest.mark.parametrize("masked", [False, True])
def test_with_dropout_results_and_gradients_are_those_of_the_same_weights_left_out(masked, uncompiled, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    monkeypatch.setattr(attention.torch, "randint", lambda *_, **__: torch.tensor(12345, dtype=torch.int32))
    B, H, T, p = 2, 3, 40, 0.25
    visible = mask_of(B, T) if masked else torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    factors = kept(B * H, T, p, 12345).unflatten(0, (B, H)).double()

    def reference(q, k, v):
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) * factors) @ v

    def ours(q, k, v):
        return attention.blockwise_attention(q, k, v, visible if masked else None, p)

    q, k, v, dy = case(B, H, T)
    assert max(errors(results(ours, q, k, v, dy), results(reference, q, k, v, dy, torch.float64))) < 0.01


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_leaves_out_its_share_at_random_places(dropout):
    N, T = 12, 128
    found = kept(N, T, dropout, 3)
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropout)).item()}
    gone = (found == 0).double()
    sigma = (dropout * (1 - dropout) / gone.numel()) ** 0.5
    assert abs(gone.mean() - dropout) < 5 * sigma
    centred = (gone - dropout) / (dropout * (1 - dropout)) ** 0.5
    for other in (kept(N, T, dropout, 4), *(found.roll(1, axis) for axis in range(3))):  # another seed; the neighbours
        correlation = (centred * ((other == 0).double() - dropout)).mean() / (dropout * (1 - dropout)) ** 0.5
        assert abs(correlation) < 5 / gone.numel() ** 0.5


def test_huge_scores_give_no_nan(uncompiled):
    q, k, v, dy = case(scale=1e4)
    assert all(t.isfinite().all() for t in results(attention.blockwise_attention, q, k, v, dy))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_it_is_a_proper_operator(masked, dropout, uncompiled):
    q, k, v, _ = (t.detach().flatten(0, 1).requires_grad_() for t in case(T=20))
    options = mask_of(2, 20) if masked else None, dropout, torch.tensor(7, dtype=torch.int32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention._attend, (q, k, v, *options), test_utils=tests)
    q, k, v = (t.detach() for t in (q, k, v))
    y, log_sum = attention._attend(q, k, v, *options)
    torch.library.opcheck(attention._attend_backward, (y, q, k, v, *options, y, log_sum), test_utils=tests[:2])


def test_blocks_cover_every_query_and_end_where_their_keys_end():
    for length in (1, 127, 128, 129, 256, 512, 1000, 1024, 4096):
        parts = list(attention._blocks(length))
        assert [i for rows, _ in parts for i in range(rows.start, rows.stop)] == list(range(length))
        assert all(seen == slice(0, rows.stop) for rows, seen in parts) and len(parts) <= attention.MAX_BLOCKS


# -- in the model ---------------------------------------------------------------------------------------------------------


def model_of(**changes):
    torch.manual_seed(0)
    cfg = replace(
        preset("modern-5m").model, n_layer=2, n_head=4, n_embd=64, block_size=48, vocab_size=64, bigram_rows=64
    )
    model = build_model(replace(cfg, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def set_blockwise(model, wanted: bool) -> None:
    for block in model.blocks:
        block.attn.blockwise = wanted


def step(model, position_ids=None) -> torch.Tensor:
    """Return the gradients of a pass in bfloat16, in one vector."""
    idx = torch.randint(6, 64, (2, 48), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(idx, idx.roll(-1, 1), position_ids)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def calls(uncompiled, monkeypatch):
    """Notes the shape of q and the dropout at each call."""
    seen, real = [], attention.blockwise_attention
    monkeypatch.setattr(
        "model.blockwise_attention", lambda q, *rest: seen.append((tuple(q.shape), rest[-1])) or real(q, *rest)
    )
    return seen


@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_head": 2}, {"qk_norm": "learned"}, {"qk_norm": False, "position": "learned"}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_has_the_gradients_that_it_has_with_the_fused_kernel(shape, masked, calls):
    model = model_of(**shape)
    ids = None
    if masked:
        rows = torch.full((2, 48), 7)
        rows[:, 20] = END
        ids = torch.from_numpy(document_position_ids(rows.numpy(), END))
    expected = step(model, ids)
    assert not calls
    set_blockwise(model, True)
    found = step(model, ids)
    assert calls == [((2, 4, 48, 16), 0.0)] * 2
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_short_rows_and_the_cache_leave_it_to_the_fused_kernel(calls):
    model = model_of().eval()
    set_blockwise(model, True)
    idx = torch.randint(6, 64, (2, 48))
    model(idx[:, :-1])
    model.forward_cached(idx, model.new_cache(2))
    assert not calls
    model(idx)
    assert len(calls) == 2


def test_dropout_follows_the_random_state_and_the_rate_of_the_model(calls):
    model = model_of(dropout=0.5).train()
    set_blockwise(model, True)
    idx = torch.randint(6, 64, (2, 48))
    attn, x = model.blocks[0].attn, model.wte(idx)
    torch.manual_seed(1)
    first, second = attn(x), attn(x)
    torch.manual_seed(1)
    assert torch.equal(attn(x), first) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(attn(x), attn(x)) and [rate for _, rate in calls] == [0.5] * 3 + [0.0] * 2


@pytest.mark.parametrize(
    "kind, precision, has_bf16, expected",
    [
        ("cpu", "bf16", True, True),
        ("cpu", "bf16", False, False),
        ("cpu", "fp32", True, False),
        ("cuda", "bf16", True, False),
    ],
)
def test_it_is_preferred_where_a_cpu_multiplies_bfloat16(kind, precision, has_bf16, expected, monkeypatch):
    monkeypatch.setattr("kindling.device.has_bf16", lambda _: has_bf16)
    assert Runtime(torch.device(kind), precision).prefers_blockwise_attention == expected


# -- compiled ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    if not has_compiler("cpu"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    attention._compiled.cache_clear()
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    yield
    torch._dynamo.reset()
    attention._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiled_the_passes_compute_what_they_compute_uncompiled(masked, dropout, compiler):
    q, k, v, dy = (t.detach().flatten(0, 1) for t in case(T=40))
    options = mask_of(2, 40) if masked else None, dropout, torch.tensor(99, dtype=torch.int32)
    y, log_sum = attention._forward(q, k, v, *options)
    expected = y, log_sum, *attention._backward(dy, q, k, v, *options, y, log_sum)
    found = *attention._attend(q, k, v, *options), *attention._attend_backward(dy, q, k, v, *options, y, log_sum)
    assert max(errors(found, [t.double() for t in expected])) < 2e-3


@pytest.mark.slow
def test_compiled_the_gradients_are_those_of_the_eager_model(compiler):
    model = model_of()
    expected = step(model)
    model.enable_compile(blockwise=True)
    assert (step(model) - expected).norm() < 0.02 * expected.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as validation does
        idx = torch.randint(6, 64, (3, 48))
        found = model(idx)
        model.disable_compile()
        assert not any(block.attn.blockwise for block in model.blocks)
        assert (found - model(idx)).norm() < 0.02 * found.norm()
    assert torch.equal(step(model), expected)


@pytest.mark.slow
def test_compiled_dropout_follows_the_random_state_also_where_activations_are_computed_again(compiler):
    model = model_of(dropout=0.2).train()
    model.enable_compile(blockwise=True)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return step(model)

    expected = seeded(1)
    assert torch.equal(seeded(1), expected) and not torch.equal(seeded(2), expected)
    model.checkpoint_activations = True
    assert torch.equal(seeded(1), expected)
