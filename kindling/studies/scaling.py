"""The plan of the scaling study: models of one dial, at several numbers of tokens each, and one larger run that is held out.

    steps = scaling_steps(Path("studies/scaling"), 90, clock)      # the commands, in their order

The sizes are those of our `modern` recipe (presets.py), whose depth sets width, vocabulary and learning rates. So a preset such
as `modern-50m` is a point of the law. Vocabularies differ, so all losses are bits per byte.

The runs of one size share their trunk. Each has the peak rate until the last fifth of its steps (DECAY), and the next longer one
goes on from its checkpoint before that (`--train.extend`). It ends as if it were trained on its own (Hägele et al. 2024,
arXiv:2405.18392), at two thirds of the tokens in all. The presets decay from the warmup on, so a law fitted here is of the recipe
with a late decay.

Batch and context are the same for all runs of a study, and grow with its time.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, DataConfig, ModelConfig
from kindling.files import write_json
from kindling.studies.plan import PLAN
from kindling.studies.scaling_law import ScalingError
from kindling.studies.shared_steps import MOST_PASSES
from kindling.studies.sizes import flags_of, saved_every
from kindling.studies.speed import Clock
from kindling.studies.steps import Step
from kindling.tables import short_number
from presets import modern, preset

# depths of the dial: each factor is over 30 in parameters of blocks and head. The last one is held out
LADDERS = ((1, 2, 3, 4, 5), (2, 3, 5, 7, 9), (3, 5, 8, 11, 14), (4, 7, 10, 14, 18))
LENGTHS = (1.0, 10 ** (1 / 3), 10 ** (2 / 3), 10.0)  # tokens, as multiples of the fewest
SHAPES = (
    (64, 4),
    (128, 8),
    (256, 8),
    (512, 16),
    (1024, 64),
    (1024, 128),
)  # context and rows a step, the smallest first
BEST_STEPS, FEWEST_STEPS = 150, 60  # of the shortest run: where the batch may grow, and the fewest of all
SPEED_UP = 4  # of a token, at most, by a larger batch
TOKENS_PER_PARAMETER = 20  # in the middle of the runs, as near as a ladder comes (Hoffmann et al. 2022)
BYTES_PER_TOKEN = 4.5  # of the files that are read, before filters, with our largest vocabulary on a CPU
LEAST_BYTES, MOST_BYTES = 8_000_000, 200_000_000  # of local files
DECAY = 0.2  # share of a run's steps, after the warmup, in which the learning rate decays
VAL_SHARE = 0.04 / 3  # of the bytes that are read, in tokens: what each run predicts at its end
VALIDATIONS = 2  # at most: a part at its start, and all of it at its end
RUNS = "runs"
PREDICTION, RESULT = "prediction.json", "scaling.json"
ENTRY = "scaling"  # of PLAN: which runs
EARLIER = "scaling_plan.json"  # where an earlier version kept them
MODULE = "kindling.studies.scaling_results"  # as `python -m`
FIT_S = 30.0  # fitting with all resamples, on a slow core


def matmul_parameters(model: ModelConfig) -> int:
    """Return N of the law: the parameters that every token is multiplied with, all but the tables that are looked up."""
    tables = model.bigram_rows + (0 if model.tie_embeddings else model.vocab_size)
    return model.n_parameters - tables * model.n_embd - model.n_position_parameters


@dataclass(frozen=True)
class Plan:
    """The runs of a study. It is saved, so that a study that goes on has the same runs."""

    minutes: float  # that it was made for
    base: str  # the preset that the data is from
    depths: tuple[int, ...]  # the last one is held out
    steps_of: tuple[int, ...]  # optimiser steps of the runs of each size, ascending
    block_size: int
    batch_size: int
    max_bytes: int | None  # of the local files that are read; None: the data set of the hub
    held_out_steps: int | None = (
        None  # of the held-out run; None: as many as the longest, as in plans of earlier versions
    )
    compiled: bool = False  # long runs are planned at the speed of a compiled step; not so in plans of earlier versions

    def config(self, depth: int, steps: int) -> Config:
        """Return the config of a run."""
        cfg = at_depth(self.base, depth, self.block_size, self.batch_size, steps, self.max_bytes)
        if self.max_bytes is None:
            cfg = replace(cfg, data=replace(cfg.data, max_tokens=self.tokens(self.steps_of[-1])))
        train = replace(cfg.train, save_every=self.saved_every(steps))
        return replace(cfg, name=run_name(depth, steps), train=train)

    def data_for(self, tokens: int) -> DataConfig:
        """Return the data of the study for another number of tokens."""
        if self.max_bytes is not None:
            return local_data(self.base, bytes_to_read(tokens))
        return replace(preset(self.base).data, max_tokens=tokens)

    def saved_every(self, steps: int) -> int:
        """Return after how many steps a run is saved. Plans of earlier versions go on with the commands that they had."""
        return steps if self.held_out_steps is None else saved_every(steps)

    def parameters(self, depth: int) -> int:
        """Return N of a size."""
        return matmul_parameters(at_depth(self.base, depth, self.block_size, self.batch_size, 1).model)

    def tokens(self, steps: int) -> int:
        """Return the tokens of so many steps."""
        return steps * self.batch_size * self.block_size

    @property
    def tokens_per_parameter(self) -> float:
        """In the middle of the runs that are fitted."""
        ends = self.tokens(self.steps_of[0]) * self.tokens(self.steps_of[-1])
        return math.sqrt(ends / (self.parameters(self.depths[0]) * self.parameters(self.depths[-2])))

    @property
    def fitted(self) -> list[tuple[int, int]]:
        """Depth and steps of each run that the law is fitted to, the cheapest size first."""
        return list(itertools.product(self.depths[:-1], self.steps_of))

    @property
    def held_out(self) -> tuple[int, int]:
        """Depth and steps of the run that is predicted before it is trained."""
        return self.depths[-1], self.held_out_steps or self.steps_of[-1]

    def seconds(self, clock: Clock) -> float:
        """Return how long all of it takes, by the measured speed."""
        return 2 * FIT_S + sum(self.run_seconds(clock, *run) for run in [*self.fitted, self.held_out])

    def run_seconds(self, clock: Clock, depth: int, steps: int) -> float:
        """Return how long a run takes. The first one of a size builds its data, as each size has its own vocabulary."""
        work = 6.0 * self.parameters(depth) * self.tokens(steps)
        compiled = self.compiled and clock.compiles(self.config(depth, steps).train, work)
        pace = pace_of(clock, self.base, depth, self.block_size, self.batch_size, compiled)
        read = self.max_bytes or BYTES_PER_TOKEN * self.tokens(self.steps_of[-1])
        building = clock.building(read) if depth == self.depths[-1] or steps == self.steps_of[0] else 0.0
        trained = steps - self.trunk(depth, steps)
        validated = VALIDATIONS * VAL_SHARE * read * pace.read_token_s
        return building + pace.run_s + trained * pace.step_s + validated

    def before(self, depth: int, steps: int) -> int | None:
        """Return the steps of the run that a run goes on from; None for the first one of its size, and the held-out one."""
        if depth == self.depths[-1] or steps == self.steps_of[0]:
            return None
        return self.steps_of[self.steps_of.index(steps) - 1]

    def trunk(self, depth: int, steps: int) -> int:
        """Return how many steps of a run are those of the run before."""
        before = self.before(depth, steps)
        if before is None:
            return 0
        warmup = at_depth(self.base, depth, self.block_size, self.batch_size, 1).train.warmup_steps
        return warmup + int((1 - DECAY) * (before - warmup))

    def steps(self, clock: Clock) -> list[Step]:
        """Return the commands: the runs, the prediction, the held-out run, and the table with the law."""
        out = [self._step(clock, *run) for run in self.fitted]
        # some runs may have failed: what is there is fitted, if it is enough
        predict = Step("prediction", MODULE, ("--predict-held-out",), PREDICTION, (), FIT_S, "the held-out run's loss")
        held_out = self._step(clock, *self.held_out, after=("prediction",))
        reads = tuple(step.name for step in [*out, held_out])
        law = Step("law", MODULE, (), RESULT, ("prediction",), FIT_S, "the law, its table and its picture", reads)
        return [*out, predict, held_out, law]

    def _step(self, clock: Clock, depth: int, steps: int, after: tuple[str, ...] = ()) -> Step:
        cfg, name = self.config(depth, steps), run_name(depth, steps)
        output = f"{RUNS}/{name}/step_{steps:06d}/manifest.json"
        about = f"{short_number(self.parameters(depth))} parameters, {short_number(self.tokens(steps))} tokens"
        flags, before = flags_of(cfg), self.before(depth, steps)
        if before is not None:
            trunk = run_name(depth, before)
            after = (trunk,)
            changed = {"max-steps": steps, "eval-every": steps, "save-every": self.saved_every(steps)}
            flags = ("--train.extend", f"{RUNS}/{trunk}", "--name", name)
            flags += tuple(word for flag, value in changed.items() for word in (f"--train.{flag}", str(value)))
        return Step(name, "main.py", flags, output, after, self.run_seconds(clock, depth, steps), about)


class Pace(NamedTuple):
    """The seconds of a run, of each of its steps, and of a token that is only predicted."""

    run_s: float
    step_s: float
    read_token_s: float


@cache
def pace_of(clock: Clock, base: str, depth: int, block_size: int, batch_size: int, compiled: bool = False) -> Pace:
    """Return the measured pace of a size, with a compiled model or without."""
    cfg = at_depth(base, depth, block_size, batch_size, 1)
    cfg = replace(cfg, train=replace(cfg.train, compile="on" if compiled else "off"))
    return Pace(clock.training(cfg, 0), clock.step_s(cfg), clock.reading(cfg, 1))


def run_name(depth: int, steps: int) -> str:
    """Return the name of a run: its depth on the dial, and its steps."""
    return f"scaling-d{depth}-{steps}"


@cache
def at_depth(
    base: str, depth: int, block_size: int, batch_size: int, steps: int, max_bytes: int | None = None
) -> Config:
    """Return the recipe at a depth of the dial, with the data of the preset `base`, as long as so many steps take.

    `max_bytes` is read of its local files.
    """
    named = preset(base)
    data = named.data if max_bytes is None else local_data(base, max_bytes)
    micro = named.train.micro_batch_size
    train: dict[str, Any] = {"max_steps": steps, "eval_every": steps, "save_every": steps, "batch_size": batch_size}
    train |= {"decay_fraction": DECAY, "micro_batch_size": None if micro is None else min(micro, batch_size)}
    return modern(base, depth, block_size, data, **train)


def local_data(base: str, max_bytes: int) -> DataConfig:
    """Return the data of a preset with local files, of which so many bytes are read."""
    data = preset(base).data
    return replace(data, sources=tuple(replace(source, max_bytes=max_bytes) for source in data.sources))


def bytes_to_read(tokens: int) -> int:
    """Return how many bytes of local files to read for so many tokens."""
    return min(MOST_BYTES, max(LEAST_BYTES, int(tokens * BYTES_PER_TOKEN)))


# -- planning ---------------------------------------------------------------------------------------------------------


def scaling_steps(folder: Path, minutes: float, clock: Clock, hub: bool = False, keep: bool = True) -> list[Step]:
    """Return the steps of the study in a folder: of the plan that is there for this time, or of a new one.

    With `keep`, a new plan is saved, so that the study goes on with it. Raises ScalingError if the folder has a plan for another
    time, or if nothing fits the time.
    """
    plan = kept_plan(folder)
    if plan is not None:
        if plan.minutes != minutes:
            raise ScalingError(
                f"--minutes must be {plan.minutes:g}, as the plan in {folder} has it, but is {minutes:g}; give it so, or choose "
                f"another folder"
            )
    else:
        plan = plan_scaling(minutes, clock, hub)
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PLAN, {"minutes": minutes, ENTRY: asdict(plan)})
    return plan.steps(clock)


def kept_plan(folder: Path) -> Plan | None:
    """Return the plan in a study's folder, or None. Raises ScalingError for one that is damaged."""
    try:
        files = [json.loads(path.read_text("utf-8")) for path in (folder / PLAN, folder / EARLIER) if path.is_file()]
        runs = [file.get(ENTRY, file) for file in files if {ENTRY, "depths"} & file.keys()]
        if not runs:
            return None
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in runs[0].items()
        }
        return Plan(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ScalingError(_no_plan(folder, type(e).__name__)) from None


def read_plan(folder: Path) -> Plan:
    """Return the plan of a study's folder. Raises ScalingError if there is none."""
    if (plan := kept_plan(folder)) is None:
        raise ScalingError(_no_plan(folder, "there is none"))
    return plan


def _no_plan(folder: Path, why: str) -> str:
    return (
        f"{folder} must be the folder of a scaling study, with a whole {PLAN}, but is not ({why}); run the study first"
    )


def plan_scaling(minutes: float, clock: Clock, hub: bool = False) -> Plan:
    """Return the plan that fits the time, by the measured speed. Raises ScalingError if nothing does, and says what would.

    `hub` says that the data sets of the hub can be read. Without them, large models have local files too.
    """
    chosen = _fitting(minutes, clock, hub, LADDERS[0])
    if chosen.steps_of[0] < FEWEST_STEPS:
        least = _lengths(FEWEST_STEPS)
        needed = replace(chosen, steps_of=least, held_out_steps=least[-2]).seconds(clock) / 60
        raise ScalingError(
            f"--minutes must be at least {math.ceil(needed)} for a scaling study at the speed of this machine, but is "
            f"{minutes:g}; give it that time"
        )
    for ladder in LADDERS[1:]:
        larger = _fitting(minutes, clock, hub, ladder) if chosen.tokens_per_parameter > TOKENS_PER_PARAMETER else None
        if larger is None or larger.tokens_per_parameter < TOKENS_PER_PARAMETER:
            break
        chosen = larger
    # only these shapes are compiled: each takes a quarter of a minute
    faster = _longest(minutes, clock, hub, chosen.depths, (chosen.block_size, chosen.batch_size), compiled=True)
    return faster if faster.steps_of[0] >= FEWEST_STEPS else chosen


def _lengths(fewest: int) -> tuple[int, ...]:
    return tuple(round(fewest * length) for length in LENGTHS)


def _fitting(minutes: float, clock: Clock, hub: bool, ladder: tuple[int, ...]) -> Plan:
    """Return the plan of a ladder with the largest batch and the most steps that fit the minutes; with 0 steps if none do."""
    best = _longest(minutes, clock, hub, ladder, SHAPES[0])
    for shape in SHAPES[1:]:
        if best.steps_of[0] < BEST_STEPS * math.prod(shape) / (best.batch_size * best.block_size) / SPEED_UP:
            break
        larger = _longest(minutes, clock, hub, ladder, shape)
        if larger.steps_of[0] < BEST_STEPS:
            break
        best = larger
    return best


def _longest(
    minutes: float, clock: Clock, hub: bool, ladder: tuple[int, ...], shape: tuple[int, int], compiled: bool = False
) -> Plan:
    """Return the plan of a ladder and a shape with the most steps that fit the minutes; with 0 steps if none do."""
    base = "modern-50m" if hub and ladder != LADDERS[0] else "modern-5m"

    def of(fewest: int) -> Plan:
        steps_of = _lengths(fewest)
        local = bytes_to_read(steps_of[-1] * math.prod(shape)) if base == "modern-5m" else None
        # the held-out run is not the longest: that would take half of the time
        return Plan(minutes, base, ladder, steps_of, *shape, local, held_out_steps=steps_of[-2], compiled=compiled)

    def fits(fewest: int) -> bool:
        plan = of(fewest)
        again = plan.tokens(plan.steps_of[-1]) * BYTES_PER_TOKEN / (plan.max_bytes or math.inf)
        return again <= MOST_PASSES and plan.seconds(clock) <= 60 * minutes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return of(low)
