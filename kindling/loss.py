"""Cross-entropy of a linear head, in chunks: the logits of a whole batch never exist at the same time.

With `code-50m`'s micro-batch of 4 x 1024 tokens, the float32 logits alone would take 0.8 GB, and their gradient the same
again. Here each chunk of rows is multiplied with the head, and gives its loss and its gradients. The memory is that of one
chunk, and the backward pass does not compute the head's product again.

Limits: first derivatives only, and one backward pass. In float16 the gradient must be scaled before it is rounded, and the scale
is only known in the backward pass, so the chunks are computed again there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import IGNORE
from kindling.device import rows_at_once

CHUNK = 1024  # rows at a time: 200 MB of float32 logits at a vocabulary of 49,152. A large GPU takes more

SoftmaxAndNll = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_and_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by their softmax; return the summed negative log-likelihood and its gradient at each row's target.

    logits (N, V) in any floating type; targets (N,) int64, IGNORE for rows without a target, whose softmax becomes 0. The sum is
    float32, the gradient (N,) has the type of the logits. Everywhere but at the targets, the softmax is the gradient. The caller
    puts the rest in: a compiled kernel that did so would need a second array of (N, V).
    """
    shifted = logits.float()  # (N, V)
    shifted = shifted - shifted.amax(-1, keepdim=True)
    log_total = shifted.exp().sum(-1, keepdim=True).log()  # (N, 1)
    supervised = (targets != IGNORE)[:, None]  # (N, 1)
    log_p = shifted.gather(1, targets.clamp_min(0)[:, None]) - log_total  # (N, 1)
    nll = torch.where(supervised, -log_p, 0.0).sum()
    grad_at_target = torch.where(supervised, log_p.exp() - 1, 0.0).squeeze(1).to(logits.dtype)  # (N,)
    logits.copy_(torch.where(supervised, (shifted - log_total).exp(), 0.0))
    return nll, grad_at_target


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, kernel: SoftmaxAndNll
    ) -> Tensor:
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        dx = torch.empty_like(x)
        dw, db = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        loss = torch.zeros((), device=x.device)
        chunk = rows_at_once(x.device, 4 * weight.size(0), CHUNK)
        for start in range(0, x.size(0), chunk):
            rows = slice(start, start + chunk)
            x_chunk = x[rows].to(dtype)
            grad = F.linear(x_chunk, w, b)  # (rows, V), logits until the kernel has replaced them
            nll, grad_at_target = kernel(grad, targets[rows])
            grad[torch.arange(grad.size(0), device=x.device), targets[rows].clamp_min(0)] = grad_at_target
            loss += nll
            dx[rows] = grad @ w
            dw += grad.T @ x_chunk
            if db is not None:
                db += grad.sum(0, dtype=torch.float32)
            del grad  # before the next one is allocated
        ctx.save_for_backward(dx, dw, *([] if db is None else [db]))
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):
        grads = [grad.mul_(scale) for grad in ctx.saved_tensors]  # in place, so a second pass raises RuntimeError
        dx, dw, db = grads if len(grads) == 3 else (*grads, None)
        return dx, dw, db, None, None, None


def _nll_sum(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kernel: SoftmaxAndNll = softmax_and_nll
) -> Tensor:
    """Return the summed cross-entropy, in nats and float32, of the logits `x @ weight.T + bias`.

    x (N, C), weight (V, C), bias (V,) or None, targets (N,) int64, IGNORE for rows without a target.
    Under autocast the product runs in the autocast type. `kernel` is `softmax_and_nll`, compiled or not.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if torch.is_grad_enabled() and dtype != torch.float16:
        with torch.autocast(device, enabled=False):
            return _ChunkedLinearCrossEntropy.apply(x, weight, bias, targets, dtype, kernel)
    loss = torch.zeros((), device=x.device)
    for start in range(0, x.size(0), CHUNK):
        chunk = x[start : start + CHUNK], weight, bias, targets[start : start + CHUNK]
        loss = loss + (
            checkpoint(_nll_sum, *chunk, use_reentrant=False) if torch.is_grad_enabled() else _nll_sum(*chunk)
        )
    return loss


@torch.no_grad()
def linear_nll(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row, (N,) float32 in nats; arguments as above, every row has a target."""
    chunks = (slice(start, start + CHUNK) for start in range(0, x.size(0), CHUNK))
    nll = [F.cross_entropy(F.linear(x[c], weight, bias).float(), targets[c], reduction="none") for c in chunks]
    return torch.cat(nll) if nll else x.new_zeros(0, dtype=torch.float32)
