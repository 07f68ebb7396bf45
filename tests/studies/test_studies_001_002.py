"""Studies 001 and 002: their tables, pictures and texts, from made-up files of runs and logs of steps."""

import itertools
import json
import math
from pathlib import Path

import pytest
from test_study_report import make_run

import autocomplete
from config import ModelConfig
from kindling.plots.figures import Compared, compare_curves
from kindling.plots.inspection import curves_of
from kindling.studies import study_001, study_002
from kindling.studies.inputs import Inputs
from kindling.studies.run_results import Run, said
from kindling.studies.speed import Clock, flops
from kindling.studies.steps import LOGS, Record, Records, Step
from study import study_of


def log(folder: Path, step: str, text: str, code: int | None = 0, command: str = "python x.py --prompt 'a\nb'") -> None:
    """Append a start of a step to its log, and record how it ended."""
    (folder / LOGS).mkdir(exist_ok=True)
    with open(folder / LOGS / f"{step}.log", "a", encoding="utf-8") as file:
        file.write(f"$ {command}\n{text}")
    records = Records(folder)
    records.of[step] = Record(command, 1.0, code)
    records.save()


def steps_of(name: str, folder: Path, scale: float = 1 / 16) -> dict[str, Step]:
    clock = Clock(folder, measure=lambda cfg: (flops(cfg) / 1e9, 0.0), start=lambda: 1.0)
    return {step.name: step for step in study_of(name).plan(scale, clock, Inputs(folder))}


def test_a_log_gives_what_its_newest_start_printed_and_nothing_of_one_that_failed(tmp_path):
    log(tmp_path, "a", "error: no room\n", code=1)
    assert said(tmp_path, "a") == said(tmp_path, "b") == ""
    log(tmp_path, "a", "$ a text\n", code=0)
    assert said(tmp_path, "a") == "$ a text\n"


def test_001_has_the_same_steps_for_the_untrained_model_as_for_the_trained_one(tmp_path):
    steps = steps_of("001", tmp_path)
    own = {kind: [s.script for s in steps.values() if s.name.endswith(kind)] for kind in ("untrained", "-trained")}
    assert (
        own["untrained"] == ["main.py", *own["-trained"]] == ["main.py", "evaluate.py", "visualize.py", "generate.py"]
    )
    a, b = steps["untrained"].arguments, steps["trained"].arguments
    assert "1e-30" in a and "1e-30" not in b
    shapes = [[w for f, w in itertools.pairwise(args) if f.startswith(("--model", "--data"))] for args in (a, b)]
    assert shapes[0] == shapes[1]  # so both have the weights of one seed, and the same data


def test_the_table_of_001_puts_both_runs_beside_a_uniform_guess_and_the_projects_claims(tmp_path):
    for name in study_001.RUNS:
        path = make_run(tmp_path, name)
        results = json.loads((path / "eval.json").read_text("utf-8"))
        results["language_modelling"]["all"] |= {"tokens": 100, "bytes": 400}
        (path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
        (path / "data").mkdir()
        (path / "data" / "manifest.json").write_text('{"splits": {"train": {"tokens": 1024}}}', encoding="utf-8")
        lines = [{"step": 0, "val_loss": 4.0, "val_perplexity": 54.6, "val_bits_per_byte": 2.5, "val_tokens": 100}]
        lines.append({"step": 1, "loss": 3.5, "tokens": 2048})
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    table, curve = study_001.sections(tmp_path)
    rows = {row[0]: row for row in table.rows}
    assert rows["untrained"][2:4] == ["0", "-"] and rows["trained"][2:4] == ["2,048", "3.500"]
    assert rows["trained"][5] == "7.39" and rows["trained"][-1] == "runs/trained/eval.json"
    vocabulary = ModelConfig().vocab_size
    assert rows["a uniform guess"][5] == f"{vocabulary:,.2f}"
    assert float(rows["a uniform guess"][6]) == pytest.approx(math.log2(vocabulary) / 4, abs=1e-3)
    assert rows["project, before"][5:] == ["~8,000", "-", "its page"]
    assert rows["project, after"][2:6] == ["655,360,000", "~1.8", "-", "~25 to 35"]
    assert "the trained run read its training texts 2.0 times (runs/trained/data/manifest.json)" in table.notes
    assert curve.rows == [["0", "4.000", "54.60", "2.500", "100", "runs/trained/metrics.jsonl"]]


def test_001_shows_pictures_of_a_kind_together_and_the_stories_of_both(tmp_path):
    for name in study_001.RUNS:
        for plot in study_001.PLOTS:
            path = tmp_path / "runs" / name / "plots" / plot
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} {plot}".encode())
        log(
            tmp_path,
            f"stories-{name}",
            "--- sample 1, seed 0\nOnce upon a time x\n--- sample 2, seed 1\nOnce upon a time\n",
        )
    found = study_001.pictures(tmp_path)
    assert [p.png.decode().split()[0] for p in found] == ["untrained", "trained"] * 3
    assert len({p.alt for p in found}) == len({p.caption for p in found}) == 6
    assert "runs/trained/plots/attention.png" in found[1].caption and study_001.STORY in found[1].caption
    (before, after) = study_001.texts(tmp_path)
    assert [(s.what, s.prompt, s.text) for s in after.samples] == [
        ("seed 0", "Once upon a time", " x"),
        ("seed 1", "Once upon a time", ""),
    ]
    assert before.note == "from logs/stories-untrained.log"


def test_the_curves_of_one_run_have_its_name():
    curves = curves_of([{"step": 1, "loss": 2.0, "tokens": 10}])
    for names, title in ((["a"], "Training of the run a"), (["a", "b"], "Training of 2 runs")):
        assert compare_curves([Compared(name, curves) for name in names], []).get_suptitle() == title


@pytest.mark.parametrize("name", ["001", "002"])
def test_tables_of_a_study_that_has_run_nothing_have_dashes_and_the_claims(tmp_path, name):
    study = study_of(name)
    for section in study.sections(tmp_path):
        assert all(len(row) == len(section.columns) for row in section.rows)
        ours = [row for row in section.rows if "project" not in row[0]]
        assert all(set(row[1:-1]) <= {"-", "0", "numpy", "c"} for row in ours)
    assert study.texts(tmp_path) == [] and study.pictures(tmp_path) == []


@pytest.mark.parametrize(("n_more", "speed"), [(63, "1,260"), (0, "-")])
def test_speed_and_memory_are_those_that_autocomplete_says(monkeypatch, n_more, speed):
    monkeypatch.setattr(autocomplete, "peak_memory_bytes", lambda: 123_400_000)
    printed = f"  return x\n{autocomplete.stats(n_more, 0.123, 0.05)}\n"
    text, stats = study_002.stats_of(printed)
    assert text == "  return x\n\n" and stats == ("0.12 s", speed, "123 MB")
    assert study_002.stats_of("  return x\n") == ("  return x\n", ("-", "-", "-"))


def test_002_measures_the_projects_own_shape_whatever_size_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(study_002, "find_compiler", lambda: "cc")
    steps = steps_of("002", tmp_path)
    words = steps["full-size"].arguments
    assert not [word for word in words if word.startswith("--model")] and "1e-30" in words
    assert steps["speed-c"].arguments[0] == steps["speed-numpy"].arguments[0] == "runs/full-size/export/int8"
    assert steps["speed-c"].after == ("export-full-size",)
    whole = steps_of("002", tmp_path, 1.0)
    assert "full-size" not in whole and whole["speed-c"].arguments[0] == "runs/autocomplete/export/int8"
    monkeypatch.setattr(study_002, "find_compiler", lambda: None)
    assert "speed-c" not in steps_of("002", tmp_path)


def test_the_tables_of_002_say_which_language_is_missing_and_name_the_files(tmp_path):
    path = make_run(tmp_path, "autocomplete")
    results = json.loads((path / "eval.json").read_text("utf-8"))
    figures = {"bits_per_byte": 1.5, "documents": 7, "bytes": 12_345}
    results["language_modelling"]["by_language"] = {"python": figures, "text": figures}
    (path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    export = path / "export" / "int8"
    export.mkdir(parents=True)
    (export / "weights").write_bytes(bytes(2_500_000))
    log(tmp_path, "complete-c", "void) {\nfirst token after 0.20 s, then 95 tokens/s; 61 MB of memory at most\n")
    languages, runtime = study_002.sections(tmp_path)
    rows = {row[0]: row for row in languages.rows}
    assert list(rows) == ["python", "c", "java", "text", "all"]
    assert rows["python"][1:] == ["7", "12,345", "1.500", "runs/autocomplete/eval.json"] and rows["c"][1:4] == ["-"] * 3
    assert languages.warnings == ["no held-out document of c or java: --code takes rows of all three languages"]
    rows = {row[0]: row for row in runtime.rows}
    parameters = Run(tmp_path, "autocomplete").parameters()
    assert rows["complete-c"][1:] == [parameters, "numpy", "2.5 MB", "0.20 s", "95", "61 MB", "logs/complete-c.log"]
    assert rows["the project"][6:] == ["under 150 MB", "its page"]
    (completions,) = study_002.texts(tmp_path)
    (sample,) = completions.samples
    assert (sample.prompt, sample.text) == (study_002.PROMPTS["c"], "void) {")


def test_without_rows_of_code_the_line_on_the_data_says_what_it_lacks(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert "it has no C and no Java" in study_002.sources(1 / 16, Inputs(tmp_path))
    assert study_002.sources(1 / 16, Inputs(tmp_path, code=tmp_path / "rows.jsonl")) == "rows.jsonl"
    assert "are on no hub" in study_002.sources(1 / 16, Inputs(tmp_path, preset=True))
