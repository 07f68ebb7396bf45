import json
from dataclasses import replace

import pytest
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from config import TokenizerConfig
from tokenizer import TokenizerError, load_json, load_pretrained, train_bpe

CODE = [
    "def add(a, b):\n    return a + b\n\n\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
    "# naïve ☃\n",
] * 5
TRAINED = train_bpe(CODE, TokenizerConfig(), 400)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_decode_of_encode_is_the_text(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|endoftext|>", " ", "\n", "\t", "x != y", "1.0", "'s", "ﬁ²…", "\x00", "\r\n", "\ufeff"])
    ).map("".join)
)
def test_awkward_pieces_survive_and_control_tokens_stay_text(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.eos_id not in ids
    assert TRAINED.encode_batch([text, text]) == [ids, ids]


def test_ids_equal_those_of_the_tokenizers_library():
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(TRAINED.to_json())
    for text in CODE:
        assert TRAINED.encode(text) == backend.encode(text).ids


def test_every_byte_has_a_token_though_training_saw_few():
    tokenizer = train_bpe(["aaaa"], TokenizerConfig(), 300)
    assert tokenizer.decode(tokenizer.encode("\U0010ffff ÿ\x01")) == "\U0010ffff ÿ\x01"


def test_control_tokens_take_the_first_ids_in_their_order():
    cfg = TokenizerConfig(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    tokenizer = train_bpe(CODE, cfg, 300)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert tokenizer.decode(tokenizer.encode("<pad><eos>")) == "<pad><eos>"
    assert set(tokenizer.encode("<pad><eos>")).isdisjoint({0, 1, 2, 3})


def test_nfkc_rewrites_code_only_where_it_is_asked_for():
    assert TRAINED.decode(TRAINED.encode("x² …")) == "x² …"
    rewriting = train_bpe(CODE, TokenizerConfig(normalizer="nfkc"), 400)
    assert rewriting.decode(rewriting.encode("x² …")) == "x2 ..."


def test_a_saved_tokenizer_loads_as_itself(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TRAINED.to_json(), encoding="utf-8")
    for again in (
        load_json(tmp_path / "tokenizer.json", TRAINED.cfg),
        load_pretrained(TokenizerConfig(kind="pretrained", path=str(tmp_path))),
        load_pretrained(TokenizerConfig(kind="pretrained", path=str(tmp_path / "tokenizer.json"))),
    ):
        assert again.sha256 == TRAINED.sha256
        assert again.encode("<|endoftext|> def") == TRAINED.encode("<|endoftext|> def")


def test_a_vocabulary_without_some_byte_refuses_the_text_it_would_lose(tmp_path):
    data = json.loads(TRAINED.to_json())
    del data["model"]["vocab"]["ñ"]  # the symbol of byte F1, which planes 4 to 7 begin with
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_pretrained(TokenizerConfig(kind="pretrained", path=str(tmp_path)))
    assert tokenizer.decode(tokenizer.encode("ñ ☃")) == "ñ ☃"
    with pytest.raises(TokenizerError, match="in no token"):
        tokenizer.encode("\U00040000")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: TRAINED.encode("\ud800"), ["lone surrogate", "character 0"]),
        (lambda p: train_bpe(CODE, TokenizerConfig(), 100), ["model.vocab_size", "257", "100"]),
        (
            lambda p: load_pretrained(TokenizerConfig(kind="pretrained", path=str(p / "no.json"))),
            ["no.json", "--tokenizer.path"],
        ),
        (
            lambda p: load_pretrained(TokenizerConfig(kind="pretrained", path="nobody/nothing")),
            ["'nobody/nothing'", "network", "--tokenizer.path"],
        ),
        (lambda p: load_json(p / "bad.json", TokenizerConfig()), ["bad.json", "tokenizer.json"]),
        (
            lambda p: load_json(p / "good.json", replace(TRAINED.cfg, eos_token="<eos>")),
            ["tokenizer.eos_token", "'<eos>'", "<|endoftext|>"],
        ),
    ],
)
def test_bad_input_is_one_line_with_a_way_out(tmp_path, make, words):
    (tmp_path / "bad.json").write_text('"no tokenizer"', encoding="utf-8")
    (tmp_path / "good.json").write_text(TRAINED.to_json(), encoding="utf-8")
    with pytest.raises(TokenizerError) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_starcoder2_round_trips_real_code():
    tokenizer = load_pretrained(TokenizerConfig(kind="pretrained", path=str(shared_file("starcoder2_tokenizer"))))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (49_152, 0)
    for text in [*CODE, "<|endoftext|>", "<fim_prefix> x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_id not in tokenizer.encode(text)
