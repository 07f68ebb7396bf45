"""Says what to change when a step of training does not fit into the memory of the device.

The micro-batch that fits is found by trying: steps with fewer rows are done, and thrown away, until one fits.
"""

from __future__ import annotations

from kindling import device
from kindling.errors import KindlingError
from kindling.training.trainer import Trainer


class OutOfMemoryError(KindlingError):
    """A step of training needs more memory than the device has."""


def out_of_memory(trainer: Trainer) -> OutOfMemoryError:
    """Return the error for a run whose step did not fit, with the settings that help.

    With one rank, the largest micro-batch that fits is named. Trying this changes the weights, so `trainer` must not be saved
    afterwards. Call it after the `except` block: the error there holds the memory of the failed step.
    """
    failed, runtime = trainer.micro_batch, trainer.runtime
    advice = ["--train.activation-checkpointing True", "a lower --model.block-size"]
    if trainer.train.activation_checkpointing:
        advice.pop(0)
    if trainer.world.size > 1:  # a trial on one rank would wait for the others
        if failed > 1:
            advice.insert(0, f"--train.micro-batch-size {failed // 2}")
        if trainer.train.parallel != "fsdp":
            advice.insert(-1, "--train.parallel fsdp")
        fits = ""
    else:
        largest = largest_that_fits(trainer)
        fits = ", nor does one row" if largest is None else f", while {largest} {'does' if largest == 1 else 'do'}"
        if largest is not None:
            advice.insert(0, f"--train.micro-batch-size {largest}")
    others = "end the other programs, or " if device.memory_of_others(runtime.device) else ""
    kept = "; what was saved is kept, and the same command goes on from it" if trainer.run.checkpoints() else ""
    return OutOfMemoryError(
        f"a micro-batch must fit into {device.describe_memory(runtime.device)}, but one of {failed} rows of "
        f"{trainer.cfg.model.block_size} tokens does not{fits if failed > 1 else ''}; {others}set {' or '.join(advice)}{kept}"
    )


def largest_that_fits(trainer: Trainer) -> int | None:
    """Return the largest smaller micro-batch with which a whole step fits, uncompiled; None if none does."""
    trainer.model.disable_compile()
    for rows in range(trainer.micro_batch - 1, 0, -1):
        if trainer.rows_per_rank % rows:
            continue
        trainer.micro_batch = rows
        trainer.model.zero_grad(set_to_none=True)
        device.release_memory(trainer.runtime.device)
        if fits(trainer):
            return rows
    return None


def fits(trainer: Trainer) -> bool:
    """Return whether one step fits into memory. It changes the weights."""
    try:
        trainer.finish_step(trainer.launch_step())
    except RuntimeError as e:
        if not device.is_out_of_memory(e):
            raise
        return False
    return True
