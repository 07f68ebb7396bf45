import gzip
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script

from config import DataConfig, SourceConfig
from kindling.data.process_document import DocumentProcessor
from kindling.data.prompts import Exchange
from kindling.data.shards import DataError
from kindling.data.sources import documents, local_files


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(source: SourceConfig) -> list:
    return list(documents(source, None if source.kind == "datasets" else local_files(source)))


def write_rows(texts: list[str]) -> dict[str, SourceConfig]:
    """The same documents in every local format; the last as the hub lays a data set out."""
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps({"content": t}) + "\n" for t in texts)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("rows.json").write_text(json.dumps([{"content": t} for t in texts]), encoding="utf-8")
    Path("rows.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    Path("set/data/python").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), "set/data/python/train-00000-of-00001.parquet")
    return {
        "jsonl": SourceConfig(kind="jsonl", path="rows.jsonl"),
        "jsonl.gz": SourceConfig(kind="jsonl", path="rows.jsonl.gz"),
        "json": SourceConfig(kind="jsonl", path="rows.json"),
        "text": SourceConfig(kind="text", path="rows.txt"),
        "parquet": SourceConfig(kind="parquet", path="set"),
        "datasets": SourceConfig(kind="datasets", path="set", data_dir="data/python"),
    }


def test_every_format_gives_the_same_documents():
    texts = [f"def f{i}():\n    return '☃' * {i}" for i in range(300)]
    for kind, source in write_rows(texts).items():
        assert [d.text for d in read(source)] == texts, kind
        assert [d.text for d in read(replace(source, max_documents=7))] == texts[:7], kind


def test_rows_that_cannot_be_read_say_why_and_do_not_end_the_rest():
    good = json.dumps({"content": "x = 1"}).encode()
    rows = [
        good,
        b"{not json",
        b'{"other": 1}',
        b'{"content": 5}',
        b"[1]",
        b'{"content": "\xff"}',
        b"[" * 100_000,
        good,
    ]
    Path("rows.jsonl").write_bytes(b"\n".join(rows))
    found = read(SourceConfig(kind="jsonl", path="rows.jsonl"))
    drops = [DocumentProcessor(DataConfig())(d).drop for d in found]
    assert [d and d.rule for d in drops] == [None, *["unreadable"] * 4, "not UTF-8", "unreadable", None]
    for drop, word in zip(drops[1:5], ("not JSON", "not among other", "is a int", "must be an object")):
        assert word in drop.value
    # a row counts with the bytes of its text, one without any with those of its line
    assert [d.size for d in found] == [5, *(len(r) + 1 for r in rows[1:5]), 1, len(rows[6]) + 1, 5]


def test_the_documents_of_a_text_file_count_every_byte_but_the_separators():
    Path("a.txt").write_bytes(b"\n\nfirst \xff\n<end>\nsecond\n\n<end>\n")
    found = read(SourceConfig(kind="text", path="a.txt", separator="<end>"))
    assert sum(d.size for d in found) == Path("a.txt").stat().st_size - 2 * len("<end>")
    processed = [DocumentProcessor(DataConfig())(d) for d in found]
    assert processed[1].text == "second" and processed[1].changes == (("newlines around it cut off", 3),)
    assert [e.drop and e.drop.rule for e in processed] == ["not UTF-8", None, "characters"]


def test_a_byte_order_mark_costs_no_row():
    Path("rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"content": "x"}).encode())
    Path("rows.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps([{"content": "x"}]).encode())
    for name in ("rows.jsonl", "rows.json"):
        assert [d.text for d in read(SourceConfig(kind="jsonl", path=name))] == ["x"]


def test_a_separator_is_found_across_the_pieces_that_are_read():
    Path("a.txt").write_text("x" * (2**20 - 3) + "<end>" + "y" * 2**21 + "<end>z", encoding="utf-8")
    found = read(SourceConfig(kind="text", path="a.txt", separator="<end>"))
    assert [(d.text[0], len(d.text)) for d in found] == [("x", 2**20 - 3), ("y", 2**21), ("z", 1)]
    Path("a.txt").write_text("x" * (2**20 - 3) + "<end>z", encoding="utf-8")
    assert [len(d.text) for d in read(SourceConfig(kind="text", path="a.txt", separator="<end>"))] == [2**20 - 3, 1]


@pytest.mark.parametrize("cut", [-9, -40, 20])
def test_a_gzip_file_cut_short_keeps_its_rows_so_far_and_says_so(cut):
    lines = "".join(json.dumps({"content": f"x{os.urandom(40).hex()} = {i}"}) + "\n" for i in range(500))
    Path("cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:cut])
    found = read(SourceConfig(kind="jsonl", path="cut.jsonl.gz"))
    assert "the rest of the file" in found[-1].unreadable and found[-1].key == f"cut.jsonl.gz:{len(found) - 1}"
    assert all(d.text for d in found[:-2])
    assert len(found) > 400 or cut == 20


def test_a_damaged_parquet_file_does_not_end_the_others():
    write_rows(["x = 1"])
    Path("set/data/python/broken.parquet").write_text("no", encoding="utf-8")
    found = read(SourceConfig(kind="parquet", path="set"))
    assert sorted(d.text or d.unreadable.split(":")[0] for d in found) == ["the rest of the file", "x = 1"]


def test_rows_are_named_by_the_path_that_they_carry():
    row = {"content": "x", "path": "src/a.c", "repo": "me/it"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "language": "Java"}), encoding="utf-8")
    first, second = read(SourceConfig(kind="jsonl", path="rows.jsonl"))
    assert (first.key, first.language) == ("rows.jsonl:0:me/it/src/a.c", "c")
    assert second.language == "java"


def test_a_row_of_columns_is_one_exchange_whose_input_may_be_missing():
    rows = [{"q": "Why?", "a": "So."}, {"q": "Why?", "a": "So.", "i": "it"}, {"q": "Why?", "a": "So.", "i": None}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = SourceConfig(kind="jsonl", path="rows.jsonl", field="q", response_field="a", input_field="i")
    found = list(read(source))
    assert [d.exchanges for d in found] == [(Exchange("Why?", "So.", i),) for i in ("", "it", "")]
    assert [(d.text, d.size) for d in found] == [(None, 7), (None, 9), (None, 7)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"a": "So."}, "the column 'q' must hold text, but is not among a"),
        ({"q": "Why?", "a": None}, "the column 'a' must hold text, but is a NoneType"),
        ({"q": 7, "a": "So."}, "the column 'q' must hold text, but is a int"),
        ({"q": "Why?", "a": ["So."]}, "the column 'a' must hold text, but is a list"),
        ({"q": "Why?", "a": "So.", "i": 3}, "the column 'i' must hold text or nothing, but is a int"),
    ],
)
def test_a_row_whose_columns_are_not_text_says_which(row, why):
    Path("rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (found,) = read(SourceConfig(kind="jsonl", path="rows.jsonl", field="q", response_field="a", input_field="i"))
    assert found.unreadable == why and not found.exchanges


CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Goodbye")]


@pytest.mark.parametrize(
    "spelling", [("role", "content", {}), ("from", "value", {"user": "human", "assistant": "gpt"})]
)
def test_a_list_of_messages_is_a_conversation_in_either_spelling(spelling):
    who, what, names = spelling
    messages = [{who: names.get(role, role), what: text} for role, text in CHAT]
    Path("rows.jsonl").write_text(json.dumps({"chat": messages}), encoding="utf-8")
    (found,) = read(SourceConfig(kind="jsonl", path="rows.jsonl", messages_field="chat"))
    assert found.exchanges == (Exchange("Be brief.\n\nHi", "Hello"), Exchange("Bye", "Goodbye"))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "must hold a list of messages"),
        (["hi"], "must hold a list of messages"),
        ([], "user and assistant in turn, but are of none"),
        ([{"role": "user", "content": "hi"}], "in turn, but are of user"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "but one of tool uses tools"),
        ([{"role": ["user"], "content": "a"}, {"role": {}, "content": "b"}], "in turn, but are of ['user'], {}"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}], "'assistant' is a NoneType"),
    ],
)
def test_messages_that_are_no_conversation_say_why(messages, why):
    Path("rows.jsonl").write_text(json.dumps({"chat": messages}) + "\n" + "{}", encoding="utf-8")
    found, empty = read(SourceConfig(kind="jsonl", path="rows.jsonl", messages_field="chat"))
    assert why in found.unreadable and "must hold a list of messages" in empty.unreadable


def test_local_python_lists_the_standard_library_and_the_packages():
    keys = {f.key for f in local_files(SourceConfig())}
    assert "stdlib/json/decoder.py" in keys and "site-packages/numpy/__init__.py" in keys
    assert not any("site-packages/" in k for k in keys if k.startswith("stdlib/"))


def test_the_byte_limit_takes_the_same_sample_of_files_each_time(corpus):
    source = SourceConfig(kind="files", path=str(corpus), max_bytes=200_000)
    sample = local_files(source)
    assert sample == local_files(source)
    assert sum(f.size for f in sample[:-1]) < 200_000 <= sum(f.size for f in sample)
    assert {f.key.split("/")[0] for f in sample} == {"asyncio", "email", "json"}  # not the first of the alphabet


# -- the hub ----------------------------------------------------------------------------------------------------------

HUB = SourceConfig(kind="datasets", path="me/stories", field="text")


def a_stream_that_breaks(after: int):
    for n in range(after):
        yield {"text": f"story {n}"}
    raise ConnectionError("peer went\naway")


def test_a_hub_that_fails_midway_keeps_what_came_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: a_stream_that_breaks(3))
    *rows, rest = read(HUB)
    assert [d.text for d in rows] == ["story 0", "story 1", "story 2"]
    assert rest.broken and "after row 2: ConnectionError: peer went away" in rest.unreadable


def test_a_hub_that_fails_at_once_is_an_error(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: a_stream_that_breaks(0))
    with pytest.raises(DataError, match=r"me/stories.*ConnectionError: peer went away.*hf auth login"):
        read(HUB)


def test_a_data_set_without_the_column_is_refused_at_its_first_row(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: iter([{"body": "x", "id": 1}]))
    with pytest.raises(
        DataError, match=r"the column 'text' must hold text, but is not among body, id; set the source's field"
    ):
        read(HUB)


def test_a_missing_folder_is_not_taken_for_a_network_problem():
    with pytest.raises(DataError, match=r"no folder './nowhere'"):
        read(replace(HUB, path="./nowhere"))


class GatedHub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated repository when no token is sent."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header(
            "X-Error-Message", "Access to dataset bigcode/the-stack-dedup is restricted. You must be authenticated."
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_gated_set_without_a_token_gives_the_line_that_says_how_to_get_access():
    server = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(Path("hf").absolute()),
        "HF_TOKEN": "",
    }
    flags = ("--preset", "code-50m", "--tokenizer.kind", "bpe", "--tokenizer.path", "None")
    result = script("data_pipeline.py", *flags, cwd=Path.cwd(), env=env)
    server.shutdown()
    assert_one_clear_line(
        result,
        "'bigcode/the-stack-dedup' is gated",
        "https://huggingface.co/datasets/bigcode/the-stack-dedup",
        "hf auth login",
        "HF_TOKEN",
    )
