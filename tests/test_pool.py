import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from jobs import double, explode, misbehave, raise_limit, slot_and_pid

from kindling import pool
from kindling.pool import FailedJob, PoolError, map_jobs

LIMIT_S = 60
DEADLINE_S = 120  # for what must come to pass, however busy the machine is


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = DEADLINE_S) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize(("n_jobs", "n_workers"), [(0, 2), (7, 1), (7, 2), (1, 5)])
def test_results_come_in_order_whatever_the_number_of_workers(n_workers, n_jobs):
    assert list(map_jobs(double, range(n_jobs), n_workers, LIMIT_S)) == [2 * i for i in range(n_jobs)]


def test_slots_tell_the_workers_apart():
    seen = set(map_jobs(slot_and_pid, range(8), 2, LIMIT_S))
    assert {slot for slot, _ in seen} == {0, 1} and len(seen) == 2 and os.getpid() not in {pid for _, pid in seen}


def test_a_job_that_misbehaves_loses_only_itself():
    jobs = [1, "die", 2, "raise", 3, "leave", "exit", 4, "memory", 5, "lambda", 6, "poison", "deep", 7, "die"]
    results = list(map_jobs(misbehave, jobs, 2, LIMIT_S))
    assert [r for r in results if not isinstance(r, FailedJob)] == [1, 2, 3, 4, 5, 6, 7]
    lost = {job: result.reason for job, result in zip(jobs, results) if isinstance(result, FailedJob)}
    assert lost["die"] == lost["leave"] == lost["exit"] == "crash"
    assert lost["raise"] == "ValueError: two\nlines"
    assert lost["memory"].startswith("MemoryError")
    assert (
        "pickle" in lost["lambda"]
        and lost["poison"] == "RuntimeError: no"
        and lost["deep"].startswith("RecursionError")
    )


def test_a_job_that_hangs_is_ended_at_its_limit():
    # the limit is as long as a job that does nothing may take on a busy machine
    started = time.monotonic()
    results = list(map_jobs(misbehave, ["hang", 1, "sleep", 2], 2, 5))
    assert results == [FailedJob("timeout"), 1, FailedJob("timeout"), 2]
    assert time.monotonic() - started < DEADLINE_S  # the jobs sleep for longer


def test_only_jobs_that_misbehave_cost_a_new_process():
    pids = [pid for _, pid in map_jobs(slot_and_pid, range(6), 1, LIMIT_S)]
    assert len(set(pids)) == 1


def test_jobs_are_drawn_as_they_are_needed_and_results_come_at_once():
    drawn = []

    def jobs():
        for i in range(100):
            drawn.append(i)
            yield i

    results = map_jobs(double, jobs(), 1, LIMIT_S)
    assert drawn == []
    assert next(results) == 0 and drawn == [0]
    assert next(results) == 2 and drawn == [0, 1]
    results.close()
    assert drawn == [0, 1]


def test_an_error_of_the_jobs_themselves_ends_the_workers():
    def jobs():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(map_jobs(double, jobs(), 1, LIMIT_S))


def test_a_result_that_waits_for_a_slow_consumer_is_no_timeout(monkeypatch):
    workers, now = [], [0.0]

    class Known(pool._Worker):
        def __init__(self, slot):
            super().__init__(slot)
            workers.append(self)

    monkeypatch.setattr(pool, "_Worker", Known)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    got = []
    for result in map_jobs(double, range(6), 2, LIMIT_S):
        for worker in workers:  # each job is done, and its result waits
            assert worker.number is None or worker.pipe.poll(DEADLINE_S)
        now[0] += 10 * LIMIT_S
        got.append(result)
    assert got == [0, 2, 4, 6, 8, 10]


def test_a_worker_that_was_killed_while_it_waited_is_replaced():
    results = map_jobs(slot_and_pid, range(3), 1, LIMIT_S)
    _, pid = next(results)  # its next job comes with the next call
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not active_children())
    rest = list(results)
    assert len(rest) == 2 and pid not in {other for _, other in rest}


@pytest.mark.parametrize("way", ["close", "forget"])
def test_a_consumer_that_leaves_early_leaves_no_process(way):
    results = map_jobs(slot_and_pid, range(100), 2, LIMIT_S)
    pids = {next(results)[1], next(results)[1]}
    if way == "close":
        results.close()
    else:
        del results
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_a_job_may_start_processes_with_limits_of_their_own():
    twice = 2 * pool.MEMORY_BYTES
    assert list(map_jobs(raise_limit, [twice], 1, LIMIT_S)) == [twice]


def test_workers_that_cannot_start_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(pool, "_work", explode)
    with pytest.raises(PoolError, match=r"must be able to start, but die at once; see that memory is free"):
        list(map_jobs(double, [1], 2, LIMIT_S))


PARENT = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import jobs
from kindling.pool import map_jobs

if __name__ == "__main__":
    folder = Path({folder!r})
    for result in map_jobs(jobs.touch, [(folder, name) for name in ("quick", "slow", "slow", "never")], 2, 600):
        print(result, flush=True)
"""


@pytest.fixture
def parent(tmp_path):
    """A process whose two workers are both at a job without end, and their process ids."""
    marks = tmp_path / "marks"
    marks.mkdir()
    file = tmp_path / "parent.py"
    file.write_text(PARENT.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(marks)), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert wait_until(lambda: len(list(marks.glob("slow-*"))) == 2)
        yield process, [int(path.name.split("-")[1]) for path in marks.glob("slow-*")]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_the_workers_without_a_word_of_theirs(parent):
    process, pids = parent
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGINT and said.count(b"Traceback") == 1
    assert wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_parent_that_is_killed_leaves_no_worker(parent):
    process, pids = parent
    assert all(map(is_running, pids))
    process.kill()
    assert wait_until(lambda: not any(map(is_running, pids)))


def group(number: int) -> list[str]:
    """Return the processes of a group that run."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(")")
            if rest.split()[0] != "Z" and int(rest.split()[2]) == number:
                stats.append(name)
    return stats


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see what is left")
def test_ctrl_c_while_workers_start_leaves_none(tmp_path):
    file = tmp_path / "parent.py"
    file.write_text(PARENT.format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path)), encoding="utf-8")
    for delay_s in (0.3, 0.6, 0.9):
        process = subprocess.Popen([sys.executable, str(file)], stderr=subprocess.PIPE, start_new_session=True)
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, said = process.communicate(timeout=DEADLINE_S / 4)
        except subprocess.TimeoutExpired as e:
            # Python itself loses an interrupt that comes while it calls back, as it does for each import
            assert b"Exception ignored" in (e.stderr or b""), e.stderr
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=DEADLINE_S)
        assert said.count(b"Traceback") - said.count(b"Exception ignored") <= 1, said.decode()
        assert wait_until(lambda number=process.pid: not group(number)), group(process.pid)
