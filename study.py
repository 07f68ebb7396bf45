"""Run a study: the table of a project that the presets come from, measured again at the size that fits the time.

    python study.py 000 --minutes 60 --dry-run      # say what would be done, and how long it takes
    python study.py 000 --minutes 60                # plan, run, write studies/000/table.md, report.html and plots
    python study.py 000                             # go on where it was stopped
    python study.py all --minutes 240               # every study, in equal shares of the time
    python study.py scaling --predict 3h            # by a scaling study that was run: what to train here in three hours
    python study.py audit                           # recompute what the projects claim: parameters, tokens, losses, speed

It first measures the speed of a training step of each shape, then chooses the largest sizes whose steps fit, down from the
project's own. Steps are the scripts, run in the study's folder as a user would run them; what is done is not run again. Without
flags the data are those of this machine; --hub takes those of the presets.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError

if TYPE_CHECKING:
    from kindling.studies.inputs import Inputs
    from kindling.studies.report import Study

STUDIES = Path("studies")
MINUTES = 60.0
DATA_FLAGS = ("hub", "code", "prose", "mathematics", "instructions", "harness_data")
READS = {"000": ("code", "instructions"), "001": ("prose",), "002": ("code",), "003": ("prose",), "004": DATA_FLAGS[1:],
         "scaling": (), "all": DATA_FLAGS[1:]}  # the data flags of each study, besides --hub  # fmt: skip
SEEDS = ("000", "001", "002", "003", "004")
OTHERS = ("scaling",)


@dataclass
class Flags:
    """The script's command line."""

    name: tyro.conf.Positional[Literal["000", "001", "002", "003", "004", "scaling", "all", "audit"]] = "audit"
    """The study: a project's number, scaling, all of them, or the audit of their claims."""
    minutes: float | None = None
    """Time for all steps together; of all studies, in equal shares. Default: what a study's folder was planned with, else 60."""
    out: Path | None = None
    """The study's folder. Default: studies/NAME."""
    dry_run: bool = False
    """Print the plan, then stop."""
    hub: bool = False
    """Use the data of the presets, from the hub."""
    predict: str | None = None
    """For scaling: say which of our presets to train here in this time, such as 3h, and to what loss. Trains nothing."""
    code: Path | None = None
    """Code to train on: a folder, or rows (.jsonl) with columns content and language. Default: this machine's Python."""
    prose: Path | None = None
    """Prose: a text, or rows with a column text. Default: the docstrings of this machine's Python."""
    mathematics: Path | None = None
    """Mathematics: a text, or rows with a column text. Default: sums that are made up."""
    instructions: Path | None = None
    """Rows with columns instruction, input and output. Default: the documented functions of this machine's Python."""
    harness_data: Path | None = None
    """For 004: a folder with the data of lm-evaluation-harness's tasks, as evaluate.py takes it. Default: none, or the hub's."""


def study_of(name: str) -> Study:
    """Return a study by its name. Raises StudyError for one that is not there."""
    from kindling.studies.steps import StudyError

    modules = {seed: f"study_{seed}" for seed in SEEDS} | {"scaling": "scaling_results"}
    if name not in modules:
        raise StudyError(f"the study must be one of {', '.join(modules)}, all or audit, but is {name}; choose one")
    study: Study = import_module(f"kindling.studies.{modules[name]}").STUDY
    return study


def main(argv: list[str] | None = None) -> int:
    """Run the study, or several, or the audit."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    require_possible(flags)
    if flags.name == "audit":
        from kindling.studies.audit import audit_text

        print(audit_text())
        return 0
    if flags.predict is not None:
        return predict(flags)
    names = SEEDS + OTHERS if flags.name == "all" else (flags.name,)
    command = shlex.join(["python", "study.py", *(sys.argv[1:] if argv is None else argv)])
    share = None if flags.minutes is None else flags.minutes / len(names)
    if len(names) > 1:
        each = (
            f"what its folder was planned with, else {MINUTES:g} minutes" if share is None else f"{share:.3g} minutes"
        )
        print(f"note: {len(names)} studies, one after the other; each has {each}", file=sys.stderr, flush=True)
    code = 0
    for name in names:
        try:
            code = max(code, run_study(name, flags, share, command))
        except KindlingError as e:
            if len(names) == 1:
                raise
            print(f"error: study {name} is left out: {e}", file=sys.stderr, flush=True)
            code = max(code, 1)
        except KeyboardInterrupt:  # while nothing is trained: before the first step, or in the report
            print(f"stopped in study {name}; {command} goes on from here", flush=True)
            return 130
        if code > 1:  # stopped by a signal
            break
    return code


def require_possible(flags: Flags) -> None:
    """Raise StudyError for flags without a study, for a time that is not above 0, and for data that would not be read."""
    from kindling.studies.steps import StudyError

    if flags.name == "audit":
        kept = {f.name: getattr(flags, f.name) for f in fields(Flags) if f.name != "name"}
        given = [name for name, value in kept.items() if value is not None and value is not False]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            example = "scaling --predict 3h" if given[0] == "predict" else "000 --minutes 60"
            raise StudyError(
                f"{flag} must come with a study, but none is named, and the audit takes no flags; such as study.py {example}"
            )
        return
    if flags.minutes is not None and not 0 < flags.minutes < math.inf:
        raise StudyError(f"--minutes must be a positive number of minutes, but is {flags.minutes:g}; give at least 1")
    reads = READS[flags.name]
    if unread := [key for key in DATA_FLAGS[1:] if key not in reads and getattr(flags, key) is not None]:
        takes = ", ".join(f"--{key.replace('_', '-')}" for key in reads) or "no file: its data is that of modern-5m"
        raise StudyError(
            f"--{unread[0].replace('_', '-')} must be left out for the study {flags.name}, but is {getattr(flags, unread[0])}; "
            f"this study takes {takes}"
        )
    files = [key for key in DATA_FLAGS[1:] if key != "harness_data" and getattr(flags, key) is not None]
    if flags.hub and files and flags.name != "002":
        raise StudyError(
            f"--{files[0]} must be left out with --hub, which reads the data of the presets, but is {getattr(flags, files[0])}; "
            f"leave out one of the two"
        )
    if flags.harness_data is not None and find_spec("lm_eval") is None:
        raise StudyError(
            "--harness-data needs lm-eval, which is not installed; run pip install -r requirements-harness.txt, or leave it out"
        )


def run_study(name: str, flags: Flags, minutes: float | None, command: str) -> int:
    """Run a study as `run_in` does, in its folder, which is locked for it."""
    from kindling.studies.steps import only_study

    folder = (flags.out or STUDIES) / name if flags.name == "all" else flags.out or STUDIES / name
    unread: dict[str, Any] = {key: None for key in DATA_FLAGS[1:] if key not in READS[name]}
    flags = replace(flags, **unread)
    with contextlib.nullcontext() if flags.dry_run else only_study(folder):
        return run_in(folder, name, flags, minutes, command)


def run_in(folder: Path, name: str, flags: Flags, minutes: float | None, command: str) -> int:
    """Plan a study, run its steps and write its report; return the exit code."""
    from kindling.studies.plan import Plan, largest_plan, plan_section, read_plan, write_plan
    from kindling.studies.report import write_report
    from kindling.studies.speed import FRESH_S, Clock, machine_text
    from kindling.studies.steps import run_steps
    from kindling.tables import as_text

    study = study_of(name)
    given = {key: _as_text(getattr(flags, key)) for key in DATA_FLAGS}
    kept = read_plan(folder, minutes, given)
    minutes = minutes or (MINUTES if kept is None else kept.minutes)
    inputs = inputs_of(flags if kept is None else with_data(flags, kept.data), folder)
    clock = Clock(folder, max_age_s=FRESH_S if kept is None else math.inf)
    print(f"measuring the speed of this machine: {machine_text(clock.machine)} ...", flush=True)
    try:
        if name == "scaling":  # no project's sizes: they follow from the time
            from kindling.studies.scaling import scaling_steps

            scale, steps = 1.0, scaling_steps(folder, minutes, clock, flags.hub, keep=not flags.dry_run)
        elif kept is not None and kept.steps is not None:
            scale, steps = kept.scale, list(kept.steps)
        else:
            scale, steps = largest_plan(study.plan, clock, inputs, 60 * minutes, name)
    finally:
        clock.save()
    size = "" if name == "scaling" else f"{scale:.3g} of the project's own, "
    facts = [
        ("machine", machine_text(clock.machine)),
        ("size", f"{size}for {minutes:g} minutes"),
        ("data", study.sources(scale, inputs)),
        ("command", command),
    ]
    head = [f"Study {name}: {study.title}", *(f"{key}: {value}" for key, value in facts[:3])]
    print(as_text(head, [plan_section(steps, 60 * minutes)]), flush=True)
    if flags.dry_run:
        print(f"\nthis was a dry run: nothing was trained; next: {command.replace(' --dry-run', '')}")
        return 0
    if kept is None or kept.steps is None:
        write_plan(folder, Plan(minutes, scale, () if name == "scaling" else tuple(steps), given))
    study.write_inputs(scale, inputs)
    code = run_steps(steps, folder, command)
    if code > 1:
        return code
    table, report, plots = write_report(study, folder, steps, facts)
    print(as_text([f"Study {name}"], study.sections(folder)))
    print(f"\nwritten: {table}, {report}, {plots}/; each table names the files of its numbers, under {folder}")
    return code


def predict(flags: Flags) -> int:
    """Print which preset to train in a time, by the scaling study in its folder."""
    from kindling.studies.scaling_advice import advise, seconds_of_text
    from kindling.studies.speed import FRESH_S, Clock, machine_text
    from kindling.studies.steps import StudyError
    from kindling.tables import as_text

    if flags.name != "scaling" or flags.predict is None:
        raise StudyError(f"--predict must be asked of the study scaling, but the study is {flags.name}; name scaling")
    folder = flags.out or STUDIES / "scaling"
    clock = Clock(folder, max_age_s=FRESH_S)
    print(f"measuring the speed of this machine: {machine_text(clock.machine)} ...", flush=True)
    section = advise(folder, seconds_of_text(flags.predict), clock)
    clock.save()
    print(as_text([], [section]))
    return 0


def inputs_of(flags: Flags, folder: Path) -> Inputs:
    """Return the data that the flags name, and whether generated code can be run here."""
    from config import EvalConfig
    from kindling.evaluation.check_correctness import program_limits
    from kindling.sandbox.bubblewrap import SandboxError
    from kindling.sandbox.self_test import self_test
    from kindling.studies.inputs import Inputs

    try:
        self_test("bwrap", program_limits(EvalConfig()))
        sandbox = True
    except SandboxError as e:
        print(f"note: no generated code is run here ({e})", file=sys.stderr)
        sandbox = False
    given = (flags.code, flags.prose, flags.mathematics, flags.instructions, flags.harness_data)
    return Inputs(folder, flags.hub, sandbox, *given, harness=find_spec("lm_eval") is not None)


def _as_text(value: Path | bool | None) -> str | bool | None:
    """Return the value of a flag as the plan keeps it. A path is absolute, as another start may be from another folder."""
    return str(value.resolve()) if isinstance(value, Path) else value


def with_data(flags: Flags, data: dict[str, Any]) -> Flags:
    """Return the flags with the data of a plan."""
    paths: dict[str, Any] = {
        key: value if value is None or key == "hub" else Path(value) for key, value in data.items()
    }
    return replace(flags, **paths)


if __name__ == "__main__":
    run_script(main)
