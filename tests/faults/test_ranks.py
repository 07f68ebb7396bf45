"""Two ranks under torchrun: one of them killed, all of them stopped, one with bad numbers, and checkpoints in parts damaged."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, torchrun

from faults.runs import completed, flags
from kindling.runs.checkpoint import CheckpointError, RunDirectory, verify

pytestmark = pytest.mark.faults
KILLS, STOPS, DAMAGES = 3, 3, 100
SETTINGS = {"max_steps": 60, "save_every": 5, "eval_every": 1000}


def digest(text: str) -> str:
    return re.search(r"state sha256 (\w+)", text)[1]


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(work, corpus) -> str:
    out, _ = finished(torchrun(ROOT / "main.py", *flags(corpus, "two", **SETTINGS), cwd=work))
    return digest(out)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started and that live."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text(encoding="ascii").split()]


def wait_for_checkpoint(run: RunDirectory, beyond: int, launcher: subprocess.Popen) -> int:
    """Wait until there is a checkpoint of a step past `beyond`, and return its step."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and launcher.poll() is None:
        steps = [int(p.name.removeprefix("step_")) for p in run.checkpoints()]
        if steps and max(steps) > beyond:
            return max(steps)
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint past step {beyond}: {launcher.communicate(timeout=10)}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_starts_a_killed_rank_again_and_the_bits_are_the_same(work, corpus, undisturbed, record, parallel):
    began, rng, run = time.perf_counter(), random.Random(3), RunDirectory(work / f"runs/killed-{parallel}")
    if parallel == "fsdp":
        out, _ = finished(torchrun(ROOT / "main.py", *flags(corpus, "parts", **SETTINGS, parallel="fsdp"), cwd=work))
        undisturbed = digest(out)
    argv = flags(corpus, run.path.name, **SETTINGS, parallel=parallel)
    launcher, saved = torchrun(ROOT / "main.py", *argv, cwd=work, restarts=KILLS), [0]
    for _ in range(KILLS):
        saved.append(wait_for_checkpoint(run, saved[-1], launcher))
        time.sleep(rng.uniform(0, 0.1))
        os.kill(rng.choice(ranks_of(launcher)), signal.SIGKILL)
    out, err = finished(launcher)
    same = digest(out.rpartition("resuming at step")[2]) == undisturbed
    resumed = [int(n) for n in re.findall(r"resuming at step (\d+)", out)]
    lost = sum(at < step for at, step in zip(resumed, saved[1:]))
    note = (
        f"resumed at steps {', '.join(map(str, resumed))} of {SETTINGS['max_steps']} by torchrun --max-restarts {KILLS}"
    )
    record(
        f"kill -9 of one of two ranks, {parallel}", KILLS, KILLS if same else 0, lost, time.perf_counter() - began, note
    )
    assert same and len(resumed) == KILLS and not lost, err


def test_a_signal_to_torchrun_is_saved_by_all_ranks_and_resumes_to_the_same_bits(work, corpus, undisturbed, record):
    began, rng, same = time.perf_counter(), random.Random(4), 0
    for n in range(STOPS):
        run = RunDirectory(work / f"runs/stopped-{n}")
        argv = flags(corpus, run.path.name, **SETTINGS)
        launcher = torchrun(ROOT / "main.py", *argv, cwd=work)
        wait_for_checkpoint(run, 0, launcher)
        time.sleep(rng.uniform(0, 0.2))
        if n == STOPS - 1 and Path("/proc/self/task").exists():  # as a scheduler that signals every process of a job
            for rank in ranks_of(launcher):
                os.kill(rank, signal.SIGTERM)
        launcher.send_signal((signal.SIGTERM, signal.SIGINT)[n % 2])
        out, err = launcher.communicate(timeout=60)
        stopped = re.search(r"stopped and saved at step (\d+)", out)
        assert stopped, out + err
        out, _ = finished(torchrun(ROOT / "main.py", *argv, cwd=work))
        same += digest(out) == undisturbed and f"resuming at step {stopped[1]}" in out
    record("SIGTERM and SIGINT to two ranks", STOPS, same, STOPS - same, time.perf_counter() - began)
    assert same == STOPS


def test_a_nan_or_a_signal_on_one_rank_is_the_business_of_all(tmp_path, record):
    began = time.perf_counter()
    finished(torchrun(ROOT / "tests" / "ranks.py", tmp_path, cwd=tmp_path))
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    skipped = [saw[f"{how}poisoned"] for how in ("", "fsdp ") for saw in seen]
    good = sum(s["skipped"] == 1 and s["unchanged"] == [False, False, True, False, False] for s in skipped) // 2
    alike = skipped[0] == skipped[1] and skipped[2] == skipped[3]
    stopped = seen[0]["signalled"] == seen[1]["signalled"] == {"code": 143, "step": 4, "saved": ["step_000004"]}
    note = "a NaN in one micro-batch (DDP, FSDP): one step skipped on both, all else as it was; a SIGTERM: both stop"
    record("a NaN or a signal on one rank alone", 3, good + stopped, int(not alike), time.perf_counter() - began, note)
    assert good == 2 and alike and stopped


def test_damage_to_a_checkpoint_in_parts_is_found(work, corpus, record):
    began, rng = time.perf_counter(), random.Random(5)
    completed("main.py", flags(corpus, "damaged-parts", max_steps=4, save_every=4, parallel="fsdp"), work)
    folder = RunDirectory(work / "runs/damaged-parts").checkpoints()[-1]
    files, found = sorted(p for p in folder.rglob("*") if p.is_file()), 0
    for n in range(DAMAGES):
        path = files[n % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        changed = (
            whole[:place]
            if n % 4 == 3
            else whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        )
        path.write_bytes(changed)
        try:
            verify(folder)
        except CheckpointError:
            found += 1
        path.write_bytes(whole)
    verify(folder)
    record(
        "flips and truncations of a checkpoint in parts", DAMAGES, found, DAMAGES - found, time.perf_counter() - began
    )
    assert found == DAMAGES
