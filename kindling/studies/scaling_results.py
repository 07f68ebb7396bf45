"""What comes of a scaling study: the fit of its runs, the prediction of the held-out run, tables and the picture.

    python -m kindling.studies.scaling_results --folder studies/scaling    # the law of the runs that are there

It is a step of the study; scaling_advice.py reads what it leaves. The prediction is written once, before the held-out run
exists, and stays. The law is fitted to the other runs alone, then and at the end. Losses are bits per byte over the whole
validation split, from the metrics.jsonl of each run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kindling.cli import parse_cli, run_script
from kindling.evaluation.intervals import Interval, number
from kindling.files import write_atomic, write_json
from kindling.output import wants_color
from kindling.plots.figures import png
from kindling.plots.html_report import Picture
from kindling.plots.scaling_figures import HeldOut, IsoFlop, SizeRuns, scaling_figure
from kindling.studies.inputs import Inputs
from kindling.studies.report import Study
from kindling.studies.scaling import PREDICTION, RESULT, RUNS, Plan, read_plan, run_name
from kindling.studies.scaling_law import NAMES, Fit, Law, ScalingError, TooFewRuns, best_for_seconds, fit_law
from kindling.studies.scaling_runs import RunFigures, metrics_file, read_runs
from kindling.studies.shared_steps import MOST_PASSES
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import Section, as_markdown, as_text, short_number

TITLE = "the loss as a law of parameters and tokens"
PICTURE, TABLE = "scaling.png", "table.md"
BUDGETS = 5  # IsoFLOP curves, from the second cheapest run to the dearest


def fit_runs(runs: list[RunFigures]) -> Fit:
    """Fit the law to runs. Raises ScalingError if they are too few."""
    return fit_law([r.parameters for r in runs], [r.tokens for r in runs], [r.bits_per_byte for r in runs])


def predict_held_out(folder: Path) -> dict[str, Any]:
    """Predict the held-out run from the runs that are there, and write PREDICTION. What was predicted before is kept.

    Raises ScalingError if the held-out run is there already, or if no law can be fitted.
    """
    plan = read_plan(folder)
    if (folder / PREDICTION).is_file():
        return _read(folder / PREDICTION)
    runs, held_out, _ = read_runs(folder, plan)
    name = run_name(*plan.held_out)
    if held_out is not None:
        raise ScalingError(
            f"the held-out run must be predicted before it is trained, but {name} is there; rename it first"
        )
    fit = fit_runs(runs)
    depth, steps = plan.held_out
    N, D = plan.parameters(depth), plan.tokens(steps)
    loss, interval = fit.predict(N, D)
    made = {"run": name, "parameters": N, "tokens": D, "bits_per_byte": loss, "interval": list(interval)}
    made |= {"fitted_to": [run.name for run in runs], "law": fit.law._asdict()}
    write_json(folder / PREDICTION, made)
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("no mapping")
    except (OSError, ValueError) as e:
        raise ScalingError(
            f"{path} must be as the study wrote it, but cannot be read ({e}); run the study again"
        ) from None


# -- the law, its tables and its picture ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedStudy:
    """A scaling study that was run: the fitted runs, the law, and the held-out run, predicted and measured."""

    plan: Plan
    runs: list[RunFigures]
    missing: list[str]
    fit: Fit
    predicted: dict[str, Any] | None
    held_out: RunFigures | None

    @property
    def flop(self) -> list[float]:
        """Budgets for the tables and curves: log-spaced over the runs."""
        costs = sorted(run.flop for run in self.runs)
        return [float(c) for c in np.geomspace(costs[1], costs[-1], BUDGETS)]

    def seconds_per_token(self) -> tuple[list[float], list[float]]:
        """Return the sizes, and the seconds of a token of each, as its longest run was measured."""
        longest: dict[int, RunFigures] = {}
        for run in sorted([*self.runs, *([self.held_out] if self.held_out else [])], key=lambda run: run.tokens):
            longest[run.parameters] = run
        timed = [run for _, run in sorted(longest.items()) if run.seconds > 0]
        return [float(run.parameters) for run in timed], [run.seconds / run.tokens for run in timed]


def read_study(folder: Path) -> FittedStudy:
    """Read the runs of a study and fit its law. Raises ScalingError if it has no plan, or too few runs."""
    plan = read_plan(folder)
    runs, held_out, missing = read_runs(folder, plan)
    predicted = _read(folder / PREDICTION) if (folder / PREDICTION).is_file() else None
    return FittedStudy(plan, runs, missing, fit_runs(runs), predicted, held_out)


def sections(study: FittedStudy) -> list[Section]:
    """Return the tables of a study: its constants, the prediction, budgets, and runs."""
    return [
        _law_section(study),
        _held_out_section(study),
        _budget_section(study),
        *_time_section(study),
        _run_section(study.runs, study.fit.residuals),
    ]


def _law_section(study: FittedStudy) -> Section:
    fit, rows = study.fit, []
    for name in NAMES:
        form = ",.4f" if name in "Eab" else ",.4g"
        rows.append([name, number(getattr(fit.law, name), fit.interval(name), form)])
    notes = [
        "L(N, D) = E + A / N^a + B / D^b in validation bits per byte. N: parameters of blocks and head, without the tables that "
        "are looked up. D: training tokens, in each size's own vocabulary.",
        f"Intervals: 95%, from {len(fit.resamples):,} resamples of the {len(study.runs)} runs. The typical run lies "
        f"{100 * float(np.median(np.abs(fit.residuals))):.2f}% from the law.",
        f"From {RUNS}/*/metrics.jsonl; kept in {RESULT}.",
    ]
    warnings = []
    if study.missing:
        warnings.append(f"Fitted without runs that are missing or have no loss: {', '.join(study.missing)}.")
    if (most := max(run.passes for run in study.runs)) > 1:
        text = f"The longest run reads its data {most:.1f} times, so its later tokens are not new ones."
        (warnings if most > MOST_PASSES else notes).append(text)
    return Section("The law", ["constant", "value [95%]"], rows, notes, warnings)


def _held_out_section(study: FittedStudy) -> Section:
    p, columns = study.predicted, ["run", "parameters", "tokens", "predicted [95%]", "measured", "miss", "file"]
    if p is None:
        return Section("The held-out run", warnings=["It was not predicted."])
    measured = None if study.held_out is None else study.held_out.bits_per_byte
    miss = None if measured is None else measured - p["bits_per_byte"]
    row = [p["run"], f"{p['parameters']:,}", f"{p['tokens']:,}", number(p["bits_per_byte"], Interval(*p["interval"]))]
    row += ["-", "-"] if measured is None or miss is None else [f"{measured:.4f}", f"{miss:+.4f}"]
    row.append(PREDICTION if measured is None else f"{PREDICTION}, {metrics_file(p['run'])}")
    notes = ["Predicted from the other runs before it was trained."]
    if measured is None:
        notes.append("It is not trained yet.")
    elif not p["interval"][0] <= measured <= p["interval"][1]:
        notes.append("It lies outside the interval: the law does not hold as far as this run.")
    return Section("The held-out run", columns, [row], notes)


def _budget_section(study: FittedStudy) -> Section:
    fit, rows = study.fit, []
    for flop in study.flop:
        (N, D), (of_n, of_d) = fit.law.optimum(flop), fit.optimum_intervals(flop)
        row = [f"{flop:.2e}", _with_interval(N, of_n), _with_interval(D, of_d), f"{D / N:.2g}"]
        rows.append([*row, f"{fit.law.loss(N, D):.3f}", _beyond(study, N, D)])
    columns = ["FLOP (6 N D)", "best N [95%]", "best D [95%]", "D / N", "bits per byte", "beyond the runs"]
    return Section(
        "The best size for a budget of compute", columns, rows, [_inside(study), f"From the law in {RESULT}."]
    )


def _beyond(study: FittedStudy, parameters: float, tokens: float) -> str:
    """Return which of the two lies outside the runs, where the law was not measured."""
    Ns, Ds = [run.parameters for run in study.runs], [run.tokens for run in study.runs]
    outside = {"N": not min(Ns) <= parameters <= max(Ns), "D": not min(Ds) <= tokens <= max(Ds)}
    return ", ".join(name for name, beyond in outside.items() if beyond) or "no"


def _inside(study: FittedStudy) -> str:
    Ns, Ds = [run.parameters for run in study.runs], [run.tokens for run in study.runs]
    n, d = (f"{short_number(min(values))} to {short_number(max(values))}" for values in (Ns, Ds))
    return f"The runs have N from {n} and D from {d}."


def _time_section(study: FittedStudy) -> list[Section]:
    """Return the best size for some times, by what the runs took; nothing if their times are not known."""
    Ns, times = study.seconds_per_token()
    if len(Ns) < 3:
        return []
    rows = []
    total = sum(run.seconds for run in study.runs)
    for seconds in (total / 30, total / 10, total / 3, total):
        best, tokens = best_for_seconds(study.fit.law, seconds, Ns, times)
        edge = " (the smallest)" if best < 1.01 * Ns[0] else " (the largest)" if best > 0.99 * Ns[-1] else ""
        rows.append(
            [
                f"{seconds / 60:.1f}",
                short_number(best) + edge,
                short_number(tokens),
                f"{study.fit.law.loss(best, tokens):.3f}",
            ]
        )
    note = (
        f"By the seconds per token of each size, from {RUNS}/*/metrics.jsonl, and the law in {RESULT}. Only sizes between its "
        f"smallest and largest are considered."
    )
    return [
        Section("The best size for a time on this machine", ["minutes", "best N", "D", "bits per byte"], rows, [note])
    ]


def _run_section(runs: list[RunFigures], residuals: Iterable[float] | None) -> Section:
    """Return the table of the runs, beside the law if there is one."""
    rows = []
    for run, off in zip(runs, residuals if residuals is not None else [None] * len(runs)):
        beside = "-" if off is None else f"{100 * off:+.2f}%"
        rows.append(
            [
                run.name,
                f"{run.parameters:,}",
                f"{run.tokens:,}",
                f"{run.bits_per_byte:.4f}",
                beside,
                metrics_file(run.name),
            ]
        )
    return Section("The runs", ["run", "N", "D", "bits per byte", "beside the law", "file"], rows)


def _with_interval(value: float, interval: Interval) -> str:
    return f"{short_number(value)} [{short_number(interval.low)}, {short_number(interval.high)}]"


def picture(study: FittedStudy) -> bytes:
    """Return the picture of a study as a PNG file."""
    law, sizes = study.fit.law, []
    longest = 1.5 * max(run.tokens for run in study.runs)
    for N in sorted({run.parameters for run in study.runs}):
        of = sorted((run.tokens, run.bits_per_byte) for run in study.runs if run.parameters == N)
        tokens, losses = np.array(of).T
        line = np.geomspace(tokens[0] / 1.5, longest, 60)
        sizes.append(SizeRuns(f"N = {short_number(N)}", tokens, losses, line, np.array([law.loss(N, D) for D in line])))
    held_out = None
    if (p := study.predicted) is not None:
        measured = float("nan") if study.held_out is None else study.held_out.bits_per_byte
        low, high = p["interval"]
        held_out = HeldOut(f"N = {short_number(p['parameters'])}", p["tokens"], p["bits_per_byte"], low, high, measured)
    title = (
        f"L = {law.E:.3g} + {law.A:.3g} / N^{law.a:.3f} + {law.B:.3g} / D^{law.b:.3f}, fitted to {len(study.runs)} runs"
    )
    return png(scaling_figure(sizes, held_out, [_isoflop(study, law, sizes, flop) for flop in study.flop], title))


def _isoflop(study: FittedStudy, law: Law, sizes: list[SizeRuns], flop: float) -> IsoFlop:
    """Return the curve of a budget over the sizes of the study, and between which runs of each size it passes."""
    Ns = sorted({run.parameters for run in study.runs})
    grid = np.geomspace(Ns[0] / 2, Ns[-1] * 2, 80)
    best_n, best_d = law.optimum(flop)
    between = []
    for N, size in zip(Ns, sizes):
        tokens = flop / 6 / N
        if size.tokens[0] <= tokens <= size.tokens[-1]:
            between.append((N, np.exp(np.interp(np.log(tokens), np.log(size.tokens), np.log(size.losses)))))
    N_of, L_of = np.array(between).reshape(-1, 2).T
    losses = np.array([law.loss(N, flop / 6 / N) for N in grid])
    return IsoFlop(f"{flop:.1e} FLOP", grid, losses, (best_n, law.loss(best_n, best_d)), N_of, L_of)


def write_result(folder: Path) -> FittedStudy:
    """Fit the runs of a study, and write its law, table and picture. The law is written last: it says that the rest is there."""
    study = read_study(folder)
    fit = study.fit
    write_atomic(folder / TABLE, as_markdown("The scaling law", [], sections(study)))
    (folder / PICTURE).write_bytes(picture(study))
    write_json(
        folder / RESULT,
        {
            "law": fit.law._asdict(),
            "intervals": {name: list(fit.interval(name)) for name in NAMES},
            "runs": [asdict(run) for run in study.runs],
            "missing": study.missing,
            "predicted": study.predicted,
            "held_out": None if study.held_out is None else asdict(study.held_out),
            "plan": asdict(study.plan),
        },
    )
    return study


# -- for study.py -----------------------------------------------------------------------------------------------------


@cache
def _finished(folder: Path) -> FittedStudy:
    """Return the study whose steps have ended."""
    return read_study(folder)


def unscaled(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return no steps: the plan follows from the time, not from a project's size (scaling_steps)."""
    return []


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    of_hub = ", or for large models that of modern-50m, from the hub" if inputs.preset else ""
    return f"the Python of this machine, as modern-5m has it{of_hub}; each size has its own vocabulary"


def sections_of(folder: Path) -> list[Section]:
    """Return the tables of a study's folder: of the runs alone, if they are too few for a law."""
    try:
        return sections(_finished(folder))
    except TooFewRuns as e:
        runs, held_out, missing = read_runs(folder, read_plan(folder))
        warnings = [f"No law: {e}.", *([f"Missing or without a loss: {', '.join(missing)}."] if missing else [])]
        return [Section("The law", warnings=warnings), _run_section([*runs, *([held_out] if held_out else [])], None)]


def pictures_of(folder: Path) -> list[Picture]:
    """Return the picture of a study's folder; none without a law."""
    try:
        law = _finished(folder).fit.law
    except TooFewRuns:
        return []
    caption = f"The runs with the fitted law, and the loss over size at equal compute; from {RUNS}/*/metrics.jsonl."
    return [Picture(picture(_finished(folder)), caption, f"Loss falls with N^-{law.a:.3f} and D^-{law.b:.3f}.")]


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the longest run of each size and the held-out run, whose curves are drawn together."""
    plan = read_plan(folder)
    longest = [run_name(depth, plan.steps_of[-1]) for depth in plan.depths[:-1]]
    return {"the longest runs": [*longest, run_name(*plan.held_out)]}


# -- as a step of the study -------------------------------------------------------------------------------------------


@dataclass
class Flags:
    """The command line."""

    folder: Path = Path()
    """The folder of the study."""
    predict_held_out: bool = False
    """Only predict the loss of the held-out run, and write it down."""


def main(argv: list[str] | None = None) -> int:
    """Predict the held-out run, or fit the law and write its table and picture."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.predict_held_out:
        made = predict_held_out(flags.folder)
        loss = number(made["bits_per_byte"], Interval(*made["interval"]))
        print(f"{made['run']} is predicted to end at {loss} bits per byte, from {len(made['fitted_to'])} runs")
        return 0
    study = write_result(flags.folder)
    print(as_text([], sections(study), color=wants_color(sys.stdout)))
    print(f"wrote {flags.folder / RESULT}, {TABLE} and {PICTURE}")
    return 0


if __name__ == "__main__":
    run_script(main)


STUDY = Study("scaling", TITLE, unscaled, sources, sections_of, runs_by_plot, pictures=pictures_of)
