"""What the tests share: small real inputs, and the scripts run as a user would run them."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # what asks the hub fails at once instead of retrying
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

from config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig  # noqa: E402


def shared_file(name: str) -> Path:
    """Return a large real input, or skip where it is not on this machine."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the data file {name}, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Real Python source of a size for tests: a copy of the standard library's asyncio, email and json."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in ("asyncio", "email", "json"):
        shutil.copytree(
            Path(sysconfig.get_path("stdlib")) / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


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
        "--train.batch-size",
        "4",
        "--train.compile",
        "off",
        "--train.device",
        "cpu",
    ]


def script(name: str, *args: str, cwd: Path, timeout_s: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the project's scripts in `cwd` and return what it printed."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def assert_one_clear_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script failed with one `error:` line that has the given words, and no traceback."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]
