"""Runs inside the sandbox: loads an untrusted program, calls the functions that are requested, and answers in JSON.

    python -s -S -P -B -c CODE UID MEMORY_BYTES DISK_BYTES CPU_S PROCESSES ALARM_S MAX_BYTES

`process.py` sends it the bytecode of this file and of worker_values.py, then requests, to its standard input, and reads answers
from its standard output. Four bytes with the length precede each. A request is marshalled by the trusted side; an answer
is JSON (values.py has its forms). No answer is a verdict: the program shares this process and can forge every answer, so a forged
answer is at most a wrong value. It imports as little as possible, because it is started once for each sample.
"""

import marshal
import os
import sys
from _json import encode_basestring_ascii as quoted  # importing json takes as long as starting Python

from kindling.sandbox.worker_values import SCALARS, Values, flat  # process.py sends it with this file

MAX_MESSAGE = 1000  # characters of an error's text
NOTHING = '{"t":[null,{"d":[]}]}'  # what an error in carrying values says beside its text
MAX_PLAIN_DEPTH = 3  # of what an error was raised with


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


def perform(values, action, *rest):
    """Do what a request asks for, and return the answer."""
    if action == "load":
        source, own = rest
        values.own = set(own)
        exec(compile(source, "<program>", "exec", dont_inherit=True), values.module.__dict__)
        return None
    if action == "call":
        target, args, named = rest
        return target(*args, **named)
    if action == "get":
        return getattr(*rest)
    if action == "set":
        return setattr(*rest)
    if action == "item":
        return rest[0][rest[1]]
    if action == "setitem":
        rest[0][rest[1]] = rest[2]
        return None
    if action == "delitem":
        del rest[0][rest[1]]
        return None
    if action in ("await", "anext"):
        import asyncio

        async def awaited():
            return await (rest[0] if action == "await" else rest[0].__anext__())

        if action == "await":
            return asyncio.run(awaited())
        values.loop = values.loop or asyncio.new_event_loop()  # one loop for all steps of a generator
        return values.loop.run_until_complete(awaited())
    if action in ("enter", "exit"):
        return (
            type(rest[0]).__enter__(rest[0]) if action == "enter" else type(rest[0]).__exit__(rest[0], None, None, None)
        )
    if action in ("str", "repr"):
        return (str if action == "str" else repr)(rest[0])
    if action == "send":
        return rest[0].send(rest[1])
    return (len if action == "len" else iter if action == "iter" else next)(rest[0])


def is_plain(value, depth=0):
    """Return whether a value is short plain data."""
    if type(value) in (list, tuple, set, dict):
        held = flat(value) if type(value) is dict else value
        return depth < MAX_PLAIN_DEPTH and len(held) <= MAX_MESSAGE and all(is_plain(v, depth + 1) for v in held)
    return type(value) in SCALARS and (type(value) not in (str, bytes) or len(value) <= MAX_MESSAGE)


def head(e, kind):
    """Return the start of an error as JSON: the names of its classes and its text.

    `kind` is error for one that the program raised, and unable for one in carrying its arguments or its answer.
    """
    try:
        message = str(e)[:MAX_MESSAGE]
    except BaseException:
        message = ""
    names = ",".join([quoted(cls.__name__[:MAX_MESSAGE]) for cls in type(e).__mro__[:20]])
    return f'"{kind}":[[{names}],{quoted(message)},'


def error_contents(e):
    """Return what an error was raised with, if that is plain, and its plain attributes."""
    try:
        args = e.args[:10]
        return args if is_plain(args) else None, {k: v for k, v in e.__dict__.items() if is_plain(v)}
    except BaseException:
        return None, {}


def serve(requests, answers, max_bytes):
    """Answer requests until the input is closed."""
    module = type(sys)("solution")  # not __main__: code under `if __name__ == "__main__"` must not run
    sys.modules["solution"] = module
    values = Values(module)

    def receive(count):
        pieces = []
        while count:
            piece = os.read(requests, min(count, 2**20))
            if not piece:
                os._exit(0)
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def send(text):
        data = text.encode("ascii")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(answers, data) :]

    send("null")  # ready
    while True:
        request = receive(int.from_bytes(receive(4), "big"))
        try:
            asked = values.receive(marshal.loads(request))
            try:
                result = perform(values, *asked)
            except BaseException as e:  # SystemExit and KeyboardInterrupt too
                answer = values.answer(head(e, "error"), error_contents(e), "]")
            else:
                answer = values.answer('"ok":', result)
            if len(answer) > max_bytes:
                raise ValueError(f"the answer has {len(answer)} bytes and may have {max_bytes}")
        except BaseException as e:
            answer = f"{{{head(e, 'unable')}{NOTHING}]}}"
        send(answer)


if __name__ == "__main__":
    own_requests, own_answers = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):  # the program's output is dropped, and its input is empty
        os.dup2(nothing, standard)
    *limits, max_bytes = map(int, sys.argv[1:])
    confine(*limits)
    serve(own_requests, own_answers, max_bytes)
