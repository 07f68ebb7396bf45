"""Held-out functions and instructions as problems without tests: what a model writes for them can only be compiled.

    problems = from_documents(run.heldout("val"), tokenizer, 100, n_workers=2)
    problems = from_conversations(run.heldout("val"), tokenizer, 100, mined=True)

A base model is given a signature out of a file that it has not seen; a fine-tuned one an instruction that it has not seen, in
the tokens that it would have been trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from docstrings import pairs_of
from examples import PROMPT, Examples
from extraction import ERRORS
from pool import Lost, map_jobs
from shards import TokenDataset
from tasks import Problem

if TYPE_CHECKING:
    from tokenizer import Tokenizer

LIMIT_S = 10.0  # for parsing one document
PER_DOCUMENT = 3  # functions, so that no file dominates
_SIGNATURE = re.compile(r"^(?:async )?def (\w+)\(.*:$", re.MULTILINE)


def _problem(number: int, name: str, prompt: str, head: str, ids: tuple[int, ...] = ()) -> Problem:
    return Problem(
        benchmark="held-out",
        task_id=f"held-out/{number}",
        entry_point=name,
        prompt=prompt,
        head=head,
        instruction="",
        trusted="",
        tests="",
        solution="",
        remote=(),
        answer_head=head,
        ids=ids,
    )


def _signatures(text: str, slot: int) -> list[tuple[str, str]]:
    """Return the names and signatures of documented functions of a text that is Python."""
    try:
        pairs = pairs_of(text)
    except ERRORS:
        return []
    # no methods: what follows one is further to the left, and still inside its class
    lines = [pair.instruction.rpartition("\n")[2] for pair in pairs if "." not in pair.name]
    found = [(m[1], line) for line in lines if (m := _SIGNATURE.fullmatch(line))]
    return found[:PER_DOCUMENT]


def _documents(dataset: TokenDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts of a split, document by document."""
    piece, start = 2**18, 0
    rest = np.empty(0, dtype=np.int64)
    while start < len(dataset):
        tokens = np.concatenate((rest, dataset.read(start, min(piece, len(dataset) - start))))
        start += piece
        ends = np.flatnonzero(tokens == dataset.manifest["eos_id"])
        parts = np.split(tokens, ends + 1)
        rest = parts.pop()
        yield from (tokenizer.decode([i for i in part[:-1].tolist() if i != tokenizer.bos_id]) for part in parts)


def from_documents(dataset: TokenDataset, tokenizer: Tokenizer, n: int, n_workers: int) -> list[Problem]:
    """Return up to `n` signatures of documented Python functions of a split, at most 3 a document, in its order."""
    problems: list[Problem] = []
    found = map_jobs(_signatures, _documents(dataset, tokenizer), n_workers, LIMIT_S)
    try:
        for signatures in found if n else ():
            for name, line in [] if isinstance(signatures, Lost) else signatures:
                problems.append(_problem(len(problems), name, f"{line}\n", f"{line}\n"))
            if len(problems) >= n:
                break
    finally:
        found.close()
    return problems[:n]


def from_conversations(dataset: Examples, tokenizer: Tokenizer, n: int, mined: bool) -> list[Problem]:
    """Return the first instruction of up to `n` conversations of a split, evenly spaced over it.

    `mined`: they were made from docstrings, and end with the signature whose body is the answer.
    """
    problems = []
    for number in np.linspace(0, dataset.n_examples - 1, min(n, dataset.n_examples)).astype(int).tolist():
        example = dataset.example(number)
        ids = tuple(example.ids[: int(example.segments[0, PROMPT])].tolist())
        text = tokenizer.decode(list(ids))
        signature = list(_SIGNATURE.finditer(text))[-1:] if mined else []
        name, head = (signature[0][1], signature[0][0] + "\n") if signature else ("", "")
        problems.append(_problem(number, name, text, head, ids))
    return problems
