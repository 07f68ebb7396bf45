"""The texts of a study that no training reads: a file for each domain, written before the first step.

    write_held_out(inputs)      # heldout/prose.jsonl, heldout/python.jsonl, ... and heldout/about.json

Two things keep them out. First, of this machine's Python they are from packages whose names begin with an h, which the training
sources of `trained` do not read; of made-up sums, one of 20 is only among them. Second, every build of the study has the files
in data.decontaminate, and drops each document that has 13 words in a row in common with one. Of a file that a user named, one
document of 20 is taken, and only if the second keeps it out.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from config import SourceConfig
from kindling.data.conversations import conversation_text
from kindling.data.decontamination import Benchmarks
from kindling.data.docstrings import Pair, mine_pairs
from kindling.data.duplicates import word_hashes
from kindling.data.prompts import Exchange, prompt_text
from kindling.data.sources import Document, documents, local_files
from kindling.errors import KindlingError
from kindling.files import write_atomic, write_json
from kindling.studies.inputs import Inputs, prose_of_docstrings, sums

FOLDER, ABOUT = "heldout", "about.json"
DOMAINS = ("prose", "python", "mathematics", "questions", "instructions")
FILES = tuple(f"{FOLDER}/{domain}.jsonl" for domain in DOMAINS)
BYTES = 40_000  # of each domain, about
CHARS = 3_000  # of a document of code, at most
FEWEST = 6  # documents: fewer have no interval
ONE_OF = 20  # documents of a user's file
OURS, TRAINED = (
    ("h*.py",),
    ("[!h]*.py",),
)  # patterns of this machine's Python: of these texts, and of the training sources
TEMPLATE = "user-assistant"  # of the project's stage 4

Rows = Iterator[dict[str, str]]  # with a column text; what a build sees of a conversation is in the others


def trained(inputs: Inputs) -> Inputs:
    """Return the inputs whose sources do not read what these texts are from."""
    return replace(inputs, globs=TRAINED)


def write_held_out(inputs: Inputs) -> None:
    """Write the files of all domains, unless they are there. Raises KindlingError for a user's file with too few documents."""
    folder = inputs.folder / FOLDER
    if (folder / ABOUT).is_file():  # written last; the packages of this machine may have changed since
        return
    print("writing the texts that are held out of all stages, once ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    for domain in DOMAINS:
        given = None if domain == "questions" else getattr(inputs, "code" if domain == "python" else domain)
        path = folder / f"{domain}.jsonl"
        rows = _within(_stand_in(domain) if given is None else _of_user(_source(domain, inputs)))
        _write(path, rows)
        if given is not None:
            rows = _kept_out(path, rows)
            if len(rows) < FEWEST:
                raise KindlingError(
                    f"{given} must have at least {FEWEST * ONE_OF} documents of some length, as one of {ONE_OF} is held out, "
                    f"but has too few; give another file"
                )
            _write(path, rows)
        about[domain] = _said(domain, given, inputs.preset)
    write_json(folder / ABOUT, about)


def read_about(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each domain's file: from, kept_out, documents and bytes; empty before they are written."""
    try:
        about = json.loads((folder / FOLDER / ABOUT).read_text(encoding="utf-8"))
        for domain, known in about.items():
            lines = (folder / FOLDER / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["text"] for line in lines]
            known |= {"documents": len(texts), "bytes": sum(len(text.encode("utf-8")) for text in texts)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(about)


def _said(domain: str, given: Path | None, preset: bool) -> dict[str, str]:
    """Return where a domain's texts are from, and what keeps them out of training besides the search for 13 words in a row."""
    if given is not None:
        return {"from": f"one document of {ONE_OF} of {given.name}", "kept_out": "dropped by each build"}
    if domain == "mathematics":
        return {
            "from": "sums that were made up",
            "kept_out": "no stage reads them" if preset else "other sums are made up for it",
        }
    parts = {
        "prose": "their docstrings", "python": "their code", "questions": "what their functions do",
        "instructions": "their functions, by their docstrings",
    }  # fmt: skip
    source = f"this machine's Python packages with an h: {parts[domain]}"
    return {"from": source, "kept_out": "not by its source" if preset else "no source reads these packages"}


def _stand_in(domain: str) -> Rows:
    """Yield the rows of a domain from what is on this machine, or made up."""
    if domain == "prose":
        yield from ({"text": text} for text in prose_of_docstrings([], OURS))
    elif domain == "mathematics":
        yield from ({"text": text} for text in sums(1, held_out=True))
    elif domain == "python":
        yield from _of_documents(SourceConfig(kind="local-python", globs=OURS))
    else:  # every second function each, so that no two files have the same
        for pair in islice(_functions(), int(domain == "instructions"), None, 2):
            task, signature = pair.instruction.split("\n", 1)
            if domain == "questions":
                yield {"text": f"Question: What does this function do?\n{signature}\nAnswer: {task}"}
            else:
                yield _of_exchange(Exchange(pair.instruction, pair.response))


def _functions() -> Iterator[Pair]:
    for file in local_files(SourceConfig(kind="local-python", globs=OURS)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from mine_pairs(file.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue


def _source(domain: str, inputs: Inputs) -> SourceConfig:
    """Return the source of the file that a user named for a domain."""
    made = {"prose": inputs.prose_source, "python": inputs.code_source, "mathematics": inputs.mathematics_source,
            "instructions": inputs.instructions_source}  # fmt: skip
    return replace(made[domain](1_000_000).source, max_bytes=None)


def _of_user(source: SourceConfig) -> Rows:
    """Yield one document of ONE_OF, chosen by a hash of its text."""
    for row in _of_documents(source):
        if hashlib.sha256(row["text"].encode("utf-8", "replace")).digest()[0] % ONE_OF == 0:
            yield row


def _of_documents(source: SourceConfig) -> Rows:
    for document in documents(source, local_files(source)):
        if document.exchanges:
            yield _of_exchange(document.exchanges[0])
        elif text := _text(document):
            yield {"text": text}


def _text(document: Document) -> str:
    """Return a document's text. Of a file it begins with the first definition: licences and imports are in many packages."""
    if document.path is None:
        return document.text or ""
    try:
        text = document.path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "async def "))), 0)
    text = "".join(lines[first:])
    return text if len(text) <= CHARS else text[: text.rfind("\n", 0, CHARS) + 1] or text[:CHARS]


def _of_exchange(exchange: Exchange) -> dict[str, str]:
    return {"text": prompt_text(TEMPLATE, exchange) + exchange.response, "plain": conversation_text((exchange,))}


def _within(rows: Rows) -> list[dict[str, str]]:
    """Return rows until they have BYTES."""
    found, size = [], 0
    for row in rows:
        if size >= BYTES:
            break
        found.append(row)
        size += len(row["text"].encode("utf-8", "replace"))
    return found


def _kept_out(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows that a build with this file in data.decontaminate drops."""
    benchmarks = Benchmarks((str(path),))
    texts = [row.get("plain", row["text"]) for row in rows]
    return [row for row, text in zip(rows, texts) if benchmarks.find(text, word_hashes(text)) is not None]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
