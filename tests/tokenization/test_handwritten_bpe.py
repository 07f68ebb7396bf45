import functools
import gzip
import json
import random
import sysconfig
import time
import unicodedata
from pathlib import Path

import pytest
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kindling.tokenization import handwritten_bpe as bpe
from kindling.tokenization.handwritten_bpe import SYMBOLS, ByteLevelBPE

SPECIAL = ["<pad>", "<|endoftext|>"]
CODE = [
    "def add(a, b):\n    return a + b  # 1 + 2 == 3\n\n\n",
    "class Stack:\n\tdef __init__(self):\n\t\tself.items = [10, 200, 3000]\n",
    "# naïve ☃ 一二三 x² Ⅷ it's we'll\r\n",
] * 4


def library_words(split_digits: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not split_digits:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def train_library(texts, vocab_size: int, split_digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = library_words(split_digits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


@functools.cache
def read_stdlib(*packages: str) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for package in packages for f in sorted((root / package).glob("*.py"))]
    return [f.read_text(encoding="utf-8") for f in files]


@functools.cache
def read_stories() -> list[str]:
    with gzip.open(shared_file("tinystories/train_first_2mib.txt.gz"), "rt", encoding="utf-8", newline="") as f:
        return f.read().split("<|endoftext|>")


@functools.cache
def read_code() -> list[str]:
    with gzip.open(shared_file("code_corpus.jsonl.gz"), "rt", encoding="utf-8") as f:
        return [json.loads(line)["content"] for line in f]


LEARNT = {digits: ByteLevelBPE.train(CODE, 400, SPECIAL, digits) for digits in (False, True)}
LIBRARY = {digits: train_library(CODE, 400, digits) for digits in (False, True)}


@pytest.mark.parametrize("split_digits", [False, True])
@pytest.mark.parametrize("vocab_size", [258, 5000])
@pytest.mark.parametrize(
    "read",
    [lambda: read_stdlib("asyncio", "json"), lambda: read_stories()[::3], lambda: read_code()[::60]],
    ids=["stdlib", "stories", "code"],
)
def test_a_real_corpus_gives_the_tokenizer_json_of_the_library(read, vocab_size, split_digits):
    texts = read()
    ours = ByteLevelBPE.train(texts, vocab_size, SPECIAL, split_digits)
    assert ours.to_json() == train_library(texts, vocab_size, split_digits).to_str()


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["ab", "abc ", "a ", "ab1 \n", "a's\t"]),
    st.integers(258, 400),
    st.booleans(),
)
def test_repetitive_texts_that_hold_runs_and_overlaps_give_the_merges_of_the_library(seed, alphabet, size, digits):
    draw = random.Random(seed)
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(draw.randrange(1, 8))]
    ours, library = ByteLevelBPE.train(texts, size, SPECIAL, digits), train_library(texts, size, digits)
    assert ours.to_json() == library.to_str()
    for text in [*texts, "".join(draw.choices(alphabet, k=60))]:
        assert ours.encode(text) == library.encode(text).ids


SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\ufeff\u200b"
PIECES = [
    *SPACES,
    *"aZéßдñ一ㄅ",
    *"079²½Ⅷ٣一〇",
    *"'\"_-(+.=☃\u0301\u200d😀\x00",
    "'s",
    "'t",
    "'ll",
    "'re",
    "'S",
    " 1",
    "  x",
]
AWKWARD = st.lists(st.sampled_from(PIECES)).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), AWKWARD, st.lists(st.one_of(st.sampled_from(PIECES + CODE), st.text())).map("".join)))
def test_ids_of_any_text_are_those_of_the_library_and_decode_to_it(text):
    for split_digits in (False, True):
        ids = LEARNT[split_digits].encode(text)
        assert ids == LIBRARY[split_digits].encode(text).ids
        assert LEARNT[split_digits].decode(ids) == text


def at_an_edge(point: int) -> bool:
    """Whether a neighbour has another category, as at the ends of a table's ranges."""
    return len({unicodedata.category(chr(i)) for i in range(max(point - 1, 0), min(point + 2, 0x110000))}) > 1


@pytest.mark.parametrize("split_digits", [False, True])
@pytest.mark.parametrize("which", ["edges", pytest.param("all", marks=pytest.mark.slow)])
def test_each_code_point_splits_as_in_the_library(which, split_digits):
    ours, library = LEARNT[split_digits], library_words(split_digits)
    assigned, rest = range(0x40000), range(0x40000, 0x110000, 61)  # of the rest, neither knows a letter or numeral
    points = [chr(i) for i in [*assigned, *rest] if not 0xD800 <= i < 0xE000]
    points = [c for c in points if which == "all" or ord(c) % 61 == 0 or at_an_edge(ord(c))]
    for start in range(0, len(points), 2**14):
        # a letter joins the first, a numeral the second, others but spaces the third
        for before in ("a", "1", "!"):
            text = "".join(before + c for c in points[start : start + 2**14])
            offsets = [at for _, at in library.pre_tokenize_str(text)]
            assert ours.split(text) == [text[i:j] for i, j in offsets]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_real_code_has_the_ids_of_the_library_on_starcoder2s_vocabulary(every):
    path = shared_file("starcoder2_tokenizer") / "tokenizer.json"
    ours, library = ByteLevelBPE.load(path), Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    texts = read_code()
    texts = [*texts[::12], *(t for t in texts if not t.isascii() and len(t) < 20_000)][::every]
    assert [ours.encode(t) for t in texts] == [e.ids for e in library.encode_batch_fast(texts)]


@settings(deadline=None)
@given(st.text(st.sampled_from("\ud800\udbff\udc00\udfff a1\n☃")))
def test_lone_surrogates_survive(text):
    assert LEARNT[True].decode(LEARNT[True].encode(text)) == text


def test_special_tokens_in_text_stay_text_and_are_spelt_out_when_decoded():
    tokenizer = LEARNT[False]
    assert not {0, 1} & set(tokenizer.encode("<pad><|endoftext|>"))
    assert tokenizer.decode([0, *tokenizer.encode("x<pad>"), 1]) == "<pad>x<pad><|endoftext|>"


def test_incomplete_characters_decode_to_the_replacement_character():
    tokenizer = LEARNT[False]
    snow = [tokenizer.vocab[SYMBOLS[b]] for b in "☃".encode()]
    assert tokenizer.decode(snow) == "☃"
    for ids in (snow[:2], snow[1:], [*snow[:1], *tokenizer.encode("x")], snow + snow[:2]):
        assert tokenizer.decode(ids) == LIBRARY[False].decode(ids)
    assert tokenizer.decode(snow[:2]) == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab_size, *snow, -1]) == "☃"


def test_a_saved_tokenizer_loads_here_and_in_the_library_with_the_same_ids(tmp_path):
    for split_digits, tokenizer in LEARNT.items():
        tokenizer.save(tmp_path / "tokenizer.json")
        again, library = (
            ByteLevelBPE.load(tmp_path / "tokenizer.json"),
            Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        )
        assert again.to_json() == tokenizer.to_json()
        assert again.special_tokens == tokenizer.special_tokens
        for text in [*CODE, "  12 345\n\t 6"]:
            ids = tokenizer.encode(text)
            assert again.encode(text) == ids == library.encode(text).ids
            assert library.decode(ids) == text
        assert (len(tokenizer.encode("7777")) == 4) >= split_digits


def edited(**changes) -> str:
    content = json.loads(LEARNT[True].to_json())
    for key, value in changes.items():
        place = content["model"] if key in content["model"] else content
        place[key] = value
    return json.dumps(content)


def test_merges_as_strings_and_empty_affixes_are_read():
    merges = [" ".join(pair) for pair in json.loads(edited())["model"]["merges"]]
    again = ByteLevelBPE.from_json(edited(merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    assert again.merges == LEARNT[True].merges


DIGIT_RUNS = {"type": "Digits", "individual_digits": False}
BYTE_LEVEL = json.loads(LEARNT[False].to_json())["pre_tokenizer"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"dropout": 0.1}, "dropout"),
        ({"byte_fallback": True}, "byte_fallback"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"added_tokens": [{"id": 0, "content": "<tab>", "special": False}]}, "<tab>"),
        ({"pre_tokenizer": None}, "unknown form"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "use_regex"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGIT_RUNS, BYTE_LEVEL]}}, "sequence"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "sequence"),
        ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
        ({"merges": [["a", "no such token"]]}, "merge 0"),
        ({"merges": ["a b c"]}, "merge"),
    ],
)
def test_any_other_tokenizer_json_is_refused_in_one_line(changes, word):
    with pytest.raises(ValueError, match=word) as error:
        ByteLevelBPE.from_json(edited(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "no JSON"])
def test_what_is_no_tokenizer_json_is_refused(text):
    with pytest.raises(ValueError, match="plain byte-level BPE"):
        ByteLevelBPE.from_json(text)


@pytest.mark.parametrize(
    ("vocab_size", "special", "words"), [(256, ["<e>"], ["257", "256"]), (300, ["EOS"], ["'EOS'", "'<|EOS|>'"])]
)
def test_what_cannot_be_trained_is_refused_before_any_text_is_read(vocab_size, special, words):
    def texts():
        pytest.fail("a text was read")
        yield ""

    with pytest.raises(ValueError) as error:
        ByteLevelBPE.train(texts(), vocab_size, special)
    for word in words:
        assert word in str(error.value)


def test_a_byte_that_is_not_in_the_vocabulary_is_refused():
    vocab = {t: i for t, i in LEARNT[False].vocab.items() if t != SYMBOLS[0xF1]}
    tokenizer = ByteLevelBPE(vocab, [])
    assert tokenizer.decode(tokenizer.encode("ñ ☃")) == "ñ ☃"
    with pytest.raises(ValueError, match="vocabulary"):
        tokenizer.encode("\U00040000")


def test_the_cache_is_bounded_and_what_it_forgot_is_merged_again(monkeypatch):
    tokenizer = ByteLevelBPE.train(CODE, 400, SPECIAL)
    expected = tokenizer.encode(CODE[0])
    monkeypatch.setattr(bpe, "CACHED_WORDS", 5)
    tokenizer._cache.clear()
    for text in [*CODE, "x" * 1000]:
        tokenizer.encode(text)
        assert len(tokenizer._cache) <= 5
    assert max(map(len, tokenizer._cache)) <= bpe.CACHED_LENGTH
    assert tokenizer.encode(CODE[0]) == expected


def test_a_word_of_megabytes_takes_seconds():
    started = time.process_time()
    text = "ab" * 200_000
    assert LEARNT[False].decode(LEARNT[False].encode(text)) == text
    assert time.process_time() - started < 20


def test_real_python_trains_in_under_a_minute_and_encodes_faster_than_a_third_of_a_megabyte_a_second():
    texts = read_stdlib("asyncio", "email", "json", "unittest", "importlib", "concurrent/futures")
    n_bytes = sum(len(t.encode()) for t in texts)
    started = time.process_time()
    tokenizer = ByteLevelBPE.train(texts, 2048, SPECIAL)
    assert (time.process_time() - started) / n_bytes < 60 / 5e6
    started = time.process_time()
    n_tokens = sum(len(tokenizer.encode(t)) for t in texts)  # with a cold cache
    assert n_bytes / (time.process_time() - started) > 0.3e6
    assert n_bytes / n_tokens > 2.5
