"""What a model's samples and the benchmarks share with the training shards.

    overlaps = longest_overlaps(samples, training)  # the longest verbatim copy in each sample
    print(summary(overlaps))
    hits = benchmark_hits(("humaneval", "mbpp"), training, tokenizer)

A sample here is the generated part alone: the tokens of its prompt may well be copied from the training data, and would
count. Copies are of token ids, so text that was tokenised in another way is no copy; those of fewer than WINDOW tokens
are not looked for, as any two programs share some.

Limits: 15 million tokens a second and more are searched for copies, and 10 MB a second for problems, on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import EvalConfig
from kindling.data.duplicates import Benchmarks, word_hashes
from kindling.data.examples import Examples
from kindling.data.shards import DataError, TokenDataset
from kindling.evaluation.progress import progress_bar
from kindling.evaluation.tasks import file_of
from kindling.evaluation.verbatim import WINDOW, Longest, Overlap, Windows
from kindling.tokenization.tokenizer import Tokenizer

LONG = 50  # tokens: a longer copy is called memorised (Carlini et al. 2023, section 3)
CHUNK = 2**16  # tokens that are hashed at once: all their arrays stay in the processor's cache
BATCH = 2**20  # windows found that are looked at together
PIECE = 2**16  # tokens: what is read in one place when only part of the data is read

Progress = Callable[[int], object]  # is told how many more tokens have been read


def training_split(manifest: dict[str, Any], data: Path) -> TokenDataset | None:
    """Open the training split that a run's `manifest` names, in the folder `data`; None if it is not there.

    Its hashes are verified, which reads it once. Raises DataError if it is damaged or not what the run was trained on.
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
    manifest: dict[str, Any],
    data: Path,
    tokenizer: Tokenizer,
    cfg: EvalConfig,
) -> tuple[list[int], dict[str, Any]]:
    """Return each sample's longest verbatim overlap with the training data, and the figures of memorisation and contamination.

    `samples` are token ids. The training data are those that a run's `manifest` names, in the folder `data`; where they are
    not there or damaged, the figures say why they are missing. Contamination is looked for in the problems of `benchmarks`.
    """
    if not samples:
        return [], {}
    reason = f"the training data are not here: {data / manifest['fingerprint']} is no folder"
    try:
        dataset = training_split(manifest, data)
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
    """What the overlaps of all samples say together; lengths are in tokens."""

    samples: int
    longest: int
    median: float
    long: int  # samples that share more than LONG tokens in a row
    long_share: float  # of all samples
    below_window: int  # samples that share fewer than WINDOW tokens in a row; their length counts as 0


def summary(overlaps: Sequence[Overlap]) -> Summary:
    """Return the longest and the median overlap and how many are long. Raises ValueError where there is no sample."""
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
    """Return the part of eval.json on the samples."""
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

    Pass what was generated, without the prompt. A run never spans documents: the end-of-text token matches nothing.
    Where several runs or copies are of the same length, one of them is given, the same each time.
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
            # a run that goes on is seen whole the next time, as none is longer than a sample
            keep = slice(_last_stretch(places, stop, longest.reach), None)
            places, ids, found, n_found = places[keep], ids[keep], [], 0
        if progress is not None:
            progress(stop - start + (WINDOW - 1 if stop == last else 0))
    return longest.overlaps()


def _last_stretch(places: np.ndarray, stop: int, reach: int) -> int:
    """Return where in `places` the stretch begins that ends at `stop`, or its last `reach` windows."""
    whole = places - np.arange(len(places)) == stop - len(places)
    return max(len(places) - int(whole.sum()), len(places) - reach)


# -- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass
class ProblemHit:
    """One problem of a benchmark that the data holds words of."""

    words: str  # 13 in a row that the first of the documents shares with it
    position: int  # of that document in the split, in tokens; of what was read of it, where its beginning was not
    documents: int = 0


@dataclass
class BenchmarkHits:
    """What the data holds of one benchmark."""

    problems: int  # that it has
    lost: list[str]  # those too short or plain to be recognised in any data
    hits: dict[str, ProblemHit] = field(default_factory=dict)  # by the problem's name


@dataclass
class Hits:
    """What the data holds of each benchmark, and how much of the data was read to know."""

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
    """Return which problems the documents of the dataset hold 13 words in a row of, as the data pipeline looks for them.

    Of more than `max_tokens` only evenly spaced pieces are read, with at most so many tokens together; documents at
    their edges are looked at in part. Of conversations each exchange is a document, as it ends with the end-of-text
    token. Raises BenchmarkError for a benchmark that cannot be read.
    """
    benchmarks = {name: Benchmarks((name,)) for name in names}
    any_of_them = Benchmarks(names)  # one search tells that most documents hold nothing
    hits = Hits({name: BenchmarkHits(b.n_problems, b.lost) for name, b in benchmarks.items()}, 0, len(dataset))
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
    """Return the part of eval.json on the benchmarks, each with the file of its problems."""
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
            "too_short": len(found.lost),
        }
    return out


def _count(benchmark: BenchmarkHits, found: dict[str, str], position: int) -> None:
    """Add what was found in the document at `position`: problems, each with the words that it shares."""
    for problem, words in found.items():
        hit = benchmark.hits.setdefault(problem, ProblemHit(words, position))
        hit.documents += 1


def pieces(n_tokens: int, max_tokens: int | None) -> list[tuple[int, int]]:
    """Return where to read at most `max_tokens` of `n_tokens`: all at once, or pieces of at most PIECE, evenly spaced."""
    if max_tokens is None or max_tokens >= n_tokens:
        return [(0, n_tokens)]
    n = max(1, -(-max_tokens // PIECE))
    return [(start := n_tokens * i // n, start + max_tokens // n) for i in range(n)]


def _documents(dataset: TokenDataset, start: int, stop: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield the position and the ids of each document between two positions, some documents at a time."""
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
