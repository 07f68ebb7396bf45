from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import ModelConfig
from kindling.generation import decoding
from kindling.generation.decoding import stream, stream_batch
from kindling.generation.sampling import Sampling
from model import GPT, Cache, LanguageModel, build_model

CFG = ModelConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=16, init_std=0.5)


def generate(*args, **named) -> list[int]:
    return list(stream(*args, **named))


def generate_batch(model, prompts, *args, **named) -> list[list[int]]:
    """Return the new tokens of each prompt, in their order."""
    outs = {row.number: row.out for row in stream_batch(model, prompts, *args, **named) if row.ended}
    return [outs[number] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(CFG).eval()


class Scripted(LanguageModel):
    """Says the given ids, one a pass, and keeps what it was asked with; after them, the first over and over."""

    def __init__(self, ids: Sequence[int], vocab_size: int, block_size: int):
        super().__init__()
        self.cfg = ModelConfig(block_size=block_size, vocab_size=vocab_size, n_embd=4)
        self.script, self.contexts = list(ids), []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def for_generation(self):
        return self

    def new_cache(self, n_rows):
        return Cache(self.cfg, n_rows, self.weight)

    def forward_cached(self, idx, cache):
        before = self.contexts[-1] if int(cache.lengths) else []
        self.contexts.append(before + idx[0].tolist())
        cache.lengths += idx.shape[1]
        assert int(cache.lengths) <= self.cfg.block_size
        n = len(self.contexts) - 1
        token = self.script[n] if n < len(self.script) else self.script[0]
        return 1000.0 * torch.nn.functional.one_hot(torch.tensor([token]), self.cfg.vocab_size)  # (1, V)


def test_greedy_takes_the_most_likely_token_each_time(model):
    ids = [5, 6, 7]
    expected = list(ids)
    for _ in range(10):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    for sampling in (Sampling(greedy=True, max_new_tokens=10), Sampling(temperature=0, max_new_tokens=10)):
        assert generate(model, ids, sampling, eos_id=-1) == expected[3:]


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    runs = [
        generate(model, [1], Sampling(seed=s, max_new_tokens=12, top_k=None, temperature=2.0), -1) for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_it_stops_at_end_of_text_and_leaves_it_out(model):
    greedy = Sampling(greedy=True, max_new_tokens=10)
    ids = generate(model, [5, 6, 7], greedy, eos_id=-1)
    stop = ids[4]
    assert generate(model, [5, 6, 7], greedy, eos_id=stop) == ids[: ids.index(stop)]


def test_generation_runs_past_the_context_by_cropping_from_the_left(model):
    long, greedy = list(range(40)), Sampling(greedy=True, max_new_tokens=20)
    new = generate(model, long, greedy, -1)
    assert len(new) == 20 and new == generate(model, long[-16:], greedy, -1)


def test_the_stream_leaves_gradients_on_between_its_tokens(model):
    sampling = Sampling(max_new_tokens=30, temperature=2.0, seed=5)  # past the context of 16
    ids = generate(model, [1, 2], sampling, 7)
    tokens = []
    for token in stream(model, [1, 2], sampling, 7):
        assert torch.is_grad_enabled()
        tokens.append(token)
    assert tokens == ids and len(ids) > 3


def test_the_stream_gives_a_token_before_the_next_is_sampled():
    says = Scripted([3, 4, 5], vocab_size=10, block_size=8)
    tokens = stream(says, [1], Sampling(), eos_id=0)
    assert next(tokens) == 3 and len(says.contexts) == 1
    assert next(tokens) == 4 and says.contexts == [[1], [1, 3]]


SHAPES = {
    "learned positions": CFG,
    "rotary, grouped": replace(CFG, position="rope", n_head=4, n_kv_head=2, qk_norm=True, norm="rmsnorm", bias=False),
    "learned QK-norm": replace(CFG, position="rope", n_head=4, n_kv_head=1, qk_norm="learned"),
    "rotary, pairs of tokens": replace(CFG, position="rope", bigram_rows=97),
    "sinusoidal, no final norm": replace(CFG, position="sinusoidal", final_norm=False, attn_out_proj=False),
    "transformers": replace(CFG, backbone="transformers", init_std=0.2),
}


def random_model(cfg):
    """A model whose table of pairs, which starts at zero, and weights of QK-norm count too."""
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    if cfg.bigram_rows:
        torch.nn.init.normal_(model.wtp.weight, std=0.5)
    for name, p in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_in_pieces_and_token_by_token_gives_the_logits_of_the_whole(shape):
    model = random_model(SHAPES[shape])
    idx = torch.randint(300, (3, 16))
    with torch.no_grad():
        whole = model(idx)
    gpt = model.for_generation()
    cache = gpt.new_cache(3)
    for start, stop in ((0, 3), (3, 5)):
        assert torch.allclose(gpt.forward_cached(idx[:, start:stop], cache), whole[:, stop - 1], atol=1e-4)
    for t in range(5, 16):
        assert torch.allclose(gpt.forward_cached(idx[:, t : t + 1], cache), whole[:, t], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_rows", [1, 3, 8])
@pytest.mark.parametrize("together", [False, True])
def test_a_batch_gives_each_prompt_what_it_gets_alone(shape, n_rows, together, monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS_A_PASS", 20)
    model = random_model(SHAPES[shape])
    prompts = [[5], [6, 7, 8], [9] * 10, [9] * 10, [1, 2], [3] * 15, [4] * 4]
    greedy = Sampling(greedy=True, max_new_tokens=6)
    drawn = Sampling(temperature=1.5, max_new_tokens=6)
    for sampling, seeds in ((greedy, None), (drawn, [3, 1, 4, 1, 5, 9, 2])):
        expected = [
            generate(model, ids, replace(sampling, seed=seed, max_new_tokens=min(6, 16 - len(ids))), 7)
            for ids, seed in zip(prompts, seeds or [0] * 7)
        ]
        assert generate_batch(model, prompts, sampling, 7, seeds, n_rows, together=together) == expected


def test_prompts_that_begin_together_are_read_in_few_passes_and_each_once(model, monkeypatch):
    monkeypatch.setattr(decoding, "TOKENS_A_PASS", 24)
    passes, forward = [], GPT.forward_cached

    def counted(self, idx, cache):
        passes.append(tuple(idx.shape))
        return forward(self, idx, cache)

    monkeypatch.setattr(GPT, "forward_cached", counted)
    prompts = [[1] * 9, [2] * 3, [3] * 11, [1] * 9, [4] * 8, [1] * 9, [5] * 12, [6]]
    first_row = next(stream_batch(model, prompts, Sampling(max_new_tokens=1), -1, together=True))
    assert first_row.number == 0 and passes == [(3, 8), (2, 11), (1, 12)]  # of 1, 3, 8; 9, 11; 12 tokens
    passes.clear()
    assert list(stream_batch(model, prompts[:3], Sampling(max_new_tokens=1), -1))[-1].ended
    assert passes == [(1, 9), (1, 3), (1, 11)], "on the CPU one by one"


def test_new_prompts_wait_until_an_eighth_of_the_rows_are_free(model, monkeypatch):
    begun = []
    read = decoding._Batch._read_together
    monkeypatch.setattr(
        decoding._Batch, "_read_together", lambda self, places: begun.append(len(places)) or read(self, places)
    )
    prompts = [[n] for n in range(1, 40)]
    outs = set()
    for row in stream_batch(model, prompts, Sampling(max_new_tokens=9), -1, n_rows=24, together=True):
        row.ended = row.ended or row.number in (0, 5, 9, 30)  # after 8 tokens; two more than the others' end would free
        outs.add(row.number)
    assert begun == [24, 3, 12] and outs == set(range(39))


def test_a_row_that_its_caller_ends_gets_no_more_tokens(model):
    seen = []
    for row in stream_batch(model, [[1], [2]], Sampling(max_new_tokens=12), -1, [0, 1]):
        seen.append((row.number, len(row.out), row.ended))
        row.ended = row.ended or row.number == 1
    assert seen == [(0, 8, False), (1, 8, False), (0, 12, True)]


def test_a_batch_refuses_a_prompt_that_leaves_no_room(model):
    with pytest.raises(ValueError, match="from 1 to 15 tokens, but has 16"):
        generate_batch(model, [[1], [2] * 16], Sampling(), -1)


def test_a_penalty_is_of_each_row_its_own_and_counts_its_prompt(model):
    likely = generate(model, [5], Sampling(greedy=True, max_new_tokens=15), -1)
    prompts = [likely[:n] for n in (1, 3, 9)]
    for sampling in (Sampling(greedy=True), Sampling(temperature=1.5)):
        sampling = replace(sampling, max_new_tokens=6, repetition_penalty=5.0)
        expected = [generate(model, ids, sampling, 7) for ids in prompts]
        for together in (False, True):
            assert generate_batch(model, prompts, sampling, 7, n_rows=2, together=together) == expected
        assert expected != [generate(model, ids, replace(sampling, repetition_penalty=1.0), 7) for ids in prompts]


def test_only_allowed_tokens_come_in_a_stream(model):
    even = np.arange(300) % 2 == 0
    asked = []

    def allowed(out):
        asked.append(list(out))
        return even if len(out) < 5 else None

    sampling = Sampling(max_new_tokens=40, temperature=3.0, top_k=None)
    out = generate(model, [1], sampling, -1)
    held = list(stream(model, [1], sampling, -1, allowed))
    assert all(token % 2 == 0 for token in held[:5]) and any(token % 2 for token in held[5:])
    assert any(token % 2 for token in out[:5]) and asked == [held[:n] for n in range(40)]


def test_prompts_come_out_as_they_end_and_gradients_are_on_between(model):
    sampling = Sampling(greedy=True, max_new_tokens=9)
    prompts = [[1], [2] * 12, [3] * 15]
    numbers = []
    for row in stream_batch(model, prompts, sampling, -1, n_rows=2):
        assert torch.is_grad_enabled()
        if not row.ended:
            continue
        number, ids = row.number, row.out
        assert ids == generate(
            model, prompts[number], replace(sampling, max_new_tokens=min(9, 16 - len(prompts[number]))), -1
        )
        numbers.append(number)
    assert numbers == [1, 2, 0]
