"""Draw a run's curves, attention, weights and token losses, and write a report with all of them.

    python visualize.py runs/demo                           # into runs/demo/plots/ and runs/demo/report.html
    python visualize.py runs/demo --text "def f(x):"        # attention and losses of this text; or --file PATH
    python visualize.py --compare runs/demo runs/demo-sft   # the curves of several runs, into plots/ of the first

Without a text, attention and losses are those of a typical held-out text: of 15, the one with the median loss. Nothing is
written before everything is computed.
Limits: a text must fit the model's context, and heatmaps show its first 48 tokens.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from kindling.cli import parse_cli, run_script, utf8
from kindling.errors import KindlingError
from kindling.files import UNENCODABLE
from kindling.json_rows import DAMAGE, open_text
from kindling.paths import require_runs

if TYPE_CHECKING:
    from kindling.plots.inspection import InspectedRun, Text
    from kindling.runs.checkpoint import RunDirectory

PLOTS, REPORT, CURVES = "plots", "report.html", "compare_curves.png"


class VisualizationError(KindlingError):
    """Something that cannot be drawn or written."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. Default: the newest run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    text: str | None = None
    """Draw attention and losses for this text."""
    file: Path | None = None
    """Draw attention and losses for this file, or for its beginning if it does not fit the context."""
    compare: tuple[Path, ...] = ()
    """Draw the curves of these runs in one plot, and nothing else."""


def require(flags: Flags, run: RunDirectory) -> str | None:
    """Return the text of --text or --file, or None; raises VisualizationError for flags that cannot be used."""
    if not os.access(run.path, os.W_OK):
        raise VisualizationError(f"{run.path} must be writable for the plots, but is not; correct its permissions")
    if flags.text is not None and flags.file is not None:
        raise VisualizationError("only one of --text and --file must be given, but both are; leave one out")
    if flags.file is not None:
        try:
            with open_text(flags.file, "utf-8-sig") as f:
                whole = f.read()
            whole.encode("utf-8")  # raises an error for a byte that is not UTF-8
        except DAMAGE as e:
            why = getattr(e, "strerror", None) or e
            raise VisualizationError(
                f"--file must be a readable text in UTF-8, but {str(flags.file)!r} is not ({why}); check the path"
            ) from None
        text: str | None = whole
    else:
        text = None if flags.text is None else utf8(flags.text, "--text")
    if text == "":
        name = "--text" if flags.file is None else f"the file {str(flags.file)!r}"
        raise VisualizationError(f"{name} must hold some text, but is empty; leave it out for held-out text")
    return text


def text_of(subject: InspectedRun, flags: Flags, given: str | None) -> Text:
    """Return the text for attention and losses."""
    from kindling.plots.held_out import typical_text
    from kindling.plots.inspection import given_text

    tokenizer, block_size = subject.tokenizer, subject.model.cfg.block_size
    if given is None:
        dataset = subject.run.heldout("val")
        dataset.require_fits(subject.model.cfg.vocab_size, tokenizer.sha256)
        return typical_text(subject.model, dataset, tokenizer, subject.runtime)
    if flags.file is not None:
        return given_text(tokenizer, given, block_size, f"the file {flags.file.name}", crop=True)
    return given_text(tokenizer, given, block_size, "--text")


def draw(subject: InspectedRun, text: Text) -> dict[str, bytes]:
    """Return all plots as PNGs, by their paths in the folder of plots."""
    from kindling.plots import text_plots
    from kindling.plots.figures import png, spectral_norms, training_curves, weight_histograms
    from kindling.plots.inspection import attention, curves_of, histograms, matrices, spectra, units

    name, out = subject.name, {}
    if subject.metrics:
        out["training_curves.png"] = png(training_curves(curves_of(subject.metrics), name))
    else:
        print(f"note: {subject.run.path} has no metrics.jsonl with a line in it: no training curves", file=sys.stderr)
    weights, tokens = attention(subject.model, subject.tokenizer, text)
    out["attention.png"] = png(text_plots.attention_overview(weights, tokens, f"Attention of {name}", text.name))
    for layer, heads in enumerate(weights):
        figure = text_plots.attention_layer(heads, tokens, f"Attention of {name}, layer {layer}", text.name)
        out[f"attention/layer_{layer}.png"] = png(figure)
    found = matrices(subject.model)
    out["weights.png"] = png(weight_histograms(histograms(found), name))
    out["spectral_norms.png"] = png(spectral_norms(spectra(found), subject.model.cfg.n_layer, name))
    losses = units(subject.model, subject.tokenizer, text, subject.runtime)
    guess = math.log(subject.model.cfg.vocab_size)
    out["token_loss.png"] = png(text_plots.token_losses(losses, guess, name, text.what, text.first_line))
    return out


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder under temporary names, then rename them, so that no file is left half written.

    Raises VisualizationError if they cannot be written.
    """
    partial: dict[Path, Path] = {}
    try:
        for name, content in files.items():
            path = folder / name
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path] = path.with_name(f".{path.name}.partial")
            partial[path].write_bytes(content)
        for path, written in partial.items():
            written.replace(path)
    except OSError as e:
        raise VisualizationError(
            f"{folder} must be writable for the plots, but is not ({e}); free some space or fix its permissions"
        ) from None
    finally:
        for written in partial.values():
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)


def compare(paths: list[Path]) -> None:
    """Draw the curves of several runs in one plot, in the folder of the first run."""
    from kindling.public_paths import public_names
    from kindling.runs.loading import find_run
    from kindling.runs.metrics import read_metrics

    runs = [find_run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < max(2, len(runs)):
        given = ", ".join(map(str, paths))
        raise VisualizationError(f"--compare must name two or more different runs, but names {given}; name others")
    metrics = [read_metrics(run.path / "metrics.jsonl") for run in runs]
    if without := [run for run, lines in zip(runs, metrics) if not lines]:
        raise VisualizationError(
            f"{without[0].path} must have metrics to draw, but metrics.jsonl has no line; leave it out"
        )
    from kindling.plots.comparable import compared, notes_on  # imports torch
    from kindling.plots.figures import compare_curves, png

    found = [compared(*of) for of in zip(runs, public_names([run.path for run in runs]), metrics)]
    notes = notes_on(found)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    folder = runs[0].path / PLOTS
    write_all(folder, {CURVES: png(compare_curves(found, notes))})
    print(f"written to {folder / CURVES}")


def main(argv: list[str] | None = None) -> int:
    """Draw a run, or the curves of several runs."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    require_runs(flags.run, *flags.compare)
    from kindling.runs.loading import find_run, load_model, require_checkpoint

    if flags.compare:
        compare([*([] if flags.run is None else [flags.run]), *flags.compare])
        return 0
    run = find_run(flags.run)
    given = require(flags, run)
    checkpoint, train = require_checkpoint(run), run.config().train
    from kindling.device import resolve  # imports torch

    runtime = resolve(replace(train, device=flags.device), flag="--device")
    from kindling.plots.inspection import InspectedRun
    from kindling.plots.run_report import report_of

    model, _ = load_model(run, runtime.device, checkpoint)
    subject = InspectedRun(run, model, checkpoint, run.tokenizer(), runtime)
    text = text_of(subject, flags, given)
    plots = draw(subject, text)
    files = {f"{PLOTS}/{name}": content for name, content in plots.items()}
    files[REPORT] = report_of(subject, text, plots).encode("utf-8", UNENCODABLE)
    write_all(run.path, files)
    print(f"{len(plots)} plots in {run.path / PLOTS}/, and {run.path / REPORT} ({len(files[REPORT]) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_script(main)
