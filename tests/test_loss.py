import pytest
import torch
import torch.nn.functional as F

from config import IGNORE
from kindling import loss


def case(n=300, c=16, v=50, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g, requires_grad=True)
    w = torch.randn(v, c, generator=g, requires_grad=True)
    b = torch.randn(v, generator=g, requires_grad=True) if bias else None
    y = torch.randint(v, (n,), generator=g)
    y[::7] = IGNORE
    return x, w, b, y


def reference(x, w, b, y):
    return F.cross_entropy(
        F.linear(x.double(), w.double(), None if b is None else b.double()), y, ignore_index=IGNORE, reduction="sum"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_equal_the_float64_formula(bias, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 64)  # several chunks and a short last one
    x, w, b, y = case(bias=bias)
    inputs = [t for t in (x, w, b) if t is not None]
    ours, theirs = loss.linear_cross_entropy(x, w, b, y), reference(x, w, b, y)
    assert torch.allclose(ours.double(), theirs, rtol=1e-6)
    for ours_grad, theirs_grad in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs)):
        assert torch.allclose(ours_grad, theirs_grad.float(), atol=2e-5)


def test_under_bf16_autocast_it_is_as_near_the_exact_loss_as_plain_autocast_is():
    x, w, b, y = case()
    exact = reference(x, w, b, y)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.linear_cross_entropy(x, w, b, y)
        plain = F.cross_entropy(F.linear(x, w, b).float(), y, ignore_index=IGNORE, reduction="sum")
    assert abs(ours - exact) <= 2 * abs(plain - exact) + 1e-3
    (exact_grad,) = torch.autograd.grad(exact, w)
    (ours_grad,) = torch.autograd.grad(ours, w)
    assert (ours_grad - exact_grad).norm() / exact_grad.norm() < 0.01


def test_under_fp16_a_scaled_tiny_gradient_survives():
    x, w, b, y = case(n=32)
    with torch.autocast("cpu", torch.float16):
        scaled = loss.linear_cross_entropy(x * 1e-3, w * 1e-3, b * 0, y) * 2.0**-12 * 2.0**16
    (grad,) = torch.autograd.grad(scaled, x)
    (exact,) = torch.autograd.grad(reference(x * 1e-3, w * 1e-3, b * 0, y) * 2.0**-12 * 2.0**16, x)
    assert (grad - exact).norm() / exact.norm() < 0.02


def test_without_gradients_the_loss_is_the_same():
    x, w, b, y = case()
    with torch.no_grad():
        assert torch.allclose(loss.linear_cross_entropy(x, w, b, y).double(), reference(x, w, b, y), rtol=1e-6)


def test_a_row_without_targets_gives_zero_and_not_nan():
    x, w, b, y = case()
    ours = loss.linear_cross_entropy(x, w, b, torch.full_like(y, IGNORE))
    assert ours == 0
    assert all((g == 0).all() for g in torch.autograd.grad(ours, (x, w, b)))


def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 64)
    sizes = []

    def kernel(logits, targets):
        sizes.append(logits.shape)
        return loss.softmax_and_nll(logits, targets)

    loss.linear_cross_entropy(*case(), kernel)
    assert sum(n for n, _ in sizes) == 300 and max(n for n, _ in sizes) <= 64


def test_the_loss_of_each_row_is_that_of_the_float64_formula_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 64)
    x, w, b, y = case()
    y = y.clamp_min(0)
    sizes, linear = [], F.linear
    monkeypatch.setattr(loss.F, "linear", lambda x, *rest: sizes.append(len(x)) or linear(x, *rest))
    ours = loss.linear_nll(x, w, b, y)
    monkeypatch.undo()
    exact = F.cross_entropy(F.linear(x.double(), w.double(), b.double()), y, reduction="none")
    assert torch.allclose(ours.double(), exact, rtol=1e-5) and not ours.requires_grad
    assert sum(sizes) == 300 and max(sizes) <= 64
    assert loss.linear_nll(x[:0], w, b, y[:0]).shape == (0,)


def test_a_second_backward_pass_is_refused():
    x, w, b, y = case()
    ours = loss.linear_cross_entropy(x, w, b, y)
    ours.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.backward()


def test_the_loss_of_sure_predictions_keeps_its_digits():
    logits = torch.tensor([[100.0, 85.0, 0.0]])
    nll, grad = loss.softmax_and_nll(logits.clone(), torch.tensor([0]))
    assert float(nll) == pytest.approx(3.059e-7, rel=0.2) and float(grad) == pytest.approx(-3.059e-7, rel=0.2)
