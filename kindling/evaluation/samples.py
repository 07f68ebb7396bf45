"""Generates samples of code for programming problems.

    samples = write(model, tokenizer, [(problem, 5)], chat, cfg)
    samples[0].text

A base model continues a prompt; a fine-tuned model answers an instruction in the template of its training. Each sample has
its own seed, so it depends neither on the batch nor on the other problems. A prompt that is too long for the context is
cropped from the left, and counted.

Byte-level BPE merges a newline with the indentation after it. So in training, text after a single newline token always begins
at the left margin, and a prompt that ends in one would give empty functions. Therefore the last newline is removed from the
prompt, and the first new token must begin with a newline.

A line to be filled in ends at its newline. With its suffix, the prompt has the control tokens of fill-in-the-middle (PSM).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kindling.data.prompts import Exchange, encode, flatten
from kindling.evaluation.extraction import end_of_function
from kindling.evaluation.tasks import STOP, Problem
from kindling.tokenization.infilling import encode_infill

if TYPE_CHECKING:
    import torch

    from config import EvalConfig
    from kindling.generation.decoding import Row
    from kindling.generation.sampling import Sampling
    from kindling.generation.text_stream import EndIds
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

TOKENS_OF_LINE = (
    64  # most new tokens of a line to be filled in; of a small context, an eighth. 1.3% of HumanEval's have over 32
)


@dataclass(frozen=True)
class ChatFormat:
    """How to prompt a fine-tuned model."""

    template: str
    docstring_format: bool
    """It was fine-tuned on docstrings: a prompt is a task and a signature, and the answer is the body of the function."""


@dataclass(frozen=True)
class Sample:
    """One sample: the text that a model wrote for a problem, and its token ids."""

    problem: Problem
    number: int
    text: str
    ids: list[int]
    cut_short: bool
    """A limit ended it."""
    cropped: bool
    """The prompt lost its beginning."""


def prompt_ids(problem: Problem, tokenizer: Tokenizer, chat: ChatFormat | None) -> list[int]:
    """Return the prompt of a problem as token ids. A line is filled in without a template, also by a fine-tuned model."""
    if problem.ids:
        return list(problem.ids)
    if problem.suffix is not None:
        # with the suffix first, as serve.py asks: so the model goes on from the prompt, as it does without a suffix
        return encode_infill(tokenizer, without_newline(problem, tokenizer), problem.suffix, spm=True)
    if chat is None or problem.after is not None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return bos + tokenizer.encode(without_newline(problem, tokenizer))
    if chat.docstring_format:
        exchanges = [Exchange(problem.mined_instruction)]
    else:
        exchanges = [Exchange(asked, said) for asked, said in problem.shots] + [Exchange(problem.instruction)]
    return flatten(encode(chat.template, exchanges, tokenizer))


def without_newline(problem: Problem, tokenizer: Tokenizer) -> str:
    """Return the prompt of a problem without the newline at its end, if that is to be part of the model's first token."""
    return problem.prompt.removesuffix("\n") if merges_newline_with_indent(tokenizer) else problem.prompt


def prompts_too_long(
    problems: Sequence[Problem], tokenizer: Tokenizer, chat: ChatFormat | None, block_size: int, cfg: EvalConfig
) -> str:
    """Return why the prompts of a benchmark do not fit into the context; empty if at least half of them do.

    Of a cropped prompt the model sees only the end, often without the task. So figures on such prompts would say nothing.
    """
    longest = longest_prompt_of(problems[0], block_size, cfg) if problems else block_size
    n = sum(len(prompt_ids(problem, tokenizer, chat)) > longest for problem in problems)
    if 2 * n <= len(problems):
        return ""
    room = f"{longest:,} tokens, beside {block_size - longest:,} new ones"
    return f"{n:,} of {len(problems):,} prompts do not fit into the model's context of {block_size:,} ({room})"


def n_new_tokens(problem: Problem, block_size: int, cfg: EvalConfig) -> int:
    """Return the most new tokens of a sample: a line needs fewer than a program, and must leave room for both sides of it."""
    if problem.after is None:
        return cfg.max_new_tokens
    return min(cfg.max_new_tokens, TOKENS_OF_LINE, max(1, block_size // 8))


def longest_prompt_of(problem: Problem, block_size: int, cfg: EvalConfig) -> int:
    """Return how many tokens a prompt may have, so that the new tokens fit after it."""
    from kindling.generation.healing import longest_prompt

    return longest_prompt(block_size, n_new_tokens(problem, block_size, cfg))


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[tuple[Problem, int]],
    chat: ChatFormat | None,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None = None,
) -> list[Sample]:
    """Return the samples, in the order of the problems. Each problem comes with its number of samples.

    `progress` is called with 1 after each sample. If the memory of the device has no room for `cfg.batch_size` samples at a
    time, fewer are generated at a time, which changes none of them.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}  # problems that are asked in the same way
    for i, (problem, _) in enumerate(problems):
        kinds.setdefault((problem.after is not None, problem.suffix is not None), []).append(i)
    samples: dict[tuple[int, int], Sample] = {}
    for (is_line, _), numbers in kinds.items():
        asked = [problems[i] for i in numbers]
        written = _write_alike(model, tokenizer, asked, None if is_line else chat, cfg, progress)
        samples |= {(numbers[i], number): sample for (i, number), sample in written.items()}
    return [samples[key] for key in sorted(samples)]


def _write_alike(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[tuple[Problem, int]],
    chat: ChatFormat | None,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None,
) -> dict[tuple[int, int], Sample]:
    """Return the samples of problems that are asked in the same way, by the place of the problem and the sample's number."""
    from kindling.generation.sampling import Sampling

    first = problems[0][0]
    longest = longest_prompt_of(first, model.cfg.block_size, cfg)
    whole = [prompt_ids(problem, tokenizer, chat) for problem, _ in problems]
    order = [
        (i, number)
        for i in sorted(range(len(problems)), key=lambda i: len(whole[i]), reverse=True)
        for number in range(problems[i][1])
    ]
    prompts = [_cropped(problems[i][0], whole[i], tokenizer, longest) for i, _ in order]
    seeds = [_seed(cfg.seed, problems[i][0], number) for i, number in order]
    sampling = Sampling(n_new_tokens(first, model.cfg.block_size, cfg), cfg.temperature, None, cfg.top_p, seed=0)
    own_newline = chat is None and merges_newline_with_indent(tokenizer)
    begins = newline_tokens(tokenizer, model.cfg.vocab_size) if own_newline else None
    samples = {}
    # each row comes again after every few tokens; it goes on until `row.ended` is set, here or by the end of text
    for place, row in _rows_in_memory(model, prompts, sampling, tokenizer.end_ids, seeds, cfg.batch_size, begins):
        i, number = order[place]
        problem, text = problems[i][0], tokenizer.decode(row.out)
        text, complete = what_counts(problem, text.removeprefix("\n") if own_newline else text, chat is not None)
        row.ended = row.ended or complete
        if row.ended:
            cut_short, cropped = len(row.out) >= row.limit, len(whole[i]) > longest
            samples[i, number] = Sample(problem, number, text, row.out, cut_short, cropped)
            if progress is not None:
                progress(1)
    return samples


def what_counts(problem: Problem, text: str, is_answer: bool) -> tuple[str, bool]:
    """Return what counts of a text that a model has written so far, and whether it is complete without an end of text.

    A line ends at its newline; a base model's program at the marker of the next example, or where its function is complete.
    """
    if problem.after is not None:
        line, newline, _ = text.partition("\n")
        return line, bool(newline)
    if is_answer:
        return text, False
    text, marker, _ = text.partition(STOP) if problem.shots else (text, "", "")
    end = end_of_function(problem.head + text, len(problem.head), problem.entry_point)
    return text, bool(marker) or end is not None


def _cropped(problem: Problem, ids: list[int], tokenizer: Tokenizer, longest: int) -> list[int]:
    """Return a prompt of at most `longest` tokens: its end, or what is nearest to the line that is filled in."""
    if problem.suffix is None or len(ids) <= longest:
        return ids[-longest:]
    from kindling.evaluation.infill import prompt_around

    return prompt_around(tokenizer, without_newline(problem, tokenizer), problem.suffix, longest, spm=True)


def _rows_in_memory(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    eos_id: EndIds,
    seeds: Sequence[int],
    n_rows: int,
    begins: torch.Tensor | None,
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of `decoding.stream_batch`, each with the number of its prompt.

    When memory runs out, the prompts that have not ended begin again, half as many at a time. Raises the error for lack of
    memory if one alone does not fit.
    """
    from kindling import device
    from kindling.generation.decoding import stream_batch

    left = list(range(len(prompts)))
    while left:
        numbers, ended = left, set()
        rows = stream_batch(
            model, [prompts[n] for n in numbers], sampling, eos_id, [seeds[n] for n in numbers], n_rows, begins
        )
        try:
            for row in rows:
                yield numbers[row.number], row
                if row.ended:
                    ended.add(numbers[row.number])
        except RuntimeError as e:
            if n_rows == 1 or not device.is_out_of_memory(e):
                raise
        left = [n for n in numbers if n not in ended]
        if left:
            del rows
            device.release_memory(model.head.weight.device)
            n_rows = max(1, n_rows // 2)
            print(f"note: memory has no room for more samples at a time: from here on {n_rows}", file=sys.stderr)


def merges_newline_with_indent(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer merges a newline with the indentation after it."""
    line = tokenizer.encode("def f(x):\n")
    return tokenizer.encode("def f(x):\n    return x")[: len(line)] != line


def newline_tokens(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Return which tokens begin with a newline, (vocab_size,) bool."""
    import torch

    begins = torch.zeros(vocab_size, dtype=torch.bool)
    for token in range(tokenizer.vocab_size):
        begins[token] = tokenizer.decode([token]).startswith("\n")
    return begins


def _seed(seed: int, problem: Problem, number: int) -> int:
    name = f"{seed}/{problem.benchmark}/{problem.task_id}/{number}"
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:7], "little")
