"""The sandbox, attacked: hostile programs do not pass, reach nothing and use up nothing, and the run goes on.

What the programs say of themselves counts for nothing here: files, sockets and processes are looked at from outside.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path

import hostile
import pytest
from conftest import ROOT
from hostile import HOSTILE, Hostile, Targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import misbehave

from kindling.evaluation.check_correctness import VERDICTS, check_answers
from kindling.evaluation.tasks import load
from kindling.pool import FailedJob, map_jobs
from kindling.sandbox import bubblewrap, process, syscall_filter
from kindling.sandbox import self_test as probing
from kindling.sandbox.bubblewrap import SandboxError
from kindling.sandbox.process import Limits, Program, ProgramError, RemoteObject
from kindling.sandbox.self_test import self_test

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (apt install bubblewrap)")
# no other process on this machine has this number in its command line
SHORT = Limits(cpu_s=1, wall_s=6.0, memory_bytes=2**29 + os.getpid())
MODES = [pytest.param("bwrap", marks=needs_bwrap), "none"]
GOOD = Hostile("good", "good", "nothing", hostile.problem().solution)
GOOD_PROBLEM = hostile.problem()
SECRET = "KINDLING_TEST_SECRET"


def processes_of(limits: Limits) -> list[int]:
    """Return the processes of sandboxes with these limits, however they have been re-parented."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(limits.memory_bytes).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def wait_until(condition, limit_s: float = 60.0) -> bool:
    """Return whether the condition comes true in time."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def zombies() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def targets():
    """Yield what is to be left alone, and a function that returns how it was touched."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kindling-test-"))  # pytest's own is closed to other users
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        canary = folder / "canary"
        canary.write_text("unchanged", encoding="utf-8")
        sockets = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
        sockets[1].bind(("127.0.0.1", 0))
        abstract, path = folder.name, str(folder / "socket")
        for address in ("\0" + abstract, path):
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(address)
            sockets[-1].listen()
        for s in sockets:
            stack.enter_context(s)
            s.setblocking(False)
        for path_of, mode in ((folder, 0o777), (canary, 0o666), (path, 0o666)):
            os.chmod(path_of, mode)  # nothing but the sandbox stands in a program's way
        os.environ[SECRET] = "a secret value"
        stack.callback(os.environ.pop, SECRET, None)
        home = Path.home()

        def listing() -> dict[str, list[str]]:
            others = [ROOT, ROOT / "tests", home, Path.cwd(), Path("/tmp"), Path("/")]  # which others use meanwhile
            left = {str(d): sorted(name for name in os.listdir(d) if "was-here" in name) for d in others}
            return left | {str(folder): sorted(os.listdir(folder))}

        def touched() -> list[str]:
            marks = [] if canary.read_text(encoding="utf-8") == "unchanged" else ["the canary was changed"]
            if canary.stat().st_mode & 0o777 != 0o666:
                marks.append("the canary's mode was changed")
            marks += [f"{d} was {before[d]}, is {now}" for d, now in listing().items() if now != before[d]]
            for s in sockets:
                with contextlib.suppress(BlockingIOError):
                    s.recv(1) if s.type == socket.SOCK_DGRAM else s.accept()
                    marks.append(f"{s} was reached")
            return marks

        before = listing()
        ports = [s.getsockname()[1] for s in sockets[:2]]
        yield (
            Targets(str(canary), str(folder), *ports, abstract, path, os.getpid(), str(ROOT), str(home), SECRET),
            touched,
        )


@pytest.fixture(scope="module")
def outcomes():
    """Each hostile program's outcome, and under "" what was touched; a good program is judged after every twenty."""
    with targets() as (outside, touched):
        programs = [p for i in range(0, len(HOSTILE), 20) for p in [*HOSTILE[i : i + 20], GOOD]]
        jobs = [(program, outside, SHORT) for program in programs]
        results = list(map_jobs(hostile.attempt, jobs, 4, 300))
        wait_until(lambda: not processes_of(SHORT))
        good = [result for program, result in zip(programs, results) if program is GOOD]
        evidence = {"touched": touched(), "left": processes_of(SHORT), "good": good}
        yield {program.name: result for program, result in zip(programs, results)} | {"": evidence}


@needs_bwrap
@pytest.mark.parametrize("program", HOSTILE, ids=lambda program: program.name)
def test_a_hostile_program_neither_passes_nor_reaches_what_it_wants(program, outcomes):
    outcome = outcomes[program.name]
    assert not isinstance(outcome, FailedJob), outcome  # it has not got at the process that judges
    assert outcome.verdict in set(VERDICTS) - {"passed", "sandbox"}
    assert "reached" not in outcome.reason and "secret" not in outcome.reason
    assert outcome.reason.isprintable() and 0 < len(outcome.reason) <= process.MAX_REASON
    assert outcome.peak_bytes < 200 * 2**20 and outcome.open_files < 20
    assert outcome.seconds < SHORT.wall_s + 30  # what is not limited takes minutes, or is without end


@needs_bwrap
def test_a_forged_answer_of_no_known_form_is_called_malformed(outcomes):
    forms = "extra-keys verdict empty not-json bare-nan unknown-tag two-tags tag-of-number overflow bad-hex unhashable brackets"
    for name in [*forms.split(), "huge-int", "handle-true", "handle-code"]:
        assert outcomes[f"answer-{name}"].reason.startswith("the answer is malformed"), name


@needs_bwrap
def test_hostile_programs_leave_no_trace_outside(outcomes):
    assert outcomes[""]["touched"] == []


@needs_bwrap
def test_no_process_of_a_hostile_program_outlives_it(outcomes):
    assert outcomes[""]["left"] == []


@needs_bwrap
def test_good_programs_pass_among_hostile_ones(outcomes):
    assert [outcome.verdict for outcome in outcomes[""]["good"]] == ["passed"] * len(outcomes[""]["good"])


def test_the_traces_that_are_looked_for_are_seen():
    with targets() as (outside, touched):
        assert touched() == []
        Path(outside.canary).write_text("changed", encoding="utf-8")
        Path(outside.folder, "new").touch()
        clients = [
            socket.create_connection(("127.0.0.1", outside.tcp)),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        ]
        clients[1].sendto(b"x", ("127.0.0.1", outside.udp))
        for address in ("\0" + outside.abstract, outside.path):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(address)
        assert len(touched()) == 6
        for client in clients:
            client.close()


# The self-test ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_self_test_passes_on_this_machine(mode):
    self_test(mode)


def more_in_the_sandbox(*arguments: str):
    """Return a `_bwrap` that adds arguments, the last of them before the root is closed to writing."""
    real = bubblewrap.command

    def bwrap(slot, filter_fd):
        command = real(slot, filter_fd)
        at = command.index("--remount-ro", len(command) - 6)
        return [*command[:at], *arguments, *command[at:]]

    return bwrap


def bind(path: Path) -> list[str]:
    parents = [
        argument for parent in reversed(path.parents[:-1]) for argument in ("--perms", "0755", "--dir", str(parent))
    ]
    return [*parents, "--ro-bind", str(path), str(path)]


@needs_bwrap
@pytest.mark.parametrize(
    "arguments, deed",
    [
        (["--ro-bind", "/proc", "/proc"], "see processes"),
        (bind(ROOT), "read this project"),
        (bind(Path("/tmp")), "read files"),
        (["--setenv", "SECRET", "x"], "hide the environment"),
    ],
    ids=["proc", "project", "tmp", "environment"],
)
def test_the_self_test_notices_what_the_sandbox_lets_in(arguments, deed, monkeypatch):
    monkeypatch.setattr(bubblewrap, "command", more_in_the_sandbox(*arguments))
    with pytest.raises(SandboxError, match=deed):
        self_test("bwrap")


@needs_bwrap
def test_the_self_test_notices_a_shared_network(monkeypatch):
    real = bubblewrap.command
    monkeypatch.setattr(bubblewrap, "command", lambda slot, fd: [a for a in real(slot, fd) if a != "--unshare-net"])
    self_test("bwrap")  # the filter of calls holds alone
    monkeypatch.setattr(syscall_filter, "program", lambda: None)
    with pytest.raises(SandboxError, match="reach the network"):
        self_test("bwrap")


@needs_bwrap
def test_the_self_test_notices_processes_without_end(monkeypatch):
    real = process._start
    monkeypatch.setattr(process, "_start", lambda mode, limits, slot: real(mode, replace(limits, processes=40), slot))
    with pytest.raises(SandboxError, match="start processes without end"):
        self_test("bwrap")


def test_the_self_test_notices_that_nothing_is_confined(monkeypatch):
    monkeypatch.setattr(bubblewrap, "command", lambda slot, filter_fd: [])
    with pytest.raises(SandboxError, match=r"must (not let a program|run a good program)"):
        self_test("bwrap")


def test_the_self_test_notices_a_sandbox_in_which_all_fails(monkeypatch):
    monkeypatch.setattr(probing, "_PROBE", "1 / 0")
    with pytest.raises(SandboxError, match=r"must run a good program, but it fails \(ZeroDivisionError"):
        self_test("none")
    monkeypatch.setattr(probing, "_PROBE", "def add(a, b):\n    return 0\ndef env():\n    return []")
    with pytest.raises(SandboxError, match="tell a good program from a bad one"):
        self_test("none")


def path_with(folder: Path, script: str) -> str:
    """Return a PATH on which `bwrap` is a shell script."""
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "bwrap").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("script", ["echo 'bwrap: No permissions to create new namespace' >&2\nexit 1", "exit 0"])
def test_a_bwrap_that_makes_no_sandbox_is_an_error_and_no_verdict(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", path_with(tmp_path, script))
    with pytest.raises(
        SandboxError, match=r"bubblewrap must be able .*(No permissions|without a word).*--sandbox none"
    ):
        self_test("bwrap")
    assert check_answers(GOOD_PROBLEM, GOOD_PROBLEM.solution).verdict == "sandbox"


def test_without_bwrap_no_line_is_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    source = f"open({str(tmp_path / 'was-here')!r}, 'w').close()\n" + GOOD_PROBLEM.solution
    with pytest.raises(SandboxError, match=r"sudo apt install bubblewrap .*--sandbox none"):
        self_test("bwrap")
    verdict = check_answers(GOOD_PROBLEM, source)
    assert verdict.verdict == "sandbox" and "apt install bubblewrap" in verdict.reason
    assert not (tmp_path / "was-here").exists()


def test_a_machine_that_can_start_no_process_is_no_verdict_on_a_program(monkeypatch, tmp_path):
    def popen(*args, **named):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert check_answers(GOOD_PROBLEM, GOOD_PROBLEM.solution, mode="none").verdict == "sandbox"
    assert list(tmp_path.iterdir()) == []


AS_USER = """
import os, sys
sys.path[:0] = [{project!r}, {project!r} + "/tests", {project!r} + "/tests/sandbox"]
import hostile, test_process as t
t.self_test("bwrap")
names = sys.argv[1:]
programs = [h for h in hostile.HOSTILE if h.name in names]
assert len(programs) == len(names)
with t.targets() as (outside, touched):
    jobs = [(program, outside, t.SHORT) for program in [*programs, t.GOOD]]
    outcomes = [hostile.attempt(job, 0) for job in jobs]
    t.wait_until(lambda: not t.processes_of(t.SHORT))
    print(os.getuid(), [o.verdict for o in outcomes], [o.reason for o in outcomes], touched(), t.processes_of(t.SHORT))
    assert [o.verdict == "passed" for o in outcomes] == [False] * len(programs) + [True]
    assert touched() == [] == t.processes_of(t.SHORT) and not any("reached" in o.reason for o in outcomes)
"""
AS_USER_NAMES = [
    *("always-equal", "frames", "answers-ahead", "kill-test", "ptrace-judge", "write-canary", "write-tmp", "write-cwd"),
    *("tcp", "unix-abstract", "user-namespace", "mount", "keys", "fork-bomb", "daemon", "memory-shared", "environment"),
]


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="all tests run as an ordinary user already")
def test_the_sandbox_holds_for_an_ordinary_user_too():
    user = ["setpriv", "--reuid", "60001", "--regid", "60001", "--clear-groups"]
    here = [os.path.realpath(sys._base_executable), "/usr/bin/python3"]
    python = next((p for p in here if same_python([*user, p], {"PATH": "/usr/bin:/bin"})), None)
    if python is None:
        pytest.skip("needs a Python of this version that an ordinary user can run")
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kindling-test-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for path in [*ROOT.glob("*.py"), ROOT / "kindling", ROOT / "problems", ROOT / "tests"]:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
        site = folder / "site"
        for path in map(Path, {m.__file__ for name, m in list(sys.modules.items()) if "." not in name and in_site(m)}):
            package = path.parent if path.name.startswith("__init__") else path
            if package.is_dir():
                shutil.copytree(package, site / package.name)
            else:
                site.mkdir(exist_ok=True)
                shutil.copy(package, site)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(site),
            "HOME": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        code = AS_USER.format(project=str(folder))
        result = subprocess.run(
            [*user, python, "-c", code, *AS_USER_NAMES], env=environment, cwd=folder, capture_output=True, text=True
        )
        assert result.returncode == 0 and result.stdout.startswith("60001 "), result.stdout + result.stderr


def in_site(module) -> bool:
    """Whether a module is of the site's packages, without the large ones, which other tests import and this needs not."""
    parts = Path(getattr(module, "__file__", None) or "").parts
    large = {"torch", "transformers", "numpy", "matplotlib", "datasets", "pyarrow", "pandas", "sympy", "PIL"}
    return "site-packages" in parts and not large.intersection(parts)


def same_python(command: list[str], environment: dict[str, str]) -> bool:
    """Return whether a command is a Python of this version, and may run another."""
    code = f"import os, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]} or not os.access({command[-1]!r}, os.X_OK))"
    with contextlib.suppress(OSError):
        return subprocess.run([*command, "-c", code], env=environment, capture_output=True).returncode == 0
    return False


# What it is to do -------------------------------------------------------------------------------------------------------

VERDICT_OF = {
    "def add(x, y):\n    return x + y": ("passed", ""),
    "def add(x, y):\n    return x - y": ("wrong", "a test failed"),
    "def add(x, y):\n    return object()": ("wrong", "a test failed"),
    "def add(x, y):\n    return x / 0": ("exception", "ZeroDivisionError: division by zero"),
    "def sub(x, y):\n    return x - y": ("exception", "has no attribute 'add'"),
    "import numpy": ("exception", "ModuleNotFoundError: No module named 'numpy'"),
    "import sys\nsys.exit(0)": ("exception", "SystemExit: 0"),
    "import os\nos._exit(3)": ("exception", "ended by itself, with exit code 3"),
    "import os\nos.abort()": ("exception", "ended by SIGABRT"),
    "while True: pass": ("timeout", "took more than"),
    "def add(x, y):\n    return [0] * 10**9": ("memory", "MemoryError"),
    "def add(x, y)\n    return x + y": ("syntax", "SyntaxError: expected ':'"),
    "def add(x, y):\nreturn x + y": ("syntax", "IndentationError"),
}


@pytest.fixture(scope="module")
def add():
    return next(p for p in load("humaneval") if p.task_id == "HumanEval/53")


@pytest.mark.parametrize("mode", MODES)
def test_each_failure_has_its_verdict_and_a_reason(mode, add):
    limits = replace(SHORT, wall_s=60.0)
    got = {source: check_answers(add, source, mode, limits) for source in VERDICT_OF}
    assert {source: verdict.verdict for source, verdict in got.items()} == {s: v for s, (v, _) in VERDICT_OF.items()}
    assert [source for source, (_, reason) in VERDICT_OF.items() if reason not in got[source].reason] == []


@pytest.mark.parametrize("mode", MODES)
def test_the_limit_of_cpu_time_ends_a_loop_before_the_time_is_up(mode):
    with pytest.raises(ProgramError, match="1 s of CPU time") as error:
        Program("while True: pass", mode, replace(SHORT, wall_s=60.0))
    assert error.value.kind == "timeout"


@pytest.mark.parametrize("mode", MODES)
def test_leaving_the_program_ends_its_processes_and_removes_its_files(mode):
    source = "import os, time\ndef fork():\n    if os.fork() == 0:\n        time.sleep(60)\n    return os.getcwd()"
    with Program(source, mode, SHORT) as program:
        folder = program.call("fork")
        assert len(processes_of(SHORT)) >= 2
    assert wait_until(lambda: not processes_of(SHORT))
    assert folder == "/" or not Path(folder).exists()


@pytest.mark.parametrize("mode", MODES)
def test_a_program_has_the_limits_that_it_was_given(mode):
    source = "import resource\ndef limit(name):\n    return resource.getrlimit(getattr(resource, 'RLIMIT_' + name))"
    expected = {"AS": SHORT.memory_bytes, "CPU": SHORT.cpu_s, "FSIZE": SHORT.disk_bytes, "NOFILE": 64}
    expected["CORE"] = 1  # what keeps the host's crash reporter from being started, see core(5)
    if mode == "bwrap":
        expected["NPROC"] = SHORT.processes
    with Program(source, mode, SHORT) as program:
        assert {name: program.call("limit", name) for name in expected} == {k: (v, v) for k, v in expected.items()}


def judge_a_sleeper(limits):
    check_answers(GOOD_PROBLEM, "import os, time\nos.fork()\ntime.sleep(60)", "bwrap", limits)


@needs_bwrap
def test_no_program_outlives_a_judge_that_was_killed():
    limits = replace(SHORT, memory_bytes=SHORT.memory_bytes + 2**23, wall_s=60.0)
    process = get_context("spawn").Process(target=judge_a_sleeper, args=(limits,))
    process.start()
    assert wait_until(lambda: len(processes_of(limits)) >= 4)  # bwrap, its init, and two of the program
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert wait_until(lambda: not processes_of(limits))


def test_an_alarm_ends_a_program_that_nobody_asks_any_more():
    program = Program("import time", "none", replace(SHORT, wall_s=0.5))
    sleep = b"('call', 'sleep', (60,), {})"
    os.write(program._process.stdin.fileno(), len(sleep).to_bytes(4, "big") + sleep)
    program._process.wait(60)
    assert program._process.returncode != 0
    program.close()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.builds(complex, st.floats(), st.floats())
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.binary(max_size=8)
)
HASHABLE = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3).map(tuple) | st.frozensets(x, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    HASHABLE,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(HASHABLE, x, max_size=3) | st.sets(HASHABLE, max_size=3),
    max_leaves=12,
)


def form(value) -> str:
    """Return a text that is equal for values that are the same, of the same types, NaN and the sign of zero included."""
    if isinstance(value, (list, tuple)):
        inner = [form(v) for v in value]
    elif isinstance(value, (set, frozenset)):
        inner = sorted(form(v) for v in value)
    elif isinstance(value, dict):
        inner = [form(k) + ":" + form(v) for k, v in value.items()]
    elif isinstance(value, complex):
        inner = [repr(value.real), repr(value.imag)]
    else:
        inner = [ascii(value)]
    return f"{type(value).__name__}({','.join(inner)})"


@pytest.fixture(scope="module")
def echo():
    source = "seen = None\ndef echo(*args, **named):\n    return [args, named]\ndef is_it(x):\n    return x.__class__.__name__"
    with Program(source, "none", Limits(cpu_s=60, wall_s=300.0)) as program:
        yield program


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(VALUES, VALUES)
def test_values_are_the_same_on_the_other_side_and_back(echo, first, second):
    assert form(echo.call("echo", first, key=second)) == form([(first,), {"key": second}])


def test_arguments_that_are_no_plain_data_are_refused(echo):
    assert echo.call("is_it", int) == "type"
    for value in (object(), time.sleep, lambda: 0, type("Own", (), {}), [iter([])]):
        with pytest.raises(TypeError, match="plain data"):
            echo.call("echo", value)


def test_an_object_stays_with_the_program_and_is_equal_to_nothing():
    source = "class Node:\n    def __init__(self, data):\n        self.data, self.left = data, None\ndef depth(n):\n"
    with Program(source + "    return 1 + depth(n.left) if n else 0", "none") as program:
        node = program.call("Node", 5)
        assert type(node) is RemoteObject and node.data == 5 and node.left is None
        node.left = program.call("Node", 6)
        assert program.call("depth", node) == 2 and node.left.data == 6
        assert node not in [1, node.left] and not node.__eq__(node)
        for use in (
            bool,
            len,
            iter,
            hash,
            abs,
            float,
            lambda n: n != 1,
            lambda n: n < 1,
            lambda n: n + 1,
            lambda n: n[0],
        ):
            with pytest.raises(TypeError):
                use(node)


@pytest.mark.parametrize("mode", MODES)
def test_trees_of_the_programs_own_nodes_are_judged(mode):
    tree = next(p for p in load("mbpp") if "Node" in p.remote)
    assert check_answers(tree, tree.solution, mode).verdict == "passed"
    assert check_answers(tree, tree.solution.replace("return True", "return False"), mode).verdict == "wrong"


@needs_bwrap
def test_what_good_programs_may_use_is_not_refused():
    source = """
import asyncio, bisect, collections, ctypes, datetime, decimal, fractions, functools, hashlib, heapq, io, itertools, json
import math, os, queue, random, re, socket, sqlite3, statistics, string, subprocess, threading, typing, zlib
def threads():
    found = []
    thread = threading.Thread(target=found.append, args=(1,))
    thread.start(), thread.join()
    return found
async def wait():
    await asyncio.sleep(0)
    return 2
def loop():
    return asyncio.run(wait())
def fork():
    if (child := os.fork()) == 0:
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def digest():
    print("to nowhere")
    return hashlib.sha256(b"").hexdigest()[:4], sqlite3.connect(":memory:").execute("select 4").fetchone()[0]
def devnull():
    return open(os.devnull).read()
"""
    with Program(source) as program:
        answers = [program.call(name) for name in ("threads", "loop", "fork", "digest", "devnull")]
    assert answers == [[1], 2, 3, ("e3b0", 4), ""]


def judge_job(job, slot):
    problem, source = job
    return check_answers(
        problem, source, "bwrap" if shutil.which("bwrap") else "none", Limits(wall_s=60.0), slot
    ).verdict


@pytest.mark.slow
@needs_bwrap
def test_verdicts_are_the_same_with_any_number_of_workers(add):
    problems = load("humaneval")[:47]
    jobs = [(problem, problem.solution) for problem in problems] + [(add, source) for source in VERDICT_OF]
    found = [list(map_jobs(judge_job, jobs, n, 120)) for n in (1, 2, 4)]
    assert found[0] == ["passed"] * 47 + [verdict for verdict, _ in VERDICT_OF.values()]
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_many_sandboxes_leave_neither_open_files_nor_zombies(mode, count):
    before = len(os.listdir("/proc/self/fd")), zombies()
    for i in range(count):
        with contextlib.suppress(ProgramError), Program("1 / 0" if i % 2 else "", mode, SHORT):
            pass
    assert (len(os.listdir("/proc/self/fd")), zombies()) == before
    assert wait_until(lambda: not processes_of(SHORT))  # the kernel takes a moment to end a namespace


# The filter of calls ----------------------------------------------------------------------------------------------------

MACHINES = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
ALLOW, REFUSE, UNKNOWN, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def filtered(program: bytes, arch: int, number: int, argument: int) -> int:
    """Run a filter as the kernel does, and return what it decides."""
    data = struct.pack("=IIQQ", number, arch, 0, argument)
    rows, at, register = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, yes, no, value = rows[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, value)
        else:
            at += yes if {0x15: register == value, 0x35: register >= value, 0x45: register & value}[code] else no


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_what_is_listed_and_nothing_else(machine):
    column, arch = list(MACHINES).index(machine), syscall_filter.AUDIT_ARCH[machine]
    program = syscall_filter.program(machine)
    refused = {numbers[column] for numbers in syscall_filter.REFUSED.values()}
    clone, clone3 = syscall_filter.CLONE[column], syscall_filter.CLONE3[column]
    for number in range(600):
        expected = REFUSE if number in refused else UNKNOWN if number == clone3 else ALLOW
        assert filtered(program, arch, number, 0) == expected, number
    assert filtered(program, arch, clone, 0x3D0F00) == ALLOW  # a thread
    for namespace in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert filtered(program, arch, clone, namespace | 17) == REFUSE
    assert filtered(program, arch, 0x40000000 + clone, 0) == REFUSE
    assert filtered(program, 0x40000003, 11, 0) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_of_calls_are_the_kernels(machine):
    header = Path("/usr/include", MACHINES[machine])
    if not header.exists():
        pytest.skip("needs the kernel's headers (apt install linux-libc-dev)")
    there = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text(encoding="utf-8")))
    column = list(MACHINES).index(machine)
    calls = syscall_filter.REFUSED | {"clone": syscall_filter.CLONE, "clone3": syscall_filter.CLONE3}
    assert {name: str(numbers[column]) for name, numbers in calls.items()} == {
        name: str(there.get(name)) for name in calls
    }


def test_a_machine_whose_numbers_are_not_known_has_no_filter():
    assert syscall_filter.program("riscv64") is None


# The workers ------------------------------------------------------------------------------------------------------------


def test_only_the_job_that_kills_its_worker_is_lost():
    jobs = ["a", "die", "b", "raise", "c"]
    found = list(map_jobs(misbehave, jobs, 2, 60.0))
    assert found == ["a", FailedJob("crash"), "b", FailedJob("ValueError: two\nlines"), "c"]


def test_a_worker_that_dies_between_jobs_costs_none():
    def after_its_death(jobs):
        for job in jobs:
            yield job
            assert job != "die later" or wait_until(lambda: not active_children())

    found = list(map_jobs(misbehave, after_its_death(["die later", "b", "c", "d"]), 1, 60.0))
    assert found == ["die later", "b", "c", "d"]
