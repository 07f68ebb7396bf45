"""Study 001: a small GPT on stories, untrained and trained: perplexity, the curve, attention, weights, spectra, and stories."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from config import Config, SourceConfig
from kindling.plots.html_report import Picture, Sample, Samples
from kindling.plots.run_report import CAPTIONS
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.run_results import MISSING, Run, log_of, said
from kindling.studies.shared_steps import (
    bytes_for,
    data_step,
    described,
    evaluation_step,
    on_local,
    training_step,
    untrained,
)
from kindling.studies.sizes import shrink
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import Section
from presets import preset

TITLE = "A small GPT on stories, before and after training"
UNTRAINED, TRAINED = "untrained", "trained"
RUNS = (UNTRAINED, TRAINED)
PROMPT = "Once upon a time"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the garden with her dog. One day, she found "
    "a small bird that could not fly. Lily was very sad."
)  # of the project's page: both models' attention is drawn on it
STORIES, STORY_TOKENS = 3, 200
SAMPLING = ("--temperature", "0.8", "--top-p", "0.9", "--top-k", "None")  # the project's
SAMPLES = 10  # times that the model writes during training
PLOTS_S = 25.0  # of drawing a run, on a slow core
CLAIMED_STEPS, CLAIMED_ROWS, CLAIMED_LOSS = 10_000, 256, 1.8
PLOTS = {
    "attention.png": "Heatmaps of attention, one for each layer and head",
    "weights.png": "Histograms of the weights, one panel for each kind of matrix",
    "spectral_norms.png": "Largest singular values and stable ranks, one line for each kind of matrix",
}


def config(scale: float, inputs: Inputs) -> Config:
    """Return the config of the trained run."""
    cfg = shrink(preset("tinystories"), scale)
    cfg = replace(cfg, train=replace(cfg.train, sample_every=max(1, (cfg.train.max_steps or 1) // SAMPLES)))
    return cfg if inputs.preset else on_local(cfg, inputs.prose_source(bytes_for(cfg.tokens)).source)


def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return the steps at a scale."""
    trained = config(scale, inputs)
    steps = [data_step(trained, clock, bytes_for(trained.tokens))]
    for name, cfg in ((UNTRAINED, untrained(trained)), (TRAINED, trained)):
        steps.append(training_step(cfg, name, clock, ("data",)))
        steps.append(evaluation_step(name, cfg, clock, inputs.sandbox, code=False))
        run = f"runs/{name}"
        steps.append(Step(f"plots-{name}", "visualize.py", (run, "--text", STORY), f"{run}/plots/spectral_norms.png", (name,),
                          clock.start_s + PLOTS_S, "attention, weights, spectra"))  # fmt: skip
        stories, seconds = f"stories-{name}", clock.start_s + clock.generation(cfg, STORIES, STORY_TOKENS)
        flags = (run, "--prompt", PROMPT, "--n", f"{STORIES}", "--max-new-tokens", f"{STORY_TOKENS}", *SAMPLING)
        steps.append(Step(stories, "generate.py", flags, log_of(stories), (name,), seconds, f"{STORIES} stories"))
    return steps


def stand_ins(scale: float, inputs: Inputs) -> list[SourceConfig]:
    """Return the sources whose files are written before the first step."""
    return list(config(scale, inputs).data.sources)


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    return described(inputs, inputs.prose_source(1_000_000).said)


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    before, after = (Run(folder, name) for name in RUNS)
    return [_before_and_after(before, after), _curve(after)]


def _before_and_after(before: Run, after: Run) -> Section:
    rows = [
        [run.name, run.parameters(), "0" if run is before and run.trained else run.tokens(), trained_loss,
         run.loss_text(), run.perplexity(), run.bits(), run.file("eval.json")]
        for run, trained_loss in ((before, MISSING), (after, _last_loss(after)))
    ]  # fmt: skip
    rows.append(_uniform(before))
    tokens = f"{CLAIMED_STEPS * CLAIMED_ROWS * preset('tinystories').model.block_size:,}"
    rows += [
        ["project, before", "~3.5M", "0", MISSING, MISSING, "~8,000", MISSING, "its page"],
        ["project, after", "~3.5M", tokens, f"~{CLAIMED_LOSS}", MISSING, "~25 to 35", MISSING, "its page"],
    ]
    exact = preset("tinystories").model.n_parameters
    notes = [
        "untrained: one step at a learning rate of 1e-30, so its weights are those that the trained run started from",
        f"a uniform guess: every token of the vocabulary is as likely as any other; tokens and bytes are from "
        f"{before.file('eval.json')}",
        "project, before and after: what its page says of the untrained and of the trained model",
        "perplexity is for each token, so it does not compare across vocabularies; bits per byte does, on the same texts",
        f"the project's table of its shape gives {exact:,} parameters; its training loss of {CLAIMED_LOSS} is a perplexity of "
        f"{math.exp(CLAIMED_LOSS):.1f}, far from its validation's",
    ]
    if (passes := after.passes()) != MISSING:
        notes.append(f"the trained run read its training texts {passes} times ({after.file('data/manifest.json')})")
    columns = ["run", "parameters", "tokens", "training loss", "loss", "perplexity", "bits per byte", "file"]
    return Section("Held-out documents before and after training", columns, rows, notes)


def _last_loss(run: Run) -> str:
    losses = [line["loss"] for line in run.metrics if isinstance(line.get("loss"), float)]
    return f"{losses[-1]:.3f}" if losses else MISSING


def _uniform(run: Run) -> list[str]:
    """Return the row of a guess that is the same for each token of the run's vocabulary, on the same documents."""
    figures = run.held_out().get("all", {})
    if not run.trained:
        return ["a uniform guess", *[MISSING] * 6, run.file("config.yaml")]
    vocabulary = run.config().model.vocab_size
    tokens, n_bytes = figures.get("tokens"), figures.get("bytes")
    bits = f"{math.log2(vocabulary) * tokens / n_bytes:.3f}" if tokens and n_bytes else MISSING
    loss, perplexity = f"{math.log(vocabulary):.3f}", f"{vocabulary:,.2f}"
    return ["a uniform guess", "0", "0", MISSING, loss, perplexity, bits, run.file("config.yaml")]


def _curve(run: Run) -> Section:
    rows = [
        [f"{line['step']:,}", f"{line['val_loss']:.3f}", f"{line['val_perplexity']:,.2f}", f"{line['val_bits_per_byte']:.3f}",
         f"{line['val_tokens']:,}" if "val_tokens" in line else "all", run.file("metrics.jsonl")]
        for line in run.validations()
    ]  # fmt: skip
    columns = ["step", "loss", "perplexity", "bits per byte", "held-out tokens", "file"]
    notes = ["step 0 is before the first step; lines of equally many tokens are of the same ones"]
    return Section("On the way", columns, rows, notes)


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"the model": [TRAINED]}


def pictures(folder: Path) -> list[Picture]:
    """Return attention, weights and spectra of both runs, those of a kind together."""
    found = []
    for name, alt in PLOTS.items():
        for run in (Run(folder, run) for run in RUNS):
            path = run.path / "plots" / name
            if path.is_file():
                text = f" The text is: {STORY}" if name == "attention.png" else ""
                caption = f"The run {run.name}. {CAPTIONS[name]}{text} From {run.file(f'plots/{name}')}."
                found.append(Picture(path.read_bytes(), caption, f"{alt}, of the run {run.name}."))
    return found


def texts(folder: Path) -> list[Samples]:
    """Return the stories of both runs."""
    found = []
    for name in RUNS:
        parts = re.split(r"^--- sample \d+, seed (\d+)\n", said(folder, f"stories-{name}"), flags=re.MULTILINE)
        stories = [
            Sample(f"seed {seed}", PROMPT, text.removeprefix(PROMPT).rstrip())
            for seed, text in zip(parts[1::2], parts[2::2])
        ]
        if stories:
            found.append(Samples(f"Stories of the run {name}", f"from {log_of(f'stories-{name}')}", stories))
    return found


STUDY = Study("001", TITLE, plan, sources, sections, runs_by_plot, stand_ins, pictures=pictures, texts=texts)
