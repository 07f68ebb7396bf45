"""The ledger: counts of what was read, dropped, changed and kept, and a log of all documents.

`ledger.json` of a data folder holds the counts by source and language. `documents.jsonl.gz` has a line for each document
in the order of reading: which rule dropped it and why, or its split and the position of its tokens. So every dropped file
can be explained, and every token traced to its file:

    python data_pipeline.py --explain PATH
    python data_pipeline.py --locate train:123456
"""

from __future__ import annotations

import gzip
import io
import json
import platform
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kindling.data.infilling import KINDS
from kindling.data.shards import DataError, repair_advice
from kindling.files import UNENCODABLE, write_json

DOCUMENTS = "documents.jsonl.gz"
MATCHES = 20  # --explain shows at most this many documents


class Ledger:
    """Counts documents and bytes. In each row and in total, read = dropped + kept + the bytes that were cut off.

    A row is a source and a language. Repetitions in a mixture are counted separately, because they were read only once.
    """

    def __init__(self, labels: list[str], weights: list[float]):
        self.labels, self.weights = labels, weights
        self.rows: dict[tuple[int, str], dict[str, Any]] = {}
        self.notes: list[str] = []  # about whole sources

    @staticmethod
    def read(folder: Path) -> Ledger:
        """Return the ledger that `write` wrote."""
        content = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        labels = [s["source"] for s in content["sources"]]
        ledger = Ledger(labels, [s["wanted"] for s in content["sources"]])
        for number, row in enumerate(content["rows"]):
            ledger.rows[number, row["language"]] = row
        ledger.notes = content["notes"]
        return ledger

    def row(self, source: int, language: str) -> dict[str, Any]:
        """Return the counters of one source and language."""
        empty = {"read": [0, 0], "dropped": {}, "changed": {}, "kept": [0, 0], "repeated": [0, 0], "tokens": 0}
        return self.rows.setdefault((source, language), {"source": self.labels[source], "language": language, **empty})

    def drop(self, source: int, language: str, size: int, rule: str) -> None:
        """Count a document of `size` bytes as dropped by `rule`."""
        row = self.row(source, language)
        _count(row["read"], size)
        _count(row["dropped"].setdefault(rule, [0, 0]), size)

    def keep(
        self, source: int, language: str, size: int, changes: tuple[tuple[str, int], ...], tokens: int, again: bool
    ) -> int:
        """Count a document of `size` bytes as kept, or with `again` as repeated; return the number of bytes kept."""
        row, kept = self.row(source, language), size - sum(cut for _, cut in changes)
        row["tokens"] += tokens
        _count(row["repeated" if again else "kept"], kept)
        if not again:
            _count(row["read"], size)
            for change, cut in changes:
                _count(row["changed"].setdefault(change, [0, 0]), cut)
        return kept

    def count_pieces(self, source: int, language: str, kinds: Iterable[str]) -> None:
        """Count the pieces of a training document, by their kind."""
        pieces = self.row(source, language).setdefault("pieces", {})
        for kind in kinds:
            pieces[kind] = pieces.get(kind, 0) + 1

    def pieces(self, kind: str) -> int:
        """Return the number of pieces of a kind in training, repetitions included."""
        return sum(r.get("pieces", {}).get(kind, 0) for r in self.rows.values())

    def total(self, column: str, name: str | None = None) -> tuple[int, int]:
        """Return documents and bytes of a column over all rows; `name` is the rule or the change."""
        counters = [r[column] if name is None else r[column].get(name, [0, 0]) for r in self.rows.values()]
        return sum(c[0] for c in counters), sum(c[1] for c in counters)

    def names(self, column: str) -> list[str]:
        """Return the names of the rules or changes that occurred, the most frequent first."""
        found = dict.fromkeys(name for r in self.rows.values() for name in r[column])
        return sorted(found, key=lambda name: (-self.total(column, name)[0], name))

    def totals(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the totals of read, dropped, changed and kept, and of repeated if there are any, in this order."""
        out = [("read", self.total("read"))]
        out += [(f"dropped: {rule}", self.total("dropped", rule)) for rule in self.names("dropped")]
        out += [(change, self.total("changed", change)) for change in self.names("changed")]
        out.append(("kept", self.total("kept")))
        return out + ([("repeated", self.total("repeated"))] if self.total("repeated")[0] else [])

    def table(self) -> str:
        """Return the total counts, then the counts by source and language if there are several, as a table."""
        lines = [(label if label in ("read", "kept") else f"  {label}", n, b) for label, (n, b) in self.totals()]
        out = [f"{'':<32}{'documents':>12}{'MB':>10}"]
        out += [f"{label:<32}{n:>12,}{b / 1e6:>10.2f}" for label, n, b in lines]
        out += [f"{'  pieces: ' + kind:<32}{n:>12,}" for kind in KINDS if (n := self.pieces(kind))]
        return "\n".join(out + (self._by_source() if len(self.rows) > 1 else []) + self.notes)

    def _tokens(self) -> list[int]:
        """Return the tokens drawn from each source, repetitions included."""
        return [
            sum(r["tokens"] for (i, _), r in self.rows.items() if i == source) for source in range(len(self.labels))
        ]

    def _by_source(self) -> list[str]:
        by_source, weight = self._tokens(), sum(self.weights)
        tokens = max(1, sum(by_source))
        width = max(30, max(len(f"{r['source']}, {r['language']}") for r in self.rows.values()) + 2)
        head = ("read", "MB", "kept", "MB", "tokens", "share")
        out = [
            "",
            f"{'by source and language':<{width}}" + "".join(f"{h:>{w}}" for h, w in zip(head, (9, 9, 9, 9, 14, 8))),
        ]
        for source, label in enumerate(self.labels):
            rows = sorted((r for (i, _), r in self.rows.items() if i == source), key=lambda r: -r["tokens"])
            for r in rows:
                out.append(
                    f"{label + ', ' + r['language']:<{width}}{r['read'][0]:>9,}{r['read'][1] / 1e6:>9.2f}{r['kept'][0]:>9,}"
                    f"{r['kept'][1] / 1e6:>9.2f}{r['tokens']:>14,}{r['tokens'] / tokens:>8.1%}"
                )
            if len(self.labels) > 1:
                out.append(
                    f"  {label}: {by_source[source] / tokens:.1%} of the tokens, {self.weights[source] / weight:.1%} wanted"
                )
        return out

    def write(self, folder: Path) -> None:
        """Write `ledger.json`."""
        # Python's version is noted because it decides which code compile() accepts
        tokens = self._tokens()
        sources = [
            {"source": label, "wanted": weight / sum(self.weights), "share": n / max(1, sum(tokens)), "tokens": n}
            for label, weight, n in zip(self.labels, self.weights, tokens)
        ]
        content = {"python": platform.python_version(), "notes": self.notes, "sources": sources}
        content["rows"] = list(self.rows.values())
        write_json(folder / "ledger.json", content)


def _count(counter: list[int], size: int) -> None:
    counter[0] += 1
    counter[1] += size


class DocumentLog:
    """Writes `documents.jsonl.gz` during a build; the same documents give the same bytes."""

    def __init__(self, folder: Path):
        self._raw = open(folder / DOCUMENTS, "wb")
        # no file name and no time in the header, so that the bytes are always the same
        packed = gzip.GzipFile(filename="", mode="wb", compresslevel=5, fileobj=self._raw, mtime=0)
        self._lines: IO[str] = io.TextIOWrapper(packed, encoding="utf-8", errors=UNENCODABLE, newline="\n")
        self._packed = packed

    def write(self, **line: Any) -> None:
        """Append the line of the next document."""
        self._lines.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._lines.close()
        self._packed.close()
        self._raw.close()


def read_documents(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a folder's document log; raises DataError if it is missing or damaged."""
    path = folder / DOCUMENTS
    try:
        if not path.stat().st_size:  # gzip accepts an empty file
            raise EOFError("it is empty")
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for line in f:
                yield json.loads(line)
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise DataError(f"{path} must be a whole log of documents, but is not ({e}); {repair_advice(folder)}") from None


def explain(folder: Path, keys: set[str], ending: str = "") -> list[str]:
    """Return one line for each document whose key is among `keys`, or ends with `ending` after / or a colon.

    For an example, the key of its file counts too.
    """
    found: list[dict[str, Any]] = []
    repeated: dict[str, int] = {}
    for line in read_documents(folder):
        key = line["key"]
        names = (key, key.partition(":")[0])  # the key of an example, and the key of its file
        if any(n in keys or (ending and (n == ending or n.endswith(("/" + ending, ":" + ending)))) for n in names):
            if "repeated" in line:
                repeated[key] = repeated.get(key, 0) + 1
            else:
                found.append(line)
    wanted = {line["of"] for line in found if "of" in line}
    originals = {n: x["key"] for n, x in enumerate(read_documents(folder)) if n in wanted} if wanted else {}
    out = [_paragraph(line, originals, repeated.get(line["key"], 0)) for line in found[:MATCHES]]
    return out + ([f"... and {len(found) - MATCHES} more; name more of the path"] if len(found) > MATCHES else [])


def _paragraph(line: dict[str, Any], originals: dict[int, str], repeated: int) -> str:
    text = f"{line['key']} ({line['source']}, {line['language']}, {line['bytes']:,} bytes): "
    if "dropped" in line:
        text += f"dropped by the rule {line['dropped']!r}: {line['value']}"
    else:
        text += (
            f"kept, in the {line['split']} split, tokens {line['start']:,} to {line['start'] + line['tokens'] - 1:,}"
        )
    if repeated:
        text += f", and {repeated} times more in a repetition of its source"
    if line.get("changes"):
        text += "; " + ", ".join(f"{name} ({cut:,} bytes)" if cut else name for name, cut in line["changes"])
    if "of" in line:
        text += f" {originals[line['of']]}"
    return text


def documents_within(folder: Path, split: str, tokens: list[range]) -> list[list[dict[str, Any]]]:
    """Return, for each range of positions in a split, the log lines of the documents in that range, in their order.

    Reads the log once, at about 200,000 lines a second; raises DataError if it is missing or damaged.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in tokens]
    waiting = deque(sorted(enumerate(tokens), key=lambda numbered: numbered[1].start))
    reached: list[tuple[int, range]] = []  # the ranges that have begun and not ended yet
    for line in read_documents(folder):
        if line.get("split") != split:
            continue
        stop = line["start"] + line["tokens"]  # where the split's next document starts
        while waiting and waiting[0][1].start < stop:
            reached.append(waiting.popleft())
        for number, _ in reached:
            found[number].append(line)
        reached = [(number, span) for number, span in reached if span.stop > stop]
        if not waiting and not reached:
            break
    return found


def locate(folder: Path, split: str, position: int) -> dict[str, Any]:
    """Return the log line of the document with the token at `position` of a split; raises DataError if there is none."""
    end = 0
    for line in read_documents(folder):
        if line.get("split") == split:
            end = line["start"] + line["tokens"]
            if position < end:
                return line
    raise DataError(
        f"a position in the {split} split must be 0 to {end - 1:,}, but is {position:,}; name another with --locate {split}:N"
    )
