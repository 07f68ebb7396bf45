"""Study 000: three sizes of GPT-2 for Python, before and after one and three epochs of instructions, and a run made to spike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from config import Config
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.run_results import MISSING, Run, spikes
from kindling.studies.shared_steps import (
    bytes_for,
    bytes_for_examples,
    data_step,
    described,
    evaluation_step,
    on_local,
    training_step,
)
from kindling.studies.sizes import flags_of, shrink
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import Section
from presets import preset

TITLE = "Three sizes for Python, before and after fine-tuning on instructions"
SIZES = ("50m", "150m", "225m")
EPOCHS = (1, 3)
SPIKE_STEPS, SPIKE_RATE = 200, 3e-2
REMEDIES = {"none": (), "accumulation": ("accumulation",), "epsilon": ("epsilon",), "skipping": ("skipping",),
            "all": ("accumulation", "epsilon", "skipping")}  # fmt: skip
CLAIMED = {
    "150m": "perplexity 2.16 after three epochs",
    "225m": "perplexity 2.12, all samples compile, after fine-tuning",
}


def bases(scale: float, inputs: Inputs) -> dict[str, Config]:
    """Return the configs of the three pre-trainings."""
    small = {size: shrink(preset(f"code-{size}"), scale) for size in SIZES}
    if inputs.preset:
        return small
    source = inputs.code_source(bytes_for(max(cfg.tokens for cfg in small.values()))).source
    return {size: on_local(cfg, source, drop_generated=True) for size, cfg in small.items()}


def fine_tuning(epochs: int, smallest: Config, inputs: Inputs) -> Config:
    """Return the config of a fine-tuning; an epoch is 2% of the smallest base's tokens, or the whole data set of the preset."""
    cfg = preset("alpaca")
    cfg = replace(cfg, train=replace(cfg.train, epochs=float(epochs)))
    if inputs.preset:
        return cfg
    source = inputs.instructions_source(bytes_for_examples(0.02 * smallest.tokens)).source
    data = replace(cfg.data, sources=(source,), drop_generated=True)
    return replace(cfg, data=replace(data, val_fraction=0.04, test_fraction=0.04))


def spiking(cfg: Config, remedies: tuple[str, ...]) -> Config:
    """Return a short run at a rate that makes it spike, with these of the seed's remedies."""
    train = replace(
        cfg.train, max_steps=SPIKE_STEPS, lr=SPIKE_RATE, warmup_steps=5, schedule="constant", grad_clip=0.0, spike_ratio=0.0,
        log_every=1, eval_every=SPIKE_STEPS, save_every=SPIKE_STEPS, sample_prompts=("import os\n",),
    )  # fmt: skip
    if "accumulation" in remedies:
        train = replace(train, batch_size=2 * cfg.train.batch_size, micro_batch_size=cfg.train.micro_batch)
    if "epsilon" in remedies:
        train = replace(train, eps=1e-5)
    if "skipping" in remedies:
        train = replace(train, spike_ratio=3.0)
    return replace(cfg, train=train)


def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return the steps at a scale."""
    found = bases(scale, inputs)
    read = bytes_for(max(cfg.tokens for cfg in found.values()))
    steps = [data_step(found["50m"], clock, read)]
    tuned = {epochs: fine_tuning(epochs, found["50m"], inputs) for epochs in EPOCHS}
    for size, cfg in found.items():
        base = f"base-{size}"
        steps.append(training_step(cfg, base, clock, ("data",)))
        steps.append(evaluation_step(base, cfg, clock, inputs.sandbox))
        for epochs in EPOCHS:
            name, sft = f"sft-{epochs}-{size}", tuned[epochs]
            tokens = epochs * 0.02 * found["50m"].tokens
            flags = (f"runs/{base}", *flags_of(replace(sft, name=name)))
            seconds = (
                2 * clock.start_s + 5 * clock.reading(cfg, tokens) + clock.generation(cfg, 10, cfg.model.block_size)
            )
            steps.append(
                Step(
                    name,
                    "sft_train.py",
                    flags,
                    f"runs/{name}/answers.jsonl",
                    (base,),
                    seconds,
                    f"{epochs} epochs of instructions",
                )
            )
            steps.append(evaluation_step(name, cfg, clock, inputs.sandbox, held_out=2e4))
    for remedy, used in REMEDIES.items():
        steps.append(training_step(spiking(found["50m"], used), f"spike-{remedy}", clock, ("data",)))
    return steps


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    return described(
        inputs, inputs.code_source(1_000_000).said.split(",")[0], inputs.instructions_source(1_000_000).said
    )


def _runs(folder: Path) -> list[Run]:
    names = [f"{kind}-{size}" for size in SIZES for kind in ("base", *(f"sft-{epochs}" for epochs in EPOCHS))]
    return [Run(folder, name) for name in names]


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    losses = [
        [
            run.name,
            run.parameters(),
            run.tokens(),
            run.perplexity(),
            run.bits(),
            run.gold("problems"),
            run.file("eval.json"),
        ]
        for run in _runs(folder)
    ]
    code = [
        [run.name, run.syntax("passes"), run.syntax("non_trivial"), run.passed("problems", "1"), run.passed("problems", "5"),
         run.file("eval.json")]
        for run in _runs(folder)
    ]  # fmt: skip
    falls = [
        [run.name, run.val("val_loss", 0), run.val("val_loss"), run.fall(), "44%" if run.name == "sft-3-150m" else MISSING,
         run.file("metrics.jsonl")]
        for run in _runs(folder) if run.name.startswith("sft")
    ]  # fmt: skip
    said = ["a base's held-out documents are whole files; a fine-tuned run's are responses: the two do not compare"]
    said += [f"the seed, {size}: {claim}" for size, claim in CLAIMED.items()]
    return [
        Section("Losses on held-out documents",
                ["run", "parameters", "tokens", "perplexity", "bits per byte", "gold bits per byte, problems", "file"],
                losses, said),
        Section("Samples", ["run", "compile", "and are not trivial", "pass@1", "pass@5", "file"], code,
                ["the seed's 225M model: 100% of its samples compile after fine-tuning",
                 "pass@k on problems/, levels 0 and 1, five samples of each"]),
        Section("Fall of the loss on responses in fine-tuning", ["run", "before", "after", "fall", "the seed", "file"], falls),
        _spikes(folder),
    ]  # fmt: skip


def _spikes(folder: Path) -> Section:
    rows = []
    for remedy in REMEDIES:
        run = Run(folder, f"spike-{remedy}")
        count, worst, norm = spikes(run.metrics)
        skipped = next((line["skipped_steps"] for line in reversed(run.metrics) if "skipped_steps" in line), None)
        known = bool(run.metrics)
        rows.append([remedy, f"{count}" if known else MISSING, f"{worst:.2f}" if known else MISSING,
                     f"{norm:.1f}" if known else MISSING, MISSING if skipped is None else f"{skipped}",
                     run.val("val_loss"), run.file("metrics.jsonl")])  # fmt: skip
    notes = [
        f"the smallest size, {SPIKE_STEPS} steps at a constant rate of {SPIKE_RATE:g}, without clipping",
        "a spike: a logged loss of more than 1.2 times the median of the 20 before; a step that is skipped logs no loss",
        "with more accumulation a step has twice the rows, so the runs have seen different numbers of tokens",
        "the seed says that the three remedies help, without figures",
    ]
    columns = ["remedy", "spikes", "worst loss / median", "largest norm / median", "skipped", "last val loss", "file"]
    return Section("A run made to spike, with and without the remedies", columns, rows, notes)


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"bases": [f"base-{size}" for size in SIZES], "fine-tuning": [f"sft-{EPOCHS[-1]}-{size}" for size in SIZES],
            "spikes": [f"spike-{remedy}" for remedy in REMEDIES]}  # fmt: skip


STUDY = Study("000", TITLE, plan, sources, sections, runs_by_plot)
