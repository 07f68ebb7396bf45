"""Draw what a run learnt and how: its curves, attention, weights and the loss of each token, and a report of it all.

    python visualize.py runs/demo                           # into runs/demo/plots/ and runs/demo/report.html
    python visualize.py runs/demo --text "def f(x):"        # attention and losses of this text; or --file PATH
    python visualize.py --compare runs/demo runs/demo-sft   # the curves of several runs, into plots/ of the first

Without a text, attention and losses are of held-out text of the run. All is computed before anything is written. Limit: a text
may be as long as the model's context, and heatmaps show its first 48 tokens.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cli import parse_cli, run_script, to_yaml
from config import KindlingError

if TYPE_CHECKING:
    from checkpoint import RunDirectory
    from device import Runtime
    from html_report import Picture, Sample
    from inspection import Text
    from model import LanguageModel
    from tables import Section
    from tokenizer import Tokenizer

PLOTS, REPORT, CURVES = "plots", "report.html", "compare_curves.png"
SAMPLES = 6  # in the report
SAMPLE_CHARS = 3000
NEW_TOKENS = 120  # of a sample that is made for the report


class VisualizationError(KindlingError):
    """Something that cannot be drawn, or not be written."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    text: str | None = None
    """Draw attention and losses of this text."""
    file: Path | None = None
    """Draw attention and losses of this file: its beginning, or all if it fits the context."""
    compare: tuple[Path, ...] = ()
    """Draw the curves of these runs in one plot, and nothing else."""


@dataclass
class Subject:
    """What is looked at: a run with the weights of one checkpoint."""

    run: RunDirectory
    model: LanguageModel
    checkpoint: Path
    tokenizer: Tokenizer
    runtime: Runtime

    @cached_property
    def name(self) -> str:
        """The run and its step, for titles."""
        return f"{self.run.path}, step {int(self.checkpoint.name.removeprefix('step_')):,}"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics."""
        from metrics import read_metrics

        return read_metrics(self.run.path / "metrics.jsonl")


def require(flags: Flags, run: RunDirectory) -> str | None:
    """Return the text of --text or --file, or None; raise what can be known before anything is computed."""
    if not os.access(run.path, os.W_OK):
        raise VisualizationError(f"{run.path} must be writable for the plots, but is not; mend its permissions")
    if flags.text is not None and flags.file is not None:
        raise VisualizationError("only one of --text and --file must be given, but both are; leave one out")
    if flags.file is not None:
        try:
            text = flags.file.expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise VisualizationError(
                f"--file must be a readable text in UTF-8, but {str(flags.file)!r} is not ({e}); check the path"
            ) from None
    else:
        text = None if flags.text is None else os.fsencode(flags.text).decode("utf-8", "replace")
    if text == "":
        name = "--text" if flags.file is None else f"the file {str(flags.file)!r}"
        raise VisualizationError(f"{name} must hold some text, but is empty; leave it out for held-out text")
    return text


def text_of(subject: Subject, flags: Flags, given: str | None) -> Text:
    """Return the text that attention and losses are drawn of."""
    from inspection import given_text, held_out_text

    tokenizer, block_size = subject.tokenizer, subject.model.cfg.block_size
    if given is None:
        dataset = subject.run.heldout("val")
        dataset.require_fits(subject.model.cfg.vocab_size, tokenizer.sha256)
        return held_out_text(dataset, tokenizer, block_size)
    if flags.file is not None:
        return given_text(tokenizer, given, block_size, f"the file {flags.file.name}", crop=True)
    return given_text(tokenizer, given, block_size, "--text")


def draw(subject: Subject, text: Text) -> dict[str, bytes]:
    """Return all plots as PNGs, by their paths inside the folder of plots."""
    import text_plots
    from inspection import attention, curves_of, histograms, matrices, spectra, units
    from plots import png, spectral_norms, training_curves, weight_histograms

    name, out = subject.name, {}
    if subject.metrics:
        out["training_curves.png"] = png(training_curves(curves_of(subject.metrics), name))
    else:
        print(f"note: {subject.run.path} has no metrics.jsonl with a line in it: no training curves", file=sys.stderr)
    weights, tokens = attention(subject.model, subject.tokenizer, text)
    of = (
        f"the first {len(tokens)} of {len(text.ids)} tokens of {text.what}"
        if len(tokens) < len(text.ids)
        else text.what
    )
    out["attention.png"] = png(text_plots.attention_overview(weights, f"Attention of {name}: {of}"))
    for layer, heads in enumerate(weights):
        figure = text_plots.attention_layer(heads, tokens, f"Attention of {name}, layer {layer}: {of}")
        out[f"attention/layer_{layer}.png"] = png(figure)
    found = matrices(subject.model)
    out["weights.png"] = png(weight_histograms(histograms(found), name))
    out["spectral_norms.png"] = png(spectral_norms(spectra(found), subject.model.cfg.n_layer, name))
    losses = units(subject.model, subject.tokenizer, text, subject.runtime)
    guess = math.log(subject.model.cfg.vocab_size)
    out["token_loss.png"] = png(text_plots.token_losses(losses, guess, name, text.what))
    return out


# -- the report -------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "training_curves.png": "Loss, validation perplexity, learning rate and gradient norm over training.",
    "token_loss.png": "The loss of each token, in nats, over the text itself: the darker, the harder to predict.",
    "attention.png": "Attention weights of every head: a row for each token that looks, a column for each it looks at.",
    "weights.png": "Distribution of the weights of each kind of matrix, by layer: the deeper, the darker.",
    "spectral_norms.png": "Largest singular value and stable rank of each matrix, by layer.",
}


def pictures_of(subject: Subject, text: Text, plots: dict[str, bytes]) -> list[Picture]:
    """Return the plots that the report shows, with their captions; single layers of attention stay files."""
    from html_report import Picture

    alts = {
        "training_curves.png": curves_in_words(subject.metrics),
        "token_loss.png": f"The tokens of {text.what}, each on a background that is darker the greater its loss.",
        "attention.png": f"A grid of heatmaps, {subject.model.cfg.n_layer} layers by {subject.model.cfg.n_head} heads.",
        "weights.png": "Histograms on a logarithmic scale, one panel for each kind of matrix.",
        "spectral_norms.png": "Two panels of lines over the layers, one line for each kind of matrix.",
    }
    of = {
        "token_loss.png": f" {text.what}.",
        "attention.png": f" {text.what}. Each layer is larger in plots/attention/.",
    }
    return [Picture(plots[name], CAPTIONS[name] + of.get(name, ""), alts[name]) for name in CAPTIONS if name in plots]


def curves_in_words(lines: list[dict[str, Any]]) -> str:
    """Return between which values the losses moved."""
    parts = []
    for key, name in (("loss", "training loss"), ("val_loss", "validation loss")):
        known = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
        if known:
            (a, first), (b, last) = known[0], known[-1]
            parts.append(f"{name} from {first:.3f} at step {a:,} to {last:.3f} at step {b:,}")
    return "Line plots: " + ("; ".join(parts) or "no losses recorded") + "."


def facts_of(subject: Subject) -> list[tuple[str, str]]:
    """Return what the run is, by name and value."""
    import torch

    from checkpoint import STATE, weights_sha256

    cfg, model, folder = subject.run.config(), subject.model, subject.checkpoint
    # mapped, not read: optimiser states are twice the size of the weights
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    environment = state.get("environment", {})
    elapsed = state.get("elapsed_s", 0.0)
    spent = f"{elapsed / 3600:.1f} h" if elapsed >= 5400 else f"{elapsed / 60:.1f} min"
    how = ", ".join(f"{key} {value}" for key, value in environment.items())
    shape = f"{model.cfg.n_layer} layers, {model.cfg.n_embd} wide, {model.cfg.n_head} heads, context {model.cfg.block_size:,}"
    facts = [
        ("preset", cfg.preset),
        ("parameters", f"{model.n_parameters():,}"),
        ("shape", f"{shape}, vocabulary {model.cfg.vocab_size:,}"),
        ("steps", f"{state['step']:,}"),
        ("tokens", f"{state['position'] * model.cfg.block_size:,}"),
        ("training time", spent),
        ("trained on", how),
        ("fine-tuned from", str(cfg.train.init_from or "")),
        ("weights' sha256", weights_sha256(folder)),
    ]
    for line in reversed(subject.metrics):
        if isinstance(line.get("val_loss"), float):
            names = (
                ("val_loss", "loss", ".4f"),
                ("val_perplexity", "perplexity", ",.2f"),
                ("val_bits_per_byte", "bits per byte", ".4f"),
            )
            figures = [f"{name} {line[key]:{form}}" for key, name, form in names if isinstance(line.get(key), float)]
            facts.append(("validation", f"{', '.join(figures)}, at step {line['step']:,}"))
            break
    return [(name, value) for name, value in facts if value]


def ledger_sections(folder: Path) -> list[Section]:
    """Return the data's ledger as a table: what was read, dropped, changed and kept."""
    from ledger import Ledger
    from tables import Section

    try:
        ledger = Ledger.read(folder)
        rows = [["read", *ledger.total("read")]]
        rows += [[f"dropped: {rule}", *ledger.total("dropped", rule)] for rule in ledger.names("dropped")]
        rows += [[change, *ledger.total("changed", change)] for change in ledger.names("changed")]
        rows.append(["kept", *ledger.total("kept")])
        if ledger.total("repeated")[0]:
            rows.append(["repeated", *ledger.total("repeated")])
        cells = [[name, f"{n:,}", f"{n_bytes / 1e6:,.2f}"] for name, n, n_bytes in rows]
        found = [Section("Data", ["", "documents", "MB"], cells, list(map(str, ledger.notes)))]
        if len(ledger.rows) > 1:
            kinds = [
                [
                    row["source"],
                    row["language"],
                    *(f"{row[key][0]:,}" for key in ("read", "kept")),
                    f"{row['tokens']:,}",
                ]
                for row in ledger.rows.values()
            ]
            columns = ["source", "language", "read", "kept", "tokens"]
            found.append(Section("Data by source and language", columns, kinds, names=2))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return [Section("Data", notes=[f"the ledger cannot be read ({type(e).__name__}: {e})"])]


def evaluation_sections(subject: Subject) -> list[Section]:
    """Return the tables of eval.json, or a note that there are none of these weights."""
    from checkpoint import weights_sha256
    from report import FORMAT, sections
    from tables import Section

    path = subject.run.path / "eval.json"
    again = f"evaluate with `python evaluate.py {subject.run.path}`"
    if not path.is_file():
        return [Section("Evaluation", notes=[f"not evaluated yet; {again}"])]
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT or results["weights_sha256"] != weights_sha256(subject.checkpoint):
            return [Section("Evaluation", notes=[f"eval.json is of other weights or of another version; {again}"])]
        losses = list(rows_of(subject.run.path / "losses.jsonl"))
        return sections(results, losses)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return [Section("Evaluation", notes=[f"eval.json cannot be read ({type(e).__name__}: {e}); {again}"])]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, none if there is no file; lines that are no objects are left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def samples_of(subject: Subject) -> tuple[list[Sample], str]:
    """Return a few texts of the run and where they are from: its answers, its evaluation's samples, or new ones."""
    from html_report import Sample

    instructions = subject.run.config().data.instructions
    answers = list(rows_of(subject.run.path / "answers.jsonl")) if instructions else []
    if answers:
        shown = [
            Sample(
                f"Answer {i}",
                _text(row, "prompt"),
                _text(row, "answer"),
                "" if row.get("stopped") else "cut by the context",
            )
            for i, row in enumerate(answers[:SAMPLES], 1)
        ]
        note = f"The first {len(shown)} of {len(answers):,} answers to held-out instructions, from the end of training."
        return shown, note
    graded = [] if instructions else list(rows_of(subject.run.path / "samples.jsonl"))
    if graded:
        chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in graded:  # the first of each benchmark and of each verdict on it
            chosen.setdefault((_text(row, "benchmark"), _text(row, "verdict"), bool(row.get("compiles"))), row)
        shown = [_graded(row) for row in list(chosen.values())[:SAMPLES]]
        note = f"{len(shown)} of {len(graded):,} samples of the evaluation: the first of each benchmark and verdict."
        return shown, note
    return new_samples(subject), "Made for this report from the config's prompts, each with the seed of its number."


def _text(row: dict[str, Any], key: str) -> str:
    text = str(row.get(key, ""))
    return (
        text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + f"… ({len(text) - SAMPLE_CHARS:,} more characters)"
    )


def _graded(row: dict[str, Any]) -> Sample:
    from html_report import Sample

    verdict = ", ".join(
        filter(
            None,
            (_text(row, "verdict"), _text(row, "reason"), "compiles" if row.get("compiles") else "does not compile"),
        )
    )
    program, text = _text(row, "program"), _text(row, "text")
    prompt = program.removesuffix(text) if text and program.endswith(text) else ""
    return Sample(
        f"{_text(row, 'benchmark')}, {_text(row, 'task_id')}:", prompt, text if prompt else program or text, verdict
    )


def new_samples(subject: Subject) -> list[Sample]:
    """Continue the config's prompts, or answer them if the run was fine-tuned."""
    from generate import GenerationError, Sampling, answer, complete
    from html_report import Sample
    from prompts import Exchange

    cfg, model, tokenizer = subject.run.config(), subject.model.for_generation(), subject.tokenizer
    out = []
    for number, prompt in enumerate(cfg.train.sample_prompts[:SAMPLES], 1):
        sampling = Sampling(max_new_tokens=NEW_TOKENS, seed=number)
        try:
            if cfg.data.instructions:
                text, prompt = (
                    answer(model, tokenizer, cfg.data.template, [Exchange(prompt)], sampling).text,
                    prompt + "\n\n",
                )
            else:
                text = complete(model, tokenizer, prompt, sampling)
        except GenerationError as e:  # a prompt that does not fit is no reason to lose the rest
            text = f"({e})"
        out.append(Sample(f"Sample {number}", prompt, text))
    return out


def report_of(subject: Subject, text: Text, plots: dict[str, bytes]) -> str:
    """Return the report as HTML."""
    from html_report import page

    samples, note = samples_of(subject)
    return page(
        f"{subject.name}",
        facts_of(subject),
        evaluation_sections(subject) + ledger_sections(subject.run.data),
        pictures_of(subject, text, plots),
        samples,
        note,
        to_yaml(subject.run.config()),
    )


# -- files ------------------------------------------------------------------------------------------------------------


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, all or none: each beside its place first, then renamed.

    Raises VisualizationError if they cannot be written.
    """
    partial: dict[Path, Path] = {}
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path] = path.with_name(f".{path.name}.partial")
            partial[path].write_bytes(content)
        for path, written in partial.items():
            written.replace(path)
    except OSError as e:
        for written in partial.values():
            if written.parent.is_dir():
                written.unlink(missing_ok=True)
        raise VisualizationError(
            f"{folder} must be writable for the plots, but is not ({e}); free some space or mend its permissions"
        ) from None


def compare(paths: list[Path]) -> None:
    """Draw the curves of several runs in one plot, into the folder of the first."""
    from checkpoint import find_run
    from inspection import curves_of
    from metrics import read_metrics
    from plots import compare_curves, png
    from shards import read_manifest

    runs = [find_run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < max(2, len(runs)):
        given = ", ".join(map(str, paths))
        raise VisualizationError(f"--compare must name two or more different runs, but names {given}; name others")
    curves = []
    for run in runs:
        lines = read_metrics(run.path / "metrics.jsonl")
        if not lines:
            raise VisualizationError(
                f"{run.path} must have metrics to draw, but metrics.jsonl has no line; leave it out"
            )
        curves.append((str(run.path), curves_of(lines)))
    manifests = [read_manifest(run.data) for run in runs]
    notes = []
    if len({manifest["tokenizer_sha256"] for manifest in manifests}) > 1:
        notes.append("The runs have different tokenizers: their losses do not compare, bits per byte do.")
    if len({manifest["fingerprint"] for manifest in manifests}) > 1:
        notes.append(
            "The runs have different data: validation figures are of other held-out texts, and do not compare."
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    folder = runs[0].path / PLOTS
    write_all(folder, {CURVES: png(compare_curves(curves, notes))})
    print(f"written to {folder / CURVES}")


def main(argv: list[str] | None = None) -> int:
    """Draw a run, or compare the curves of several."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.compare:
        compare([*([] if flags.run is None else [flags.run]), *flags.compare])
        return 0
    from checkpoint import find_run, load_model
    from device import resolve

    run = find_run(flags.run)
    given = require(flags, run)
    runtime = resolve(replace(run.config().train, device=flags.device))
    model, checkpoint = load_model(run, runtime.device)
    subject = Subject(run, model, checkpoint, run.tokenizer(), runtime)
    text = text_of(subject, flags, given)
    plots = draw(subject, text)
    files = {f"{PLOTS}/{name}": content for name, content in plots.items()}
    files[REPORT] = report_of(subject, text, plots).encode("utf-8")
    write_all(run.path, files)
    print(f"{len(plots)} plots in {run.path / PLOTS}/, and {run.path / REPORT} ({len(files[REPORT]) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_script(main)
