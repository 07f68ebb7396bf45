"""Models too large for one process: weights, gradients and optimiser state divided over processes, and their checkpoints.

    shard(model, mesh_size, torch.bfloat16)             # in every process; then make_optimizers(model, ...)
    begin(folder, model, optimizers)                    # in one process
    save(folder, model, optimizers)                     # then in every process; each writes its own part
    load(folder, model, optimizers)                     # at any number of processes, or with a whole model in one
    save_file(full_weights(folder), "model.safetensors")

FSDP2 (`fully_shard`; Zhao et al. 2023) divides every parameter by its rows and gathers those of one block at a time. Losses
are sums that are divided by the supervised tokens of all processes, so gradients are summed over processes, not averaged.

A checkpoint is a folder of its own with safetensors parts, each with its place in the whole in its header, written and read by
`torch.distributed.checkpoint`, and `optimizers.json`. No part of it is a pickle, so reading one executes nothing.

Limits: gathers and hooks belong to `model(...)`, so what goes around it (`hidden`, generation) needs a whole model, loaded from
the checkpoint. Each process builds the whole model, with equal weights, before it is divided. Several machines need a folder
that all of them see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kindling.errors import KindlingError, one_line
from kindling.files import sync, write_json
from model import LanguageModel

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Optimizers = Iterable[torch.optim.Optimizer]

OPTIMIZERS = "optimizers.json"
STATE = (
    "optimizer"  # begins the name of a tensor that is none of the weights: optimizer.0.exp_avg.blocks.0.attn.qkv.weight
)
WEIGHTS_FILE, STATE_FILE = 1, 2  # numbers in the parts' names, so that who wants the weights reads no state


class ShardedError(KindlingError):
    """A sharded checkpoint that cannot be trusted, written, or loaded into this model."""


# -- the model --------------------------------------------------------------------------------------------------------


def shard(model: LanguageModel, mesh_size: int, param_dtype: torch.dtype | None) -> None:
    """Divide the parameters of `model` in place over `mesh_size` processes; all of them call it, with equal weights.

    Parameters become DTensors under their old names, in float32 as before. `param_dtype` is what those of the blocks are
    rounded to when they are gathered for a forward and backward pass; their gradients are summed in float32. Embeddings,
    last norm and head stay float32: the residual stream then is what it is under autocast, and a token's gradients, many of
    which meet in one row, add up exactly enough. The loss must be the sum of a process's rows over the tokens of all.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (mesh_size,))
    # the inputs are not cast: among them are the tables of RoPE, whose angles bfloat16 would blur
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.compilable():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # or it asks for a scaled sum, which only NCCL has


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has divided the model."""
    return hasattr(model, "set_requires_gradient_sync")


def synchronize_gradients(model: nn.Module, last: bool) -> None:
    """Say before a backward pass whether gradients are exchanged in it, which only the step's last micro-batch needs.

    Until then every process holds the gradients of the whole model in float32: 4 bytes a parameter buy the communication.
    Without effect on a model that is not sharded.
    """
    if is_sharded(model):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Put back the sharded parameters where a forward pass without a backward left gathered ones (validation does)."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which must all ask for it, if it is divided over them; else itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digest(model: nn.Module, optimizers: Optimizers) -> str:
    """Return the sha256 over every bit of weights and optimiser state: equal runs have equal digests, however sharded.

    Every process calls it, and gathers one tensor at a time.
    """
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            tensor = whole(value.detach()).cpu().contiguous()
            result.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            result.update(tensor.view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in value:
                result.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            result.update(repr(value).encode())

    reshard(model)
    add(dict(model.named_parameters()))
    for optimizer in optimizers:
        add(optimizer.state_dict())
    return result.hexdigest()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def begin(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Make the folder of a checkpoint, with what is no tensor; one process calls it, before all of them call `save`.

    On its own, because a process that fails in here would leave the others waiting in there. Raises ShardedError.
    """
    reshard(model)
    descriptions = [_describe(number, model, optimizer)[1] for number, optimizer in enumerate(optimizers)]
    with _refusing(f"{folder} must be writable", "free some space, or choose another disk"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / OPTIMIZERS, descriptions)
        sync(folder / OPTIMIZERS)


def save(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Write weights and optimiser state into a folder that `begin` made; every process calls it and writes its own part.

    The files are synced to disk when it returns, the folder is not. Raises ShardedError, in every process, if one of them
    cannot write its part.
    """
    import torch.distributed.checkpoint as dcp

    reshard(model)
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    files = dict.fromkeys(tensors, WEIGHTS_FILE)
    for number, optimizer in enumerate(optimizers):
        state, _ = _describe(number, model, optimizer)
        tensors |= state
        files |= dict.fromkeys(state, STATE_FILE)
    distributed = is_sharded(model)
    with _refusing(f"{folder} must be writable", "free some space, or choose another disk"):
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not distributed)


def load(folder: Path, model: nn.Module, optimizers: Optimizers = ()) -> None:
    """Load a checkpoint in place: of any number of processes, into a model that is sharded over any number, or whole.

    Every process of a sharded model calls it; a whole one needs no process group. Without optimisers only weights are read.
    Raises ShardedError unless the parts are complete and of the model's names and shapes; model and optimisers are
    then half loaded.
    """
    reshard(model)
    with _refusing(
        f"{folder} must be a whole checkpoint of this model", "use the run's own config.yaml, or an older one"
    ):
        saved = _saved(folder)
        parameters = dict(model.named_parameters())
        wanted = {name: p.detach() for name, p in parameters.items()}
        if differing := sorted(wanted.keys() ^ {name for name in saved if not _is_state(name)}):
            raise ValueError(f"{differing[0]} is in only one of them")
        states = []
        optimizers = list(optimizers)
        descriptions = json.loads((folder / OPTIMIZERS).read_text(encoding="utf-8")) if optimizers else []
        if len(descriptions) != len(optimizers):
            raise ValueError(f"it has {len(descriptions)} optimisers and not {len(optimizers)}")
        for number, (optimizer, description) in enumerate(zip(optimizers, descriptions, strict=True)):
            _check_groups(model, optimizer, description["groups"])
            optimizer.state.clear()  # before the new one takes as much memory again
            tensors, state = _room(number, parameters, description["state"], saved)
            wanted |= tensors
            states.append(state)
        for name, tensor in wanted.items():
            if tensor.shape != saved[name].size:
                raise ValueError(f"{name} is {tuple(saved[name].size)} and not {tuple(tensor.shape)}")
        _read(folder, wanted, distributed=is_sharded(model))
        for optimizer, description, state in zip(optimizers, descriptions, states, strict=True):
            optimizer.state.update(state)
            for group, values in zip(optimizer.param_groups, description["groups"], strict=True):
                group.update({key: _like(group[key], value) for key, value in values.items() if key != "params"})


def full_weights(folder: Path) -> dict[str, Tensor]:
    """Return the whole weights of a checkpoint of any number of processes, by name, on the CPU; needs no process group.

    Raises ShardedError unless the parts are complete.
    """
    with _refusing(f"{folder} must be a whole checkpoint", "use an older one"):
        saved = {name: t for name, t in _saved(folder).items() if not _is_state(name)}
        weights = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in saved.items()}
        _read(folder, weights, distributed=False)
    return weights


def _is_state(name: str) -> bool:
    return name.startswith(f"{STATE}.")


def _state_name(number: int, key: str, name: str) -> str:
    return f"{STATE}.{number}.{key}.{name}"


def _describe(
    number: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state tensors by name, and the rest of it as JSON holds it.

    Scalars become (1,), since safetensors gives no slice of a scalar.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors, shapes = {}, {}
    for p, state in optimizer.state.items():
        name = names[id(p)]
        shapes[name] = {key: list(t.shape) for key, t in state.items()}
        tensors |= {_state_name(number, key, name): t.view(1) if t.ndim == 0 else t for key, t in state.items()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "state": shapes}


def _room(
    number: int, parameters: dict[str, nn.Parameter], shapes: dict[str, Any], saved: dict[str, TensorStorageMetadata]
) -> tuple[dict[str, Tensor], dict[nn.Parameter, dict[str, Tensor]]]:
    """Return empty tensors by name for an optimiser's state, and the same as the optimiser wants it, in the order saved.

    What has the shape of its parameter is sharded as that is.
    """
    tensors: dict[str, Tensor] = {}
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, keys in shapes.items():
        p = parameters[name]
        state[p] = {}
        for key, shape in keys.items():
            full = _state_name(number, key, name)
            dtype = saved[full].properties.dtype
            if shape == list(p.shape):
                tensors[full] = state[p][key] = torch.empty_like(p.detach(), dtype=dtype)
            elif shape == []:
                tensors[full] = torch.empty(1, dtype=dtype, device=p.device)
                state[p][key] = tensors[full].view(())
            else:
                raise ValueError(f"{full} is neither a scalar nor of its parameter's shape")
    return tensors, state


def _check_groups(model: nn.Module, optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        if values["params"] != [names[id(p)] for p in group["params"]] or values.keys() != group.keys():
            raise ValueError("its optimisers have other parameters or settings")


def _like(value: Any, saved: Any) -> Any:
    """Return a saved setting as what it was before JSON, which knows no tuples."""
    return tuple(saved) if isinstance(value, tuple) else saved


def _saved(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return what the headers of all parts say of each tensor; raises ValueError if a tensor has not all of its parts.

    The reader would leave unread, and so uninitialised, whatever is in no part.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in saved.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"the parts of {name} do not make it up: one is missing, or another checkpoint's")
    return saved


@torch.no_grad()
def _read(folder: Path, tensors: dict[str, Tensor], distributed: bool) -> None:
    """Fill `tensors` from the parts; this reader, unlike torch's default one, knows safetensors and JSON only."""
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not distributed)


@contextlib.contextmanager
def _refusing(must: str, mend: str) -> Iterator[None]:
    """Turn whatever goes wrong, in whichever process, into a ShardedError of one line."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception: it only is a BaseException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant, in one process
            yield
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise ShardedError(f"{must}, but is not ({one_line(error)}); {mend}") from None
    except Exception as e:  # a full disk, a damaged header, another model: each library has its own
        raise ShardedError(f"{must}, but is not ({one_line(e)}); {mend}") from None
