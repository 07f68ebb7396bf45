"""Lines of reference solutions that are left out: which they are, how a model is asked for them, and how they are judged."""

import ast
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_samples import CFG, Scripted, texts

from config import EvalConfig, ModelConfig, TokenizerConfig
from kindling.evaluation import code_eval, references
from kindling.evaluation.check_correctness import GradedSample, Verdict, check_sample
from kindling.evaluation.code_eval import Chosen, asked_problems, evaluate_code, functional_figures
from kindling.evaluation.infill import prompt_around
from kindling.evaluation.infill_report import line_notes, pass_difference
from kindling.evaluation.intervals import bootstrap_ratio, paired_ratio_difference, pass_interval, wilson
from kindling.evaluation.report import pass_cell
from kindling.evaluation.samples import (
    TOKENS_OF_LINE,
    ChatFormat,
    Sample,
    n_new_tokens,
    prompt_ids,
    prompts_too_long,
    write,
)
from kindling.evaluation.tasks import Problem, load
from kindling.sandbox.process import Limits
from kindling.tokenization.infilling import encode_infill
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

LINES = {name: load(f"{name}-infill") for name in ("problems", "humaneval", "mbpp")}
ALONE = load("problems-infill-no-suffix")
BPE = train_bpe([p.solution for p in load("problems")], TokenizerConfig(bos_token="<s>"), 500)


def line_of(p: Problem) -> str:
    return p.solution[len(p.head) : len(p.solution) - len(p.after)]


# -- which they are


def test_humaneval_has_the_published_number_of_lines():
    assert len(LINES["humaneval"]) == 1033 and len({p.of for p in LINES["humaneval"]}) == 164
    assert LINES["humaneval"][3].task_id == "HumanEval/0/L3" and LINES["humaneval"][3].of == "HumanEval/0"


@pytest.mark.parametrize("name", LINES)
def test_each_line_with_text_is_left_out_once(name):
    whole = {p.task_id: p for p in load(name)}
    left_out: dict[str, list[str]] = {}
    for p in LINES[name]:
        base = whole[p.of]
        line = line_of(p)
        assert p.head + line + p.after == base.solution == p.solution and line.strip() and "\n" not in line
        assert p.prompt.endswith("\n") and p.prompt.startswith(base.prompt) and p.head.startswith(base.head)
        assert (p.suffix, p.tests, p.level, p.benchmark) == (p.after, base.tests, base.level, f"{name}-infill")
        left_out.setdefault(p.of, []).append(line)
    for task, lines in left_out.items():
        code = whole[task].solution.removeprefix(whole[task].head)
        assert lines == [line for line in code.split("\n") if line.strip()]
    assert set(left_out) == set(whole)


def test_without_the_suffix_the_lines_are_the_same():
    assert [replace(p, benchmark="problems-infill", suffix=p.after) for p in ALONE] == LINES["problems"]


def test_a_benchmark_of_lines_is_asked_in_both_ways_and_its_limit_is_one_of_problems():
    cfg = EvalConfig(benchmarks=("humaneval-infill:2", "mbpp"), limit=3)
    assert cfg.n_samples == {"humaneval-infill": 2, "humaneval-infill-no-suffix": 2, "mbpp": 1}
    asked = asked_problems("humaneval-infill", cfg)
    assert list(dict.fromkeys(p.of for p in asked)) == ["HumanEval/0", "HumanEval/1", "HumanEval/2"] and len(asked) > 9


# -- how a model is asked


def said(p, text: str, chat=None) -> Sample:
    """What is taken of a text that a model writes for a problem."""
    before = prompt_ids(p, BPE, chat)
    return write(Scripted(BPE, before, text), BPE, [(p, 1)], chat, CFG)[0]


def test_a_line_is_asked_with_the_control_tokens_and_without_the_suffix_as_a_text():
    p, alone = LINES["problems"][40], ALONE[40]
    assert prompt_ids(p, BPE, None) == encode_infill(BPE, p.prompt[:-1], p.after, spm=True) and p.after
    assert prompt_ids(alone, BPE, None) == [BPE.bos_id, *BPE.encode(p.prompt[:-1])]
    for chat in (ChatFormat("alpaca", False), ChatFormat("alpaca", True)):  # filling in has no template
        assert prompt_ids(p, BPE, chat) == prompt_ids(p, BPE, None)
        assert prompt_ids(alone, BPE, chat) == prompt_ids(alone, BPE, None)


@pytest.mark.parametrize("chat", [None, ChatFormat("alpaca", False)])
def test_a_line_ends_at_its_newline(chat):
    p, alone = LINES["problems"][40], ALONE[40]
    for text in ("    x = 1", "    x = 1\n    y = 2\n", "    x = 1\n"):
        assert said(p, "\n" + text, chat).text == "    x = 1"
        assert said(alone, "\n" + text, chat).text == "    x = 1"
    assert said(p, "").text == "" and said(p, "\n\nx").text == ""


def test_lines_are_written_beside_whole_problems_in_the_order_of_the_caller():
    torch.manual_seed(0)
    shape = ModelConfig(block_size=160, vocab_size=BPE.vocab_size, n_layer=1, n_head=2, n_embd=16, init_std=0.3)
    model, whole = GPT(shape).eval(), load("problems")[30:]
    problems = [(whole[0], 2), (LINES["problems"][3], 2), (ALONE[3], 1), (whole[1], 1), (LINES["problems"][9], 1)]
    expected = write(model, BPE, problems, None, CFG)
    assert [(s.problem.task_id, s.number) for s in expected] == [(p.task_id, k) for p, n in problems for k in range(n)]
    by_ones = [s for problem in problems for s in write(model, BPE, [problem], None, replace(CFG, batch_size=1))]
    assert texts(expected) == texts(by_ones) and len({s.text for s in expected}) > 4
    assert not any("\n" in s.text for s in expected if s.problem.after is not None)


def test_a_prompt_that_is_too_long_keeps_what_is_nearest_to_the_line():
    torch.manual_seed(0)
    p = max(LINES["problems"], key=lambda p: min(len(p.after), len(p.prompt)))
    ids = prompt_ids(p, BPE, None)
    block_size = len(ids) - 9
    shape = ModelConfig(block_size, BPE.vocab_size, n_layer=1, n_head=2, n_embd=16, init_std=0.3)
    kept = prompt_around(BPE, p.prompt[:-1], p.after, block_size - 24, spm=True)
    assert len(kept) == block_size - 24 and sum(t in BPE.fim for t in kept) == 3
    prompts = []
    model = GPT(shape).eval()
    forward = model.forward_cached
    model.forward_cached = lambda idx, cache: prompts.append(idx.tolist()) or forward(idx, cache)
    (sample,) = write(model, BPE, [(p, 1)], None, CFG)
    assert sample.cropped and prompts[0] == [kept]
    many = [p] * 3 + LINES["problems"][:2]
    assert prompts_too_long(many, BPE, None, block_size, CFG).startswith("3 of 5 prompts do not fit")
    # a line leaves more room than a program, however many tokens that may have
    assert prompts_too_long(many, BPE, None, len(ids) * 8 // 7 + 1, replace(CFG, max_new_tokens=256)) == ""
    assert n_new_tokens(p, 4096, replace(CFG, max_new_tokens=256)) == TOKENS_OF_LINE


# -- how they are judged


def test_the_line_that_stood_there_passes_and_another_does_not():
    p, line = next((p, line) for p in LINES["problems"] if " += " in (line := line_of(p)) and p.after.count("\n") > 1)
    indent = line[: len(line) - len(line.lstrip())]
    # nothing but our own code runs here
    found = [
        check_sample(Sample(p, 0, text, [], True, False), 0, is_answer, "none", Limits(15, 90))
        for text, is_answer in ((line, False), (line, True), (f"{indent}pass", False), (f"{indent}(", False))
    ]
    assert [g.verdict for g in found] == ["passed", "passed", "wrong", "syntax"]
    assert found[0].program == p.solution and ast.parse(found[2].program)


def samples_of(lines, passed) -> tuple[list[Sample], list[GradedSample]]:
    graded = [GradedSample("", "passed" if passed(i) else "wrong", "", True, True) for i in range(len(lines))]
    return [Sample(p, 0, "", [], False, False) for p in lines], graded


def test_intervals_resample_whole_problems():
    n, c = [1] * 40, [int(i < 20) for i in range(40)]
    names = [str(i // 4) for i in range(40)]
    sums = [4.0] * 5 + [0.0] * 5
    assert pass_interval(n, c, 1, clusters=names) == bootstrap_ratio(sums, [4] * 10)
    assert pass_interval(n, c, 1, clusters=names).low < pass_interval(n, c, 1).low
    assert pass_interval(n, [0] * 40, 1, clusters=names) == wilson(0, 10)


def test_the_figures_say_of_how_many_problems_the_lines_are_and_what_the_suffix_is_worth():
    lines = [p for p in LINES["problems"] if p.level == 4]
    with_it, without = (
        functional_figures(*samples_of(lines, passed), ["problems-infill"], "none", {})["problems-infill"]
        for passed in (lambda i: i % 2, lambda i: i % 4 == 1)
    )
    assert with_it["problems"] == len(lines) and with_it["lines_of"] == 14 == with_it["by_level"]["4"]["lines_of"]
    share = sum(i % 2 for i in range(len(lines))) / len(lines)
    cell = pass_cell(with_it, "1")
    assert cell.startswith(f"{share:.1%} [") and pass_cell(with_it["by_level"]["4"], "1") == cell
    found = pass_difference(with_it, without, 1)
    assert found.difference == pytest.approx(with_it["pass_at"]["1"] - without["pass_at"]["1"])
    assert found.significant and found.low < found.difference < found.high
    whole = {p.of: [0, 0, 0] for p in lines}
    for i, p in enumerate(lines):
        whole[p.of] = [x + y for x, y in zip(whole[p.of], (i % 2, i % 4 == 1, 1))]
    assert found == paired_ratio_difference(*zip(*(whole[name] for name in sorted(whole)))), (
        "whole problems are resampled"
    )
    (note,) = line_notes({"problems-infill": with_it, "problems-infill-no-suffix": without, "mbpp": {"problems": 3}})
    assert note.startswith(f"problems-infill: {len(lines)} lines of 14 problems")
    assert f"{100 * found.difference:+.1f} points [" in note
    assert line_notes({"problems-infill": with_it})[0].endswith("which are resampled")


def test_lines_are_not_in_the_table_of_syntax(monkeypatch):
    cfg, (samples, graded) = EvalConfig(signatures=0), samples_of(LINES["problems"][:4], lambda i: True)
    chosen = Chosen([(s.problem, 1) for s in samples], {}, {})
    for name, found in (("select_problems", chosen), ("write", samples), ("check_samples", graded)):
        monkeypatch.setattr(code_eval, name, lambda *given, found=found: found)
    model = SimpleNamespace(cfg=SimpleNamespace(block_size=64))
    figures = evaluate_code(model, None, None, None, {"problems-infill": 1}, "none", cfg).figures
    assert "syntax" not in figures and figures["functional"]["problems-infill"]["pass_at"] == {"1": 1.0}


def test_a_reference_runs_once_for_all_of_its_lines(monkeypatch):
    asked = []

    def judged(problem, solution, *rest):
        asked.append(problem.of)
        return Verdict("passed" if problem.of == "HumanEval/1" else "wrong", "no")

    monkeypatch.setattr(references, "check_answers", judged)
    monkeypatch.setattr(references, "map_jobs", lambda do, jobs, *rest: [do(job, slot=0) for job in jobs])
    problems = {"humaneval-infill": [p for p in LINES["humaneval"] if p.of in ("HumanEval/0", "HumanEval/1")]}
    left_out = references.left_out_problems(problems, "none", EvalConfig(humaneval="own.jsonl"))["humaneval-infill"]
    assert asked == ["HumanEval/0", "HumanEval/1"]
    assert set(left_out) == {p.task_id for p in problems["humaneval-infill"] if p.of == "HumanEval/0"}
