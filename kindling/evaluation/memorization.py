"""Searches the training shards for verbatim copies in a model's samples, and for problems of benchmarks.

    overlaps = longest_overlaps(samples, training)  # the longest verbatim copy in each sample
    print(summary(overlaps))
    hits = benchmark_hits(("humaneval", "mbpp"), training, tokenizer)

A sample here is only the generated part, because its prompt may be copied from the training data. Copies are found as token
ids, so a text that is tokenised in another way is no copy. Copies of fewer than WINDOW tokens are ignored, as any two programs
share some.

Speed on one core: at least 15 million tokens per second for copies, and 10 MB per second for problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import EvalConfig
from kindling.data.decontamination import Benchmarks
from kindling.data.duplicates import word_hashes
from kindling.data.examples import Examples
from kindling.data.shards import DataError, TokenDataset
from kindling.evaluation.progress import progress_bar
from kindling.evaluation.tasks import file_of
from kindling.evaluation.verbatim import WINDOW, Longest, Overlap, Windows
from kindling.tokenization.tokenizer import Tokenizer

LONG = 50  # tokens; a longer copy counts as memorised (Carlini et al. 2023, section 3)
CHUNK = 2**16  # tokens that are hashed at once, so that their arrays stay in the processor's cache
BATCH = 2**20  # windows that are found before they are processed together
PIECE = 2**16  # tokens that are read in one place when only part of the data is read

Progress = Callable[[int], object]  # is called with the number of tokens that were read since the last call


def training_split(manifest: dict[str, Any], data: Path) -> TokenDataset | None:
    """Open the training split in the folder `data` that a run's `manifest` names; None if it is not there.

    Reads it once to verify its hashes. Raises DataError if it is damaged or not the data that the run was trained on.
    """
    folder = data / manifest["fingerprint"]
    if not folder.is_dir():
        return None
    of_examples = manifest["splits"]["train"].get("segments") is not None
    dataset = Examples(folder, "train") if of_examples else TokenDataset(folder, "train")
    if dataset.manifest["splits"]["train"] != manifest["splits"]["train"]:
        raise DataError(
            f"{folder} must hold the shards that the run was trained on, but holds others; "
            f"move it away, or evaluate a run that was trained on them"
        )
    return dataset


def seen_in_training(
    samples: Sequence[Sequence[int]],
    benchmarks: Sequence[str],
    manifest: dict[str, Any] | None,
    data: Path,
    tokenizer: Tokenizer,
    cfg: EvalConfig,
) -> tuple[list[int], dict[str, Any]]:
    """Return each sample's longest verbatim overlap with the training data, and the figures of memorisation and contamination.

    `samples` are token ids. The training data are in the folder `data`, under the name in the run's `manifest`, which a model of
    others lacks. If they are
    missing or damaged, the figures give this as the reason. Contamination is about the problems of `benchmarks`.
    """
    if not samples:
        return [], {}
    reason = "the training data are not known, as the model is of others"
    try:
        dataset = None if manifest is None else training_split(manifest, data)
        if manifest is not None:
            reason = f"the training data are not here: {data / manifest['fingerprint']} is no folder"
    except DataError as e:
        dataset, reason = None, str(e)
    if dataset is None:
        parts = ("memorisation", "contamination") if benchmarks else ("memorisation",)
        return [], {part: {"skipped": reason} for part in parts}
    with progress_bar("memorisation", len(dataset), "token") as bar:
        overlaps = longest_overlaps([np.array(ids, dtype=np.int64) for ids in samples], dataset, bar.update)
    figures: dict[str, Any] = {"memorisation": _memorisation(overlaps, len(dataset))}
    files = {name: file_of(name, cfg) for name in dict.fromkeys(name.partition("-")[0] for name in benchmarks)}
    if files and cfg.contamination_tokens:
        with progress_bar("contamination", min(len(dataset), cfg.contamination_tokens), "token") as bar:
            hits = benchmark_hits(tuple(files.values()), dataset, tokenizer, cfg.contamination_tokens, bar.update)
        figures["contamination"] = _contamination(hits, files)
    return [overlap.length for overlap in overlaps], figures


# -- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Figures on the overlaps of all samples; lengths are in tokens."""

    samples: int
    longest: int
    median: float
    long: int  # samples that share more than LONG tokens in a row
    long_share: float  # of all samples
    below_window: int  # samples that share fewer than WINDOW tokens in a row; their length counts as 0


def summary(overlaps: Sequence[Overlap]) -> Summary:
    """Return the figures on the overlaps. Raises ValueError if there is no sample."""
    if not overlaps:
        raise ValueError("there must be at least one sample, but there is none")
    lengths = np.array([overlap.length for overlap in overlaps])
    long = int((lengths > LONG).sum())
    return Summary(
        samples=len(overlaps),
        longest=int(lengths.max()),
        median=float(np.median(lengths)),
        long=long,
        long_share=long / len(overlaps),
        below_window=int((lengths < WINDOW).sum()),
    )


def _memorisation(overlaps: Sequence[Overlap], training_tokens: int) -> dict[str, Any]:
    """Return the part of eval.json about memorisation."""
    found = summary(overlaps)
    return {
        "samples": found.samples,
        "longest": found.longest,
        "median": found.median,
        "over_50": found.long,
        "share_over_50": found.long_share,
        "below_window": found.below_window,
        "training_tokens": training_tokens,
    }


def longest_overlaps(
    samples: Sequence[np.ndarray], dataset: TokenDataset, progress: Progress | None = None
) -> list[Overlap]:
    """Return for each sample, token ids (n,), the longest run of its tokens that occurs verbatim in the dataset.

    Pass only the generated tokens, without the prompt. A run never spans documents, because the end-of-text token matches
    nothing. Among several runs or copies of the same length, the result is always the same one.
    """
    eos_id = dataset.manifest["eos_id"]
    windows = Windows([np.where(sample == eos_id, -1, sample) for sample in samples])
    longest = Longest(windows)
    last = len(dataset) - WINDOW + 1  # the number of windows
    places, ids = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    n_found = 0
    for start in range(0, last, CHUNK):
        stop = min(start + CHUNK, last)
        if len(windows.rows):
            found.append(windows.find(dataset.read(start, stop - start + WINDOW - 1), start))
            n_found += len(found[-1][0])
        if n_found >= BATCH or (stop == last and found):
            places, ids = (np.concatenate(part) for part in zip((places, ids), *found))
            longest.update(places, ids)
            # keep a run that continues in the next chunk; none is longer than a sample
            keep = slice(_last_stretch(places, stop, longest.reach), None)
            places, ids, found, n_found = places[keep], ids[keep], [], 0
        if progress is not None:
            progress(stop - start + (WINDOW - 1 if stop == last else 0))
    return longest.overlaps()


def _last_stretch(places: np.ndarray, stop: int, reach: int) -> int:
    """Return where in `places` the stretch that ends at `stop` begins, or where its last `reach` windows begin."""
    whole = places - np.arange(len(places)) == stop - len(places)
    return max(len(places) - int(whole.sum()), len(places) - reach)


# -- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass
class ProblemHit:
    """A problem of a benchmark that was found in the data."""

    words: str  # the 13 words in a row that the first document shares with it
    position: int  # of that document in the split, in tokens; if its beginning was not read, of the part that was
    documents: int = 0  # the number of documents with words of it


@dataclass
class BenchmarkHits:
    """The problems of one benchmark that were found in the data."""

    problems: int  # in the benchmark
    undetectable: list[str]  # names of problems that are too short or plain to be recognised in any data
    hits: dict[str, ProblemHit] = field(default_factory=dict)  # by the problem's name


@dataclass
class Hits:
    """The problems of each benchmark that were found in the data, and how much of the data was read."""

    benchmarks: dict[str, BenchmarkHits]
    tokens_read: int
    tokens: int  # of the split


def benchmark_hits(
    names: tuple[str, ...],
    dataset: TokenDataset,
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Hits:
    """Return the problems with 13 words in a row in some document of the dataset, by the same search as in the data pipeline.

    A dataset of more than `max_tokens` is read in evenly spaced pieces with at most that many tokens together; documents at
    their edges are searched in part. In conversations each exchange is a document, as it ends with the end-of-text token.
    Raises BenchmarkError for a benchmark that cannot be read.
    """
    benchmarks = {name: Benchmarks((name,)) for name in names}
    any_of_them = Benchmarks(names)  # a single search is enough for most documents, which have no hit
    hits = Hits({name: BenchmarkHits(b.n_problems, b.undetectable) for name, b in benchmarks.items()}, 0, len(dataset))
    for start, stop in pieces(len(dataset), max_tokens):
        for documents in _documents(dataset, start, stop):
            texts = tokenizer.decode_batch([ids for _, ids in documents])
            for (position, _), text in zip(documents, texts):
                words = word_hashes(text)
                if any_of_them.find(text, words) is not None:
                    for name, benchmark in benchmarks.items():
                        _count(hits.benchmarks[name], benchmark.find_all(text, words), position)
            if progress is not None:
                progress(sum(len(ids) for _, ids in documents))
        hits.tokens_read += stop - start
    return hits


def _contamination(hits: Hits, files: dict[str, str]) -> dict[str, Any]:
    """Return the part of eval.json about contamination; `files` has the file with the problems of each benchmark."""
    out: dict[str, Any] = {"read_tokens": hits.tokens_read, "of_tokens": hits.tokens}
    for name, path in files.items():
        found = hits.benchmarks[path]
        out[name] = {
            "problems": found.problems,
            "hit": len(found.hits),
            "examples": [
                f"{problem} in {hit.documents:,} documents, the first at token {hit.position:,}: {hit.words!r}"
                for problem, hit in sorted(found.hits.items())
            ],
            "too_short": len(found.undetectable),
        }
    return out


def _count(benchmark: BenchmarkHits, found: dict[str, str], position: int) -> None:
    """Add the problems that were found in the document at `position`, each with the shared words."""
    for problem, words in found.items():
        hit = benchmark.hits.setdefault(problem, ProblemHit(words, position))
        hit.documents += 1


def pieces(n_tokens: int, max_tokens: int | None) -> list[tuple[int, int]]:
    """Return the ranges to read at most `max_tokens` of `n_tokens`: everything, or evenly spaced pieces of at most PIECE."""
    if max_tokens is None or max_tokens >= n_tokens:
        return [(0, n_tokens)]
    n = max(1, -(-max_tokens // PIECE))
    return [(start := n_tokens * i // n, start + max_tokens // n) for i in range(n)]


def _documents(dataset: TokenDataset, start: int, stop: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield the position and the ids of each document between two positions, several documents at a time."""
    eos_id = dataset.manifest["eos_id"]
    begun: list[np.ndarray] = []  # the parts of a document that has not ended yet
    position = start
    for at in range(start, stop, CHUNK):
        ids = dataset.read(at, min(CHUNK, stop - at))
        *whole, rest = np.split(ids, np.flatnonzero(ids == eos_id) + 1)
        documents = []
        for part in [*whole, rest] if at + CHUNK >= stop else whole:
            document = np.concatenate((*begun, part))
            if len(document):
                documents.append((position, document.tolist()))
            begun, position = [], position + len(document)
        begun.append(rest)
        yield documents
