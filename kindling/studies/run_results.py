"""Reads the files of a study's runs, and remembers which file each figure comes from.

run = Run(Path("studies/000"), "base-50m")
run.bits()          # "1.544 [1.501, 1.590]", from runs/base-50m/eval.json
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kindling.evaluation.compare_runs import Evaluated, held_out_difference, paired_bits, shown_difference
from kindling.evaluation.intervals import LossLines, bits_interval, number, perplexity_interval
from kindling.evaluation.report import gold_cell, harness_cell, pass_cell, rate_cell, text_cell
from kindling.evaluation.results_file import ResultsError, read_results
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.metrics import read_metrics
from kindling.studies.steps import LOGS, Records
from kindling.tables import short_number
from kindling.training.skipped_steps import SKIPPED

MISSING = "-"


class Run:
    """A run of a study. Each cell is `MISSING` where its file or its figure is not there."""

    def __init__(self, folder: Path, name: str):
        self.name, self.path = name, folder / "runs" / name
        self.directory = RunDirectory(self.path)

    def file(self, name: str) -> str:
        """Return the name of one of the run's files, as tables show it."""
        return f"runs/{self.name}/{name}"

    @cached_property
    def _evaluation(self) -> tuple[dict[str, Any], LossLines]:
        try:
            return read_results(self.path)
        except ResultsError:
            return {}, []

    @property
    def results(self) -> dict[str, Any]:
        """The content of eval.json; empty if it is not there."""
        return self._evaluation[0]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def trained(self) -> bool:
        """Whether the run has begun."""
        return (self.path / "config.yaml").is_file()

    def config(self) -> Any:
        """Return the run's config."""
        return self.directory.config()

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        """What is known of the run's data; empty if it is not there."""
        try:
            return dict(json.loads((self.directory.data / "manifest.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def validation_key(self) -> str:
        """Return what must be equal for validations to compare: the run's data, and how much is validated."""
        data = self._manifest.get("fingerprint", self.name)
        return f"{data} {[line.get('val_tokens') for line in self.validations()[:1]]}"

    def _part(self, name: str) -> dict[str, Any]:
        part = self.results.get(name) or {}
        return {} if "skipped" in part else part

    def parameters(self) -> str:
        """Return the number of parameters, by the shape in config.yaml."""
        return f"{self.config().model.n_parameters:,}" if self.trained else MISSING

    def tokens(self) -> str:
        """Return how many tokens the run was trained on so far."""
        return f"{self._seen():,}" if self._seen() else MISSING

    def _seen(self) -> int:
        return next((line["tokens"] for line in reversed(self.metrics) if isinstance(line.get("tokens"), int)), 0)

    def bits(self, language: str | None = None) -> str:
        """Return bits per byte on held-out documents, with the interval over documents."""
        part, losses = self._part("language_modelling"), self._evaluation[1]
        figures = part.get("all", {}) if language is None else part.get("by_language", {}).get(language, {})
        own = [line for line in losses if language in (None, line["language"])]
        return number(figures.get("bits_per_byte"), bits_interval(own), ".3f")

    def perplexity(self) -> str:
        """Return the perplexity on held-out documents, with the interval over documents."""
        figures, losses = self._part("language_modelling").get("all", {}), self._evaluation[1]
        return number(figures.get("perplexity"), perplexity_interval(losses), ",.2f")

    def held_out(self) -> dict[str, Any]:
        """Return what eval.json has on held-out documents: `all`, `by_language`; empty if it is not there."""
        return self._part("language_modelling")

    def passes(self) -> str:
        """Return how many times the run has read its training split so far."""
        try:
            return f"{self._seen() / self._manifest['splits']['train']['tokens']:.1f}"
        except (KeyError, ZeroDivisionError):
            return MISSING

    def loss_text(self) -> str:
        """Return the loss on held-out documents, in nats a token."""
        return number(self._part("language_modelling").get("all", {}).get("loss"), form=".3f")

    def text_bits(self, name: str) -> str:
        """Return bits per byte of a text that was measured with --text; the name is that of its file."""
        found = self.figures("texts", name)
        return text_cell(found) if found else MISSING

    def figures(self, part: str, name: str) -> dict[str, Any]:
        """Return what eval.json has of a text, by the name of its file, or of a benchmark or task; empty if it is not there."""
        found = self._part(part)
        by_name = {Path(path).name: text for path, text in found.items()} if part == "texts" else found
        figures: dict[str, Any] = by_name.get(name) or {}
        return {} if "skipped" in figures else figures

    def gold(self, benchmark: str = "problems") -> str:
        """Return gold bits per byte of a benchmark's reference solutions."""
        found = self._part("gold").get(benchmark)
        return gold_cell(found) if found else MISSING

    def syntax(self, key: str) -> str:
        """Return the share of samples that compile ("passes"), or are also not trivial ("non_trivial")."""
        return rate_cell(self._part("syntax"), key)

    def passed(self, benchmark: str, k: str) -> str:
        """Return pass@k of a benchmark."""
        found = self._part("functional").get(benchmark, {})
        return pass_cell(found, k) if found else MISSING

    def task(self, name: str) -> str:
        """Return the value of one of the harness's tasks."""
        found = self._part("harness").get(name)
        return harness_cell(found) if found else MISSING

    def skipped(self) -> dict[str, str]:
        """Return why the code of a benchmark was not run, by its name; the name is "code" where none was."""
        found = self.results.get("functional") or {}
        if "skipped" in found:
            return {"code": found["skipped"]}
        return {name: part["skipped"] for name, part in found.items() if "skipped" in part}

    def validations(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that hold a validation."""
        return [line for line in self.metrics if isinstance(line.get("val_loss"), float)]

    def val(self, key: str, which: int = -1, form: str = ".3f") -> str:
        """Return a figure of the first (0) or last (-1) validation of metrics.jsonl."""
        found = [line for line in self.validations() if isinstance(line.get(key), float)]
        return f"{found[which][key]:{form}}" if found else MISSING

    def curve(self) -> list[tuple[int, float]]:
        """Return tokens and bits per byte of each validation during training, all of the same part of the split."""
        found = [line for line in self.validations() if isinstance(line.get("val_bits_per_byte"), float)]
        if not found or not self.trained:
            return []
        cfg = self.config()
        a_step = cfg.train.batch_size * cfg.model.block_size
        part = found[0].get("val_tokens")
        return [(line["step"] * a_step, line["val_bits_per_byte"]) for line in found if line.get("val_tokens") == part]

    def held_out_change(self, before: Run) -> str:
        """Return by how much bits per byte on held-out documents differ from those of another run, with the interval."""
        first, own = (Evaluated(run.path, place, *run._evaluation) for place, run in enumerate((before, self), 1))
        return shown_difference(held_out_difference(first, own), "{:+.3f}".format)

    def gold_change(self, before: Run, benchmark: str = "problems") -> str:
        """Return by how much gold bits per byte differ from those of another run, with the interval."""
        own, other = (run._part("gold").get(benchmark, {}) for run in (self, before))
        return shown_difference(paired_bits(own, other), "{:+.3f}".format)

    def skipped_steps(self) -> int:
        """Return how many steps were skipped because of a bad gradient or loss, by skipped.jsonl."""
        return len({line["step"] for line in read_metrics(self.path / SKIPPED)})

    def fall(self) -> str:
        """Return by how much the validation loss fell from the first step to the last, on the same texts, in per cent."""
        same = self._of_same_texts("val_loss")
        return MISSING if len(same) < 2 else f"{1 - same[-1] / same[0]:.1%}"

    def first_and_last(self, key: str, form: str = ".3f") -> tuple[str, str]:
        """Return a figure before the first step, and the last one of the same texts."""
        same = self._of_same_texts(key)
        return (MISSING, MISSING) if len(same) < 2 else (f"{same[0]:{form}}", f"{same[-1]:{form}}")

    def _of_same_texts(self, key: str) -> list[float]:
        """Return a figure of each validation that read the same texts as that before the first step."""
        lines = [line for line in self.validations() if isinstance(line.get(key), float)]
        first = [line for line in lines if line["step"] == 0]
        return [line[key] for line in lines if first and line.get("val_tokens") == first[0].get("val_tokens")]


def lead_text(smaller: Run, larger: Run) -> str:
    """Return from how many tokens on the larger run's validations are all below the smaller one's at as many tokens.

    Between two validations of the smaller run, its loss is interpolated. Only tokens that both have seen are compared, and only
    runs that are validated on the same part of the same data.
    """
    points, reference = larger.curve(), smaller.curve()
    if not points or not reference or larger.validation_key() != smaller.validation_key():
        return MISSING
    tokens, losses = zip(*reference)
    both = [(n, loss) for n, loss in points if 0 < n <= tokens[-1]]
    behind = [n for n, loss in both if not loss < float(np.interp(n, tokens, losses))]
    if not both:
        return MISSING
    if behind and behind[-1] == both[-1][0]:
        return f"not within {short_number(both[-1][0])}"
    return short_number(next(n for n, _ in both if not behind or n > behind[-1]))


def said(folder: Path, step: str) -> str:
    """Return what a step printed, from its log; empty if it has not ended well. The log has the output of all its starts."""
    known, log = Records(folder).of.get(step), folder / LOGS / f"{step}.log"
    if known is None or known.code != 0 or not log.is_file():
        return ""
    return log.read_text(encoding="utf-8", errors="replace").rpartition(f"$ {known.command}\n")[2]


def log_of(step: str) -> str:
    """Return the name of a step's log, as tables show it."""
    return f"{LOGS}/{step}.log"


def spikes(metrics: list[dict[str, Any]], ratio: float = 1.2, window: int = 20) -> tuple[int, float, float]:
    """Return how many logged losses are more than `ratio` times the median of the `window` before, the worst ratio, and the
    largest gradient norm over its median; nan without enough lines.
    """
    losses = [line["loss"] for line in metrics if isinstance(line.get("loss"), float)]
    norms = [line["grad_norm"] for line in metrics if isinstance(line.get("grad_norm"), float)]
    ratios = [losses[i] / median(losses[i - window : i]) for i in range(window, len(losses))]
    if not ratios:
        return 0, math.nan, math.nan
    return sum(r > ratio for r in ratios), max(ratios), max(norms) / median(norms)
