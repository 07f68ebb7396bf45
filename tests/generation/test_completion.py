import io
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import CFG, Scripted

from config import TokenizerConfig
from kindling.data.prompts import Exchange, encode
from kindling.generation.completion import (
    Answer,
    Completion,
    TextStream,
    answer,
    complete,
    complete_batch,
    complete_document,
    encode_document,
    token_spellings,
)
from kindling.generation.decoding import stream
from kindling.generation.healing import split_for_healing
from kindling.generation.sampling import GenerationError, Sampling
from kindling.tokenization.tokenizer import SentencePieceTokenizer
from kindling.tokenization.train_tokenizer import train_bpe, train_sentencepiece
from model import GPT


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(CFG).eval()


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


def test_a_prompt_longer_than_the_context_is_cropped_with_a_note(model, tokenizer, capsys):
    complete(model, tokenizer, "x y " * 30, Sampling(max_new_tokens=1))
    assert "its beginning is cropped" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_new_document(model):
    tokenizer = train_bpe(["some text"], TokenizerConfig(), 280)
    assert isinstance(complete(model, tokenizer, "", Sampling(max_new_tokens=3)).text, str)


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


def test_a_reader_gets_no_half_of_a_character_that_the_limit_cuts(tokenizer):
    heard, sampling = [], Sampling(max_new_tokens=3)
    cut = answer(says(tokenizer, "a🦆"), tokenizer, "alpaca", QUESTION, sampling, heard.append)
    assert cut.text == "".join(heard) == "a" and not cut.stopped
    assert complete_document(says(tokenizer, "a🦆"), tokenizer, "", sampling).text == "a"


def test_half_a_character_is_part_of_a_sample_and_of_what_a_model_ended_itself(tokenizer):
    assert complete(says(tokenizer, "a🦆"), tokenizer, "", Sampling(max_new_tokens=3)).text == "a\ufffd"
    half = says(tokenizer, "a🦆")
    del half.script[-2:-1]
    assert complete_document(half, tokenizer, "", Sampling(max_new_tokens=9)).text == "a\ufffd"


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
    rng = random.Random(seed)
    script = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
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


# --- stop strings


def test_nothing_of_a_stop_string_that_spans_tokens_is_said(tokenizer):
    heard: list[str] = []
    model = says(tokenizer, "return a\nclass B")
    new = complete(model, tokenizer, "\nclass A", Sampling(stop=("zzz", "\nclass")), heard.append)
    assert new == Completion("return a", new.n_tokens, "stop") and "".join(heard) == "return a"
    assert len(model.contexts) == new.n_tokens < len(tokenizer.encode("return a\nclass B")), "it does not go on"


def test_what_only_began_like_a_stop_string_is_said_in_the_end(tokenizer):
    for text in ("a\nclas", "a\nclas\ncla b"):
        assert complete(says(tokenizer, text), tokenizer, "", Sampling(stop=("\nclass",))).text == text


@settings(deadline=None, max_examples=300)
@given(st.text("ab<é", max_size=30), st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3), st.integers(0, 2))
def test_pieces_never_hold_a_part_of_a_stop_string_and_a_batch_cuts_where_a_stream_does(tokenizers, text, stop, which):
    tokenizer = tokenizers[which]
    ids = tokenizer.encode_by_library(text)
    in_turn, pieces = TextStream(tokenizer, stop), []
    for n, token in enumerate(ids, 1):
        pieces.append(in_turn.add(token))
        whole, said = tokenizer.decode(ids[:n]), "".join(pieces)
        found = [at for s in stop if (at := whole.find(s)) >= 0]
        assert said == whole[: len(said)]
        # what was said goes up to the first place where a stop string begins, or may
        ends = [i for i in range(len(whole)) if any(s.startswith(whole[i:]) for s in stop)]
        if "\ufffd" not in whole:
            assert len(said) == min([*found, *([] if found else ends), len(whole)])
        if in_turn.stopped:
            break
    said = "".join(pieces) + in_turn.finish()
    assert in_turn.stopped == any(s in tokenizer.decode(ids) for s in stop) and not any(s in said for s in stop)
    assert TextStream(tokenizer, stop).add_all(ids) == said


def test_an_answer_ends_before_a_stop_string_and_is_not_cut(tokenizer):
    given = answer(says(tokenizer, "Yes. No"), tokenizer, "alpaca", QUESTION, Sampling(stop=(" No",)))
    assert given == Answer("Yes.", True, "")


@pytest.mark.parametrize("stop", [(), ("e", "\n")])
def test_a_batch_of_texts_is_what_each_prompt_gets_alone(model, tokenizer, stop):
    prompts = ["a", "b c", "\n", "add(a"]
    sampling = Sampling(temperature=1.0, top_k=None, max_new_tokens=7, stop=stop)
    ids = [encode_document(tokenizer, prompt) for prompt in prompts]
    seeds = [3, 4, 5, 6]
    assert all(len(one) + 7 <= 16 for one in ids)
    got = dict(complete_batch(model, tokenizer, ids, seeds, sampling))
    for number, (prompt, seed) in enumerate(zip(prompts, seeds)):
        alone = complete(model, tokenizer, prompt, replace(sampling, seed=seed))
        assert (got[number].text, got[number].ended_by) == (alone.text, alone.ended_by)


def test_a_batch_says_what_ended_each(model, tokenizer):
    bos, sampling = tokenizer.bos_id, Sampling(greedy=True, max_new_tokens=4)
    (token, *_) = stream(model, [bos], sampling, tokenizer.eos_id)
    got = dict(complete_batch(model, tokenizer, [[bos], [bos] * 14], [0, 0], sampling))
    assert [got[n].ended_by for n in range(2)] == ["limit", "context"]
    stop = (tokenizer.decode([token]),)
    assert next(complete_batch(model, tokenizer, [[bos]], [0], replace(sampling, stop=stop)))[1].ended_by == "stop"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "end_ids", (token,))
        assert next(complete_batch(model, tokenizer, [[bos]], [0], sampling)) == (0, Completion("", 0, "end of text"))


# --- the end of a file


class Liking(Scripted):
    """Likes each token better the earlier it is among its `ids`, whatever came before."""

    def forward_cached(self, idx, cache):
        super().forward_cached(idx, cache)
        logits = torch.zeros(1, self.cfg.vocab_size)
        logits[0, self.script] = torch.arange(len(self.script), 0, -1.0)
        return logits  # (1, V)


def test_a_cut_inside_a_word_goes_on_with_the_rest_of_the_word():
    tokenizer = train_bpe([" return"] * 9, TokenizerConfig(), 270)
    (word,) = tokenizer.encode(" return")
    assert word not in tokenizer.encode("x ret"), "what no training text goes on with"
    model = Liking([word], tokenizer.vocab_size, 64)
    heard: list[str] = []
    new = complete_document(model, tokenizer, "x ret", Sampling(greedy=True, max_new_tokens=1), heard.append)
    assert new.text.startswith("urn") and "".join(heard) == new.text
    assert complete_document(model, tokenizer, "x ret", Sampling(greedy=True, stop=("ret", "zz"))).text.startswith(
        "urn "
    )


@pytest.fixture(scope="module")
def drawn(tokenizers):
    torch.manual_seed(0)
    return GPT(replace(CFG, vocab_size=max(t.vocab_size for t in tokenizers) + 3, block_size=64)).eval()


@settings(deadline=None, max_examples=40)
@given(st.text("ab(\n <é🦆return", min_size=1, max_size=30), st.integers(0, 2), st.integers(0, 100))
def test_what_is_taken_back_is_written_again_and_not_said_twice(drawn, tokenizers, text, which, seed):
    tokenizer, text = tokenizers[which], "x" + text
    if which == 1:
        text = " ".join(text.split())  # it holds no other spaces
    ids = encode_document(tokenizer, text)
    kept, healing = split_for_healing(ids, token_spellings(tokenizer, drawn.cfg.vocab_size))
    assert tokenizer.decode(kept) + healing.text == tokenizer.decode(ids)
    sampling = Sampling(temperature=2.0, top_k=None, max_new_tokens=12, seed=seed)
    out = list(stream(drawn, kept, sampling, tokenizer.eos_id, healing.allowed))
    whole = tokenizer.decode(kept + out)
    assert whole.startswith(tokenizer.decode(ids))
    new = complete_document(drawn, tokenizer, text, replace(sampling, max_new_tokens=12 - len(ids) + len(kept)))
    assert tokenizer.decode(ids) + new.text == (
        whole.rstrip("\ufffd") if new.ended_by in ("limit", "context") else whole
    )


def test_a_control_token_is_never_what_was_taken_back(tokenizer):
    model = Liking([tokenizer.bos_id, tokenizer.eos_id], tokenizer.vocab_size, 64)
    new = complete_document(model, tokenizer, "x <", Sampling(greedy=True, max_new_tokens=9))
    assert not new.text.startswith("s>") and not new.text.startswith("|endoftext|>")


def test_the_end_of_a_long_file_leaves_room_and_the_beginning_has_its_token(tokenizer, capsys):
    for text, max_new_tokens, n_read, n_new in (("b" * 10, 9, 11, 9), ("b" * 99, 9, 55, 9), ("b" * 99, 60, 32, 32)):
        model = says(tokenizer, "cd", block_size=64, eos=False)
        model.script = tokenizer.encode("b" * 3 + "cd" * 99)  # three are taken back
        new = complete_document(model, tokenizer, text, Sampling(greedy=True, max_new_tokens=max_new_tokens))
        assert len(model.contexts[0]) == n_read - 3 and len(model.contexts[-1]) < 64
        assert (model.contexts[0][0] == tokenizer.bos_id) == (len(text) == 10)
        assert len(new.text) == n_new and new.ended_by == ("limit" if n_new == max_new_tokens else "context")
        note = f"of the {len(text) + 1} tokens of the text, the last {n_read} are read"
        assert (note in capsys.readouterr().err) == (len(text) == 99)
