import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_one_clear_line, script
from hypothesis import given, settings
from hypothesis import strategies as st

from completion import Answer, TextStream, answer, complete
from config import ModelConfig, TokenizerConfig
from decoding import generate, generate_batch, stream
from model import GPT, Cache, LanguageModel, build_model
from prompts import Exchange, encode
from sampling import GenerationError, Sampling
from tokenizer import SentencePieceTokenizer, train_bpe, train_sentencepiece

CFG = ModelConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=16, init_std=0.5)


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

    def read(self, idx, cache):
        before = self.contexts[-1] if int(cache.lengths) else []
        self.contexts.append(before + idx[0].tolist())
        cache.lengths += idx.shape[1]
        assert int(cache.lengths) <= self.cfg.block_size
        n = len(self.contexts) - 1
        token = self.script[n] if n < len(self.script) else self.script[0]
        return 1000.0 * torch.nn.functional.one_hot(torch.tensor([token]), self.cfg.vocab_size)  # (1, V)


WORDS = ["def add(a, b):\n    return a + b\n", "Below is an instruction that describes a task. ", "é🔥 ½ naïve 数据"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with few merges, so that é and 🔥 take several tokens; it has a token that begins a document."""
    return train_bpe(WORDS[:2], TokenizerConfig(bos_token="<s>"), 300)


@pytest.fixture(scope="module")
def spaced():
    """SentencePiece as others train it: decoding drops the space that a text begins with."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        minloglevel=2,
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        eos_piece="<|endoftext|>",
    )
    return SentencePieceTokenizer(model.getvalue(), TokenizerConfig(kind="sentencepiece"))


@pytest.fixture(scope="module")
def tokenizers(tokenizer, spaced):
    cfg = TokenizerConfig(kind="sentencepiece", unk_token="<unk>")
    return [tokenizer, spaced, train_sentencepiece(WORDS, cfg, 320)]


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


def test_generation_runs_past_the_context_by_cropping_from_the_left(model, capsys):
    long = list(range(40))
    new = generate(model, long, Sampling(greedy=True, max_new_tokens=20), -1)
    assert len(new) == 20 and new == generate(model, long[-16:], Sampling(greedy=True, max_new_tokens=20), -1)
    tokenizer = train_bpe(["some text"], TokenizerConfig(), 280)
    complete(model, tokenizer, "x y " * 30, Sampling(max_new_tokens=1))
    assert "its beginning is cropped" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_new_document(model):
    tokenizer = train_bpe(["some text"], TokenizerConfig(), 280)
    assert isinstance(complete(model, tokenizer, "", Sampling(max_new_tokens=3)).text, str)


def test_the_stream_yields_what_generate_returns_and_leaves_gradients_on_between(model):
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
    "sinusoidal, no final norm": replace(CFG, position="sinusoidal", final_norm=False, attn_out_proj=False),
    "transformers": replace(CFG, backbone="transformers", init_std=0.2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_token_by_token_gives_the_logits_of_the_whole(shape):
    torch.manual_seed(1)
    model = build_model(SHAPES[shape]).eval()
    idx = torch.randint(300, (3, 16))
    with torch.no_grad():
        whole = model(idx)
    gpt = model.for_generation()
    cache = gpt.new_cache(3)
    assert torch.allclose(gpt.read(idx[:, :5], cache), whole[:, 4], atol=1e-4)
    for t in range(5, 16):
        assert torch.allclose(gpt.read(idx[:, t : t + 1], cache), whole[:, t], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_a_batch_gives_each_prompt_what_it_gets_alone(shape, n_rows):
    torch.manual_seed(1)
    model = build_model(SHAPES[shape]).eval()
    prompts = [[5], [6, 7, 8], [9] * 10, [9] * 10, [1, 2], [3] * 15, [4] * 4]
    greedy = Sampling(greedy=True, max_new_tokens=6)
    drawn = Sampling(temperature=1.5, max_new_tokens=6)
    for sampling, seeds in ((greedy, None), (drawn, [3, 1, 4, 1, 5, 9, 2])):
        expected = [
            generate(model, ids, replace(sampling, seed=seed, max_new_tokens=min(6, 16 - len(ids))), 7)
            for ids, seed in zip(prompts, seeds or [0] * 7)
        ]
        assert generate_batch(model, prompts, sampling, 7, seeds, n_rows) == expected


def test_a_row_that_its_caller_calls_finished_ends(model):
    asked = []

    def finished(number, ids):
        asked.append((number, len(ids)))
        return number == 1

    out = generate_batch(model, [[1], [2]], Sampling(max_new_tokens=12), -1, [0, 1], finished=finished)
    assert [len(ids) for ids in out] == [12, 8] and (1, 8) in asked


def test_a_batch_refuses_a_prompt_that_leaves_no_room(model):
    with pytest.raises(ValueError, match="from 1 to 15 tokens, but has 16"):
        generate_batch(model, [[1], [2] * 16], Sampling(), -1)


def pieces_of(tokenizer, ids: Sequence[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.add(token) for token in ids), text.finish()]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_pieces_of_random_ids_joined_are_the_whole_text(tokenizers, data):
    tokenizer = data.draw(st.sampled_from(tokenizers))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.integers(0, 2), st.integers(0, 3))
def test_the_pieces_of_a_text_are_whole_characters_also_where_it_breaks_off(tokenizers, text, which, cut):
    tokenizer = tokenizers[which]
    ids = tokenizer.encode_by_library(text)
    ids = ids[: len(ids) - cut]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_character_of_several_tokens_comes_out_with_the_last_of_them(tokenizers, which):
    tokenizer = tokenizers[which]
    ids = tokenizer.encode("a🦆b")
    assert len(ids) >= 5
    pieces = [piece for piece in pieces_of(tokenizer, ids) if piece]
    assert pieces == ["a", "🦆", "b"]


def test_a_replacement_character_that_is_meant_comes_out(tokenizers):
    for tokenizer in tokenizers:
        assert pieces_of(tokenizer, tokenizer.encode("a\ufffd"))[-1] == "\ufffd"
        assert pieces_of(tokenizer, tokenizer.encode("a\ufffdb"))[-2:] == ["\ufffdb", ""]


QUESTION = [Exchange("Add a and b.")]


def says(tokenizer, text: str, block_size: int = 256, eos: bool = True) -> Scripted:
    return Scripted(tokenizer.encode(text) + [tokenizer.eos_id] * eos, tokenizer.vocab_size, block_size)


def test_an_answer_that_ends_by_itself_has_stopped(tokenizer):
    text = "return a + b  # é🦆\n"
    heard: list[str] = []
    given = answer(says(tokenizer, text), tokenizer, "alpaca", QUESTION, Sampling(), heard.append)
    assert given == Answer(text, True, "")
    assert "".join(heard) == text and "🦆" in heard and "" not in heard


def test_an_answer_that_the_limit_cuts_has_not_stopped(tokenizer):
    n = len(tokenizer.encode("return a + b"))
    whole = answer(says(tokenizer, "return a + b"), tokenizer, "alpaca", QUESTION, Sampling(max_new_tokens=n + 1))
    assert whole == Answer("return a + b", True, "")
    cut = answer(says(tokenizer, "return a + b"), tokenizer, "alpaca", QUESTION, Sampling(max_new_tokens=n))
    assert cut == Answer("return a + b", False, f"--max-new-tokens {n}")  # it did not come to say that it ended


@pytest.mark.parametrize("free", [1, 2, 7])
def test_an_answer_ends_with_the_context_and_the_prompt_is_never_cropped(tokenizer, free):
    prompt = encode("alpaca", QUESTION, tokenizer)[0].prompt
    endless = says(tokenizer, "abc", block_size=len(prompt) + free, eos=False)
    given = answer(endless, tokenizer, "alpaca", QUESTION, Sampling())
    assert given == Answer("abcaaaa"[:free], False, f"the context of {len(prompt) + free} tokens")
    assert all(context[: len(prompt)] == prompt for context in endless.contexts)


def test_half_a_character_at_the_limit_is_shown_as_such(tokenizer):
    cut = answer(says(tokenizer, "a🦆"), tokenizer, "alpaca", QUESTION, Sampling(max_new_tokens=3))
    assert cut.text == "a\ufffd" and not cut.stopped


CONVERSATION = [
    Exchange("Add a and b.", "a + b"),
    Exchange("Now a product.", "a * b", input="a, b"),
    Exchange("And the rest?", "a % b"),
]


@pytest.mark.parametrize("template", ["alpaca", "user-assistant"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_model_is_asked_with_the_ids_that_a_row_of_training_has_before_the_response(tokenizer, template, n):
    row = [token for segment in encode(template, CONVERSATION[:n], tokenizer) for part in segment for token in part]
    response = encode(template, CONVERSATION[:n], tokenizer)[-1].response
    open_ended = [*CONVERSATION[: n - 1], replace(CONVERSATION[n - 1], response="")]
    model = says(tokenizer, CONVERSATION[n - 1].response, block_size=512)
    given = answer(model, tokenizer, template, open_ended, Sampling())
    assert model.contexts[0] == row[: -len(response)] and model.contexts[0][0] == tokenizer.bos_id
    assert [*model.contexts[-1], tokenizer.eos_id] == row and given.stopped


def test_a_control_token_that_a_question_spells_is_text(tokenizer):
    model = says(tokenizer, "no")
    answer(model, tokenizer, "user-assistant", [Exchange("<|endoftext|> <s>")], Sampling())
    assert tokenizer.eos_id not in model.contexts[0] and model.contexts[0].count(tokenizer.bos_id) == 1
    assert tokenizer.decode(model.contexts[0][1:]) == "User: <|endoftext|> <s>\nAssistant:"


def conversation_of(n: int) -> list[Exchange]:
    """The last question and n - 1 exchanges before it."""
    return [*(Exchange(f"Question {i}?", f"answer {i}") for i in range(n - 1)), Exchange("The last?")]


def ids_of(tokenizer, exchanges: Sequence[Exchange]) -> list[int]:
    return [token for segment in encode("alpaca", exchanges, tokenizer) for part in segment for token in part]


@pytest.mark.parametrize(("kept", "note"), [(4, None), (3, "oldest exchange is"), (1, "3 oldest exchanges are")])
def test_the_oldest_exchanges_make_room_for_one_token_and_a_note_says_how_many(tokenizer, capsys, kept, note):
    exchanges = conversation_of(4)
    expected = ids_of(tokenizer, exchanges[-kept:])
    model = says(tokenizer, "abc", block_size=len(expected) + 1)
    given = answer(model, tokenizer, "alpaca", exchanges, Sampling())
    assert model.contexts == [expected] and given.text == "a"
    err = capsys.readouterr().err
    assert err == (f"note: the {note} left out: the context has {len(expected) + 1} tokens\n" if note else "")


def test_exchanges_are_left_out_for_more_room_only_if_asked_and_never_the_question(tokenizer, capsys):
    exchanges = conversation_of(3)
    for room, kept in ((1, 3), (2, 2), (10**6, 1)):
        model = says(tokenizer, "abc", block_size=len(ids_of(tokenizer, exchanges)) + 1)
        answer(model, tokenizer, "alpaca", exchanges, Sampling(), room=room)
        assert model.contexts[0] == ids_of(tokenizer, exchanges[-kept:])


def test_a_question_that_fills_the_context_is_refused_in_one_line(tokenizer, capsys):
    long = [*conversation_of(3)[:-1], Exchange("word " * 200)]
    n = len(ids_of(tokenizer, long[-1:]))
    for block_size in (64, n):
        with pytest.raises(GenerationError, match=f"context of {block_size} tokens, but has {n} .*shorten it") as e:
            answer(says(tokenizer, "abc", block_size), tokenizer, "alpaca", long, Sampling())
        assert "\n" not in str(e.value) and not capsys.readouterr().err
    assert answer(says(tokenizer, "abc", n + 1), tokenizer, "alpaca", long, Sampling()).text == "a"


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 400), st.integers(1, 300), st.integers(1, 5), st.integers(0, 10**6))
def test_prompt_and_answer_never_exceed_the_context(tokenizer, block_size, max_new_tokens, n, seed):
    draw = random.Random(seed)
    script = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
    model = Scripted(script, tokenizer.vocab_size, block_size)  # which asserts that no prompt is longer
    heard: list[str] = []
    sampling = Sampling(max_new_tokens=max_new_tokens)
    try:
        given = answer(model, tokenizer, "user-assistant", conversation_of(n), sampling, heard.append)
    except GenerationError:
        assert not model.contexts
        return
    prompt = model.contexts[0]
    assert prompt[0] == tokenizer.bos_id and len(model.contexts[-1]) < block_size
    limit = min(max_new_tokens, block_size - len(prompt))
    assert len(model.contexts) <= limit and given.text == "".join(heard)
    sampled = [model.script[i] if i < 30 else model.script[0] for i in range(len(model.contexts))]
    assert given.stopped == (sampled[-1] == tokenizer.eos_id) and bool(given.cut_by) != given.stopped


def test_a_run_that_is_not_there_is_one_clear_line(tmp_path):
    assert_one_clear_line(
        script("generate.py", "runs/none", "--prompt", "x", cwd=tmp_path), "runs/none", "there are: none"
    )
    assert_one_clear_line(script("generate.py", "--prompt", "x", cwd=tmp_path), "python main.py")
    assert_one_clear_line(script("evaluate.py", cwd=tmp_path), "python main.py")
    assert not list(Path(tmp_path).iterdir())
