"""Evaluate a run on its own held-out files: loss, perplexity and bits per byte over the whole split.

    python evaluate.py runs/demo

Prints a table and writes `eval.json` into the run. The split was fixed by content hash before training and lies in
the run's folder with its sha256, so the figures are those of files that the model has not seen. `--split test` is for
final tables only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from cli import parse_cli, run_script


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    split: Literal["val", "test"] = "val"
    """Which held-out split; test is for final tables only."""


def main(argv: list[str] | None = None) -> int:
    """Evaluate a run and write the result into it."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    import json

    from checkpoint import CheckpointError, find_run, load_model
    from device import resolve
    from files import write_atomic
    from trainer import validate

    run = find_run(flags.run)
    runtime = resolve(replace(run.config().train, device=flags.device))
    model, folder = load_model(run, runtime.device)
    dataset = run.heldout(flags.split)
    dataset.require_fits(model.cfg.vocab_size, run.tokenizer().sha256)
    metrics = validate(model, dataset, runtime)
    results = {
        "run": str(run.path),
        "checkpoint": folder.name,
        "split": flags.split,
        "tokens": len(dataset),
        "bytes": dataset.info.bytes,
        "documents": dataset.info.documents,
        "precision": runtime.precision,
        **{name.replace("val_", ""): value for name, value in metrics.items()},
    }
    try:
        write_atomic(run.path / "eval.json", json.dumps(results, indent=1) + "\n")
    except OSError as e:
        raise CheckpointError(
            f"{run.path} must be writable for eval.json, but is not ({e}); free some space or mend its permissions"
        ) from None
    print(
        f"{run.path} at {folder.name}, {flags.split} split: {results['documents']} documents, "
        f"{results['tokens']:,} tokens, {results['bytes']:,} bytes"
    )
    for name in ("loss", "perplexity", "bits_per_byte"):
        print(f"  {name.replace('_', ' '):<16}{results[name]:>10.4f}")
    talk = "--chat" if run.config().data.instructions else '--prompt "def "'
    print(f"written to {run.path / 'eval.json'}; next: python generate.py {run.path} {talk}")
    return 0


if __name__ == "__main__":
    run_script(main)
