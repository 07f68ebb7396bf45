"""The benchmark of fill-in-the-middle: its arithmetic on numbers made up, and its order of work on scripts that only pretend."""

import gzip
import json
import math
import os
import subprocess
import sys
from typing import ClassVar

import pytest
from conftest import ROOT

import evaluate

sys.path.append(str(ROOT / "benchmarks"))

import gpu_common
import infilling
import infilling_tables

MACHINE = {"gpu": "H100", "torch": "2.11", "threads": 16, "cores": 16, "instructions": [], "stolen_share": None}


def run_of(way: str, seed: int, nll: list[float], gaps: dict | None = None) -> dict:
    documents = [[100, x * math.log(2)] for x in nll]
    return {"way": way, "seed": seed, "bits_per_byte": sum(nll) / 100 / len(nll), "documents": documents,
            "infilling_bits_per_byte": None, "gaps": gaps or {}}  # fmt: skip


def gaps_of(*by_document: list[list[float]]) -> dict:
    return {"line": {"ways": {name: {"by_document": rows} for name, rows in zip(("PSM", "no suffix"), by_document)}}}


def test_losses_are_compared_in_pairs_of_the_same_seed_and_document():
    plain = {seed: run_of("plain", seed, [100.0 + n + seed for n in range(8)]) for seed in (0, 1)}
    fim = {seed: run_of("fim", seed, [102.0 + n + seed * 3 + n % 2 for n in range(8)]) for seed in (0, 1)}
    each, mean = infilling_tables.difference([(fim[s], plain[s]) for s in (0, 1)])
    assert each == "+0.0250, +0.0450"  # 2 and 4 bits of 100 bytes, and another of every second document
    assert mean.startswith("+0.0350 [+0.03") and mean.endswith("]")
    shorter = run_of("fim", 0, [1.0] * 7)
    assert infilling_tables.difference([(shorter, plain[0])])[0] == "other documents"


def test_gaps_are_counted_over_all_seeds_and_beside_those_without_the_suffix():
    rows = [[5, 4, 4.5]] * 8, [[5, 1 + n % 2, 2.0] for n in range(8)]
    of = {"fim": {0: run_of("fim", 0, [1.0], gaps_of(*rows)), 1: run_of("fim", 1, [1.0], gaps_of(rows[0], rows[0]))}}
    lines = infilling_tables.gap_table(of)
    assert "| fim | line | PSM | 80.0% [80.0, 80.0] | +25.0 points [+21" in lines[2] and "| 80 | 8 |" in lines[2]
    assert "| fim | line | no suffix | 55.0%" in lines[3] and "|  | 0.650" in lines[3]


def test_lines_that_were_run_are_counted_over_all_seeds():
    def functional(*passed: int) -> dict:
        counts = [[f"HumanEval/{n // 2}/L{n}", 1, c] for n, c in enumerate(passed)]
        return {"counts": counts, "pass_at": {"1": sum(passed) / len(passed)}, "problems": len(passed), "lines_of": 8}

    name, skipped = "humaneval-infill", {"mbpp-infill": {"skipped": "too long"}}
    runs = {
        seed: run_of("fim", seed, [1.0])
        | {
            "functional": {
                name: functional(*[1, 1, 0, seed] * 4),
                f"{name}-no-suffix": functional(*[0] * 16),
                **skipped,
            }
        }
        for seed in (0, 1)
    }
    lines = infilling_tables.line_table({"fim": runs})
    assert lines[2].startswith("| fim | humaneval-infill | 62.5% [") and lines[2].endswith("| 50.0%, 75.0% | 16 |")
    assert lines[3].startswith("| fim | humaneval-infill-no-suffix | 0.0% [")
    assert "- fim, mbpp-infill: too long" in lines and "the suffix less that without: +62.5 points [" in lines[-1]


class Pretended(gpu_common.Command):
    """A script that has ended at once, with the files that it would have written; `bad` names the logs of those that fail."""

    bad: tuple[str, ...] = ()
    began: ClassVar[list[str]] = []

    def __init__(self, argv, log, cwd, env=None):
        self.began.append(log.stem)
        code = "raise SystemExit('error: no')" if log.stem in self.bad else "pass"
        super().__init__(["-S", "-c", code], log, cwd, env)
        kind, _, name = log.stem.partition("-")
        run = cwd / "runs" / (name or kind)
        run.mkdir(parents=True, exist_ok=True)
        step = {"tokens_per_s": 1e6, "elapsed_s": 2.0, "step": 9, "tokens": 99, "skipped_steps": 0}
        evaluated = {"val_loss": 2.0, "val_bits_per_byte": 1.5}
        (run / "metrics.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(evaluated)}\n", encoding="utf-8")
        if kind in ("evaluation", "lines") and log.stem not in self.bad:
            results = {"language_modelling": {"all": {"bits_per_byte": 1.25}}}
            (run / "eval.json").write_text(json.dumps(results), encoding="utf-8")
            (run / "losses.jsonl").write_text('{"bytes": 10, "nll": 20.0}\n', encoding="utf-8")


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the benchmark on scripts that pretend; return what is found, and the markdown."""
    monkeypatch.setattr(infilling, "Command", Pretended)
    monkeypatch.setattr(infilling, "POLL_S", 0.001)

    def measured(*argv: str, bad: tuple[str, ...] = (), seconds: float = 600.0) -> tuple[dict, str]:
        monkeypatch.setattr(Pretended, "bad", bad)
        monkeypatch.setattr(Pretended, "began", [])
        flags = infilling.parse(["--seeds", "0", "1", *argv])
        plan = gpu_common.Plan("cpu", True, None, tmp_path, tmp_path, infilling.time.perf_counter() + seconds)
        measurement = infilling.Measurement(plan, flags)
        measurement.run()
        measurement.close()
        head = {"machine": MACHINE, "settings": vars(flags), "toy": False, "seconds": 9.0}
        return plan.found, infilling_tables.markdown(head | plan.found)

    return measured


def test_each_way_is_built_once_and_each_run_trained_and_evaluated(measure):
    found, text = measure("--tokens", "4096")
    runs = [f"{way}-{seed}" for seed in (0, 1) for way in ("plain", "fim", "lines")]
    scripts = [f"{kind}-{run}" for run in runs for kind in ("training", "evaluation")]
    assert sorted(Pretended.began) == sorted(["build-plain", "build-fim", "build-lines", "trial", *scripts])
    assert {run["bits_per_byte"] for run in found["runs"].values()} == {1.25} and set(found["runs"]) == set(runs)
    assert "4,096 tokens a run in steps of 2,048" in text and "Failed" not in text
    assert "| fim | 1.2500, 1.2500 | 1.2500 | +0.0000, +0.0000 |" in text


def test_what_fails_is_a_line_and_the_next_run_begins(measure):
    found, text = measure("--tokens", "4096", bad=("training-plain-0", "evaluation-fim-0"))
    assert "training: exit code 1: error: no" in found["runs"]["plain-0"]["failed"]
    assert "evaluation: exit code 1" in found["runs"]["fim-0"]["failed"] and found["runs"]["fim-0"]["steps"] == 9
    assert "failed" not in found["runs"]["plain-1"] and "- plain-0: training" in text
    found, text = measure("--tokens", "4096", bad=("build-fim", "trial"))
    assert "building the data" in found["runs"]["fim-1"]["failed"] and "failed" not in found["runs"]["plain-1"]
    assert "failed" in found["trial"]


def test_lines_of_programs_come_last_and_cost_no_other_figure(measure):
    flags = ["--tokens", "4096", "--ways", "fim", "--benchmarks", "problems-infill"]
    found, text = measure(*flags, bad=("lines-fim-1",))
    assert Pretended.began.index("evaluation-fim-0") < Pretended.began.index("lines-fim-0")
    assert "failed" not in found["runs"]["fim-0"] and found["runs"]["fim-1"]["failed"].startswith("lines: exit code 1")
    assert "| fim | 1.2500, 1.2500 |" in text and "## Lines of programs" in text
    measure(*flags[:2], "--benchmarks", "problems-infill")
    first = min(i for i, log in enumerate(Pretended.began) if log.startswith("lines-"))
    assert all(log.startswith("lines-") for log in Pretended.began[first:]) and "plain" not in Pretended.began[first]


def test_a_run_that_was_trained_and_not_evaluated_is_compared_by_its_last_validation(measure):
    _, text = measure("--tokens", "4096", "--ways", "plain", "fim", bad=("evaluation-fim-0", "evaluation-fim-1"))
    assert "| fim | 1.5000, 1.5000 | 1.5000 | +0.2500, +0.2500 | +0.2500 |" in text


def test_the_tokens_follow_from_the_speed_and_the_time(measure):
    found, _ = measure("--seeds", "3", "--ways", "plain")
    assert found["tokens"] == pytest.approx(infilling.SHARE * 600 * 1e6, rel=0.01) and list(found["runs"]) == [
        "plain-3"
    ]


def test_what_has_no_time_says_so(measure):
    found, text = measure("--tokens", "4096", seconds=0.0)
    assert len(found["runs"]) == 6 and "the time was over before it began" in text


def test_the_flags_are_those_of_the_scripts():
    flags = infilling.parse(
        ["--device", "cuda", "--ways", "fim", "--", "--model.block-size", "512", "--train.lr", "6e-4"]
    )
    assert flags.step_tokens == 64 * 512 and flags.more[-1] == "6e-4"
    plan = gpu_common.Plan("cuda", False, None, ROOT, ROOT, 0.0)
    parsed = evaluate.parse(["r", *infilling.Measurement(plan, flags).evaluate_flags("7", "humaneval-infill")])
    assert parsed.infills == 7 and "humaneval-infill-no-suffix" in parsed.eval.n_samples


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "0"], "at least 1"),
        (["--minutes", "0"], "above 0"),
        (["--corpus", "nowhere"], "source.jsonl.gz"),
        (["--", "--train.lrr", "1"], "--train.lr"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        infilling.parse(flags)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it_runs_at_toy_size(corpus, tmp_path):
    with gzip.open(tmp_path / "source.jsonl.gz", "wt", encoding="utf-8") as f:
        for path in sorted(corpus.rglob("*.py")):
            row = {"path": path.name, "language": "python", "content": path.read_text(encoding="utf-8")}
            f.write(json.dumps(row) + "\n")
    command = [sys.executable, "benchmarks/infilling.py", "--toy", "--tokens", "4096", "--seeds", "0"]
    command += ["--corpus", str(tmp_path), "--out", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads((tmp_path / "out/infilling.json").read_text(encoding="utf-8"))
    assert set(found["runs"]) == {f"{way}-0" for way in infilling.WAYS}
    assert found["runs"]["fim-0"]["gaps"]["line"]["gaps"] == 2
    assert "Toy sizes" in (tmp_path / "out/infilling.md").read_text(encoding="utf-8")
