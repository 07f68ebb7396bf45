"""One stage of training, from its config to the saved weights. main.py and sft_train.py share it.

exit_code = train_stage(cfg, fresh, report)                 # pre-training
exit_code = train_stage(cfg, fresh, report, base=run)       # fine-tuning of another run
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from config import Config
from kindling import device
from kindling.data.audit import audit_examples
from kindling.data.build import prepare
from kindling.data.examples import open_split, training_rows
from kindling.data.packing import PieceRows
from kindling.data.shards import TrainingRows
from kindling.distributed import process_group
from kindling.runs.checkpoint import RUNS, RunDirectory
from kindling.training.extend import begin_extension
from kindling.training.loop import fit
from kindling.training.schedule import has_stable_part
from kindling.training.start_or_resume import check_config_changes, check_new_run, data_of_run, start_or_resume
from kindling.training.trainer import Trainer


def train_stage(
    cfg: Config, fresh: bool, report: Callable[[Trainer], list[str]], base: RunDirectory | None = None
) -> int:
    """Prepare the data, start or resume the run of `cfg`, train it to its end, and report. Return the exit code.

    `report` prints samples and figures, and returns the commands to try next. `base` is the run to fine-tune; with it,
    every example is audited before the first step.
    """
    started = time.perf_counter()
    device.resolve(cfg.train)  # what the machine lacks is said before the data are built
    device.require_threads(cfg.train.threads)
    run = RunDirectory(RUNS / cfg.run_name)
    tokenizer = None if base is None else base.tokenizer()
    with process_group(cfg.train.device) as world, contextlib.ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(run.lock()))
        resuming = world.on_main(run.exists) and not fresh
        if cfg.train.extend is not None and not (resuming and world.on_main(run.checkpoints)):
            dataset, resuming = begin_extension(cfg, run, tokenizer, world), True
        elif resuming:
            world.on_main(lambda: check_config_changes(run.config(), cfg, run))
            dataset = world.main_first(lambda: data_of_run(cfg, run, tokenizer))
        else:
            world.on_main(lambda: check_new_run(cfg, run, fresh))
            dataset = world.main_first(lambda: open_split(cfg, prepare(cfg, tokenizer), "train"))
        rows = training_rows(cfg, dataset)
        if tokenizer is not None:
            audit_examples(cfg, rows, tokenizer)
        trainer = start_or_resume(cfg, run, resuming, dataset, rows, world)
        print(describe(trainer, rows, base))
        if trainer.share() >= 1:
            print(ways_on(trainer))
        else:
            if trainer.state.step:
                print(f"resuming at step {trainer.state.step}")
            if code := fit(trainer):
                print(f"stopped and saved at step {trainer.state.step}; the same command resumes")
                return code
        state = trainer.state
        if not state.last_eval or state.last_eval_step != state.step:  # for example after max_steps was lowered
            assert trainer.validation is not None, "start_or_resume sets it"
            state.last_eval, state.last_eval_step = trainer.validation.whole(trainer.model), state.step
        digest = trainer.digest()
        if world.main:
            commands = report(trainer)
            print(summary_line(trainer, digest, time.perf_counter() - started, resuming))
            print(f"results in {run.path}; next: " + "\n        or: ".join(commands))
    return 0


def ways_on(trainer: Trainer) -> str:
    """Return the text that a run is complete, and how it can go on."""
    more = "--train.max-steps N" if trainer.train.max_minutes is None else "--train.max-minutes N"
    said = f"the run is complete at step {trainer.state.step}; {more} goes on, --fresh starts over"
    if has_stable_part(trainer.train) and trainer.state.decay_step:
        said += f"; --train.extend {trainer.run.path} {more} goes on in a new run, from before the decay"
    return said


def describe(trainer: Trainer, rows: TrainingRows, base: RunDirectory | None) -> str:
    """Return the line about what is trained: parameters, hardware, length, and the size of an epoch."""
    cfg, runtime = trainer.cfg, trainer.runtime
    of_base = "" if base is None else f" of {base.path}"
    ranks = f", on {runtime.world.size} ranks" if runtime.world.size > 1 else ""
    # rows of examples may have padding, so their tokens are not counted
    epoch = f"{rows.n_rows * cfg.model.block_size:,} tokens" if base is None else f"{rows.n_rows:,} rows"
    padding = f" ({rows.wasted:.2%} padding)" if isinstance(rows, PieceRows) else ""
    return (
        f"{trainer.run.path}: {trainer.model.n_parameters():,} parameters{of_base} on {runtime.device.type} in "
        f"{runtime.precision}{ranks}, {length(cfg)}, {epoch} an epoch{padding}"
    )


def length(cfg: Config) -> str:
    """Return the length of a run as a text: tokens and steps, or minutes."""
    train = cfg.train
    if train.max_minutes is not None:
        more = "; data, evaluation and saving come on top"
        minutes = "1 minute" if train.max_minutes == 1 else f"{train.max_minutes:g} minutes"
        return f"{minutes} in steps of {train.batch_size} rows{more}"
    tokens = "" if cfg.data.instructions else f"{cfg.tokens:,} tokens in "
    return f"{tokens}{train.max_steps:,} steps of {train.batch_size} rows"


def summary_line(trainer: Trainer, digest: str, seconds: float, resumed: bool) -> str:
    """Return the line with the times of the run, the `seconds` of this command, skipped steps, and the state's digest."""
    state = trainer.state
    skipped = f", {state.skipped} steps skipped" if state.skipped else ""
    since = "it was resumed" if resumed else "the start"  # the other figures are of all commands of the run
    took = (
        f"{state.elapsed_s:.0f} s of training, {state.evaluation_s:.0f} s of evaluation, {seconds:.0f} s since {since}"
    )
    return f"{took}{skipped}; state sha256 {digest[:16]}"
