"""Measure how fast fine-tuning goes over its examples: packed, padded among like lengths, or padded to the longest of all.

    python benchmarks/sft.py                                 # runs/demo on docstrings; see that nothing else runs
    python benchmarks/sft.py --run runs/demo --file pairs.jsonl
    python benchmarks/sft.py --preset code-50m --tokenizer tokenizer.json --file pairs.jsonl --rows 2

Three trainers of the same shape take steps on the same examples in turn, in one process. A packed step is so many rows of
the context; a padded one has as many examples as those hold on average. What counts is supervised tokens a second over the
steps of a round, and the ratios within rounds: medians, quartiles, and total over total. Every shape is met, and compiled,
before the clock starts. Weights are random, on which the time of a step does not depend. Adds its case to
`benchmarks/results/local/sft.json` and the same as Markdown, or replaces it.

The examples are the docstrings of this machine's Python, or those of a JSON or JSON Lines file with the columns instruction,
input and output. Limit: on a GPU steps of few rows measure how fast kernels are launched; raise --rows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import results_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

if TYPE_CHECKING:
    from config import Config
    from kindling.data.examples import Examples
    from kindling.data.shards import Batch
    from kindling.device import Runtime
    from kindling.tokenization.tokenizer import Tokenizer
    from kindling.training.prefetch import TrainingRows
    from kindling.training.trainer import Trainer

DEMO = Path("runs/demo")
WARM_UP = 3  # steps of each variant at least
RECOMPILE_LIMIT = 64  # the variants share their code, and so their shapes count together
PACKED, BUCKETED, LONGEST = "packed", "padded among like lengths", "padded to the longest"


class PaddedToLongest:
    """The usual way: one example a row, in random order, every row as wide as the longest example of all."""

    def __init__(self, examples: Examples, block_size: int, seed: int):
        self.examples, self.seed, self.n_rows = examples, seed, examples.n_examples
        longest = int(examples.lengths.max()) - 1  # the last token is a target only
        self.width = min(block_size, -(-longest // 8) * 8)  # a multiple of 8, which kernels like
        self.pad_id = 0 if examples.manifest["eos_id"] else 1
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @cached_property
    def wasted(self) -> float:
        """The share of all places that hold padding."""
        return 1 - int((self.examples.lengths - 1).sum()) / (self.n_rows * self.width)

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        from config import IGNORE
        from kindling.data.shards import Batch

        idx = np.full((count, self.width), self.pad_id, dtype=np.int64)
        targets = np.full_like(idx, IGNORE)
        for row in range(count):
            epoch, place = divmod(first + row, self.n_rows)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            example = self.examples.example(int(self._order[1][place]))
            n = len(example.ids) - 1
            idx[row, :n], targets[row, :n] = example.ids[:-1], example.targets
        return Batch(idx, targets)


@dataclass
class Variant:
    """One of the three ways, and what was measured of it: the supervised tokens and the seconds of each round."""

    name: str
    trainer: Trainer
    wasted: float
    widths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def warm_up(self, n_steps: int) -> None:
        """Take a step of every shape that the first `n_steps` have, at least WARM_UP in all; then go back to the first row."""
        trainer, first = self.trainer, {}
        for step in range(n_steps):
            place = step * trainer.train.batch_size
            first.setdefault(trainer.batches.rows(place, trainer.train.batch_size).idx.shape[1], place)
        self.widths, places = sorted(first), list(first.values())
        for place in (places * WARM_UP)[: max(WARM_UP, len(places))]:
            trainer.state.row_index = place
            trainer.train_step()
        trainer.state.row_index = 0

    def round(self, n_steps: int) -> None:
        """Take the next steps against the clock."""
        from kindling import device

        device.synchronize(self.trainer.runtime)
        started = time.perf_counter()
        tokens = sum(self.trainer.train_step()[2] for _ in range(n_steps))
        device.synchronize(self.trainer.runtime)
        self.seconds.append(time.perf_counter() - started)
        self.tokens.append(tokens)

    @property
    def speeds(self) -> list[float]:
        """Supervised tokens a second of each round."""
        return [t / s for t, s in zip(self.tokens, self.seconds)]


def configured(flags: argparse.Namespace) -> tuple[Config, Tokenizer]:
    """Return the config of the fine-tuning that is measured, and the tokenizer of its base."""
    from config import TokenizerConfig
    from kindling.runs.loading import find_run
    from kindling.tokenization.pretrained import load_pretrained
    from presets import FINE_TUNING, preset

    if flags.preset:
        given = TokenizerConfig(kind="pretrained", path=str(flags.tokenizer.resolve()))
        base, tokenizer = replace(preset(flags.preset), tokenizer=given), load_pretrained(given)
    else:
        run = find_run(flags.run)
        base, tokenizer = run.config(), run.tokenizer()
    suited = preset(FINE_TUNING.get(base.preset, "docstrings"))
    if flags.file:
        data = preset("alpaca").data
        source = replace(data.sources[0], kind="jsonl", path=str(flags.file.resolve()))
        data = replace(data, sources=(source,))
    else:
        data = preset("docstrings").data
    cfg = replace(
        suited,
        preset=base.preset,
        model=replace(base.model, n_layer=flags.layers or base.model.n_layer),
        tokenizer=base.tokenizer,
        data=data,
        train=replace(suited.train, max_steps=10**6, init_from=None, precision=flags.precision),
    )
    return cfg, tokenizer


def variants(cfg: Config, examples: Examples, n_packed: int, runtime: Runtime) -> list[Variant]:
    """Return the three ways, each with a model and a trainer of its own."""
    from kindling import device
    from kindling.data.examples import ExampleRows
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.trainer import Trainer
    from model import build_model

    block_size, seed = cfg.model.block_size, cfg.train.seed
    packed = ExampleRows(examples, block_size, seed)
    n_padded = max(1, round(n_packed * examples.n_examples / packed.n_rows))
    bucketed = ExampleRows(examples, block_size, seed, packing=False, batch_size=n_padded)
    longest = PaddedToLongest(examples, block_size, seed)

    def variant(name: str, batches: TrainingRows, n_rows: int, wasted: float) -> Variant:
        device.seed_all(0)
        train = replace(cfg.train, batch_size=n_rows, micro_batch_size=None, packing=name == PACKED)
        model = build_model(cfg.model).to(runtime.device)
        c = replace(cfg, train=train)
        return Variant(name, Trainer(c, RunDirectory(Path(os.devnull)), model, batches, None, runtime), wasted)

    return [
        variant(PACKED, packed, n_packed, packed.wasted),
        variant(BUCKETED, bucketed, n_padded, bucketed.wasted),
        variant(LONGEST, longest, n_padded, longest.wasted),
    ]


def compile_all(ways: list[Variant]) -> None:
    """Compile every variant, or end: some compiled and some not could not be compared."""
    import torch

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run some shapes uncompiled
    for way in ways:
        if not way.trainer.compile():
            sys.exit(f"{way.name} must compile as the others do, but does not; measure with --no-compile")


def measure(cfg: Config, tokenizer: Tokenizer, flags: argparse.Namespace) -> dict[str, Any]:
    """Build the examples in the current folder, take the rounds in turn, and return the figures of the case."""
    import torch

    from kindling import device
    from kindling.data.build import prepare
    from kindling.data.examples import Examples

    examples = Examples(prepare(cfg, tokenizer), "train")
    runtime = device.resolve(cfg.train)
    ways = variants(cfg, examples, flags.rows or cfg.train.micro_batch, runtime)
    compiled = not flags.no_compile and device.has_compiler(runtime.device.type)
    if compiled:
        compile_all(ways)
    for way in ways:
        print(f"warming up: {way.name}, {way.trainer.train.batch_size} rows a step", flush=True)
        way.warm_up(flags.rounds * flags.steps)
    orders = list(itertools.permutations(ways))
    for i in range(flags.rounds):
        for way in orders[i % len(orders)]:
            way.round(flags.steps)
        print(f"round {i + 1}: " + ", ".join(f"{w.name} {w.speeds[-1]:,.0f}/s" for w in ways), flush=True)
    for way in ways:
        if way.trainer.state.skipped:
            sys.exit(
                f"{way.name} must take whole steps, but {way.trainer.state.skipped} were skipped; use --precision fp32"
            )
    model = ways[0].trainer.model
    return {
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        "runtime": f"{device_name(runtime)}, {runtime.precision}, {'compiled' if compiled else 'not compiled'}, "
        f"{torch.get_num_threads()} threads",
        "model": f"{cfg.preset}, n_layer {cfg.model.n_layer}, {model.n_parameters():,} parameters, context "
        f"{cfg.model.block_size:,}",
        "examples": f"{examples.n_examples:,} of {flags.file.name if flags.file else 'docstrings'}, "
        f"{examples.lengths.mean():.0f} tokens on average and {examples.lengths.max():,} at most, "
        f"{examples.n_supervised / examples.lengths.sum():.0%} of them supervised",
        "rounds": f"{flags.rounds} of {flags.steps} steps of each",
        "ways": {way.name: figures(way, flags.steps) for way in ways},
        "times as fast": {f"{a.name} / {b.name}": ratios(a, b) for a, b in itertools.combinations(ways, 2)},
    }


def device_name(runtime: Runtime) -> str:
    import torch

    return torch.cuda.get_device_name() if runtime.device.type == "cuda" else runtime.device.type


def figures(way: Variant, n_steps: int) -> dict[str, Any]:
    """Return what is reported of one way."""
    return {
        "rows a step": way.trainer.train.batch_size,
        "widths": way.widths,
        "wasted places": way.wasted,
        "seconds a step": statistics.median(way.seconds) / n_steps,
        "supervised tokens a step": sum(way.tokens) / len(way.tokens) / n_steps,
        "supervised tokens/s": statistics.median(way.speeds),
        "quartiles": quartiles(way.speeds),
    }


def ratios(a: Variant, b: Variant) -> dict[str, Any]:
    """Return how many times as fast one way is as another: by rounds, and over all of them."""
    by_round = [x / y for x, y in zip(a.speeds, b.speeds)]
    totals = sum(a.tokens) / sum(a.seconds) / (sum(b.tokens) / sum(b.seconds))
    return {"median of rounds": statistics.median(by_round), "quartiles": quartiles(by_round), "of totals": totals}


def quartiles(values: list[float]) -> list[float]:
    """Return the first and third quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def markdown(cases: dict[str, dict[str, Any]]) -> str:
    """Return the tables of all cases."""
    ways, times, notes = [], [], []
    for case, found in cases.items():
        notes.append(f"- {case}: " + "; ".join(found[k] for k in ("model", "examples", "rounds", "runtime", "machine")))
        for name, way in found["ways"].items():
            low, high = way["quartiles"]
            ends = sorted({way["widths"][0], way["widths"][-1]})
            ways.append(
                f"| {case} | {name} | {way['rows a step']} x {' to '.join(map(str, ends))} | {way['wasted places']:.1%} | "
                f"{way['seconds a step'] * 1e3:,.1f} | {way['supervised tokens a step']:,.0f} | "
                f"{way['supervised tokens/s']:,.0f} | {low:,.0f} to {high:,.0f} |"
            )
        for pair, ratio in found["times as fast"].items():
            low, high = ratio["quartiles"]
            times.append(
                f"| {case} | {pair} | {ratio['median of rounds']:.2f} | {low:.2f} to {high:.2f} | {ratio['of totals']:.2f} |"
            )
    head = "| case | rows | a step | wasted places | ms a step | supervised tokens a step | supervised tokens/s | quartiles |"
    lines = [head, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", *ways, ""]
    head = "| case | times as fast | median of rounds | quartiles | of totals |"
    lines += [head, "| --- | --- | ---: | ---: | ---: |", *times, "", *notes]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help=f"a pre-trained run; without --preset, {DEMO}")
    parser.add_argument("--preset", help="a preset's shape instead of a run's, with --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer.json for --preset")
    parser.add_argument("--file", type=Path, help="JSON or JSON Lines of instruction, input, output; else docstrings")
    parser.add_argument("--case", help="its name in the results; by default the preset, and what differs from it")
    parser.add_argument("--rows", type=int, help="packed rows a step; by default the micro-batch of the fine-tuning")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--rounds", type=int, default=12, help="at least 2; six take the ways in every order once")
    parser.add_argument("--steps", type=int, default=5, help="steps of each way in a round")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32", "fp16"))
    parser.add_argument("--no-compile", action="store_true")
    flags = parser.parse_args()
    if bool(flags.preset) != bool(flags.tokenizer) or (flags.preset and flags.run):
        parser.error("give either --run, or --preset with --tokenizer")
    if flags.rounds < 2 or flags.steps < 1:
        parser.error("--rounds must be at least 2 and --steps at least 1")
    for path in (flags.tokenizer, flags.file):
        if path and not path.is_file():
            parser.error(f"{path} must be a file, but is none")
    return flags


def main() -> None:
    flags = parse()
    if not flags.run and not flags.preset:
        if not (DEMO / "config.yaml").is_file():
            print(f"benchmarks/sft.py is skipped: it needs the pre-trained run {DEMO}; train it with `python main.py`")
            return
        flags.run = DEMO
    cfg, tokenizer = configured(flags)
    differs = [
        *([] if flags.file else ["docstrings"]),
        *([f"n_layer {flags.layers}"] if flags.layers else []),
        *(["not compiled"] if flags.no_compile else []),
    ]
    case = flags.case or ", ".join([cfg.preset, *differs])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = measure(cfg, tokenizer, flags)
    path = results_file("sft.json")
    cases = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cases[case] = found
    path.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    results_file("sft.md").write_text(markdown(cases), encoding="utf-8")
    print(f"\n{markdown({case: found})}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
