"""Runs inside the sandbox: loads an untrusted program, calls the functions that are requested, and answers in JSON.

    python -s -S -P -B -c "$(cat worker.py)" UID MEMORY_BYTES DISK_BYTES CPU_S PROCESSES ALARM_S MAX_BYTES

`process.py` starts it, writes requests to its standard input and reads answers from its standard output. Four bytes with the
length precede each. A request is a Python tuple as text; an answer is JSON. No answer is a verdict: the program shares this
process and can forge every answer, so a forged answer is at most a wrong value. It imports as little as possible, because it
is started once for each sample.
"""

import os
import sys
from _json import encode_basestring_ascii as quoted  # importing json takes as long as starting Python

MAX_DEPTH = 100
MAX_MESSAGE = 200  # characters of an error's text


def confine(uid, memory_bytes, disk_bytes, cpu_s, processes, alarm_s):
    """Change from root to the given uid, and lower every limit for good; 0 leaves a limit as it is."""
    import _signal
    import resource

    _signal.alarm(alarm_s)

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    limits = [("AS", memory_bytes), ("FSIZE", disk_bytes), ("CPU", cpu_s), ("NOFILE", 64), ("NPROC", processes)]
    for name, limit in [*limits, ("STACK", 2**23)]:
        if limit:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # with 0, the host's crash reporter would still run (core(5))


def encode(value, handles, depth=0):
    """Return a value as JSON. An object that is not plain data stays here, and its number is sent instead."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the answer is nested deeper than {MAX_DEPTH}")

    def items(values):
        return ",".join([encode(v, handles, depth + 1) for v in values])

    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return text if text.strip("-") not in ("inf", "nan") else f'{{"n":"{text}"}}'
    if isinstance(value, str):
        return quoted(str.__str__(value))
    if isinstance(value, complex):
        return f'{{"c":[{items([value.real, value.imag])}]}}'
    if isinstance(value, (bytes, bytearray)):
        return f'{{"b":"{value.hex()}"}}'
    if isinstance(value, dict):
        return f'{{"d":[{",".join([f"[{items(pair)}]" for pair in dict.items(value)])}]}}'
    for kind, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
        if isinstance(value, kind):
            # the class's own __iter__, as a stranger's subclass may have another
            return f'{{"{tag}":[{items(kind.__iter__(value))}]}}'  # type: ignore[arg-type]
    handles.append(value)
    return f'{{"h":[{len(handles) - 1},{quoted(type(value).__name__)}]}}'


def serve(requests, answers, max_bytes):
    """Answer requests until the input is closed."""
    module = type(sys)("solution")  # not __main__: code under `if __name__ == "__main__"` must not run
    sys.modules["solution"] = module
    handles: list[object] = []
    scope = {"handles": handles, "nan": float("nan"), "inf": float("inf")}

    def perform(action, *rest):
        if action == "load":
            exec(compile(rest[0], "<program>", "exec", dont_inherit=True), module.__dict__)
        elif action == "call":
            target, args, named = rest
            return (getattr(module, target) if isinstance(target, str) else target)(*args, **named)
        elif action == "get":
            return getattr(*rest)
        elif action == "set":
            setattr(*rest)

    def receive(count):
        data = b""
        while len(data) < count:
            piece = os.read(requests, count - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data

    def send(text):
        data = text.encode("ascii")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(answers, data) :]

    send("null")  # ready
    while True:
        request = receive(int.from_bytes(receive(4), "big")).decode("utf-8", "surrogatepass")
        try:
            text = encode(perform(*eval(request, scope)), handles)
            if len(text) > max_bytes:
                raise ValueError(f"the answer has {len(text)} bytes and may have {max_bytes}")
            answer = f'{{"ok":{text}}}'
        except BaseException as e:  # SystemExit and KeyboardInterrupt too
            try:
                message = str(e)[:MAX_MESSAGE]
            except BaseException:
                message = ""
            answer = f'{{"error":[{quoted(type(e).__name__)},{quoted(message)}]}}'
        send(answer)


if __name__ == "__main__":
    own_requests, own_answers = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):  # the program's output is dropped, and its input is empty
        os.dup2(nothing, standard)
    *limits, max_bytes = map(int, sys.argv[1:])
    confine(*limits)
    serve(own_requests, own_answers, max_bytes)
