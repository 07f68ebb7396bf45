"""Measures gold bits per byte: how well a model predicts the reference solutions of problems, given their prompts.

    gold_figures(model, tokenizer, load("humaneval"), chat, runtime)["bits_per_byte"]

A small model passes no test for a long time, but this figure moves from the first steps on. It is the loss of all tokens of the
solutions, over the UTF-8 bytes of the solutions. The prompt is the one that the model is asked with. The solution is the same
text for every model: of a prompt that begins a function, the rest of the function; else the whole program. So models are
compared on the same bytes. What ends a solution (end-of-text, the next function) is not predicted.

Where prompt and solution are longer than the context, the prompt loses its beginning. A solution of more than the context is
predicted in parts, each after at least half a context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kindling.evaluation.perplexity import BATCH_ROWS, Row, row_losses
from kindling.evaluation.samples import ChatFormat, merges_newline_with_indent, prompt_ids
from kindling.evaluation.tasks import Problem

if TYPE_CHECKING:
    from kindling.device import Runtime
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

BENCHMARKS = ("problems", "humaneval", "mbpp")  # with examples, MBPP has the same solutions


def solution_of(problem: Problem) -> str:
    """Return the part of the reference that the model is to write, without blank lines around it."""
    return problem.solution.removeprefix(problem.head).strip("\n").rstrip()


def gold_ids(problem: Problem, tokenizer: Tokenizer, chat: ChatFormat | None) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the solution.

    A newline before the solution belongs to the solution's first token where the tokenizer merges it with the indentation.
    """
    prompt, solution = prompt_ids(problem, tokenizer, chat), solution_of(problem)
    merged = merges_newline_with_indent(tokenizer)
    if chat is None:
        return prompt, tokenizer.encode("\n" * merged + solution)
    if chat.docstring_format or not problem.head:
        return prompt, tokenizer.encode(solution)
    head = problem.head.removesuffix("\n") if merged else problem.head  # the answer is a whole function
    return prompt + tokenizer.encode(head), tokenizer.encode("\n" * merged + solution)


def _rows(pairs: Sequence[tuple[list[int], list[int]]], block_size: int) -> Iterator[Row]:
    """Yield rows in which each token of each solution is a target exactly once."""
    for number, (prompt, solution) in enumerate(pairs):
        ids = np.array(prompt + solution, dtype=np.int64)
        step = len(solution) if len(ids) - 1 <= block_size else max(1, block_size // 2)
        for start in range(0, len(solution), step):
            n_targets = min(step, len(solution) - start)
            end = len(prompt) + start + n_targets
            yield Row(number, ids[max(0, end - block_size - 1) : end], n_targets)


def gold_figures(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    chat: ChatFormat | None,
    runtime: Runtime,
    batch_size: int = BATCH_ROWS,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Return the figures of the solutions of one benchmark, as in eval.json. `progress` is told of each batch's tokens."""
    pairs = [gold_ids(problem, tokenizer, chat) for problem in problems]
    nll = [0.0] * len(problems)
    for number, loss in row_losses(model, _rows(pairs, model.cfg.block_size), runtime, batch_size, progress):
        nll[number] += loss
    lines = [[p.task_id, len(solution_of(p).encode("utf-8")), loss] for p, loss in zip(problems, nll)]
    levels = sorted({p.level for p in problems if p.level is not None})
    by_level = {
        str(level): _summary([line for p, line in zip(problems, lines) if p.level == level]) for level in levels
    }
    return _summary(lines) | ({"by_level": by_level} if levels else {})


def _summary(lines: list[list[Any]]) -> dict[str, Any]:
    """Return the figures of these lines, each with the task, the bytes of its solution and its loss in nats."""
    n_bytes, nll = (sum(line[column] for line in lines) for column in (1, 2))
    bits_per_byte = nll / math.log(2) / n_bytes if n_bytes else None
    return {"bits_per_byte": bits_per_byte, "problems": len(lines), "bytes": n_bytes, "losses": lines}
