"""Many tokens through an int8 model in C, compiled for this machine at the first use.

    forward = build(model)          # a kindling.int8.model.Model
    forward(cache, tokens)          # logits (N, V) after the tokens that want them; adds keys and values to the cache

    python autocomplete.py runs/demo --prompt "def " --kernel c

`kernel.c` is the source. The compiler is `CC`, or the first of cc, gcc and clang. Threads are OpenMP's, if the compiler has
it, and `OMP_NUM_THREADS` sets their number. The library is kept in the user's cache folder; its name holds a hash of the
source, the flags and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kindling.int8.cache import Cache
from kindling.openmp import limit_spinning

SOURCE = Path(__file__).with_name("kernel.c")
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
# Nothing that changes a result: a text must have the same logits in any company. Not -ffast-math, which would also change how
# the whole process treats denormal numbers. Some compilers (Apple's) have no OpenMP, so there are flags without it.
COMMON = ["-O3", NATIVE, "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC"]
FLAGS = [[*COMMON, *threads] for threads in (["-fopenmp"], [])]
ACTIVATIONS = ("gelu", "gelu_new", "relu", "relu2", "swiglu")  # the order of the enum in C
ROOM = 64  # tokens worked on at once: their vectors fit a core's cache, and weights are read once for all of them

Forward = Callable[[Cache, np.ndarray], np.ndarray]
_pointer, _integer = ctypes.c_void_p, ctypes.c_int64


class KernelError(Exception):
    """A kernel that cannot be compiled or loaded; the text is one line."""


class Matrix(Protocol):
    """A matrix as the kernel needs it: int8 (N, K), a float32 scale (N,), and a bias (N,) or None."""

    q: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None


class _Matrix(ctypes.Structure):
    _fields_ = [("q", _pointer), ("scale", _pointer), ("bias", _pointer), ("n", _integer), ("k", _integer)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer)]


class _Block(ctypes.Structure):
    _fields_ = [(name, _Norm) for name in ("norm_1", "norm_2", "q_norm", "k_norm")] + [
        (name, _Matrix) for name in ("qkv", "proj", "up", "gate", "down")
    ]


_SIZES = ("n_layer", "n_head", "n_kv", "head_dim", "n_embd", "d_ff", "block_size", "activation", "rms", "qk_norm",
          "room")  # fmt: skip
_TABLES = ("wpe", "cos", "sin")
_ROOMS = ("x", "y", "qkv", "h", "g", "back", "rounded")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _integer) for name in _SIZES),
        ("eps", ctypes.c_double),
        ("blocks", ctypes.POINTER(_Block)),
        ("wte", _Matrix),
        ("wtp", _Matrix),
        ("head", _Matrix),
        ("norm_f", _Norm),
        *((name, _pointer) for name in (*_TABLES, *_ROOMS)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("keys", "values", "key_scale", "value_scale")]


def _address(array: np.ndarray | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous and array.dtype in (np.int8, np.float32, np.int16)
    return array.ctypes.data


def _matrix(matrix: Matrix | None) -> _Matrix:
    if matrix is None:
        return _Matrix()
    return _Matrix(_address(matrix.q), _address(matrix.scale), _address(matrix.bias), *matrix.q.shape)


def _norm(norm: Any) -> _Norm:
    return _Norm() if norm is None else _Norm(_address(norm.weight), _address(norm.bias))


def build(model: Any) -> Forward:
    """Return a function that extends a cache by the next tokens of its rows, and gives the logits of those that want them.

    It takes the cache and the tokens (T, 5) int64, each a `Token` of kernel.c, those of a row in their order; they are used up.
    `model` is a `kindling.int8.model.Model`. Raises KernelError if the kernel cannot be compiled.
    """
    function = _library().forward
    function.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Cache), _integer, _pointer, _pointer]
    function.restype = None
    m = model.m
    n_ff = model.blocks[0].up.q.shape[0]
    qkv = model.blocks[0].qkv.q.shape[0]
    sizes = (m["n_layer"], model.n_head, model.kv_heads, model.head_dim, m["n_embd"], n_ff, m["block_size"],
             ACTIVATIONS.index(m["activation"]), m["norm"] == "rmsnorm", bool(m["qk_norm"]), ROOM)  # fmt: skip
    blocks = (_Block * m["n_layer"])(
        *(
            _Block(
                *map(_norm, (block.norm_1, block.norm_2, block.q_norm, block.k_norm)),
                *map(_matrix, (block.qkv, block.proj, block.up, block.gate, block.down)),
            )
            for block in model.blocks
        )
    )
    heads = max(m["n_embd"], model.n_head * model.head_dim)
    widest = max(n_ff, heads)
    lengths = (m["n_embd"], heads, qkv, widest, widest, 1)
    rooms = [np.empty(ROOM * n, np.float32) for n in lengths] + [np.empty(ROOM * widest, np.int16)]
    struct = _Model(*sizes, m["norm_eps"], blocks, _matrix(model.wte), _matrix(model.wtp), _matrix(model.head),
                    _norm(model.norm_f), *map(_address, (model.wpe, model.cos, model.sin, *rooms)))  # fmt: skip
    n_pairs = 1 if model.wtp is None else len(model.wtp.q)
    each = (m["n_layer"], model.kv_heads, m["block_size"], model.head_dim)

    def forward(cache: Cache, tokens: np.ndarray) -> np.ndarray:
        # the struct holds addresses only; this function keeps the arrays alive
        assert len(rooms) == len(_ROOMS) and cache.keys.shape[1:] == each and cache.keys.dtype == np.int8
        limits = (len(model.wte.q), n_pairs, len(cache.keys), m["block_size"], 2)
        assert tokens.dtype == np.int64 and tokens.min() >= 0 and (tokens.max(0) < limits).all()
        logits = np.empty((int(tokens[:, -1].sum()), len(model.head.q)), np.float32)
        kept = _Cache(*map(_address, (cache.keys, cache.values, cache.key_scale, cache.value_scale)))
        function(struct, kept, len(tokens), tokens.ctypes.data, logits.ctypes.data)
        return logits

    return forward


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kindling"


def _processor() -> str:
    """Return a text that changes with what a compiler's `native` means, as far as it can be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def find_compiler() -> str | None:
    """Return the path of the C compiler, or None if there is none."""
    found = (shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name)
    return next((path for path in found if path), None)


def _library() -> ctypes.CDLL:
    """Load the compiled kernel; compile it first if needed."""
    limit_spinning()  # autocomplete.py has not done it
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(
            "--kernel c must find a C compiler, but there is no cc, gcc or clang; install one, or use numpy"
        )
    source = SOURCE.read_bytes()
    key = hashlib.sha256(
        source + "\n".join((str(FLAGS), compiler, platform.machine(), _processor())).encode()
    ).hexdigest()
    path = cache_folder() / f"int8-{key[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise KernelError(
            f"--kernel c must be able to write and load {path}, but {e}; set XDG_CACHE_HOME, or use numpy"
        ) from None


def _compile(compiler: str, path: Path) -> None:
    """Compile to `path`; raises KernelError, with nothing written there, if the compiler fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        library = Path(folder) / "int8.so"
        for flags in FLAGS:
            command = [compiler, *flags, str(SOURCE), "-o", str(library), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                library.replace(path)
                return
    raise KernelError(
        f"--kernel c must be able to compile, but {compiler} says: {' '.join(done.stderr.split())[:200] or 'nothing'}; use numpy"
    )
