"""Finds documents that contain a problem of a benchmark: 13 of its words in a row.

benchmarks = Benchmarks(("humaneval", "mbpp"))
found = benchmarks.find(text, word_hashes(text))     # "HumanEval/9: 'the words'", or None
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import DataConfig
from kindling.data.duplicates import WORD, window_hashes, word_hashes
from kindling.errors import KindlingError, one_line
from kindling.json_rows import DAMAGE, Broken, is_rows, open_text, read_rows
from kindling.paths import expand_home

NGRAM = 13  # this many equal words in a row mean contamination (Brown et al. 2020, appendix C)
NGRAM_LETTERS = 7  # at least this many of them are longer than one character and no number, to skip tables of digits
FILTER_BITS = 20  # a table of 1 MB; our benchmarks set a twentieth of it
PROBLEMS = Path(__file__).resolve().parents[2] / "problems"
BENCHMARKS = {"humaneval": PROBLEMS / "HumanEval.jsonl.gz", "mbpp": PROBLEMS / "mbpp.jsonl.gz"}


class BenchmarkError(KindlingError):
    """A file of `data.decontaminate` cannot be used."""


class Benchmarks:
    """The word sequences of benchmarks, to keep documents that contain them out of training."""

    def __init__(self, names: tuple[str, ...]):
        """Read the benchmarks: `humaneval`, `mbpp`, or files; raises BenchmarkError for one that cannot be read.

        A broken row costs only itself: it is in `unreadable`, and a warning says so.
        """
        hashes: dict[int, list[str]] = {}
        self.n_problems = 0
        self.undetectable: list[str] = []  # problems that are too short or too common to be recognised
        self.unreadable: list[str] = []  # broken rows, by file and line, and why
        for name in names:
            for problem, text in _problems(benchmark_path(name)):
                if text is None:
                    self.unreadable.append(problem)
                    continue
                words = WORD.findall(text.lower())
                telling = np.array([len(w) > 1 and not w.isdigit() for w in words], dtype=np.int64)
                grams = window_hashes(word_hashes(text), NGRAM)
                if len(grams):
                    letters = np.convolve(telling, np.ones(NGRAM, dtype=np.int64), mode="valid")
                    grams = grams[letters >= NGRAM_LETTERS]
                for gram in np.unique(grams).tolist():
                    hashes.setdefault(gram, []).append(problem)
                self.n_problems += 1
                if not len(grams):
                    self.undetectable.append(problem)
        if self.unreadable:
            print(f"warning: {self.unreadable_note()}", file=sys.stderr)
        self._hashes = np.array(sorted(hashes), dtype=np.uint64)
        self._problems = [hashes[h] for h in self._hashes.tolist()]
        self._filter = np.zeros(2**FILTER_BITS, dtype=bool)  # of the high bits of the hashes; it ends most searches
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True

    def unreadable_note(self) -> str:
        """Return how many rows of the benchmarks are broken, and the first of them."""
        return f"{len(self.unreadable)} rows of data.decontaminate cannot be read, such as {self.unreadable[0]}"

    def _hits(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where a document has 13 words of a problem, and the indices of these hashes in `_hashes`."""
        grams = window_hashes(words, NGRAM)
        hits = np.flatnonzero(self._filter.take(grams >> np.uint64(64 - FILTER_BITS)))
        if not len(hits):  # always true if there are no hashes
            return hits, hits
        places = np.minimum(np.searchsorted(self._hashes, grams[hits]), len(self._hashes) - 1)
        equal = self._hashes[places] == grams[hits]
        return hits[equal], places[equal]

    def find(self, text: str, words: np.ndarray) -> str | None:
        """Return the first problem of which a document contains 13 words, and these words, or None.

        `words` are the `word_hashes` of `text`.
        """
        hits, places = self._hits(words)
        if not len(hits):
            return None
        shared = " ".join(WORD.findall(text.lower())[hits[0] : hits[0] + NGRAM])
        return f"{self._problems[places[0]][0]}: {shared!r}"

    def find_all(self, text: str, words: np.ndarray) -> dict[str, str]:
        """Return every problem of which a document contains 13 words, with the first such words; `words` as in `find`."""
        hits, places = self._hits(words)
        spelt = WORD.findall(text.lower()) if len(hits) else []
        found: dict[str, str] = {}
        for hit, place in zip(hits.tolist(), places.tolist()):
            for problem in self._problems[place]:
                found.setdefault(problem, " ".join(spelt[hit : hit + NGRAM]))
        return found


def benchmark_path(name: str) -> Path:
    """Return the file of a benchmark: `humaneval` and `mbpp` come with the project, any other name is a path."""
    return BENCHMARKS.get(name.lower()) or expand_home(name, "--data.decontaminate")


def benchmark_files(cfg: DataConfig) -> dict[str, str]:
    """Return the sha256 of each file of `data.decontaminate`, by name; raises BenchmarkError if one cannot be read."""
    out = {}
    for name in cfg.decontaminate:
        try:
            out[name] = hashlib.sha256(benchmark_path(name).read_bytes()).hexdigest()
        except OSError as e:
            raise BenchmarkError(_unreadable(name, str(e))) from None
    return out


def _unreadable(name: object, why: str) -> str:
    return (
        f"data.decontaminate must name {', '.join(BENCHMARKS)}, or text or JSONL files that can be read, but {str(name)!r} "
        f"cannot ({why}); correct --data.decontaminate"
    )


def _problems(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the name and text of each problem: all strings of a row of a JSON file, or the whole text file.

    For a broken row, yields where it is and why, and None. Raises BenchmarkError if the file is damaged or has no other rows.
    """
    stem, found, why = path.name.split(".")[0], False, "it is empty"
    try:
        if not is_rows(path):
            with open_text(path) as f:
                text = f.read()
            text.encode("utf-8")  # raises an error for a byte that is not UTF-8
            yield stem, text
            return
        for number, row in enumerate(read_rows(path)):
            if isinstance(row.content, Broken):
                why = f"line {row.line:,}: {row.content}"
                yield f"{path.name}, {why}", None
                continue
            found, content = True, row.content
            name = str(content.pop("task_id", number)) if isinstance(content, dict) else str(number)
            yield name if "/" in name else f"{stem}/{name}", " ".join(_strings(content))
    except DAMAGE as e:
        raise BenchmarkError(_unreadable(path, one_line(e))) from None
    if not found:
        raise BenchmarkError(_unreadable(path, why))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings of a JSON value in their order, also of one that is nested as deeply as it can be."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            todo += reversed(list(value.values()) if isinstance(value, dict) else value)
