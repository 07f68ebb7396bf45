"""Study 003: prose with the hand-written BPE beside SentencePiece; the curve, samples on the way, bits per byte of both."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from config import Config, SourceConfig, TokenizerConfig
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.run_results import Run
from kindling.studies.shared_steps import (
    bytes_for,
    bytes_read,
    data_step,
    described,
    evaluation_step,
    on_local,
    training_step,
)
from kindling.studies.sizes import shrink
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import Section
from presets import preset

TITLE = "Prose, with BPE written by hand beside SentencePiece"
TOKENIZERS = {
    "handwritten": TokenizerConfig(kind="handwritten"),
    "sentencepiece": TokenizerConfig(kind="sentencepiece"),
}
SAMPLE_EVERY = 500  # steps, as the project shows its samples; a twentieth of a run that is shorter
TARGET, CLAIMED_LOSS = 3.0, 2.15


def configs(scale: float, inputs: Inputs) -> dict[str, Config]:
    """Return the configs of the runs, by their tokenizer."""
    cfg = shrink(preset("fineweb-nano"), scale)
    steps = cfg.train.max_steps or 1
    cfg = replace(cfg, train=replace(cfg.train, sample_every=max(1, min(SAMPLE_EVERY, steps // 20))))
    if not inputs.preset:
        cfg = on_local(cfg, inputs.prose_source(bytes_for(cfg.tokens)).source)
    return {name: replace(cfg, tokenizer=tokenizer) for name, tokenizer in TOKENIZERS.items()}


def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return the steps at a scale."""
    steps = []
    for name, cfg in configs(scale, inputs).items():
        steps.append(data_step(cfg, clock, bytes_read(cfg, inputs), f"data-{name}"))
        steps.append(training_step(cfg, name, clock, (f"data-{name}",)))
        steps.append(evaluation_step(name, cfg, clock, inputs.sandbox, code=False))
    return steps


def stand_ins(scale: float, inputs: Inputs) -> list[SourceConfig]:
    """Return the sources whose files are written before the first step."""
    return [configs(scale, inputs)["handwritten"].data.sources[0]]


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    return described(inputs, "the docstrings of this machine's Python" if inputs.prose is None else inputs.prose.name)


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    runs = [Run(folder, name) for name in TOKENIZERS]
    losses = [
        [
            run.name,
            run.parameters(),
            run.tokens(),
            run.passes(),
            run.loss_text(),
            run.perplexity(),
            run.bits(),
            run.file("eval.json"),
        ]
        for run in runs
    ]
    losses.append(["the project", "44M", "99M", "-", f"{CLAIMED_LOSS}", "8.5", "-", "its page"])
    notes = [
        "a token of one tokenizer is not one of the other: only bits per byte compare",
        f"the project's loss is of its own tokens; {CLAIMED_LOSS} nats are a perplexity of {math.exp(CLAIMED_LOSS):.2f}",
    ]
    columns = ["run", "parameters", "tokens", "passes", "loss", "perplexity", "bits per byte", "file"]
    way = [
        [
            run.name,
            f"{line['step']:,}",
            f"{line['val_loss']:.3f}",
            f"{line['val_bits_per_byte']:.3f}",
            run.file("metrics.jsonl"),
        ]
        for run in runs
        for line in run.validations()
    ]
    reached = [
        [run.name, next((f"{line['step']:,}" for line in run.validations() if line["val_loss"] < TARGET), "not reached"),
         run.file("metrics.jsonl")]
        for run in runs
    ]  # fmt: skip
    return [
        Section("Losses on held-out documents", columns, losses, notes),
        Section(f"The first validation below {TARGET:g} nats a token", ["run", "step", "file"], reached),
        Section("On the way", ["run", "step", "loss", "bits per byte", "file"], way,
                ["the last line of a run is of the whole split, the others of a part of it"]),
    ]  # fmt: skip


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"the tokenizers": list(TOKENIZERS)}


STUDY = Study("003", TITLE, plan, sources, sections, runs_by_plot, stand_ins=stand_ins)
