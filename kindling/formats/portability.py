"""Where a model of a config can go, and which flags before training would let it go further.

    python -m kindling.formats.portability             # the table of docs/portability.md
    python -m kindling.formats.portability --write     # writes it into that page

All is asked of the functions by which the exporters themselves refuse. Limits: Ollama and vLLM are not run. Ollama reads the GGUF
files that llama.cpp reads, and vLLM is judged by the names in its list of models. A pretrained tokenizer is not fetched: it is
taken for plain byte-level BPE, as StarCoder's is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import Config, TokenizerConfig
from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError
from kindling.files import write_text
from kindling.formats import gguf_format, hf_format, hf_layout, int8_format
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import train
from presets import PRESETS, preset

PAGE = Path(__file__).parents[2] / "docs" / "portability.md"
BEGIN, END = "<!-- the table that `python -m kindling.formats.portability --write` writes -->\n", "<!-- its end -->\n"
# in vllm/model_executor/models/registry.py of vLLM
VLLM = frozenset({"GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"})
TEXT = "def add(a, b):\n    return a + b\n" * 3  # for a tokenizer that only shows its kind
COLUMNS = ("transformers", "transformers with our code", "llama.cpp", "Ollama", "vLLM", "int8")
TOKENIZER_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"normalizer": "none"},
    {"kind": "bpe"},
    {"kind": "bpe", "normalizer": "none"},
)


@dataclass(frozen=True)
class Flags:
    """The script's command line."""

    write: bool = False
    """Write the table into docs/portability.md."""


@dataclass(frozen=True)
class Destination:
    """A format: the name of what holds the model there, and the settings that stand in the way, with values that do not."""

    holder: str
    needs: dict[str, Any]

    @property
    def is_open(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.needs


def destinations(cfg: Config) -> dict[str, Destination]:
    """Return what transformers (without our code), llama.cpp and int8 hold of a config."""
    stock, of_stock = hf_layout.nearest_stock(cfg.model)
    arch, of_arch = gguf_format.nearest_architecture(cfg.model)
    found: dict[str, tuple[str, dict[str, Any], Callable[[Tokenizer], object]]] = {
        "transformers": (hf_layout.CLASSES[stock], of_stock, hf_format.require_tokenizer),
        "llama.cpp": (arch, of_arch, gguf_format.require_tokenizer),
        "int8": ("yes", {}, int8_format.require_tokenizer),
    }
    return {
        name: Destination(
            holder, {f"model.{field}": value for field, value in needs.items()} | _tokenizer_needs(cfg.tokenizer, check)
        )
        for name, (holder, needs, check) in found.items()
    }


def _tokenizer_needs(cfg: TokenizerConfig, require: Callable[[Tokenizer], object]) -> dict[str, Any]:
    """Return the smallest change of a tokenizer's settings with which `require` accepts it."""
    if cfg.kind == "pretrained":
        return {}
    for change in TOKENIZER_CHANGES:
        try:
            require(train([TEXT], replace(cfg, **change), 300 + len(cfg.special_tokens)))
        except KindlingError:
            continue
        return {f"tokenizer.{field}": value for field, value in change.items() if getattr(cfg, field) != value}
    raise AssertionError("every format holds plain byte-level BPE")


def row(name: str, cfg: Config) -> list[str]:
    """Return the cells of a preset's row."""
    found = destinations(cfg)
    stock, gguf, int8 = found["transformers"], found["llama.cpp"], found["int8"]
    in_vllm = stock.is_open and stock.holder in VLLM
    with_code = not any(field.startswith("tokenizer.") for field in stock.needs)  # our code holds every shape
    cells = [
        f"`{stock.holder}`" if stock.is_open else "-",
        "not needed" if stock.is_open else "yes" if with_code else "-",
        f"`{gguf.holder}`" if gguf.is_open else "-",
        "yes" if gguf.is_open else "-",
        f"`{stock.holder}`" if in_vllm else "-",
        int8.holder if int8.is_open else "-",
    ]
    return [f"`{name}`", *cells, changes(cfg, found)]


def changes(cfg: Config, found: dict[str, Destination]) -> str:
    """Return the flags that would open the closed destinations, each with the value that stands in the way."""
    by_flags: dict[str, list[str]] = {}
    for name, destination in found.items():
        if not destination.is_open:
            flags = ", ".join(
                f"`{flag_of(field, value)}` (is {_value(cfg, field)})" for field, value in destination.needs.items()
            )
            by_flags.setdefault(flags, []).append(name)
    return "; ".join(f"{' and '.join(names)}: {flags}" for flags, names in by_flags.items())


def flag_of(field: str, value: Any) -> str:
    """Return the flag that sets a field such as "model.head_bias"."""
    return f"--{field.replace('_', '-')} {value}"


def _value(cfg: Config, field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(cfg, section), name)


def table() -> str:
    """Return the table of all presets that have a shape of their own, as Markdown."""
    head = ["preset", *COLUMNS, "what would change before training"]
    lines = [head, ["---"] * len(head)]
    for name, make in PRESETS.items():
        cfg = make()
        if not cfg.data.instructions or cfg.train.init_from is not None:  # others fine-tune any base
            lines.append(row(name, cfg))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def advice(cfg: Config) -> str | None:
    """Return the line for a run that llama.cpp cannot load: why, and the portable preset of the nearest size; else None."""
    needs = destinations(cfg)["llama.cpp"].needs
    if not needs:
        return None
    portable = [name for name in PRESETS if name.startswith("portable-")]
    nearest = min(portable, key=lambda name: abs(preset(name).model.n_parameters - cfg.model.n_parameters))
    return (
        f"llama.cpp, Ollama and others do not know this shape ({', '.join(needs)}; docs/portability.md); one that they know: "
        f"python main.py --preset {nearest}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it into its page."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if not flags.write:
        print(table(), end="")
        return 0
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(PAGE, before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2])
    print(f"results in {PAGE}")
    return 0


if __name__ == "__main__":
    run_script(main)
