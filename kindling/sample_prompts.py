"""Prompts that fit a run's data: for samples at the end of training, and for the commands that a script suggests.

sample_prompts(run.config())                      # the config's, else of Python or of English
generate_command(run.path, run.config())          # python generate.py runs/demo --prompt "import os"
"""

from __future__ import annotations

import shlex
from pathlib import Path

from config import Config, SourceConfig

PYTHON = ("import os\n", "class Stack:\n    def __init__(self", 'def read_file(path):\n    """')
ENGLISH = ("Once upon a time", "One of the most", "It was the")


def sample_prompts(cfg: Config) -> tuple[str, ...]:
    """Return the prompts that the config names, else prompts in the language of its data: Python or, for any other, English."""
    if cfg.train.sample_prompts is not None:
        return cfg.train.sample_prompts
    return PYTHON if any(map(_has_python, cfg.data.sources)) else ENGLISH


def knows_no_python(cfg: Config) -> bool:
    """Return whether it is certain that no data of a run are Python, so that it is not evaluated on Python."""
    certain = all(_has_python(source) is False for source in cfg.data.sources)
    return certain and cfg.train.init_from is None and not cfg.data.instructions


def _has_python(source: SourceConfig) -> bool | None:
    """Return whether a source holds Python, as far as its settings say; None: they do not say."""
    if source.language is not None:
        return source.language.lower() == "python"
    if source.kind == "files":
        return any(glob.endswith((".py", "*")) for glob in source.file_globs) or str(source.path).endswith(".py")
    if source.kind in ("local-python", "docstrings"):
        return True
    if source.kind != "text" and source.field == "content":  # the column of code in The Stack and its kin
        return True
    return None  # rows of `text` are most often prose, but can be anything


def prompt_flag(cfg: Config) -> str:
    """Return `--prompt` with the first line of the first sample prompt, quoted for a shell."""
    line = next(iter("".join(sample_prompts(cfg)[:1]).splitlines()), "")
    plain = line and not set(line) & set('"\\$`!')
    return "--prompt " + (f'"{line}"' if plain else shlex.quote(line or "The"))


def generate_command(run: Path, cfg: Config) -> str:
    """Return the command that lets a run's model write."""
    return f"python generate.py {run} " + ("--chat" if cfg.data.instructions else prompt_flag(cfg))
