"""Models too large for one process: weights, gradients and optimiser state sharded over processes, and their checkpoints.

    shard(model, mesh_size, torch.bfloat16)             # in every process; then make_optimizers(model, ...)
    begin_sharded(folder, model, optimizers)            # in one process
    save_sharded(folder, model, optimizers)             # then in every process; each writes its part
    load_sharded(folder, model, optimizers)             # with any number of processes, also into a whole model in one
    save_file(full_weights(folder), "model.safetensors")

FSDP2 (`fully_shard`; Zhao et al. 2023) divides the rows of every parameter over the processes, and gathers the parameters of one
block at a time. Losses are sums divided by the supervised tokens of all processes, so gradients are summed, not averaged.

A checkpoint is a folder with `optimizers.json` and safetensors parts, written and read by `torch.distributed.checkpoint`. The
header of a part says where its tensors lie in the whole ones. Nothing in it is a pickle, so reading it executes no code.

Limits: only `model(...)` gathers parameters. Methods such as `hidden`, and generation, need a whole model, loaded from the
checkpoint. Each process builds the whole model, with equal weights, before it is sharded. Several machines need a shared folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from kindling.errors import CheckpointError, one_line
from kindling.files import write_json
from model import LanguageModel

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.fsdp import FSDPModule

Optimizers = Iterable[torch.optim.Optimizer]

OPTIMIZERS = "optimizers.json"
STATE = (
    "optimizer"  # the first word of a tensor's name that is not a weight: optimizer.0.exp_avg.blocks.0.attn.qkv.weight
)
WEIGHTS_FILE, STATE_FILE = 1, 2  # numbers in the names of parts: weights can be read without optimiser state


# -- the model --------------------------------------------------------------------------------------------------------


def shard(model: LanguageModel, mesh_size: int, param_dtype: torch.dtype | None) -> None:
    """Shard the parameters of `model` in place over `mesh_size` processes. All of them must call it, with equal weights.

    Parameters become DTensors with their old names, in float32 as before. When the parameters of a block are gathered for a
    pass, they are rounded to `param_dtype`; their gradients are summed in float32. Embeddings, last norm and head stay
    float32. So the residual stream is the same as under autocast, and the many gradients that meet in one row of an embedding
    are summed accurately. The loss must be the summed loss of a process's rows, divided by the tokens of all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (mesh_size,))
    # inputs are not cast: they include RoPE's tables, and bfloat16 is too coarse for their angles
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.modules_to_compile():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # otherwise it uses a scaled sum, which only NCCL has


def is_sharded(model: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether `shard` has divided the model."""
    return hasattr(model, "set_requires_gradient_sync")


def synchronize_gradients(model: nn.Module, last: bool) -> None:
    """Set whether the next backward pass exchanges gradients. Only the last micro-batch of a step needs to.

    Until then every process holds the gradients of the whole model in float32. This costs 4 bytes a parameter and saves
    communication. No effect on a model that is not sharded.
    """
    if is_sharded(model):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters. A forward pass without a backward pass, as in validation, leaves them gathered."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, which must all call this; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_digest(model: nn.Module, optimizers: Optimizers) -> str:
    """Return the sha256 of all bits of weights and optimiser state. It does not depend on how they are sharded.

    Every process must call it. Tensors are gathered one at a time.
    """
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            tensor = full_tensor(value.detach()).cpu().contiguous()
            result.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            result.update(tensor.view(-1).view(torch.uint8).numpy().data)
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


def begin_sharded(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Create the folder of a checkpoint, with all values but tensors. One process calls it before `save_sharded`.

    It is separate from `save_sharded`, where a process that fails would leave the others waiting. Raises CheckpointError.
    """
    reshard(model)
    descriptions = [_describe(number, model, optimizer)[1] for number, optimizer in enumerate(optimizers)]
    with _refusing(f"{folder} must be writable", "free some space, or choose another disk"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / OPTIMIZERS, descriptions)


def save_sharded(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Write weights and optimiser state into a folder from `begin_sharded`. Every process must call it, and writes its part.

    It syncs the files to disk, but not the folder. Raises CheckpointError in every process if one of them cannot write its part.
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


def load_sharded(folder: Path, model: nn.Module, optimizers: Optimizers = ()) -> None:
    """Load a checkpoint, from any number of processes, into a model: whole, or sharded over any number of processes.

    Every process of a sharded model must call it. A whole model needs no process group. Without optimisers only weights are
    read. Raises CheckpointError unless the parts are complete and match the model's names and shapes. Model and optimisers may
    then be partly loaded.
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
            optimizer.state.clear()  # before memory for the new state is allocated
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
    """Return the whole weights of a checkpoint, by name, on the CPU. Needs no process group.

    Raises CheckpointError unless the parts are complete.
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
    """Return an optimiser's state tensors by name, and the rest of its state as values for JSON.

    Scalars get the shape (1,), since safetensors cannot slice a scalar.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for p, state in optimizer.state.items():
        name = names[id(p)]
        shapes[name] = {key: list(t.shape) for key, t in state.items()}
        tensors |= {_state_name(number, key, name): t.view(1) if t.ndim == 0 else t for key, t in state.items()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "state": shapes}


def _room(
    number: int, parameters: dict[str, nn.Parameter], shapes: dict[str, Any], saved: dict[str, TensorStorageMetadata]
) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Tensor]]]:
    """Return empty tensors for an optimiser's state: by name, and the same tensors by parameter, in the saved order.

    A tensor with the shape of its parameter is sharded like the parameter.
    """
    tensors: dict[str, Tensor] = {}
    state: dict[Tensor, dict[str, Tensor]] = {}
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
    """Return a saved setting with its type of before. JSON has no tuples."""
    return tuple(saved) if isinstance(value, tuple) else saved


def _saved(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of each tensor, from the headers of all parts. Raises ValueError if a tensor lacks a part.

    The reader does not notice a missing part, and would leave its values uninitialised.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    saved = {name: tensor for name, tensor in metadata.items() if isinstance(tensor, TensorStorageMetadata)}
    for name, tensor in saved.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"the parts of {name} are not complete: one is missing, or another checkpoint's")
    return saved


@torch.no_grad()
def _read(folder: Path, tensors: dict[str, Tensor], distributed: bool) -> None:
    """Fill `tensors` from the parts. Unlike torch's default reader, this one reads only safetensors and JSON."""
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not distributed)


@contextlib.contextmanager
def _refusing(must: str, mend: str) -> Iterator[None]:
    """Turn any failure, in any process, into a CheckpointError of one line."""
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended in one process
            yield
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise CheckpointError(f"{must}, but is not ({one_line(error)}); {mend}") from None
    except Exception as e:  # a full disk, a damaged header, another model: no common class
        raise CheckpointError(f"{must}, but is not ({one_line(e)}); {mend}") from None
