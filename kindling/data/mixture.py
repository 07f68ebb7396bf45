"""Draws documents from the sources by weight, drops duplicates, and assigns splits.

    for document in Mixture(cfg.data, read): ...      # read(i) yields the processed documents of source i

One process decides all this, in the order of the documents. So the same inputs give the same mixture with any number of
workers or machines.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Generator, Iterator

from config import DataConfig
from kindling.data.duplicates import Deduplicator
from kindling.data.filters import Drop
from kindling.data.process_document import ProcessedDocument, split_of
from kindling.data.shards import DataError


@dataclasses.dataclass
class DrawnDocument:
    """A document that the mixture drew: dropped, or kept in a split. Documents are numbered in the order of drawing."""

    source: int
    processed: ProcessedDocument
    drop: Drop | None = None
    split: str = ""
    original: int | None = None  # the number of the document that it duplicates
    repeated: bool = False


Reader = Callable[
    [int], Iterator[ProcessedDocument]
]  # takes the number of a source, gives its documents in their order


class Mixture:
    """Draws documents from the sources by weight, drops duplicates, and gives each of the others its split.

    The next document comes from the source that is furthest behind its share of the tokens. Before there is a tokenizer,
    bytes count. So the order depends on the documents alone.
    """

    def __init__(self, cfg: DataConfig, read: Reader, silent: bool = False):
        """`read` reads a source from its beginning. With `silent`, nothing is printed when a source is exhausted."""
        self.data, self.read, self.silent = cfg, read, silent
        self.reads = [1] * len(cfg.sources)  # how often the reading of each source was started
        self.broken: dict[int, str] = {}  # the sources that broke off, and why
        self.notes: list[str] = []
        self._dry: set[int] = set()  # the sources that were read to their end
        self._in_train = [bytearray() for _ in cfg.sources]  # of each document: is it in training?

    def __iter__(self) -> Generator[DrawnDocument, None, None]:
        duplicates, number = Deduplicator(self.data), 0
        streams = {i: self.read(i) for i in range(len(self.reads))}
        drawn = dict.fromkeys(streams, 0)
        while streams:
            i = min(streams, key=lambda i: drawn[i] / self.data.sources[i].weight)
            processed = next(streams[i], None)
            if processed is None:
                streams = self._went_dry(i, streams)
                continue
            if self.reads[i] > 1:  # `_repeat` gives only documents of training
                document = DrawnDocument(i, processed, split="train", repeated=True)
            else:
                document = DrawnDocument(i, processed, processed.drop)
                if document.drop is None:
                    document.drop, document.original = duplicates.check(processed.digest, processed.signature, number)
                if document.drop is None:
                    document.split = split_of(processed.group or processed.digest, self.data)
                self._in_train[i].append(document.split == "train")
                if processed.broken is not None:
                    self.broken[i] = f"{self.data.sources[i].label}: {processed.broken}"
            if document.drop is None:
                drawn[i] += processed.size if processed.ids is None else len(processed.ids)
            number += 1
            yield document

    def _went_dry(
        self, i: int, streams: dict[int, Iterator[ProcessedDocument]]
    ) -> dict[int, Iterator[ProcessedDocument]]:
        """Return the streams to go on with when source `i` is exhausted, and note it the first time."""
        label, first = self.data.sources[i].label, i not in self._dry
        self._dry.add(i)
        others = {j: stream for j, stream in streams.items() if j != i}
        if not others or all(j in self._dry for j in others):
            return {}  # every source was read to its end
        if self.data.stopping_strategy == "stop":
            self._note(f"source {label} ran dry: the build stops here, as data.stopping_strategy says")
            return {}
        # a source that broke off is not repeated: that would hide what is missing
        repeat = self.data.stopping_strategy == "repeat" and any(self._in_train[i]) and i not in self.broken
        if first:
            self._note(f"source {label} ran dry: " + ("it is repeated" if repeat else "the others go on without it"))
        return {**others, i: self._repeat(i)} if repeat else others

    def _repeat(self, i: int) -> Iterator[ProcessedDocument]:
        """Read a source once more, and yield those of its documents that are in the training split."""
        label, found = self.data.sources[i].label, False
        self.reads[i] += 1
        try:
            for n, processed in enumerate(self.read(i)):
                if processed.broken is not None:
                    self.broken[i] = f"{label}: {processed.broken}"
                if n < len(self._in_train[i]) and self._in_train[i][n] and processed.drop is None:
                    found = True
                    yield processed
        except DataError as e:
            self.broken[i] = f"{label}: {e}"  # what was read before stays
        if not found:  # without this, the source would be repeated for ever
            self.broken.setdefault(i, f"{label}: in its repetition nothing of it was there any more")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if not self.silent:
            print(text, file=sys.stderr)
