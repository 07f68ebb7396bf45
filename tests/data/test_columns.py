"""Columns as people have them: chats in every spelling, inputs that are missing, addresses that are no paths."""

import json

import pytest

from config import SourceConfig
from kindling import json_rows
from kindling.data.dataset_rows import is_message
from kindling.data.prompts import Exchange
from kindling.data.sources import documents, local_files
from kindling.json_rows import read_rows

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


# -- files in which a chat is a list of its messages ------------------------------------------------------------------


def talk(i: int) -> list[dict]:
    """A chat of its own length, so that a message that is lost or taken from a neighbour shows."""
    return chat(*[(role, f"{role} {i}.{n} [{{☃") for n in range(1 + i % 3) for role in ("user", "assistant")])


TALKS = [talk(i) for i in range(7)]
EXCHANGES = [tuple(Exchange(t[n]["content"], t[n + 1]["content"]) for n in range(0, len(t), 2)) for t in TALKS]
LINES = [json.dumps(t) for t in TALKS]
ROWS = [{"chat": t} for t in TALKS]
CHAT_FILES = {
    "a list in each line": "\n".join(LINES),
    "a list in each line, CRLF and a last line end": "\r\n".join([*LINES, ""]),
    "a list in each line, after CR": "\r".join(LINES),
    "a list in each line, characters as they are": "\n".join(json.dumps(t, ensure_ascii=False) for t in TALKS),
    "blank lines between": "\n\n" + "\n\n \n".join(LINES),
    "a byte-order mark": "\ufeff" + "\n".join(LINES),
    "lists in a row": "".join(LINES),
    "lists over many lines": "\n".join(json.dumps(t, indent=2) for t in TALKS),
    "an array of lists on one line": json.dumps(TALKS),
    "an array of lists over many lines": json.dumps(TALKS, indent=1),
    "an array with a list in each line": "[" + ",\n".join(LINES) + "]",
    "an array with a list in each line below it": "[\n" + ",\n".join(LINES) + "\n]",
    "lists, of which one is a row with its column": "\n".join([*LINES[:3], json.dumps(ROWS[3]), *LINES[4:]]),
    "rows with their column, of which one is a list": "\n".join([json.dumps(ROWS[0]), *LINES[1:]]),
    "rows with their column": "\n".join(map(json.dumps, ROWS)),
    "an array of rows": json.dumps(ROWS),
    "an array of rows over many lines": json.dumps(ROWS, indent=2),
    "an array of rows for each page": json.dumps(ROWS[:4]) + "\n" + json.dumps(ROWS[4:]) + "\n",
    "an array of rows and then lists": json.dumps(ROWS[:4]) + "\n" + "\n".join(LINES[4:]),
}


def chats_of(path, text: str) -> list:
    path.write_bytes(text.encode())
    source = SourceConfig(kind="jsonl", path=str(path), messages_field="chat")
    return list(documents(source, local_files(source)))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("what", CHAT_FILES)
def test_a_list_of_messages_is_one_chat_wherever_it_stands(what, suffix, tmp_path):
    found = chats_of(tmp_path / f"chats{suffix}", CHAT_FILES[what])
    assert [(d.exchanges, d.unreadable) for d in found] == [(exchanges, None) for exchanges in EXCHANGES]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_may_hold_one_chat(tmp_path, indent):
    (found,) = chats_of(tmp_path / "chat.json", json.dumps(TALKS[5], indent=indent))
    assert found.exchanges == EXCHANGES[5]


@pytest.mark.parametrize("who", ["from", "role"])
def test_a_list_of_messages_in_another_spelling_is_a_chat(who, tmp_path):
    what = "value" if who == "from" else "content"
    lists = [
        chat(*HI, who=who, what=what),
        chat(("system", None), *HI, who=who, what=what),
        chat(*HI, who=who, what=what),
    ]
    found = chats_of(tmp_path / "chats.jsonl", "\n".join(map(json.dumps, lists)))
    assert [d.exchanges for d in found] == [ASKED, (), ASKED] and "is a NoneType" in found[1].unreadable


BAD_LISTS = {
    "cut in a text": LINES[1][:40],
    "cut after a message": LINES[1][:-2] + "},",
    "its first message is no JSON": LINES[1].replace('"role"', "role", 1),
    "a later message is no JSON": LINES[2][:-1] + ", {'role': 'user'}]",
    "no last bracket": LINES[2][:-1],
    "an empty list": "[]",
    "a list of numbers": "[1, 2]",
    "a number": "5",
    "words": "Traceback (most recent call last):",
    "a tool": json.dumps(chat(*HI, ("tool", "42"))),
}


@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("bad", BAD_LISTS)
def test_a_broken_list_of_messages_costs_only_itself(bad, at, tmp_path):
    lines = [*LINES[:at], BAD_LISTS[bad], *LINES[at + 1 :]]
    found = chats_of(tmp_path / "chats.jsonl", "\n".join(lines) + "\n")
    assert [d.exchanges for d in found if d.unreadable is None] == EXCHANGES[:at] + EXCHANGES[at + 1 :]
    (why,) = (d.unreadable for d in found if d.unreadable is not None)
    assert len(why) < 200


def test_lists_of_messages_are_counted_in_bytes_and_lines(tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    found = list(read_rows(tmp_path / "chats.jsonl", lambda value: is_message(value, "chat")))
    assert [(row.line, row.size) for row in found] == [(i, len(line)) for i, line in enumerate(LINES, 1)]


def test_a_long_array_of_rows_of_chats_is_not_held_in_memory(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(json_rows, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(json_rows, "CHUNK", 2**14)
    row = json.dumps({"chat": chat(("user", "x" * 500), ("assistant", "y" * 500))})
    (tmp_path / "chats.json").write_text(f"[{','.join([row] * 2_000)}]", encoding="utf-8")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "chats.json", lambda value: is_message(value, "chat"))) == 2_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000 * len(row) / 3


def test_columns_of_other_rows_are_no_messages():
    assert not is_message({"from": "a set", "conversations": []}, "messages")
    assert not is_message({"role": "x", "content": []}, "content")
    assert not is_message("role", "messages") and not is_message(["role", "content"], "messages")
