"""Hand a run on, in the formats that other tools load, and check that they compute the same.

    python export.py runs/demo                              # --to hf: a folder for transformers, into runs/demo/export/hf
    python export.py runs/demo --to int8                    # for autocomplete.py, which needs no PyTorch
    python export.py runs/code-50m --to gguf --type q8_0    # for llama.cpp

Each export ends with a parity check: logits on the run's held-out text, by what was written and read back. One that fails is
deleted. hf and GGUF in f32 must agree to 1e-4; rounded weights may cost at most 0.5% of the loss, for which they are known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError

if TYPE_CHECKING:
    from torch import Tensor

    from kindling.formats.parity import Difference
    from kindling.runs.checkpoint import RunDirectory
    from model import GPT

SAMPLE = 4096  # tokens that an export is compared on
LARGEST_DIFFERENCE = 1e-4  # of a logit, where the weights are written as they are
LARGEST_LOSS = 0.005  # of the model's loss, that rounding its weights may add


class ExportError(KindlingError):
    """An export that cannot be written, or that does not compute what the run does."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    to: Literal["hf", "gguf", "int8"] = "hf"
    """hf: a folder for transformers, with a model card; gguf: one file for llama.cpp; int8: a folder for autocomplete.py."""
    type: Literal["f32", "f16", "q8_0"] | None = None
    """For gguf: how the matrices are held. None: f16."""
    out: Path | None = None
    """Where to write. None: export/ in the run."""
    replace: bool = False
    """Replace what is there."""


@contextlib.contextmanager
def written(out: Path, replace: bool) -> Iterator[Path]:
    """Give a temporary path, which takes the place of `out` if all goes well and is deleted if not.

    Raises ExportError if `out` exists and may not be replaced, or cannot be written.
    """
    require_place(out, replace)
    try:
        is_new = not out.parent.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield room / out.name
            allow_reading(room / out.name)
            require_place(out, replace)  # another process may have been faster
            if out.exists():
                out.rename(room / "old")
            try:
                (room / out.name).rename(out)
            except OSError:
                if (room / "old").exists():
                    (room / "old").rename(out)
                raise
        finally:
            shutil.rmtree(room, ignore_errors=True)
            if is_new and not out.exists():
                with contextlib.suppress(OSError):
                    out.parent.rmdir()
    except OSError as e:
        raise ExportError(
            f"{out} must be writable, but is not ({e}); free some space or choose another --out"
        ) from None


def require_place(out: Path, replace: bool) -> None:
    """Raise ExportError unless an export may be put there: nothing is there, or an export that is to be replaced."""
    if not out.name or out.is_symlink():
        raise ExportError(f"--out must be the name of a new folder or file, but is {str(out)!r}; choose another")
    if not out.exists():
        return
    if not replace:
        raise ExportError(f"{out} must not exist yet, but does; choose another --out, or give --replace")
    is_folder = (out / "config.json").is_file() and not (out / "config.yaml").exists()  # which a run has
    if not (is_folder or (out.is_file() and out.suffix == ".gguf")):
        raise ExportError(f"--replace must be of an export, but {out} is none; choose another --out")


def allow_reading(path: Path) -> None:
    """Give files the permissions that new files have here: safetensors makes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def sample(run: RunDirectory) -> Tensor:
    """Return rows of tokens (B, T) of the run's held-out text, some 4,096 tokens, at least two rows."""
    import torch

    model = run.config().model
    batch = next(iter(run.heldout("val").in_order(model, max(2, SAMPLE // model.block_size))))
    return torch.from_numpy(batch.idx)  # (B, T)


def require_exact(found: Difference) -> str:
    """Return the line about an export of the weights as they are; raises ExportError if a logit differs too much."""
    line = f"largest difference of a logit {found.largest:.1e}, loss {found.loss:.4f} -> {found.changed:.4f}"
    if not found.largest <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the export must compute what the run does to {LARGEST_DIFFERENCE:g}, but does not, and is deleted ({line})"
        )
    return line


def require_close(found: Difference) -> str:
    """Return the line about an export of rounded weights; raises ExportError if the loss rises too much."""
    added = (found.changed - found.loss) / found.loss
    line = f"largest difference of a logit {found.largest:.1e}, loss {found.loss:.4f} -> {found.changed:.4f} ({added:+.2%})"
    if not added <= LARGEST_LOSS:
        raise ExportError(
            f"the export must have at most {LARGEST_LOSS:.1%} more loss than the run, but has more, and is deleted ({line})"
        )
    return line


def to_hf(run: RunDirectory, model: GPT, checkpoint: Path, out: Path) -> list[str]:
    """Write the folder that transformers loads."""
    from kindling.formats.hf_format import difference, write
    from kindling.formats.hf_layout import CLASSES, architecture
    from kindling.formats.model_card import card

    out.mkdir()
    write(out, model, run.tokenizer(), card(run, run.path.resolve().name, checkpoint))
    kind = architecture(model.cfg)
    code = ", whose code is with it" if kind == "kindling" else ""
    return [f"as {CLASSES[kind]}{code}", require_exact(difference(out, model, sample(run)))]


def to_gguf(run: RunDirectory, model: GPT, kind: Literal["f32", "f16", "q8_0"], out: Path) -> list[str]:
    """Write the file that llama.cpp loads."""
    from kindling.formats.gguf_format import architecture, difference, write

    said = [f"as {architecture(model.cfg)} in {kind}"]
    wider = write(out, model, run.tokenizer(), kind, run.path.resolve().name)
    if wider:
        said.append(f"{len(wider)} matrices in f16, of rows that q8_0 cannot hold")
    found = difference(out, model, sample(run))
    return [*said, require_exact(found) if kind == "f32" else require_close(found)]


def to_int8(run: RunDirectory, model: GPT, checkpoint: Path, out: Path) -> list[str]:
    """Write the folder that autocomplete.py loads."""
    from kindling.formats.int8_format import difference, write

    out.mkdir()
    write(out, model, run.tokenizer(), f"{run.path.resolve().name}, {checkpoint.name}")
    return [require_close(difference(out, model, sample(run)))]


def main(argv: list[str] | None = None) -> int:
    """Write an export and say how near it is."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    import torch

    from kindling.runs.checkpoint import find_run, load_model

    if flags.type is not None and flags.to != "gguf":
        raise ExportError(f"--type must be left out with --to {flags.to}, but is {flags.type}; it is for --to gguf")
    run, kind = find_run(flags.run), flags.type or "f16"
    name = f"{run.path.resolve().name}-{kind}.gguf" if flags.to == "gguf" else flags.to
    out = run.path / "export" / name if flags.out is None else flags.out
    require_place(out, flags.replace)
    loaded, checkpoint = load_model(run, torch.device("cpu"))
    model = loaded.for_generation()
    with written(out, flags.replace) as partial:
        if flags.to == "hf":
            said = to_hf(run, model, checkpoint, partial)
        elif flags.to == "gguf":
            said = to_gguf(run, model, kind, partial)
        else:
            said = to_int8(run, model, checkpoint, partial)
    size = sum(f.stat().st_size for f in (out.rglob("*") if out.is_dir() else [out]) if f.is_file())
    print(f"{run.path}, {checkpoint.name}: {model.n_parameters():,} parameters, {size / 1e6:,.1f} MB")
    print("\n".join(said))
    ways = {
        "hf": f'AutoModelForCausalLM.from_pretrained("{out}"); its README.md says more',
        "gguf": f"llama-cli -m {out}",
        "int8": f'python autocomplete.py {out} --prompt "def "',
    }
    print(f"results in {out}; next: {ways[flags.to]}")
    return 0


if __name__ == "__main__":
    run_script(main)
