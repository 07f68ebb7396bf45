"""Pre-train a model from random weights: prepare the data, train, evaluate, show samples.

    python main.py                                            # what config.RUN names
    python main.py --preset code-50m --train.max-steps 200
    torchrun --nproc-per-node 2 main.py                       # in several processes (docs/scale.md)

The same command resumes the run from its newest checkpoint, bit for bit. If the run is complete, it says so.
`--train.extend RUN` goes on with a run, as a new run with a later end (docs/reliability.md).
`--fresh` starts over and keeps the old run under another name. `--dry-run` measures a few steps and stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kindling.cli import parse_cli, run_script
from kindling.config_io import ConfigFlags
from kindling.data.preflight import require_documents
from kindling.distributed import require_single_process
from kindling.runs.checkpoint import RUNS, RunDirectory, step_of
from kindling.sample_prompts import generate_command, knows_no_python
from kindling.stopping import exit_on_sigterm
from kindling.training.early_checks import check_inputs, run_to_extend

if TYPE_CHECKING:
    from config import Config
    from kindling.training.trainer import Trainer


@dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags
    fresh: bool = False
    """Start over; an old run of this name is kept as NAME.old-1."""
    dry_run: bool = False
    """Print the parameters, memory, measured speed and duration of the run, then stop."""


def main(argv: list[str] | None = None) -> int:
    """Train the run that the command line describes, or with --dry-run only measure it."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    require_documents(flags.config)
    run = RunDirectory(RUNS / flags.config.run_name)
    if flags.dry_run:
        require_single_process("--dry-run")
        from kindling import device
        from kindling.training.dry_run import dry_run
        from kindling.training.start_or_resume import new_model

        device.set_threads(flags.config.train.threads)
        runtime = device.resolve(flags.config.train)
        done = steps_done(flags.config, run, flags.fresh)  # before anything is measured: it may raise
        print(dry_run(flags.config, new_model(flags.config, runtime), runtime, done))
        print("this was a dry run: nothing was written; next: the same command without --dry-run")
        return 0
    check_inputs(flags.config, run, run.exists() and not flags.fresh)
    from kindling.training.stage import train_stage  # imports torch

    return train_stage(flags.config, flags.fresh, report)


def steps_done(cfg: Config, run: RunDirectory, fresh: bool) -> int:
    """Return the steps that a run need not do: those of its newest checkpoint, or of the one that it goes on from."""
    if not fresh and (saved := run.checkpoints()):
        return step_of(saved[-1])
    if cfg.train.extend is None:
        return 0
    from kindling.training.extend import branch

    folder, _ = branch(run_to_extend(cfg, run), cfg.train)
    return step_of(folder)


def report(trainer: Trainer) -> list[str]:
    """Print samples, the validation loss and where the run cannot go; return the commands to try next."""
    from kindling.formats.portability import advice

    path, result = trainer.run.path, trainer.state.last_eval
    print(f"\n{samples(trainer)}")
    of = "the whole held-out split" if trainer.state.whole_is_evaluated else "a part of the held-out split"
    print(
        f"validation over {of}: loss {result['val_loss']:.4f}, perplexity {result['val_perplexity']:.2f}, "
        f"{result['val_bits_per_byte']:.4f} bits per byte"
    )
    if (said := advice(trainer.cfg)) is not None:
        print(said)
    commands = [f"python evaluate.py {path}", generate_command(path, trainer.cfg)]
    # by default, fine-tuning is on functions of Python
    return commands if knows_no_python(trainer.cfg) else [*commands, f"python sft_train.py {path}"]


def samples(trainer: Trainer) -> str:
    """Return the model's continuation of each sample prompt. Sample n is drawn with seed n - 1, so it can be repeated."""
    from kindling.training.samples import draw_samples

    drawn = enumerate(draw_samples(trainer, max_new_tokens=120), 1)
    return "\n".join(f"--- sample {n}, from {prompt!r}\n{(prompt + text).rstrip()}\n" for n, (prompt, text) in drawn)


if __name__ == "__main__":
    exit_on_sigterm()
    run_script(main)
