"""Fine-tune a pre-trained run on instructions: prepare the examples, audit every one, train, show answers.

    python sft_train.py                                   # the newest pre-trained run, into runs/NAME-sft
    python sft_train.py runs/code-50m --train.epochs 1
    python sft_train.py models/Qwen2.5-0.5B               # a model of others, in its own chat template, into runs/NAME-sft
    python sft_train.py runs/demo --preset alpaca --data.sources.0.kind jsonl --data.sources.0.path pairs.jsonl
    python sft_train.py --audit                           # only prepare and check the examples
    python sft_train.py --explain torch/package/package_exporter.py  # was it kept or dropped, and why

The loss covers each response and the end-of-text token after it; prompts are masked. Model and tokenizer come from the base
run. Without --preset, the preset follows from the base run's (presets.FINE_TUNING). If none is listed there, the examples are
made from the documented functions of this machine's Python. The same command resumes a run that was stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from config import Config
from kindling.cli import names_flag, parse_cli, run_script
from kindling.config_io import ConfigFlags, changed_fields
from kindling.data.explain import explain_path
from kindling.data.jinja_chat import is_jinja, require_trainable
from kindling.errors import ConfigError
from kindling.files import write_text
from kindling.paths import expand_home, require_runs
from kindling.stopping import exit_on_sigterm
from presets import FINE_TUNING, preset

if TYPE_CHECKING:
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.trainer import Trainer

OFFLINE = "docstrings"  # the preset for a base run that FINE_TUNING does not list; it needs no download
ANSWERS = "answers.jsonl"


@dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags
    base: tyro.conf.Positional[Path | None] = None
    """The run to fine-tune: its folder, or its name under runs/, or the folder of a model of others. Default: the newest
    pre-trained run."""
    audit: bool = False
    """Prepare and audit the examples, then stop."""
    explain: str | None = None
    """Prepare the examples, say what happened to this file or row, by its path or the end of its path, then stop."""
    run: Path | None = None
    """With --explain: prepare nothing, and read the build that this fine-tuned run was trained on."""
    fresh: bool = False
    """Start over; an old run of this name is kept as NAME.old-1."""


def parse(argv: list[str] | None) -> tuple[Flags, RunDirectory]:
    """Return the flags, applied to the preset for the base run, and the base run."""
    flags = parse_cli(Flags, __doc__ or "", argv, OFFLINE)
    named = flags.base or flags.config.train.init_from or flags.run
    path = None if named is None else expand_home(named, "the base run")
    require_runs(path)
    from kindling.formats.hf_import import find_model

    base = find_model(path, pretrained=True)
    suited = FINE_TUNING.get(base.config().preset, OFFLINE)
    return (flags if suited == OFFLINE else parse_cli(Flags, __doc__ or "", argv, suited)), base


def with_template(given: Config, base: RunDirectory, argv: list[str] | None) -> Config:
    """Return the config with the chat template that a model of others brought along, unless a flag names another.

    Raises TemplateError if it does not follow from that template what the model is to write.
    """
    own = base.config().data.template
    if names_flag(argv, "--data.template") or not is_jinja(own):
        return given
    require_trainable(own, base.tokenizer().special_tokens)
    return replace(given, data=replace(given.data, template=own))


def configured(flags: Flags, base: RunDirectory, argv: list[str] | None = None) -> Config:
    """Return the config of the fine-tuning: that of the flags, with the base run's model and tokenizer.

    Raises ConfigError if the flags do not suit.
    """
    from kindling.runs.checkpoint import RUNS
    from kindling.runs.loading import PretrainedFolder

    given, own = with_template(flags.config, base, argv), base.config()
    own_choice = {"model.dropout"} | ({"model.block_size"} if isinstance(base, PretrainedFolder) else set())
    changed = changed_fields(preset(given.preset), given)
    if given.preset == OFFLINE and any(s.kind != "docstrings" for s in given.data.sources):
        raise ConfigError(
            f"the sources of preset {OFFLINE} must be of kind docstrings, but one is of another kind; "
            f"for rows of instructions and answers use --preset alpaca"
        )
    if not given.data.instructions:
        raise ConfigError(
            f"preset {given.preset} must hold instructions and answers to fine-tune on, but holds documents; "
            f"use --preset {OFFLINE} or alpaca, or leave it out"
        )
    for field in changed:
        section, _, setting = field.partition(".")
        if section not in ("model", "tokenizer") or field in own_choice:
            continue
        if getattr(getattr(given, section), setting) != getattr(
            getattr(own, section), setting
        ):  # as in its own config.yaml
            raise ConfigError(
                f"{field} must be the base run's in fine-tuning, but is given; leave out --{field.replace('_', '-')}"
            )
    chosen = {f.partition(".")[2]: getattr(given.model, f.partition(".")[2]) for f in own_choice if f in changed}
    model = replace(own.model, **chosen)
    if isinstance(base, PretrainedFolder):
        base.require_context(model.block_size)
    path = base.path.resolve()
    name = given.name or f"{path.name}-sft"
    if (RUNS / name).resolve() == path:
        raise ConfigError(f"name must differ from the base run's, but is {name!r}; choose another --name")
    # one spelling for every way to name the base run, since resuming compares it
    source = RUNS / path.name if path.parent == RUNS.resolve() else path
    return replace(
        given, name=name, model=model, tokenizer=own.tokenizer, train=replace(given.train, init_from=str(source))
    )


def main(argv: list[str] | None = None) -> int:
    """Fine-tune the run of the command line."""
    flags, base = parse(argv)
    if flags.run is not None:
        return explain_run(flags.explain, flags.run)
    from kindling.data.build import prepare
    from kindling.data.examples import open_split, training_rows
    from kindling.distributed import require_single_process
    from kindling.errors import CheckpointError
    from kindling.runs.checkpoint import RUNS, RunDirectory
    from kindling.training.early_checks import check_inputs

    cfg = configured(flags, base, argv)
    if not base.checkpoints():
        raise CheckpointError(
            f"{base.path} must have a checkpoint to fine-tune, but has none; train it first with main.py"
        )
    tokenizer = base.tokenizer()
    if flags.explain is None and not flags.audit:
        run = RunDirectory(RUNS / cfg.run_name)
        check_inputs(cfg, run, run.exists() and not flags.fresh, tokenizer)
        from kindling.training.stage import train_stage  # imports torch

        return train_stage(cfg, flags.fresh, report, base)
    require_single_process("--audit" if flags.explain is None else "--explain")
    dataset = open_split(cfg, prepare(cfg, tokenizer), "train")
    if flags.explain is not None:
        print(f"reading {dataset.folder}, of these settings; --run names a run's", file=sys.stderr)
        print(explain_path(cfg, dataset.folder, flags.explain))
        return 0
    from kindling.data.audit import audit_examples

    audit_examples(cfg, training_rows(cfg, dataset), tokenizer)
    given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--audit"]
    print(f"this was the audit alone: nothing was trained; next: python sft_train.py {shlex.join(given)}".rstrip())
    return 0


def explain_run(explain: str | None, run: Path) -> int:
    """Answer --explain from the build that the run of --run was trained on."""
    from kindling.runs.loading import build_of_run

    if explain is None:
        raise ConfigError("--run must come with --explain, but comes alone; to fine-tune a run, name it without --run")
    print(explain_path(*build_of_run(run), explain))
    return 0


def report(trainer: Trainer) -> list[str]:
    """Print answers and what the fine-tuning changed; return the command to try next."""
    state, path = trainer.state, trainer.run.path
    before, after = state.first_eval, state.last_point or state.last_eval  # of the same examples
    print(f"\n{samples(trainer)}")
    stopped, n_answers = answer_held_out(trainer)
    print("on the responses of the held-out examples:")
    print(f"{'':<24}{'before':>10}{'after':>10}")
    for name, key in (("loss, nats a token", "val_loss"), ("perplexity", "val_perplexity")):
        change = f"{after[key] / before[key] - 1:>+9.0%}" if before else ""
        print(f"  {name:<22}{before.get(key, float('nan')):>10.4f}{after[key]:>10.4f}{change}")
    if n_answers:
        print(
            f"{stopped} of {n_answers} answers to held-out instructions stopped by themselves within the context "
            f"(all are in {path / ANSWERS})"
        )
    return [f"python generate.py {path} --chat"]


def samples(trainer: Trainer) -> str:
    """Return an answer to each of the config's sample instructions."""
    from kindling.training.samples import draw_samples

    drawn = enumerate(draw_samples(trainer, trainer.cfg.model.block_size), 1)
    return "\n".join(f"--- sample {n}: {instruction}\n{answer}\n" for n, (instruction, answer) in drawn)


def answer_held_out(trainer: Trainer) -> tuple[int, int]:
    """Answer held-out instructions, evenly spaced; return how many answers stopped by themselves, and how many there are.

    An answer may fill the rest of the context. All are written to ANSWERS in the run's folder.
    """
    from tqdm import tqdm

    from kindling.data.examples import PROMPT, Examples
    from kindling.generation.decoding import stream
    from kindling.generation.sampling import Sampling

    heldout = trainer.run.heldout("val")
    assert isinstance(heldout, Examples)
    tokenizer, model = trainer.run.tokenizer(), trainer.unsharded_model().eval()
    n = min(trainer.train.held_out_answers, heldout.n_examples)
    lines, stopped = [], 0
    for seed in tqdm(range(n), desc="answering held-out instructions", unit="answer", leave=False):
        example = heldout.example(seed * heldout.n_examples // n)
        n_prompt = int(example.segments[0, PROMPT])
        prompt = example.ids[:n_prompt].tolist()
        room = model.cfg.block_size - n_prompt + 1  # as in training, the last token is predicted from a full context
        ids = list(stream(model, prompt, Sampling(max_new_tokens=room, seed=seed), tokenizer.end_ids))
        stopped += len(ids) < room
        texts = {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(ids)}
        lines.append(json.dumps({**texts, "stopped": len(ids) < room, "seed": seed}, ensure_ascii=False) + "\n")
    write_text(trainer.run.path / ANSWERS, "".join(lines))
    return stopped, n


if __name__ == "__main__":
    exit_on_sigterm()
    run_script(main)
