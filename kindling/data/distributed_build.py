"""Builds the same data as `data_pipeline.py`, with the work split by files over processes or machines.

    python -m kindling.data.distributed_build --preset demo --parts 8  # the parts one after another, in this process
    python -m kindling.data.distributed_build --preset demo --parts 8 --executor local  # side by side, by datatrove
    python -m kindling.data.distributed_build --preset demo --parts 64 --executor slurm --slurm.partition cpu
    python -m kindling.data.distributed_build --preset demo --parts 64 --executor ray  # on the Ray cluster of this machine

First the plan: the list of files, and the tokenizer, trained on `tokenizer.train_bytes`. Then the parts: each filters and
tokenises some of the files into a folder of its own, once. Then the gathering: duplicates, mixture and splits, which need
all documents, are decided in the order of the single build, and the shards are written. So `data/PRESET-FINGERPRINT/` has
the same bytes as from `data_pipeline.py`, whatever the number of parts. data.max_tokens limits the gathering, not the
parts. If a call was interrupted, call it again: it does what is missing.

Limits: every machine must see this folder and the source's files at the same paths, and have the same versions of Python
and the libraries. A file is never split. Sources on the hub and of instructions are left to the single build. The
gathering is one process, which holds about 0.7 kB for each document kept (`docs/scale.md` has the arithmetic).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from kindling.cli import parse_cli, run_script
from kindling.config_io import ConfigFlags
from kindling.data.build import DATA, fingerprint
from kindling.data.build_in_parts import Plan, gather, make_plan, read_plan, require_parts_possible, run_part
from kindling.data.preflight import require_possible
from kindling.data.shards import SPLITS, read_manifest
from kindling.data.sources import list_files
from kindling.data.workers import WorkerPool
from kindling.errors import KindlingError, require
from kindling.stopping import exit_on_sigterm


@dataclasses.dataclass
class Slurm:
    """How jobs are submitted."""

    partition: str | None = None
    """Where the jobs run."""
    time: str = "24:00:00"
    """Time limit of a job."""
    qos: str | None = None
    """Quality of service, if the cluster needs one."""


@dataclasses.dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags
    parts: int = 8
    """Number of parts that the files are split into. If a machine fails, the part that it works on is lost."""
    executor: Literal["inline", "local", "slurm", "ray"] = "inline"
    """inline: one part after another, without datatrove. The others are executors of datatrove; there a part has
    data.workers processes, or one."""
    at_once: int | None = None
    """How many parts run at the same time. None: with local as many as the cores allow, with slurm and ray all."""
    memory_gb: int = 4
    """For slurm and ray: memory for each process of a part."""
    gather_memory_gb: int = 16
    """For slurm: memory of the gathering."""
    slurm: Slurm = dataclasses.field(default_factory=Slurm)


def part_step(folder: Path, cwd: Path, n_workers: int, data: object, rank: int, world_size: int) -> None:
    """Process a part, as a step of a datatrove pipeline on any machine."""
    os.chdir(cwd)  # the paths of the config are relative to it
    plan = read_plan(folder)
    with WorkerPool(dataclasses.replace(plan.cfg.data, workers=n_workers), plan.cfg.tokenizer) as pool:
        run_part(plan, rank, pool)


def gather_step(folder: Path, cwd: Path, data: object, rank: int, world_size: int) -> None:
    """Gather the parts, as a step of a datatrove pipeline."""
    os.chdir(cwd)
    gather(read_plan(folder))


def load_executor(kind: str) -> Any:
    """Return datatrove's class for an executor; raises KindlingError if a library or command is missing."""
    try:
        if kind == "local":
            from datatrove.executor.local import LocalPipelineExecutor as executor
        elif kind == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor as executor
        else:
            import ray  # noqa: F401
            from datatrove.executor.ray import RayPipelineExecutor as executor
    except ImportError as e:
        wanted = "datatrove ray" if kind == "ray" else "datatrove"
        raise KindlingError(
            f"--executor {kind} needs the library {e.name}, which is not installed; `pip install {wanted}`, or use "
            f"--executor inline"
        ) from None
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise KindlingError(
            "--executor slurm must run where jobs are submitted, but there is no sbatch; use --executor local"
        )
    return executor


def run_executor(plan: Plan, flags: Flags) -> None:
    """Process the missing parts with datatrove: wait for them, or on Slurm submit them and the gathering."""
    # other processes could not import a function of __main__
    module = importlib.import_module("kindling.data.distributed_build")

    executor, n_workers = load_executor(flags.executor), flags.config.data.workers or 1
    logs, cwd = plan.logs, Path.cwd()
    for number in plan.missing():  # else datatrove would skip a part that was deleted
        (logs / "parts" / "completions" / f"{number:05d}").unlink(missing_ok=True)
    (logs / "gather" / "completions" / "00000").unlink(missing_ok=True)
    parts = {
        "pipeline": [functools.partial(module.part_step, plan.folder, cwd, n_workers)],
        "tasks": plan.n_parts,
        "workers": flags.at_once or (max(1, (os.cpu_count() or 1) // n_workers) if flags.executor == "local" else -1),
        "logging_dir": str(logs / "parts"),
    }
    if flags.executor == "local":
        executor(**parts).run()
        return
    machine = {"cpus_per_task": n_workers, "mem_per_cpu_gb": flags.memory_gb}
    root = Path(__file__).resolve().parents[2]
    if flags.executor == "ray":
        import ray

        ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
        executor(**parts, **machine).run()
        return
    slurm = {
        **{"time": flags.slurm.time, "partition": flags.slurm.partition, "qos": flags.slurm.qos},
        "env_command": f"export PYTHONPATH='{root}' PATH='{Path(sys.executable).parent}':$PATH",
    }
    first = executor(**parts, **machine, **slurm, job_name=f"parts-{plan.cfg.preset}")
    last = functools.partial(module.gather_step, plan.folder, cwd)
    executor(
        [last],
        tasks=1,
        depends=first,
        mem_per_cpu_gb=flags.gather_memory_gb,
        logging_dir=str(logs / "gather"),
        job_name=f"gather-{plan.cfg.preset}",
        **slurm,
    ).run()


def check(flags: Flags) -> None:
    """Raise KindlingError for flags and sources that cannot be used, before any work."""
    for name in ("parts", "at_once", "memory_gb", "gather_memory_gb"):
        value = getattr(flags, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", "at least 1", value, "raise it")
    slurm = flags.executor == "slurm"
    partition = flags.slurm.partition
    require(not slurm or bool(partition), "--slurm.partition", "set", partition, "name one that `sinfo` shows")
    require_parts_possible(flags.config)
    if flags.executor != "inline":
        load_executor(flags.executor)


def main(argv: list[str] | None = None) -> int:
    """Build the shards of the config in parts, continue an interrupted build, or find the shards built."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    cfg = flags.config
    check(flags)
    files = list_files(cfg)
    name = f"{cfg.preset}-{fingerprint(cfg, files)}"
    folder = DATA / name
    for other in DATA.glob(f"parts-{cfg.preset}-*"):
        if other.name != f"parts-{name}":
            print(f"note: {other} holds parts of other settings or inputs; delete it if you no longer need them")
    if folder.is_dir():
        shutil.rmtree(DATA / f"parts-{name}", ignore_errors=True)  # left by a gathering that was killed at its end
    else:
        require_possible(cfg, files, None, DATA)
        with WorkerPool(cfg.data, cfg.tokenizer) as pool:
            plan = make_plan(cfg, files, name, flags.parts, pool)
            missing = plan.missing()
            print(f"{plan.n_parts - len(missing)} of {plan.n_parts} parts are done, in {plan.folder}", flush=True)
            for number in missing if flags.executor == "inline" else ():
                run_part(plan, number, pool)
        if flags.executor != "inline":
            run_executor(plan, flags)
        if flags.executor == "slurm":
            print(f"submitted; the shards will be in {folder}, and the logs are in {plan.logs}")
            return 0
        gather(plan)
    tokens = {split: read_manifest(folder)["splits"][split]["tokens"] for split in SPLITS}
    print(f"shards in {folder}: " + ", ".join(f"{split} {n:,} tokens" for split, n in tokens.items()))
    print(f"next: python main.py --preset {cfg.preset}, with the same settings")
    return 0


if __name__ == "__main__":
    exit_on_sigterm()
    run_script(main)
