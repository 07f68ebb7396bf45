"""Tokenizers of others: each property on a small one, which gives every text back or is refused with an example."""

import json
from dataclasses import replace

import pytest
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from config import TokenizerConfig
from kindling.errors import TokenizerError, difference
from kindling.tokenization.added_space import without_added_space
from kindling.tokenization.pretrained import PROBES, load_pretrained, rewrites
from kindling.tokenization.tokenizer import RewrittenError, Tokenizer, from_json
from kindling.tokenization.train_tokenizer import train_bpe

END = "</s>"
CODE = ["def add(a, b):\n    return a + b\n", "class Caf\xe9:\n    x = 'na\xefve \u2603'\n"] * 5
LETTERS = "abcdefghijklmnopqrstuvwxyz()[]=:+_,.!'\"#<>/0123456789\n\t\r"


def byte_level(**settings) -> Backend:
    """Byte-level BPE, as of GPT-2, with its parts replaced."""
    backend = Backend.from_str(train_bpe(CODE, TokenizerConfig(eos_token=END), 300).to_json())
    for name, part in settings.items():
        setattr(backend, name, part)
    return backend


def llama_2(prepend=True, decoder=True) -> Backend:
    """BPE on pieces with U+2581 for a space, bytes for what no piece spells, and a space before each text."""
    vocab = {"<unk>": 0, "<s>": 1, END: 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["\u2581", *"adefrtunx=", "\u2581a", "\u2581x", "re"]:
        vocab[piece] = len(vocab)
    merges = [("\u2581", "a"), ("\u2581", "x"), ("r", "e")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    mark = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark]) if prepend else mark
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if decoder else parts)
    backend.add_special_tokens(["<unk>", "<s>", END])
    return backend


def unigram(scheme="always", letters=LETTERS, byte_fallback=False) -> Backend:
    """A Unigram model with Metaspace, whose pieces are letters; special tokens are pieces too, as SentencePiece has them."""
    pieces = [("<unk>", 0.0), (END, 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters), ("\u2581x", -2.5)]
    pieces += [(f"<0x{b:02X}>", -9.0) for b in range(256)] if byte_fallback else []
    backend = Backend(models.Unigram(pieces, 0, byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    space = decoders.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), space]) if byte_fallback else space
    backend.add_special_tokens(["<unk>", END])
    return backend


def with_added(*tokens: str | AddedToken) -> Backend:
    """Byte-level BPE with ordinary added tokens, whose ids are below those of other tokens."""
    content = json.loads(byte_level().to_str())
    free = max(content["model"]["vocab"].values()) + 1
    content["model"]["vocab"] |= {f"unused{i}": free + i for i in range(3)}  # so that added tokens are in the middle
    backend = Backend.from_str(json.dumps(content))
    backend.add_tokens(list(tokens))
    content = json.loads(backend.to_str())
    for i, token in enumerate(t for t in content["added_tokens"] if not t["special"]):
        token["id"] = free + 3 + i
        content["model"]["vocab"][token["content"]] = free + 3 + i
    content["model"]["vocab"]["last"] = free + 3 + len(tokens)
    return Backend.from_str(json.dumps(content))


def saved(backend: Backend, tmp_path, **settings) -> TokenizerConfig:
    """Return the config of a tokenizer that is saved as others save one."""
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    return TokenizerConfig(kind="pretrained", path=str(tmp_path), eos_token=END, **settings)


spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
EXACT = {
    "plain": byte_level(),
    "a space before each text": byte_level(pre_tokenizer=spaced),
    "a space, in a sequence": byte_level(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), spaced])),
    "Llama 2": llama_2(),
    "Llama 2, which takes no space away": llama_2(decoder=False),
    "Llama 2, which adds no space": llama_2(prepend=False, decoder=False),
    "a decoder that takes a space away that was not added": llama_2(prepend=False),
    "Unigram with bytes": unigram(byte_fallback=True),
    "Unigram with bytes, space before the first word only": unigram("first", byte_fallback=True),
    "tokens added in the middle": with_added("return", "    ", "x == y"),
}


@pytest.fixture(scope="module", params=EXACT)
def exact(request, tmp_path_factory) -> Tokenizer:
    return load_pretrained(saved(EXACT[request.param], tmp_path_factory.mktemp("tokenizer")))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=8),
            st.sampled_from(
                [" ", "  ", "x", " x", "return", "x == y", "\n    ", "<s>", "<unk>", "e\u0301", "<0x41>", "\x00"]
            ),
        ),
        max_size=4,
    )
)
def test_what_can_be_exact_is_and_the_parts_of_a_text_join_to_it(exact, parts):
    """As prompt and response do, or what is before and after a cursor."""
    kept, encoded = [], []
    for part in parts:
        try:
            encoded.append(exact.encode(part))
            kept.append(part)
        except TokenizerError:  # Unigram finds its pieces in a text that spells them out
            assert "Unigram" in exact.to_json() and any(piece in part for piece in ("<unk>", END, "<0x"))
    assert [exact.decode(ids) for ids in encoded] == kept
    assert exact.decode([i for ids in encoded for i in ids]) == "".join(kept)
    assert not exact._commands & {i for ids in encoded for i in ids}


def test_a_tokenizer_is_changed_only_where_it_adds_a_space(exact, tmp_path):
    """So others read what is saved, and it is loaded as it is again."""
    theirs = Backend.from_str(exact.to_json())
    for text in ("x", " x", "return x\n", ""):
        assert theirs.encode(text, add_special_tokens=False).ids == exact.encode(text)
    again = load_pretrained(saved(theirs, tmp_path))
    assert again.sha256 == exact.sha256
    plain = byte_level().to_str()
    assert without_added_space(plain) == plain


def test_only_the_space_at_the_start_is_left_out_of_the_ids_of_others(tmp_path):
    backend = llama_2()
    ours = load_pretrained(saved(backend, tmp_path))
    space, *rest = backend.encode(" a x", add_special_tokens=False).ids
    assert backend.decode([space]) == "" and ours.encode(" a x") == rest


REWRITING = {
    "NFC": (byte_level(normalizer=normalizers.NFC()), r"'e\u0301' comes back as '\xe9'"),
    "NFKC": (byte_level(normalizer=normalizers.NFKC()), r"'e\u0301' comes back as '\xe9'"),
    "lower case": (byte_level(normalizer=normalizers.Lowercase()), "'Ab' comes back as 'ab'"),
    "accents": (
        byte_level(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "comes back as 'e'",
    ),
    "spaces around": (byte_level(normalizer=normalizers.Strip()), r"'= 1\n' comes back as '= 1'"),
    "spaces, by the library": (
        byte_level(
            normalizer=normalizers.Strip(), pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), spaced])
        ),
        r"'= 1\n' comes back as '= 1'",
    ),
    "words only": (
        byte_level(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaced])),
        r"'x = 1\n' comes back as 'x=1'",
    ),
    "unknown characters": (unigram(), r"'Ab' comes back as '<unk>b'"),
    "another letter of unknown text": (unigram(letters=LETTERS + "ABC"), r"'\xe9' comes back as '<unk>'"),
    "an added token that the decoder garbles": (with_added("na\xefve"), r"comes back as 'na\ufffdve'"),
}


@pytest.mark.parametrize("what", REWRITING)
def test_a_tokenizer_that_rewrites_text_is_refused_with_an_example_and_taken_where_that_is_wanted(what, tmp_path):
    backend, shown = REWRITING[what]
    cfg = saved(backend, tmp_path)
    with pytest.raises(TokenizerError) as error:
        load_pretrained(cfg)
    said = str(error.value)
    assert shown in said and "--tokenizer.lossy True" in said and str(tmp_path) in said and "\n" not in said
    lossy = load_pretrained(replace(cfg, lossy=True))
    assert shown in rewrites(lossy)
    for parts in PROBES:
        text = "".join(parts)
        ids = lossy.encode(text)
        back = lossy.rewritten(text, ids)
        assert lossy.decode(ids) == (text if back is None else back)


def test_text_that_only_a_document_shows_to_be_changed_is_refused_there_with_the_true_reason(tmp_path):
    tokenizer = load_pretrained(saved(llama_2(), tmp_path))
    with pytest.raises(RewrittenError, match=r"'a \\u2581 x' comes back as 'a   x'; drop it, train") as error:
        tokenizer.encode("a \u2581 x")
    assert (error.value.rule, error.value.reason[-7:]) == ("changed by the tokenizer", "'a   x'")
    mask = with_added(AddedToken("<mask>", lstrip=True, special=False))
    tokenizer = load_pretrained(saved(mask, tmp_path))
    with pytest.raises(RewrittenError, match="'ean   <ma' comes back as 'ean<ma'"):
        tokenizer.encode("mean   <mask>")
    assert tokenizer.decode(tokenizer.encode("<mask> x")) == "<mask> x"


@pytest.mark.parametrize("lossy", [False, True])
def test_a_special_token_that_a_vocabulary_spells_as_a_word_never_becomes_a_command(lossy, tmp_path):
    tokenizer = load_pretrained(saved(unigram(byte_fallback=True), tmp_path, lossy=lossy))
    assert tokenizer.encode_by_library(f"x{END}")[-1] == tokenizer.eos_id, "so the test shows something"
    with pytest.raises(TokenizerError, match=f"'{END}' becomes a control token") as error:
        tokenizer.encode(f"x{END}")
    assert error.value.rule == "not in the vocabulary"


def test_neither_does_one_that_only_the_normaliser_writes(tmp_path):
    backend = unigram(byte_fallback=True)
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerError, match=f"'{END}' becomes a control token"):
        load_pretrained(saved(backend, tmp_path, lossy=True)).encode(f"x{END.upper()}")


def test_a_byte_that_is_missing_is_still_the_reason_where_it_is_one(tmp_path):
    content = json.loads(byte_level().to_str())
    del content["model"]["vocab"]["\xf1"]  # the symbol of byte F1, which planes 4 to 7 begin with
    for lossy in (False, True):
        tokenizer = load_pretrained(saved(Backend.from_str(json.dumps(content)), tmp_path, lossy=lossy))
        with pytest.raises(TokenizerError, match="in no token") as error:
            tokenizer.encode("\U00040000")
        assert error.value.rule == "not in the vocabulary"


def test_an_example_shows_what_is_changed_and_little_around_it():
    assert (
        difference("a long text e\u0301 and more", "a long text \xe9 and more")
        == r"'xt e\u0301 an' comes back as 'xt \xe9 an'"
    )
    assert difference("x", " x") == "'x' comes back as ' x'"
    assert difference("ab" * 50, "") == f"'{('ab' * 50)[:24]}'... comes back as ''"
    assert difference("aaa", "aa") == "'aaa' comes back as 'aa'"


def test_a_tokenizer_that_others_gave_a_space_before_each_text_is_whole():
    """A case that was found: fine-tuning dropped every row."""
    cfg = TokenizerConfig(
        kind="pretrained", path=str(shared_file("../cases/08_add_prefix_space")), eos_token="<|endoftext|>"
    )
    tokenizer = load_pretrained(cfg)
    assert rewrites(tokenizer) is None and tokenizer.decode(tokenizer.encode("x")) == "x"
    assert from_json(tokenizer.to_json(), cfg).sha256 == tokenizer.sha256
