"""Limits how long the threads of OpenMP spin, so that a computation leaves the cores to other programs.

    limit_spinning()        # before torch is loaded

Torch divides a product among OpenMP's threads. A thread that is done waits for the others in a loop, because waking it up takes
longer than most products. It holds its core meanwhile, also while the thread that it waits for has none: two trainings side by
side then cost each other nearly all of their speed. A shorter loop costs little where nothing else runs
(benchmarks/shared_machine.py measures both).

`cli.run_script` calls this for every script. Processes that a script starts inherit it. Limit: a runtime reads the environment
once, when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 3000
"""Turns of the loop in which a thread of libgomp, GNU's runtime, waits before it sleeps: about 30 microseconds. Torch's wheels
for Linux bring libgomp. Its own default is 300,000, about 3 milliseconds."""
BLOCK_TIME_MS = 1
"""The same for Intel's runtime and LLVM's, in milliseconds. Their default is 200."""
OWN_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # of the user


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the limits for every OpenMP runtime that is loaded later, unless the user has set one of OWN_CHOICES."""
    if not any(name in environment for name in OWN_CHOICES):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        environment["KMP_BLOCKTIME"] = str(BLOCK_TIME_MS)
