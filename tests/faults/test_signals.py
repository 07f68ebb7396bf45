"""SIGTERM and SIGINT at random moments, in the middle of accumulating a step's gradients too: the run is saved, and goes on."""

import os
import random
import signal
import time

import pytest

from faults.runs import Forked, completed, final_weights, flags, newest_step, say
from kindling.runs.checkpoint import RunDirectory
from kindling.stopping import StopRequest
from kindling.training import trainer

pytestmark = pytest.mark.faults
SIGNALS, WHOLE = 20, 4
STEPS = 30


def tell_where_the_signal_came(pipe: int) -> None:
    """Have the process say whether a signal came while the gradients of a step were being accumulated."""
    accumulate, handle = trainer.Trainer.forward_backward, StopRequest._handle
    inside = []

    def accumulated(self):
        inside.append(True)
        try:
            return accumulate(self)
        finally:
            inside.clear()

    def handled(self, number, frame):
        say(pipe, "signal", int(bool(inside)))
        return handle(self, number, frame)

    trainer.Trainer.forward_backward, StopRequest._handle = accumulated, handled


def test_twenty_signals_end_saved_and_resume_to_the_same_bits(work, corpus, record):
    began, rng = time.perf_counter(), random.Random(2)
    # a step is eight micro-batches, so most of its time is in the window; nothing is saved but by the signal
    settings = {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 1, "eval_every": 1000, "save_every": 1000}
    undisturbed = completed("main.py", flags(corpus, "whole-signals", **settings), work)
    wanted = final_weights(RunDirectory(work / "runs/whole-signals"))
    good, inside, different = 0, 0, 0
    for n in range(SIGNALS):
        sent, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[n % 2]
        run = RunDirectory(work / f"runs/signal-{n}")
        argv, whole = flags(corpus, run.path.name, **settings), n >= SIGNALS - WHOLE
        child = Forked("main.py", argv, work, None if whole else tell_where_the_signal_came, whole)
        assert child.wait_for_step(rng.randrange(STEPS - 8)), child.text
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, sent)
        ended = child.wait()
        inside += sum(child.numbers("signal"))
        good += ended == code and child.saved[-1] == newest_step(run) and "the same command resumes" in child.text
        end = completed("main.py", argv, work)
        assert f"resuming at step {child.saved[-1]}" in end.text
        different += end.digest != undisturbed.digest or final_weights(run) != wanted
    note = (
        f"{SIGNALS - WHOLE} forks, of which {inside} were in the middle of accumulating a step's gradients, and {WHOLE} whole "
        f"processes; exit codes 143 and 130; all were resumed to their end"
    )
    record("SIGTERM and SIGINT", SIGNALS, good, different, time.perf_counter() - began, note)
    assert good == SIGNALS and not different and inside >= SIGNALS // 4
