"""Columns as people have them: chats in every spelling, inputs that are missing, addresses that are no paths."""

import json

import pytest

from config import SourceConfig
from kindling.data.prompts import Exchange
from kindling.data.sources import documents, local_files

ASKED = (Exchange("Hi", "Hello"),)


def read(path, rows: list[dict], **fields) -> list:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceConfig(kind="jsonl", path=str(path), **fields)
    return list(documents(source, local_files(source)))


def chat(*said: tuple, who="role", what="content", **more) -> list[dict]:
    return [{who: role, what: text, **more} for role, text in said]


HI = (("user", "Hi"), ("assistant", "Hello"))
CHATS = {
    "null beside from and value": (
        chat(("human", "Hi"), ("gpt", "Hello"), who="from", what="value", role=None, content=None),
        ASKED,
    ),
    "null beside role and content": (chat(*HI, **{"from": None, "value": None}), ASKED),
    "a role beside a value": (chat(*HI, what="value", content=None), ASKED),
    "an empty system message": (chat(("system", ""), *HI), ASKED),
    "a blank system message": (chat(("system", " \n"), *HI), ASKED),
    "an empty system message without text parts": (chat(("system", []), *HI), ASKED),
    "a system message": (chat(("system", "Be kind."), *HI), (Exchange("Be kind.\n\nHi", "Hello"),)),
    "a developer message": (chat(("developer", "Be kind."), *HI), (Exchange("Be kind.\n\nHi", "Hello"),)),
    "two system messages": (
        chat(("system", "Be kind."), ("system", "Be brief."), *HI),
        (Exchange("Be kind.\n\nBe brief.\n\nHi", "Hello"),),
    ),
    "two questions in a row": (chat(("user", "Hi"), ("user", "You?"), HI[1]), (Exchange("Hi\n\nYou?", "Hello"),)),
    "two answers in a row": (chat(*HI, ("assistant", "Bye")), (Exchange("Hi", "Hello\n\nBye"),)),
    "text as a part": (chat(("user", [{"type": "text", "text": "Hi"}]), HI[1]), ASKED),
    "text in parts": (chat(("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HI[1]), ASKED),
    "parts that are strings": (chat(("user", ["H", "i"]), HI[1]), ASKED),
    "parts with null columns": (chat(("user", [{"type": "text", "text": "Hi", "image": None}]), HI[1]), ASKED),
    "roles in capitals": (chat(("User", "Hi"), ("ASSISTANT", "Hello")), ASKED),
    "a prompter": (chat(("prompter", "Hi"), HI[1]), ASKED),
    "a model": (chat(HI[0], ("model", "Hello")), ASKED),
    "a bot": (chat(("human", "Hi"), ("chatgpt", "Hello"), who="from", what="value"), ASKED),
    "no tool was called": (chat(*HI, tool_calls=None, function_call=None), ASKED),
    "an empty list of tool calls": (chat(*HI, tool_calls=[]), ASKED),
    "columns instead of rows": ({"role": ["user", "assistant"], "content": ["Hi", "Hello"]}, ASKED),
    # dropped, for a reason that is true
    "a tool": (chat(*HI, ("tool", "42"), ("assistant", "It is 42.")), "one of tool uses tools"),
    "a function": (chat(HI[0], ("function", "42"), HI[1]), "one of function uses tools"),
    "an observation": (chat(HI[0], ("observation", "42"), HI[1]), "one of observation uses tools"),
    "a call": (
        [*chat(HI[0]), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
        "assistant uses tools",
    ),
    "the assistant begins": (chat(("assistant", "Hello"), *HI), "in turn, but are of assistant, user, assistant"),
    "a question at the end": (chat(*HI, ("user", "Bye")), "in turn, but are of user, assistant, user"),
    "a system message later": (chat(*HI, ("system", "Stop.")), "a system message must stand at the beginning"),
    "a system message alone": (chat(("system", "Be kind.")), "in turn, but are of none"),
    "an image": (
        chat(("user", [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "Hi"}]), HI[1]),
        "that of 'user' has parts of image_url, text",
    ),
    "no role": ([{"content": "Hi"}, {"content": "Hello"}], "in turn, but are of nobody"),
    "NaN as text": (chat(("user", float("nan")), HI[1]), "that of 'user' is a NoneType"),
    "a chat as text": ("[]", "must hold a list of messages, but does not (a str)"),
}


@pytest.mark.parametrize("what", CHATS)
def test_a_chat_is_read_as_it_was_meant_or_dropped_for_a_true_reason(what, tmp_path):
    messages, right = CHATS[what]
    (found,) = read(tmp_path / "rows.jsonl", [{"chat": messages}], messages_field="chat")
    if isinstance(right, str):
        assert right in found.unreadable and not found.exchanges
    else:
        assert (found.exchanges, found.unreadable) == (right, None)


@pytest.mark.parametrize(
    ("about", "right"), [(float("nan"), ""), (None, ""), ("", ""), ("it", "it"), ("nan", "nan"), ("None", "None")]
)
def test_an_input_that_is_missing_is_none(about, right, tmp_path):
    fields = {"field": "q", "response_field": "a", "input_field": "i"}
    (found,) = read(tmp_path / "rows.jsonl", [{"q": "Why?", "a": "So.", "i": about}], **fields)
    assert found.exchanges == (Exchange("Why?", "So.", right),)


@pytest.mark.parametrize("column", ["q", "a"])
def test_a_question_or_an_answer_that_is_nan_is_dropped_for_that(column, tmp_path):
    row = {"q": "Why?", "a": "So."} | {column: float("nan")}
    (found,) = read(tmp_path / "rows.jsonl", [row], field="q", response_field="a")
    assert found.unreadable == f"the column {column!r} must hold text, but is NaN, a missing value"


PLACES = {
    "an address of a page": ({"url": "https://example.org/why-i-left.py"}, "unknown"),
    "an address in the column path": ({"path": "http://example.org/test/a.c"}, "unknown"),
    "an address beside a path": ({"url": "https://example.org/x", "path": "src/a.py"}, "python"),
    "a path": ({"path": "src/a.py"}, "python"),
    "a path that is NaN": ({"path": float("nan"), "url": "https://example.org/a.md"}, "unknown"),
    "an address and a language": ({"url": "https://example.org/a.md", "language": "Python"}, "python"),
    "a path and no language": ({"path": "a.c", "language": None, "lang": ""}, "c"),
}


@pytest.mark.parametrize("what", PLACES)
def test_the_language_follows_from_a_path_but_not_from_an_address(what, tmp_path):
    row, language = PLACES[what]
    (found,) = read(tmp_path / "rows.jsonl", [{"content": "I left because it rained.", **row}])
    assert found.language == language and "://" not in found.inner and "nan" not in found.key


LABELS = {
    "a surrogate": ('"fran\\udce7ais"', "fran\\udce7ais"),
    "a byte of latin-1": ('"fran\udce7ais"', "fran\\udce7ais"),
    "half a pair": ('"\\ud83d"', "\\ud83d"),
    "line ends": ('"py\\nthon\\r"', "py thon"),
    "an escape of a terminal": ('"\\u001b[31mred"', "\\x1b[31mred"),
    "a NUL": ('"a\\u0000b"', "a\\x00b"),
    "a right-to-left mark": ('"\\u202egnp"', "\\u202egnp"),
    "other letters": ('"Français"', "français"),
    "a whole text": (json.dumps("def f(): pass " * 1000), ("def f(): pass " * 9)[:64]),
    "a list": ('["Python"]', "unknown"),
    "a number": ("7", "unknown"),
}


@pytest.mark.parametrize("what", LABELS)
def test_a_language_is_a_label_that_can_be_written_everywhere(what, tmp_path):
    given, right = LABELS[what]
    line = f'{{"content": "x", "language": {given}}}'
    (tmp_path / "rows.jsonl").write_bytes(line.encode("utf-8", "surrogateescape"))
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"))
    (found,) = documents(source, local_files(source))
    assert found.language == right
    found.language.encode("utf-8")
