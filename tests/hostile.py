"""Programs that try to pass without solving their problem, to do harm, or to exhaust the machine.

    for hostile in HOSTILE:
        verdict = attempt((hostile, targets, limits), slot=0)

Each is submitted as a solution of HumanEval/162, `string_to_md5`: nobody can guess its expected values, and no program here
computes them. `$NAME` stands for a target outside the sandbox (see Targets). A program that reaches its target exits with
"reached", if it can tell; the reason of its verdict then says so.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from kindling.evaluation.check_correctness import check_answers
from kindling.evaluation.tasks import load
from kindling.sandbox.process import Limits


@dataclass(frozen=True)
class Hostile:
    """A program, and what it attacks."""

    kind: str
    name: str
    attacks: str
    source: str


@dataclass(frozen=True)
class Targets:
    """Targets outside the sandbox, which no program may reach; programs get each as `$NAME`."""

    canary: str
    """A file that anybody may write to."""
    folder: str
    """Its folder, where anybody may write."""
    tcp: int
    """A port of this machine on which something listens."""
    udp: int
    abstract: str
    """The name of a Unix socket that has no file."""
    path: str
    """A Unix socket that has a file."""
    test: int
    """The process of the tests."""
    project: str
    home: str
    secret: str
    """The name of an environment variable."""


class Outcome(NamedTuple):
    """The verdict on a program, its time, and the peak memory and open files of the process that judged it."""

    verdict: str
    reason: str
    seconds: float
    peak_bytes: int
    open_files: int


@lru_cache
def problem() -> Any:
    """Return the problem that every program here pretends to solve."""
    return next(p for p in load("humaneval") if p.task_id == "HumanEval/162")


def attempt(job: tuple[Hostile, Targets, Limits], slot: int) -> Outcome:
    """Judge a hostile program from this process."""
    hostile, targets, limits = job
    names = {"judge": os.getpid(), **asdict(targets)}
    source = Template(hostile.source).safe_substitute({name.upper(): repr(value) for name, value in names.items()})
    started = time.monotonic()
    verdict, reason = check_answers(problem(), source, limits=limits, slot=slot)
    status = Path("/proc/self/status").read_text(
        encoding="utf-8"
    )  # getrusage also counts the parent's memory, before exec
    peak = int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
    return Outcome(verdict, reason, time.monotonic() - started, peak, len(os.listdir("/proc/self/fd")))


HOSTILE: list[Hostile] = []


def _add(kind: str, name: str, attacks: str, source: str) -> None:
    assert name not in {h.name for h in HOSTILE}, name
    HOSTILE.append(Hostile(kind, name, attacks, textwrap.dedent(source).strip() + "\n"))


def forge(name: str, attacks: str, source: str) -> None:
    """Add a program that wants to pass."""
    _add("forge", name, attacks, source)


def reach(name: str, attacks: str, body: str) -> None:
    """Add a program whose function does something outside the sandbox, and says so if that raises no error."""
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    _add(
        "reach",
        name,
        attacks,
        f"import os, ctypes, socket\n\n\ndef string_to_md5(text):\n{body}\n    raise SystemExit('reached')",
    )


def use_up(name: str, attacks: str, source: str) -> None:
    """Add a program that tries to use more resources than it may."""
    _add("use up", name, attacks, source)


# Forged passes ----------------------------------------------------------------------------------------------------------

ALWAYS_EQUAL = """
class Equal{base}:
    __eq__ = __le__ = __ge__ = __contains__ = lambda self, other: True
    __ne__ = __lt__ = __gt__ = lambda self, other: False
    __bool__ = lambda self: True
    __hash__ = lambda self: 0
    __iter__ = lambda self: iter(["3e"])
    __getattr__ = lambda self, name: Equal()
    __abs__ = __sub__ = __rsub__ = __float__ = __index__ = __int__ = __len__ = lambda self, *other: 0
    __repr__ = __str__ = lambda self: "3e25960a79dbc69b674cd4ec67a72c62"
def string_to_md5(text):
    return Equal()
"""
forge("always-equal", "an answer that is equal to everything", ALWAYS_EQUAL.format(base=""))
forge("always-equal-str", "a str that is equal to everything", ALWAYS_EQUAL.format(base="(str)"))
forge("always-equal-int", "an int that is equal to everything", ALWAYS_EQUAL.format(base="(int)"))
forge("always-equal-float", "a float that is equal to everything", ALWAYS_EQUAL.format(base="(float)"))
forge("always-equal-list", "a list that is equal to everything", ALWAYS_EQUAL.format(base="(list)"))
forge("always-equal-dict", "a dict that is equal to everything", ALWAYS_EQUAL.format(base="(dict)"))
forge("always-equal-class", "a class, not an instance, whose metaclass lies", ALWAYS_EQUAL.format(base="(type)"))
forge(
    "class-lies",
    "an object that says it is a str",
    """
    class Liar:
        __class__ = property(lambda self: str)
        __eq__ = lambda self, other: True
    def string_to_md5(text):
        return Liar()
    """,
)
FIND = """
import re, sys
def find(text):
    import gc
    seen, found = set(), []
    def visit(value, depth):
        if id(value) in seen or depth > 4 or found:
            return
        seen.add(id(value))
        if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value):
            found.append(value)
        elif isinstance(value, dict):
            for pair in list(value.items()):
                visit(pair, depth + 1)
        elif isinstance(value, (list, tuple, set)):
            for item in list(value):
                visit(item, depth + 1)
        elif hasattr(value, "__code__"):
            visit(value.__code__.co_consts, depth + 1)
        elif hasattr(value, "co_consts"):
            visit(value.co_consts, depth + 1)
    PLACES
    return found[0] if found else None
def string_to_md5(text):
    return find(text)
"""
FRAMES = """frame = sys._getframe()
    while frame:
        for place in (frame.f_locals, frame.f_globals, frame.f_code, frame.f_builtins):
            visit(place, 0)
        frame = frame.f_back"""
forge("frames", "the expected values in the callers' frames", FIND.replace("PLACES", FRAMES))
forge("gc", "the expected values among all objects", FIND.replace("PLACES", "visit(gc.get_objects(), 0)"))
forge(
    "gc-referrers",
    "the expected values, from what refers to the function",
    FIND.replace(
        "PLACES", "[visit(b, 0) for a in gc.get_referrers(string_to_md5) for b in [a, *gc.get_referrers(a)][:2000]]"
    ),
)
forge(
    "memory",
    "the expected values anywhere in its own memory",
    """
    import ctypes, re
    def string_to_md5(text):
        start = id(text) & ~0xFFFFF
        found = re.findall(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", ctypes.string_at(start, 1 << 18))
        return found[0].decode() if found else None
    """,
)
forge(
    "requests",
    "the expected values in what it is sent",
    """
    import os, re, select
    def string_to_md5(text):
        for fd in range(64):
            try:
                if select.select([fd], [], [], 0.05)[0]:
                    if found := re.findall(rb"[0-9a-f]{32}", os.read(fd, 65536)):
                        return found[0].decode()
            except (OSError, ValueError):
                pass
    """,
)
forge(
    "settrace",
    "the comparison, by tracing what runs after it",
    """
    import sys, threading
    def trace(frame, event, arg):
        for name in ("candidate", "expected", "text"):
            if name in frame.f_locals:
                frame.f_locals[name] = True
        return trace
    def string_to_md5(text):
        sys.settrace(trace), sys.setprofile(trace), threading.settrace(trace)
        frame = sys._getframe()
        while frame:
            frame.f_trace = trace
            frame = frame.f_back
    """,
)
forge(
    "builtins",
    "builtins that a test leans on",
    """
    import builtins, math, operator
    yes = lambda *args, **named: True
    for name in ("abs", "all", "any", "isinstance", "len", "sorted", "AssertionError"):
        setattr(builtins, name, yes)
    math.isclose = math.fabs = operator.eq = yes
    def string_to_md5(text):
        return 0
    """,
)
forge(
    "assertion-error",
    "the error by which a test fails",
    """
    import builtins
    builtins.AssertionError = type("Quiet", (BaseException,), {"__init__": lambda self, *args: None})
    def string_to_md5(text):
        raise AssertionError
    """,
)
for where, source in {
    "load": "{exit}",
    "call": "def string_to_md5(text):\n    {exit}",
    "thread": "import threading\ndef string_to_md5(text):\n    threading.Thread(target=lambda: {exit}).start()\n    return text",
    "atexit": "import atexit\natexit.register(lambda: {exit})\ndef string_to_md5(text):\n    sys.exit(0)",
    "excepthook": "def hook(*args):\n    {exit}\nsys.excepthook = sys.unraisablehook = hook\ndef string_to_md5(text):\n    1 / 0",
    "del": "class D:\n    def __del__(self):\n        {exit}\ndef string_to_md5(text):\n    D()\n    return text",
}.items():
    for how in ("sys.exit(0)", "os._exit(0)"):
        forge(f"{where}-{how}", "a verdict read from the exit code", "import os, sys\n" + source.format(exit=how))
forge(
    "quit-silently",
    "a verdict read from the absence of an error",
    "import os, sys\ndef string_to_md5(text):\n    os.execv(sys.executable, ['python', '-c', ''])",
)
forge(
    "answers-ahead",
    "the protocol: many answers before the questions, on every file descriptor",
    """
    import os
    for data in ('{"ok":null}', '{"ok":true}', '{"ok":"3e25960a79dbc69b674cd4ec67a72c62"}'):
        for fd in range(64):
            try:
                os.write(fd, (len(data).to_bytes(4, "big") + data.encode()) * 20)
            except OSError:
                pass
    def string_to_md5(text):
        return text
    """,
)


def answer(name: str, attacks: str, data: str) -> None:
    """Add a program that writes its own answer, an expression of bytes, ahead of the call, and says no more."""
    forge(
        f"answer-{name}",
        attacks,
        f"import os, time\nfor data in (b'{{\"ok\":null}}', {data}):\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, len(data).to_bytes(4, 'big') + data)\n        except OSError:\n            pass\n"
        "time.sleep(60)",  # the load has been answered as if it had gone well, and then the call
    )


for name, attacks, data in [
    ("true", "an answer that is true", """b'{"ok":true}'"""),
    ("extra-keys", "answers with more keys", """b'{"ok":1,"passed":true,"verdict":"passed"}'"""),
    ("verdict", "an answer that is a verdict", """b'"passed"'"""),
    ("empty", "an empty answer", "b''"),
    ("not-json", "an answer that is a pickle", """b'\\x80\\x04\\x8c\\x05posix\\x8c\\x06system\\x93\\x8c\\x02id\\x85R.'"""),
    ("bare-nan", "a bare NaN", """b'{"ok":NaN}'"""),
    ("unknown-tag", "a tag that no value has", """b'{"ok":{"x":[1]}}'"""),
    ("two-tags", "a value with two tags", """b'{"ok":{"l":[],"t":[]}}'"""),
    ("tag-of-number", "a number where a list belongs", """b'{"ok":{"l":5}}'"""),
    ("overflow", "a complex number of an int that is no float", """b'{"ok":{"c":[1' + b'0' * 400 + b',1]}}'"""),
    ("bad-hex", "bytes that are none", """b'{"ok":{"b":"zz"}}'"""),
    ("unhashable", "a set of lists", """b'{"ok":{"s":[{"l":[]}]}}'"""),
    ("brackets", "nesting that overflows a decoder", "b'[' * 60000 + b']' * 60000"),
    ("deep-value", "nesting that overflows a recursive function", """b'{"ok":' + b'{"l":[' * 400 + b']}' * 400 + b'}'"""),
    ("huge-int", "an int of 4,000 digits and one of 60,000", """b'{"ok":[' + b'9' * 4000 + b',' + b'9' * 60000 + b']}'"""),
    ("big-float", "a float beyond all floats", """b'{"ok":1e999999}'"""),
    ("error", "a text for no terminal", r"""b'{"error":[["\\ud800\\u001b["],"\\n' + b'x' * 900 + b'",{"t":[0,{"d":[]}]}]}'"""),
    ("handle-negative", "an object that is not there", """b'{"ok":{"h":[-1,"str"]}}'"""),
    ("handle-far", "an object that is not there", """b'{"ok":{"h":[99999999999999999999,"str"]}}'"""),
    ("handle-true", "an object whose number is none", """b'{"ok":{"h":[true,"str"]}}'"""),
    ("handle-code", "an object whose number is code", """b'{"ok":{"h":["0] or exit() or [0","str"]}}'"""),
    ("changed", "a change of an argument that was not given", """b'{"ok":"x","changed":[[0,["3e"]]]}'"""),
    ("class", "an object of a class that nobody shares", """b'{"ok":{"o":["Path",["x",1]]}}'"""),
    ("popen", "an object of a class that starts processes", """b'{"ok":{"v":["Popen",["reached"]]}}'"""),
    ("builtin", "a builtin that is no type", """b'{"ok":{"y":"exec"}}'"""),
    ("range", "a range without end", """b'{"ok":{"r":[0,1000000000000000000]}}'"""),
    ("decimal", "a number that fills the memory", """b'{"ok":{"v":["Decimal",["1e999999999"]]}}'"""),
    ("interrupt", "the user's Ctrl-C, as an error's name", """b'{"error":[["KeyboardInterrupt"],"x",{"t":[null,{"d":[]}]}]}'"""),
    ("assertion", "the error by which a test fails", """b'{"error":[["AssertionError"],"x",{"t":[null,{"d":[]}]}]}'"""),
]:  # fmt: skip
    answer(name, f"the protocol: {attacks}", data)
forge(
    "answer-in-call",
    "the protocol: right form, wrong time",
    """
    import os
    def string_to_md5(text):
        data = b'{"ok":true}'
        for fd in range(3, 64):
            try:
                os.write(fd, (len(data).to_bytes(4, "big") + data) * 3)
            except OSError:
                pass
        return True
    """,
)
forge(
    "answer-too-long",
    "the protocol: a length of 4 GiB",
    "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'\\xff' * 65536)\n    except OSError:\n        pass",
)
forge("answer-huge", "an answer of 300 MB", "def string_to_md5(text):\n    return 'x' * 300_000_000")
forge(
    "answer-deep",
    "an answer nested 100,000 deep",
    "def string_to_md5(text):\n    x = []\n    for _ in range(100_000):\n        x = [x]\n    return x",
)
forge(
    "answer-cycle", "an answer that holds itself", "def string_to_md5(text):\n    x = []\n    x.append(x)\n    return x"
)
forge(
    "answer-collides",
    "a set that takes the judge minutes to build",
    "def string_to_md5(text):\n    return {i * (2**61 - 1) for i in range(5600)}",
)
for name, size in {"allowed": 131_000, "long": 1_000_000}.items():
    forge(
        f"answer-collides-{name}",
        "the same, without building it first",
        f"""
    import os
    data = ",".join(str(i * (2**61 - 1)) for i in range(60_000))
    def string_to_md5(text):
        answer = ('{{"ok":{{"s":[' + data[:{size}].rpartition(",")[0] + "]}}}}").encode()
        for fd in range(3, 64):
            try:
                os.write(fd, len(answer).to_bytes(4, "big") + answer)
            except OSError:
                pass
    """,
    )
forge("answer-nan", "NaN, which is equal to nothing", "def string_to_md5(text):\n    return float('nan')")
forge("answer-digits", "an int of 4,000 digits", "def string_to_md5(text):\n    return 10 ** 4000")
forge("answer-surrogate", "a lone surrogate", "def string_to_md5(text):\n    return '\\ud800' * 32")
forge(
    "answer-generator",
    "objects that answer when asked later",
    "def string_to_md5(text):\n    return (c for c in '3e25960a79dbc69b674cd4ec67a72c62')",
)
forge(
    "answer-endless",
    "a generator without end, of which each item is long",
    "def string_to_md5(text):\n    while True:\n        yield 'x' * 1_000_000",
)
forge(
    "answer-methods",
    "an object with every method",
    """
    class Any:
        __getattr__ = lambda self, name: lambda *args, **named: True
        __call__ = __getitem__ = lambda self, *args: True
        __len__ = lambda self: 2 ** 60
        __iter__ = lambda self: iter("3e25960a79dbc69b674cd4ec67a72c62")
    def string_to_md5(text):
        return Any()
    """,
)
forge(
    "encoder",
    "the functions that write the answer",
    """
    import builtins, sys
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
    yes = lambda *args, **named: '{"ok":true}'
    for name in ("encode", "quoted"):
        frame.f_globals[name] = yes
    builtins.len = lambda value: 11
    builtins.eval = yes
    def string_to_md5(text):
        return text
    """,
)
forge(
    "close-all",
    "a judge that waits for ever: every file descriptor closed",
    "import os, time\ndef string_to_md5(text):\n    os.closerange(0, 64)\n    time.sleep(60)",
)
forge(
    "trickle",
    "a judge that waits for ever: an answer of one byte a second",
    """
    import os, time
    def string_to_md5(text):
        for byte in (100_000).to_bytes(4, "big") + b" " * 60:
            os.write(4, bytes([byte]))
            time.sleep(0.9)
    """,
)
forge(
    "problem-files",
    "the files that the problem is from",
    """
    import glob, gzip, json, os, re
    def string_to_md5(text):
        found = []
        for top in ($PROJECT, os.path.dirname(os.__file__), "/usr/lib/python3", $HOME, "/tmp", "/opt", "/srv"):
            for folder, _, names in os.walk(top):
                found += [os.path.join(folder, n) for n in names if re.search("human.?eval|mbpp", n, re.I)]
        for path in [*found, $PROJECT + "/problems/HumanEval.jsonl.gz"]:
            for line in gzip.open(path, "rt"):
                if "string_to_md5" in line:
                    value = re.search(re.escape(repr(text)) + r"\\) == '(\\w+)'", json.loads(line)["test"])
                    return value and value[1]
    """,
)

# Side effects -----------------------------------------------------------------------------------------------------------

LIBC = "libc = ctypes.CDLL(None, use_errno=True)\n"


def libc(name: str, attacks: str, call: str) -> None:
    """Add a program that calls the C library."""
    reach(
        name, attacks, LIBC + f"if {call} < 0:\n    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
    )


for who in ("JUDGE", "TEST"):
    reach(f"kill-{who.lower()}", "the process outside", f"os.kill(${who}, 9)")
    reach(f"stop-{who.lower()}", "the process outside", f"os.kill(${who}, 19)")
    libc(f"ptrace-{who.lower()}", "the process outside", f"libc.ptrace(16, ${who}, 0, 0)")
    reach(f"memory-of-{who.lower()}", "the process outside", f"open(f'/proc/{{${who}}}/mem', 'r+b').write(b'x')")
    reach(f"environ-of-{who.lower()}", "secrets of the environment", f"open(f'/proc/{{${who}}}/environ').read()")
    libc(
        f"process-vm-{who.lower()}",
        "the memory of the process outside",
        f"libc.process_vm_readv(${who}, (ctypes.c_void_p * 2)(id(text), 8), 1, (ctypes.c_void_p * 2)(id(text), 8), 1, 0)",
    )
reach(
    "kill-group",
    "the processes of its group",
    "os.kill(0, 0)\nif os.getpgid(0) == os.getpgid($JUDGE):\n    os.kill(0, 9)",
)
reach(
    "kill-parent", "the process that started it", "os.kill(os.getppid(), 9)\nimport time\ntime.sleep(0.2)\nreturn None"
)
reach("limits-of-judge", "the limits of the process outside", "import resource\nresource.prlimit($JUDGE, 7, (0, 0))")
reach("priority-of-judge", "the process outside", "os.setpriority(os.PRIO_PROCESS, $JUDGE, 19)")
reach(
    "pidfd",
    "files of the process outside",
    """
    fd = os.pidfd_open($JUDGE)
    if ctypes.CDLL(None).syscall(438, fd, 0, 0) < 0:
        raise OSError
    """,
)
for name, path in {"canary": "$CANARY", "project": "$PROJECT + '/tests/hostile.py'"}.items():
    reach(f"write-{name}", "files outside", f"open({path}, 'a').write('changed')")
    reach(f"read-{name}", "files outside", f"open({path}).read()")
reach("write-home", "files outside", "open($HOME + '/kindling-was-here', 'w').close()")
reach("read-home", "files outside", "open(next(e.path for e in os.scandir($HOME) if e.is_file())).read()")
reach("unlink-canary", "files outside", "import posix\nposix.unlink($CANARY)")
reach("create-beside", "folders outside", "open($FOLDER + '/new', 'w').close()")
reach("io-open", "files outside, past a patched open", "import _io\n_io.open($CANARY, 'w')")
reach("low-open", "files outside, past open", "os.open($CANARY, os.O_WRONLY | os.O_TRUNC)")
reach("rename", "files outside", "os.rename($CANARY, $CANARY + '2')")
reach("chmod", "files outside", "os.chmod($CANARY, 0o777)")
reach("chmod-python", "the interpreter's files", "os.chmod(os.__file__, 0o777)")
reach("write-python", "the interpreter's files", "open(os.__file__, 'a').write('x')")
reach("write-cwd", "its working directory", "open('was-here', 'w').close()")
reach("write-tmp", "the host's /tmp", "os.makedirs('/tmp', exist_ok=True)\nopen('/tmp/kindling-was-here', 'w').close()")
reach(
    "symlink", "files outside, through a link that a clean-up follows", "os.symlink($CANARY, 'x')\nos.chmod('x', 0o777)"
)
reach("hard-link", "files outside", "os.link($CANARY, 'link')")
reach("dot-dot", "files outside", "for n in range(1, 20):\n    os.chdir('..')\nopen('.' + $CANARY).read()")
reach("passwd", "the users of this machine", "open('/etc/passwd').read()")
reach("proc", "processes outside", "os.listdir('/proc')")
reach("sys", "the machine's devices", "os.listdir('/sys')")
reach(
    "packages",
    "installed packages",
    """
    import glob
    if not glob.glob(os.path.dirname(os.__file__) + "/../python*/*-packages/*"):
        raise OSError
    """,
)
reach("shell", "a shell", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)")
reach("environment", "secrets of the environment", "os.environ[$SECRET]")
reach(
    "environment-c",
    "secrets of the environment",
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    getenv($SECRET.encode()).decode()
    """,
)
CONNECT = "s = socket.socket({kind})\ns.settimeout(1)\ns.{do}"
reach("tcp", "a listener on this machine", "socket.create_connection(('127.0.0.1', $TCP), timeout=1).sendall(b'x')")
reach("tcp-6", "a listener on this machine", "socket.create_connection(('::1', $TCP), timeout=1).sendall(b'x')")
reach("udp", "a listener on this machine", CONNECT.format(kind="2, 2", do="sendto(b'x', ('127.0.0.1', $UDP))"))
reach("unix", "a socket with a file", CONNECT.format(kind="1", do="connect($PATH)"))
reach("unix-abstract", "a socket without a file", CONNECT.format(kind="1", do="connect(chr(0) + $ABSTRACT)"))
reach("dns", "the network", "socket.getaddrinfo('example.org', 80)")
reach("raw-socket", "the network", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)")
reach("vsock", "the host of a virtual machine", "socket.socket(40, socket.SOCK_STREAM)")
reach("netlink", "the network's settings", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)")
libc("mount", "the file system", "libc.mount(b'none', b'/', b'tmpfs', 0, None)")
libc("umount", "the file system", "libc.umount2(b'/', 2)")
libc("user-namespace", "root in a namespace of its own", "libc.unshare(0x10000000)")
libc("mount-namespace", "the file system", "libc.unshare(0x20000)")
libc("clone-namespace", "root in a namespace of its own", "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)")
libc("old-namespace", "the namespaces of another process", "libc.setns(0, 0)")
reach("setuid", "root", "os.setuid(0)")
reach("setgid", "root", "os.setgid(0)\nos.setgroups([0])")
reach("chroot", "the file system", "os.chroot('/usr')")
reach("device", "the disk", "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0))")
reach(
    "devices",
    "the machine's devices",
    """
    import glob
    if set(glob.glob("/dev/**", recursive=True)) == {"/dev/", "/dev/null"}:
        raise OSError
    """,
)
reach(
    "terminal",
    "the user's terminal",
    """
    import fcntl, termios
    for fd in range(64):
        try:
            fcntl.ioctl(fd, termios.TIOCSTI, b"x")
            raise SystemExit("reached")
        except OSError:
            pass
    os.open("/dev/tty", os.O_RDWR)
    """,
)
libc("keys", "the keys of the user", "libc.syscall(250, 0, -3, 0)")
libc("add-key", "the keys of the user", "libc.syscall(248, b'user', b'kindling', b'x', 1, -3)")
libc("io-uring", "calls to the kernel that no filter sees", "libc.syscall(425, 4, ctypes.create_string_buffer(256))")
libc("bpf", "the kernel", "libc.syscall(321, 0, ctypes.create_string_buffer(128), 128)")
libc("perf", "the kernel", "libc.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)")
libc("x32", "the filter, by the numbers of another kind of program", "libc.syscall(0x40000000 + 41, 1, 1, 0)")

# Resources --------------------------------------------------------------------------------------------------------------

use_up(
    "fork-bomb",
    "processes",
    """
    import os
    def string_to_md5(text):
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
)
use_up(
    "forks-that-wait",
    "processes",
    """
    import os, time
    def string_to_md5(text):
        for started in range(30):
            if os.fork() == 0:
                time.sleep(60)
        raise SystemExit("reached")
    """,
)
use_up(
    "daemon",
    "processes that outlive it",
    """
    import os, time
    def string_to_md5(text):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.closerange(0, 64)
            time.sleep(60)
        return "started"
    """,
)
use_up(
    "threads",
    "threads",
    """
    import threading, time
    def string_to_md5(text):
        for _ in range(40):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        raise SystemExit("reached")
    """,
)
use_up(
    "memory-bytes",
    "memory",
    "def string_to_md5(text):\n    x = bytearray(600_000_000)\n    raise SystemExit('reached')",
)
use_up("memory-load", "memory", "x = [0] * 100_000_000\ndef string_to_md5(text):\n    raise SystemExit('reached')")
use_up("memory-grow", "memory", "def string_to_md5(text):\n    x = ['x' * 1000]\n    while True:\n        x += x")
use_up(
    "memory-swallowed",
    "memory, with its error swallowed",
    "def string_to_md5(text):\n    x = []\n    while True:\n        try:\n            x.append(bytearray(1 << 20))\n"
    "        except MemoryError:\n            pass",
)
use_up("memory-source", "memory", "def string_to_md5(text):\n    return eval('-' * 100_000 + '1')")
use_up(
    "memory-shared",
    "memory that no limit counts",
    """
    import ctypes
    def string_to_md5(text):
        libc = ctypes.CDLL(None)
        libc.shmat.restype = ctypes.c_void_p
        for _ in range(20):
            segment = libc.shmget(0, 50 << 20, 0o1600)
            if segment < 0:
                raise MemoryError("refused")
            place = libc.shmat(segment, None, 0)
            ctypes.memset(place, 1, 50 << 20)
            libc.shmdt(ctypes.c_void_p(place))
        raise SystemExit("reached")
    """,
)
use_up(
    "memory-files",
    "memory that no limit counts",
    """
    import os
    def string_to_md5(text):
        files = [os.memfd_create(str(i)) for i in range(50)]
        for file in files:
            os.write(file, bytes(1 << 24))
        raise SystemExit("reached")
    """,
)
use_up(
    "disk",
    "disk",
    """
    import os
    def string_to_md5(text):
        os.makedirs("/tmp", exist_ok=True)
        for i in range(10):
            with open(f"/tmp/{i}", "wb") as f:
                f.write(bytes(10_000_000))
        raise SystemExit("reached")
    """,
)
use_up(
    "disk-small-files",
    "inodes",
    """
    import os
    def string_to_md5(text):
        os.makedirs("/tmp", exist_ok=True)
        for i in range(10_000):
            os.mknod(f"/tmp/{i}")
        raise SystemExit("reached")
    """,
)
for stream in ("stdout", "stderr"):
    use_up(
        stream,
        "the memory of who reads what it prints",
        f"import os, sys\ndef string_to_md5(text):\n    for _ in range(300):\n        sys.{stream}.write('x' * 1_000_000)\n"
        f"        os.write({1 if stream == 'stdout' else 2}, b'x' * 1_000_000)\n    return text",
    )
use_up("loop", "time", "def string_to_md5(text):\n    while True:\n        pass")
use_up("loop-at-load", "time", "while True:\n    pass")
use_up(
    "loop-swallows",
    "time, deaf to signals and errors",
    """
    import signal
    def string_to_md5(text):
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        signal.alarm(0)
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    """,
)
use_up(
    "loop-forks",
    "time, a little of it in each of many processes",
    """
    import os
    def string_to_md5(text):
        while True:
            if os.fork() == 0:
                for _ in range(20_000_000):
                    pass
                os._exit(0)
            os.wait()
    """,
)
use_up("regex", "time, in C", "import re\ndef string_to_md5(text):\n    return re.match('(a*)*$', 'a' * 40 + 'b')")
use_up("power", "time, in C", "def string_to_md5(text):\n    return 9 ** 9 ** 9 % 7")
use_up("recursion", "the stack", "def string_to_md5(text):\n    return string_to_md5(text)")
use_up(
    "recursion-c",
    "the stack of C",
    """
    import sys
    sys.setrecursionlimit(10**9)
    def string_to_md5(text):
        x = []
        for _ in range(10**6):
            x = [x]
        return str(x)
    """,
)
use_up("sleep", "time, without using it", "import time\ndef string_to_md5(text):\n    time.sleep(60)")
use_up("sleep-at-load", "time, without using it", "import time\ntime.sleep(60)")
use_up(
    "stop-itself", "a judge that waits for ever", "import os\ndef string_to_md5(text):\n    os.kill(os.getpid(), 19)"
)
use_up(
    "stdin",
    "a judge that waits for ever",
    "import sys\ndef string_to_md5(text):\n    return sys.stdin.read() + input()",
)
use_up("abort", "an end that a judge may not expect", "import os\ndef string_to_md5(text):\n    os.abort()")
use_up(
    "segfault", "an end that a judge may not expect", "import ctypes\ndef string_to_md5(text):\n    ctypes.string_at(0)"
)
use_up(
    "kill-itself",
    "an end that a judge may not expect",
    "import os\ndef string_to_md5(text):\n    os.kill(os.getpid(), 9)",
)
use_up("interrupt", "the user's Ctrl-C", "def string_to_md5(text):\n    raise KeyboardInterrupt")
use_up("generator-exit", "errors that no Exception is", "def string_to_md5(text):\n    raise GeneratorExit")
use_up(
    "error-that-lies",
    "a judge that prints an error",
    """
    class Bad(Exception):
        def __str__(self):
            raise SystemExit(0)
        __repr__ = __str__
    def string_to_md5(text):
        raise Bad
    """,
)
use_up(
    "error-with-escapes",
    "the terminal of who reads the reason",
    "def string_to_md5(text):\n    raise type('\\x1b[2J\\ud800', (Exception,), {})('a\\nb\\x1b]0;x\\x07' + 'y' * 10_000)",
)
use_up("no-function", "a judge that expects a function", "string_to_md5 = None")
