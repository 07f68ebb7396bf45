"""Study 000: three sizes of GPT-2 for Python, before and after one and three epochs of instructions, and a run made to spike."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from config import Config
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.run_results import MISSING, Run, lead_text, spikes
from kindling.studies.shared_steps import (
    BYTES_PER_TOKEN,
    FULL_NEW_TOKENS,
    NEW_TOKENS,
    bytes_for_examples,
    bytes_of_rows,
    bytes_read,
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
KINDS = ("base", *(f"sft-{epochs}" for epochs in EPOCHS))  # of runs of each size
BENCHMARKS = {"problems": 5, "humaneval": 1}  # samples of each problem
WARMUP, FEWEST_WARMUP = 0.03, 5  # of a fine-tuning: share of its steps, and steps
SPIKE_STEPS = 200
SPIKE_RATE = 40.0  # times the width: the narrower a model, the higher is the rate at which its loss begins to spike
USUAL = "usual rate"  # without a remedy, at the rate of the base: what is no spike
SPIKE_RUNS = {USUAL: (), "no remedy": (), "accumulation": ("accumulation",), "epsilon": ("epsilon",), "skipping": ("skipping",),
            "all": ("accumulation", "epsilon", "skipping")}  # fmt: skip
ROWS_BYTES = 6_700_000  # of the 18,612 instructions and answers
FEWEST_ROWS_BYTES = 1_000_000
CLAIMED = {
    "150m": "perplexity 2.16 after three epochs",
    "225m": "perplexity 2.12, all samples compile, after fine-tuning",
}


def bases(scale: float, inputs: Inputs) -> dict[str, Config]:
    """Return the configs of the three pre-trainings."""
    small = {size: shrink(preset(f"code-{size}"), scale) for size in SIZES}
    if inputs.preset and scale == 1:
        return small
    largest = max(small.values(), key=lambda cfg: cfg.tokens)
    if inputs.preset:
        same = {size: replace(cfg, data=largest.data) for size, cfg in small.items()}
    else:
        source = inputs.code_source(round(bytes_read(largest, inputs))).source
        same = {size: on_local(cfg, source, drop_generated=True) for size, cfg in small.items()}
    # the same data by one name: they are built once, and the losses compare
    return {size: replace(cfg, preset=f"code-{SIZES[0]}") for size, cfg in same.items()}


def rows_bytes(smallest: Config, inputs: Inputs) -> int | None:
    """Return how many bytes of rows are read to fine-tune on: of a whole data set, in its ratio to the bases.

    None: the examples are mined from this machine's Python.
    """
    if not inputs.preset and inputs.instructions is None:
        return None
    most = max(FEWEST_ROWS_BYTES, min(ROWS_BYTES, round(0.02 * smallest.tokens * BYTES_PER_TOKEN)))
    return most if inputs.preset else min(most, bytes_of_rows(inputs.instructions_source(most).source))


def tuning_tokens(smallest: Config, inputs: Inputs) -> float:
    """Return the tokens of an epoch of instructions: 2% of the smallest base's, or what is read of rows that are given."""
    n_bytes = rows_bytes(smallest, inputs)
    return 0.02 * smallest.tokens if n_bytes is None else n_bytes / BYTES_PER_TOKEN


def fine_tuning(epochs: int, size: str, found: dict[str, Config], inputs: Inputs) -> Config:
    """Return the config of a base's fine-tuning. Its learning rate keeps the project's ratio to that of the base."""
    smallest = found[SIZES[0]]
    cfg, base, tokens = preset("alpaca"), found[size], tuning_tokens(smallest, inputs)
    rate = cfg.train.lr * base.train.lr / preset(f"code-{size}").train.lr
    cfg = replace(cfg, train=replace(cfg.train, epochs=float(epochs), lr=float(f"{rate:.2g}")))
    n_bytes = rows_bytes(smallest, inputs)
    if inputs.preset and n_bytes == ROWS_BYTES:
        return cfg  # the whole data set, as the project
    steps = epochs * tokens / (cfg.train.batch_size * base.model.block_size)
    warmup = min(cfg.train.warmup_steps, max(FEWEST_WARMUP, round(WARMUP * steps)))
    cfg = replace(cfg, train=replace(cfg.train, warmup_steps=warmup))
    if inputs.preset:
        source = replace(cfg.data.sources[0], max_bytes=n_bytes)
    else:
        source = inputs.instructions_source(n_bytes or bytes_for_examples(tokens)).source
    data = replace(cfg.data, sources=(source,), drop_generated=True)
    return replace(cfg, data=replace(data, val_fraction=0.04, test_fraction=0.04))


def spiking(cfg: Config, name: str) -> Config:
    """Return a short run at a rate that makes it spike, with one of the project's remedies, or a run that is compared with it."""
    remedies, rate = SPIKE_RUNS[name], float(f"{SPIKE_RATE / cfg.model.n_embd:.2g}")
    train = replace(
        cfg.train, max_steps=SPIKE_STEPS, lr=cfg.train.lr if name == USUAL else rate, warmup_steps=5, schedule="constant",
        grad_clip=0.0, spike_ratio=0.0, max_skipped_steps=SPIKE_STEPS,  # it never goes back
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
    of_first = [cfg for cfg in found.values() if cfg.preset == found[SIZES[0]].preset]  # all that share its build
    steps = [data_step(found[SIZES[0]], clock, max(bytes_read(cfg, inputs) for cfg in of_first))]
    for remedy in SPIKE_RUNS:  # they are short
        steps.append(training_step(spiking(found[SIZES[0]], remedy), _spike_name(remedy), clock, ("data",)))
    new_tokens = FULL_NEW_TOKENS if scale == 1 else NEW_TOKENS
    for size, cfg in found.items():
        base, data = f"base-{size}", "data"
        if cfg.preset != found[SIZES[0]].preset:  # at full size from the hub, each preset has its own
            data = f"data-{size}"
            steps.append(data_step(cfg, clock, bytes_read(cfg, inputs), data))
        steps.append(training_step(cfg, base, clock, (data,)))
        evaluated = evaluation_step(base, cfg, clock, inputs.sandbox, benchmarks=BENCHMARKS, new_tokens=new_tokens)
        steps.append(evaluated)
        for epochs in EPOCHS:
            name, sft = f"sft-{epochs}-{size}", fine_tuning(epochs, size, found, inputs)
            tokens = epochs * tuning_tokens(found[SIZES[0]], inputs)
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
                    f"{epochs} epoch{'s' * (epochs > 1)} of instructions",
                )
            )
            tuned = evaluation_step(
                name, cfg, clock, inputs.sandbox, held_out=2e4, benchmarks=BENCHMARKS, new_tokens=new_tokens
            )
            steps.append(tuned)
    return steps


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    rows = inputs.instructions_source(1_000_000).said
    if n_bytes := rows_bytes(bases(scale, inputs)[SIZES[0]], inputs):
        rows += f", its first {n_bytes / 1e6:.1f} MB"
    return described(inputs, inputs.code_source(1_000_000).said.split(",")[0], rows)


def _spike_name(remedy: str) -> str:
    return f"spike-{remedy.replace(' ', '-')}"


def _runs(folder: Path) -> list[Run]:
    return [Run(folder, f"{kind}-{size}") for size in SIZES for kind in KINDS]


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    return [_losses(folder), _size_section(folder), _samples(folder), *_responses(folder), _spikes(folder)]


def _losses(folder: Path) -> Section:
    rows = [
        [run.name, run.parameters(), run.tokens(), run.perplexity(), run.bits(), run.gold("problems"),
         run.passes() if run.name.startswith("base") else MISSING,  # epochs of rows with padding
         run.file("eval.json")]
        for run in _runs(folder)
    ]  # fmt: skip
    notes = [
        "passes: how often a base read its training data; its later tokens are not new ones",
        "a base's held-out documents are whole files; a fine-tuned run's are responses: the two do not compare",
        *(f"the project, {size}: {claim}" for size, claim in CLAIMED.items()),
    ]
    columns = [
        "run",
        "parameters",
        "tokens",
        "perplexity",
        "bits per byte",
        "gold bits per byte, problems",
        "passes",
        "file",
    ]
    return Section("Losses on held-out documents", columns, rows, notes)


def _samples(folder: Path) -> Section:
    rows = [
        [run.name, run.syntax("passes"), run.syntax("non_trivial"), run.passed("problems", "1"), run.passed("problems", "5"),
         run.passed("humaneval", "1"), run.gold("humaneval"), run.file("eval.json")]
        for run in _runs(folder)
    ]  # fmt: skip
    notes = [
        "the project's 225M model: 100% of its samples compile after fine-tuning",
        "problems/: levels 0 and 1, five samples of each; HumanEval: one sample of each; below full size a sample ends after "
        f"{NEW_TOKENS} tokens, which are too few for a good part of HumanEval's solutions",
        "what compiles: beside the benchmarks, a base continues held-out functions, a fine-tuned run answers held-out "
        "instructions",
        *_skipped(folder),
    ]
    columns = ["run", "compile", "and are not trivial", "problems pass@1", "pass@5", "HumanEval pass@1",
               "gold bits per byte, HumanEval", "file"]  # fmt: skip
    return Section("Samples", columns, rows, notes)


def _responses(folder: Path) -> list[Section]:
    """Return what fine-tuning changed on the responses: the loss as the project tells it, and two figures beside it."""
    tuned = [run for run in _runs(folder) if run.name.startswith("sft")]
    falls = [
        [run.name, run.val("val_loss", 0), run.val("val_loss"), run.fall(), "44%" if run.name == "sft-3-150m" else MISSING,
         run.file("metrics.jsonl")]
        for run in tuned
    ]  # fmt: skip
    others = [
        [run.name, *run.first_and_last("val_perplexity", ".2f"), *run.first_and_last("val_bits_per_byte"),
         run.file("metrics.jsonl")]
        for run in tuned
    ]  # fmt: skip
    return [
        Section("Fall of the loss on responses in fine-tuning", ["run", "before", "after", "fall", "the project", "file"], falls),
        Section("The same responses in perplexity and bits per byte",
                ["run", "perplexity before", "after", "bits per byte before", "after", "file"], others,
                ["before: by the base, which was never trained on a response"]),
    ]  # fmt: skip


def _skipped(folder: Path) -> list[str]:
    """Return notes on benchmarks whose code was not run, each once, with the runs."""
    runs: dict[str, list[str]] = {}
    for run in _runs(folder):
        for name, why in run.skipped().items():
            runs.setdefault(f"{name} was not run: {why}", []).append(run.name)
    return [f"{why} ({', '.join(names)})" for why, names in runs.items()]


def _size_section(folder: Path) -> Section:
    """Return by how much each size is better than the one before it, on the same texts."""
    rows = []
    for kind in KINDS:
        for one, two in pairwise(SIZES):
            before, run = (Run(folder, f"{kind}-{size}") for size in (one, two))
            rows.append([run.name, before.name, run.held_out_change(before), run.gold_change(before),
                         lead_text(before, run) if kind == "base" else MISSING,
                         run.file("losses.jsonl")])  # fmt: skip
    notes = [
        "95% intervals over documents and problems, which are the same for both; * where 0 is outside",
        "gold bits per byte are from eval.json beside the file, and the last column is from metrics.jsonl",
        "better from: the training tokens from which on all validations are below those of the smaller size at as many tokens, "
        "where both read the same part of the split; towards its end the smaller one's learning rate has decayed further",
    ]
    columns = ["run", "minus", "bits per byte", "gold bits per byte, problems", "better from", "file"]
    return Section("Each size beside the one before it", columns, rows, notes, names=2)


def _spikes(folder: Path) -> Section:
    rows = []
    for remedy in SPIKE_RUNS:
        run = Run(folder, _spike_name(remedy))
        count, worst, norm = spikes(run.metrics)
        cells = [f"{count}", f"{worst:.2f}", f"{norm:.1f}", f"{run.skipped_steps()}"] if run.metrics else [MISSING] * 4
        rate = f"{run.config().train.lr:g}" if run.trained else MISSING
        rows.append([remedy, rate, *cells, run.val("val_loss"), run.file("metrics.jsonl")])
    notes = [
        f"the smallest size, {SPIKE_STEPS} steps at a constant rate without clipping: {SPIKE_RATE:g} over the width, or that "
        f"of the base ({USUAL}), to see what is no spike",
        "a spike: a logged loss of more than 1.2 times the median of the 20 before; a step that is skipped logs no loss",
        "with more accumulation a step has twice the rows, so the runs have seen different numbers of tokens",
        "the project says that the three remedies help, without figures",
    ]
    columns = [
        "remedy",
        "rate",
        "spikes",
        "worst loss / median",
        "largest norm / median",
        "skipped",
        "last val loss, nats a token",
        "file",
    ]
    return Section("A run made to spike, with and without the remedies", columns, rows, notes)


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"bases": [f"base-{size}" for size in SIZES], "fine-tuning": [f"sft-{EPOCHS[-1]}-{size}" for size in SIZES],
            "spikes": [_spike_name(remedy) for remedy in SPIKE_RUNS]}  # fmt: skip


STUDY = Study("000", TITLE, plan, sources, sections, runs_by_plot)
