"""kill -9 at random points of a build of the data: the next start builds the same bytes, and takes nothing half for whole."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.runs import Forked, completed, flags

pytestmark = pytest.mark.faults
KILLS = 10  # with each number of workers


def built(data: Path) -> dict[str, bytes]:
    """All files of the one whole build in a `data` folder; none if there is no such folder."""
    folders = [p for p in data.iterdir() if not p.name.startswith(".")] if data.is_dir() else []
    return {p.name: p.read_bytes() for folder in folders for p in sorted(folder.iterdir())}


def keep_as_old(place: Path) -> None:
    """Move a whole build out of the way, so that the next start has to build."""
    for folder in (place / "data").glob("[!.]*"):
        folder.rename(place / f"done-{time.monotonic_ns()}")


def survivors(group: int, wait_s: float = 10) -> list[int]:
    """Return the processes of a killed one's group that are still running after a while; they are killed then."""
    deadline = time.monotonic() + wait_s
    while (found := running(group)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def running(group: int) -> list[int]:
    """Return the processes of a group, without those that have ended and that nobody has asked about, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(its_group) == group and state != "Z" else []
    return found


def test_killed_builds_leave_nothing_and_are_built_again_to_the_same_bytes(work, corpus, tmp_path, record):
    began, rng, wanted = time.perf_counter(), random.Random(9), built(work / "data")
    kills, half, different, alive, late = 0, 0, 0, 0, 0
    for workers in ("1", "2"):
        place = tmp_path / f"workers-{workers}"
        place.mkdir()
        argv = [*flags(corpus, "none"), "--data.workers", workers]
        started = time.perf_counter()
        completed("data_pipeline.py", argv, place)
        whole_s = time.perf_counter() - started
        different += built(place / "data") != wanted
        for _ in range(KILLS):
            keep_as_old(place)
            child = Forked("data_pipeline.py", argv, place)
            killed = child.kill_after(rng.uniform(0.1, 1.0) * whole_s)
            kills += killed
            late += not killed
            left = built(place / "data")
            half += bool(left) and left != wanted  # it may have been killed after the folder had its name
            alive += bool(survivors(child.pid))
        keep_as_old(place)
        completed("data_pipeline.py", argv, place)
        different += built(place / "data") != wanted or bool(list((place / "data").glob(".*")))
    note = f"{KILLS} with one worker and {KILLS} with two, {late} of them just after the end; no worker outlived its parent"
    tried = 2 * KILLS
    record("kill -9 in the build", tried, tried - half - alive, half + different, time.perf_counter() - began, note)
    assert not half and not different and not alive and kills >= tried // 2
