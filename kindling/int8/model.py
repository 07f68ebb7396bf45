"""A model with int8 weights in NumPy: every architecture of `config.ModelConfig`, with a key / value cache.

    model = Model(Path("runs/demo/export/int8"))
    cache = model.new_cache()
    logits = model.forward_cached(ids, cache)     # then one token at a time: model.forward_cached([token], cache)

    cache = model.new_cache(16)                   # many texts: the next tokens of some rows, however many of each
    logits = model.forward([(0, ids), (3, [token])], cache)

The weights stay int8 and memory-mapped; blocks of rows are converted to float32 when they are multiplied. After
`model.compile()`, a kernel in C does the work (`kernel.py`). Limit: a model runs one call at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kindling.errors import KindlingError
from kindling.int8.cache import Cache
from kindling.rope import frequencies

FORMAT = 1  # the version of config.json
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
BLOCK = 2**17  # weights that are float32 at the same time: half a MB, which fits a core's cache

Array = np.ndarray


class CompletionError(KindlingError):
    """An error that the user can fix; its text is one line."""


class Matrix:
    """An int8 matrix (N, K) with a scale for each row, and products with it.

    `block` is a buffer of at least K floats in which rows are converted to float32; all matrices of a model share it.
    """

    def __init__(self, q: Array, scale: Array, bias: Array | None, block: Array):
        self.q, self.scale, self.bias = q, scale, bias
        n, k = q.shape
        rows = min(n, len(block) // k)
        self.out = np.empty((1, n), np.float32)  # (1, N)
        # all views are made here, because a token needs hundreds of them
        self.parts = [
            (q[i : i + rows], block[: min(rows, n - i) * k].reshape(-1, k), slice(i, i + rows))
            for i in range(0, n, rows)
        ]
        self.outs = [self.out[0, rows] for *_, rows in self.parts]

    def __call__(self, x: Array) -> Array:
        """Return x (T, K) times the transposed matrix, plus the bias, (T, N). For T = 1 it is valid until the next call."""
        if len(x) == 1:
            y, vector = self.out, x[0]
            for (q, part, _), out in zip(self.parts, self.outs):
                np.copyto(part, q)
                np.dot(part, vector, out=out)
        else:
            y = np.empty((len(x), len(self.q)), np.float32)  # (T, N)
            for q, part, rows in self.parts:
                np.copyto(part, q)
                y[:, rows] = x @ part.T
        y *= self.scale
        if self.bias is not None:
            y += self.bias
        return y

    def rows(self, ids: list[int] | Array) -> Array:
        """Return the rows of these ids in float32, (T, K)."""
        return self.q[ids].astype(np.float32) * self.scale[ids, None]


class Norm:
    """LayerNorm, with or without bias, or RMSNorm, along the last axis."""

    def __init__(self, rms: bool, eps: float, weight: Array, bias: Array | None):
        self.rms, self.eps, self.weight, self.bias = rms, np.float32(eps), weight, bias
        self.mean = np.full(len(weight), 1 / len(weight), np.float32)  # a product with it is the mean

    def __call__(self, x: Array) -> Array:
        if not self.rms:
            x = x - (x @ self.mean)[:, None]
        y = x * (1 / np.sqrt(np.vecdot(x, x) * self.mean[0] + self.eps))[..., None]
        y *= self.weight
        if self.bias is not None:
            y += self.bias
        return y


def unit_rms(x: Array) -> Array:
    """Return x divided by its root mean square along the last axis, with torch's default epsilon."""
    return x / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + np.finfo(np.float32).eps)


def erf(x: Array) -> Array:
    """Return the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26); NumPy has none."""
    a = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * a)
    series = np.float32(1.061405429) * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(coefficient)
        series *= t
    np.square(a, out=a)
    series *= np.exp(np.negative(a, out=a), out=a)
    return np.copysign(1 - series, x)


def bigram_ids(idx: Array, previous: Array, n_rows: int) -> Array:
    """Return the bigram hash embedding's row of each token and the one before it (-1: none), as `positions.bigram_ids` does."""
    return (1 + (previous * 2_654_435_761 + idx * 2_246_822_519) % (n_rows - 1)) * (previous >= 0)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (x[i], x[i + D/2]) of x (H, T, D) by its position's angle; cos and sin (T, D)."""
    half = x.shape[-1] // 2
    turned = np.concatenate((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def softmax(x: Array) -> Array:
    """Replace x by its softmax over the last axis, and return it."""
    x -= x.max(-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(-1, keepdims=True)
    return x


def activate(kind: str, h: Array, gate: Array | None) -> Array:
    """Replace h (T, d_ff) by its activation, and return it; `gate` (T, d_ff) is SwiGLU's gate, else None."""
    if gate is not None:
        h *= gate / (1 + np.exp(-gate))
    elif kind == "gelu":
        h *= 0.5 * (1 + erf(h * np.float32(math.sqrt(0.5))))
    elif kind == "gelu_new":
        h *= 0.5 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (h + np.float32(0.044715) * h * h * h)))
    else:
        np.maximum(h, 0, out=h)
        if kind == "relu2":
            h *= h
    return h


class Block(NamedTuple):
    """The layers of one transformer block; `proj`, `gate` and the norms of queries and keys are None for shapes without them."""

    qkv: Matrix
    proj: Matrix | None
    up: Matrix
    gate: Matrix | None
    down: Matrix
    norm_1: Norm
    norm_2: Norm
    q_norm: Norm | None
    k_norm: Norm | None


class Model:
    """An exported model."""

    def __init__(self, folder: Path):
        """Open an export; its weights are memory-mapped.

        Raises CompletionError if it is incomplete or damaged.
        """
        self.meta = read_meta(folder)
        tensors = map_tensors(folder / WEIGHTS, self.meta["weights_sha256"])
        try:
            self._build(self.meta["model"], tensors)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise CompletionError(
                f"{folder} must be a whole export, but {CONFIG} and {WEIGHTS} do not belong together "
                f"({type(e).__name__}: {e}); export the run again"
            ) from None

    def _build(self, m: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.m = m
        self.n_head, self.kv_heads = m["n_head"], m["n_kv_head"] or m["n_head"]
        self.head_dim = m.get("d_head") or m["n_embd"] // m["n_head"]  # older exports do not have the key
        block = np.empty(max([BLOCK, *(t.shape[1] for t in tensors.values() if t.dtype == np.int8)]), np.float32)

        def matrix(name: str) -> Matrix:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            return Matrix(weight, tensors[f"{name}.weight.scale"], bias, block)

        def norm(name: str, qk: bool = False) -> Norm:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            return Norm(qk or m["norm"] == "rmsnorm", m["norm_eps"], weight, bias)

        learned = m["qk_norm"] == "learned"
        self.wte, self.wpe = matrix("wte"), tensors.get("wpe")
        self.wtp = matrix("wtp") if m.get("pair_rows") else None  # older exports do not have the key
        self.norm_f = norm("norm_f") if m["final_norm"] else None
        self.head = self.wte if m["tie_embeddings"] else matrix("head")
        self.blocks = [
            Block(
                qkv=matrix(f"blocks.{i}.attn.qkv"),
                up=matrix(f"blocks.{i}.mlp.up"),
                down=matrix(f"blocks.{i}.mlp.down"),
                proj=matrix(f"blocks.{i}.attn.proj") if m["attn_out_proj"] else None,
                gate=matrix(f"blocks.{i}.mlp.gate") if m["activation"] == "swiglu" else None,
                norm_1=norm(f"blocks.{i}.norm_1"),
                norm_2=norm(f"blocks.{i}.norm_2"),
                q_norm=norm(f"blocks.{i}.attn.q_norm", qk=True) if learned else None,
                k_norm=norm(f"blocks.{i}.attn.k_norm", qk=True) if learned else None,
            )
            for i in range(m["n_layer"])
        ]
        self.cos: Array | None = None  # (block_size, D), like sin, if positions are rotary
        self.sin: Array | None = None
        self.kernel: Callable[[Cache, Array], Array] | None = None  # in C
        if m["position"] == "rope":
            even, stretch = np.arange(0.0, self.head_dim, 2), tuple(m.get("rope_factors", ()))
            rate = frequencies(even, self.head_dim, m["rope_theta"], stretch)  # (D/2,)
            angle = np.outer(np.arange(m["block_size"]), np.tile(rate, 2))  # (T, D)
            self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def compile(self) -> None:
        """Use the kernel in C from now on. Raises CompletionError if it cannot be compiled."""
        try:
            from kindling.int8.kernel import KernelError, build
        except ImportError:
            raise CompletionError(
                "--kernel c must find kindling/int8/kernel.py and kernel.c, but one is missing; copy them"
            ) from None
        try:
            self.kernel = build(self)
        except KernelError as e:
            raise CompletionError(str(e)) from None

    @property
    def block_size(self) -> int:
        """Context length in tokens."""
        return self.m["block_size"]

    def new_cache(self, n_rows: int = 1) -> Cache:
        """Return an empty cache for this many texts, to be used with the present kernel."""
        shape = (n_rows, self.m["n_layer"], self.kv_heads, self.block_size, self.head_dim)
        return Cache(shape, rounded=self.kernel is not None)

    def forward_cached(self, ids: list[int], cache: Cache, row: int = 0) -> Array:
        """Run the next tokens of one row; return the logits (V,) after the last. They must fit in the context."""
        return self.forward([(row, ids)], cache)[0]

    def logits(self, ids: list[int]) -> Array:
        """Return the logits (T, V) after each token of a new text."""
        return self.forward([(0, ids)], self.new_cache(), [len(ids)])

    def forward(self, texts: list[tuple[int, list[int]]], cache: Cache, n_last: Sequence[int] = ()) -> Array:
        """Run the next tokens of some rows; return the logits (N, V) after the last of each, or after its `n_last` last ones.

        They must fit in the context. The kernel in C gives a text the same bits in any company, and in any pieces.
        """
        n_last = n_last or [1] * len(texts)
        assert len({row for row, _ in texts}) == len(texts), "one text in a row"
        for row, ids in texts:
            assert 0 < len(ids) <= self.block_size - len(cache.tokens[row]), "the caller crops"
        if self.kernel is None:
            hidden = [self._hidden(ids, cache, row)[-n:] for (row, ids), n in zip(texts, n_last)]
            return np.concatenate([self.head(x).copy() for x in hidden])  # of a single token it is a buffer
        steps: list[tuple[int, ...]] = []  # the fields of a Token in kernel.c
        for (row, ids), n in zip(texts, n_last):
            start = len(cache.tokens[row])
            pairs = [0] * len(ids) if self.wtp is None else self._pairs(ids, cache.tokens[row], self.wtp)
            wanted = [False] * (len(ids) - n) + [True] * n
            steps += zip(ids, pairs, [row] * len(ids), range(start, start + len(ids)), wanted)
        logits = self.kernel(cache, np.array(steps, np.int64))
        for row, ids in texts:
            cache.tokens[row] += ids
        return logits

    def _pairs(self, ids: list[int], before: list[int], table: Matrix) -> Array:
        """Return the rows (T,) of the bigram hash embedding for the tokens that follow `before`."""
        idx = np.array([*(before[-1:] or [-1]), *ids], np.int64)
        return bigram_ids(idx[1:], idx[:-1], len(table.q))

    def _hidden(self, ids: list[int], cache: Cache, row: int) -> Array:
        """Return the features (T, C) of a row's next tokens, and store their keys and values."""
        start = len(cache.tokens[row])
        stop = start + len(ids)
        x = self.wte.rows(ids)  # (T, C)
        if self.wtp is not None:
            x += self.wtp.rows(self._pairs(ids, cache.tokens[row], self.wtp))
        if self.wpe is not None:
            x += self.wpe[start:stop]
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(block.norm_1(x))  # (T, (n_head + 2 * n_kv) * D)
            y = self._attention(block, qkv, cache.keys[row, layer], cache.values[row, layer], start)
            x += y if block.proj is None else block.proj(y)
            y = block.norm_2(x)
            gate = None if block.gate is None else block.gate(y)
            x += block.down(activate(self.m["activation"], block.up(y), gate))
        cache.tokens[row] += ids
        return x if self.norm_f is None else self.norm_f(x)

    def _attention(self, block: Block, qkv: Array, keys: Array, values: Array, start: int) -> Array:
        """Return the attention output (T, C) of the tokens from `start`, from qkv (T, (n_head + 2 * n_kv) * D).

        keys and values (n_kv, block_size, D) are one row's of one layer, and are extended.
        """
        T, D, n_head, n_kv = len(qkv), self.head_dim, self.n_head, self.kv_heads
        stop = start + T
        q, keys[:, start:stop], values[:, start:stop] = self._heads(block, qkv, start)
        keys, values = keys[:, :stop], values[:, :stop]  # (n_kv, S, D)
        q = (q * np.float32(1 / math.sqrt(D))).reshape(n_kv, -1, D)  # (n_kv, G * T, D)
        scores = q @ keys.transpose(0, 2, 1)  # (n_kv, G * T, S)
        if T > 1:
            later = np.arange(stop) > np.arange(start, stop)[:, None]  # (T, S)
            scores.reshape(n_kv, -1, T, stop)[..., later] = -np.inf
        return (softmax(scores) @ values).reshape(n_head, T, D).transpose(1, 0, 2).reshape(T, -1)  # (T, C)

    def _heads(self, block: Block, qkv: Array, start: int) -> tuple[Array, Array, Array]:
        """Return queries (n_head, T, D), keys and values (n_kv, T, D) of the tokens from `start`."""
        n_head, n_kv = self.n_head, self.kv_heads
        qkv = qkv.reshape(len(qkv), n_head + 2 * n_kv, self.head_dim).transpose(1, 0, 2)  # (H, T, D)
        q, k = qkv[:n_head], qkv[n_head : n_head + n_kv]
        if block.q_norm is not None and block.k_norm is not None:
            q, k = block.q_norm(q), block.k_norm(k)
        elif self.m["qk_norm"]:
            q, k = unit_rms(q), unit_rms(k)
        if self.cos is not None and self.sin is not None:
            cos, sin = self.cos[start : start + len(q[0])], self.sin[start : start + len(q[0])]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, qkv[n_head + n_kv :]


def read_meta(folder: Path) -> dict[str, Any]:
    """Return an export's config.json; raises CompletionError if this file cannot read it."""
    path = folder / CONFIG
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and {"weights_sha256", "model", "eos_id", "bos_id"} <= meta.keys():
            return meta
        problem = f"it has format {meta['format']}, and this is for format {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as e:
        problem = f"{CONFIG} is missing" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}"
    raise CompletionError(
        f"{folder} must be a run's export to int8, but is not ({problem}); make one with `python export.py RUN --to int8`"
    )


def map_tensors(path: Path, sha256: str) -> dict[str, Array]:
    """Return the memory-mapped tensors of a safetensors file; raises CompletionError unless its hash is `sha256`."""
    try:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()  # reads piece by piece
    except OSError as e:
        found = str(e)
    if found != sha256:
        raise CompletionError(
            f"{path} must be as it was exported, but has changed or cannot be read; export the run again"
        )
    data = np.asarray(np.memmap(path, np.uint8, "r"))  # views of a memmap object are slower
    end = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:end].tobytes())
    types = {"I8": np.int8, "F32": np.float32}
    return {
        name: data[end + t["data_offsets"][0] : end + t["data_offsets"][1]].view(types[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
        if name != "__metadata__"
    }
