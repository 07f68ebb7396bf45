"""The content of a run's report: facts, pictures, samples, evaluation and data, for html_report.page.

    html = report_of(subject, text, plots)

Results and samples of an evaluation are shown only if it was of the same weights. Limit: the answers of a fine-tuned run are
those from the end of its training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import Config
from kindling.config_io import to_yaml
from kindling.data.ledger import Ledger
from kindling.data.prompts import Exchange
from kindling.errors import one_line
from kindling.evaluation.report import sections
from kindling.evaluation.results_file import FORMAT
from kindling.generation.completion import answer, complete
from kindling.generation.sampling import GenerationError, Sampling
from kindling.plots.figures import WHY_A_GAP
from kindling.plots.html_report import Picture, Sample, Samples, page
from kindling.plots.inspection import InspectedRun, Text
from kindling.public_paths import PublicPaths, public_path
from kindling.runs.checkpoint import load_state, weights_sha256
from kindling.sample_prompts import sample_prompts
from kindling.tables import Section

SAMPLES = 6
SAMPLE_CHARS = 1500
NEW_TOKENS = 120  # of a sample made for the report
DURING = "training_samples.jsonl"  # of a run: what it wrote during training

CAPTIONS = {
    "training_curves.png": "Loss, validation perplexity, learning rate and gradient norm over training.",
    "token_loss.png": "The loss of each token, in nats, over the text itself: the stronger the colour, the harder to predict.",
    "attention.png": "Attention weights of every head: a row for each token that looks, a column for each it looks at.",
    "weights.png": "Distribution of the weights of each kind of matrix, from its smallest to its largest, by layer.",
    "spectral_norms.png": "Largest singular value and stable rank of each matrix, by layer.",
}


def pictures_of(subject: InspectedRun, text: Text, plots: dict[str, bytes]) -> list[Picture]:
    """Return the plots for the report with their captions; attention of single layers is left out."""
    alts = {
        "training_curves.png": curves_in_words(subject.metrics),
        "token_loss.png": f"The tokens of {text.what}, each on a background whose colour is stronger the greater its loss.",
        "attention.png": f"A grid of heatmaps, {subject.model.cfg.n_layer} layers by {subject.model.cfg.n_head} heads.",
        "weights.png": "Histograms on a logarithmic scale, one panel for each kind of matrix.",
        "spectral_norms.png": "Lines over the layers, one for each kind of matrix, and points for embeddings and head.",
    }
    losses = [{key for key in ("loss", "val_loss") if isinstance(line.get(key), float)} for line in subject.metrics]
    of = {
        "training_curves.png": f" {' '.join(WHY_A_GAP.split())}" if len(set().union(*losses)) == 2 else "",
        "token_loss.png": f" The text is {text.what}.",
        "attention.png": f" The text is {text.what}. Each layer is larger in plots/attention/.",
    }
    return [Picture(plots[name], CAPTIONS[name] + of.get(name, ""), alts[name]) for name in CAPTIONS if name in plots]


def curves_in_words(lines: list[dict[str, Any]]) -> str:
    """Return a sentence with the first and the last value of each loss."""
    parts = []
    for key, name in (("loss", "training loss"), ("val_loss", "validation loss")):
        known = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]
        if known:
            (a, first), (b, last) = known[0], known[-1]
            parts.append(f"{name} from {first:.3f} at step {a:,} to {last:.3f} at step {b:,}")
    return "Line plots: " + ("; ".join(parts) or "no losses recorded") + "."


VALIDATION = (
    ("val_loss", "loss", ".4f"),
    ("val_perplexity", "perplexity", ",.2f"),
    ("val_bits_per_byte", "bits per byte", ".4f"),
)


def facts_of(subject: InspectedRun) -> list[tuple[str, str]]:
    """Return the facts about the run, as names and values."""
    cfg, model, folder = subject.run.config(), subject.model, subject.checkpoint
    state = load_state(folder, mapped=True)
    environment = state.get("environment", {})
    elapsed = state.get("elapsed_s", 0.0)
    spent = f"{elapsed / 3600:.1f} h" if elapsed >= 5400 else f"{elapsed / 60:.1f} min"
    how = ", ".join(f"{key} {value}" for key, value in environment.items())
    shape = f"{model.cfg.n_layer} layers, {model.cfg.n_embd} wide, {model.cfg.n_head} heads, context {model.cfg.block_size:,}"
    goes_on = (
        "" if cfg.train.extend is None else f"{public_path(cfg.train.extend)}, from step {state['extended_from']:,}"
    )
    facts = [
        ("preset", cfg.preset),
        ("parameters", f"{model.n_parameters():,}"),
        ("shape", f"{shape}, vocabulary {model.cfg.vocab_size:,}"),
        ("steps", f"{state['step']:,}"),
        ("tokens", f"{state['position'] * model.cfg.block_size:,}"),
        ("training time", spent),
        ("trained on", how),
        ("fine-tuned from", public_path(cfg.train.init_from or "")),
        ("goes on with", goes_on),
        ("weights' sha256", weights_sha256(folder)),
    ]
    validated = [line for line in subject.metrics if isinstance(line.get("val_loss"), float)]
    last: dict[str, Any] = validated[-1] if validated else {}
    figures = [f"{name} {last[key]:{form}}" for key, name, form in VALIDATION if isinstance(last.get(key), float)]
    if figures:
        facts.append(("validation", f"{', '.join(figures)}, at step {last['step']:,}"))
    return [(name, value) for name, value in facts if value]


def ledger_sections(folder: Path) -> list[Section]:
    """Return the data's ledger as tables: what was read, dropped, changed and kept."""
    try:
        ledger = Ledger.read(folder)
        cells = [[label, f"{n:,}", f"{n_bytes / 1e6:,.2f}"] for label, (n, n_bytes) in ledger.totals()]
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
        return [Section("Data", notes=[f"the ledger cannot be read ({one_line(e)})"])]


def evaluation_of(subject: InspectedRun) -> tuple[dict[str, Any], str]:
    """Return the content of eval.json if it is of these weights, else an empty dict and the reason."""
    again = f"evaluate with `python evaluate.py {public_path(subject.run.path)}`"
    path = subject.run.path / "eval.json"
    if not path.is_file():
        return {}, f"not evaluated yet; {again}"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if (results["format"], results["weights_sha256"]) == (FORMAT, weights_sha256(subject.checkpoint)):
            return results, ""
    except (OSError, ValueError, KeyError, TypeError) as e:
        return {}, f"eval.json cannot be read ({one_line(e)}); {again}"
    return {}, f"eval.json is of other weights, or by another version; {again}"


def evaluation_sections(subject: InspectedRun) -> list[Section]:
    """Return the tables of the evaluation, or a note that there is none for these weights."""
    results, why_not = evaluation_of(subject)
    if results:
        try:
            return sections(results, list(rows_of(subject.run.path / "losses.jsonl")))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            why_not = f"eval.json must be as evaluate.py writes it, but is not ({one_line(e)})"
    return [Section("Evaluation", notes=[why_not])]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, if it exists; lines that are not objects are skipped."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def samples_of(subject: InspectedRun) -> tuple[list[Sample], str]:
    """Return a few texts of the run and a note on their origin: answers, samples of the evaluation, or new samples."""
    instructions = subject.run.config().data.instructions
    answers = list(rows_of(subject.run.path / "answers.jsonl")) if instructions else []
    if answers:
        shown = [
            Sample(
                f"Answer {i}",
                _text(row, "prompt"),
                _text(row, "answer"),
                "ended by itself" if row.get("stopped") else "cut by the context",
            )
            for i, row in enumerate(answers[:SAMPLES], 1)
        ]
        note = f"The first {len(shown)} of {len(answers):,} answers to held-out instructions, from the end of training."
        return shown, note
    evaluated = not instructions and evaluation_of(subject)[0]
    graded = list(rows_of(subject.run.path / "samples.jsonl")) if evaluated else []
    if graded:
        chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in graded:  # the first of each benchmark and of each verdict on it
            chosen.setdefault((_text(row, "benchmark"), _text(row, "verdict"), bool(row.get("compiles"))), row)
        shown = [_graded(row) for row in list(chosen.values())[:SAMPLES]]
        note = f"{len(shown)} of {len(graded):,} samples of the evaluation: the first of each benchmark and verdict."
        return shown, note
    return new_samples(subject), "Made for this report from the config's prompts, each with the seed of its number."


def samples_during_training(subject: InspectedRun) -> list[Samples]:
    """Return what the run wrote to one prompt at its last few steps with samples; nothing if it has written none."""
    rows = [row for row in rows_of(subject.run.path / DURING) if isinstance(row.get("step"), int) and row.get("text")]
    if not rows:
        return []
    prompt = next(row.get("prompt") for row in rows if row["step"] == rows[-1]["step"])
    at = {row["step"]: row for row in rows if row.get("prompt") == prompt}
    last = sorted(at)[-SAMPLES:]
    shown = []
    for step in last:
        begun, text = _text(at[step], "prompt"), _text(at[step], "text")
        shown.append(Sample(f"Step {step:,}", begun, text.removeprefix(begun)))
    note = f"The last {len(last)} of {len(at):,} times, always from the same prompt." if len(at) > 1 else "One time."
    return [Samples("What it wrote during training", note, shown)]


def _text(row: dict[str, Any], key: str) -> str:
    text = str(row.get(key, ""))
    return (
        text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + f"… ({len(text) - SAMPLE_CHARS:,} more characters)"
    )


def _graded(row: dict[str, Any]) -> Sample:
    program, text = _text(row, "program"), _text(row, "text")
    prompt = program.removesuffix(text) if text and program.endswith(text) else ""
    return Sample(
        f"{_text(row, 'benchmark')}, {_text(row, 'task_id')}:",
        prompt,
        text if prompt else program or text,
        _verdict(row),
    )


def _verdict(row: dict[str, Any]) -> str:
    """Return what the evaluation says of a sample; one without tests is only compiled."""
    verdict, compiles = _text(row, "verdict"), row.get("compiles")
    if verdict == "syntax":
        said = "does not compile"
    elif compiles and not verdict:
        said = "compiles" if row.get("non_trivial") else "compiles, but does nothing"
    else:
        said = verdict
    return ", ".join(
        filter(None, (said, _text(row, "reason"), "" if compiles or verdict == "syntax" else "no statement of its own"))
    )


def new_samples(subject: InspectedRun) -> list[Sample]:
    """Continue the config's prompts, or answer them if the run is fine-tuned."""
    cfg, model, tokenizer = subject.run.config(), subject.model.for_generation(), subject.tokenizer
    out = []
    limit = f"cut after {NEW_TOKENS} tokens"
    for number, prompt in enumerate(sample_prompts(cfg)[:SAMPLES], 1):
        sampling = Sampling(max_new_tokens=NEW_TOKENS, seed=number)
        try:
            if cfg.data.instructions:
                said = answer(model, tokenizer, cfg.data.template, [Exchange(prompt)], sampling)
                cut = f"cut by {said.cut_by}" if said.cut_by.startswith("the context") else limit
                text, prompt, verdict = said.text, prompt + "\n\n", "ended by itself" if said.stopped else cut
            else:
                made = complete(model, tokenizer, prompt, sampling)
                text, verdict = made.text, limit if made.ended_by == "limit" else "ended by itself"
        except GenerationError as e:  # if one prompt does not fit, show the others
            text, verdict = f"({e})", ""
        out.append(Sample(f"Sample {number}", prompt, text, verdict))
    return out


def report_of(subject: InspectedRun, text: Text, plots: dict[str, bytes]) -> str:
    """Return the report as HTML."""
    samples, note = samples_of(subject)
    cfg = subject.run.config()
    public = PublicPaths(cfg)
    return page(
        f"{subject.name}",
        facts_of(subject),
        public(evaluation_sections(subject) + ledger_sections(subject.run.data)),
        pictures_of(subject, text, plots),
        [Samples("What it writes", note, samples), *samples_during_training(subject)],
        to_yaml(Config(**public(dataclasses.asdict(cfg)))),
    )
