"""Evaluate a run: how well it predicts held-out files, and whether the code that it writes is right.

    python evaluate.py runs/demo
    python evaluate.py runs/demo --eval.full                      # all benchmarks, all levels, long samples
    python evaluate.py runs/demo --eval.benchmarks humaneval:20 --eval.temperature 0.8
    python evaluate.py runs/fim --eval.benchmarks humaneval-infill    # fill in each line of the solutions
    python evaluate.py runs/demo --text book.txt
    python evaluate.py runs/demo --average 8                      # the mean of the last 8 checkpoints' weights
    python evaluate.py runs/demo --harness hellaswag,arc_easy --harness-data FOLDER
    python evaluate.py runs/demo --grade                          # run what an evaluation with --sandbox later has written
    python evaluate.py --compare runs/demo runs/demo-sft
    torchrun --nproc-per-node 2 evaluate.py runs/demo             # the processes share files and samples

Prints a table and writes `eval.json`, `eval.md`, `samples.jsonl` and `losses.jsonl` into the run. The held-out split was chosen
by content hash before training, and is in the run's folder with its sha256. So the losses are about files that the model has
not seen. Use `--split test` for final tables only. Generated code is really run, in a sandbox (kindling/sandbox): this needs
bubblewrap, on Linux. By default little of it is, as a small model solves little; `--eval.full` runs the rest.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from config import FULL_EVAL, Config, EvalConfig
from kindling.cli import names_flag, parse_cli, run_script
from kindling.errors import KindlingError
from kindling.output import wants_color
from kindling.paths import require_runs

if TYPE_CHECKING:
    from kindling.data.shards import TokenDataset
    from kindling.device import Runtime
    from kindling.evaluation.perplexity import Losses
    from kindling.evaluation.samples import ChatFormat
    from kindling.runs.checkpoint import RunDirectory
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

DEFAULTS = EvalConfig()
NOT_OURS = "nobody knows what a model of others has not seen; --text FILE measures the loss of your files"


class EvaluationError(KindlingError):
    """The run cannot be evaluated."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/, or the folder of a model of others. The newest run if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    average: int = 1
    """Evaluate the mean of the weights at the last so many checkpoints; --train.keep-checkpoints says how many are kept."""
    split: Literal["val", "test"] = "val"
    """The held-out split. Use test for final tables only."""
    text: tuple[Path, ...] = ()
    """Also measure the losses of these files: texts, or rows of .jsonl (.gz)."""
    field: str = "text"
    """The column of the text in such rows."""
    sandbox: Literal["bwrap", "none", "later"] = "bwrap"
    """none: run generated code with limits of time and memory only. It can then do whatever you can. later: write the samples
    but run none; --grade does it, also on another machine."""
    grade: bool = False
    """Only run the samples that an earlier evaluation has written to the run, and add the results."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, separated by commas: hellaswag,arc_easy (pip install -r requirements-harness.txt)."""
    harness_data: Path | None = None
    """A folder with the data of these tasks. Without it, they come from the hub."""
    harness_limit: int | None = None
    """Only the first so many questions of each task."""
    infills: int = 200
    """For a run trained with fill-in-the-middle: fill in so many lines, and as many spans, of held-out files. 0: none."""
    compare: tuple[Path, ...] = ()
    """Print the results of these evaluated runs side by side, and mark significant differences to the first."""
    eval: EvalConfig = DEFAULTS


@dataclass
class EvalContext:
    """The run to evaluate, loaded."""

    run: RunDirectory
    config: Config  # the run's
    checkpoints: list[Path]
    """The newest one, or those whose mean the model is."""
    model: LanguageModel
    tokenizer: Tokenizer
    runtime: Runtime
    flags: Flags

    @cached_property
    def heldout(self) -> TokenDataset | None:
        """The held-out split, verified once; None for a model of others."""
        return None if self.manifest is None else self.run.heldout(self.flags.split)

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """What is known of the run's data; None for a model of others."""
        from kindling.runs.loading import manifest_of

        return manifest_of(self.run)

    @cached_property
    def chat(self) -> ChatFormat | None:
        """How to prompt the model; None if it was not fine-tuned."""
        return chat_format(self.run)


def parse(argv: list[str] | None = None) -> Flags:
    """Parse the command line. With --eval.full, and where benchmarks are named, the other defaults are those of a full run."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.eval.full or names_flag(
        argv, "--eval.benchmarks"
    ):  # parse again with these defaults, so that explicit values win
        full = Flags(eval=replace(FULL_EVAL, full=flags.eval.full))
        flags = parse_cli(Flags, __doc__ or "", argv, default=full)
    return flags


def without_python(cfg: EvalConfig, argv: list[str] | None, run: RunDirectory) -> EvalConfig:
    """Return the settings without benchmarks, and say so, for a run of other languages, unless they were asked for."""
    from kindling.sample_prompts import knows_no_python

    if cfg.full or names_flag(argv, "--eval.benchmarks") or not cfg.n_samples or not knows_no_python(run.config()):
        return cfg
    print(f"note: {run.path} has learnt no Python, so no benchmark is run; --eval.full runs all", file=sys.stderr)
    return replace(cfg, benchmarks=("none",))


def chat_format(run: RunDirectory) -> ChatFormat | None:
    """Return how to prompt a run's model; None if it was not fine-tuned."""
    from kindling.evaluation.samples import ChatFormat
    from kindling.runs.loading import is_asked

    data = run.config().data
    mined = all(source.kind == "docstrings" for source in data.sources)
    return ChatFormat(data.template, mined) if is_asked(run) else None


def require(flags: Flags, run: RunDirectory) -> None:
    """Raise a KindlingError before the long work, if the run cannot be written or asked, or a text or a task does not exist."""
    from kindling.evaluation.tasks import INFILL, require_sources
    from kindling.tokenization.infilling import require_fim

    if not os.access(run.path, os.W_OK):
        raise EvaluationError(f"{run.path} must be writable for the results, but is not; correct its permissions")
    require_sources(flags.eval)
    for path in flags.text:
        if not path.is_file():
            raise EvaluationError(f"--text must name files that exist, but {path} does not; check the path")
    if any(INFILL in name for name in flags.eval.n_samples):
        require_fim(run.tokenizer(), "leave out the benchmarks that end in -infill")
    if flags.harness is not None:
        from kindling.evaluation.harness import require as require_harness

        require_harness(tasks_of(flags), flags.harness_data, flags.harness_limit)


def chosen(flags: Flags) -> tuple[RunDirectory, list[Path]]:
    """Return the run that the flags name, and its newest checkpoint or those to average. Raises what `require` raises."""
    from kindling.formats.hf_import import find_model
    from kindling.runs.averaging import checkpoints_to_average

    require(flags, run := find_model(flags.run))
    return run, checkpoints_to_average(run, flags.average)


def tasks_of(flags: Flags) -> list[str]:
    """Return the tasks that --harness names."""
    return [task.strip() for task in (flags.harness or "").split(",") if task.strip()]


def evaluate(subject: EvalContext) -> int:
    """Run each measurement of the flags, save the results and print them; return the exit code."""
    from kindling.data.build import DATA
    from kindling.evaluation import report, results_file
    from kindling.evaluation.check_correctness import sandbox_refusal
    from kindling.evaluation.code_eval import evaluate_code, write_samples
    from kindling.evaluation.harness import run as run_harness
    from kindling.evaluation.memorization import seen_in_training
    from kindling.sample_prompts import generate_command

    started, flags, run = time.perf_counter(), subject.flags, subject.run
    cfg, model, tokenizer, world = flags.eval, subject.model, subject.tokenizer, subject.runtime.world
    refusal = world.on_main(lambda: sandbox_refusal(flags.sandbox, cfg))
    benchmarks = cfg.n_samples if refusal is None else {}

    losses = None if subject.heldout is None else losses_of(subject, subject.heldout, cfg.stride)
    figures = {"skipped": NOT_OURS} if losses is None else losses.by_group() | {"stride": cfg.stride}
    results = header(subject) | {"language_modelling": figures}
    results |= gold_losses(subject) if world.main else {}
    results |= infilling_figures(subject)

    code = evaluate_code(model, tokenizer, subject.heldout, subject.chat, benchmarks, flags.sandbox, cfg, world)
    if not world.main:  # only the main rank does the rest
        return 0
    results |= ({"texts": text_figures(subject)} if flags.text else {}) | code.figures
    if refusal is not None:
        results["functional"] = {"skipped": refusal}

    ids = [sample.ids for sample in code.samples]
    measured = list(dict.fromkeys([*benchmarks, *results.get("gold", {})]))
    lengths, figures = seen_in_training(ids, measured, subject.manifest, DATA, tokenizer, cfg)
    results |= figures

    files = write_samples(run.path, flags.split, code, lengths)
    results = results_file.with_earlier(results | {"seconds": time.perf_counter() - started}, run.path)
    lines = [] if losses is None else losses.lines()
    saved = results_file.save_results(run.path, results, lines)

    if flags.harness is not None:  # it may take long or fail, so the other results are saved before
        where = subject.runtime.device, flags.harness_data, flags.harness_limit
        results["harness"] = run_harness(model, tokenizer, tasks_of(flags), *where)
        results["seconds"] = time.perf_counter() - started
        saved = results_file.save_results(run.path, results, lines)

    print(report.table(results, lines, color=wants_color(sys.stdout)))
    print(f"\nwritten to {run.path}: {', '.join([*saved, *files])}; next: {generate_command(run.path, subject.config)}")
    if refusal is not None:
        raise EvaluationError(refusal)
    return 0


def losses_of(subject: EvalContext, dataset: TokenDataset, stride: int | None = None) -> Losses:
    """Return the losses of a split."""
    from kindling.evaluation.perplexity import document_losses
    from kindling.evaluation.progress import progress_bar

    n_rows = subject.config.train.evaluation_rows
    dataset.require_fits(subject.model.cfg.vocab_size, subject.tokenizer.sha256)
    with progress_bar("held-out losses", len(dataset), "token", subject.runtime.world.main) as bar:
        return document_losses(subject.model, dataset, subject.runtime, stride, n_rows, bar.update)


def gold_losses(subject: EvalContext) -> dict[str, Any]:
    """Return the figures on reference solutions, if problems of benchmarks are wanted."""
    from kindling.evaluation.gold import BENCHMARKS, gold_figures
    from kindling.evaluation.progress import progress_bar
    from kindling.evaluation.tasks import load, source_of

    cfg, model, tokenizer = subject.flags.eval, subject.model, subject.tokenizer
    if not cfg.n_samples:
        return {}
    asked = {name: load(name, source_of(name, cfg))[: cfg.limit] for name in BENCHMARKS}
    n_rows, out = subject.config.train.evaluation_rows, {}
    with progress_bar("solutions", 0, "token") as bar:
        for name, problems in asked.items():
            out[name] = gold_figures(model, tokenizer, problems, subject.chat, subject.runtime, n_rows, bar.update)
    return {"gold": out}


def infilling_figures(subject: EvalContext) -> dict[str, Any]:
    """Return the loss of the held-out pieces that are all filled in and, from the main rank, the figures of gaps.

    A run without fill-in-the-middle has none.
    """
    from kindling.data.packing import INFILLING
    from kindling.evaluation.heldout import document_texts
    from kindling.evaluation.infill import gaps, infill
    from kindling.evaluation.progress import progress_bar

    flags = subject.flags
    if not flags.infills or not subject.config.data.fim_rate:
        return {}
    found = {"all": losses_of(subject, subject.run.heldout(flags.split + INFILLING)).summary()}
    if not subject.runtime.world.main:
        return {"infilling": found}
    assert subject.heldout is not None, "a run with fill-in-the-middle is ours"
    texts = document_texts(subject.heldout, subject.tokenizer)
    with progress_bar("infilling", 2 * flags.infills, "gap") as bar:
        found["gaps"] = infill(subject.model, subject.tokenizer, gaps(texts, flags.infills), bar.update)
    return {"infilling": found}


def text_figures(subject: EvalContext) -> dict[str, Any]:
    """Return the figures of the files that --text names."""
    from kindling.evaluation.perplexity import text_losses
    from kindling.evaluation.progress import progress_bar

    flags, out, model, tokenizer = subject.flags, {}, subject.model, subject.tokenizer
    how = (subject.runtime, flags.field, flags.eval.stride, subject.config.train.evaluation_rows)
    for path in flags.text:
        with progress_bar(path.name[:16], 0, "token") as bar:
            losses = text_losses(model, tokenizer, path, *how, bar.update)
        out[str(path)] = losses.of_text()
    return out


def header(subject: EvalContext) -> dict[str, Any]:
    """Return what is evaluated, on which data and how."""
    from kindling.evaluation.results_file import FORMAT
    from kindling.runs.averaging import average_name, average_sha256

    run, runtime, cfg, checkpoints = subject.run, subject.runtime, subject.config, subject.checkpoints
    return {
        "format": FORMAT,
        "run": str(run.path),
        "checkpoint": average_name(checkpoints),
        "weights_sha256": average_sha256(run, checkpoints),
        "preset": cfg.preset,
        "parameters": cfg.model.n_parameters,
        "split": subject.flags.split,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "python": platform.python_version(),
        "data": (subject.manifest or {}).get("fingerprint"),
        "settings": {k: v for k, v in asdict(subject.flags.eval).items() if v is not None},
    }


def grade_earlier(flags: Flags) -> int:
    """Run the samples that an earlier evaluation wrote, add the results to the run and print them; return the exit code."""
    from kindling.evaluation import report
    from kindling.evaluation.check_correctness import sandbox_refusal
    from kindling.evaluation.grade_written import grade_written
    from kindling.evaluation.progress import progress_bar
    from kindling.formats.hf_import import find_model

    run = find_model(flags.run)
    if flags.sandbox == "later":
        raise EvaluationError("--grade must be given without --sandbox later, but is given with it; leave one out")
    refusal = sandbox_refusal(flags.sandbox, flags.eval)
    if refusal is not None:
        raise EvaluationError(refusal)
    with progress_bar("running samples", 0, "sample") as bar:
        found = grade_written(run.path, flags.split, chat_format(run), flags.sandbox, flags.eval, bar.update)
    results, losses, files = found
    print(report.table(results, losses, color=wants_color(sys.stdout)))
    print(f"\nwritten to {run.path}: {', '.join(files)}; next: python evaluate.py --compare {run.path} RUN")
    return 0


def side_by_side(runs: tuple[Path, ...]) -> None:
    """Print the results of runs side by side, and write them as Markdown into the first run."""
    from kindling.evaluation.compare_runs import compare
    from kindling.files import write_atomic
    from kindling.formats.hf_import import find_model

    paths = [find_model(path).path for path in runs]
    text, markdown = compare(paths)
    print(text)
    with contextlib.suppress(OSError):  # the first run may be read-only
        write_atomic(paths[0] / "compare.md", markdown)
        print(f"\nwritten to {paths[0] / 'compare.md'}")


def main(argv: list[str] | None = None) -> int:
    """Evaluate a run, or compare evaluated runs."""
    flags = parse(argv)
    require_runs(flags.run, *flags.compare)
    from kindling.distributed import process_group, require_single_process

    if flags.compare:
        require_single_process("--compare")
        side_by_side((() if flags.run is None else (flags.run,)) + flags.compare)
        return 0
    if flags.grade:
        require_single_process("--grade")
        return grade_earlier(flags)
    with process_group(flags.device) as world:
        run, checkpoints = world.on_main(lambda: chosen(flags))
        flags.eval = world.on_main(lambda: without_python(flags.eval, argv, run))
        config = run.config()
        from kindling.device import resolve  # imports torch
        from kindling.runs.averaging import load_average

        runtime = resolve(replace(config.train, device=flags.device), world, flag="--device")
        model = load_average(run, checkpoints, runtime.device)
        return evaluate(EvalContext(run, config, checkpoints, model, run.tokenizer(), runtime, flags))


if __name__ == "__main__":
    run_script(main)
