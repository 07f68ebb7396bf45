"""What the tests share: small real inputs, the scripts run as a user would run them, and the order of the tests.

Each test starts with the same process state (see `same_state`), so the order of the tests does not matter. `make test-shuffled`
runs them in a random order.
"""

import atexit
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import warm
from hypothesis import HealthCheck

if TYPE_CHECKING:
    from kindling.runs.checkpoint import RunDirectory

os.environ["HF_HUB_OFFLINE"] = "1"  # a request to the hub fails at once, without retries
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # with more, each is a process that imports torch first

# the time of an example and the number of rejected ones depend on chance
by_chance = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
hypothesis.settings.register_profile("kindling", deadline=None, suppress_health_check=by_chance, max_examples=40)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("kindling"), max_examples=300)
hypothesis.settings.load_profile("kindling")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

from config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig  # noqa: E402

# the slowest files start first; otherwise one worker is busy with one of them after all others have finished
SLOW_FIRST = ("test_build.py", "test_process.py", "test_scripts.py", "test_evaluate.py", "test_distributed.py")
SLOW_FIRST += ("test_trainer.py", "test_fsdp.py", "test_sft_train.py", "test_hf_format.py")
SLOW_FIRST += ("test_start_or_resume.py", "test_evaluations.py", "test_chat.py", "test_figures.py", "test_decoding.py")
SLOW_FIRST += ("test_memorization.py", "test_perplexity.py", "test_handwritten_bpe.py", "test_tokenizer.py")
SLOW_FIRST += (
    "test_json_rows.py",
    "test_distributed_build.py",
    "test_visualize.py",
    "test_extraction.py",
    "test_model.py",
)
SLOW_FIRST += ("test_config.py", "test_check_correctness.py")


def pytest_addoption(parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="shuffle the files, and the tests in each file")
    parser.addoption("--results", metavar="FILE", help="append each finished test to FILE, as a line of JSON")
    parser.addoption("--gpu-device", choices=["cuda", "mps", "cpu"], default="cuda", help="where tests/gpu run")


@pytest.fixture(scope="session")
def gpu(request) -> str:
    """The kind of device for the tests in tests/gpu: cuda, or what --gpu-device names."""
    import torch

    kind = request.config.getoption("gpu_device")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; --gpu-device cpu runs these tests on the CPU, at toy size")
    return kind


def pytest_report_header(config) -> str | None:
    seed = config.getoption("shuffle")
    return None if seed is None else f"shuffled: the same order again with --shuffle {seed}"


def pytest_configure(config) -> None:
    if sys.platform == "linux" and getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[warm.ADDRESS] = warm.start()  # for all workers
    if path := config.getoption("results"):
        config.pluginmanager.register(ResultsFile(Path(path)))


class ResultsFile:
    """Appends each finished test to a file, so that a run that is cut off leaves what it found."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.outcome != "failed" else str(report.longrepr if crash is None else crash.message)
        said = {name: str(value) for name, value in report.user_properties}
        line = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "message": message, "said": said}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Put the slow files first, or shuffle files and the tests in each; the tests of a file stay together."""
    files: dict[Path, list] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = sorted(files, key=lambda path: SLOW_FIRST.index(path.name) if path.name in SLOW_FIRST else len(SLOW_FIRST))
    if (seed := config.getoption("shuffle")) is not None:
        rng = random.Random(seed)
        rng.shuffle(order)
        for tests in files.values():
            rng.shuffle(tests)
    items[:] = [item for path in order for item in files[path]]


def pytest_collection_finish() -> None:
    """Look for garbage rarely, and not in what was imported: that took 40 s of processor time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 100)


if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a shell's background job; the scripts of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
UMASK = os.umask(0o022)
os.umask(UMASK)
HANDLERS = {
    s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else []))
}


def reset_libraries() -> None:
    """Reset the global settings of Python and of the loaded libraries to their values at the start of a process."""
    sys.setrecursionlimit(1000)  # torch's compiler raises it
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch = sys.modules.get("torch")
    if hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def same_state() -> Iterator[None]:
    """Start each test with the same process state, and undo its changes afterwards."""
    reset_libraries()
    os.chdir(ROOT)
    environment, path = dict(os.environ), list(sys.path)
    with warnings.catch_warnings():
        yield
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    sys.path[:] = path
    os.umask(UMASK)
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def shared_file(name: str) -> Path:
    """Return a large real input, or skip where it is not on this machine."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the data file {name}, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Real Python source of a size for tests: the files up to 24 kB of the standard library's asyncio, email and json.

    These are five files in six and two fifths of the bytes, so many tests that build data take half of the time.
    """
    folder = tmp_path_factory.mktemp("corpus")
    for package in ("asyncio", "email", "json"):
        source = Path(sysconfig.get_path("stdlib")) / package
        for path in sorted(source.rglob("*.py")):
            if path.stat().st_size <= 24_000:
                (to := folder / package / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    return folder


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Start the workers of data builds and of pools as forks of a process that has imported their modules.

    That saves half a second or more for each. The benchmarks that come with the project are read once for all builds. Tests
    that run the scripts start them as a user's build does, each in a new interpreter.
    """
    import multiprocessing
    from multiprocessing import forkserver

    from kindling import pool
    from kindling.data import workers
    from kindling.data.decontamination import BENCHMARKS, Benchmarks

    read = cache(Benchmarks)
    real = multiprocessing.get_context
    os.chdir(ROOT)  # where the process finds the modules
    modules = ["kindling.data.workers", "kindling.evaluation.check_correctness", "rensa", "tokenizers"]
    real("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        for module in (multiprocessing, pool):
            patch.setattr(module, "get_context", lambda how=None: real("forkserver" if how == "spawn" else how))
        patch.setattr(
            workers, "Benchmarks", lambda names: (read if set(names) <= set(BENCHMARKS) else Benchmarks)(names)
        )
        yield


def tiny_config(corpus: Path, **train) -> Config:
    """A config that trains in a second."""
    return Config(
        preset="demo",
        model=ModelConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=32, dropout=0.1),
        data=DataConfig(
            sources=(SourceConfig(kind="files", path=str(corpus)),),
            val_fraction=0.1,
            test_fraction=0.1,
            workers=1,
            decontaminate=(),
        ),
        train=TrainConfig(
            **{
                "max_steps": 12,
                "batch_size": 4,
                "warmup_steps": 2,
                "eval_every": 6,
                "save_every": 6,
                "log_every": 1,
                "compile": "off",
                "device": "cpu",
                "precision": "fp32",
                **train,
            }
        ),
    )


def tiny_flags(corpus: Path) -> list[str]:
    """The same smallness for a script's command line."""
    return [
        "--model.block-size",
        "32",
        "--model.vocab-size",
        "512",
        "--model.n-layer",
        "2",
        "--model.n-head",
        "2",
        "--model.n-embd",
        "32",
        "--data.sources.0.kind",
        "files",
        "--data.sources.0.path",
        str(corpus),
        "--data.val-fraction",
        "0.1",
        "--data.test-fraction",
        "0.1",
        "--data.workers",
        "1",
        "--train.max-steps",
        "12",
        "--train.eval-every",
        "12",
        "--train.batch-size",
        "4",
        "--train.sample-prompts",
        "import os\n",
        "--train.compile",
        "off",
        "--train.device",
        "cpu",
    ]


def script(
    name: str,
    *args: str,
    cwd: Path,
    timeout_s: float = 300,
    fresh: bool = False,
    env: dict[str, str] | None = None,
    before: str = "",
    given: str = "",
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts, or a module of kindling by its dotted name, in `cwd`; return what it printed.

    The script runs in a fork (see warm.py). With `fresh`, or with an `env`, it runs in a new interpreter, as for a user, which
    takes some seconds longer. `before` is code to run in its process before the script, `given` its input. The time limit only
    ends a script that hangs; it is far longer than a script needs on a busy machine.
    """
    environment = {**(os.environ if env is None else env)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    argv = [str(ROOT / name), *map(str, args)]
    if name in warm.SCRIPTS and not fresh and env is None and sys.platform == "linux":
        return warm.run(argv, cwd, environment, timeout_s, before, given=given.encode())
    if before:
        code = f"import runpy, sys; sys.argv = {argv!r}\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        command = ["-c", code]
    else:
        command = argv if name.endswith(".py") else ["-m", name, *argv[1:]]
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        input=given,
        env=environment,
    )


def started(name: str, *args: str, cwd: Path) -> warm.Process | subprocess.Popen:
    """Start a script as `script` does; it has pipes without a buffer, and leads a group of processes."""
    argv, environment = [str(ROOT / name), *map(str, args)], {**os.environ, "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        return warm.Process(argv, cwd, environment, "import os; os.setsid()")
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env={**environment, "PYTHONUNBUFFERED": ""},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )


def signal_at_step(n: int, *numbers: int) -> str:
    """Return code for `before` that makes the process send itself signals, all at once, when its n-th training step starts."""
    return f"""
import itertools, os, signal
from kindling.training import trainer

launch, steps = trainer.Trainer.launch_step, itertools.count(1)

def launched(self):
    if next(steps) == {n}:
        numbers = {[int(number) for number in numbers]}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # so that all are pending when they are let through
        for number in numbers:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return launch(self)

trainer.Trainer.launch_step = launched
"""


def on_ranks(path: Path, *args, cwd: Path, n: int = 2, timeout_s: float = 600) -> subprocess.CompletedProcess:
    """Run a script on `n` ranks, as torchrun does, but in forks (see warm.py): torchrun and its ranks each import torch."""
    if sys.platform == "linux":
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return warm.run([str(path), *map(str, args)], cwd, environment, timeout_s, ranks=n)
    process = torchrun(path, *args, cwd=cwd, n=n)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(*args, cwd: Path, n: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Start one of the project's scripts on `n` ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        f"--max-restarts={restarts}",
    ]
    process = subprocess.Popen(
        [*command, *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    atexit.register(process.terminate)  # after a failed test; torchrun then ends its ranks
    return process


def assert_one_clear_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script failed with one `error:` line that has the given words, and no traceback."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def make_run(path: Path, corpus: Path, model: ModelConfig | None = None, n_files: int = 6) -> "RunDirectory":
    """Write a run of an untrained model: config, tokenizer, held-out shards and one checkpoint, in a tenth of a second."""
    import numpy as np
    import torch

    from kindling.data.ledger import Ledger
    from kindling.data.shards import ShardWriter, write_manifest
    from kindling.runs.checkpoint import RunDirectory
    from kindling.tokenization.train_tokenizer import train_bpe
    from model import build_model

    cfg = tiny_config(corpus)
    cfg = replace(cfg, model=model or cfg.model)
    data = path.with_name(f"{path.name}-data")
    data.mkdir(parents=True)
    texts = [p.read_text(encoding="utf-8") for p in sorted(corpus.rglob("*.py"))[:n_files]]
    tokenizer = train_bpe(texts, cfg.tokenizer, cfg.model.vocab_size)
    ledger, splits = Ledger(["files <b>"], [1.0]), {}
    for split in ("train", "val", "test"):
        writer = ShardWriter(data, split, np.dtype("<u2"))
        for text in texts:
            ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
            writer.add(ids, len(text.encode()), "python", "files")
            ledger.keep(0, "python", len(text.encode()), (), len(ids), False)
        writer.close()
        splits[split] = writer.info
    ids = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    write_manifest(data, fingerprint="test", dtype="<u2", splits=splits, **ids)
    ledger.write(data)
    (data / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    run = RunDirectory(path)
    run.create(cfg, data)
    torch.manual_seed(0)
    state = {
        "step": 4,
        "position": 16,
        "elapsed_s": 2.0,
        "best": None,
        "environment": {"device": "cpu", "precision": "fp32", "torch": "2.13.0"},
    }
    run.save(4, build_model(cfg.model), state)
    return run
