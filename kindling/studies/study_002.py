"""Study 002: completion of Python, C and Java: bits per byte by language, completions, memory and speed of the int8 runtime.

What the runtime needs depends on the shape alone, not on what the weights are. So the project's own shape is exported too, with
the weights that a training starts from, and measured beside the small model that fits the time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from config import Config
from kindling.int8.kernel import find_compiler
from kindling.plots.html_report import Sample, Samples
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.run_results import MISSING, Run, log_of, said
from kindling.studies.shared_steps import bytes_for, data_step, evaluation_step, on_local, training_step, untrained
from kindling.studies.sizes import shrink
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import Section
from presets import preset

TITLE = "Completion of Python, C and Java, by a runtime that needs no PyTorch"
TRAINED, SHAPE = "autocomplete", "full-size"
PROMPTS = {
    "python": "def read_lines(path):\n    ",
    "c": "#include <stdio.h>\n\nint main(",
    "java": "public class Stack {\n    private ",
}
KERNELS = ("numpy", "c")
FEWEST_BYTES = 30_000_000  # of a user's rows: those of one language may come before those of another
SHAPE_BYTES, SHAPE_HELD_OUT, SHAPE_ROWS = 4_000_000, 0.01, 2  # enough for the vocabulary; nothing is learnt from it
NEW_TOKENS = 128  # of which the speed is measured
INT8_S = 2.0  # of a start without PyTorch
EXPORT_S, EXPORT_TOKENS = 4.0, 2 * 4096  # writing and reading back; both models predict 4,096 tokens
CLAIMED_MEMORY, CLAIMED_TOKENS = "under 150 MB", "402M"
STATS = re.compile(
    r"^first token after ([\d.]+) s(?:, then ([\d,]+) tokens/s)?(?:; ([\d,]+) MB of memory at most)?$", re.M
)


def config(scale: float, inputs: Inputs) -> Config:
    """Return the config of the trained run. The preset's folder of cloned repositories is on no hub, so files are local."""
    cfg = shrink(preset("autocomplete"), scale)
    n_bytes = bytes_for(cfg.tokens, 2e6 if inputs.code is None else FEWEST_BYTES)
    return on_local(cfg, inputs.code_source(n_bytes).source, drop_generated=True)


def shape(inputs: Inputs) -> Config:
    """Return the config of a run of the project's own shape that is not trained."""
    cfg = on_local(preset("autocomplete"), inputs.code_source(SHAPE_BYTES).source, drop_generated=True)
    cfg = replace(cfg, data=replace(cfg.data, val_fraction=SHAPE_HELD_OUT, test_fraction=SHAPE_HELD_OUT))
    return untrained(replace(cfg, train=replace(cfg.train, batch_size=SHAPE_ROWS, micro_batch_size=None)))


def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return the steps at a scale."""
    cfg = config(scale, inputs)
    n_bytes = cfg.data.sources[0].max_bytes or 0
    steps = [
        data_step(cfg, clock, n_bytes),
        training_step(cfg, TRAINED, clock, ("data",)),
        evaluation_step(TRAINED, cfg, clock, inputs.sandbox, ("--infills", "0"), code=False),
        export_step(TRAINED, cfg, clock),
    ]
    for language, prompt in PROMPTS.items():
        steps.append(_runtime_step(f"complete-{language}", TRAINED, cfg, clock, ("--prompt", prompt), 64))
    measured = TRAINED
    if scale != 1:
        measured, cfg = SHAPE, shape(inputs)
        held_out = 3 * SHAPE_HELD_OUT * SHAPE_BYTES / 3  # tokens: before the step, after it, and all of them
        run = training_step(cfg, SHAPE, clock, ("data-full-size",))
        steps += [
            data_step(cfg, clock, SHAPE_BYTES, "data-full-size"),
            replace(run, seconds=run.seconds + clock.reading(cfg, held_out), about=f"{run.about}, not trained"),
            export_step(SHAPE, cfg, clock),
        ]
    for kernel in KERNELS if find_compiler() else KERNELS[:1]:
        flags = (
            "--prompt",
            PROMPTS["python"],
            "--mode",
            "creative",
            "--max-new-tokens",
            f"{NEW_TOKENS}",
            "--kernel",
            kernel,
        )
        steps.append(_runtime_step(f"speed-{kernel}", measured, cfg, clock, flags, NEW_TOKENS))
    return steps


def export_step(run: str, cfg: Config, clock: Clock) -> Step:
    """Return the export of a run to int8."""
    seconds = clock.start_s + EXPORT_S + clock.reading(cfg, EXPORT_TOKENS)
    flags = (f"runs/{run}", "--to", "int8", "--replace")
    return Step(f"export-{run}", "export.py", flags, f"runs/{run}/export/int8/config.json", (run,), seconds, "int8")


def _runtime_step(name: str, run: str, cfg: Config, clock: Clock, flags: tuple[str, ...], new_tokens: int) -> Step:
    """Return a completion without PyTorch, whose log has the text, the speed and the memory."""
    seconds = INT8_S + clock.generation(cfg, 1, new_tokens)
    arguments = (f"runs/{run}/export/int8", *flags, "--stats")
    return Step(
        name, "autocomplete.py", arguments, log_of(name), (f"export-{run}",), seconds, f"{new_tokens} tokens at most"
    )


class Stats(NamedTuple):
    """Speed and memory of a completion, as cells."""

    first_s: str
    tokens_per_s: str
    memory: str


def stats_of(text: str) -> tuple[str, Stats]:
    """Return what autocomplete.py printed without its line of --stats, and what that line says."""
    found = list(STATS.finditer(text))
    if not found:
        return text, Stats(MISSING, MISSING, MISSING)
    first, more, memory = found[-1].groups()
    stats = Stats(f"{first} s", more or MISSING, f"{memory} MB" if memory else MISSING)
    return text[: found[-1].start()] + text[found[-1].end() :], stats


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    read = config(scale, inputs).data.sources[0].max_bytes or 0
    why = "; the project's cloned repositories are on no hub" if inputs.preset else ""
    missing = "; it has no C and no Java" if inputs.code is None else ""
    return f"{inputs.code_source(read).said}{missing}{why}"


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    return [_by_language(Run(folder, TRAINED)), _runtime(folder)]


def _by_language(run: Run) -> Section:
    found = run.held_out().get("by_language", {})
    rows = []
    for language in dict.fromkeys([*PROMPTS, *found]):
        figures = found.get(language, {})
        counts = [f"{figures[key]:,}" if figures.get(key) else MISSING for key in ("documents", "bytes")]
        rows.append([language, *counts, run.bits(language), run.file("eval.json")])
    total = run.held_out().get("all", {})
    counts = [f"{total[key]:,}" if total.get(key) else MISSING for key in ("documents", "bytes")]
    rows.append(["all", *counts, run.bits(), run.file("eval.json")])
    notes = [
        f"the run {run.name} has {run.parameters()} parameters and was trained on {run.tokens()} tokens, {run.passes()} passes "
        f"over its data ({run.file('metrics.jsonl')}); the project's has 33,551,168 and {CLAIMED_TOKENS}",
        "the project gives no loss and no other measure of what its model has learnt",
    ]
    absent = [language for language in PROMPTS if found and language not in found]
    warnings = []
    if absent:
        warnings.append(f"no held-out document of {' or '.join(absent)}: --code takes rows of all three languages")
    columns = ["language", "held-out documents", "bytes", "bits per byte", "file"]
    return Section("Held-out documents by language", columns, rows, notes, warnings)


def _runtime(folder: Path) -> Section:
    shape = SHAPE if Run(folder, SHAPE).trained else TRAINED
    steps = [(f"complete-{language}", TRAINED, "numpy") for language in PROMPTS]
    steps += [(f"speed-{kernel}", shape, kernel) for kernel in KERNELS]
    rows = []
    for step, name, kernel in steps:
        run, stats = Run(folder, name), stats_of(said(folder, step))[1]
        rows.append([step, run.parameters(), kernel, _size(run), *stats, log_of(step)])
    rows.append(["the project", "33,551,168", MISSING, MISSING, MISSING, MISSING, CLAIMED_MEMORY, "its page"])
    notes = [
        f"size: of the files in runs/{TRAINED}/export/int8 and runs/{shape}/export/int8",
        "first token: from the start of the program's work to the first piece of text, with reading the export",
        "memory: the most that the process held, with the interpreter and NumPy",
        "the project does not say how its memory was measured, nor with what runtime; it gives no speed",
    ]
    if shape == SHAPE:
        notes.insert(
            0, f"{SHAPE}: the project's own shape, with the weights that a training starts from; they cost the same"
        )
    if find_compiler() is None:
        notes.append("speed-c: not measured, as this machine has no C compiler")
    columns = ["step", "parameters", "kernel", "size", "first token", "tokens/s", "memory", "file"]
    return Section("The runtime: int8, without PyTorch", columns, rows, notes)


def _size(run: Run) -> str:
    found = [file.stat().st_size for file in (run.path / "export" / "int8").rglob("*") if file.is_file()]
    return f"{sum(found) / 1e6:,.1f} MB" if found else MISSING


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"the model": [TRAINED]}


def texts(folder: Path) -> list[Samples]:
    """Return the completions."""
    shown = [
        Sample(f"{language}, from {log_of(f'complete-{language}')}", prompt, stats_of(text)[0].rstrip())
        for language, prompt in PROMPTS.items()
        if (text := said(folder, f"complete-{language}"))
    ]
    note = f"by the int8 export of the run {TRAINED}, at temperature 0.2 from the 10 most likely tokens"
    return [Samples("Completions", note, shown)] if shown else []


STUDY = Study("002", TITLE, plan, sources, sections, runs_by_plot, texts=texts)
