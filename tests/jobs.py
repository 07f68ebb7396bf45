"""Good and bad jobs for the tests of `map_jobs`. This file imports little, so a new worker is ready quickly."""

import os
import signal
import subprocess
import sys
import time


def double(job, slot):
    return 2 * job


def slot_and_pid(job, slot):
    time.sleep(0.05)
    return slot, os.getpid()


def misbehave(job, slot):
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif job == "die later":
        subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; kill -9 {os.getpid()}"])
    elif job == "leave":
        os._exit(0)
    elif job == "exit":
        sys.exit(3)
    elif job == "hang":
        while True:
            pass
    elif job == "sleep":
        time.sleep(1000)
    elif job == "raise":
        raise ValueError("two\nlines")
    elif job == "memory":
        return len(b"x" * 2**34)
    elif job == "lambda":
        return lambda: 1
    elif job == "poison":
        return Poison()
    elif job == "deep":
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        return deep
    return job


def explode():
    raise RuntimeError("no")


class Poison:
    """Can be pickled, but not unpickled."""

    def __reduce__(self):
        return explode, ()


def touch(job, slot):
    folder, name = job
    (folder / f"{name}-{os.getpid()}").touch()
    if name == "slow":
        time.sleep(1000)
    return name


def raise_limit(job, slot):
    """Start a process that sets its memory limit to `job` bytes; return the limit that it then has."""
    code = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({job}, {job})); print(r.getrlimit(r.RLIMIT_AS)[0])"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
