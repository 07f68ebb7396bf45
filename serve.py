"""Serve a run to editors, to OpenAI's and Ollama's clients, and as a page in the browser.

    python serve.py runs/demo                  # with PyTorch; the newest run if none is named
    python serve.py runs/demo --int8           # its export to int8, without PyTorch: little memory
    python serve.py runs/demo --literal-fim    # for Zed, which writes control tokens as text

It listens on this machine alone, unless --host and --api-key say otherwise. Requests that come together are generated together.
Ctrl-C finishes what is being written; a second one stops at once. docs/serving.md has the paths and limits, docs/editors.md
the settings of editors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

import tyro

from kindling.cli import parse_cli, run_script
from kindling.errors import KindlingError
from kindling.paths import require_runs

if TYPE_CHECKING:
    from kindling.serving.open_export import Opened
    from kindling.serving.served_model import Served

MEGABYTE = 10**6


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Optional[Path]] = None
    """The run's folder, its name under runs/, or an export to int8. The newest run if left out."""
    int8: bool = False
    """Serve the run's export to int8, made by export.py --to int8, without PyTorch."""
    host: str = "127.0.0.1"
    """The address to listen at. Any but this machine's own needs --api-key."""
    port: int = 8011
    """The port to listen at. 0: any free one."""
    api_key: Optional[str] = None
    """Clients must send this key as `Authorization: Bearer KEY`. None: KINDLING_API_KEY of the environment, unseen by `ps`."""
    public_name: Optional[str] = None
    """What others call a proxy before the server, as in the address that they use: NAME or NAME:PORT. Needs --api-key."""
    literal_fim: bool = False
    """Read <fim_prefix>, <fim_suffix> and <fim_middle> as commands in the prompt of /v1/completions."""
    min_confidence: float = 0.0
    """At a cursor, answer with nothing if the mean probability of the tokens is below this."""
    max_new_tokens: int = 512
    """The most new tokens of one answer."""
    max_queue: int = 64
    """Texts that may wait beside those being generated; further ones get 503 and Retry-After."""
    time_limit_s: float = 60.0
    """Seconds from a request to its last token."""
    cache_mb: Optional[int] = None
    """Memory for keys and values, in MB. None: 500, or 36 for int8."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU. Of PyTorch."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """The precision of the weights in PyTorch. bf16 and int8 (CPU only) are faster, but round."""
    kernel: Literal["c", "numpy"] = "c"
    """Of an export. c: compile a kernel for this machine first. numpy: slower, needs no compiler."""
    log_prompts: bool = False
    """Print every request with its text. Otherwise no text is ever printed."""


def read_flags(argv: list[str] | None) -> Flags:
    """Return the flags, with the key from the environment if no flag gives one."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    return flags if flags.api_key is not None else replace(flags, api_key=os.environ.get("KINDLING_API_KEY"))


def check(flags: Flags) -> None:
    """Raise KindlingError for values that cannot be used, or that would open the server to others."""
    from kindling.serving.safety import require_key

    for name, low, high in (
        ("min_confidence", 0.0, 1.0),
        ("max_new_tokens", 1, 10**6),
        ("max_queue", 0, 10**6),
        ("time_limit_s", 0.1, 10**6),
        ("port", 0, 65535),
        ("cache_mb", 1, 10**7),
    ):
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            flag = f"--{name.replace('_', '-')}"
            raise KindlingError(f"{flag} must be from {low:g} to {high:g}, but is {value}; choose another")
    require_key(flags.host, flags.api_key, flags.public_name)


def open_model(flags: Flags) -> Opened:
    """Open what the flags name."""
    from kindling.serving.open_export import is_export, open_export

    cache_bytes = None if flags.cache_mb is None else flags.cache_mb * MEGABYTE
    if flags.int8 or is_export(flags.run):
        return open_export(flags.run, flags.kernel, cache_bytes)
    require_runs(flags.run)  # before torch is imported
    from kindling.formats.hf_import import find_model
    from kindling.serving.open_run import open_run

    return open_run(find_model(flags.run), flags.device, flags.precision, cache_bytes)


def to_serve(opened: Opened, flags: Flags) -> Served:
    """Return the model with its scheduler and the limits of the flags."""
    from kindling.serving.scheduler import Scheduler
    from kindling.serving.served_model import Limits, Served

    return Served(
        name=opened.name,
        vocabulary=opened.vocabulary,
        scheduler=Scheduler(opened.engine, opened.vocabulary, flags.max_queue),
        block_size=opened.engine.block_size,
        template=opened.template,
        remembers=opened.remembers,
        about=opened.about,
        min_confidence=flags.min_confidence,
        literal_fim=flags.literal_fim,
        log_prompts=flags.log_prompts,
        limits=Limits(max_new_tokens=flags.max_new_tokens, time_s=flags.time_limit_s),
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    flags = read_flags(argv)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported; as in autocomplete.py
    check(flags)
    from kindling.serving.server import address_of, bind, run

    sock = bind(flags.host, flags.port)  # before the model is loaded, which may take long
    print(f"loading {flags.run or 'the newest run'}", flush=True)
    opened = open_model(flags)
    served = to_serve(opened, flags)
    can = ["continues texts"]
    if served.can_infill:
        can.append("fills in the middle")
    if served.template is not None:
        can.append("chats")
    address = address_of(sock, flags.host)
    print(
        f"{opened.about['source']}: {opened.about['parameters']:,} parameters in {opened.about['precision']}, context "
        f"{served.block_size:,}; {', '.join(can)}\n"
        f"page {address}/  OpenAI {address}/v1  Ollama and llama.cpp {address}\n"
        f"Ctrl-C finishes what is being written; a second one stops at once",
        flush=True,
    )
    return run(served, sock, flags.host, flags.api_key, flags.public_name)


if __name__ == "__main__":
    run_script(main)
