"""What the tests share: small real inputs, and the scripts run as a user would run them."""

import atexit
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kindling.runs.checkpoint import RunDirectory

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
    """Run one of the project's scripts, or a module of kindling by its dotted name, in `cwd`; return what it printed."""
    program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    kwargs["env"] = {**kwargs.get("env", os.environ), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *program, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


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
    atexit.register(process.terminate)  # of a test that failed; it ends its ranks
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
    from kindling.tokenization.tokenizer import train_bpe
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
