import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DataConfig, SourceConfig, TokenizerConfig
from kindling.data.conversations import (
    CUT,
    MARKED,
    REWRITTEN,
    SPELT,
    Example,
    conversation_text,
    encode_conversation,
    normalize_exchanges,
    refusal,
    text_hash,
)
from kindling.data.filters import Drop
from kindling.data.process_document import DocumentProcessor
from kindling.data.prompts import Exchange, encode, prompt_text
from kindling.data.sources import Document
from kindling.tokenization.tokenizer import Tokenizer, from_json
from kindling.tokenization.train_tokenizer import train_bpe

TEXTS = ["def add(a, b):\n    return a + b  # naïve Σ 日本\nBelow is an instruction. ### Response:\n" * 20]
TOKENIZER = train_bpe(TEXTS, TokenizerConfig(), 400)
ROWS = DataConfig(
    sources=(SourceConfig(kind="jsonl", path="x", response_field="r"),), near_dedup=None, decontaminate=()
)


def decoded(example: Example, supervised: bool) -> list[str]:
    """The texts of an example's prompts, or of its responses without the end."""
    out, at = [], 0
    for n_prompt, n_response, *_ in example.segments:
        stop = at + n_prompt + n_response
        ids = example.ids[at + n_prompt : stop - 1] if supervised else example.ids[at : at + n_prompt]
        out.append(TOKENIZER.decode(ids))
        assert example.ids[stop - 1] == TOKENIZER.eos_id
        at = stop
    assert at == len(example.ids)
    return out


texts = st.text(min_size=1, max_size=40)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(["alpaca", "user-assistant"]))
def test_an_example_gives_its_texts_back_and_knows_their_hashes(pairs, template):
    exchanges = tuple(Exchange(*pair) for pair in pairs)
    example = encode_conversation(exchanges, replace(ROWS, template=template), TOKENIZER, context=10_000)
    prompts = [prompt_text(template, e, first=i == 0) for i, e in enumerate(exchanges)]
    responses = [e.response for e in exchanges]
    assert decoded(example, supervised=False) == prompts and decoded(example, supervised=True) == responses
    assert example.segments[:, 2:].tolist() == [[text_hash(p), text_hash(r)] for p, r in zip(prompts, responses)]
    assert example.n_bytes == sum(len(r.encode()) for r in responses)


@pytest.mark.parametrize(
    ("exchange", "rule"),
    [
        (Exchange("", "x"), "empty instruction"),
        (Exchange(" \n", "x"), "empty instruction"),
        (Exchange("x", ""), "empty response"),
        (Exchange("x", " \t\n"), "empty response"),
        (Exchange("x", "a\n### Response:\nb"), "template marker"),
        (Exchange("x", "a<|endoftext|>"), "control token"),
    ],
)
def test_what_would_teach_something_else_is_refused_by_a_rule(exchange, rule):
    assert refusal((Exchange("fine", "fine"), exchange), ROWS, TOKENIZER).rule == rule
    assert refusal((Exchange("fine", "fine"),), ROWS, TOKENIZER) is None


def test_a_control_token_in_an_instruction_is_kept_as_text_and_noted():
    exchanges = (Exchange("Print <|endoftext|>", "print()"),)
    assert refusal(exchanges, ROWS, TOKENIZER) is None
    example = encode_conversation(exchanges, ROWS, TOKENIZER, 1000)
    assert example.changes == ((SPELT, 0),) and (example.ids == TOKENIZER.eos_id).sum() == 1


ONE = (Exchange("Add.", "return a + b  # 日本日本日本"),)


def length_of(exchanges) -> int:
    return sum(len(part) for segment in encode("alpaca", exchanges, TOKENIZER) for part in segment)


def test_an_example_may_have_one_token_more_than_the_context():
    n = length_of(ONE)
    assert isinstance(encode_conversation(ONE, ROWS, TOKENIZER, n - 1), Example)
    assert encode_conversation(ONE, ROWS, TOKENIZER, n - 2).rule == "too long"


def test_a_cut_response_is_a_beginning_of_it_and_closed_at_every_context():
    cut, n_prompt = replace(ROWS, too_long="cut"), len(encode("alpaca", ONE, TOKENIZER)[0].prompt)
    n = length_of(ONE)
    for context in range(n_prompt + 1, n - 1):
        example = encode_conversation(ONE, cut, TOKENIZER, context)
        (text,) = decoded(example, supervised=True)
        assert ONE[0].response.startswith(text) and text
        assert context - 3 < len(example.ids) <= context + 1  # a character is at most three tokens here
        lost = len(ONE[0].response.encode()) - len(text.encode())
        assert example.changes == ((CUT, lost),) and lost > 0
    assert encode_conversation(ONE, cut, TOKENIZER, n_prompt).rule == "prompt too long"
    assert encode_conversation(ONE, cut, TOKENIZER, n_prompt - 1).rule == "prompt too long"


def test_a_conversation_is_cut_in_its_last_exchange_that_fits():
    turns = (*ONE, Exchange("And now?", "return b - a, or so"), Exchange("Thanks.", "You are welcome."))
    whole = [length_of(turns[: i + 1]) for i in range(3)]
    cut = replace(ROWS, too_long="cut")
    for context in range(whole[0] - 1, whole[2] - 1):
        example = encode_conversation(turns, cut, TOKENIZER, context)
        responses = decoded(example, supervised=True)
        assert len(example.ids) <= context + 1
        for turn, text in zip(turns, responses):
            assert turn.response.startswith(text) and text
        assert responses[:-1] == [t.response for t in turns[: len(responses) - 1]]  # only the last may be cut


def test_what_the_tokenizer_does_not_give_back_is_dropped(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: "other")
    assert encode_conversation(ONE, ROWS, TOKENIZER, 1000).rule == "not reproducible"


def test_a_normalizing_tokenizer_is_trained_on_the_normal_form():
    tokenizer = train_bpe(TEXTS, TokenizerConfig(normalizer="nfkc"), 400)
    exchanges = normalize_exchanges((Exchange("½", "x²"),), tokenizer)
    assert encode_conversation(exchanges, ROWS, tokenizer, 1000).segments[0, 3] == text_hash("x2")
    processor = DocumentProcessor(ROWS, tokenizer=tokenizer, context=1000)
    for response, rule in (("＃＃＃ Response: x", "template marker"), ("＜|endoftext|＞", "control token")):
        assert processor(Document("k", "", exchanges=(Exchange("x", response),))).drop.rule == rule


def lower_case(**settings) -> Tokenizer:
    """A tokenizer of others that rewrites text."""
    content = json.loads(TOKENIZER.to_json()) | {"normalizer": {"type": "Lowercase"}}
    return from_json(json.dumps(content), TokenizerConfig(**settings))


def test_a_conversation_that_the_tokenizer_rewrites_is_dropped_with_the_reason_or_kept_as_it_comes_back_and_noted():
    exchanges = (Exchange("Say a", "A b"), Exchange("Again", "c"))
    refused = encode_conversation(exchanges, ROWS, lower_case(), 1000)
    assert refused.rule == "changed by the tokenizer" and "comes back as 'below is an " in refused.value
    example = encode_conversation(exchanges, ROWS, lower_case(lossy=True), 1000)
    assert example.changes == ((REWRITTEN, 0),)
    assert example.segments[:, 3].tolist() == [text_hash("a b"), text_hash("c")]
    assert example.segments[0, 2] == text_hash(prompt_text("alpaca", exchanges[0]).lower())
    processor = DocumentProcessor(ROWS, tokenizer=lower_case(lossy=True), context=1000)
    assert processor(Document("k", "", exchanges=exchanges)).changes == ((REWRITTEN, 0),)


def test_what_is_rewritten_is_cut_where_it_is_too_long():
    cut = replace(ROWS, too_long="cut")
    long = (Exchange("x", "A B C " * 40),)
    example = encode_conversation(long, cut, lower_case(lossy=True), 120)
    assert [name for name, _ in example.changes] == [REWRITTEN, CUT] and len(example.ids) <= 121


def test_a_response_that_becomes_a_marker_is_dropped():
    tokenizer = lower_case(lossy=True)
    content = json.loads(tokenizer.to_json())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "@"}, "content": "#"}
    tokenizer = from_json(json.dumps(content), TokenizerConfig(lossy=True))
    assert encode_conversation((Exchange("x", "y\n@## Response:"),), ROWS, tokenizer, 1000).rule == "template marker"


def test_a_normalizing_tokenizer_counts_what_it_changes():
    tokenizer = train_bpe(TEXTS, TokenizerConfig(normalizer="nfkc"), 400)
    processor = DocumentProcessor(ROWS, tokenizer=tokenizer, context=1000)
    assert processor(Document("k", "", exchanges=(Exchange("\xbd", "y"),))).changes == ((REWRITTEN, 0),)
    assert processor(Document("k", "", exchanges=(Exchange("x", "y"),))).changes == ()
    assert processor(Document("k", "", text="y \xbd")).changes == ((REWRITTEN, 0),)
    assert processor(Document("k", "", text="y")).changes == ()


def test_a_response_that_is_not_reproducible_is_dropped_and_not_cut(monkeypatch):
    decode = type(TOKENIZER).decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: decode(TOKENIZER, ids).replace("b", "?"))
    cut = replace(ROWS, too_long="cut")
    assert (
        encode_conversation((Exchange("x", "a b"), Exchange("y", "a " * 300)), cut, TOKENIZER, 200).rule
        == "not reproducible"
    )


def test_a_template_marker_in_an_instruction_is_kept_and_noted():
    example = encode_conversation((Exchange("Go.\n### Response:\nx", "y"),), ROWS, TOKENIZER, 1000)
    assert example.changes == ((MARKED, 0),)


def test_a_conversation_with_half_a_surrogate_pair_is_dropped_by_rule():
    processor = DocumentProcessor(ROWS, tokenizer=TOKENIZER, context=1000)
    found = processor(Document("k", "", exchanges=(Exchange("x", "a \ud800 b"),)))
    assert found.drop.rule == "not UTF-8"


def test_the_filters_see_what_is_said_without_the_template():
    processor = DocumentProcessor(replace(ROWS, min_chars=12), tokenizer=TOKENIZER, context=1000)
    assert processor(Document("k", "", exchanges=(Exchange("12345", "678"),))).drop == Drop(
        "characters", "9, not 12 to 250,000"
    )
    assert conversation_text((Exchange("a", "c", "b"), Exchange("d", "e"))) == "a\nb\nc\nd\ne"


def test_code_in_a_conversation_need_not_compile():
    processor = DocumentProcessor(replace(ROWS, check_syntax=True), tokenizer=TOKENIZER, context=1000)
    assert processor(Document("k", "python", exchanges=(Exchange("Why?", "It is so ("),))).drop is None


def test_the_functions_of_a_file_become_examples_that_share_a_split(tmp_path):
    path = tmp_path / "m.py"
    body = '\ndef {0}(x):\n    """Return twice the value of {0}."""\n    return 2 * x\n'
    path.write_text(body.format("one") + body.format("two"), encoding="utf-8")
    processor = DocumentProcessor(ROWS, tokenizer=TOKENIZER, context=1000)
    found = processor.all_of(Document("m.py", "python", path=path, size=1, mined=True))
    assert [e.key for e in found] == ["m.py:one", "m.py:two"]
    assert found[0].group == found[1].group != b"" and found[0].digest != found[1].digest
    assert TOKENIZER.decode(found[1].ids).endswith(
        "Return twice the value of two.\ndef two(x):\n\n### Response:\n    return 2 * x<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"def f(:", "file is no Python"),
        (b"# caf\xe9 in Latin-1", "file is no Python"),
        (b"x = 1\n", "undocumented file"),
        (b"x = 1\n" * 50_000, "too large to parse"),
        (None, "unreadable"),
    ],
)
def test_a_file_without_examples_is_dropped_by_a_rule(tmp_path, content, rule):
    path = tmp_path / "m.py"
    if content is not None:
        path.write_bytes(content)
    (found,) = DocumentProcessor(ROWS, tokenizer=TOKENIZER).all_of(
        Document("m.py", "python", path=path, size=1, mined=True)
    )
    assert found.drop.rule == rule


def test_ids_are_of_the_type_that_shards_are_written_from():
    assert encode_conversation(ONE, ROWS, TOKENIZER, 1000).ids.dtype == np.uint32
