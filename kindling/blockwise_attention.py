"""Causal attention as a few large products of matrices, for CPUs that multiply bfloat16.

    y = blockwise_attention(q, k, v)            # as F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = blockwise_attention(q, k, v, mask)      # ... attn_mask=mask)

On such a CPU, torch's fused kernel takes about as long in bfloat16 as in float32, and with dropout torch has no fused kernel.
Products of a block of queries with all the keys up to its end are ten times as fast, and `torch.compile` fuses what is between
them. As in FlashAttention (Dao et al. 2022, arXiv:2205.14135), the attention weights are not kept: the backward pass computes
them again from the logarithm of their sum, and what dropout leaves out from a hash of each weight's place. Each pass is an
operator of its own, because torch.compile would otherwise keep the weights from one pass to the other.

Limits: first derivatives only. Scores are rounded to the type of q, where a fused kernel keeps float32. Dropout's rate is
rounded to a multiple of 2^-16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

MIN_BLOCK = 128  # queries. Smaller blocks skip more of what is hidden, but their products are slower
MAX_BLOCKS = 4  # each takes time to compile
MIX = -2_048_144_789, -1_028_477_387  # 0x85EBCA6B and 0xC2B2AE35 of MurmurHash3, as int32


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each block: the keys end where the queries end."""
    size = max(MIN_BLOCK, math.ceil(length / MAX_BLOCKS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(0, stop)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, seen: slice) -> Tensor:
    """Return the scaled scores of a block (N, R, S) in float32, -inf for the keys that a query may not see."""
    scores = (q[:, rows] @ k[:, seen].mT).float() * q.size(-1) ** -0.5  # (N, R, S)
    if mask is None:
        positions = torch.arange(seen.stop, device=q.device)  # (S,)
        return scores.masked_fill(positions > positions[rows, None], -math.inf)
    hidden = ~mask[:, :, rows, seen]  # (B, 1, R, S)
    return scores.unflatten(0, (mask.size(0), -1)).masked_fill(hidden, -math.inf).flatten(0, 1)


def _mixed(x: Tensor) -> Tensor:
    """Return int32 numbers mixed by the finalizer of MurmurHash3; products wrap, and `&` makes the shifts logical."""
    x = (x ^ (x >> 16 & 0xFFFF)) * MIX[0]
    x = (x ^ (x >> 13 & 0x7FFFF)) * MIX[1]
    return x ^ (x >> 16 & 0xFFFF)


def _kept(weights: Tensor, rows: slice, length: int, dropout: float, seed: Tensor) -> Tensor:
    """Return 1 / (1 - dropout) for the weights of a block (N, R, S) that dropout keeps, else 0. T is `length`, seed () int32.

    A hash of the weight's place in (N, T, T) and of the seed decides.
    """
    n, r, s = (torch.arange(size, dtype=torch.int32, device=weights.device) for size in weights.shape)
    place = (n[:, None, None] * length + (r + rows.start)[:, None]) * length + s  # (N, R, S)
    chance = _mixed(_mixed(place) ^ seed) & 0xFFFF
    return torch.where(chance >= round(dropout * 2**16), 1 / (1 - dropout), 0.0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Return attention (N, T, D) and the logarithm of each query's sum (N, T, 1), for q, k, v (N, T, D)."""
    outputs, log_sums = [], []
    for rows, seen in _blocks(q.size(1)):
        scores = _scores(q, k, mask, rows, seen)  # (N, R, S)
        largest = scores.amax(-1, keepdim=True)  # (N, R, 1)
        weights = (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        weights = weights / total
        if dropout:
            weights = weights * _kept(weights, rows, q.size(1), dropout, seed)
        outputs.append(weights.to(v.dtype) @ v[:, seen])  # (N, R, D)
        log_sums.append(largest + total.log())
    return torch.cat(outputs, 1), torch.cat(log_sums, 1)


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor,
    y: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of y."""
    # of each query, the sum over keys of weight * gradient of the weight
    mean = (dy.float() * y.float()).sum(-1, keepdim=True)  # (N, T, 1)
    dq, dk, dv = [], torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for rows, seen in _blocks(q.size(1)):
        weights = (_scores(q, k, mask, rows, seen) - log_sum[:, rows]).exp()  # (N, R, S)
        dweights = (dy[:, rows] @ v[:, seen].mT).float()
        kept = _kept(weights, rows, q.size(1), dropout, seed) if dropout else 1.0
        dscores = (weights * (dweights * kept - mean[:, rows]) * q.size(-1) ** -0.5).to(q.dtype)
        dq.append(dscores @ k[:, seen])
        dk[:, seen] += dscores.mT @ q[:, rows]
        dv[:, seen] += (weights * kept).to(v.dtype).mT @ dy[:, rows]
    return torch.cat(dq, 1), dk.to(k.dtype), dv.to(v.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _operator(name: str, function: Callable[..., Any]) -> torch.library.CustomOpDef:
    """Return an operator of torch that runs the function, compiled."""

    def run(*inputs: Any) -> Any:
        return _compiled(function)(*inputs)

    schema = torch.library.infer_schema(function, mutates_args=())
    return torch.library.custom_op(f"kindling::{name}", run, mutates_args=(), schema=schema)


_attend = _operator("blockwise_attention", _forward)
_attend_backward = _operator("blockwise_attention_backward", _backward)


@_attend.register_fake
def _(q, k, v, mask, dropout, seed):
    return torch.empty_like(q), q.new_empty(*q.shape[:2], 1, dtype=torch.float32)


@_attend_backward.register_fake
def _(dy, q, k, v, mask, dropout, seed, y, log_sum):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, mask, seed, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy: Tensor, _):
    q, k, v, mask, seed, y, log_sum = ctx.saved_tensors
    return *_attend_backward(dy.contiguous(), q, k, v, mask, ctx.dropout, seed, y, log_sum), None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Return causal attention (B, H, T, D) of q, k and v, all (B, H, T, D) and of one type.

    mask (B, 1, T, T) bool says what each query may see: itself, and nothing after it. None: itself and all before it. `dropout`
    is the share of weights that are left out; torch's global random generator chooses them.
    """
    device, (B, H) = q.device, q.shape[:2]
    q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))  # (B * H, T, D)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    seed = torch.randint(2**31 - 1, (), **int32) if dropout else torch.zeros((), **int32)
    return _attend(q, k, v, mask, dropout, seed)[0].unflatten(0, (B, H))
