"""kill -9 at random points of a training run, over and over: every start goes on from what the one before acknowledged."""

import random
import time

import pytest

from faults.runs import Forked, completed, final_weights, flags, newest_step, unloadable
from kindling.runs.checkpoint import RunDirectory

pytestmark = pytest.mark.faults
KILLS, WHOLE = 200, 4
STEPS = 60


class Processes:
    """Starts of the same run, of which a few are whole processes: `python main.py`, as a user has them."""

    def __init__(self, rng: random.Random):
        self.rng, self.kills, self.during_save = rng, 0, 0
        self.start_s = {True: 5.0, False: 0.3}  # until the first step, as measured so far; True: of a whole process

    def killed(self, argv: list[str], work, whole: bool) -> tuple[bool, list[int], Forked]:
        """Start the run and kill it: one time in five before its first step, else within a quarter of a second after it.

        Returns whether it was killed before its end, what it had acknowledged, and the process.
        """
        early = self.rng.random() < 0.2
        delay_s = self.start_s[whole] * (self.rng.random() if early else 1) + (
            0 if early else self.rng.uniform(0, 0.25)
        )
        child = Forked("main.py", argv, work, harm=None, whole=whole)
        killed = child.kill_after(delay_s)
        if child.started_s is not None:
            self.start_s[whole] = 0.8 * self.start_s[whole] + 0.2 * child.started_s
        self.kills += killed
        return killed, child.saved, child


def test_two_hundred_kills_lose_nothing(work, corpus, record):
    began, rng = time.perf_counter(), random.Random(8)
    settings = {"max_steps": STEPS, "save_every": 1, "eval_every": 30, "log_every": 1}
    whole = completed("main.py", flags(corpus, "undisturbed", **settings), work)
    wanted = final_weights(RunDirectory(work / "runs/undisturbed"))
    processes, problems, lost, different, finished, number = Processes(rng), [], 0, 0, 0, 0
    acknowledged = 0
    while processes.kills < KILLS:
        run = RunDirectory(work / f"runs/killed-{number}")
        killed, saved, child = processes.killed(
            flags(corpus, run.path.name, **settings), work, whole=processes.kills >= KILLS - WHOLE
        )
        problems += unloadable(run) if run.exists() else []
        lost += run.exists() and newest_step(run) < max([acknowledged, *saved])
        acknowledged = max([acknowledged, *saved])
        if not killed:
            assert child.code == 0, child.text
        # twice a run is let go on to its end, also where the machine is so busy that no run gets there by itself
        if not killed or processes.kills in (KILLS // 2, KILLS):
            end = child if not killed else completed("main.py", flags(corpus, run.path.name, **settings), work)
            different += end.digest != whole.digest or final_weights(run) != wanted
            finished, number, acknowledged = finished + 1, number + 1, 0
    note = (
        f"{KILLS - WHOLE} forks of a process that has torch imported, {WHOLE} whole processes; a checkpoint each step; "
        f"{finished} runs of {STEPS} steps came of it, {different} of them other in their bits than the undisturbed one"
    )
    record("kill -9 in training", KILLS, KILLS - len(problems), lost + different, time.perf_counter() - began, note)
    assert not problems and not lost and not different and finished >= 2
