"""The optimisers: Muon for the matrices inside the blocks, AdamW for everything else.

    for optimizer in make_optimizers(model, cfg.train, torch.float32): optimizer.step()

Both read `found_inf`, a tensor on the device, as `torch.amp.GradScaler` sets it. If it is not 0, a step changes nothing. So a bad
step is skipped without waiting for the device. Both accept parameters that are sharded over processes (runs/fsdp.py), and then
update the part of this process.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from config import TrainConfig
from model import LanguageModel

# (a, b, c) of X <- aX + b(XX')X + c(XX')^2 X (Jordan et al. 2024). The slope at zero is as steep as possible: five iterations
# bring all singular values between 0.01 and 1 close to 1, though they do not converge to 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrices x (N, rows, columns) with all their singular values brought close to 1, computed in `dtype`.

    This approximates the polar factor by a Newton-Schulz iteration (Jordan et al. 2024). Singular values below a hundredth of
    the norm stay smaller.
    """
    tall = x.size(-2) > x.size(-1)
    y = (x.mT if tall else x).to(dtype)  # (N, short, long)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.mT  # (N, short, short)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)  # (N, short, long)
    return (y.mT if tall else y).to(x.dtype)


def orthogonalize_rows(x: Tensor, n_rows: int, group: ProcessGroup, dtype: torch.dtype) -> Tensor:
    """Orthogonalise, as `orthogonalize` does, matrices whose `n_rows` rows are divided over the processes of `group`.

    x is (N, own rows, columns), divided as by `torch.chunk`. Each process receives N / size whole matrices, orthogonalises
    them, and sends the rows back. So no product is computed twice.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    N, _, C = x.shape
    most = -(-n_rows // size)
    rows = [max(0, min(most, n_rows - r * most)) for r in range(size)]  # of each process
    share = [N * (r + 1) // size - N * r // size for r in range(size)]  # whole matrices that each process receives
    out = [n * rows[rank] * C for n in share]
    back = [share[rank] * n * C for n in rows]
    own, whole = x.to(dtype).flatten(), x.new_empty(sum(back), dtype=dtype)
    dist.all_to_all_single(whole, own, back, out, group)
    parts = [part.view(share[rank], n, C) for part, n in zip(whole.split(back), rows, strict=True)]
    y = orthogonalize(torch.cat(parts, dim=1), dtype)  # (N / size, n_rows, C)
    dist.all_to_all_single(own, torch.cat([part.flatten() for part in y.split(rows, dim=1)]), out, back, group)
    return own.view_as(x).to(x.dtype)  # (N, own rows, C)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is orthogonalised (Jordan et al. 2024), with decoupled weight decay.

    An update has spectral norm `lr` * sqrt(max(1, rows / columns)). Matrices of one shape are orthogonalised together, so a
    step is a few large products instead of many small ones. torch.optim.Muon computes them one by one, and always in
    bfloat16, even where the hardware must emulate it.
    """

    _step_supports_amp_scaling = True  # then GradScaler does not wait for `found_inf`, but leaves it to `step`
    found_inf: Tensor | None = None

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95
    ):
        """`params` are matrices. They are orthogonalised in `dtype`."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix. If `found_inf` is not 0, change nothing."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_shape(group, shape, params)

    def _step_shape(self, group: dict, shape: torch.Size, params: list[Tensor]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]  # `step` has left out the others
        mesh = getattr(params[0], "device_mesh", None)
        if mesh is not None:  # DTensors: this process has some rows of each matrix
            params, buffers, grads = ([_local(t) for t in tensors] for tensors in (params, buffers, grads))
        good = None if self.found_inf is None else self.found_inf == 0
        if good is not None:  # not a product: NaN * 0 is NaN
            grads = [torch.where(good, g, b) for g, b in zip(grads, buffers, strict=True)]  # the buffer stays as it is
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # (N, rows, columns)
        if mesh is None:
            update = orthogonalize(nesterov, self.dtype)  # (N, rows, columns)
        else:
            update = orthogonalize_rows(nesterov, shape[0], mesh.get_group(), self.dtype)  # (N, own rows, columns)
        update *= -group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        decay = 1 - group["lr"] * group["weight_decay"]
        if good is None:
            torch._foreach_mul_(params, decay)
        else:
            update = torch.where(good, update, 0.0)
            torch._foreach_mul_(params, torch.where(good, decay, 1.0))
        torch._foreach_add_(params, list(update.unbind()))


def make_optimizers(model: LanguageModel, cfg: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return [AdamW] for all parameters, or [AdamW, Muon] with Muon for the matrices of the blocks.

    Embeddings and head may have learning rates of their own. A tied head counts as an embedding. Only matrices have weight
    decay. Each group keeps its peak rate as `peak_lr`. Muon computes its products in `dtype`.
    """
    inside = {id(p) for part in model.modules_to_compile() for p in part.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, bool], list[Tensor]] = defaultdict(list)  # by rate, and whether it is a matrix
    hidden: list[Tensor] = []
    for p in model.parameters():
        rate = cfg.lr
        if cfg.optimizer == "muon" and id(p) in inside and p.ndim == 2:
            hidden.append(p)
            continue
        if id(p) in tables:
            rate = cfg.lr if cfg.embd_lr is None else cfg.embd_lr
        elif p is model.head.weight:
            rate = cfg.lr if cfg.head_lr is None else cfg.head_lr
        groups[rate, p.ndim >= 2].append(p)
    adamw = torch.optim.AdamW(
        [
            {"params": params, "lr": rate, "weight_decay": cfg.weight_decay if matrix else 0.0}
            for (rate, matrix), params in groups.items()
        ],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        optimizers.append(Muon(hidden, cfg.muon_lr, cfg.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
