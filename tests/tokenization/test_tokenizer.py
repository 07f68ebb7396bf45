import gzip
import json
import os
import socket
import sys
from dataclasses import replace

import pytest
from conftest import assert_one_clear_line, script, shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from config import TokenizerConfig
from kindling.errors import ConfigError, TokenizerError
from kindling.tokenization.compare import COMPARED, read_documents, split_held_out
from kindling.tokenization.handwritten_bpe import SYMBOLS
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.tokenizer import Tokenizer, from_json, load_json
from kindling.tokenization.train_tokenizer import train, train_bpe

CODE = [
    "def add(a, b):\n    return a + b\n\n\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
    "# naïve ☃\n",
] * 5
TRAINED = train_bpe(CODE, TokenizerConfig(), 400)
SENTENCEPIECE = {
    model: train(CODE, TokenizerConfig(kind="sentencepiece", sentencepiece_model=model), 340)
    for model in ("bpe", "unigram")
}


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


def test_ids_equal_those_of_the_tokenizers_library():
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(TRAINED.to_json())
    for text in CODE:
        assert TRAINED.encode(text) == backend.encode(text).ids


def test_byte_level_bpe_of_any_origin_is_encoded_by_hand_to_the_ids_of_the_library(tmp_path):
    nfkc = train_bpe(CODE, TokenizerConfig(normalizer="nfkc"), 400)
    handwritten = train(CODE, TokenizerConfig(kind="handwritten"), 400)
    for tokenizer in (TRAINED, nfkc, handwritten):
        assert tokenizer._bpe is not None
        for text in [*CODE, "  12 x² Ⅷ … ﬁ e\u0301 \u2028 <|endoftext|>"]:
            assert tokenizer.encode(text) == tokenizer.encode_by_library(text)
    assert handwritten.to_json() == TRAINED.to_json()


def of_another_kind() -> Tokenizer:
    """A tokenizer that splits numbers before words, which only the library can."""
    content = json.loads(TRAINED.to_json())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}]}
    content["pre_tokenizer"]["pretokenizers"].append(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    )
    return from_json(json.dumps(content), TokenizerConfig())


def test_a_tokenizer_of_another_kind_is_encoded_by_the_library():
    tokenizer = of_another_kind()
    assert tokenizer._bpe is None
    assert tokenizer.decode(tokenizer.encode("x = 100 ☃")) == "x = 100 ☃"


@pytest.mark.parametrize("tokenizer", [TRAINED, of_another_kind(), *SENTENCEPIECE.values()])
@settings(deadline=None)
@given(batch=st.lists(st.lists(st.integers(0, 339), max_size=20), max_size=4))
def test_many_texts_are_decoded_as_each_alone(tokenizer, batch):
    assert tokenizer.decode_batch(batch) == [tokenizer.decode(ids) for ids in batch]


@settings(deadline=None)
@given(st.lists(st.sampled_from(b"\xed\xa0\x80\xbf\xf0\x9f\xe2\x98\x83a\xff"), max_size=12))
def test_bytes_that_are_no_text_are_decoded_alike_too(raw):
    ids = [TRAINED._backend.token_to_id(SYMBOLS[b]) for b in raw]
    assert TRAINED.decode_batch([ids]) == [TRAINED.decode(ids)]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@settings(deadline=None, max_examples=200)
@given(
    text=st.one_of(
        st.text(),
        st.lists(st.sampled_from([*CODE, "\t", " ", "\n", "\u2581", "\u2585", "<unk>", "<0x41>"])).map("".join),
    )
)
def test_sentencepiece_gives_every_text_back_or_refuses_it(model, text):
    tokenizer = SENTENCEPIECE[model]
    if "\u2581" in text:
        with pytest.raises(TokenizerError, match=r"\\u2581.* comes back as .*--tokenizer\.lossy"):
            tokenizer.encode(text)
    else:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids)


def test_sentencepiece_keeps_the_order_of_control_tokens_and_spells_them_out():
    cfg = TokenizerConfig(kind="sentencepiece", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer = train(CODE, cfg, 350)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    ids = tokenizer.encode("  <pad> x")
    assert tokenizer.decode([2, *ids, 3, 0, 1, 10**6]) == "<bos>  <pad> x<eos><pad><unk>"
    assert tokenizer.decode(tokenizer.encode("一")[1:]) == "\ufffd\ufffd"
    assert tokenizer.vocab_size <= 350


def test_sentencepiece_leaves_out_no_text_for_its_length_or_its_marks():
    cfg = TokenizerConfig(kind="sentencepiece")
    tokenizer = train(["\u2585 " + "kindling sparks\n" * 1000], cfg, 300)
    assert len(tokenizer.encode("kindling")) < len(train(["other text"], cfg, 300).encode("kindling"))


@pytest.mark.parametrize("tokenizer", [*SENTENCEPIECE.values(), train(CODE, TokenizerConfig(kind="handwritten"), 300)])
def test_any_kind_comes_back_from_its_json(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for again in (from_json(tokenizer.to_json(), tokenizer.cfg), load_json(tmp_path / "tokenizer.json", tokenizer.cfg)):
        assert type(again) is type(tokenizer)
        assert (again.sha256, again.eos_id, again.vocab_size) == (
            tokenizer.sha256,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        assert [again.encode(text) for text in CODE] == [tokenizer.encode(text) for text in CODE]


@pytest.mark.parametrize("kind", ["bpe", "handwritten", "sentencepiece"])
def test_a_vocabulary_without_room_is_refused_before_any_text_is_read(kind):
    def texts():
        pytest.fail("a text was read")
        yield ""

    with pytest.raises(TokenizerError, match=r"model\.vocab_size .*\(256 bytes .* 200"):
        train(texts(), TokenizerConfig(kind=kind), 200)


@pytest.mark.parametrize("kind", ["handwritten", "sentencepiece"])
def test_a_kind_that_keeps_text_refuses_nfkc(kind):
    with pytest.raises(ConfigError, match=rf"tokenizer\.normalizer .*{kind}.* --tokenizer\.kind bpe"):
        TokenizerConfig(kind=kind, normalizer="nfkc")


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
        (lambda p: train_bpe(CODE, TokenizerConfig(), 100), ["model.vocab_size", "261", "100"]),
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
            lambda p: from_json('{"type": "sentencepiece", "model": "bm9uZQ=="}', TokenizerConfig()),
            ["SentencePiece", "check the file"],
        ),
        (
            lambda p: from_json(SENTENCEPIECE["bpe"].to_json(), TokenizerConfig(eos_token="<e>")),
            ["tokenizer.eos_token", "'<e>'", "<|endoftext|>"],
        ),
        (lambda p: train([], TokenizerConfig(kind="sentencepiece"), 300), ["300", "0 documents", "--model.vocab-size"]),
        (lambda p: train(["a\ud800"], TokenizerConfig(kind="sentencepiece"), 300), ["lone surrogate", "character 1"]),
        (lambda p: train(CODE, TokenizerConfig(kind="handwritten", eos_token="EOS"), 300), ["'EOS'", "'<|EOS|>'"]),
        (lambda p: train(CODE, TokenizerConfig(kind="pretrained", path="x"), 300), ["tokenizer.kind", "'pretrained'"]),
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


def write_corpus(folder, n: int) -> None:
    (folder / "src").mkdir()
    for i in range(n):
        (folder / "src" / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 5, encoding="utf-8")


def test_compare_prints_a_table_and_saves_a_plot_and_asks_no_network(tmp_path):
    write_corpus(tmp_path, 30)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as f:
        for row in ({"content": "print('\u2581')\n"}, {"text": "it's text"}, {"text": None}, 3):
            f.write(json.dumps(row) + "\n")
    args = ("src", "rows.jsonl.gz", "--vocab-size", "320", "--out", "plots/t.png")
    silent = socket.create_server(("127.0.0.1", 0))
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
    result = script("kindling.tokenization.compare", *args, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    silent.settimeout(0)
    with pytest.raises(BlockingIOError), silent:
        silent.accept()  # nobody has connected
    lines = result.stdout.splitlines()
    assert lines[0].startswith("32 documents") and "learn on 26 of them, all are measured on the other 6" in lines[0]
    assert lines[1].startswith("2 could not be read")
    assert [line.split("  ")[0] for line in lines[2:6]] == ["tokenizer", *list(COMPARED)[:3]]
    ours, library = lines[4].split(), lines[3].split()
    assert ours[1:3] == library[2:4]  # bytes per token, tokens per line
    assert "plots/t.png" in lines[6]
    assert (tmp_path / "plots" / "t.png").read_bytes().startswith(b"\x89PNG")


def test_compare_takes_a_pretrained_path_and_a_preset_and_says_when_nothing_is_held_out(tmp_path):
    write_corpus(tmp_path, 3)
    (tmp_path / "tokenizer.json").write_text(TRAINED.to_json(), encoding="utf-8")
    args = ("--vocab-size", "300", "--preset", "autocomplete", "--pretrained", "tokenizer.json")
    result = script("kindling.tokenization.compare", "src", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 documents" in result.stdout and "measured on what they were trained on" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[-3:-1]] == ["StarCoder2", "autocomplete"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["FILES must be named"]),
        (("nowhere",), ["FILES must exist", "'nowhere'"]),
        (("empty",), ["no document", ".jsonl.gz"]),
        (("empty", "--vocab-size", "100"), ["--vocab-size", "300", "100"]),
        (("empty", "--preset", "autocomplet"), ["'autocomplet'", "did you mean autocomplete"]),
    ],
)
def test_compare_on_bad_input_is_one_line(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    assert_one_clear_line(script("kindling.tokenization.compare", *args, cwd=tmp_path), *words)


def test_documents_are_held_out_by_their_content_whatever_the_files_are_called(tmp_path):
    write_corpus(tmp_path, 30)
    (tmp_path / "src" / "bad.py").write_bytes(b"\xff")
    (tmp_path / "src" / "again.py").write_bytes((tmp_path / "src" / "m3.py").read_bytes())
    documents, unreadable, cut = read_documents((tmp_path / "src",), 10**6)
    assert (len(documents), unreadable, cut) == (30, 1, False)
    learnt, measured, _ = split_held_out(documents)
    assert (len(learnt), len(measured)) == (24, 6) and not set(learnt) & set(measured)
    for file in sorted((tmp_path / "src").iterdir()):
        file.rename(file.with_name("x" + file.name))
    assert split_held_out(read_documents((tmp_path / "src",), 10**6)[0])[:2] == (learnt, measured)
    assert read_documents((tmp_path / "src",), 300)[2]


def test_a_control_token_that_a_text_spells_out_is_found_with_every_kind():
    for kind in ("bpe", "handwritten", "sentencepiece"):
        tokenizer = train(CODE, TokenizerConfig(kind=kind), 340)
        assert tokenizer.find_control_token_text("a <|endoftext|> in a text") == "<|endoftext|>", kind
        assert tokenizer.find_control_token_text("endoftext") is None


def test_only_a_sentencepiece_tokenizer_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # importing it fails
    assert train(CODE, TokenizerConfig(), 340).decode([*train(CODE, TokenizerConfig(), 340).encode("def f")]) == "def f"
    with pytest.raises(TokenizerError, match=r"not installed; pip install -r requirements\.txt"):
        train(CODE, TokenizerConfig(kind="sentencepiece"), 340)
