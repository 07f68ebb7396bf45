"""Evaluates generated code step by step: problems, samples, verdicts and figures.

    code = evaluate_code(model, tokenizer, heldout, chat, {"humaneval": 5}, "bwrap", cfg)
    code.figures["functional"]["humaneval"]["pass_at"]["1"]

The figures on syntax are about all samples, those on functional correctness only about samples of benchmarks, which are run.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import EvalConfig
from kindling.data.examples import Examples
from kindling.data.shards import TokenDataset
from kindling.distributed import SINGLE_PROCESS, World
from kindling.evaluation.check_correctness import VERDICTS, GradedSample, When, check_samples
from kindling.evaluation.heldout import FUNCTIONS, INSTRUCTIONS, problems_from_conversations, problems_from_documents
from kindling.evaluation.intervals import pass_at_k
from kindling.evaluation.progress import progress_bar
from kindling.evaluation.references import left_out_problems
from kindling.evaluation.report import describe_left_out
from kindling.evaluation.results_file import file_name
from kindling.evaluation.samples import ChatFormat, Sample, prompts_too_long, write
from kindling.evaluation.tasks import Problem, load, source_of
from kindling.files import write_atomic

if TYPE_CHECKING:
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

LeftOut = Mapping[str, Mapping[str, str]]
"""Problems that are not counted: by benchmark and task, each with the reason."""


@dataclass(frozen=True)
class Chosen:
    """What is asked: problems with their numbers of samples, and what is not asked, with the reasons."""

    problems: list[tuple[Problem, int]]
    left_out: LeftOut
    skipped: dict[str, dict[str, str]]
    """The figures of benchmarks that are skipped as a whole, because their prompts do not fit into the context."""


@dataclass(frozen=True)
class CodeResults:
    """The samples of all ranks, their verdicts in the same order, and the figures."""

    samples: list[Sample]
    graded: list[GradedSample]
    figures: dict[str, Any] = field(default_factory=dict)


def evaluate_code(
    model: LanguageModel,
    tokenizer: Tokenizer,
    heldout: TokenDataset | None,
    chat: ChatFormat | None,
    benchmarks: dict[str, int],
    mode: When,
    cfg: EvalConfig,
    world: World = SINGLE_PROCESS,
) -> CodeResults:
    """Generate samples on all ranks and grade them on the main rank; the other ranks return no verdicts.

    `benchmarks` gives the number of samples for each problem of a benchmark. Held-out problems get one sample each; of a model
    of others nothing is held out.
    """
    block_size = model.cfg.block_size
    chosen = world.on_main(lambda: select_problems(heldout, tokenizer, chat, block_size, benchmarks, mode, cfg))
    problems, n_samples = chosen.problems, sum(count for _, count in chosen.problems)
    if not problems:
        return CodeResults([], [], {"functional": chosen.skipped} if chosen.skipped else {})
    own = problems[world.rank :: world.size]
    with progress_bar("writing samples", sum(count for _, count in own), "sample", world.main) as bar:
        parts = [iter(part) for part in world.gather(write(model, tokenizer, own, chat, cfg, bar.update))]
    samples = [next(parts[i % world.size]) for i, (_, count) in enumerate(problems) for _ in range(count)]
    if not world.main:
        return CodeResults(samples, [])
    with progress_bar("running samples", n_samples, "sample") as bar:
        graded = check_samples(samples, chat, mode, cfg, bar.update)
    figures: dict[str, Any] = {}
    written = [
        (s, g) for s, g in zip(samples, graded) if s.problem.after is None
    ]  # of the others, most is not the model's
    if written:
        figures["syntax"] = syntax([s for s, _ in written], [g for _, g in written], platform.python_version())
    if written and cfg.signatures and not {FUNCTIONS, INSTRUCTIONS} & figures["syntax"]["by_prompt"].keys():
        figures["syntax"]["notes"] = ["there is no Python function or answer among what was held out"]
    if benchmarks and mode == "later":
        figures["functional"] = {"skipped": "the samples were not run; `python evaluate.py RUN --grade` runs them"}
    elif benchmarks:
        run = [name for name in benchmarks if name not in chosen.skipped]
        figures["functional"] = functional_figures(samples, graded, run, mode, chosen.left_out)
    if benchmarks:
        figures["functional"] |= chosen.skipped
    return CodeResults(samples, graded, figures)


def select_problems(
    heldout: TokenDataset | None,
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    block_size: int,
    benchmarks: dict[str, int],
    mode: When,
    cfg: EvalConfig,
) -> Chosen:
    """Return the held-out problems and those of the benchmarks, each with its number of samples, and what is not asked."""
    if heldout is None:
        wanted: list[Problem] = []
    elif isinstance(heldout, Examples):
        assert chat is not None
        wanted = problems_from_conversations(heldout, tokenizer, cfg.signatures, chat.docstring_format, cfg.n_workers)
    else:
        with progress_bar("held-out code", cfg.signatures, "function") as bar:
            wanted = problems_from_documents(heldout, tokenizer, cfg.signatures, cfg.n_workers, bar.update)
    out = [(problem, 1) for problem in wanted]
    loaded = {name: asked_problems(name, cfg) for name in benchmarks}
    skipped = {name: prompts_too_long(asked, tokenizer, chat, block_size, cfg) for name, asked in loaded.items()}
    skipped = {name: reason for name, reason in skipped.items() if reason}
    loaded = {name: asked for name, asked in loaded.items() if name not in skipped}
    for name, reason in skipped.items():
        print(f"note: {name} is skipped: {reason}", file=sys.stderr)
    left_out = {} if mode == "later" else left_out_problems(loaded, mode, cfg)
    for name, reasons in left_out.items():
        if reasons:
            print(f"note: {name}: {describe_left_out(reasons)}", file=sys.stderr)
    for name, asked in loaded.items():
        out += [(problem, benchmarks[name]) for problem in asked if problem.task_id not in left_out.get(name, {})]
    return Chosen(out, left_out, {name: {"skipped": reason} for name, reason in skipped.items()})


def asked_problems(name: str, cfg: EvalConfig) -> list[Problem]:
    """Return the problems of a benchmark whose solutions are to be written: of `problems`, up to a level.

    A limit is one of whole problems, also where their lines are filled in.
    """
    problems = [p for p in load(name, source_of(name, cfg)) if (p.level or 0) <= cfg.max_level]
    wanted = set(list(dict.fromkeys(p.of for p in problems))[: cfg.limit])
    return [p for p in problems if p.of in wanted]


def functional_figures(
    samples: Sequence[Sample], graded: Sequence[GradedSample], benchmarks: Sequence[str], mode: When, left_out: LeftOut
) -> dict[str, Any]:
    """Return the figures on functional correctness of each benchmark, as in eval.json. `left_out` problems do not count."""
    out: dict[str, Any] = {}
    for name in benchmarks:
        reasons = left_out.get(name, {})
        of_problem: dict[str, list[tuple[Sample, GradedSample]]] = {}
        for s, g in zip(samples, graded):
            if s.problem.benchmark == name and s.problem.task_id not in reasons:
                of_problem.setdefault(s.problem.task_id, []).append((s, g))
        pairs = [pair for found in of_problem.values() for pair in found]
        counts: list[list[Any]] = []  # of each problem: its name, samples and passes
        for task, found in of_problem.items():
            counts.append([task, len(found), sum(g.verdict == "passed" for _, g in found)])
        fewest = min((n for _, n, _ in counts), default=0)
        out[name] = {
            "problems": len(counts),
            "samples_per_problem": fewest,
            "pass_at": pass_at(counts, fewest),
            "verdicts": {v: sum(g.verdict == v for _, g in pairs) for v in VERDICTS},
            "cropped": len({s.problem.task_id for s, _ in pairs if s.cropped}),
            "sandbox": mode,
            "python": platform.python_version(),
            "counts": counts,
        }
        whole = {s.problem.task_id: s.problem.of for s, _ in pairs if s.problem.after is not None}
        out[name] |= {"lines_of": len(set(whole.values()))} if whole else {}
        levels = {s.problem.task_id: str(s.problem.level) for s, _ in pairs if s.problem.level is not None}
        if levels:
            groups = {level: [c for c in counts if levels[c[0]] == level] for level in sorted(set(levels.values()))}
            out[name]["by_level"] = {
                level: {"problems": len(group), "pass_at": pass_at(group, fewest), "counts": group}
                | ({"lines_of": len({whole[task] for task, *_ in group})} if whole else {})
                for level, group in groups.items()
            }
        if reasons:
            out[name]["left_out"] = reasons
    return out


def pass_at(counts: Sequence[Sequence[Any]], fewest: int) -> dict[str, float]:
    """Return the mean pass@k of problems, each with its name, samples and passes, for each k up to `fewest` samples."""
    ks = [k for k in (1, 5, 10, 100) if k <= fewest]
    return {str(k): float(sum(pass_at_k(n, c, k) for _, n, c in counts) / len(counts)) for k in ks}


def syntax(samples: Sequence[Sample], graded: Sequence[GradedSample], python: str) -> dict[str, Any]:
    """Return how many samples compile: of all, of each kind of prompt, and of each prompt."""

    def rates(items: Sequence[GradedSample]) -> dict[str, int]:
        return {
            "samples": len(items),
            "passes": sum(g.compiles for g in items),
            "non_trivial": sum(g.non_trivial for g in items),
        }

    groups: dict[str, dict[str, list[GradedSample]]] = {}
    for s, g in zip(samples, graded):
        groups.setdefault(s.problem.benchmark, {}).setdefault(s.problem.task_id, []).append(g)
    by_prompt = {}
    for name, tasks in groups.items():
        counts = [[task, *rates(items).values()] for task, items in tasks.items()]
        by_prompt[name] = {**rates([g for items in tasks.values() for g in items]), "counts": counts}
    return {**rates(graded), "python": python, "by_prompt": by_prompt}


def verdict_columns(graded: GradedSample) -> dict[str, Any]:
    """Return the part of a line of samples.jsonl that says how a sample was judged where it was run."""
    return {name: getattr(graded, name) for name in ("verdict", "reason")}


def write_samples(run_path: Path, split: str, code: CodeResults, lengths: Sequence[int]) -> list[str]:
    """Write samples.jsonl, one line for each sample with its verdict; return the file's name, or nothing without samples.

    `lengths` are the longest overlaps of the samples with the training data, empty if they are not known.
    """
    if not code.samples:
        return []
    lines = []
    for i, (s, g) in enumerate(zip(code.samples, code.graded)):
        line: dict[str, Any] = {"benchmark": s.problem.benchmark, "task_id": s.problem.task_id, "sample": s.number}
        line |= verdict_columns(g) | {"compiles": g.compiles, "non_trivial": g.non_trivial}
        line |= {"tokens": len(s.ids), "cut_short": s.cut_short, "prompt_cropped": s.cropped}
        line |= {"overlap": lengths[i]} if lengths else {}
        lines.append(json.dumps({**line, "text": s.text, "program": g.program}, ensure_ascii=True))
    name = file_name("samples.jsonl", split)
    write_atomic(run_path / name, "".join(line + "\n" for line in lines))
    return [name]
