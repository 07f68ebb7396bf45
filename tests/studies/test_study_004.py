"""Study 004: its plan, the texts that no stage trains on, and the matrix of what a stage brought and took."""

import gzip
import importlib
import json
import random
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config import SourceConfig
from kindling.cli import parse_cli
from kindling.config_io import from_yaml
from kindling.data.build import prepare
from kindling.data.decontamination import Benchmarks
from kindling.data.duplicates import word_hashes
from kindling.data.ledger import Ledger
from kindling.data.shards import SPLITS, TokenDataset
from kindling.data.sources import local_files
from kindling.errors import KindlingError
from kindling.evaluation.results_file import FORMAT
from kindling.plots.stage_figures import MeasureRow, stage_figure
from kindling.studies import held_out
from kindling.studies import study_004 as study
from kindling.studies.inputs import Inputs, prose_of_docstrings, sums
from kindling.studies.measures import heat_map
from kindling.studies.run_results import Run
from kindling.studies.sizes import flags_of
from kindling.studies.speed import Clock, flops
from kindling.studies.steps import StudyError
from kindling.tokenization.tokenizer import load_json
from presets import preset

WORDS = ["".join(random.Random(n).choices("abcdefghij", k=5)) for n in range(500)]


@pytest.fixture
def clock(tmp_path):
    """A machine of 1e9 FLOP/s, on which nothing is really measured."""
    return Clock(tmp_path, measure=lambda cfg: (flops(cfg) / 1e9, 0.0), start=lambda: 1.0)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A machine whose Python is eight packages, two of them with an h."""
    root = tmp_path / "python"
    for name in ("ab", "cd", "ef", "gh", "html", "http", "ij", "xh"):
        for part in range(6):
            (root / name).mkdir(parents=True, exist_ok=True)
            words = " ".join(random.Random(f"{name}{part}").choices(WORDS, k=60))
            docstring = f"Return what {words[:90]} is.\n\n    {words}\n    "
            function = f'def of_{name}_{part}(a):\n    """{docstring}"""\n    return a + {part}\n'
            (root / name / f"part{part}.py").write_text(f"import os\n\n\n{function}", encoding="utf-8")
    none = str(tmp_path / "none")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root), "purelib": none, "platlib": none})
    return root


def rows_of(folder: Path, domain: str) -> list[dict]:
    lines = (folder / "heldout" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def text_of_rows(path: Path, n: int) -> Path:
    texts = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(n)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_one_before_and_is_measured(clock, tmp_path):
    steps = {step.name: step for step in study.plan(1 / 16, clock, Inputs(tmp_path))}
    for stage in (2, 3, 4):
        assert f"runs/stage-{stage - 1}" in steps[f"stage-{stage}"].arguments
        assert f"stage-{stage - 1}" in steps[f"stage-{stage}"].after
    for stage in study.STAGES:
        measured = steps[f"evaluate-stage-{stage}"]
        assert measured.after == (f"stage-{stage}",) and set(held_out.FILES) <= set(measured.arguments)
        assert {"problems:5", "humaneval:1", "mbpp:1"} <= set(measured.arguments)
    assert steps["stage-4"].script == "sft_train.py"


def test_a_file_of_sources_and_flags_give_a_stage_s_config_back(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = study.configs(1 / 16, Inputs(tmp_path))[3]
    assert [source.weight for source in cfg.data.sources] == [65, 35]
    study.write_sources(3, cfg, tmp_path)
    module = importlib.import_module("main")
    assert parse_cli(module.Flags, module.__doc__, list(flags_of(cfg, study.sources_file(3)))).config == cfg
    assert from_yaml(study.sources_yaml(cfg)).data.sources == cfg.data.sources


def test_learning_rates_keep_the_ratio_of_the_stages(tmp_path):
    rates = [cfg.train.lr for cfg in study.configs(1 / 16, Inputs(tmp_path)).values()]
    seeds = [preset(f"smallcoder-{stage}").train.lr for stage in study.STAGES]
    assert [rate / rates[0] for rate in rates] == pytest.approx([lr / seeds[0] for lr in seeds], rel=0.02)


@pytest.mark.parametrize("hub", [False, True])
def test_every_training_leaves_out_what_has_words_of_a_held_out_text(clock, tmp_path, hub):
    for step in study.plan(1.0 if hub else 1 / 16, clock, Inputs(tmp_path, preset=hub)):
        if step.script != "evaluate.py":
            after = step.arguments[step.arguments.index("--data.decontaminate") + 1 :]
            assert after[: 2 + len(held_out.FILES)] == ("humaneval", "mbpp", *held_out.FILES)


@pytest.mark.parametrize("given", ["", "rows.jsonl", "rows.jsonl.gz", "folder"])
def test_few_instructions_are_read_a_few_times_only(tmp_path, given):
    """Read 40 times, they were learnt by heart, and every other measure was lost."""
    rows, plain = tmp_path / (given or "none"), tmp_path / ("folder/a.jsonl" if given == "folder" else "rows.jsonl")
    plain.parent.mkdir(exist_ok=True)
    plain.write_text(1000 * (json.dumps({"instruction": "Add.", "output": "x" * 696}) + "\n"), encoding="utf-8")
    if given.endswith(".gz"):
        rows.write_bytes(gzip.compress(plain.read_bytes()))
    cfg = study.configs(1 / 8, Inputs(tmp_path, instructions=rows if given else None))[4]
    a_pass = 700_000 / 3.5 if given else 30_000_000 * 0.02
    assert cfg.tokens == pytest.approx(4 * a_pass, rel=0.02) and cfg.train.warmup_steps <= cfg.train.max_steps / 10
    assert preset("smallcoder-4").tokens > 1000 * cfg.tokens
    whole = study.configs(1 / 32, Inputs(tmp_path))[4]  # a smaller size reads no more than its ratio
    assert whole.tokens < 4 * 30_000_000 * 0.02


def test_the_harness_is_asked_for_the_tasks_whose_files_are_there_and_nothing_waits_for_it(clock, tmp_path):
    (tmp_path / "gsm8k.jsonl").touch()
    (tmp_path / "arc_easy.jsonl").touch()
    steps = study.plan(1 / 16, clock, Inputs(tmp_path, harness_data=tmp_path))
    asked = [step for step in steps if step.name.startswith("harness-")]
    assert [step.name for step in asked] == [f"harness-stage-{stage}" for stage in study.STAGES]
    assert all("arc_easy,gsm8k" in step.arguments and str(tmp_path) in step.arguments for step in asked)
    assert not {name for step in steps for name in step.after} & {step.name for step in asked}
    assert not any("--harness" in step.arguments for step in study.plan(1 / 16, clock, Inputs(tmp_path)))
    with pytest.raises(StudyError, match="--harness-data must be a folder"):
        study.plan(1 / 16, clock, Inputs(tmp_path, harness_data=tmp_path / "none"))


# -- the held-out texts -----------------------------------------------------------------------------------------------


def test_no_source_reads_the_packages_that_held_out_texts_are_from(python, tmp_path):
    inputs = Inputs(tmp_path)
    held_out.write_held_out(inputs)
    ours = {file.path for file in local_files(SourceConfig(globs=held_out.OURS))}
    trained = held_out.trained(inputs)
    for source in (trained.code_source(10**6).source, trained.instructions_source(10**6).source):
        read = {file.path for file in local_files(source)}
        assert len(ours) == 12 and len(read) == 36 and not ours & read
    assert not set(prose_of_docstrings([], held_out.TRAINED)) & {row["text"] for row in rows_of(tmp_path, "prose")}
    for domain in ("prose", "python", "questions", "instructions"):
        texts = [row["text"] for row in rows_of(tmp_path, domain)]
        assert len(texts) in (6, 12) and all("of_ht" in text or domain == "prose" for text in texts)
    questions, instructions = (rows_of(tmp_path, domain) for domain in ("questions", "instructions"))
    assert questions[0]["text"].startswith("Question: ") and instructions[0]["text"].startswith("User: Return what")
    about = held_out.read_about(tmp_path)
    assert list(about) == list(held_out.DOMAINS) and about["prose"]["documents"] == 12


def test_a_sum_is_either_held_out_or_not():
    def lines(held: bool) -> set[str]:
        return {line for _, text in zip(range(500), sums(held, held_out=held)) for line in text.splitlines()}

    assert len(lines(True)) > 2000 and not lines(True) & lines(False)


@pytest.mark.usefixtures("forked_workers")
def test_a_build_drops_what_was_held_out_of_a_user_s_file(python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = Inputs(tmp_path, prose=text_of_rows(tmp_path / "rows.jsonl", 300))
    held_out.write_held_out(inputs)
    ours = [row["text"] for row in rows_of(tmp_path, "prose")]
    assert 6 <= len(ours) <= 40
    cfg = study.configs(1 / 32, inputs)[1]
    cfg = replace(
        cfg, model=replace(cfg.model, vocab_size=300, block_size=32), data=replace(cfg.data, near_dedup=None, workers=1)
    )
    folder = prepare(cfg)
    assert Ledger.read(folder).rows[0, "english"]["dropped"]["benchmark"][0] == len(ours)
    tokenizer = load_json(folder / "tokenizer.json", cfg.tokenizer)
    built = "".join(tokenizer.decode(data.read(0, len(data))) for data in (TokenDataset(folder, s) for s in SPLITS))
    assert sum(text in built for text in ours) == 0
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line)["text"] in built for line in lines) == 300 - len(ours)


def test_of_a_user_s_file_only_what_a_build_finds_again_is_held_out(python, tmp_path):
    rows = tmp_path / "sums.jsonl"
    texts = [
        f"{n} + {n} = {2 * n}. " * 20 if n % 2 else " ".join(random.Random(n).choices(WORDS, k=30)) for n in range(600)
    ]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    held_out.write_held_out(Inputs(tmp_path, mathematics=rows))
    found = [row["text"] for row in rows_of(tmp_path, "mathematics")]
    assert len(found) >= 6 and not any("=" in text for text in found)
    benchmarks = Benchmarks((str(tmp_path / "heldout/mathematics.jsonl"),))
    assert all(benchmarks.find(text, word_hashes(text)) for text in found)


def test_a_user_s_instructions_are_found_again_though_a_template_is_between_their_parts(python, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    words = [random.Random(n).choices(WORDS, k=16) for n in range(300)]
    made = [{"instruction": " ".join(w[:8]), "input": "", "output": " ".join(w[8:])} for w in words]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    held_out.write_held_out(Inputs(tmp_path, instructions=rows))
    found = [row["text"] for row in rows_of(tmp_path, "instructions")]
    assert len(found) >= 6 and all("\nAssistant:" in text for text in found)
    benchmarks = Benchmarks((str(tmp_path / "heldout/instructions.jsonl"),))
    plain = [text.removeprefix("User: ").replace("\nAssistant:", "\n") for text in found]  # as a build sees them
    assert all(benchmarks.find(text, word_hashes(text)) for text in plain)


def test_a_file_of_few_documents_is_refused_and_written_texts_are_kept(python, tmp_path):
    few = Inputs(tmp_path / "a", prose=text_of_rows(tmp_path / "few.jsonl", 20))
    with pytest.raises(KindlingError, match=r"few\.jsonl must have at least 120 documents"):
        held_out.write_held_out(few)
    held_out.write_held_out(Inputs(tmp_path / "b"))
    (tmp_path / "b/heldout/prose.jsonl").write_text('{"text": "mine"}\n', encoding="utf-8")
    held_out.write_held_out(Inputs(tmp_path / "b"))
    assert rows_of(tmp_path / "b", "prose") == [{"text": "mine"}]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "heldout").touch()
    with pytest.raises(StudyError, match="must be writable"):
        study.prepare(1 / 32, Inputs(tmp_path))


# -- the tables and the picture ---------------------------------------------------------------------------------------


def losses_of(factor: float) -> dict:
    """Figures of 20 documents or problems, of about `factor` bits a byte."""
    lines = [[f"{i}", 100, 100 * np.log(2) * factor * (1 + 0.01 * (i % 5))] for i in range(20)]
    return {"bits_per_byte": sum(line[2] for line in lines) / np.log(2) / 2000, "losses": lines}


def write_stage(folder: Path, stage: int, prose: float, passed: int, more: dict | None = None) -> None:
    path = folder / f"runs/stage-{stage}"
    path.mkdir(parents=True)
    text, counts = losses_of(prose), [[f"H/{i}", 1, int(i < passed)] for i in range(164)]
    results = {
        "format": FORMAT, "weights_sha256": "0" * 64,
        "texts": {"heldout/prose.jsonl": {"all": {"bits_per_byte": text["bits_per_byte"]}, "losses": text["losses"]}},
        "gold": {"problems": losses_of(prose / 2)},
        "functional": {"humaneval": {"pass_at": {"1": passed / 164}, "counts": counts},
                       "mbpp": {"skipped": "its prompts are too long"}},
    }  # fmt: skip
    (path / "eval.json").write_text(json.dumps(results | (more or {})), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A study of which three stages were measured: prose gets worse in the second, HumanEval better in the third."""
    for stage, prose, passed in ((1, 2.0, 0), (2, 3.0, 0), (3, 3.0, 30)):
        write_stage(tmp_path, stage, prose, passed)
    return tmp_path


def test_the_matrix_has_each_stage_beside_the_seed_s_figures(folder):
    table = study.sections(folder)[0]
    rows = {row[0]: row for row in table.rows}
    prose = rows["prose"]
    assert [cell.split(" ")[0] for cell in prose[1:5]] == ["2.040", "3.060", "3.060", "-"] and "[" in prose[1]
    assert prose[5] == "runs/stage-*/eval.json"
    assert rows["pass@1 HumanEval"][3].startswith("18.3% [")
    assert rows["the project: pass@1 HumanEval"][1:] == ["-", "-", "-", "27.4%", "its page"]
    assert rows["the project: Wikitext"][1:] == ["-", "-", "35.4", "167.6", "its page"]
    assert "Wikitext" not in rows and "Python" not in rows
    notes = "\n".join(table.notes)
    assert "not there: Python, mathematics," in notes and "--harness-data" in notes
    assert "stage-1, mbpp: its prompts are too long" in notes


def test_a_difference_is_paired_to_the_stage_before_and_has_a_star_where_its_interval_excludes_zero(folder):
    rows = {row[0]: row for row in study.sections(folder)[1].rows}
    second, third, fourth = rows["prose"][1:4]
    assert second.startswith("+1.020 [+1.0") and second.endswith("*")
    assert (third, fourth) == ("+0.000", "-")  # no document differs, so there is no interval
    assert rows["pass@1 HumanEval"][2].startswith("+18.3 [") and rows["pass@1 HumanEval"][2].endswith("*")
    write_stage(folder, 4, 2.0, 30, {"texts": {"heldout/prose.jsonl": {"all": {"bits_per_byte": 2.0}}}})
    rows = {row[0]: row for row in study.sections(folder)[1].rows}
    assert rows["prose"][3] == "-"  # of other documents: there is nothing to pair


def test_the_tables_say_which_texts_were_held_out_and_what_keeps_them_out(python, folder):
    held_out.write_held_out(Inputs(folder))
    tables = {section.heading: section for section in study.sections(folder)}
    rows = tables["Texts that were held out of all stages"].rows
    assert [row[0] for row in rows] == ["prose", "Python", "mathematics", "questions", "instructions"]
    assert rows[1][2] == "no source reads these packages" and rows[1][-1] == "heldout/python.jsonl"
    assert "13 words in a row" in tables["Texts that were held out of all stages"].notes[0]


def test_tasks_of_the_harness_are_in_the_matrix_where_they_were_measured(folder):
    task = {"metric": "word_perplexity", "value": 100.0, "stderr": None, "n": 20, "shots": 0}
    write_stage(folder, 4, 2.0, 30, {"harness": {"wikitext": task}})
    rows = {row[0]: row for row in study.sections(folder)[0].rows}
    assert rows["Wikitext"][4] == "100.0000"


def test_the_picture_says_in_words_what_was_gained_and_lost(folder):
    (found,) = study.pictures(folder)
    assert found.png.startswith(b"\x89PNG") and found.alt.startswith("A grid") and "runs/stage-*" in found.caption
    assert "prose, bits per byte: 2.040, 3.060, 3.060, -" in found.alt
    assert study.pictures(folder / "empty") == []


def test_a_cell_of_the_picture_has_value_change_and_star(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "kindling.studies.measures.stage_figure", lambda rows, *a: drawn.extend(rows) or stage_figure(rows, *a)
    )
    runs = [Run(folder, f"stage-{stage}") for stage in (1, 2, 3)]
    heat_map(runs, study.MEASURES, [("a",), ("b",), ("c",)], "title", "file")
    rows = {row.name: row for row in drawn}
    assert rows["prose, bits per byte"].changes == ["", "+1.020 lost *", "+0.000 no change"]
    assert rows["prose, bits per byte"].gains[1:] == pytest.approx([-0.5, 0.0])
    assert rows["pass@1 HumanEval, share"].changes[2] == "+18.3 gained *"
    assert rows["pass@1 HumanEval, share"].gains[2] == pytest.approx(30 / 164)


def test_every_cell_of_a_drawing_is_written_in_words(folder):
    rows = [MeasureRow("a $b", ["1", "2"], ["", "+1 lost *"], [np.nan, -2.0])]
    figure = stage_figure(rows, [("x", "y"), ("z",)], "title")
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"1", "2", "+1 lost *"} <= said
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a $b"]
