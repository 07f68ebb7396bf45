"""A disk that is full at one byte or another: of a training run that saves, and of a build of the data."""

import contextlib
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.runs import Forked, completed, flags, newest_step, unloadable
from kindling.runs import checkpoint
from kindling.runs.checkpoint import RunDirectory

pytestmark = pytest.mark.faults
OFFSETS = 20


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """Mount a filesystem of `size` bytes at `path`; skips where that is not allowed."""
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True).returncode:
        pytest.skip("cannot mount a small filesystem here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def limit_files(n_bytes: int) -> Callable[[int], None]:
    """Return what lets a process write no file larger than this."""

    def limit(pipe: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return limit


def without_preflight(pipe: int) -> None:
    """Have the process see a disk with room, as one has it that is filled by others while this one writes."""
    usage = shutil.disk_usage("/")
    checkpoint.shutil.disk_usage = lambda path: usage._replace(free=2**50)


def hidden(folder: Path) -> list[str]:
    """What is left of a write that failed."""
    return [p.name for p in folder.rglob(".*") if "partial" in p.name or "deleted" in p.name or "building" in p.name]


def clear_end(child: Forked) -> bool:
    """Return whether a process ended well, or with one clear line."""
    return child.wait() == 0 or bool(child.error)


def started(work: Path, corpus: Path, runs: Path) -> list[str]:
    """Put a copy of the run `base` under `runs`, without its last two checkpoints; return the flags that go on with it."""
    shutil.rmtree(runs / "full", ignore_errors=True)
    shutil.copytree(work / "runs/base", runs / "full", ignore=shutil.ignore_patterns("step_000008", "step_000012"))
    return flags(corpus, "full", save_every=4, keep_checkpoints=3)


@pytest.fixture
def place(work, tmp_path) -> Path:
    """A folder with the data of the run `base` and without runs."""
    shutil.copytree(work / "data", tmp_path / "place/data")
    return tmp_path / "place"


def test_a_disk_that_fills_at_twenty_offsets_loses_no_checkpoint(work, corpus, place, record):
    began, wanted = time.perf_counter(), (work / "base.digest").read_text(encoding="utf-8")
    size = sum(p.stat().st_size for p in (work / "runs/base/step_000012").iterdir())
    good, ended, lost = 0, 0, 0
    with small_disk(place / "runs", 64 * 2**20) as disk:
        for n in range(OFFSETS):
            argv = started(work, corpus, disk)
            filler = disk / "filler"
            room = size * (n + 1) // (OFFSETS - 4)  # from a sliver of one checkpoint to more than one
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
            child = Forked("main.py", argv, place, without_preflight)
            clear = clear_end(child)
            ended += child.code != 0
            run = RunDirectory(disk / "full")
            lost += bool(unloadable(run)) or newest_step(run) < max([4, *child.saved])
            good += clear and not hidden(disk)
            filler.unlink()
            end = completed("main.py", argv, place)
            lost += end.digest != wanted
    note = (
        f"tmpfs with room for 6% to 125% of a checkpoint, the check of space before writing switched off; {ended} runs ended "
        f"with one line, {OFFSETS - ended} went on; all of them went on to the undisturbed bits once there was space"
    )
    record("full disk in training, tmpfs", OFFSETS, good, lost, time.perf_counter() - began, note)
    assert good == OFFSETS and not lost and ended > 0


def test_files_that_cannot_grow_at_twenty_offsets_lose_no_checkpoint(work, corpus, place, record):
    began, wanted = time.perf_counter(), (work / "base.digest").read_text(encoding="utf-8")
    largest = max(p.stat().st_size for p in (work / "runs/base/step_000012").iterdir())
    good, ended, lost = 0, 0, 0
    for n in range(OFFSETS):
        argv = started(work, corpus, place / "runs")
        child = Forked("main.py", argv, place, limit_files(largest * n // (OFFSETS - 1)))
        clear = clear_end(child)
        ended += child.code != 0
        run = RunDirectory(place / "runs/full")
        lost += bool(unloadable(run)) or newest_step(run) < max([4, *child.saved])
        good += clear and not hidden(place / "runs")
        lost += completed("main.py", argv, place).digest != wanted
    note = f"RLIMIT_FSIZE from 0 to the largest file of a checkpoint; {ended} ended with one line, {OFFSETS - ended} went on"
    record("full disk in training, RLIMIT_FSIZE", OFFSETS, good, lost, time.perf_counter() - began, note)
    assert good == OFFSETS and not lost


def built(folder: Path) -> dict[str, bytes]:
    """All files of the one build in a `data` folder."""
    (data,) = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return {p.name: p.read_bytes() for p in sorted(data.iterdir())}


def test_a_disk_that_fills_during_the_build_leaves_nothing_that_looks_whole(work, corpus, tmp_path, record):
    began, wanted, good, lost, tried = time.perf_counter(), built(work / "data"), 0, 0, 8
    size = sum(len(raw) for raw in wanted.values())
    argv = flags(corpus, "none")
    for n in range(tried):
        place = tmp_path / f"build-{n}"
        place.mkdir()
        with small_disk(place / "data", 16384 + size * (n + 1) // (tried + 1)) as disk:
            child = Forked("data_pipeline.py", argv, place)
            clear = clear_end(child) and child.code != 0
            good += clear and not list(disk.iterdir())
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            completed("data_pipeline.py", argv, place)
            lost += built(disk) != wanted or bool(hidden(disk))
    note = "tmpfs of 11% to 89% of the shards; with more space the same command builds the undisturbed bytes"
    record("full disk in the build, tmpfs", tried, good, lost, time.perf_counter() - began, note)
    assert good == tried and not lost
