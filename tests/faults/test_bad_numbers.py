"""NaN and infinity in the loss and in the gradients of one micro-batch of several, in runs of the real script."""

import math
import time

import pytest

from faults.runs import Forked, completed, flags, say
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.fsdp import state_digest
from kindling.runs.metrics import read_metrics
from kindling.training import trainer as trainer_module

pytestmark = pytest.mark.faults
BAD_STEP, BAD_MICRO, STEPS = 5, 2, 10
SETTINGS = {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "log_every": 1, "optimizer": "muon"}


def poisoned(where: str, value: float, steps: range):
    """Return what makes the loss, or the gradient of one weight, `value` in one micro-batch of each of these steps.

    The process says whether such a step, and the one after, left the weights as they were.
    """

    def harm(pipe: int) -> None:
        launch, summed = trainer_module.Trainer.launch_step, trainer_module.summed_loss
        now = {"step": -1, "micro": 0}

        def loss(model, batch, runtime):
            total, count = summed(model, batch, runtime)
            bad = now["step"] in steps and now["micro"] == BAD_MICRO and model.training
            now["micro"] += 1
            if bad and where == "loss":
                total = total * value
            elif bad:
                total.register_hook(lambda grad: grad * value)
            return total, count

        def launched(self):
            now.update(step=self.state.step, micro=0)
            before = state_digest(self.model, [])
            result = launch(self)
            if self.state.step - 1 in steps or self.state.step - 2 in steps:
                say(pipe, "unchanged", int(state_digest(self.model, []) == before))
            return result

        trainer_module.summed_loss, trainer_module.Trainer.launch_step = loss, launched

    return harm


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, float]]:
    """The kinds of bad numbers."""
    values = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
    return {
        f"{name} in the {where}": (where, value) for where in ("loss", "gradient") for name, value in values.items()
    }


def test_a_bad_micro_batch_is_one_skip_that_changes_no_bit(work, corpus, record, rows):
    began, good, wrong = time.perf_counter(), 0, []
    for n, (name, (where, value)) in enumerate(rows.items()):
        run = RunDirectory(work / f"runs/bad-{n}")
        harm = poisoned(where, value, range(BAD_STEP, BAD_STEP + 1))
        child = completed("main.py", flags(corpus, run.path.name, **SETTINGS), work, harm)
        counts = [line["skipped_steps"] for line in read_metrics(run.path / "metrics.jsonl") if "skipped_steps" in line]
        warned = [line for line in child.text.splitlines() if "skipped: loss" in line]
        skipped_once = counts[-1] == 1 and len(warned) == 1 and f"step {BAD_STEP + 1} skipped" in warned[0]
        if skipped_once and child.numbers("unchanged") == [1, 0]:  # the bad step changed nothing, the next one did
            good += 1
        else:
            wrong.append((name, counts, warned, child.numbers("unchanged")))
    note = f"micro-batch {BAD_MICRO + 1} of 4 in one step: one skip each, no bit of the weights changed, the next step goes on"
    record("NaN and inf, one micro-batch", len(rows), good, len(wrong), time.perf_counter() - began, note)
    assert not wrong, wrong


def test_a_run_that_skips_and_is_resumed_ends_in_the_same_bits(work, corpus, record):
    """The skip lies before the stop, so its count and its effect must be in what was saved."""
    began, harm = time.perf_counter(), poisoned("gradient", math.nan, range(BAD_STEP, BAD_STEP + 1))
    whole = completed("main.py", flags(corpus, "bad-whole", **SETTINGS), work, harm)
    argv = flags(corpus, "bad-resumed", **SETTINGS, save_every=BAD_STEP + 2)

    def killed(pipe: int) -> None:
        harm(pipe)
        launch = trainer_module.Trainer.launch_step

        def launched(self):
            if self.state.step == BAD_STEP + 3:
                raise SystemExit(9)
            return launch(self)

        trainer_module.Trainer.launch_step = launched

    child = Forked("main.py", argv, work, killed)
    assert child.wait() == 9 and child.saved == [BAD_STEP + 2], child.text
    end = completed("main.py", argv, work)
    equal = end.digest == whole.digest and "1 steps skipped" in end.text
    record("a skip, then resumed", 1, int(equal), int(not equal), time.perf_counter() - began, "")
    assert equal


def test_bad_steps_without_end_are_one_clear_line(work, corpus, record, rows):
    began, good, most = time.perf_counter(), 0, 3
    for n, (where, value) in enumerate(rows.values()):
        harm = poisoned(where, value, range(4, 10**6))
        argv = flags(corpus, f"endless-{n}", **{**SETTINGS, "max_steps": 60}, max_skipped_steps=most, save_every=4)
        child = Forked("main.py", argv, work, harm)
        clear = child.wait() == 1 and "not finite" in child.error
        good += clear and RunDirectory(work / f"runs/endless-{n}").newest() is not None
    note = f"with train.max_skipped_steps {most}; the checkpoint before them is whole"
    record("NaN and inf without end", len(rows), good, len(rows) - good, time.perf_counter() - began, note)
    assert good == len(rows)
