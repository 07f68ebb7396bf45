"""Builds token shards from sources: filters, deduplicates, splits, tokenises, packs.

    python data_pipeline.py --preset demo
    python data_pipeline.py --preset demo --explain google/protobuf/api_pb2.py  # which rule dropped it, and why
    python data_pipeline.py --run runs/demo --locate train:123456  # the document of a token of the run's data

The result is `data/PRESET-FINGERPRINT/`. The fingerprint covers every setting and the name, size and time of every local
input file: if nothing changed, the next call reuses the shards at once; any change builds new ones. The number of workers
does not change the result. The build itself is in kindling/data/build.py.

Related: `python -m kindling.data.distributed_build` splits a build over processes or machines, and
`python -m kindling.tokenization.compare` compares tokenizers on your files.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from kindling.cli import parse_cli, run_script
from kindling.config_io import ConfigFlags
from kindling.data.build import prepare
from kindling.data.examples import open_split
from kindling.data.explain import explain_path, locate_token
from kindling.data.ledger import Ledger
from kindling.data.shards import SPLITS, DataError
from kindling.stopping import exit_on_sigterm


@dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags
    explain: str | None = None
    """Say what happened to this file or row, by its path or the end of its path."""
    locate: str | None = None
    """Say which document contains a token: SPLIT:POSITION, such as train:123456."""
    run: Path | None = None
    """With --explain and --locate: read the build that this run was trained on, by its folder or its name under runs/."""


def main(argv: list[str] | None = None) -> int:
    """Build the shards of the config, unless they exist already."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.explain is not None or flags.locate is not None:
        return answer(flags)
    if flags.run is not None:
        raise DataError("--run must come with --explain or --locate, but comes alone; leave it out, or ask one of them")
    folder = prepare(flags.config)
    splits = [open_split(flags.config, folder, split) for split in SPLITS]
    print(f"shards in {folder}: " + ", ".join(f"{s.split} {len(s):,} tokens" for s in splits))
    if flags.config.data.instructions:
        print(Ledger.read(folder).table())
        print(f"next: python sft_train.py --preset {flags.config.preset}")
    else:
        given = shlex.join(sys.argv[1:] if argv is None else argv)
        print(f"next: python main.py {given}".rstrip())
    return 0


def answer(flags: Flags) -> int:
    """Answer --explain and --locate from the build of the named run, or of the config; say on stderr which build is read."""
    if flags.run is None:
        cfg, folder = flags.config, prepare(flags.config)
        print(f"reading {folder}, the build of these settings; --run NAME reads that of a run", file=sys.stderr)
    else:
        from kindling.runs.loading import build_of_run

        cfg, folder = build_of_run(flags.run)
    if flags.explain is not None:
        print(explain_path(cfg, folder, flags.explain))
    if flags.locate is not None:
        print(locate_token(folder, flags.locate))
    return 0


if __name__ == "__main__":
    exit_on_sigterm()
    run_script(main)
