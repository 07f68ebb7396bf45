"""Whole runs on a GPU, by the scripts: stopped and resumed, moved to the CPU and back, fine-tuned, evaluated."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import script, signal_at_step, tiny_flags

from kindling import device
from kindling.runs.metrics import read_metrics

pytestmark = pytest.mark.gpu
STEPS = 12


def run(gpu: str, *command, cwd: Path, before: str = ""):
    """Run a script; on a GPU in a new process, as forks of one cannot use it."""
    return script(*command, cwd=cwd, fresh=gpu != "cpu", before=before)


def flags_of(corpus, kind: str, precision: str, *more: str) -> list[str]:
    flags = tiny_flags(corpus)
    flags[flags.index("--train.device") + 1] = kind
    flags[flags.index("--model.n-embd") + 1] = "128"  # heads of the size that the fused kernels are made for
    return [*flags, "--train.precision", precision, "--model.dropout", "0.1", "--train.eval-every", "6", *more]


def ended(result) -> tuple[str, float]:
    """The digest of the state and the last validation loss that a run printed."""
    assert result.returncode == 0, result.stderr
    digest = re.search(r"state sha256 (\w+)", result.stdout)[1]
    return digest, float(re.search(r"held-out split: loss ([\d.]+)", result.stdout)[1])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_and_resumed_run_ends_as_one_that_was_not(
    gpu, corpus, work, precision, deterministic, record_property
):
    if gpu == "cpu" and precision == "fp16" and deterministic:
        pytest.skip("at toy size one run in fp16 is enough")
    flags = flags_of(corpus, gpu, precision, "--train.deterministic", str(deterministic), "--train.save-every", "100")
    name = f"{precision}-{deterministic}"
    whole = ended(run(gpu, "main.py", *flags, "--name", name, cwd=work))
    stop = signal_at_step(5, signal.SIGTERM)
    stopped = run(gpu, "main.py", *flags, "--name", f"{name}-stopped", cwd=work, before=stop)
    assert stopped.returncode == 143 and "stopped and saved at step 5" in stopped.stdout, stopped.stderr
    resumed = ended(run(gpu, "main.py", *flags, "--name", f"{name}-stopped", cwd=work))
    record_property("same bits", str(resumed[0] == whole[0]))
    record_property("loss", f"{whole[1]} {resumed[1]}")
    assert resumed[1] == pytest.approx(whole[1], rel=1e-3)
    if deterministic or gpu == "cpu":
        assert resumed[0] == whole[0]


@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_checkpoint_goes_from_the_gpu_to_the_cpu_and_back(gpu, corpus, work, first):
    kinds = [gpu, "cpu"] if first == "gpu" else ["cpu", gpu]
    name = f"moved-from-{first}"
    ended(run(gpu, "main.py", *flags_of(corpus, kinds[0], "fp32"), "--name", name, cwd=work))
    losses = []
    for kind in kinds:
        only_losses = ["--eval.benchmarks", "none", "--eval.signatures", "0", "--device", kind]
        result = run(gpu, "evaluate.py", name, *only_losses, cwd=work)
        assert result.returncode == 0, result.stderr
        results = json.loads((work / "runs" / name / "eval.json").read_text(encoding="utf-8"))
        losses.append(results["language_modelling"]["all"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    longer = [*flags_of(corpus, kinds[1], "fp32", "--train.max-steps", str(STEPS + 4)), "--name", name]
    longer.pop(i := longer.index("--train.max-steps"))
    longer.pop(i)  # the first of the two
    result = run(gpu, "main.py", *longer, cwd=work)
    assert result.returncode == 0 and f"resuming at step {STEPS}" in result.stdout, result.stderr
    texts = [
        run(
            gpu,
            "generate.py",
            name,
            "--device",
            kind,
            "--prompt",
            "import ",
            "--greedy",
            "--max-new-tokens",
            "20",
            cwd=work,
        )
        for kind in kinds
    ]
    assert texts[0].returncode == 0 and texts[0].stdout == texts[1].stdout, [text.stderr for text in texts]


@pytest.fixture(scope="module")
def base(gpu, corpus, work) -> str:
    """A run in the best precision, compiled."""
    flags = flags_of(corpus, gpu, "auto")
    flags[flags.index("--train.compile") + 1] = "on" if device.has_compiler(gpu) else "off"
    flags[flags.index("--model.block-size") + 1] = "128"
    result = run(gpu, "main.py", *flags, "--name", "base", cwd=work)
    ended(result)
    assert not [line for line in result.stderr.splitlines() if line.startswith("warning:")], result.stderr
    return "base"


def test_metrics_of_the_gpu_are_whole(work, base):
    lines = [line for line in read_metrics(work / "runs" / base / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["step"] == STEPS and all(line["tokens_per_s"] > 0 for line in lines)


@pytest.mark.parametrize("packing", [True, False])
def test_fine_tuning_works_packed_and_padded(gpu, corpus, work, base, packing):
    rows = [{"instruction": f"Add {i} to x.", "output": f"def f(x):\n    return x + {i}\n"} for i in range(60)]
    pairs = work / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--preset", "alpaca", "--data.sources.0.kind", "jsonl", "--data.sources.0.path", str(pairs)]
    flags += ["--data.val-fraction", "0.2", "--data.test-fraction", "0.1", "--train.held-out-answers", "2"]
    flags += ["--train.device", gpu, "--train.packing", str(packing), "--name", f"sft-{packing}", "--data.workers", "1"]
    result = run(gpu, "sft_train.py", base, *flags, cwd=work)
    assert result.returncode == 0, result.stderr
    before, after = map(float, re.search(r"loss, nats a token +([\d.]+) +([\d.]+)", result.stdout).groups())
    assert after < before
    shutil.copy(work / "runs" / f"sft-{packing}" / "metrics.jsonl", work / f"metrics-{packing}.jsonl")
    other = work / f"metrics-{not packing}.jsonl"
    if other.exists():  # the same examples before the first step, whether packed or padded
        losses = [read_metrics(work / f"metrics-{way}.jsonl")[0]["val_loss"] for way in (True, False)]
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_trained_run_is_evaluated_without_a_sandbox_and_graded_later(gpu, work, base):
    little = [
        "--eval.benchmarks",
        "problems:2",
        "--eval.limit",
        "3",
        "--eval.max-new-tokens",
        "16",
        "--eval.signatures",
        "3",
    ]
    result = run(gpu, "evaluate.py", base, *little, "--device", gpu, "--sandbox", "later", cwd=work)
    assert result.returncode == 0, result.stderr
    samples = (work / "runs" / base / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 9
