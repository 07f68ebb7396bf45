"""The benchmark of GPUs, at toy size on the CPU, and its arithmetic on numbers made up."""

import json
import os
import subprocess
import sys
import tarfile
import threading

import pytest
import torch
from conftest import ROOT, assert_one_clear_line

sys.path.append(str(ROOT / "benchmarks"))

import child
import gpu
import gpu_checks
import gpu_common
import gpu_profile
import gpu_speed
import gpu_tables

from kindling import device

MACHINE = {"gpu": "H100", "torch": "2.11", "threads": 16, "cores": 16, "instructions": [], "stolen_share": None}


def test_the_share_of_time_without_a_kernel():
    assert gpu_profile.idle_share([]) is None
    assert gpu_profile.idle_share([(0, 10)]) == 0
    assert gpu_profile.idle_share([(0, 4), (2, 5), (3, 4), (8, 10)]) == pytest.approx(0.3)  # 5 to 8


def test_kernels_are_counted_by_kind_and_shares_add_up():
    names = {
        "nvjet_hsh_128x256": "products",
        "sm90_xmma_gemm_bf16": "products",
        "flash_fwd_kernel": "attention",
        "triton_poi_fused_gelu": "compiled",
        "triton_red_fused__to_copy_linear_add": "compiled",
        "void flash_fwd_kernel<cutlass::bfloat16_t>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "vectorized_layer_norm_kernel": "other",
        "multi_tensor_apply_kernel<FusedAdam>": "optimiser and gradients",
        "Memcpy HtoD": "copies",
        "something": "other",
    }
    assert {name: gpu_profile.kind_of(name) for name in names} == names
    found = gpu_profile.shares([("nvjet", 6.0), ("flash", 3.0), ("gemm", 1.0)])
    assert found == {"products": 0.7, "attention": 0.3}


TESTED = """
import pytest
@pytest.mark.parametrize("deterministic", [False])
@pytest.mark.parametrize("precision", ["bf16"])
def test_a(precision, deterministic, record_property):
    record_property("same bits", "True")
    record_property("loss", "2 2")
def test_b():
    assert 1 == 2, "with\\nmore"
def test_c():
    pytest.skip("no GPU")
@pytest.mark.parametrize("which", ["compiled-bf16-demo"])
def test_d(which, record_property):
    record_property("errors", "1e-2 2e-3 3e-2")
"""


def test_the_tests_are_counted_as_they_end(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTED, encoding="utf-8")
    results = tmp_path / "results.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
    ]
    command += ["-p", "conftest", str(tmp_path / "test_it.py"), "--results", str(results)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, env=env).returncode == 1
    found = gpu_checks.counts(results, "exit code 1")
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert list(found["failures"]) == ["test_b"] and "with more assert 1 == 2" in found["failures"]["test_b"]
    killed = gpu_checks.counts(tmp_path / "none.jsonl", "not finished after 9 s")
    assert killed["failed"] == 1 and killed["failures"] == {"all": "not finished after 9 s"}
    table = "\n".join(
        gpu_tables.right({"parts": {"runs": {**found, "seconds": 3.0}, "more": {**killed, "seconds": 9.0}}})
    )
    assert "| compiled-bf16 | 1.0e-02 | 2.0e-03 | 3.0e-02 |" in table
    assert "| bf16, the usual kernels | True | 2 and 2 |" in table and "**more**, all: not finished" in table


def test_a_section_that_fails_is_in_the_results_and_the_next_one_runs(tmp_path, monkeypatch):
    class Fails:
        name = "right"
        prepare = close = staticmethod(lambda *given: None)

        def run(self, plan, limit_s):
            plan.found["right"] = {"parts": {}}
            raise ValueError("broken\nhere")

    class Works(Fails):
        def run(self, plan, limit_s):
            plan.found["decoding"] = {"batches": {}, "precision": "bf16", "limit_s": limit_s}

    saved = []
    plan = gpu_common.Plan("cpu", True, None, tmp_path, tmp_path, ends=float("inf"), save=lambda: saved.append(1))
    gpu.run_sections(plan, {"right": Fails(), "decoding": Works()}, minutes=10)
    assert plan.found["right"]["failed"] == "ValueError: broken here" and "failed" not in plan.found["decoding"]
    assert len(saved) == 2 and gpu_tables.verdict(plan.found) == ["right: ValueError: broken here"]
    text = gpu_tables.markdown({"machine": MACHINE, "seconds": 3, "toy": False, "sections": plan.found})
    assert "Failed: ValueError: broken here" in text and "## decoding" in text


def test_a_section_that_was_cut_off_leaves_a_table():
    found = {"real": {"runs": {"code-50m": {"failed": "training: exit code 1: error: no"}}}}
    text = gpu_tables.markdown({"machine": MACHINE, "seconds": 3, "toy": True, "sections": found})
    assert "Incomplete" in text and gpu_tables.verdict(found) == ["real, code-50m: training: exit code 1: error: no"]


def test_a_process_that_ends_or_hangs_says_so(tmp_path):
    echo = "import sys, json\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)"
    told = child.Child([sys.executable, "-c", echo], tmp_path / "log")
    assert told.ask([1, 2], 60) == {"got": [1, 2]}
    with pytest.raises(child.ChildError, match="no answer within 0 s"):
        told.answer(0.1)
    told.close()
    dead = child.Child([sys.executable, "-c", "raise SystemExit('gone')"], tmp_path / "log2")
    with pytest.raises(child.ChildError, match="ended with code 1: gone"):
        dead.ask(1, 60)
    dead.close()


def test_a_killed_process_whose_own_process_holds_its_output_is_waited_for_no_longer(tmp_path, monkeypatch):
    """As the compiler's processes do: a wait for the answer of a process that had been killed never ended."""
    monkeypatch.setattr(child, "REST_S", 0.05)
    starts = "import subprocess, sys\nsubprocess.Popen(['sleep', '15']{})\nprint('{{}}', flush=True)\nsys.stdin.read()"
    for apart in ("", ", start_new_session=True"):
        hangs = child.Child([sys.executable, "-c", starts.format(apart)], tmp_path / "log")
        assert hangs.answer(60) == {}
        killer = threading.Timer(0.1, hangs.kill)
        killer.start()
        with pytest.raises(child.ChildError, match="ended with code -9"):
            hangs.answer(8)
        killer.join()


ACCELERATOR_ERROR = """Traceback (most recent call last):
  File "gpu_speed.py", line 1384, in to
    return self._apply(convert)
torch.AcceleratorError: CUDA error: out of memory
Search for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
"""


def test_a_reason_is_one_short_line_the_last_error_of_a_traceback():
    assert child.short(ACCELERATOR_ERROR) == "torch.AcceleratorError: CUDA error: out of memory"
    assert child.short("a\n b") == "a b"
    assert child.short("x" * 500 + "\nlast") == "last" and len(child.short("x" * 500)) == 200
    found = {"fast": {"shapes": {"demo": {"failed": ACCELERATOR_ERROR, "sides": {}}}}, "real": {"failed": "y" * 999}}
    assert all(len(text) <= 200 and "\n" not in text for text in gpu_tables.verdict(found))
    text = gpu_tables.markdown({"machine": MACHINE, "seconds": 3, "toy": False, "sections": found})
    assert "- `demo`: failed: torch.AcceleratorError: CUDA error: out of memory\n" in text and "y" * 201 not in text


class Steps:
    """A side whose steps raise `errors`, one after another, and then succeed."""

    runtime = device.Runtime(torch.device("cpu"), "fp32")

    def __init__(self, *errors):
        self.errors, self.tried = list(errors), []

    def step(self, n_rows):
        self.tried.append(n_rows)
        if self.errors:
            raise self.errors.pop(0)


def test_a_size_without_memory_is_tried_again_and_then_half_of_it(monkeypatch):
    monkeypatch.setattr(gpu_speed, "PAUSE_S", 0)
    monkeypatch.setattr(gpu_speed, "TRIES", 2)
    monkeypatch.setattr(device, "release_memory", lambda which: None)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert gpu_speed.first_that_fits(Steps(full), [4, 2]) == (4, "CUDA out of memory. Tried to allocate 2.00 GiB")
    assert gpu_speed.first_that_fits(Steps(*[full] * gpu_speed.TRIES), [4, 2])[0] == 2
    with pytest.raises(SystemExit, match="no micro-batch fits: CUDA out of memory"):
        gpu_speed.first_that_fits(Steps(*[full] * 2 * gpu_speed.TRIES), [4, 2])
    broken = Steps(torch.AcceleratorError("CUDA error: out of memory"))
    with pytest.raises(torch.AcceleratorError):  # only another process can go on
        gpu_speed.first_that_fits(broken, [4, 2])
    assert broken.tried == [4]


def test_a_micro_batch_and_the_processes_at_a_time_grow_with_the_memory_of_the_gpu(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for gibibytes, tokens, processes in ((80, 32_768, 4), (141, 32_768, 7), (16, 8192, 1), (6, 4096, 1)):
        monkeypatch.setattr(device, "gpu_memory_bytes", lambda which, memory=gibibytes: memory * 2**30)
        assert (gpu_speed.tokens_of(Steps.runtime), gpu_speed.at_once("cuda")) == (tokens, processes)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(device, "gpu_memory_bytes", lambda which: 80 * 2**30)
    assert gpu_speed.at_once("cuda") == 2


class Worker:
    """Stands for the process of a shape and side: it fails, is ready, or (None) never gets ready."""

    def __init__(self, outcome):
        self.outcome, self.killed = outcome, threading.Event()

    def answer(self, limit_s=None):
        if self.outcome is None:
            self.killed.wait(60)
            raise child.ChildError("it ended with code -9: ")
        if isinstance(self.outcome, str):
            raise child.ChildError(self.outcome)
        return self.outcome

    def kill(self):
        self.killed.set()


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Start Workers in place of processes, with the outcomes of each shape and side in turn; return what was started."""
    outcomes, started = {}, []

    def start(script, arguments, log, **env):
        started.append(tuple(arguments[:2]))
        left = outcomes.get(started[-1])
        return Worker(left.pop(0) if left else {"rows": 4})

    monkeypatch.setattr(gpu_speed, "start_worker", start)
    monkeypatch.setattr(gpu_speed, "RESTART_S", 0)
    plan = gpu_common.Plan("cpu", True, None, tmp_path, tmp_path, ends=float("inf"))
    return outcomes, started, plan


def test_a_process_without_memory_is_started_anew_and_another_failure_is_not(workers):
    outcomes, started, plan = workers
    full = "it ended with code 1: AcceleratorError: CUDA error: out of memory"
    outcomes["demo", "ours"] = [full, {"rows": 8}, *[full] * 3, "it ended with code 1: ValueError: no", full]
    assert gpu_speed.Speed().start(plan, "demo", "ours")[1] == {"rows": 8} and len(started) == 2
    with pytest.raises(child.ChildError, match="out of memory"):
        gpu_speed.Speed().start(plan, "demo", "ours")
    assert len(started) == 2 + gpu_speed.STARTS
    with pytest.raises(child.ChildError, match="ValueError: no"):
        gpu_speed.Speed().start(plan, "demo", "ours")
    assert len(started) == 3 + gpu_speed.STARTS


def test_shapes_that_are_ready_are_measured_first_and_those_that_are_late_after_them_or_say_so(workers, monkeypatch):
    outcomes, _, plan = workers
    monkeypatch.setattr(gpu_speed, "MANY_CORES", 1)
    monkeypatch.setattr(gpu_speed, "READY_SHARE", 0.02)
    monkeypatch.setattr(gpu_speed, "SHAPES", ("slow", "quick", "never"))
    monkeypatch.setattr(gpu_speed, "at_once", lambda kind: 9)
    section, measured = gpu_speed.Speed(), []
    outcomes |= {("slow", "ours"): [None], ("never", "transformers"): [None, None]}

    def measure(plan, shape, limit_s, out):
        for side in ("transformers", "ours"):
            section.ready[shape, side].result()
        getting_ready = [key for key, future in section.ready.items() if not future.done()]
        measured.append((shape, getting_ready))

    monkeypatch.setattr(section, "measure", measure)
    monkeypatch.setattr(gpu_speed, "line_of", lambda found: "")
    plan.toy = False
    section.run(plan, 10)
    assert measured == [("quick", []), ("slow", [])] and not section.children
    assert plan.found["fast"]["shapes"] == {"quick": {}, "slow": {}, "never": {"failed": gpu_speed.LATE}}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cpu"], "--toy"),
        (["--minutes", "0", "--toy"], "above 0"),
        (["--corpus", "nowhere", "--toy"], "source.jsonl.gz"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit) as ended:
        gpu.parse()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def at_toy_size(out, *flags: str) -> dict:
    """Run the benchmark on the CPU; return the results of its sections."""
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--toy",
        "--minutes",
        "30",
        "--out",
        str(out),
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Toy sizes" in (out / "gpu.md").read_text(encoding="utf-8")
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))["sections"]


@pytest.mark.slow
def test_a_section_alone_runs_at_toy_size(tmp_path):
    found = at_toy_size(tmp_path, "--sections", "decoding")
    assert list(found) == ["decoding"] and set(found["decoding"]["batches"]) == {"1", "3"}
    assert all(batch["times"] > 0 for batch in found["decoding"]["batches"].values())


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path):
    found = at_toy_size(tmp_path)
    assert list(found) == ["right", "fast", "decoding", "real"] and not gpu_tables.verdict(found)
    parts = found["right"]["parts"]
    assert set(parts) == set(gpu_checks.PARTS) and sum(part["passed"] for part in parts.values()) > 60
    assert set(found["fast"]["shapes"]) == set(gpu_speed.TOY_SHAPES)
    assert all(shape["times"] > 0 and len(shape["sides"]) == 2 for shape in found["fast"]["shapes"].values())
    assert set(found["real"]["runs"]) == {"code-50m", "modern-50m", "code-50m-sft"}
    with tarfile.open(tmp_path / "runs.tar.gz") as tar:
        assert {"code-50m/eval.json", "code-50m/samples.jsonl", "code-50m-sft/config.yaml"} <= set(tar.getnames())


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = subprocess.CompletedProcess(sys.argv, gpu.main(), "", capsys.readouterr().err)
    assert_one_clear_line(result, "CUDA", "--toy")
