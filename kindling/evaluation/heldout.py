"""Held-out functions and instructions as problems without tests: samples for them are only compiled.

    problems = problems_from_documents(run.heldout("val"), tokenizer, 100, 2, bar.update)
    problems = problems_from_conversations(run.heldout("val"), tokenizer, 100, mined=True, n_workers=2)

A base model gets the signature of a function in a held-out file. A fine-tuned model gets a held-out instruction, as the same
tokens as in training.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kindling.data.docstrings import mine_pairs
from kindling.data.examples import PROMPT, RESPONSE, Examples
from kindling.data.shards import LANGUAGE, TokenDataset
from kindling.evaluation.answer_extraction import extract_from_answer
from kindling.evaluation.extraction import ERRORS, parse_or_none
from kindling.evaluation.tasks import Problem
from kindling.files import UNENCODABLE
from kindling.pool import FailedJob, map_jobs

if TYPE_CHECKING:
    from kindling.tokenization.tokenizer import Tokenizer

FUNCTIONS, INSTRUCTIONS = "held-out functions", "held-out instructions"
LIMIT_S = 10.0  # for parsing one document
PER_DOCUMENT = 3  # functions, so that no file dominates
_SIGNATURE = re.compile(r"^(?:async )?def (\w+)\(.*:$", re.MULTILINE)


def _problem(kind: str, name: str, prompt: str, head: str, ids: tuple[int, ...] = ()) -> Problem:
    digest = hashlib.sha256(
        prompt.encode("utf-8", UNENCODABLE)
    ).hexdigest()  # the same prompt has the same id in every run
    return Problem(
        benchmark=kind,
        task_id=digest[:12],
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
    """Return the names and signatures of the documented functions in Python code; nothing for any other text."""
    try:
        pairs = mine_pairs(text)
    except ERRORS:
        return []
    # no methods: the code after one is further to the left and still inside its class
    lines = [pair.instruction.rpartition("\n")[2] for pair in pairs if "." not in pair.name]
    found = [(m[1], line) for line in lines if (m := _SIGNATURE.fullmatch(line))]
    return found[:PER_DOCUMENT]


def document_texts(dataset: TokenDataset, tokenizer: Tokenizer, language: str | None = None) -> Iterator[str]:
    """Yield the texts of a split's documents: all, or those that may be of a language."""
    table, info = dataset.documents, dataset.info.table
    start = 0
    for number, length in enumerate(dataset.lengths.tolist()):
        start, begin = start + length, start
        own = None if table is None or info is None else info["languages"][table[number, LANGUAGE]]
        if language is None or own in (language, None):
            ids = dataset.read(begin, length - 1).tolist()  # without end of text
            yield tokenizer.decode([i for i in ids if i != tokenizer.bos_id])


def problems_from_documents(
    dataset: TokenDataset, tokenizer: Tokenizer, n: int, n_workers: int, progress: Callable[[int], object]
) -> list[Problem]:
    """Return up to `n` signatures of documented Python functions in a split, at most PER_DOCUMENT of a document, in order.

    `progress` is called with 1 for each.
    """
    problems: dict[str, Problem] = {}  # by task_id: many files have a main()
    found = map_jobs(_signatures, document_texts(dataset, tokenizer, "python"), n_workers, LIMIT_S)
    try:
        for signatures in found if n else ():
            for name, line in [] if isinstance(signatures, FailedJob) else signatures:
                problem = _problem(FUNCTIONS, name, f"{line}\n", f"{line}\n")
                if problem.task_id not in problems and len(problems) < n:
                    problems[problem.task_id] = problem
                    progress(1)
            if len(problems) >= n:
                break
    finally:
        found.close()
    return list(problems.values())


def _is_code(text: str, slot: int) -> bool:
    """Return whether a response, or its code block, is Python that does something."""
    tree = parse_or_none(extract_from_answer("", text, ""))
    nodes = [] if tree is None else tree.body
    return any(not isinstance(n, ast.Expr) or isinstance(n.value, ast.Call) for n in nodes)


def problems_from_conversations(
    dataset: Examples, tokenizer: Tokenizer, n: int, mined: bool, n_workers: int
) -> list[Problem]:
    """Return the first instruction of up to `n` conversations in a split whose response is Python, in order.

    `mined`: they were made from docstrings. An instruction then ends with a signature, and the response is the body.
    """

    def first(number: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation's first prompt and of its response, without end of text."""
        example = dataset.example(number)
        prompt, response = example.segments[0, [PROMPT, RESPONSE]].tolist()
        return example.ids[:prompt].tolist(), example.ids[prompt : prompt + response - 1].tolist()

    problems: list[Problem] = []
    numbers = range(dataset.n_examples if n else 0)
    are_code = map_jobs(_is_code, (tokenizer.decode(first(i)[1]) for i in numbers), n_workers, LIMIT_S)
    try:
        for number, is_code in zip(numbers, itertools.repeat(True) if mined else are_code):
            if is_code is True:
                ids, _ = first(number)
                text = tokenizer.decode(ids)
                signature = list(_SIGNATURE.finditer(text))[-1:] if mined else []
                name, head = (signature[0][1], signature[0][0] + "\n") if signature else ("", "")
                problems.append(_problem(INSTRUCTIONS, name, text, head, tuple(ids)))
            if len(problems) >= n:
                break
    finally:
        are_code.close()
    return problems
