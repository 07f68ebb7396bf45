"""Chooses the size of a study that fits the time, from measured speed, and keeps the plan in the study's folder.

    scale, steps = largest_plan(study.plan, clock, inputs, 3600)

The dial goes up from the smallest size. Each size is first reckoned from the speed of the one before; only what may fit is
measured. So a size that would take days is never tried.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kindling.files import write_json
from kindling.studies.inputs import Inputs
from kindling.studies.sizes import LADDER
from kindling.studies.speed import Clock
from kindling.studies.steps import Step, StudyError, duration
from kindling.tables import Section

PLAN = "plan.json"

MakePlan = Callable[[float, Clock, Inputs], list[Step]]


class Fitted(NamedTuple):
    """A plan that fits: the dial, and the steps."""

    scale: float
    steps: list[Step]


def total(steps: list[Step]) -> float:
    """Return the estimated seconds of all steps."""
    return sum(step.seconds for step in steps)


def largest_plan(make: MakePlan, clock: Clock, inputs: Inputs, seconds: float, name: str = "a study") -> Fitted:
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


@dataclass(frozen=True)
class Plan:
    """What a study's folder was planned with. It is saved: measured again, the speed could give other steps."""

    minutes: float
    scale: float
    steps: tuple[Step, ...] | None
    """Empty for scaling, whose runs are in an entry of their own (scaling.py). None: only the minutes were kept."""
    data: dict[str, Any]
    """The flags of the data."""


def read_plan(folder: Path, minutes: float | None, data: dict[str, Any]) -> Plan | None:
    """Return the plan of a folder; None if it has none.

    `minutes` and `data` are the flags of this start; None means those of the plan. Raises StudyError if the plan has other
    minutes or other data, or if it is damaged.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "steps" not in found:
            plan = Plan(float(found["minutes"]), 1.0, None, {})
        else:
            steps = (
                Step(**{**step, **{k: tuple(step[k]) for k in ("arguments", "after", "reads")}})
                for step in found["steps"]
            )
            plan = Plan(float(found["minutes"]), float(found["scale"]), tuple(steps), dict(found["data"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise StudyError(f"{path} must be as study.py wrote it, but cannot be read ({e}); give another --out") from None
    if minutes not in (None, plan.minutes):
        raise StudyError(
            f"--minutes must be {plan.minutes:g}, as {path} has it, but is {minutes:g}; leave it out, or give another --out"
        )
    kept = data if plan.steps is None else plan.data
    if other := [key for key, value in data.items() if value and value != kept.get(key)]:
        flag = f"--{other[0].replace('_', '-')}"
        raise StudyError(
            f"{flag} must be {plan.data.get(other[0])}, as {path} has it, but is {data[other[0]]}; leave it out, or give "
            f"another --out"
        )
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Save a plan beside what else is in its file. Raises StudyError if the disk is full or the folder cannot be written."""
    path = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, known | asdict(plan))
    except OSError as e:
        raise StudyError(f"{folder} must be writable, but is not ({e.strerror}); free some space") from None


def plan_section(steps: list[Step], seconds: float) -> Section:
    """Return the table of a plan: each step, its size and tokens, and how long."""
    rows = [[step.name, step.script, step.about, duration(step.seconds)] for step in steps]
    rows.append(["all", "", f"{len(steps)} steps, in {duration(seconds)}", duration(total(steps))])
    return Section("Plan", ["step", "script", "size", "about"], rows, names=3)
