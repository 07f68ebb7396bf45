"""Compares tokenizers on your files: prints a table and saves a plot.

    python -m kindling.tokenization.compare FILES_OR_FOLDERS --vocab-size 4096

The figures come from documents that were held out from training, chosen by a hash of their content. A pretrained tokenizer
may have seen them. Speeds are those of one process that starts with an empty cache.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import tyro

from config import TokenizerConfig
from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError, TokenizerError, require
from kindling.json_rows import DAMAGE, PACKED, is_rows, open_text, read_rows
from kindling.paths import expand_home
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.train_tokenizer import train
from presets import STARCODER2, preset

COMPARED = {
    "tokenizers' BPE": TokenizerConfig(),
    "handwritten_bpe.py": TokenizerConfig(kind="handwritten"),
    "SentencePiece": TokenizerConfig(kind="sentencepiece"),
    "StarCoder2": STARCODER2,
}
LINES = tuple(s + p for s in (".jsonl", ".ndjson") for p in ("", *PACKED))
SUFFIXES = (".py", ".c", ".h", ".java", ".txt", ".md", *LINES)  # in a folder; most .json files there hold no rows
FEWEST = 10  # with fewer documents, none are held out
HELD_OUT = 0.2


class Measurable(Protocol):
    """What `measure` needs of a tokenizer. `encode` raises KindlingError for text that it cannot encode."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_by_library(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass
class Measured:
    """Figures of one tokenizer. Rates count only the documents that it could encode."""

    name: str
    vocab_size: int
    bytes_per_token: float
    tokens_per_line: float  # blank lines do not count
    encode_mb_s: float
    library_mb_s: float  # with the tokenizer's own library
    used: float  # the share of the vocabulary that occurs
    failures: int  # documents that were refused or changed by encoding and decoding
    training_s: float | None


def read_documents(paths: tuple[Path, ...], max_bytes: int) -> tuple[list[str], int, bool]:
    """Return the documents under `paths` without repetitions, ordered by the hash of their content.

    Also returns how many could not be read (not UTF-8, or no text in the row), and whether `max_bytes` ended the reading.
    Raises KindlingError if a path does not exist or there is no document.
    """
    if not paths:
        raise KindlingError("FILES must be named, but are not; try `python -m kindling.tokenization.compare .`")
    documents: dict[bytes, str] = {}
    total = unreadable = 0
    for text in (text for file in _files(paths) for text in _texts(file)):
        if total >= max_bytes:
            return [documents[key] for key in sorted(documents)], unreadable, True
        if text is None:
            unreadable += 1
        elif text.strip():
            raw = text.encode("utf-8")
            documents[hashlib.sha256(raw).digest()] = text
            total += len(raw)
    if not documents:
        raise KindlingError(
            f"FILES must hold text, but {', '.join(map(str, paths))} has no document that can be read "
            f"({unreadable:,} could not be); name files or folders of {' '.join(SUFFIXES)}"
        )
    return [documents[key] for key in sorted(documents)], unreadable, False


def _files(paths: tuple[Path, ...]) -> list[Path]:
    """Return the files to read in a pseudo-random order, so that the first megabytes are a fair sample."""
    found = []
    for path in (expand_home(p, "FILES") for p in paths):
        if path.is_dir():
            for folder, subfolders, names in os.walk(path):
                subfolders[:] = [d for d in subfolders if not d.startswith(".") and d != "__pycache__"]
                found += [(path, Path(folder, name)) for name in names if name.endswith(SUFFIXES)]
        elif path.is_file():
            found.append((path.parent, path))
        else:
            raise KindlingError(f"FILES must exist, but {str(path)!r} does not; name files or folders")
    found.sort(key=lambda f: hashlib.sha256(os.fsencode(f[1].relative_to(f[0]).as_posix())).digest())
    return [file for _, file in found if file.is_file()]


def _texts(path: Path) -> Iterator[str | None]:
    """Yield the text of a file, or the texts of its rows; None for what cannot be read."""
    try:
        if not is_rows(path):
            with open_text(path, "utf-8-sig") as f:
                whole = f.read()
            yield whole if _is_utf8(whole) else None
            return
        for row in read_rows(path):
            content = row.content
            text = content.get("content", content.get("text")) if isinstance(content, dict) else None
            yield text if isinstance(text, str) and _is_utf8(text) else None
    except DAMAGE:
        yield None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a byte that is not UTF-8, or half of a surrogate pair
        return False
    return True


def split_held_out(documents: list[str]) -> tuple[list[str], list[str], str]:
    """Return the documents to train on, the documents to measure on, and a sentence about the choice.

    Documents are ordered by their hash, so the first ones are a random choice that depends on their content alone.
    """
    if len(documents) < FEWEST:
        note = f"fewer than {FEWEST}, so that trained tokenizers are measured on what they were trained on"
        return documents, documents, note
    n = round(len(documents) * HELD_OUT)
    note = f"trained tokenizers learn on {len(documents) - n:,} of them, all are measured on the other {n:,}"
    return documents[n:], documents[:n], note


def measure(name: str, tokenizer: Measurable, documents: list[str], training_s: float | None) -> Measured:
    """Encode and decode `documents` and return the figures."""
    tokenizer.encode("")  # warm up: parts of a tokenizer are built at the first call
    held, seconds, failures = [], 0.0, 0
    used: set[int] = set()
    n_tokens = 0
    for text in documents:
        started = time.perf_counter()
        try:
            ids = tokenizer.encode(text)
        except KindlingError:
            failures += 1
            continue
        seconds += time.perf_counter() - started
        failures += tokenizer.decode(ids) != text
        held.append(text)
        n_tokens += len(ids)
        used.update(ids)
    n_bytes = sum(len(text.encode("utf-8")) for text in held)
    n_lines = sum(bool(line.strip()) for text in held for line in text.splitlines())
    started = time.perf_counter()
    for text in held:
        tokenizer.encode_by_library(text)
    library_s = time.perf_counter() - started
    return Measured(
        name,
        tokenizer.vocab_size,
        n_bytes / max(1, n_tokens),
        n_tokens / max(1, n_lines),
        n_bytes / 1e6 / max(1e-9, seconds),
        n_bytes / 1e6 / max(1e-9, library_s),
        len(used) / tokenizer.vocab_size,
        failures,
        training_s,
    )


COLUMNS: dict[str, Callable[[Measured], str]] = {
    "tokenizer": lambda m: m.name,
    "bytes/token": lambda m: f"{m.bytes_per_token:.3f}",
    "tokens/line": lambda m: f"{m.tokens_per_line:.2f}",
    "encode MB/s": lambda m: f"{m.encode_mb_s:.2f}",
    "its library's": lambda m: f"{m.library_mb_s:.2f}",
    "vocabulary": lambda m: f"{m.vocab_size:,}",
    "of it used": lambda m: f"{m.used:.1%}",
    "round-trip failures": lambda m: f"{m.failures:,}",
    "training s": lambda m: "-" if m.training_s is None else f"{m.training_s:.1f}",
}


def table(rows: list[Measured]) -> str:
    """Return the figures as lines of aligned columns."""
    cells = [list(COLUMNS), *([column(m) for column in COLUMNS.values()] for m in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


def plot(rows: list[Measured], title: str, path: Path) -> None:
    """Draw a bar for each tokenizer: bytes per token, encoding speed, and the share of the vocabulary used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "bytes per token": [m.bytes_per_token for m in rows],
        "encoding, MB/s": [m.encode_mb_s for m in rows],
        "vocabulary used, %": [100 * m.used for m in rows],
    }
    figure = Figure(figsize=(11, 1.4 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [f"{m.name}\n{m.vocab_size:,} tokens" for m in rows]
    for ax, (name, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        bars = ax.barh(labels, values, color="#33658a", height=0.6)
        ax.bar_label(bars, fmt="%.2f" if max(values) < 20 else "%.0f", padding=4)
        ax.set_title(name, fontsize=11, loc="left")
        ax.set_xlim(0, max(*values, 1e-9) * 1.2)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.tick_params(bottom=False, labelbottom=False, left=False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as e:  # matplotlib does not know the suffix
        raise KindlingError(f"--out must be a picture's path, but is {str(path)!r} ({e}); end it in .png") from None


@dataclass
class Flags:
    """The command line."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files or folders: .py .c .h .java .txt .md, or rows (.jsonl, .ndjson, .json; .gz and .zst too) with a field `content`
    or `text`. In a folder, .json files are left out."""
    preset: str | None = None
    """Also compare the tokenizer of this preset, with its vocabulary size."""
    vocab_size: int | None = None
    """Vocabulary size of the trained tokenizers. None: that of the preset, or 4,096."""
    pretrained: str | None = None
    """Also compare a pretrained tokenizer, StarCoder2's or the preset's, from a tokenizer.json, a folder or a hub name, such as
    bigcode/starcoder2-3b. Without it, the network is asked only for a preset's tokenizer on the hub."""
    max_bytes: int = 20_000_000
    """Read at most this many bytes."""
    out: Path = Path("tokenizers.png")
    """Where to save the plot."""


def main() -> None:
    """Compare the tokenizers that `COMPARED` names."""
    flags = parse_cli(Flags, __doc__ or "")
    cfg = None if flags.preset is None else preset(flags.preset)
    vocab_size = flags.vocab_size
    if vocab_size is None:
        vocab_size = 4096 if cfg is None else cfg.model.vocab_size
    require(vocab_size >= 300, "--vocab-size", "at least 300, for 256 bytes and some merges", vocab_size, "raise it")
    require(flags.max_bytes >= 1, "--max-bytes", "at least 1", flags.max_bytes, "raise it")
    compared = {name: its for name, its in COMPARED.items() if its.kind != "pretrained" or flags.pretrained is not None}
    if cfg is not None and cfg.tokenizer not in compared.values():
        compared[cfg.preset] = cfg.tokenizer
    documents, unreadable, cut = read_documents(flags.files, flags.max_bytes)
    learnt, measured, which = split_held_out(documents)
    size = f"{sum(len(t.encode('utf-8')) for t in documents) / 1e6:.2f} MB"
    print(f"{len(documents):,} documents, {size}: {which}")
    if unreadable:
        print(f"{unreadable:,} could not be read (not UTF-8, or no field content or text) and are left out")
    if cut:
        print(f"reading stopped at --max-bytes {flags.max_bytes:,}")
    rows = []
    for name, its in compared.items():
        if its.kind == "pretrained" and flags.pretrained is not None:
            its = replace(its, path=flags.pretrained)
        try:
            rows.append(_measured(name, its, vocab_size, learnt, measured))
        except TokenizerError as e:
            print(f"{name} is left out: {e}")
    if not rows:
        raise TokenizerError(
            "there must be a tokenizer to compare, but none could be loaded or trained; the lines above say why"
        )
    print(table(rows))
    plot(
        rows, f"{len(measured):,} documents measured; trained tokenizers have at most {vocab_size:,} tokens", flags.out
    )
    print(f"the plot is in {flags.out}; set a run's tokenizer with python main.py --tokenizer.kind KIND")


def _measured(name: str, cfg: TokenizerConfig, vocab_size: int, learnt: list[str], measured: list[str]) -> Measured:
    if cfg.kind == "pretrained":
        return measure(name, load_pretrained(replace(cfg, lossy=True)), measured, None)
    total = [0, *accumulate(len(text.encode("utf-8")) for text in learnt)]
    sample = [text for text, before in zip(learnt, total) if before < cfg.train_bytes]
    started = time.perf_counter()
    tokenizer = train(sample, cfg, vocab_size)
    return measure(name, tokenizer, measured, time.perf_counter() - started)


if __name__ == "__main__":
    run_script(main)
