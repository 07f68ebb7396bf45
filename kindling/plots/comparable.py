"""Which curves of several runs compare: losses per token only with one tokenizer, and every loss only on the same texts."""

from __future__ import annotations

from typing import Any

from kindling.data.shards import read_manifest
from kindling.plots.figures import Compared
from kindling.plots.inspection import curves_of
from kindling.runs.checkpoint import RunDirectory


def compared(run: RunDirectory, name: str, metrics: list[dict[str, Any]]) -> Compared:
    """Return the curves of a run, by the lines of its metrics.jsonl, and what they compare with.

    Raises DataError if the manifest of its data is missing or damaged.
    """
    manifest, curves = read_manifest(run.data), curves_of(metrics)
    tokenizer, (train, val) = manifest["tokenizer_sha256"], (texts_of(manifest, s) for s in ("train", "val"))
    held_out = (val, part_of_split(run, tokenizer, curves.val_read))
    return Compared(name, curves, (tokenizer, train), (tokenizer, held_out), held_out)


def on_any_part(run: Compared) -> Compared:
    """Return a run whose validations compare with others on the same texts, whichever part of these each one reads."""
    texts, _ = run.held_out
    return run._replace(validation=(run.validation[0], texts), held_out=texts)


def texts_of(manifest: dict[str, Any], split: str) -> tuple[int, int]:
    """Return what tells the texts of a split from those of another data folder: how many there are, and their bytes."""
    info = manifest["splits"].get(split, {})
    return info.get("documents", 0), info.get("bytes", 0)


def part_of_split(run: RunDirectory, tokenizer: str, n_read: int | None) -> tuple[int, int, str] | None:
    """Return what tells the part of the split that a run is validated on from other parts; None: it is the whole split.

    A part is so many rows as long as the context, evenly spaced, so it depends on both and on the tokenizer.
    """
    if n_read is None or n_read == run.heldout("val").n_targets:
        return None
    return n_read, run.config().model.block_size, tokenizer


def notes_on(found: list[Compared]) -> list[str]:
    """Return a sentence on each thing that does not compare."""
    notes = []
    if len({c.training[0] for c in found}) > 1:
        notes.append(
            "The runs have different tokenizers: loss does not compare; bits per byte does, on the same texts."
        )
    if len({c.training[1] for c in found}) > 1:
        notes.append("The runs are trained on different texts: their training losses do not compare.")
    if len({c.held_out[0] for c in found}) > 1:
        notes.append("The runs hold out different texts: their validation curves do not compare.")
    elif len({c.held_out[1] for c in found}) > 1:
        read = (f"{c.name} on {f'{c.held_out[1][0]:,} tokens' if c.held_out[1] else 'the whole'}" for c in found)
        notes.append(f"The runs are validated on different parts of the held-out texts ({', '.join(read)}).")
    return notes
