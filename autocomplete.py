"""Code completion on the CPU for a run that was exported to int8, with NumPy and `tokenizers` alone.

    python export.py runs/demo --to int8
    python autocomplete.py runs/demo --file main.c          # completes at the end of the file; - reads stdin
    python autocomplete.py runs/demo --prompt "def add(a, b):" --mode creative

The weights stay int8 and memory-mapped; blocks of rows become float32 as they are multiplied, so the process holds little
more than the file. Every architecture of `config.ModelConfig` runs. The prompt is cropped from the left, so that what is
written fits the context behind it; it ends at end of text. `--kernel c` compiles a small kernel first (`int8_kernel.py`),
which is faster. Beside these two files it needs `healing.py` of the project, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # one thread: products of one token with a block are too small to share
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from healing import Healing, take_back, token_texts

FORMAT = 1  # of config.json
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
MODES = {"autocomplete": (0.2, 10), "creative": (0.8, 50)}  # temperature and top-k, as seed 002 has them
BLOCK = 2**16  # weights that are float32 at a time: a quarter of a MB, which the cache of a core holds

Array = np.ndarray


class CompletionError(Exception):
    """Something the user can mend, in one line."""


class Matrix:
    """An int8 matrix (N, K) with a scale for each row, and the products with it.

    `block` is the room (at least K floats) in which rows become float32, shared by all matrices of a model.
    """

    def __init__(self, q: Array, scale: Array, bias: Array | None, block: Array):
        self.q, self.scale, self.bias = q, scale, bias
        n, k = q.shape
        rows = min(n, len(block) // k)
        self.out = np.empty((1, n), np.float32)  # (1, N)
        # all views are made here: a token passes through hundreds of them
        self.parts = [
            (q[i : i + rows], block[: min(rows, n - i) * k].reshape(-1, k), slice(i, i + rows))
            for i in range(0, n, rows)
        ]
        self.outs = [self.out[0, rows] for *_, rows in self.parts]

    def __call__(self, x: Array) -> Array:
        """Return x (T, K) times the transposed matrix and the bias, (T, N); for T = 1, valid until the next call."""
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

    def rows(self, ids: list[int]) -> Array:
        """Return these rows in float32, (T, K)."""
        return self.q[ids].astype(np.float32) * self.scale[ids, None]


class Norm:
    """LayerNorm, with or without bias, or RMSNorm, along the last axis."""

    def __init__(self, rms: bool, eps: float, weight: Array, bias: Array | None):
        self.rms, self.eps, self.weight, self.bias = rms, np.float32(eps), weight, bias
        self.mean = np.full(len(weight), 1 / len(weight), np.float32)  # a product with it is the mean

    def __call__(self, x: Array) -> Array:
        if not self.rms:
            x = x - (x @ self.mean)[:, None]
        y = x * (1 / np.sqrt(np.vecdot(x, x) * self.mean[0] + self.eps))[:, None]
        y *= self.weight
        if self.bias is not None:
            y += self.bias
        return y


def unit_rms(x: Array) -> Array:
    """Return x over its root mean square along the last axis, with the epsilon that torch has by default."""
    return x / np.sqrt(np.vecdot(x, x)[..., None] / x.shape[-1] + np.finfo(np.float32).eps)


def erf(x: Array) -> Array:
    """Return the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26), which NumPy has not."""
    a = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * a)
    series = np.float32(1.061405429) * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(coefficient)
        series *= t
    np.square(a, out=a)
    series *= np.exp(np.negative(a, out=a), out=a)
    return np.copysign(1 - series, x)


def softmax(x: Array) -> Array:
    """Return the distribution over the last axis, in place."""
    x -= x.max(-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(-1, keepdims=True)
    return x


def activate(kind: str, h: Array, gate: Array | None) -> Array:
    """Return the activation of h (T, d_ff), in place."""
    if kind == "swiglu":
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


class Model:
    """An exported model, and the keys and values of what it has read."""

    def __init__(self, folder: Path):
        """Open the export, without reading its weights into memory.

        Raises CompletionError if it is not whole.
        """
        self.meta = read_meta(folder)
        tensors = map_tensors(folder / WEIGHTS, self.meta["weights_sha256"])
        m = self.m = self.meta["model"]
        self.length = 0
        self.n_head, self.kv_heads = m["n_head"], m["n_kv_head"] or m["n_head"]
        self.head_dim = m["n_embd"] // m["n_head"]
        block = np.empty(max([BLOCK, *(t.shape[1] for t in tensors.values() if t.dtype == np.int8)]), np.float32)

        def matrix(name: str) -> Matrix | None:
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            return None if weight is None else Matrix(weight, tensors[f"{name}.weight.scale"], bias, block)

        def norm(name: str) -> Norm | None:
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            return None if weight is None else Norm(m["norm"] == "rmsnorm", m["norm_eps"], weight, bias)

        self.wte, self.wpe, self.norm_f = matrix("wte"), tensors.get("wpe"), norm("norm_f")
        self.head = self.wte if m["tie_embeddings"] else matrix("head")
        self.blocks = [
            {name: matrix(f"blocks.{i}.{name}") for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.gate", "mlp.down")}
            | {name: norm(f"blocks.{i}.{name}") for name in ("norm_1", "norm_2")}
            for i in range(m["n_layer"])
        ]
        shape = (m["n_layer"], self.kv_heads, m["block_size"], self.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.cos = self.sin = self.step = None
        if m["position"] == "rope":
            rate = m["rope_theta"] ** (-np.arange(0, self.head_dim, 2) / self.head_dim)  # (D/2,)
            angle = np.outer(np.arange(m["block_size"]), np.tile(rate, 2))  # (T, D)
            self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def compile(self) -> None:
        """Read single tokens with the kernel in C from now on. Raises CompletionError where it cannot be compiled."""
        from int8_kernel import KernelError, build

        try:
            self.step = build(self)
        except KernelError as e:
            raise CompletionError(str(e)) from None

    @property
    def block_size(self) -> int:
        """Tokens that it can read."""
        return self.m["block_size"]

    def read(self, ids: list[int]) -> Array:
        """Take in the next tokens; return the logits (V,) after the last. There must be room for them in the context."""
        if self.step is not None and len(ids) == 1 and self.length < self.block_size:
            self.length += 1
            return self.step(ids[0], self.length - 1)
        return self.head(self._hidden(ids)[-1:])[0]

    def logits(self, ids: list[int]) -> Array:
        """Return the logits (T, V) after each of the tokens of a text that begins with them."""
        self.length = 0
        return self.head(self._hidden(ids))

    def _hidden(self, ids: list[int]) -> Array:
        """Return the features (T, C) of the next tokens, and remember their keys and values."""
        start, stop = self.length, self.length + len(ids)
        assert 0 < len(ids) <= self.block_size - start, "the caller crops"
        x = self.wte.rows(ids)  # (T, C)
        if self.wpe is not None:
            x += self.wpe[start:stop]
        for layer, block in enumerate(self.blocks):
            y = self._attention(layer, block["attn.qkv"](block["norm_1"](x)), start, stop)
            x += y if block["attn.proj"] is None else block["attn.proj"](y)
            y = block["norm_2"](x)
            gate = None if block["mlp.gate"] is None else block["mlp.gate"](y)
            x += block["mlp.down"](activate(self.m["activation"], block["mlp.up"](y), gate))
        self.length = stop
        return x if self.norm_f is None else self.norm_f(x)

    def _attention(self, layer: int, qkv: Array, start: int, stop: int) -> Array:
        """Return what each of the tokens start:stop attends to, (T, C), of qkv (T, (n_head + 2 * n_kv) * D)."""
        T, D, n_head, n_kv = len(qkv), self.head_dim, self.n_head, self.kv_heads
        qkv = qkv.reshape(T, n_head + 2 * n_kv, D).transpose(1, 0, 2)  # (H, T, D)
        q, k = qkv[:n_head], qkv[n_head : n_head + n_kv]
        if self.m["qk_norm"]:
            q, k = unit_rms(q), unit_rms(k)
        if self.m["position"] == "rope":
            q, k = self._rotate(q, start, stop), self._rotate(k, start, stop)
        self.keys[layer, :, start:stop], self.values[layer, :, start:stop] = k, qkv[n_head + n_kv :]
        keys, values = self.keys[layer, :, :stop], self.values[layer, :, :stop]  # (n_kv, S, D)
        q = (q * np.float32(1 / math.sqrt(D))).reshape(n_kv, -1, D)  # (n_kv, G * T, D)
        scores = q @ keys.transpose(0, 2, 1)  # (n_kv, G * T, S)
        if T > 1:
            later = np.arange(stop) > np.arange(start, stop)[:, None]  # (T, S)
            scores.reshape(n_kv, -1, T, stop)[..., later] = -np.inf
        return (softmax(scores) @ values).reshape(n_head, T, D).transpose(1, 0, 2).reshape(T, -1)  # (T, C)

    def _rotate(self, x: Array, start: int, stop: int) -> Array:
        half = self.head_dim // 2
        turned = np.concatenate((-x[..., half:], x[..., :half]), -1)
        return x * self.cos[start:stop] + turned * self.sin[start:stop]


def read_meta(folder: Path) -> dict[str, Any]:
    """Return an export's config.json; raises CompletionError if it is none that this file reads."""
    path = folder / CONFIG
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and meta["weights_sha256"] and meta["model"]["block_size"]:
            return meta
        problem = f"it has format {meta['format']}, and this is for format {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as e:
        problem = f"{type(e).__name__}: {e}"
    raise CompletionError(
        f"{folder} must be a run's export to int8, but is not ({problem}); make one with `python export.py RUN --to int8`"
    )


def map_tensors(path: Path, sha256: str) -> dict[str, Array]:
    """Return the tensors of a safetensors file, memory-mapped; raises CompletionError unless its hash is `sha256`."""
    try:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()  # in pieces, which do not stay in memory
    except OSError as e:
        found = str(e)
    if found != sha256:
        raise CompletionError(
            f"{path} must be as it was exported, but has changed or cannot be read; export the run again"
        )
    data = np.asarray(np.memmap(path, np.uint8, "r"))  # its subclass costs time at each view
    end = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:end].tobytes())
    types = {"I8": np.int8, "F32": np.float32}
    return {
        name: data[end + t["data_offsets"][0] : end + t["data_offsets"][1]].view(types[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
        if name != "__metadata__"
    }


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float
    """0 is greedy."""
    top_k: int
    """Only this many of the most likely tokens; 0: all."""
    max_new_tokens: int
    """Stop after this many."""
    seed: int
    """The same seed gives the same text."""


def draw(logits: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token, drawn from logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        tokens = np.argpartition(logits, -sampling.top_k)[-sampling.top_k :]
    probabilities = softmax(logits[tokens].astype(np.float64) / sampling.temperature)
    return int(rng.choice(tokens, p=probabilities))


def stream(
    model: Model, ids: list[int], sampling: Sampling, eos_id: int, healing: Healing | None = None
) -> Iterator[int]:
    """Yield new tokens after the prompt `ids`, until end of text, the limit, or a full context."""
    model.length = 0
    rng = np.random.default_rng(sampling.seed)
    logits, out = model.read(ids), []
    for left in range(min(sampling.max_new_tokens, model.block_size - len(ids)), 0, -1):
        mask = None if healing is None else healing.allowed(out)
        token = draw(logits if mask is None else np.where(mask, logits, -np.inf), sampling, rng)
        if token == eos_id:
            return
        out.append(token)
        yield token
        if left > 1:
            logits = model.read([token])


class Completer:
    """A model with its tokenizer: text in, text out."""

    def __init__(self, folder: Path):
        """Open an export. Raises CompletionError if it is not whole."""
        from tokenizers import Tokenizer

        self.model = Model(folder)
        self.eos_id, self.bos_id = self.model.meta["eos_id"], self.model.meta["bos_id"]
        self.n_written = 0
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as e:  # the library raises plain Exception
            raise CompletionError(
                f"{folder / TOKENIZER} must be the run's tokenizer, but cannot be read ({e}); export the run again"
            ) from None
        self.tokenizer.encode_special_tokens = True  # what a text spells out is text

    def prompt_ids(self, text: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the tokens of the end of `text` that leave room for the new ones, and how many were cropped.

        Raises CompletionError for text that the tokenizer cannot hold.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.tokenizer.normalizer is None and self._decode(ids) != text:
            raise CompletionError(
                "the text must use only characters that the tokenizer can spell, but some are in no token"
            )
        ids = ([] if self.bos_id is None else [self.bos_id]) + ids
        room = min(max_new_tokens, self.model.block_size // 2)
        cropped = max(0, len(ids) + room - self.model.block_size)
        return ids[cropped:] or [self.eos_id], cropped  # in training, a document begins behind an end of text

    def complete(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the text that the model writes behind `text`, in pieces of whole characters."""
        ids, _ = self.prompt_ids(text, sampling.max_new_tokens)
        kept, healing = take_back(ids, self.spellings)
        # what was taken back is written again, and not said
        limit = min(sampling.max_new_tokens, self.model.block_size - len(ids)) + len(ids) - len(kept)
        said = len(self._decode(kept[-1:])) + len(healing.text)
        written = kept[-1:]
        for token in stream(self.model, kept, sampling._replace(max_new_tokens=limit), self.eos_id, healing):
            written.append(token)
            self.n_written = len(written) - 1
            # U+FFFD at the end is most likely a character of which bytes are still to come
            whole = self._decode(written).rstrip("\ufffd")
            if len(whole) > said:
                yield whole[said:]
                said = len(whole)
        yield self._decode(written)[said:]

    @cached_property
    def spellings(self) -> list[str]:
        """The text of each token."""
        (*_, before) = self.tokenizer.encode("x", add_special_tokens=False).ids
        tokens = self.tokenizer.get_vocab(with_added_tokens=True).values()
        control = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        return token_texts(
            lambda batch: self.tokenizer.decode_batch(batch, skip_special_tokens=False),
            before,
            max(tokens) + 1,
            self.model.m["vocab_size"],
            control,
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an export to int8, or the run, or its name under runs/")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="complete this text")
    text.add_argument("--file", help="complete at the end of this file; - reads stdin")
    parser.add_argument("--mode", choices=MODES, default="autocomplete", help="how bold (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the mode's, 0.2 or 0.8)")
    parser.add_argument(
        "--top-k", type=int, help="most likely tokens to draw from, 0 for all (default: the mode's, 10 or 50)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="stop after this many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument(
        "--kernel", choices=("numpy", "c"), default="numpy", help="c compiles one for this machine first"
    )
    parser.add_argument(
        "--stats", action="store_true", help="say on stderr how fast it was, and how much memory it took"
    )
    return parser.parse_args(argv)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the sampling that the flags ask for; raises CompletionError for a value that cannot be used."""
    temperature, top_k = MODES[args.mode]
    temperature = temperature if args.temperature is None else args.temperature
    top_k = top_k if args.top_k is None else args.top_k
    for flag, holds, must, given in (
        (
            "--temperature",
            temperature == 0 or 0.01 <= temperature <= 100,
            "from 0.01 to 100, or 0 for greedy",
            temperature,
        ),
        ("--top-k", top_k >= 0, "at least 1, or 0 for all", top_k),
        ("--max-new-tokens", args.max_new_tokens >= 1, "at least 1", args.max_new_tokens),
        ("--seed", args.seed >= 0, "at least 0", args.seed),
    ):
        if not holds:
            raise CompletionError(f"{flag} must be {must}, but is {given}")
    return Sampling(temperature, top_k, args.max_new_tokens, args.seed)


def read_text(args: argparse.Namespace) -> str:
    """Return the text to complete; raises CompletionError if there is none."""
    where = "--prompt" if args.file is None else args.file
    try:
        if args.file is None:
            text = os.fsencode(args.prompt).decode("utf-8")
        else:
            text = (sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CompletionError(f"{where} must be readable text in UTF-8, but is not ({e})") from None
    if not text:
        raise CompletionError(f"{where} must hold at least one character, but is empty")
    return text


def find_export(folder: Path) -> Path:
    """Return the folder of the export that `folder` is or, of a run, holds."""
    candidates = [folder, folder / "export" / "int8", Path("runs") / folder / "export" / "int8"]
    return next((path for path in candidates if (path / CONFIG).is_file()), folder)


def main(argv: list[str] | None = None) -> int:
    """Print what the model writes behind the text."""
    args = parse_arguments(argv)
    sampling, text = sampling_of(args), read_text(args)
    started = time.perf_counter()
    completer = Completer(find_export(args.folder))
    if args.kernel == "c":
        completer.model.compile()
    cropped = completer.prompt_ids(text, sampling.max_new_tokens)[1]
    if cropped:
        context = completer.model.block_size
        print(f"note: the first {cropped} tokens of the text are cropped: the context has {context}", file=sys.stderr)
    first_s = 0.0
    for piece in completer.complete(text, sampling):
        first_s = first_s or time.perf_counter() - started
        print(piece, end="", flush=True)
    if args.stats:
        print(f"\n{stats(completer.n_written, first_s, time.perf_counter() - started)}", file=sys.stderr)
    return 0


def stats(n_written: int, first_s: float, all_s: float) -> str:
    """Return one line about speed and memory."""
    speed = f", then {(n_written - 1) / (all_s - first_s):,.0f} tokens/s" if n_written > 1 else ""
    try:
        import resource
    except ImportError:  # Windows
        return f"first token after {first_s:.2f} s{speed}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"first token after {first_s:.2f} s{speed}; {peak / 1e6:,.0f} MB of memory at most"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompletionError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        sys.exit(1)
