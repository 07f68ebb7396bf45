"""Opens an export to int8 to be served, without torch. open_run.py opens a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from kindling.data.prompts import rendered_template
from kindling.errors import KindlingError
from kindling.int8.exports import find_export
from kindling.int8.model import CONFIG, WEIGHTS, CompletionError, Model
from kindling.paths import newest_run, places_of_run
from kindling.serving.engine import Engine, Vocabulary

NO_CHAT: tuple[str | None, bool] = (None, False)
MOST_ROWS = 64  # more texts at once would each be too slow
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


class Opened(NamedTuple):
    """A model that can be served."""

    name: str
    engine: Engine
    vocabulary: Vocabulary
    template: str | None
    """The template of a run that was fine-tuned on instructions."""
    remembers: bool
    about: dict[str, Any]


def is_export(path: Path | None) -> bool:
    """Return whether a path names an export to int8 itself, and no run or model of others, which has a `model_type`."""
    if path is None or any((place / "config.yaml").is_file() for place in places_of_run(path)):
        return False
    found = next((place / CONFIG for place in places_of_run(path) if (place / CONFIG).is_file()), None)
    try:
        content = json.loads(found.read_text(encoding="utf-8")) if found is not None else None
    except (OSError, ValueError):
        return False  # what is wrong with it is said when it is read
    return isinstance(content, dict) and "model_type" not in content


def open_export(path: Path | None, kernel: str, cache_bytes: int | None) -> Opened:
    """Open an export to int8, or that of a run; None is the newest run. Raises KindlingError."""
    from kindling.serving.int8_engine import CACHE_BYTES, Int8Engine, Int8Vocabulary, rows_for

    try:
        folder = find_export(newest_run() if path is None else path)
        model = Model(folder)
        if kernel == "c":
            model.compile()
        template, remembers = _chat_of(model.meta.get("chat"))
        vocabulary = Int8Vocabulary(folder, model)
        _ = vocabulary.spellings  # now, and not while the first client waits
    except CompletionError as e:
        raise KindlingError(str(e).replace("DIR must be", f"{path or 'the newest run'} must be")) from None
    engine = Int8Engine(model, min(MOST_ROWS, rows_for(model, CACHE_BYTES if cache_bytes is None else cache_bytes)))
    run = folder.resolve().parent.parent if folder.resolve().parent.name == "export" else folder
    said = {"kind": "an export to int8", "source": model.meta.get("source", ""), "precision": "int8"}
    said |= about(model.meta["model"], _n_parameters(folder / WEIGHTS), folder / WEIGHTS, engine, run)
    said["sha256"] = model.meta["weights_sha256"]
    name = run.resolve().name if run != folder else folder.resolve().name
    return Opened(name, engine, vocabulary, template, remembers, said)


def _chat_of(chat: dict[str, Any] | None) -> tuple[str | None, bool]:
    """Return the template of an export, and whether its run remembers; older exports do not say. Raises CompletionError."""
    if chat is None:
        return NO_CHAT
    if chat["rendered"] != rendered_template(chat["template"]):
        raise CompletionError(
            f"the export must have been made with the template {chat['template']} as it is in prompts.py, but it was another "
            f"then; take the change of the template back, or fine-tune anew and export again"
        )
    return chat["template"], chat["remembers"]


def _n_parameters(weights: Path) -> int:
    """Return the number of parameters in a safetensors file, without the scales of int8."""
    with open(weights, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    shapes = [t["shape"] for name, t in header.items() if name != "__metadata__" and not name.endswith(".scale")]
    return sum(map(math.prod, shapes))


def about(shape: dict[str, Any], n_parameters: int, weights: Path, engine: Engine, run: Path) -> dict[str, Any]:
    """Return what the page shows of a model in the file `weights` of a run."""
    return {
        "shape": {name: shape[name] for name in SHAPE},
        "parameters": n_parameters,
        "bytes": weights.stat().st_size if weights.is_file() else 0,
        "rows": engine.n_rows,
        "measured": measured(run),
    }


def measured(run: Path) -> list[dict[str, Any]]:
    """Return what evaluate.py measured of a run, a few figures with their names; nothing if there is no whole eval.json."""
    try:
        found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    figures = _part(found, "language_modelling", "all")
    rows = [("bits per byte, held-out files", figures.get("bits_per_byte")), ("perplexity", figures.get("perplexity"))]
    for kind, gaps in _part(found, "infilling", "gaps").items():
        for way, filled in _part(gaps, "ways").items():
            rows.append((f"exact, a {kind} filled in ({way})", _part(filled).get("exact")))
    for name, benchmark in _part(found, "functional").items():
        rows += [(f"{name}, pass@{k}", value) for k, value in _part(benchmark, "pass_at").items()]
    finite = [(what, value) for what, value in rows if isinstance(value, (int, float)) and math.isfinite(value)]
    return [{"what": what, "value": value} for what, value in finite]


def _part(found: Any, *names: str) -> dict[str, Any]:
    """Return a part of eval.json; empty where it is not there, or was skipped, which a text says instead."""
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
