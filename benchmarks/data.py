"""Measure the data pipeline beside the straightforward way with `datasets`, its memory, and its near-duplicates.

    python benchmarks/data.py                # about 15 minutes on two cores; see that nothing else runs

Speed and memory: the same documents, filters (characters, lines, share of letters, compile()), exact deduplication and
tokenizer, from files to token files, each way in a process of its own, in turn, three times; medians. The way with
`datasets` is load_dataset, filter, a filter for duplicates, map(tokenize, batched=True, num_proc=2), and a loop that
writes; once with its filter in one process and once in two. Memory is the sum over all processes of a way, sampled.
Near-duplicates: copies of real files with names changed, functions in another order, or other comments.
Writes `benchmarks/results/local/data.json` and the same as Markdown.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import itertools
import json
import keyword
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import results_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
SHARED = ROOT.parent / "shared" / "data"  # larger real inputs, where there are some; else this machine's Python alone
CORPUS, STARCODER2 = SHARED / "code_corpus.jsonl.gz", SHARED / "starcoder2_tokenizer" / "tokenizer.json"
REPEATS = 3


def config(corpus: str, tokenizer: str, max_bytes: int = 28_000_000, **data: Any) -> Any:
    """Return the config of one of the two corpora, with seed 000's filters."""
    from config import SourceConfig, TokenizerConfig
    from presets import CODE_FILTERS, preset

    if corpus == "three languages":
        source = SourceConfig(kind="jsonl", path=str(CORPUS))
    else:
        source = SourceConfig(kind="local-python", max_bytes=max_bytes)
    cfg = preset("code-50m")
    chosen = {
        "sources": (source,),
        "val_fraction": 0.02,
        "test_fraction": 0.02,
        "workers": 2,
        "max_tokens": None,
        **data,
    }
    return replace(
        cfg,
        data=replace(cfg.data, **CODE_FILTERS, **chosen),
        tokenizer=TokenizerConfig(kind="pretrained", path=tokenizer),
    )


PLAIN: dict[str, Any] = {"near_dedup": None, "decontaminate": ()}  # what both ways do


def ours(corpus: str, tokenizer: str, options: dict[str, Any]) -> None:
    """Build the shards; print documents and tokens."""
    from kindling.data.build import prepare
    from kindling.data.shards import SPLITS, read_manifest

    if "decontaminate" in options:
        options["decontaminate"] = tuple(options["decontaminate"])
    manifest = read_manifest(prepare(config(corpus, tokenizer, **options)))
    print(json.dumps([sum(manifest["splits"][s][k] for s in SPLITS) for k in ("documents", "tokens")]))


def theirs(corpus: str, tokenizer: str, filter_processes: int) -> None:
    """The way that the documentation of `datasets` shows; print documents and tokens."""
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer

    from kindling.data.filters import first_failed_filter
    from kindling.data.sources import local_files

    cfg = config(corpus, tokenizer, **PLAIN)
    if corpus == "three languages":
        rows = load_dataset("json", data_files=str(CORPUS), split="train")
    else:
        files = [str(f.path) for f in local_files(cfg.data.sources[0])]
        rows = load_dataset("text", data_files=files, sample_by="document", split="train", encoding_errors="ignore")
        rows = rows.rename_column("text", "content")
    has_language = "language" in rows.column_names

    def keep(row: dict[str, Any]) -> bool:
        language = row["language"].lower() if has_language else "python"
        return first_failed_filter(row["content"], "", language, cfg.data) is None

    rows = rows.filter(keep, num_proc=filter_processes if filter_processes > 1 else None)
    seen: set[bytes] = set()

    def first(row: dict[str, Any]) -> bool:
        digest = hashlib.sha256(row["content"].encode("utf-8")).digest()
        new = digest not in seen
        seen.add(digest)
        return new

    rows = rows.filter(first)
    backend = Tokenizer.from_file(tokenizer)
    backend.encode_special_tokens = True
    eos = backend.token_to_id("<|endoftext|>")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*e.ids, eos] for e in backend.encode_batch_fast(batch["content"], add_special_tokens=False)]}

    rows = rows.map(tokenize, batched=True, num_proc=2, remove_columns=rows.column_names)
    n_tokens = 0
    with open("tokens.bin", "wb") as f:
        for batch in rows.with_format("numpy").iter(batch_size=256):
            ids = np.concatenate([np.asarray(x) for x in batch["ids"]]).astype(np.uint16)
            n_tokens += len(ids)
            ids.tofile(f)
    print(json.dumps([len(rows), n_tokens]))


def _tree_memory(pid: int) -> int:
    """Return the proportional memory of a process and all below it, in bytes; pages that several share count once."""
    total, todo = 0, [pid]
    while todo:
        at = todo.pop()
        try:
            rollup = Path(f"/proc/{at}/smaps_rollup").read_text(encoding="ascii")
            total += int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024
            for task in Path(f"/proc/{at}/task").iterdir():
                todo += map(int, (task / "children").read_text(encoding="ascii").split())
        except (OSError, TypeError):  # it ended meanwhile
            continue
    return total


def measure(*arguments: str) -> tuple[float, float, list[int]]:
    """Run one way in an empty folder; return seconds, the peak of its memory in GiB, and documents and tokens."""
    with tempfile.TemporaryDirectory() as cwd:
        env = {**os.environ, "HF_HOME": f"{cwd}/hf", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        started, peak = time.perf_counter(), 0
        with open(f"{cwd}/log.txt", "w", encoding="utf-8") as log:
            command = [sys.executable, __file__, *arguments]
            process = subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, _tree_memory(process.pid))
                time.sleep(0.1)
        seconds = time.perf_counter() - started
        out = Path(cwd, "log.txt").read_text(encoding="utf-8")
        if process.returncode:
            sys.exit(f"{' '.join(arguments)} failed:\n{out}")
    found = [line for line in out.splitlines() if re.fullmatch(r"\[\d+, \d+\]", line)]
    return seconds, peak / 2**30, json.loads(found[-1])


def speed(corpus: str, tokenizer: str, repeats: int) -> dict[str, Any]:
    """Measure the ways in turn on one corpus."""
    ways = {
        "datasets, filter in one process": ("theirs", corpus, tokenizer, "1"),
        "datasets, filter in two": ("theirs", corpus, tokenizer, "2"),
        "ours, the same work": ("ours", corpus, tokenizer, json.dumps(PLAIN)),
        "ours, with near-duplicates": ("ours", corpus, tokenizer, json.dumps({**PLAIN, "near_dedup": 0.6})),
        "ours, with near-duplicates and benchmarks": ("ours", corpus, tokenizer, "{}"),
    }
    runs: dict[str, list[tuple[float, float, list[int]]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, arguments in ways.items():
            runs[way].append(measure(*arguments))
            print(corpus, way, runs[way][-1], flush=True)
    seconds = {way: statistics.median(r[0] for r in found) for way, found in runs.items()}
    same = [runs[way][0][2] for way in ways if "near" not in way]
    return {
        "seconds": seconds,
        "peak memory, GiB": {way: max(r[1] for r in found) for way, found in runs.items()},
        "documents and tokens": {way: found[0][2] for way, found in runs.items()},
        "the same work gave the same documents and tokens": all(s == same[0] for s in same),
        "times as fast as datasets": seconds["datasets, filter in one process"] / seconds["ours, the same work"],
        "times as fast as datasets with its filter in two": seconds["datasets, filter in two"]
        / seconds["ours, the same work"],
        "near-duplicates make it longer by": seconds["ours, with near-duplicates"] / seconds["ours, the same work"] - 1,
    }


def memory(tokenizer: str) -> dict[str, Any]:
    """Measure the peak memory of growing builds of this machine's Python, near-duplicates and benchmarks included."""
    out = {}
    for megabytes in (30, 60, 120):
        seconds, peak, (documents, tokens) = measure(
            "ours", "this machine's Python", tokenizer, json.dumps({"max_bytes": megabytes * 10**6})
        )
        out[f"{megabytes} MB"] = {"GiB": peak, "seconds": seconds, "documents": documents, "tokens": tokens}
        print(megabytes, out[f"{megabytes} MB"], flush=True)
    return out


# -- near-duplicates --------------------------------------------------------------------------------------------------


def renamed(text: str, rng: random.Random) -> str:
    """Change three of the twelve most frequent names throughout."""
    names = collections.Counter(w for w in re.findall(r"\b[a-z_]\w+\b", text) if not keyword.iskeyword(w))
    frequent = [name for name, _ in names.most_common(12)]
    for name in rng.sample(frequent, min(3, len(frequent))):
        text = re.sub(rf"\b{name}\b", f"{name}_renamed", text)
    return text


def reordered(text: str, rng: random.Random) -> str:
    """Put the functions and classes of the top level into another order."""
    head, *blocks = re.split(r"(?m)^(?=def |class |@)", text)
    rng.shuffle(blocks)
    return head + "".join(blocks)


def recommented(text: str, rng: random.Random) -> str:
    """Take out every comment line and put eight other ones at the top."""
    lines = [line for line in text.split("\n") if not line.strip().startswith("#")]
    return "# Copyright of someone else, and the terms of a licence\n" * 8 + "\n".join(lines)


EDITS = {
    "rename": lambda t, rng: renamed(t, rng),
    "reorder": lambda t, rng: reordered(t, rng),
    "comments": lambda t, rng: recommented(t, rng),
    "all three": lambda t, rng: recommented(reordered(renamed(t, rng), rng), rng),
}


def near_duplicates() -> dict[str, Any]:
    """Return recall and precision on edited copies of 800 Python files of 1 to 40 kB, among as many other files.

    Of two halves of the files only the first is in the index. A copy is found if it is matched at all. A file of the
    other half that is matched is a mistake if the exact similarity of the pair is below the threshold.
    """
    from kindling.data.duplicates import MinHashIndex, signature, word_hashes
    from kindling.data.sources import local_files

    if CORPUS.exists():
        with gzip.open(CORPUS, "rt", encoding="utf-8") as f:
            rows = map(json.loads, f)
            texts = [r["content"] for r in rows if r["language"].lower() == "python"]
    else:
        source = config("this machine's Python", "-").data.sources[0]
        texts = [f.path.read_text(encoding="utf-8", errors="replace") for f in local_files(source)]
    texts = sorted({t for t in texts if 1000 <= len(t) <= 40_000})
    rng = random.Random(0)
    rng.shuffle(texts)
    half, others = texts[:800], texts[800:1600]

    def pairs(text: str) -> set[tuple[str, str]]:
        words = re.findall(r"\w+", text.lower())
        return set(itertools.pairwise(words))

    index = MinHashIndex(0.6)
    for text in half:
        index.add(signature(word_hashes(text)))
    out: dict[str, Any] = {"files": len(half), "other files": len(others)}
    found = 0
    for name, edit in EDITS.items():
        hits = [index.find(signature(word_hashes(edit(text, rng)))) for text in half]
        out[f"recall, {name}"] = sum(h is not None for h in hits) / len(half)
        out[f"recall of its own original, {name}"] = sum(h is not None and h[0] == i for i, h in enumerate(hits)) / len(
            half
        )
        found += sum(h is not None for h in hits)
    natural, wrong = 0, 0
    for text in others:
        if hit := index.find(signature(word_hashes(text))):
            a, b = pairs(text), pairs(half[hit[0]])
            similar = len(a & b) / len(a | b) >= index.threshold
            natural, wrong = natural + similar, wrong + (not similar)
    out |= {"natural near-duplicates found": natural, "found below the threshold": wrong}
    out["precision"] = (found + natural) / (found + natural + wrong)
    return out


def handwritten(repeats: int) -> dict[str, Any]:
    """Return how long handwritten_bpe.py takes to learn 2,048 tokens from 5 MB of Python, and how fast it encodes 2 MB more."""
    from config import TokenizerConfig
    from kindling.data.sources import local_files
    from kindling.tokenization.handwritten_bpe import ByteLevelBPE
    from kindling.tokenization.infilling import control_tokens
    from kindling.tokenization.train_tokenizer import train_bpe

    texts: list[str] = []
    for f in local_files(config("this machine's Python", "-").data.sources[0]):
        if sum(map(len, texts)) < 7_000_000:
            texts.append(f.path.read_text(encoding="utf-8", errors="replace"))
    cut = next(i for i in range(len(texts)) if sum(map(len, texts[:i])) >= 5_000_000)
    learnt, new = texts[:cut], texts[cut:]
    megabytes = sum(len(t.encode("utf-8")) for t in new) / 1e6
    out: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(repeats):
        started = time.perf_counter()
        ours = ByteLevelBPE.train(learnt, 2048, control_tokens(TokenizerConfig().special_tokens))
        out["handwritten_bpe.py, training, s"].append(time.perf_counter() - started)
        started = time.perf_counter()
        library = train_bpe(learnt, TokenizerConfig(), 2048)
        out["tokenizers, training, s"].append(time.perf_counter() - started)
        for name, encode in (
            ("handwritten_bpe.py, encoding, MB/s", ours.encode),
            ("tokenizers, encoding, MB/s", library.encode_by_library),
        ):
            started = time.perf_counter()
            for text in new:
                encode(text)
            out[name].append(megabytes / (time.perf_counter() - started))
        same = ours.encode(new[0]) == library.encode_by_library(new[0])
    return {name: statistics.median(found) for name, found in out.items()} | {"the same ids": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements of which medians are taken")
    flags = parser.parse_args()
    way, repeats = flags.way, flags.repeats
    if way:
        return ours(*way[1:3], json.loads(way[3])) if way[0] == "ours" else theirs(*way[1:3], int(way[3]))
    figures: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}"}
    figures["measurements of which medians are taken"] = repeats
    figures["near-duplicates"] = near_duplicates()
    figures["2,048 tokens from 5 MB of Python"] = handwritten(repeats)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = str(STARCODER2)
        if not STARCODER2.exists():
            tokenizer = f"{folder}/tokenizer.json"
            _train_tokenizer(Path(tokenizer))
        if CORPUS.exists():
            figures["three languages, 27 MB of JSON lines"] = speed("three languages", tokenizer, repeats)
        figures["this machine's Python, 28 MB in files"] = speed("this machine's Python", tokenizer, repeats)
        figures["memory as the corpus grows"] = memory(tokenizer)
    results_file("data.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = "| figure | measured |\n| --- | ---: |\n" + "".join(f"| {n} | {v} |\n" for n, v in _flat(figures))
    results_file("data.md").write_text(table, encoding="utf-8")
    print(table)


def _train_tokenizer(path: Path) -> None:
    from config import TokenizerConfig
    from kindling.data.sources import local_files
    from kindling.tokenization.train_tokenizer import train_bpe

    files = local_files(config("this machine's Python", "-").data.sources[0])[:400]
    texts = (f.path.read_text(encoding="utf-8", errors="replace") for f in files)
    path.write_text(train_bpe(texts, TokenizerConfig(), 16_384).to_json(), encoding="utf-8")


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}: {key}" if name else key)]
    if isinstance(value, float):
        return [(name, f"{value:.3g}")]
    return [(name, " and ".join(f"{v:,}" for v in value) if isinstance(value, list) else str(value))]


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
