"""Attention block by block is F.scaled_dot_product_attention, forward and backward, with and without a mask."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kindling import attention
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
    ids[0, T // 3] = ids[-1, T // 2] = END  # each row has two documents
    return document_mask(torch.from_numpy(document_position_ids(ids.numpy(), END)))


def case(B=2, H=3, T=64, D=16, scale=1.0, seed=0) -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the result, in bfloat16, as slices of one tensor, as the model has them."""
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


def test_huge_scores_give_no_nan(uncompiled):
    q, k, v, dy = case(scale=1e4)
    assert all(t.isfinite().all() for t in results(attention.blockwise_attention, q, k, v, dy))


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_a_proper_operator(masked, uncompiled):
    q, k, v, _ = (t.flatten(0, 1).detach() for t in case(T=20))
    mask = mask_of(2, 20) if masked else None
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention._attend, (q, k, v, mask), test_utils=tests)
    y, log_sum = attention._attend(q, k, v, mask)
    torch.library.opcheck(attention._attend_backward, (y, q, k, v, mask, y, log_sum), test_utils=tests[:2])


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
    """Notes the shape of q at each call."""
    seen, real = [], attention.blockwise_attention
    monkeypatch.setattr("model.blockwise_attention", lambda q, *rest: seen.append(tuple(q.shape)) or real(q, *rest))
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
    assert calls == [(2, 4, 48, 16)] * 2
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_dropout_short_rows_and_the_cache_leave_it_to_the_fused_kernel(calls):
    model = model_of(dropout=0.1)
    set_blockwise(model, True)
    idx = torch.randint(6, 64, (2, 48))
    model.train()(idx)
    model.eval()(idx[:, :-1])
    model.forward_cached(idx, model.new_cache(2))
    assert not calls
    model.eval()(idx)
    assert len(calls) == 2


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


@pytest.mark.slow  # two compilations
def test_compiled_the_gradients_are_those_of_the_eager_model():
    if not has_compiler("cpu"):
        pytest.skip("needs a C++ compiler")
    model = model_of()
    expected = step(model)
    model.enable_compile(blockwise_attention=True)
    found = step(model)
    assert (found - expected).norm() < 0.02 * expected.norm()
    model.disable_compile()
    assert not any(block.attn.blockwise for block in model.blocks)
    assert torch.equal(step(model), expected)
