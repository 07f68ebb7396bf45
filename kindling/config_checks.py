"""What must hold between the settings of the longer sections of config.py, which has no room for it. Imports nothing heavy.

check_source(source), check_eval(cfg, BENCHMARKS)       # in the validators of the two classes; raise ConfigError
"""

from __future__ import annotations

from typing import Any

from kindling.errors import require, require_range


def check_source(cfg: Any) -> None:
    """Raise ConfigError unless the settings of a `SourceConfig` fit each other."""
    require_range("data.sources", cfg, 1, "max_documents", "max_bytes")
    require_range("data.sources", cfg, 0, "weight", open_low=True)
    require(
        cfg.kind in ("local-python", "docstrings") or bool(cfg.path),
        "data.sources.path",
        f"set for a {cfg.kind} source",
        cfg.path,
        "name a file, a folder or a data set",
    )
    require(
        cfg.kind != "local-python" or cfg.path is None,
        "data.sources.path",
        "None for local-python",
        cfg.path,
        "say what it holds with --data.sources.0.kind files (or jsonl, parquet, text, datasets)",
    )
    fields = [f for f in (cfg.response_field, cfg.messages_field) if f is not None]
    rows = cfg.kind in ("jsonl", "parquet", "datasets")
    require(
        not fields or (rows and len(fields) == 1),
        "data.sources.response_field and messages_field",
        "at most one of them, and of rows (jsonl, parquet or datasets)",
        (cfg.kind, *fields),
        "leave the others None",
    )
    require(
        cfg.input_field is None or cfg.response_field is not None,
        "data.sources.input_field",
        "None where there is no response_field",
        cfg.input_field,
        "set --data.sources.0.response-field",
    )
    require(cfg.globs != (), "data.sources.globs", "at least one pattern", cfg.globs, "name one, or None")


def check_eval(cfg: Any, benchmarks: tuple[str, ...]) -> None:
    """Raise ConfigError unless the settings of an `EvalConfig` can be used; `benchmarks` are all there are."""
    require_range("eval", cfg, 1, "limit", "max_new_tokens", "batch_size", "workers", "cpu_s", "stride")
    require_range("eval", cfg, 0, "max_level", high=5)
    require_range("eval", cfg, 0, "signatures", "seed", "contamination_tokens", "temperature")
    require_range("eval", cfg, 0, "top_p", high=1, open_low=True)
    require_range("eval", cfg, 64, "memory_mb")
    field, known, names = (
        "eval.benchmarks",
        ", ".join(benchmarks),
        [entry.partition(":")[0] for entry in cfg.benchmarks],
    )
    for entry, name in zip(cfg.benchmarks, names):
        n = entry.removeprefix(f"{name}:")
        require(
            name in benchmarks or entry == "none", field, f"of {known}, or none", entry, "write NAME or NAME:SAMPLES"
        )
        require(
            entry == name or n.strip("0").isdecimal(), field, "NAME or NAME:SAMPLES", entry, "give a number of samples"
        )
    require(
        len(set(names)) == len(names) and ("none" not in names or len(names) == 1),
        field,
        "each once, or none alone",
        cfg.benchmarks,
        "leave out the others",
    )
