"""Tables and the page of a study, from made-up files of runs."""

import json
from pathlib import Path

import conftest
import pytest

from config import Config, ModelConfig
from kindling.config_io import to_yaml
from kindling.evaluation.results_file import FORMAT
from kindling.files import with_checksum, write_json
from kindling.studies import report
from kindling.studies.report import times_section, write_report
from kindling.studies.run_results import Run, spikes
from kindling.studies.steps import Record, Records, Step
from kindling.tables import as_text
from study import SEEDS, study_of


def make_run(folder: Path, name: str, fall: float = 0.5) -> Path:
    """Write the files that a trained and evaluated run has."""
    path = folder / "runs" / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(Config(model=ModelConfig(n_layer=1))), encoding="utf-8")
    lines = [
        {"step": 0, "val_loss": 4.0, "val_tokens": 100},
        {"step": 1, "loss": 3.5, "tokens": 2048, "grad_norm": 1.0},
    ]
    lines += [{"step": 2, "val_loss": 4.0 * fall, "val_tokens": 100}, {"step": 2, "val_loss": 1.0, "val_tokens": 999}]
    for line in lines:
        line |= {"val_bits_per_byte": line["val_loss"] / 2, "val_perplexity": 9.0} if "val_loss" in line else {}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    figures = {"all": {"loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.234}}
    code = {"pass_at": {"1": 0.25}, "counts": [[str(n), 4, 1] for n in range(8)]}
    results = {"format": FORMAT, "language_modelling": figures, "functional": {"problems": code}}
    (path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    return path


def test_a_figure_comes_from_the_file_of_its_run(tmp_path):
    make_run(tmp_path, "a", fall=0.56)
    run = Run(tmp_path, "a")
    assert (run.perplexity(), run.bits(), run.tokens()) == ("7.39", "1.234", "2,048")
    assert run.passed("problems", "1").startswith("25.0%")
    assert run.fall() == "44.0%"  # of the same texts: the last validation read others
    assert run.parameters() == f"{ModelConfig(n_layer=1).n_parameters:,}"


def test_what_is_not_there_is_a_dash(tmp_path):
    run = Run(tmp_path, "none")
    cells = [run.perplexity(), run.bits(), run.gold(), run.syntax("passes"), run.passed("problems", "1"), run.fall()]
    assert {*cells, run.parameters(), run.tokens(), run.task("arc_easy"), run.text_bits("x")} == {"-"}


def test_spikes_are_counted_over_the_median_before():
    steady = [{"loss": 2.0, "grad_norm": 1.0}] * 30
    assert spikes(steady) == (0, 1.0, 1.0)
    count, worst, norm = spikes([*steady, {"loss": 5.0, "grad_norm": 8.0}, *steady])
    assert (count, worst, norm) == (1, 2.5, 8.0)
    assert spikes([])[0] == 0


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("trained", [False, True])
def test_the_tables_of_a_study_can_be_shown_whatever_has_failed(name, trained, tmp_path):
    study = study_of(name)
    for run in {run for runs in study.runs_by_plot(tmp_path).values() for run in runs} if trained else ():
        make_run(tmp_path, run)
    text = as_text([], study.sections(tmp_path))
    assert text == as_text([], study.sections(tmp_path)) and "-" in text


def test_the_tables_of_000_put_the_claim_beside_ours_and_name_the_files(tmp_path):
    make_run(tmp_path, "sft-3-150m", fall=0.7)
    tables = {section.heading: section for section in study_of("000").sections(tmp_path)}
    rows = {row[0]: row for row in tables["Fall of the loss on responses in fine-tuning"].rows}
    assert rows["sft-3-150m"][3:] == ["30.0%", "44%", "runs/sft-3-150m/metrics.jsonl"]
    assert rows["sft-3-50m"][3] == "-"
    losses = {row[0]: row for row in tables["Losses on held-out documents"].rows}
    assert losses["sft-3-150m"][3] == "7.39" and losses["sft-3-150m"][-1] == "runs/sft-3-150m/eval.json"
    for section in tables.values():
        assert all(row[-1].startswith("runs/") for row in section.rows)


STEP = Step("base-50m", "main.py", ("--preset", "code-50m"), "runs/base-50m/config.yaml", (), 60.0)


def test_samples_that_are_shown_have_the_first_and_the_last():
    assert report.evenly([1, 2, 3], 8) == [1, 2, 3] and report.evenly([], 8) == []
    shown = report.evenly(list(range(20)), 8)
    assert len(shown) == 8 and (shown[0], shown[-1]) == (0, 19) and shown == sorted(set(shown))


def test_responses_are_compared_before_and_after_on_the_same_texts(tmp_path):
    make_run(tmp_path, "sft-1-50m", fall=0.5)
    run = Run(tmp_path, "sft-1-50m")
    assert run.first_and_last("val_bits_per_byte") == ("2.000", "1.000")  # the last line is of other texts
    assert Run(tmp_path, "none").first_and_last("val_loss") == ("-", "-")


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (1, "failed"), (None, "stopped")])
def test_the_table_of_steps_says_how_each_ended_and_how_long_it_took(tmp_path, code, state):
    make_run(tmp_path, STEP.name)
    records = Records(tmp_path)
    records.of[STEP.name] = Record(STEP.command, 90.0, code)
    records.save()
    assert times_section([STEP], tmp_path).rows[0] == ["base-50m", "main.py", "", state, "60 s", "1.5 min"]


def test_the_page_holds_tables_curves_and_commands(tmp_path):
    make_run(tmp_path, STEP.name)
    written = write_report(study_of("000"), tmp_path, [STEP], [("machine", "a <machine>")])
    assert [path.name for path in written] == ["table.md", "report.html", "plots"]
    html, table = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "table.md"))
    assert "## Losses on held-out documents" in table and "runs/base-50m/eval.json" in table
    assert "a &lt;machine&gt;" in html and "python main.py --preset code-50m" in html and "data:image/png" in html
    assert len(list((tmp_path / "plots").glob("*.png"))) == 1


@pytest.mark.parametrize("gone", [False, True])
def test_bits_per_byte_of_two_tokenizers_are_on_one_axis_and_their_losses_are_not(tmp_path, corpus, monkeypatch, gone):
    drawn, real = [], report.compare_curves
    monkeypatch.setattr(report, "compare_curves", lambda *a, **kw: drawn.append((a, real(*a, **kw))) or drawn[-1][1])
    names = study_of("003").runs_by_plot(tmp_path)["the tokenizers"]
    for n, name in enumerate(names):
        run = conftest.make_run(tmp_path / "runs" / name, corpus)
        lines = [{"step": 2, "loss": 5.5, "tokens": 256}] * 3 + [
            {"step": 4, "val_loss": 5.0, "val_bits_per_byte": 2.5, "val_tokens": (n + 1) * 64}
        ] * 3
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        manifest = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))
        manifest["tokenizer_sha256"] = str(n) * 64
        write_json(run.data / "manifest.json", with_checksum(manifest))
        if gone and n:
            (run.data / "manifest.json").unlink()
    assert len(report.curves(study_of("003"), tmp_path)) == 1
    ((_, notes), figure) = drawn[0]
    lines_of = {ax.get_title(loc="left"): len(ax.lines) for ax in figure.axes}
    apart = ["Training loss", "Validation loss", *(["Validation bits per byte"] if gone else [])]
    expected = {f"{measure} of {name}": 1 for measure in apart for name in names}
    assert lines_of == expected | ({} if gone else {"Validation bits per byte": 2})
    said = " ".join(notes)
    assert ("bits per byte does" in said and "different parts" in said) is not gone
