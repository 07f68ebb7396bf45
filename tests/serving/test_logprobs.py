"""Tokens as the protocols show them, parts of characters included."""

import pytest

from config import TokenizerConfig
from kindling.serving.generation import Token
from kindling.serving.logprobs import bytes_of, in_columns, listed, text_of, text_or_bytes
from kindling.serving.torch_engine import TorchVocabulary
from kindling.tokenization.train_tokenizer import train_bpe, train_sentencepiece

TEXT = " x é🦆\ufffd y"
SENTENCEPIECE = TokenizerConfig(kind="sentencepiece", eos_token="</s>")


@pytest.fixture(scope="module")
def vocabulary() -> TorchVocabulary:
    tokenizer = train_bpe(["no merges"], TokenizerConfig(), 261)
    return TorchVocabulary(tokenizer, tokenizer.vocab_size + 1, infills=False)


def test_the_bytes_of_tokens_joined_are_those_of_the_text(vocabulary):
    ids = vocabulary.encode(TEXT)
    assert any("\ufffd" in vocabulary.decode([i]) for i in ids)
    assert b"".join(bytes_of(vocabulary, i) for i in ids) == TEXT.encode("utf-8")
    assert bytes_of(vocabulary, vocabulary.eos_id) == b"<|endoftext|>"
    assert bytes_of(vocabulary, len(vocabulary.spellings) - 1) == b"", "the model has more logits than there are tokens"


def test_the_bytes_of_sentencepiece_are_those_of_the_text():
    pytest.importorskip("sentencepiece")
    tokenizer = train_sentencepiece(["a b c x y z " * 9] * 9, SENTENCEPIECE, 280)
    vocabulary = TorchVocabulary(tokenizer, tokenizer.vocab_size, infills=False)
    ids = vocabulary.encode("x é🦆 y")
    assert any("\ufffd" in vocabulary.decode([i]) for i in ids)
    assert b"".join(bytes_of(vocabulary, i) for i in ids).decode("utf-8").lstrip() == "x é🦆 y"
    assert text_of(vocabulary, ids[-1]).endswith("y") and bytes_of(vocabulary, tokenizer.eos_id) == b"</s>"


def test_parts_of_characters_are_told_apart(vocabulary):
    first, second = vocabulary.encode("é")
    tokens = [Token(first, -0.1, ((first, -0.1), (second, -3.0)), begins=-1), Token(second, -0.2, ())]
    assert text_or_bytes(vocabulary, first) == [0xC3] and text_or_bytes(vocabulary, vocabulary.encode("x")[0]) == "x"
    columns = in_columns(vocabulary, tokens)
    assert columns["tokens"] == [r"bytes:\xc3", r"bytes:\xa9"] and columns["text_offset"] == [0, 0]
    assert columns["top_logprobs"] == [{r"bytes:\xc3": -0.1, r"bytes:\xa9": -3.0}, {}]
    shown = listed(vocabulary, tokens)
    assert [(one["token"], one["bytes"]) for one in shown] == [("\ufffd", [0xC3]), ("\ufffd", [0xA9])]
    assert [one["bytes"] for one in shown[0]["top_logprobs"]] == [[0xC3], [0xA9]]
