import math

import pytest
import torch

from config import ModelConfig, TokenizerConfig, TrainConfig
from kindling import device
from kindling.evaluation.gold import gold_figures, gold_ids, solution_of
from kindling.evaluation.samples import ChatFormat, prompt_ids
from kindling.evaluation.tasks import load
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

RUNTIME = device.resolve(TrainConfig(device="cpu", precision="fp32"))
OURS, HUMANEVAL, MBPP = load("problems"), load("humaneval"), load("mbpp")
SOME = [*OURS[::9], *HUMANEVAL[::40], *MBPP[::100]]
FORMATS = [None, ChatFormat("alpaca", False), ChatFormat("user-assistant", False), ChatFormat("alpaca", True)]


@pytest.fixture(scope="module", params=[None, "<s>"], ids=["no bos", "bos"])
def tokenizer(request):
    return train_bpe([p.solution for p in OURS], TokenizerConfig(bos_token=request.param), 400)


def model_of(tokenizer, block_size: int) -> GPT:
    torch.manual_seed(0)
    cfg = ModelConfig(
        block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, init_std=0.3
    )
    return GPT(cfg).eval()


@pytest.mark.parametrize("chat", FORMATS)
def test_the_loss_is_that_of_the_solutions_tokens_given_the_prompt(tokenizer, chat):
    model = model_of(tokenizer, 2048)
    found = gold_figures(model, tokenizer, SOME, chat, RUNTIME, batch_size=3)
    total = 0.0
    for problem, (task, n_bytes, nll) in zip(SOME, found["losses"]):
        prompt, solution = gold_ids(problem, tokenizer, chat)
        with torch.no_grad():
            x = model.hidden(torch.tensor([[*prompt, *solution]]))  # (1, T, C)
            logits = torch.nn.functional.linear(x, model.head.weight, model.head.bias)[0].double()  # (T, V)
        expected = torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(solution), reduction="sum"
        )
        assert task == problem.task_id and nll == pytest.approx(float(expected), rel=1e-5)
        assert n_bytes == len(solution_of(problem).encode())
        total += nll
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"])
    assert found["bytes"] == sum(n_bytes for _, n_bytes, _ in found["losses"]) and found["problems"] == len(SOME)


@pytest.mark.parametrize("block_size", [5, 64, 256])
def test_each_token_of_a_solution_counts_once_also_beyond_the_context(tokenizer, block_size):
    model = model_of(tokenizer, block_size)
    torch.nn.init.zeros_(model.head.weight)  # so every token costs log(V)
    told: list[int] = []
    found = gold_figures(model, tokenizer, SOME, None, RUNTIME, progress=told.append)
    lengths = [len(gold_ids(problem, tokenizer, None)[1]) for problem in SOME]
    expected = [n * math.log(tokenizer.vocab_size) for n in lengths]
    assert [nll for *_, nll in found["losses"]] == pytest.approx(expected, rel=1e-5) and sum(told) == sum(lengths)


def test_a_prompt_beyond_the_context_loses_its_beginning_and_no_more(tokenizer):
    (problem,) = [p for p in OURS if p.entry_point == "is_even"]
    prompt, solution = gold_ids(problem, tokenizer, None)
    block_size = len(prompt) + len(solution) - 1
    whole = model_of(tokenizer, block_size)
    cropped = model_of(tokenizer, block_size - 1)
    with torch.no_grad():  # the same weights, but for the position that is no more
        for name, weight in cropped.state_dict().items():
            source = whole.state_dict()[name]
            weight.copy_(source if source.shape == weight.shape else source[: len(weight)])
    (_, _, nll), (_, _, other) = (
        gold_figures(m, tokenizer, [problem], None, RUNTIME)["losses"][0] for m in (whole, cropped)
    )
    ids = torch.tensor([[*prompt[-(block_size - len(solution)) :], *solution]])[:, -block_size:]
    with torch.no_grad():
        x = cropped.hidden(ids[:, :-1])
        logits = torch.nn.functional.linear(x, cropped.head.weight, cropped.head.bias)[0, -len(solution) :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(solution), reduction="sum")
    assert other == pytest.approx(float(expected), rel=1e-5) and other != nll


@pytest.mark.parametrize("chat", FORMATS)
def test_the_prompt_is_the_one_that_the_model_is_asked_with_and_the_solution_ends_the_program(tokenizer, chat):
    for problem in SOME:
        prompt, solution = gold_ids(problem, tokenizer, chat)
        asked = prompt_ids(problem, tokenizer, chat)
        assert prompt[: len(asked)] == asked
        text = tokenizer.decode(solution)
        assert text.strip("\n") == solution_of(problem)
        assert (problem.head + solution_of(problem)).split() == problem.solution.split()
        if chat is None or (problem.head and not chat.docstring_format):  # a whole function
            assert (tokenizer.decode(prompt) + text).endswith(problem.head + solution_of(problem))
        else:
            assert prompt == asked


def test_levels_add_up_to_the_whole(tokenizer):
    found = gold_figures(model_of(tokenizer, 256), tokenizer, OURS[::9], None, RUNTIME)
    levels = found["by_level"]
    assert list(levels) == ["0", "1", "2", "3", "4", "5"]
    assert [line for level in levels.values() for line in level["losses"]] == found["losses"]
    bits = sum(level["bits_per_byte"] * level["bytes"] for level in levels.values())
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])
    assert "by_level" not in gold_figures(model_of(tokenizer, 256), tokenizer, MBPP[:1], None, RUNTIME)
