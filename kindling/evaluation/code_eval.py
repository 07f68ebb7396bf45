"""What a model writes for programming problems, and what comes of it.

    samples = write(model, tokenizer, problems, chat, cfg)
    graded = grade_all(samples, mode, cfg)

A base model continues a prompt; a fine-tuned one answers an instruction in the template of its training. Each sample has a
seed of its own, so that neither the batch nor the other problems change it. A prompt that is too long for the context loses
its beginning, and is counted.

Where a tokenizer joins a newline with the indentation after it, as byte-level BPE does, the model writes the newline at a
prompt's end itself, as the beginning of its first token: behind one that stands alone it has only ever seen the left margin,
and would leave every function empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config import EvalConfig
from kindling.data.prompts import Exchange, encode
from kindling.evaluation.check_correctness import VERDICTS, Graded, Sample, grade
from kindling.evaluation.extraction import end_of_function
from kindling.evaluation.intervals import pass_at_k
from kindling.evaluation.tasks import STOP, Problem
from kindling.pool import Lost, map_jobs
from kindling.sandbox.process import START_S, Limits, Mode

if TYPE_CHECKING:
    import torch

    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel


@dataclass(frozen=True)
class Chat:
    """How a fine-tuned model is asked."""

    template: str
    mined: bool
    """It was fine-tuned on docstrings: it is asked with a task and a signature, and answers with a body."""


@dataclass(frozen=True)
class Written:
    """One sample: the text that a model wrote for a problem, its tokens, and what ended it."""

    problem: Problem
    number: int
    text: str
    ids: list[int]
    cut_short: bool
    cropped: bool
    """The prompt lost its beginning."""


def prompt_ids(problem: Problem, tokenizer: Tokenizer, chat: Chat | None) -> list[int]:
    """Return the tokens that a model is given."""
    if problem.ids:
        return list(problem.ids)
    if chat is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompt = problem.prompt.removesuffix("\n") if joins_newlines(tokenizer) else problem.prompt
        return bos + tokenizer.encode(prompt)
    if chat.mined:
        exchanges = [Exchange(problem.mined_instruction)]
    else:
        exchanges = [Exchange(asked, said) for asked, said in problem.shots] + [Exchange(problem.instruction)]
    segments = encode(chat.template, exchanges, tokenizer)
    return [token for segment in segments for token in (*segment.prompt, *segment.response)]


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[tuple[Problem, int]],
    chat: Chat | None,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None = None,
) -> list[Written]:
    """Return samples of the problems, each as many as stands beside it.

    `progress` is told of each sample that is done.
    """
    from kindling.generation.decoding import generate_batch
    from kindling.generation.sampling import Sampling

    block_size = model.cfg.block_size
    longest = block_size - min(cfg.max_new_tokens, block_size // 2)
    whole = [prompt_ids(problem, tokenizer, chat) for problem, _ in problems]
    order = [
        (i, number)
        for i in sorted(range(len(problems)), key=lambda i: len(whole[i]), reverse=True)
        for number in range(problems[i][1])
    ]
    prompts = [whole[i][-longest:] for i, _ in order]
    seeds = [_seed(cfg.seed, problems[i][0], number) for i, number in order]
    own_newline = chat is None and joins_newlines(tokenizer)

    def said(ids: list[int]) -> str:
        text = tokenizer.decode(ids)
        return text.removeprefix("\n") if own_newline else text

    def finished(row: int, ids: list[int]) -> bool:
        return chat is None and _is_over(problems[order[row][0]][0], said(ids))

    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, None, cfg.top_p, seed=0)
    newline = newline_tokens(tokenizer, model.cfg.vocab_size) if own_newline else None
    eos_id = tokenizer.eos_id
    outputs = generate_batch(model, prompts, sampling, eos_id, seeds, cfg.batch_size, finished, progress, newline)
    written = {}
    for (i, number), ids, prompt in zip(order, outputs, prompts):
        problem = problems[i][0]
        text = said(ids)
        limit = min(cfg.max_new_tokens, block_size - len(prompt))
        if chat is None:
            text = _without_next(problem, text)
        written[i, number] = Written(problem, number, text, ids, len(ids) >= limit, len(whole[i]) > longest)
    return [written[key] for key in sorted(written)]


def joins_newlines(tokenizer: Tokenizer) -> bool:
    """Return whether a newline at a line's end is another token, or part of one, where indentation follows."""
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
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:7], "little")


def _without_next(problem: Problem, text: str) -> str:
    """Return the text up to what closes an example, where examples were shown."""
    return text.partition(STOP)[0] if problem.shots else text


def _is_over(problem: Problem, text: str) -> bool:
    """Return whether the program that was asked for has ended, so that the rest need not be written."""
    if _without_next(problem, text) != text:
        return True
    return end_of_function(problem.head + text, len(problem.head), problem.entry_point) is not None


def limits_of(cfg: EvalConfig) -> Limits:
    """Return what a program may use."""
    return Limits(cfg.cpu_s, 2.0 * cfg.cpu_s + 8, cfg.memory_mb * 2**20)


def grade_all(
    written: Sequence[Written],
    chat: Chat | None,
    mode: Mode,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None = None,
) -> list[Graded]:
    """Return what came of each sample; the same text for the same problem is judged once."""
    limits = limits_of(cfg)
    unique = {
        (w.problem.benchmark, w.problem.task_id, w.text, w.cut_short): Sample(
            w.problem, w.text, chat is not None, w.cut_short, mode, limits
        )
        for w in written
    }
    results: dict[Any, Graded] = {}
    jobs: Iterator[Any] = map_jobs(grade, unique.values(), cfg.n_workers, limits.wall_s + START_S + 10)
    for key, result in zip(unique, jobs):
        if isinstance(result, Lost):  # the text, or an answer, was too much for the process that judges
            verdict = "timeout" if result.reason == "timeout" else "exception"
            result = Graded(key[2], verdict, f"while judging it: {result.reason}", False, False)
        results[key] = result
        if progress is not None:
            progress(1)
    return [results[w.problem.benchmark, w.problem.task_id, w.text, w.cut_short] for w in written]


def summary(written: Sequence[Written], graded: Sequence[Graded], mode: Mode) -> dict[str, Any]:
    """Return the figures of one benchmark's samples."""
    counts: dict[str, list[int]] = {}
    levels: dict[str, str] = {}
    for w, g in zip(written, graded):
        n_c = counts.setdefault(w.problem.task_id, [0, 0])
        n_c[0] += 1
        n_c[1] += g.verdict == "passed"
        if w.problem.level is not None:
            levels[w.problem.task_id] = str(w.problem.level)
    fewest = min((n for n, _ in counts.values()), default=0)

    def pass_at(tasks: Sequence[str]) -> dict[str, float]:
        ks = [k for k in (1, 5, 10, 100) if k <= fewest]
        return {str(k): float(sum(pass_at_k(*counts[t], k) for t in tasks) / len(tasks)) for k in ks}

    out: dict[str, Any] = {
        "problems": len(counts),
        "samples_per_problem": fewest,
        "pass_at": pass_at(list(counts)) if counts else {},
        "verdicts": {v: sum(g.verdict == v for g in graded) for v in VERDICTS},
        "cropped": len({w.problem.task_id for w in written if w.cropped}),
        "sandbox": mode,
        "counts": [[task, n, c] for task, (n, c) in counts.items()],
    }
    if levels:
        groups = {level: [t for t in counts if levels[t] == level] for level in sorted(set(levels.values()))}
        out["by_level"] = {level: {"problems": len(ts), "pass_at": pass_at(ts)} for level, ts in groups.items()}
    return out


def syntax(written: Sequence[Written], graded: Sequence[Graded], python: str) -> dict[str, Any]:
    """Return how much of what was written compiles, in all, by what was prompted with, and by prompt."""

    def rates(items: Sequence[Graded]) -> dict[str, int]:
        return {
            "samples": len(items),
            "passes": sum(g.compiles for g in items),
            "non_trivial": sum(g.non_trivial for g in items),
        }

    groups: dict[str, dict[str, list[Graded]]] = {}
    for w, g in zip(written, graded):
        groups.setdefault(w.problem.benchmark, {}).setdefault(w.problem.task_id, []).append(g)
    by_prompt = {}
    for name, tasks in groups.items():
        counts = [[task, *rates(items).values()] for task, items in tasks.items()]
        by_prompt[name] = {**rates([g for items in tasks.values() for g in items]), "counts": counts}
    return {**rates(graded), "python": python, "by_prompt": by_prompt}
