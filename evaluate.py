"""Evaluate a run: how well it predicts held-out files, and what the code that it writes is worth.

    python evaluate.py runs/demo
    python evaluate.py runs/demo --text book.txt
    python evaluate.py runs/demo --eval.benchmarks humaneval:20 --eval.temperature 0.8
    python evaluate.py runs/demo --harness hellaswag,arc_easy --harness-data FOLDER
    python evaluate.py --compare runs/demo runs/demo-sft
    torchrun --nproc-per-node 2 evaluate.py runs/demo             # held-out files and samples are shared out

Prints a table and writes `eval.json`, `eval.md`, `samples.jsonl` and `losses.jsonl` into the run. The held-out split was fixed
by content hash before training and lies in the run's folder with its sha256, so the losses are those of files that the
model has not seen; `--split test` is for final tables only. Generated code is really run, in a sandbox
(kindling/sandbox): on Linux this needs bubblewrap.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from config import EvalConfig
from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError

if TYPE_CHECKING:
    from kindling.data.shards import TokenDataset
    from kindling.device import Runtime
    from kindling.evaluation.check_correctness import Graded
    from kindling.evaluation.code_eval import Chat, Written
    from kindling.evaluation.perplexity import Losses
    from kindling.evaluation.tasks import Problem
    from kindling.runs.checkpoint import RunDirectory
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

SAMPLES = "samples.jsonl"
DEFAULTS = EvalConfig()


class EvaluationError(KindlingError):
    """Something that cannot be evaluated."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    split: Literal["val", "test"] = "val"
    """Which held-out split; test is for final tables only."""
    text: tuple[Path, ...] = ()
    """Also predict these files: text, or rows of .jsonl (.gz)."""
    field: str = "text"
    """The column of the text in such rows."""
    sandbox: Literal["bwrap", "none"] = "bwrap"
    """none: run generated code with limits of time and memory alone. It can then do whatever you can."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, with commas, such as hellaswag,arc_easy (pip install -r requirements-harness.txt)."""
    harness_data: Path | None = None
    """A folder with those tasks' data. Without it they come from the hub."""
    harness_limit: int | None = None
    """Only the first so many questions of each task."""
    compare: tuple[Path, ...] = ()
    """Print the results of runs that were evaluated, side by side, with what differs significantly from the first."""
    eval: EvalConfig = DEFAULTS


@dataclass
class Subject:
    """What is evaluated."""

    run: RunDirectory
    model: LanguageModel
    tokenizer: Tokenizer
    runtime: Runtime
    flags: Flags

    @cached_property
    def heldout(self) -> TokenDataset:
        """The split that is evaluated, verified once."""
        return self.run.heldout(self.flags.split)

    @cached_property
    def chat(self) -> Chat | None:
        """How the model is asked, if it was fine-tuned."""
        from kindling.evaluation.code_eval import Chat

        data = self.run.config().data
        mined = all(source.kind == "docstrings" for source in data.sources)
        return Chat(data.template, mined) if data.instructions else None


@contextmanager
def _bar(
    what: str, total: int, unit: str, shown: bool = True
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a progress bar, if it is to be `shown`; give what adds to it, and what sets it."""
    from tqdm import tqdm

    with tqdm(
        total=total, unit=unit, unit_scale=True, desc=f"{what:<16}", mininterval=0.5, leave=False, disable=not shown
    ) as bar:

        def set_to(n: int) -> None:
            bar.update(n - bar.n)

        yield bar.update, set_to


def require(flags: Flags, run: RunDirectory) -> None:
    """Raise what can be known before anything is measured: a run that cannot be written, texts and tasks that are not there."""
    if not os.access(run.path, os.W_OK):
        raise EvaluationError(f"{run.path} must be writable for the results, but is not; mend its permissions")
    for path in flags.text:
        if not path.expanduser().is_file():
            raise EvaluationError(f"--text must name files that exist, but {path} does not; check the path")
    if flags.harness is not None:
        from kindling.evaluation.harness import require as require_harness

        require_harness(tasks_of(flags), flags.harness_data, flags.harness_limit)


def chosen(flags: Flags) -> tuple[RunDirectory, Path]:
    """Return the run that the flags name and its newest checkpoint; raises what can be known before anything is measured."""
    from kindling.runs.checkpoint import find_run, require_checkpoint

    run = find_run(flags.run)
    require(flags, run)
    return run, require_checkpoint(run)


def tasks_of(flags: Flags) -> list[str]:
    """Return the tasks that --harness names."""
    return [task.strip() for task in (flags.harness or "").split(",") if task.strip()]


def language_modelling(subject: Subject) -> tuple[Losses, dict[str, Any]]:
    """Return the losses of the held-out split, and their figures."""
    from kindling.evaluation.perplexity import document_losses

    dataset = subject.heldout
    dataset.require_fits(subject.model.cfg.vocab_size, subject.tokenizer.sha256)
    stride = subject.flags.eval.stride
    with _bar("held-out losses", len(dataset), "token", subject.runtime.world.main) as (_, progress):
        losses = document_losses(subject.model, dataset, subject.runtime, stride, progress=progress)
    figures = {"by_language": losses.by_language(), "by_source": losses.by_source(), "stride": stride}
    return losses, {"all": losses.summary(), **figures}


def texts(subject: Subject) -> dict[str, Any]:
    """Return the figures of the files that --text names."""
    from kindling.evaluation.perplexity import text_losses

    out = {}
    for path in subject.flags.text:
        with _bar(path.name[:16], 0, "token") as (_, progress):
            losses = text_losses(
                subject.model,
                subject.tokenizer,
                path,
                subject.runtime,
                subject.flags.field,
                subject.flags.eval.stride,
                progress=progress,
            )
        out[str(path)] = {"all": losses.summary(), "by_language": losses.by_language(), "notes": dict(losses.notes)}
    return out


def problems_of(subject: Subject, benchmarks: dict[str, int]) -> list[tuple[Problem, int]]:
    """Return what the model is to write code for, and how many samples of each."""
    from kindling.data.examples import Examples
    from kindling.evaluation.heldout import from_conversations, from_documents
    from kindling.evaluation.tasks import load

    cfg, dataset = subject.flags.eval, subject.heldout
    if isinstance(dataset, Examples):
        assert subject.chat is not None
        wanted = from_conversations(dataset, subject.tokenizer, cfg.signatures, subject.chat.mined, cfg.n_workers)
    else:
        with _bar("held-out code", cfg.signatures, "function") as (progress, _):
            wanted = from_documents(dataset, subject.tokenizer, cfg.signatures, cfg.n_workers, progress)
    out = [(problem, 1) for problem in wanted]
    for name, count in benchmarks.items():
        source = cfg.humaneval if name == "humaneval" else cfg.mbpp if name.startswith("mbpp") else None
        out += [(problem, count) for problem in load(name, source)[: cfg.limit]]
    return out


def code(subject: Subject, benchmarks: dict[str, int]) -> tuple[list[Written], list[Graded]]:
    """Write samples, which the ranks share, and grade them on the main one; those of benchmarks are run."""
    from kindling.evaluation.code_eval import grade_all, write

    world = subject.runtime.world
    problems = world.on_main(lambda: problems_of(subject, benchmarks))
    total = sum(count for _, count in problems)
    if not problems:
        return [], []
    cfg, chat = subject.flags.eval, subject.chat
    own = problems[world.rank :: world.size]
    with _bar("writing samples", sum(count for _, count in own), "sample", world.main) as (progress, _):
        parts = [iter(part) for part in world.gather(write(subject.model, subject.tokenizer, own, chat, cfg, progress))]
    written = [next(parts[i % world.size]) for i, (_, count) in enumerate(problems) for _ in range(count)]
    if not world.main:
        return written, []
    with _bar("running samples", total, "sample") as (progress, _):
        graded = grade_all(written, chat, subject.flags.sandbox, cfg, progress)
    return written, graded


def code_figures(
    subject: Subject, benchmarks: dict[str, int], written: list[Written], graded: list[Graded]
) -> dict[str, Any]:
    """Return the figures on syntax and on functional correctness; nothing where nothing was written."""
    from kindling.evaluation.code_eval import summary, syntax
    from kindling.evaluation.heldout import FUNCTIONS, INSTRUCTIONS

    out: dict[str, Any] = {}
    if written:
        out["syntax"] = syntax(written, graded, platform.python_version())
        if subject.flags.eval.signatures and not {FUNCTIONS, INSTRUCTIONS} & out["syntax"]["by_prompt"].keys():
            out["syntax"]["notes"] = ["there is no Python function or answer among what was held out"]
    groups: dict[str, tuple[list[Written], list[Graded]]] = {name: ([], []) for name in benchmarks}
    for w, g in zip(written, graded):
        if w.problem.benchmark in groups:
            groups[w.problem.benchmark][0].append(w)
            groups[w.problem.benchmark][1].append(g)
    functional = {name: summary(*group, subject.flags.sandbox) for name, group in groups.items()}
    return out | ({"functional": functional} if functional else {})


def overlaps(subject: Subject, benchmarks: dict[str, int], written: list[Written]) -> tuple[list[int], dict[str, Any]]:
    """Return each sample's longest verbatim overlap with the training data, and the figures on what was seen before."""
    import numpy as np

    from kindling.data.build import DATA
    from kindling.data.shards import DataError, read_manifest
    from kindling.evaluation.memorization import benchmark_hits, longest_overlaps, summary, training_split

    manifest, cfg = read_manifest(subject.run.data), subject.flags.eval
    if not written:
        return [], {}
    try:
        dataset = training_split(manifest, DATA)
        reason = f"the training data are not here: {DATA / manifest['fingerprint']} is no folder"
    except DataError as e:
        dataset, reason = None, str(e)
    if dataset is None:
        return [], {"memorisation": {"skipped": reason}} | (
            {"contamination": {"skipped": reason}} if benchmarks else {}
        )
    samples = [np.array(w.ids, dtype=np.int64) for w in written]
    out: dict[str, Any] = {}
    with _bar("memorisation", len(dataset), "token") as (progress, _):
        found = longest_overlaps(samples, dataset, progress)
    lengths = [overlap.length for overlap in found]
    figures = summary(found)
    out["memorisation"] = {
        "samples": figures.samples,
        "longest": figures.longest,
        "median": figures.median,
        "over_50": figures.long,
        "share_over_50": figures.long_share,
        "below_window": figures.below_window,
        "training_tokens": len(dataset),
    }
    files = {name: file_of(name, cfg) for name in dict.fromkeys(name.partition("-")[0] for name in benchmarks)}
    if files and cfg.contamination_tokens:
        total = min(len(dataset), cfg.contamination_tokens)
        with _bar("contamination", total, "token") as (progress, _):
            hits = benchmark_hits(tuple(files.values()), dataset, subject.tokenizer, cfg.contamination_tokens, progress)
        out["contamination"] = {"read_tokens": hits.tokens_read, "of_tokens": hits.tokens}
        for name, path in files.items():
            found_in = hits.benchmarks[path]
            out["contamination"][name] = {
                "problems": found_in.problems,
                "hit": len(found_in.hits),
                "examples": [
                    f"{problem} in {hit.documents:,} documents, the first at token {hit.position:,}: {hit.words!r}"
                    for problem, hit in sorted(found_in.hits.items())
                ],
                "too_short": len(found_in.lost),
            }
    return lengths, out


def write_samples(path: Path, written: list[Written], graded: list[Graded], lengths: list[int]) -> None:
    """Write every sample with its verdict, one a line."""
    from kindling.files import write_atomic

    lines = []
    for i, (w, g) in enumerate(zip(written, graded)):
        line: dict[str, Any] = {"benchmark": w.problem.benchmark, "task_id": w.problem.task_id, "sample": w.number}
        line |= {"verdict": g.verdict, "reason": g.reason, "compiles": g.compiles, "non_trivial": g.non_trivial}
        line |= {"tokens": len(w.ids), "cut_short": w.cut_short, "prompt_cropped": w.cropped}
        line |= {"overlap": lengths[i]} if lengths else {}
        lines.append(json.dumps({**line, "text": w.text, "program": g.program}, ensure_ascii=True))
    write_atomic(path, "".join(line + "\n" for line in lines))


def lines_of(losses: Losses) -> list[dict[str, Any]]:
    """Return the losses of each document as lines of losses.jsonl; none of a split from before documents had a table."""
    if losses.bytes is None or losses.languages is None or losses.sources is None:
        return []
    columns = (losses.languages, losses.sources, losses.tokens, losses.bytes, losses.nll)
    names = ("language", "source", "tokens", "bytes", "nll")
    rows = zip(*(column.tolist() for column in columns))
    return [{"document": i, **dict(zip(names, row))} for i, row in enumerate(rows)]


def header(subject: Subject, checkpoint: Path) -> dict[str, Any]:
    """Return what is evaluated, on what, and how."""
    from kindling.data.shards import read_manifest
    from kindling.evaluation.report import FORMAT
    from kindling.runs.checkpoint import weights_sha256

    run, runtime, cfg = subject.run, subject.runtime, subject.run.config()
    return {
        "format": FORMAT,
        "run": str(run.path),
        "checkpoint": checkpoint.name,
        "weights_sha256": weights_sha256(checkpoint),
        "preset": cfg.preset,
        "parameters": cfg.model.n_parameters,
        "split": subject.flags.split,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "python": platform.python_version(),
        "data": read_manifest(run.data)["fingerprint"],
        "settings": {k: v for k, v in asdict(subject.flags.eval).items() if v is not None},
    }


def evaluate(subject: Subject, checkpoint: Path) -> int:
    """Measure everything that the flags ask for, save it and print it; return the exit code."""
    from kindling.evaluation import report
    from kindling.evaluation.code_eval import limits_of
    from kindling.sandbox.bubblewrap import SandboxError
    from kindling.sandbox.self_test import self_test

    started, flags, run = time.perf_counter(), subject.flags, subject.run
    world, benchmarks = subject.runtime.world, flags.eval.n_samples

    def tested() -> str | None:
        """Return why no code can be run, if so."""
        try:
            if benchmarks:
                self_test(flags.sandbox, limits_of(flags.eval))
        except SandboxError as e:
            return str(e)
        return None

    refusal = world.on_main(tested)
    benchmarks = benchmarks if refusal is None else {}
    if flags.sandbox == "none" and benchmarks and world.main:
        print(_red("warning: generated code runs WITHOUT A SANDBOX and can do whatever you can"), file=sys.stderr)
    results = header(subject, checkpoint)
    losses, results["language_modelling"] = language_modelling(subject)
    written, graded = code(subject, benchmarks)
    if not world.main:  # which has nothing more to share out
        return 0
    lines = lines_of(losses)
    if flags.text:
        results["texts"] = texts(subject)
    results |= code_figures(subject, benchmarks, written, graded)
    if refusal is not None:
        results["functional"] = {"skipped": refusal}
    lengths, figures = overlaps(subject, benchmarks, written)
    results |= figures
    files = []
    if written:
        files.append(report.file_name(SAMPLES, flags.split))
        write_samples(run.path / files[0], written, graded, lengths)
    results = report.with_earlier(results | {"seconds": time.perf_counter() - started}, run.path)
    saved = report.save(run.path, results, lines)
    if flags.harness is not None:  # of others' making, and long: what there is, is saved first
        results["harness"] = harness(subject)
        results["seconds"] = time.perf_counter() - started
        saved = report.save(run.path, results, lines)
    print(report.table(results, lines, color=sys.stdout.isatty()))
    talk = "--chat" if subject.chat is not None else '--prompt "def "'
    print(f"\nwritten to {run.path}: {', '.join([*saved, *files])}; next: python generate.py {run.path} {talk}")
    if refusal is not None:
        raise EvaluationError(refusal)
    return 0


def harness(subject: Subject) -> dict[str, Any]:
    """Return what lm-evaluation-harness says."""
    from kindling.evaluation.harness import run

    flags = subject.flags
    data, limit = flags.harness_data, flags.harness_limit
    return run(subject.model, subject.tokenizer, tasks_of(flags), subject.runtime.device, data, limit)


def file_of(benchmark: str, cfg: EvalConfig) -> str:
    """Return the file with a benchmark's problems: of a data set on the hub, the same problems as they lie here."""
    from kindling.evaluation.tasks import FILES, PROBLEMS

    given = {"humaneval": cfg.humaneval, "mbpp": cfg.mbpp}.get(benchmark)
    is_file = given is not None and Path(given).expanduser().is_file()
    return str(Path(given).expanduser() if given is not None and is_file else PROBLEMS / FILES[benchmark])


def side_by_side(runs: tuple[Path, ...]) -> None:
    """Print runs side by side, and write the same as Markdown into the first."""
    from kindling.evaluation.compare_runs import compare
    from kindling.files import write_atomic
    from kindling.runs.checkpoint import find_run

    paths = [find_run(path).path for path in runs]
    text, markdown = compare(paths)
    print(text)
    with contextlib.suppress(OSError):  # a run of someone else's can be compared with
        write_atomic(paths[0] / "compare.md", markdown)
        print(f"\nwritten to {paths[0] / 'compare.md'}")


def _red(text: str) -> str:
    return f"\033[31;1m{text}\033[0m" if sys.stderr.isatty() else text


def main(argv: list[str] | None = None) -> int:
    """Evaluate a run, or compare runs that were."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.compare:
        from kindling.distributed import require_one

        require_one("--compare")
        side_by_side((() if flags.run is None else (flags.run,)) + flags.compare)
        return 0
    from kindling.device import resolve
    from kindling.distributed import joined
    from kindling.runs.checkpoint import load_model

    with joined(flags.device) as world:
        run, checkpoint = world.on_main(lambda: chosen(flags))
        runtime = resolve(replace(run.config().train, device=flags.device), world)
        model, _ = load_model(run, runtime.device, checkpoint)
        return evaluate(Subject(run, model, run.tokenizer(), runtime, flags), checkpoint)


if __name__ == "__main__":
    run_script(main)
