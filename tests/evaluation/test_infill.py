"""Gaps in held-out files: which they are, how a model is asked to fill them, and what is counted."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import script, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import bigram_model

from config import ModelConfig, TokenizerConfig
from kindling.data.build import prepare
from kindling.evaluation.infill import LINE, LONGEST, PER_DOCUMENT, SPAN, Filler, Gap, edit_similarity, gaps, infill
from kindling.evaluation.report import table
from kindling.runs.checkpoint import RunDirectory
from kindling.tokenization.infilling import encode_infill
from kindling.tokenization.train_tokenizer import train_bpe
from model import build_model

BYTES = train_bpe(["no merges"], TokenizerConfig(), 261)
TEXT = "import os\n\n\ndef first(items):\n    return items[0]\n\n\nlast_of_all = 1\n"


def test_gaps_are_whole_lines_and_spans_of_their_documents():
    texts = [TEXT, TEXT.replace("first", "second") * 3, "", "x", TEXT * 20]
    found = list(gaps(texts, 100))
    assert found == list(gaps(texts, 100)), "drawn by the content alone"
    for gap in found:
        assert gap.prefix + gap.middle + gap.suffix == texts[gap.document] and 0 < len(gap.middle) <= LONGEST
        if gap.kind == LINE:
            assert gap.prefix.endswith("\n") and gap.suffix.startswith("\n") and "\n" not in gap.middle
            assert len(gap.middle.strip()) >= 8
    kinds = [(gap.document, gap.kind) for gap in found]
    assert {n: kinds.count((n, LINE)) for n in range(5)} == {0: 3, 1: PER_DOCUMENT, 2: 0, 3: 0, 4: PER_DOCUMENT}
    assert kinds.count((4, SPAN)) == PER_DOCUMENT
    few = list(gaps(texts, 4))
    assert [gap.kind for gap in few].count(LINE) == [gap.kind for gap in few].count(SPAN) == 4


@given(st.text("ab\n", max_size=6), st.text("ab\n", max_size=6))
def test_the_similarity_is_one_minus_the_edit_distance_over_the_longer_length(a, b):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_similarity(a, b) == pytest.approx(1 - distance(len(a), len(b)) / max(len(a), len(b), 1))


@pytest.fixture(scope="module")
def model():
    """After <fim_middle> it writes "ab" and ends; after a space it writes "ab" and a newline."""
    model = bigram_model(BYTES, {"a": "b", "b": None, " ": "a", "\n": "a"}, 64)
    (a,) = BYTES.encode("a")
    with torch.no_grad():
        model.head.weight[a, BYTES.fim.middle] = 1000.0
    return model


def test_exact_matches_are_counted_for_each_way_and_document(model):
    asked = [
        Gap(0, LINE, "x\n", "ab", "\ny"),
        Gap(0, LINE, "x\n", "ac", "\ny"),
        Gap(3, LINE, "x-", "ab", "\ny"),  # without the suffix, after "-" this model writes something else
    ]
    done = []
    found = infill(model, BYTES, asked, done.append)
    assert sum(done) == 3 and found[LINE]["gaps"] == 3
    ways = found[LINE]["ways"]
    assert ways["PSM"] == {
        "exact": 2 / 3,
        "similarity": pytest.approx(2.5 / 3),
        "by_document": [[2, 1, 1.5], [1, 1, 1.0]],
    }
    assert ways["SPM"]["by_document"][0] == [2, 1, 1.5]  # the prefix ends in a newline, after which it writes the same
    assert ways["no suffix"]["by_document"][0] == [2, 1, 1.5] and ways["no suffix"]["by_document"][1][1] == 0


def test_with_the_suffix_first_the_indentation_may_be_one_token_with_the_newline_before_it():
    tokenizer = train_bpe(["def f():\n    return 1\n" * 9], TokenizerConfig(), 300)
    joined = tokenizer.encode("\n    return")[0]  # a newline and three spaces
    model = build_model(ModelConfig(64, 300, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.wte.weight.zero_()
        model.norm_f.bias.fill_(1.0)
        model.head.weight[joined] = 1.0  # whatever is read, this is what the model would write next
    texts = Filler(model, tokenizer).fill_all([Gap(0, SPAN, "def f():\n", "x", "\ny")], "SPM")
    assert texts[0].startswith("   \n   \n")


def test_a_span_that_is_filled_without_a_suffix_is_cut_to_its_length(model):
    gap = Gap(0, SPAN, "x ", "a", "b")
    filler = Filler(model, BYTES)
    assert [filler.fill_all([gap], way) for way in ("PSM", "no suffix")] == [["ab"], ["a"]]


def test_gaps_that_are_filled_together_get_what_they_get_alone():
    torch.manual_seed(0)
    shape = ModelConfig(64, BYTES.vocab_size, n_layer=1, n_head=2, n_embd=16, init_std=0.3)
    filler = Filler(build_model(shape).eval(), BYTES)
    asked = list(gaps([TEXT, TEXT[9:] * 3], 5))
    assert {gap.kind for gap in asked} == {LINE, SPAN}
    for way in ("PSM", "SPM", "no suffix"):
        together = filler.fill_all(asked, way)
        assert together == [filler.fill_all([gap], way)[0] for gap in asked] and len(set(together)) > 2
        assert not any("\n" in text for gap, text in zip(asked, together) if gap.kind == LINE)


def test_a_prompt_holds_what_is_nearest_to_the_gap_and_leaves_room(model):
    filler = Filler(model, BYTES)
    room = 64 - filler.n_new - 3
    for spm in (False, True):
        short = Gap(0, LINE, "before\n", "m", "\nafter")
        assert filler.prompt(short, spm) == encode_infill(BYTES, short.prefix, short.suffix, spm)
        for prefix, suffix, n in (("<" * 99 + "p", "s" + ">" * 99, int(0.7 * room)), ("p", "s" + ">" * 99, 1)):
            ids = filler.prompt(Gap(0, LINE, prefix, "m", suffix), spm)
            assert len(ids) == 64 - filler.n_new
            assert ids == encode_infill(BYTES, prefix[-n:], suffix[: room - n], spm)
    assert len(filler.prompt(Gap(0, LINE, "p" * 99, "m", ""), False)) == 64 - filler.n_new


def test_a_run_trained_to_fill_in_is_evaluated_on_it(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(corpus / "email")
    cfg = replace(cfg, data=replace(cfg.data, fim_rate=0.5), model=ModelConfig(32, 512, 1, 2, n_embd=16))
    run = RunDirectory(tmp_path / "runs/r")
    run.create(cfg, prepare(cfg))
    run.save(1, build_model(cfg.model), {"best": None})
    little = ["--eval.benchmarks", "none", "--eval.signatures", "0"]
    result = script("evaluate.py", "r", *little, "--infills", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((run.path / "eval.json").read_text(encoding="utf-8"))
    for kind in (LINE, SPAN):
        assert found["infilling"]["gaps"][kind]["gaps"] == 3
    assert 1 < found["infilling"]["all"]["bits_per_byte"] < 10
    assert "Gaps in held-out files" in result.stdout and "no suffix" in table(found)
