"""The processes that train one model together, called ranks, and their communication.

    torchrun --nproc-per-node 2 main.py --preset code-50m

torchrun gives each process its rank in environment variables. Without them there is one rank, and this file costs nothing.
Three process groups connect the ranks: NCCL or gloo for gradients, gloo for the values exchanged at each step, and gloo with
a long timeout for slow work, such as building data. If a rank is lost, the others end; torchrun can start all of them again.
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
# timeouts: a rank that died is noticed at once, since its connection closes, but a lost machine only after these
STEP_LIMIT, PATIENCE = timedelta(minutes=30), timedelta(days=7)


class WorldError(KindlingError):
    """The ranks cannot work together, or no longer do."""


class MainRankFailed(SystemExit):
    """Ends a rank without a message, because the main rank prints the error."""

    def __init__(self) -> None:
        super().__init__(1)

    def __str__(self) -> str:
        return "the main rank failed, and prints the error"


@dataclass(frozen=True)
class World:
    """The ranks of a run, and the rank of this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among those of the same machine."""
    cpu_group: Any = None
    """The process group for values on the CPU at each step; None if there is one rank."""
    slow_group: Any = None
    """The process group with a long timeout, for slow work such as building data."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs and saves."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' values, in float64."""
        return self._reduced(values, "SUM")

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the largest of the ranks' values, in float64."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: Sequence[float], how: str, slow_group: bool = False) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=self.slow_group if slow_group else self.cpu_group)
        return tensor.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by its sum over the ranks, without waiting for a GPU."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main rank only, and return its result on every rank. If it raises, the others raise MainRankFailed."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [False, None]
        try:
            if self.main:
                box = [True, work()]
        finally:
            dist.broadcast_object_list(box, src=0, group=self.slow_group)
        if not box[0]:  # only other ranks come here: the main one has raised its error
            raise MainRankFailed
        return box[1]

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank: first on the main one, then on one rank of each other machine, then on the rest.

        So files that it writes, to a shared disk or to the disk of each machine, are made once, and the other ranks find them.
        If it raises on one rank, the others raise MainRankFailed.
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
                except BaseException as e:  # raised below, after the other ranks know
                    failed = e
            if self._reduced([float(failed is not None)], "MAX", slow_group=True)[0]:
                raise MainRankFailed if failed is None else failed
        return result


SINGLE_PROCESS = World()


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Connect the ranks, if torchrun started any, and disconnect them at the end. Only the main rank prints to stdout.

    `device` as in `train.device`: unless it is the CPU, each rank takes a GPU of its machine, if there are any. Raises
    WorldError if the ranks cannot connect, or if one is lost later.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    local_rank, cuda = int(os.environ["LOCAL_RANK"]), device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise WorldError(
                f"each rank must have a GPU of its own, but this machine has {torch.cuda.device_count()} and needs "
                f"another for its rank {local_rank}; lower --nproc-per-node, or set the device to cpu"
            )
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps the store when it restarts the ranks, with addresses of ranks that no longer exist
        attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
        cpu_group, slow_group = (dist.new_group(backend="gloo", timeout=limit) for limit in (STEP_LIMIT, PATIENCE))
    except (RuntimeError, ValueError) as e:
        raise WorldError(
            f"the ranks must reach each other, but did not ({_first_line(e)}); see docs/scale.md"
        ) from None
    world = World(rank, size, local_rank, cpu_group, slow_group)
    with contextlib.ExitStack() as stack:
        if not world.main:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield world
        except RuntimeError as e:  # gloo and NCCL raise no class of their own when a connection is closed
            if not _is_lost(e):
                raise
            raise WorldError(
                f"rank {world.rank} must reach the others, but one of them is lost ({_first_line(e)}); torchrun starts all "
                f"again if --max-restarts allows it, and the same command resumes from the newest checkpoint"
            ) from None
    dist.destroy_process_group()


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model in torch's DistributedDataParallel, which averages gradients over the ranks in a backward pass."""
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    devices = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.12
    off: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **off)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _is_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in said
        for words in ("connection closed by peer", "connection reset", "gloo", "broken pipe", "timed out waiting")
    )


def require_single_process(what: str) -> None:
    """Raise WorldError if torchrun started several processes; `what` names the option that needs a single one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WorldError(f"{what} must be run as one process, but torchrun started several; leave torchrun out")
