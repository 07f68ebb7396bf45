import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from config import EvalConfig, ModelConfig, TokenizerConfig
from kindling.data.prompts import ALPACA
from kindling.evaluation import samples
from kindling.evaluation.samples import (
    ChatFormat,
    Sample,
    merges_newline_with_indent,
    newline_tokens,
    prompt_ids,
    prompts_too_long,
    write,
)
from kindling.evaluation.tasks import STOP, load
from kindling.generation.decoding import stream_batch
from kindling.generation.sampling import Sampling
from kindling.tokenization.train_tokenizer import train_bpe, train_sentencepiece
from model import GPT, Cache, LanguageModel

CFG = EvalConfig(max_new_tokens=24, temperature=1.0, top_p=1.0, batch_size=4, workers=2)
GRADED, MBPP, SHOTS = load("problems")[30:], load("mbpp"), load("mbpp-3shot")


@pytest.fixture(scope="module", params=[None, "<s>"], ids=["no bos", "bos"])
def tokenizer(request):
    return train_bpe([p.solution for p in GRADED], TokenizerConfig(bos_token=request.param), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(
        ModelConfig(block_size=160, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, init_std=0.3)
    ).eval()


class Scripted(LanguageModel):
    """Says the same text behind every prompt of a length that is known, and end of text behind it."""

    def __init__(self, tokenizer, prompt: Sequence[int], text: str, block_size: int = 4096):
        super().__init__()
        self.cfg = ModelConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_embd=4, n_head=1, n_layer=1)
        self.script, self.before = [*tokenizer.encode(text), tokenizer.eos_id], len(prompt)
        self.head = torch.nn.Linear(1, 1)

    def for_generation(self):
        return self

    def new_cache(self, n_rows):
        return Cache(self.cfg, n_rows, self.head.weight)

    def forward_cached(self, idx, cache):
        cache.lengths += idx.shape[1]
        said = (cache.lengths - self.before).clamp(0, len(self.script) - 1)  # of an idle row, anything
        tokens = torch.tensor(self.script)[said]
        return 1000.0 * torch.nn.functional.one_hot(tokens, self.cfg.vocab_size)  # (B, V)


def scripted(tokenizer, problem, text, chat=None, n=1, progress=None, **settings) -> list[Sample]:
    cfg = replace(CFG, max_new_tokens=2000, **settings)
    if chat is None and merges_newline_with_indent(tokenizer):
        text = "\n" + text
    return write(
        Scripted(tokenizer, prompt_ids(problem, tokenizer, chat), text), tokenizer, [(problem, n)], chat, cfg, progress
    )


def texts(written: Sequence[Sample]) -> list[tuple[str, int, list[int]]]:
    return [(w.problem.task_id, w.number, w.ids) for w in written]


# -- what is written


def test_samples_are_the_same_whatever_the_batch(model, tokenizer):
    problems = [(p, 1 + i % 3) for i, p in enumerate(GRADED[:7])]
    expected = write(model, tokenizer, problems, None, CFG)
    assert [(w.problem.task_id, w.number) for w in expected] == [(p.task_id, k) for p, n in problems for k in range(n)]
    assert len({tuple(w.ids) for w in expected}) == len(expected)
    for batch_size in (1, 3, 64):
        assert write(model, tokenizer, problems, None, replace(CFG, batch_size=batch_size)) == expected


def test_samples_are_the_same_when_memory_has_no_room_for_the_batch(model, tokenizer, monkeypatch, capsys):
    problems, cfg = [(problem, 3) for problem in GRADED[:3]], replace(CFG, batch_size=8)
    expected = write(model, tokenizer, problems, None, cfg)
    forward, calls = GPT.forward_cached, itertools.count()

    def full(self, idx, cache):
        if len(idx) > 3 or (len(idx) == 2 and next(calls) == 20):  # at once, and once more in the middle
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, cache)

    monkeypatch.setattr(GPT, "forward_cached", full)
    counted: list[int] = []
    assert write(model, tokenizer, problems, None, cfg, counted.append) == expected
    assert sum(counted) == len(expected)
    notes = capsys.readouterr().err.splitlines()
    assert notes == [f"note: memory has no room for more samples at a time: from here on {n}" for n in (4, 2, 1)]
    monkeypatch.setattr(GPT, "forward_cached", lambda *given: full(None, [0] * 9, None))
    with pytest.raises(torch.OutOfMemoryError):  # one alone does not fit either
        write(model, tokenizer, problems, None, replace(CFG, batch_size=1))


def test_samples_do_not_depend_on_other_problems_or_on_their_number(model, tokenizer):
    expected = texts(write(model, tokenizer, [(p, 3) for p in GRADED[:4]], None, CFG))
    fewer = texts(write(model, tokenizer, [(GRADED[2], 2), (GRADED[0], 1)], None, CFG))
    assert [sample for sample in expected if sample in fewer] == sorted(fewer)
    assert fewer[0][0] == GRADED[2].task_id, "the order is the caller's"


def test_another_seed_gives_other_samples(model, tokenizer):
    one, other = (texts(write(model, tokenizer, [(GRADED[0], 3)], None, replace(CFG, seed=seed))) for seed in (0, 1))
    assert not {tuple(ids) for *_, ids in one} & {tuple(ids) for *_, ids in other}


def test_the_same_problem_in_another_benchmark_has_other_seeds():
    seeds = {samples._seed(0, problems[0], n) for problems in (MBPP, SHOTS) for n in range(3)}
    assert len(seeds) == 6


def alone(model, ids: list[int], tokenizer) -> list[int]:
    """The most likely tokens behind one prompt, of which the first begins with a newline."""
    greedy = Sampling(CFG.max_new_tokens, greedy=True)
    begins = newline_tokens(tokenizer, model.cfg.vocab_size)
    *_, row = stream_batch(model, [ids], greedy, tokenizer.eos_id, begins=begins)
    return row.out


def test_greedy_is_what_generate_gives(model, tokenizer):
    cfg = replace(CFG, temperature=0)
    for w in write(model, tokenizer, [(GRADED[0], 2), (GRADED[5], 1)], None, cfg):
        ids = prompt_ids(w.problem, tokenizer, None)
        longest = model.cfg.block_size - CFG.max_new_tokens
        assert alone(model, ids[-longest:], tokenizer)[: len(w.ids)] == w.ids and w.ids


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(model, tokenizer):
    cfg = replace(CFG, temperature=0)
    short, long = GRADED[0], SHOTS[0]
    one, other = write(model, tokenizer, [(short, 1), (long, 1)], None, cfg)
    ids = prompt_ids(long, tokenizer, None)
    assert (one.cropped, other.cropped) == (False, True) and len(ids) > model.cfg.block_size
    kept = ids[-(model.cfg.block_size - CFG.max_new_tokens) :]
    assert alone(model, kept, tokenizer)[: len(other.ids)] == other.ids


def test_a_benchmark_is_too_long_if_most_of_its_prompts_would_be_cropped(tokenizer):
    lengths = sorted(len(prompt_ids(p, tokenizer, None)) for p in GRADED[:7])
    for block_size, n in ((lengths[6] + 24, 0), (lengths[3] + 24, 3), (lengths[2] + 24, 4), (lengths[0] + 23, 7)):
        why = prompts_too_long(GRADED[:7], tokenizer, None, block_size, CFG)
        assert why.startswith(f"{n} of 7 prompts") if n > 3 else why == "", (block_size, why)
    assert prompts_too_long(SHOTS, tokenizer, None, 256, CFG).startswith("500 of 500 prompts do not fit")
    assert prompts_too_long([], tokenizer, None, 256, CFG) == ""
    mined = ChatFormat("alpaca", True)  # which is shown no examples
    assert prompts_too_long(SHOTS, tokenizer, mined, 512, CFG) == ""


@pytest.mark.parametrize("max_new_tokens", [80, 160, 5000])
def test_at_most_half_of_the_context_is_kept_free_of_the_prompt(model, tokenizer, max_new_tokens):
    (w,) = write(
        model, tokenizer, [(SHOTS[0], 1)], ChatFormat("alpaca", False), replace(CFG, max_new_tokens=max_new_tokens)
    )
    assert w.cropped and len(w.ids) <= 80 and w.cut_short == (len(w.ids) == 80)


def test_a_base_model_is_stopped_behind_the_function(tokenizer):
    p = GRADED[0]
    body = p.solution.removeprefix(p.prompt)
    (w,) = scripted(tokenizer, p, body + "\n\nprint(add(1, 2))\n" + "x = 1\n" * 200)
    assert w.text.startswith(body) and len(w.text) < len(body) + 100 and not w.cut_short


def test_end_of_text_ends_a_sample_and_is_no_part_of_it(tokenizer):
    (w,) = scripted(tokenizer, GRADED[0], "    return a + b\n")
    assert w.text == "    return a + b\n" and not w.cut_short and tokenizer.eos_id not in w.ids


def test_a_limit_cuts_a_sample_short(tokenizer):
    problem, text = GRADED[0], "    x = 1\n" * 100
    ids = prompt_ids(problem, tokenizer, None)
    for limit, block_size in ((20, 4096), (2000, len(ids) * 2)):
        model = Scripted(tokenizer, ids, text, block_size)
        (w,) = write(model, tokenizer, [(problem, 1)], None, replace(CFG, max_new_tokens=limit))
        assert w.cut_short and len(w.ids) == min(limit, block_size - len(ids)) and text.startswith(w.text)


def test_a_base_model_that_was_shown_examples_is_stopped_where_they_end(tokenizer):
    p = SHOTS[0]
    text = p.solution + f"\n{STOP}\n\nYou are an expert" + " programmer" * 300
    (w,) = scripted(tokenizer, p, text)
    assert w.text.strip() == p.solution.strip() and len(w.ids) < 400
    (w,) = scripted(tokenizer, replace(p, entry_point="never_written"), text)
    assert w.text == p.solution + "\n" and len(w.ids) < 400


def test_what_ends_an_example_is_code_elsewhere(tokenizer):
    text = f'    print("{STOP}")\n    return a + b\n'
    (w,) = scripted(tokenizer, GRADED[0], text)
    assert w.text == text


def test_an_answer_goes_on_to_its_end(tokenizer):
    text = "Sure:\n```python\ndef add(a, b):\n    return a + b\n\nprint(1)\n```\nIt adds.\n" + "Really.\n" * 20
    (w,) = scripted(tokenizer, GRADED[0], text, ChatFormat("alpaca", False))
    assert w.text == text


@pytest.mark.parametrize("text", ["", "x", "    return a + b\n" * 20])
def test_progress_adds_up_to_the_samples(tokenizer, text):
    told: list[int] = []
    written = scripted(tokenizer, GRADED[0], text, n=7, progress=told.append)
    assert sum(told) == len(written) == 7


# -- what a model is given


def test_a_base_model_is_given_the_prompt_alone_without_the_newline_that_it_writes_itself(tokenizer):
    assert merges_newline_with_indent(tokenizer)
    for p in (GRADED[0], MBPP[0], SHOTS[0]):
        ids = prompt_ids(p, tokenizer, None)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert ids[: len(bos)] == bos and tokenizer.decode(ids[len(bos) :]) + "\n" == p.prompt


def test_what_a_base_model_is_given_is_how_the_prompt_with_its_solution_begins(tokenizer):
    spm = train_sentencepiece(
        [p.solution for p in GRADED], TokenizerConfig(kind="sentencepiece", unk_token="<unk>"), 600
    )
    assert not merges_newline_with_indent(spm)
    for own in (tokenizer, spm):
        for p in GRADED:
            ids = [i for i in prompt_ids(p, own, None) if i != own.bos_id]
            assert own.encode(p.solution)[: len(ids)] == ids


def test_tokens_that_begin_with_a_newline_are_known(tokenizer):
    begins = newline_tokens(tokenizer, tokenizer.vocab_size + 3)
    assert begins[tokenizer.encode("\n    return")[0]] and not begins[tokenizer.encode("return")[0]]
    assert not begins[-3:].any()


def said(problem, tokenizer, template, docstring_format) -> str:
    ids = prompt_ids(problem, tokenizer, ChatFormat(template, docstring_format))
    assert ids.count(tokenizer.bos_id) == (tokenizer.bos_id is not None)
    return "|".join(tokenizer.decode(part) for part in split(ids[tokenizer.bos_id is not None :], tokenizer.eos_id))


def split(ids: list[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_a_fine_tuned_model_is_asked_in_its_template(tokenizer):
    p = GRADED[0]
    assert said(p, tokenizer, "alpaca", False) == ALPACA.format(
        instruction=f"Complete this Python function.\n\n{p.prompt}"
    )
    assert (
        said(p, tokenizer, "user-assistant", False) == f"User: Complete this Python function.\n\n{p.prompt}\nAssistant:"
    )


def test_a_model_that_was_fine_tuned_on_docstrings_is_asked_for_a_body(tokenizer):
    asked = "Return the sum of a and b.\ndef add(a, b):"
    assert said(GRADED[0], tokenizer, "alpaca", True) == ALPACA.format(instruction=asked)
    assert said(SHOTS[0], tokenizer, "user-assistant", True) == f"User: {SHOTS[0].mined_instruction}\nAssistant:"


def test_a_fine_tuned_model_is_shown_examples_as_earlier_exchanges(tokenizer):
    first, second, third, question = said(SHOTS[0], tokenizer, "user-assistant", False).split("|")
    for (asked, answered), part in zip(SHOTS[0].shots, (first, second.lstrip("\n"), third.lstrip("\n"))):
        assert part == f"User: {asked}\nAssistant:{answered}"
    assert question == f"\nUser: {SHOTS[0].instruction}\nAssistant:"
    assert "|" not in said(MBPP[0], tokenizer, "user-assistant", False)
