"""Chooses the size of a study that fits the time, from measured speed, and keeps the plan in the study's folder.

    scale, steps = fit(study.plan, clock, inputs, 3600)

The dial goes up from the smallest size. Each size is first reckoned from the speed of the one before; only what may fit is
measured. So a size that would take days is never tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kindling.studies.dial import LADDER
from kindling.studies.inputs import Inputs
from kindling.studies.speed import Clock
from kindling.studies.steps import Step, StudyError, duration
from kindling.tables import Section

MakePlan = Callable[[float, Clock, Inputs], list[Step]]


class Fitted(NamedTuple):
    """A plan that fits: the dial, and the steps."""

    scale: float
    steps: list[Step]


def total(steps: list[Step]) -> float:
    """Return the estimated seconds of all steps."""
    return sum(step.seconds for step in steps)


def fit(make: MakePlan, clock: Clock, inputs: Inputs, seconds: float, name: str = "a study") -> Fitted:
    """Return the largest plan whose steps take at most `seconds`; raises StudyError, which says what fits, if none does."""
    sizes = sorted(LADDER)
    clock.measuring = True
    steps = make(sizes[0], clock, inputs)
    if total(steps) > seconds:
        raise StudyError(
            f"study {name} must have at least {_minutes(total(steps))} minutes on this machine for its smallest sizes, but was "
            f"given {seconds / 60:g}; give --minutes {_minutes(total(steps))}"
        )
    best, tried = 0, {0}
    while True:
        clock.measuring = False
        candidates = [
            i for i in range(best + 1, len(sizes)) if i not in tried and all(j > i or j <= best for j in tried)
        ]
        fitting = [i for i in candidates if total(make(sizes[i], clock, inputs)) <= seconds]
        clock.measuring = True
        if not fitting:
            return Fitted(sizes[best], steps)
        tried.add(fitting[-1])
        measured = make(sizes[fitting[-1]], clock, inputs)
        if total(measured) <= seconds:
            best, steps = fitting[-1], measured


def _minutes(seconds: float) -> int:
    return int(seconds // 60) + 1


def plan_section(steps: list[Step], seconds: float) -> Section:
    """Return the table of a plan: each step, its size and tokens, and how long."""
    rows = [[step.name, step.script, step.about, duration(step.seconds)] for step in steps]
    rows.append(["all", "", f"{len(steps)} steps, in {duration(seconds)}", duration(total(steps))])
    return Section("Plan", ["step", "script", "size", "about"], rows, names=3)
