"""The processes that train one model together, called ranks, and how they agree.

    torchrun --nproc-per-node 2 main.py --preset code-50m

torchrun tells each process its rank by environment variables; without them there is one rank, and nothing here costs anything.
Three groups connect the ranks: NCCL or gloo for gradients, gloo for what the hosts agree on at each step, and gloo for what
they wait for, such as the data being built. A rank that is lost ends the others; torchrun can start all of them again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kindling.errors import KindlingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
# a rank that died is noticed at once, by its closed connection; a machine that is gone only by this
STEP_LIMIT, PATIENCE = timedelta(minutes=30), timedelta(days=7)


class WorldError(KindlingError):
    """Ranks that cannot work together, or no longer do."""


class MainFailed(SystemExit):
    """Ends a rank quietly, as the main one says what went wrong."""

    def __init__(self) -> None:
        super().__init__(1)

    def __str__(self) -> str:
        return "the main rank says what went wrong"


@dataclass(frozen=True)
class World:
    """The ranks of this run, and which of them this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of its own machine."""
    hosts: Any = None
    """The group in which the hosts agree on each step; None where there is one rank."""
    patient: Any = None
    """The group in which they wait for what takes long, such as the data being built."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs and saves."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' values, in float64."""
        return self._reduced(values, "SUM")

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the greatest of the ranks' values, in float64."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: Sequence[float], how: str, patient: bool = False) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=self.patient if patient else self.hosts)
        return tensor.tolist()

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by the sum of the ranks', without waiting for a GPU."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Return the ranks' values, in their order, on each of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Return what `work` gives on the main rank, on each; if it raises there, the others raise MainFailed."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [False, None]
        try:
            if self.main:
                box = [True, work()]
        finally:
            dist.broadcast_object_list(box, src=0, group=self.patient)
        if not box[0]:  # only the others come here, as the main rank raised
            raise MainFailed
        return box[1]

    def main_first(self, work: Callable[[], T]) -> T:
        """Do the same work on each rank: first on the main one, then on one of each other machine, then on the rest.

        So what it leaves on a disk, shared or each machine's own, is made once and found by the others.
        """
        if self.size == 1:
            return work()
        result: Any = None
        turn = 0 if self.main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            failed: BaseException | None = None
            if now == turn:
                try:
                    result = work()
                except BaseException as e:  # raised below, once the others know
                    failed = e
            if self._reduced([float(failed is not None)], "MAX", patient=True)[0]:
                raise MainFailed if failed is None else failed
        return result


ALONE = World()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the ranks that torchrun started, if it did, and leave them at the end; only the main rank's output is shown.

    `device` as in `train.device`: unless it is the CPU, each rank takes a GPU of its machine, where there are any.

    Raises WorldError if another rank is lost meanwhile.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    local_rank, cuda = int(os.environ["LOCAL_RANK"]), device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise WorldError(
                f"each rank must have a GPU of its own, but this machine has {torch.cuda.device_count()} and rank "
                f"{local_rank} on it wants another; lower --nproc-per-node, or set the device to cpu"
            )
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps its store when it starts the ranks again, with the addresses of those that are gone
        attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
        hosts, patient = (dist.new_group(backend="gloo", timeout=limit) for limit in (STEP_LIMIT, PATIENCE))
    except (RuntimeError, ValueError) as e:
        raise WorldError(
            f"the ranks must reach each other, but did not ({_first_line(e)}); see docs/scale.md"
        ) from None
    world = World(rank, size, local_rank, hosts, patient)
    with contextlib.ExitStack() as stack:
        if not world.main:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield world
        except RuntimeError as e:  # what gloo and NCCL raise when a connection is closed has no class of its own
            if not _is_lost(e):
                raise
            raise WorldError(
                f"rank {world.rank} must reach the others, but one of them is lost ({_first_line(e)}); torchrun starts all "
                f"again where --max-restarts allows it, and the same command goes on from the newest checkpoint"
            ) from None
    dist.destroy_process_group()


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with its gradients averaged over the ranks in each backward pass, by torch's DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _is_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in said
        for words in ("connection closed by peer", "connection reset", "gloo", "broken pipe", "timed out waiting")
    )


def require_one(what: str) -> None:
    """Raise WorldError if torchrun started several processes of something that is for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WorldError(f"{what} must be run as one process, but torchrun started several; leave torchrun out")
