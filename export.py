"""Export a run to the formats of other tools, and check that the export computes the same.

    python export.py runs/demo                              # --to hf: a folder for transformers, into runs/demo/export/hf
    python export.py runs/demo --to int8                    # for autocomplete.py, which needs no PyTorch
    python export.py runs/code-50m --to gguf --type q8_0    # for llama.cpp
    python export.py runs/demo --average 8                  # the mean of the last 8 checkpoints' weights

Each export is read back and compared with the run: logits and loss on the run's held-out text. An export that fails is
deleted. For hf and for GGUF in f32, logits must agree to 1e-4. Rounded weights may raise the loss by at most 0.5%.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError
from kindling.paths import require_runs

if TYPE_CHECKING:
    from torch import Tensor

    from kindling.formats.gguf_format import Kind
    from kindling.formats.parity import Difference
    from kindling.runs.checkpoint import RunDirectory
    from kindling.runs.loading import Chat
    from model import GPT

SAMPLE = 4096  # tokens for the comparison
LARGEST_DIFFERENCE = 1e-4  # of a logit, if the weights are written exactly
LARGEST_LOSS = 0.005  # share of the model's loss that rounded weights may add


class ExportError(KindlingError):
    """An export that cannot be written, or that does not compute the same as the run."""


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/, or the folder of a model of others. Default: the newest run."""
    to: Literal["hf", "gguf", "int8"] = "hf"
    """hf: a folder for transformers, with a model card; gguf: one file for llama.cpp; int8: a folder for autocomplete.py."""
    type: Literal["f32", "f16", "q8_0"] | None = None
    """For gguf: the type of the matrices. None: f16."""
    average: int = 1
    """Export the mean of the weights at the last so many checkpoints; --train.keep-checkpoints says how many are kept."""
    out: Path | None = None
    """Where to write the export. None: into export/ in the run's folder."""
    replace: bool = False
    """Replace an export that is already there."""


@contextlib.contextmanager
def written(out: Path, replace: bool) -> Iterator[Path]:
    """Yield a temporary path, which is moved to `out` at the end, or deleted after an error.

    Raises ExportError if `out` cannot be written, or exists and may not be replaced.
    """
    require_place(out, replace)
    try:
        is_new = not out.parent.exists()
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield room / out.name
            allow_reading(room / out.name)
            require_place(out, replace)  # another process may have written it meanwhile
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
    """Raise ExportError unless `out` does not exist, or is an export and `replace` is set."""
    if not out.name or out.is_symlink():
        raise ExportError(f"--out must be the name of a new folder or file, but is {str(out)!r}; choose another")
    if not out.exists():
        return
    if not replace:
        raise ExportError(f"{out} must not exist yet, but does; choose another --out, or give --replace")
    is_folder = (out / "config.json").is_file() and not (out / "config.yaml").exists()  # a run has one
    if not (is_folder or (out.is_file() and out.suffix in (".gguf", ".Modelfile"))):
        raise ExportError(f"--replace must be of an export, but {out} is none; choose another --out")


def allow_reading(path: Path) -> None:
    """Give files the usual permissions of new files; safetensors lets only the owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def sample(run: RunDirectory) -> Tensor:
    """Return rows of tokens (B, T) of the run's held-out text: about 4,096 tokens, two rows at least.

    The text is read as it stands: rows of conversations, as they are evaluated, hold padding, which no model has learnt. Of a
    model of others it is a module of Python, as nobody knows what it has not seen.
    """
    import torch

    from kindling.runs.loading import PretrainedFolder

    width = run.config().model.block_size
    if isinstance(run, PretrainedFolder):
        ids = run.tokenizer().encode(Path(argparse.__file__).read_text(encoding="utf-8"))[:SAMPLE]
    else:
        heldout = run.heldout("val")
        ids = heldout.read(0, min(max(SAMPLE, 2 * width), len(heldout))).tolist()
    width = min(width, max(2, len(ids) // 2))
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)  # (B, T)


def require_exact(found: Difference) -> str:
    """Return a line on the export of exact weights; raises ExportError if a logit differs too much."""
    line = f"largest difference of a logit {found.largest:.1e}, loss {found.loss:.4f} -> {found.changed:.4f}"
    if not found.largest <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the export must compute what the run does to {LARGEST_DIFFERENCE:g}, but does not, and is deleted ({line})"
        )
    return line


def require_close(found: Difference) -> str:
    """Return a line on the export of rounded weights; raises ExportError if the loss is too much higher."""
    added = (found.changed - found.loss) / found.loss
    line = f"largest difference of a logit {found.largest:.1e}, loss {found.loss:.4f} -> {found.changed:.4f} ({added:+.2%})"
    if not added <= LARGEST_LOSS:
        raise ExportError(
            f"the export must have at most {LARGEST_LOSS:.1%} more loss than the run, but has more, and is deleted ({line})"
        )
    return line


def export_to_hf(
    run: RunDirectory, model: GPT, checkpoints: Sequence[Path], template: str | None, out: Path
) -> list[str]:
    """Write and check a folder for transformers; return lines on it."""
    from kindling.formats.hf_format import difference, write
    from kindling.formats.hf_layout import CLASSES, architecture
    from kindling.formats.model_card import card
    from kindling.runs.loading import PretrainedFolder

    out.mkdir()
    if isinstance(run, PretrainedFolder):
        text = _card_of_others(run)
    else:
        text = card(run, run.path.resolve().name, checkpoints[-1], averaged=checkpoints)
    write(out, model, run.tokenizer(), text, template)
    kind = architecture(model.cfg)
    code = ", whose code is with it" if kind == "kindling" else ""
    return [f"as {CLASSES[kind]}{code}", require_exact(difference(out, model, sample(run)))]


def _card_of_others(run: RunDirectory) -> str:
    """Return the card that came with a model of others, or a line about where it is from."""
    card = run.path / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else f"# {run.path.resolve().name}\n"


def export_to_gguf(run: RunDirectory, model: GPT, kind: Kind, template: str | None, out: Path) -> list[str]:
    """Write and check a file for llama.cpp; return lines on it."""
    from kindling.formats.gguf_format import architecture, difference, write

    said = [f"as {architecture(model.cfg)} in {kind}"]
    wider = write(out, model, run.tokenizer(), kind, run.path.resolve().name, template)
    if wider:
        said.append(f"{len(wider)} matrices in f16, of rows that q8_0 cannot hold")
    found = difference(out, model, sample(run))
    return [*said, require_exact(found) if kind == "f32" else require_close(found)]


def export_to_int8(
    run: RunDirectory, model: GPT, checkpoints: Sequence[Path], chat: Chat | None, out: Path
) -> list[str]:
    """Write and check a folder for autocomplete.py; return lines on it."""
    from kindling.formats.int8_format import difference, write
    from kindling.runs.averaging import average_name

    out.mkdir()
    infills, source = run.config().data.fim_rate > 0, f"{run.path.resolve().name}, {average_name(checkpoints)}"
    write(out, model, run.tokenizer(), source, infills, chat)
    return [require_close(difference(out, model, sample(run)))]


def main(argv: list[str] | None = None) -> int:
    """Write an export, and print how it compares with the run."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    require_runs(flags.run)
    from kindling.files import write_text
    from kindling.formats.hf_import import find_model
    from kindling.formats.modelfile import modelfile, modelfile_path
    from kindling.runs.averaging import average_name, checkpoints_to_average, load_average
    from kindling.runs.loading import chat_of
    from kindling.sample_prompts import prompt_flag

    if flags.type is not None and flags.to != "gguf":
        raise ExportError(f"--type must be left out with --to {flags.to}, but is {flags.type}; it is for --to gguf")
    run, kind = find_model(flags.run), flags.type or "f16"
    name = f"{run.path.resolve().name}-{kind}.gguf" if flags.to == "gguf" else flags.to
    out = run.path / "export" / name if flags.out is None else flags.out
    require_place(out, flags.replace)
    chat = chat_of(run)
    template = None if chat is None else chat.template
    beside = modelfile_path(out) if flags.to == "gguf" and template is not None else None
    if beside is not None:
        require_place(beside, flags.replace)
    checkpoints = checkpoints_to_average(run, flags.average)
    import torch

    model = load_average(run, checkpoints, torch.device("cpu")).for_generation()
    with written(out, flags.replace) as partial:
        if flags.to == "hf":
            said = export_to_hf(run, model, checkpoints, template, partial)
        elif flags.to == "gguf":
            said = export_to_gguf(run, model, kind, template, partial)
        else:
            said = export_to_int8(run, model, checkpoints, chat, partial)
    if beside is not None and template is not None:
        with written(beside, flags.replace) as partial:
            write_text(partial, modelfile(out.name, template, run.tokenizer(), model.cfg.block_size))
        said.append(f"for Ollama: ollama create {run.path.resolve().name} -f {beside}")
    size = sum(f.stat().st_size for f in (out.rglob("*") if out.is_dir() else [out]) if f.is_file())
    print(f"{run.path}, {average_name(checkpoints)}: {model.n_parameters():,} parameters, {size / 1e6:,.1f} MB")
    print("\n".join(said))
    ways = {
        "hf": f'AutoModelForCausalLM.from_pretrained("{out}"); its README.md says more',
        "gguf": f"llama-cli -m {out}",
        "int8": f"python autocomplete.py {out} {prompt_flag(run.config())}",
    }
    print(f"results in {out}; next: {ways[flags.to]}")
    return 0


if __name__ == "__main__":
    run_script(main)
