"""How the worker's code gets into the sandbox, which can read no file of the project: as bytecode, on its standard input.

Compiling it there would take a fifth of the time of a sample, and Python takes 5 ms to parse it on the command line.
"""

from __future__ import annotations

import marshal
from functools import lru_cache
from pathlib import Path

FILES = ("worker_values.py", "worker.py")
VALUES = "kindling.sandbox.worker_values"  # the name under which worker.py imports it


@lru_cache
def worker_code() -> bytes:
    """Return the bytecode of both files, marshalled: what is to be sent first."""
    paths = [Path(__file__).with_name(name) for name in FILES]
    return marshal.dumps(
        [compile(path.read_text(encoding="utf-8"), path.name, "exec", dont_inherit=True, optimize=2) for path in paths]
    )


@lru_cache
def source() -> str:
    """Return the program for `python -c` that reads the bytecode and runs it."""
    size = len(worker_code())
    return f"""import marshal, os, sys
code = b""
while len(code) < {size}:
    code += os.read(0, {size} - len(code)) or os._exit(0)
values, worker = marshal.loads(code)
module = sys.modules[{VALUES!r}] = type(sys)({VALUES!r})
exec(values, module.__dict__)
exec(worker)
"""
