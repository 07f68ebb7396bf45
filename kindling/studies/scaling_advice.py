"""Which preset to train in a time on this machine, by the law of a scaling study that was run here.

    print(as_text([], [advise(Path("studies/scaling"), seconds_of_text("3h"), clock)]))

The law is of the `modern` recipe, with the study's data, batch and context. So only `modern-*` presets are compared, and the
command that is printed sets batch and context as the study had them. Of `portable-*`, with another shape, and of other data the
law says nothing. The speed is measured now.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from config import Config
from kindling.errors import KindlingError
from kindling.evaluation.intervals import number
from kindling.studies.scaling import BYTES_PER_TOKEN, RESULT, at_depth, bytes_to_read, matmul_parameters
from kindling.studies.scaling_law import Prediction, ScalingError
from kindling.studies.scaling_results import FittedStudy, read_study
from kindling.studies.shared_steps import MOST_PASSES
from kindling.studies.sizes import flags_of
from kindling.studies.speed import Clock
from kindling.studies.steps import duration
from kindling.tables import Section, short_number
from presets import preset

CANDIDATES = ("modern-5m", "modern-50m", "modern-150m")
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
FEWEST_STEPS = 40  # of a run that is worth naming: its warmup takes 20


def seconds_of_text(text: str) -> float:
    """Return the seconds of a time such as 3h, 90m or 1h30m. Raises ScalingError if it is none."""
    part = r"\s*(\d+(?:\.\d+)?)\s*([dhms])\s*"
    whole = re.fullmatch(f"(?:{part})+", text.lower())
    seconds = sum(float(count) * UNITS[unit] for count, unit in re.findall(part, text.lower())) if whole else 0.0
    if seconds <= 0:
        raise ScalingError(f"--predict must be a time such as 3h, 90m or 1h30m, but is {text!r}; write it so")
    return seconds


@dataclass(frozen=True)
class Candidate:
    """A preset in the time that there is. No prediction: not even the fewest steps fit."""

    name: str
    cfg: Config  # with the steps that fit
    tokens_per_s: float
    prediction: Prediction | None

    @property
    def parameters(self) -> int:
        """N of the law."""
        return matmul_parameters(self.cfg.model)


def candidate(name: str, study: FittedStudy, seconds: float, clock: Clock) -> Candidate:
    """Return a preset with as many steps as fit the time, and its predicted loss."""
    plan = study.plan
    cfg = at_depth(name, preset(name).model.n_layer, plan.block_size, plan.batch_size, 1)
    if cfg.model.n_layer > plan.depths[-1]:  # needs less memory
        cfg = replace(cfg, train=replace(cfg.train, micro_batch_size=1))
    timed = replace(cfg, train=replace(cfg.train, compile="off"))
    tokens_per_s = plan.tokens(1) / clock.step_s(timed)
    if clock.compiles(cfg.train, 6 * matmul_parameters(cfg.model) * tokens_per_s * seconds):
        timed = replace(cfg, train=replace(cfg.train, compile="on"))
        tokens_per_s = plan.tokens(1) / clock.step_s(timed)
    one, two = clock.training(timed, 1), clock.training(timed, 2)  # with the evaluations
    before = 2 * one - two
    if plan.max_bytes is not None:
        before += clock.building(bytes_to_read(plan.tokens(int(seconds / (two - one)))))
    steps = int(max(0.0, seconds - before) / (two - one))
    if steps < FEWEST_STEPS:
        return Candidate(name, cfg, tokens_per_s, None)
    every = max(1, steps // 10)
    cfg = replace(cfg, train=replace(cfg.train, max_steps=steps, save_every=every, eval_every=every))
    cfg = replace(cfg, data=plan.data_for(cfg.tokens))  # the law is of this text
    return Candidate(name, cfg, tokens_per_s, study.fit.predict(matmul_parameters(cfg.model), plan.tokens(steps)))


def advise(folder: Path, seconds: float, clock: Clock) -> Section:
    """Return what each preset would come to in the time, with the command for the best.

    Raises ScalingError where no finished study is, or if no preset fits the time.
    """
    if not (folder / RESULT).is_file():
        raise ScalingError(
            f"{folder} must hold a finished scaling study, with its {RESULT}, but does not; "
            f"run `python study.py scaling` first"
        )
    study, found, warnings = read_study(folder), [], []
    for name in CANDIDATES:
        try:
            found.append(candidate(name, study, seconds, clock))
        except KindlingError as e:  # such as too little memory
            warnings.append(f"{name} is left out: {e}")
    able = [(one.prediction.loss, one.name, one) for one in found if one.prediction is not None]
    if not able:
        raise ScalingError(
            f"--predict must give the smallest preset time for {FEWEST_STEPS} steps, but {seconds / 60:.0f} minutes do not; "
            f"give more"
        )
    columns = ["preset", "N", "tokens/s here", "tokens in the time", "bits per byte [95%]", "beyond the runs"]
    rows = [_row(one, study) for one in found]
    return Section(f"What to train here in {duration(seconds)}", columns, rows, _notes(min(able)[2], study), warnings)


def _row(one: Candidate, study: FittedStudy) -> list[str]:
    """Return the row of a preset. Its last cell says how far it is from the runs that the law was fitted to."""
    tokens = study.plan.tokens(one.cfg.train.max_steps or 0)
    beyond = {"N": one.parameters / max(run.parameters for run in study.runs)}
    said = ["-", "too slow"]
    if one.prediction is not None:
        beyond["D"] = tokens / max(run.tokens for run in study.runs)
        said = [short_number(tokens), number(one.prediction.loss, one.prediction.interval, ".3f")]
    factors = ", ".join(f"{name} x {factor:.2g}" for name, factor in beyond.items() if factor > 1)
    return [one.name, short_number(one.parameters), f"{one.tokens_per_s:,.0f}", *said, factors or "no"]


def _notes(best: Candidate, study: FittedStudy) -> list[str]:
    plan, tokens = study.plan, study.plan.tokens(best.cfg.train.max_steps or 0)
    again = 0.0 if plan.max_bytes is None else tokens * BYTES_PER_TOKEN / bytes_to_read(tokens)
    of = f"the data of {plan.base}" + ("" if plan.max_bytes is None else ", from local files")
    notes = [
        f"Train {best.name}: {shlex.join(['python', 'main.py', *flags_of(best.cfg)])}",
        f"The loss is of the study's text ({of}), at its context of {plan.block_size} and {plan.batch_size} rows a step.",
        "Beyond the runs, the law goes where nothing was measured. The interval does not know if it bends there.",
        "The law is of the recipe of modern-*. It says nothing of portable-*, whose shape is another.",
    ]
    if again > MOST_PASSES:
        notes.append(
            f"The files would be read about {again:.0f} times. The prediction is for new text, so the loss will be higher."
        )
    return notes
