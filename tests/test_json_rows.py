"""Files of rows as people have them: each form is read alike by all that read rows, and a broken row costs only itself."""

import bz2
import gzip
import json
import lzma
import time
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import SourceConfig
from kindling import json_rows as reader
from kindling.data.decontamination import BenchmarkError, Benchmarks
from kindling.data.sources import documents, local_files
from kindling.errors import KindlingError
from kindling.evaluation import harness_data, tasks
from kindling.tokenization.compare import read_documents

N = 40
ROWS = [
    {
        "content": f"def f{i}(x):\n    return x + {i}  # ☃",
        "task_id": 11 + i,
        "text": f"Write a function f{i} that adds {i} to the one number that it is given and returns their whole sum.",
        "code": f"def f{i}(x):\n    return x + {i}",
        "test_list": [f"assert f{i}(1) == {1 + i}"],
        "question": f"What is one more than {i}?",
        "answer": f"#### {i + 1}",
    }
    for i in range(N)
]


def zst(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def lines(rows=ROWS, end="\n", **how) -> bytes:
    return "".join(json.dumps(row, **how) + end for row in rows).encode()


half = N // 2
FORMS: dict[str, tuple[str, bytes]] = {
    "lines": (".jsonl", lines()),
    "lines with characters as they are": (".jsonl", lines(ensure_ascii=False)),
    "CRLF": (".jsonl", lines(end="\r\n")),
    "CR alone": (".jsonl", lines(end="\r")),
    "no last line end": (".jsonl", lines().rstrip()),
    "blank lines": (".jsonl", b"\n \n" + lines(end="\n\n\t\n")),
    "a byte-order mark": (".jsonl", b"\xef\xbb\xbf" + lines()),
    "two files joined, each with its mark": (
        ".jsonl",
        b"\xef\xbb\xbf" + lines(ROWS[:half]) + b"\xef\xbb\xbf" + lines(ROWS[half:]),
    ),
    "an array on one line": (".json", json.dumps(ROWS).encode()),
    "an array over many lines": (".json", json.dumps(ROWS, indent=2).encode()),
    "an array with a row on each line": (".json", b"[\n" + lines(end=",\n").rstrip(b",\n") + b"\n]\n"),
    "an array that is called .jsonl": (".jsonl", json.dumps(ROWS).encode()),
    "an array over many lines that is called .jsonl": (".jsonl", json.dumps(ROWS, indent=1).encode()),
    "an array with CRLF and a mark": (
        ".json",
        b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(),
    ),
    "an array after blank lines": (".json", b"\n\n  " + json.dumps(ROWS).encode() + b"\n\n"),
    "an array with a comma at its end": (".json", json.dumps(ROWS, indent=2).encode().rstrip(b"\n]") + b",\n]"),
    "an array for each page": (".jsonl", json.dumps(ROWS[:half]).encode() + b"\n" + json.dumps(ROWS[half:]).encode()),
    "objects in a row": (".jsonl", lines(end="")),
    "objects in a row in a .json": (".json", lines(end=" ")),
    "two objects in each line": (".jsonl", b"\n".join(lines(ROWS[i : i + 2], end="") for i in range(0, N, 2))),
    "objects over many lines": (".jsonl", lines(indent=2)),
    "objects over many lines without a line end between": (".json", lines(indent=4, end="")),
    "lines called .json": (".json", lines()),
    "lines called .ndjson": (".ndjson", lines()),
    "lines after a record separator": (".jsonl", b"".join(b"\x1e" + lines([row]) for row in ROWS)),
    "gzip": (".jsonl.gz", gzip.compress(lines(), mtime=0)),
    "gzip in two members": (
        ".jsonl.gz",
        gzip.compress(lines(ROWS[:half]), mtime=0) + gzip.compress(lines(ROWS[half:]), mtime=0),
    ),
    "gzip with zeros after it": (".jsonl.gz", gzip.compress(lines(), mtime=0) + bytes(512)),
    "gzip of an array": (".json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    "gzip without its suffix": (".jsonl", gzip.compress(lines(), mtime=0)),
    "a .gz that was unpacked on its way": (".jsonl.gz", lines()),
    "zstd": (".jsonl.zst", zst(lines())),
    "zstd in two frames": (".jsonl.zst", zst(lines(ROWS[:half])) + zst(lines(ROWS[half:]))),
    "zstd of an array": (".json.zst", zst(json.dumps(ROWS, indent=1).encode())),
    "zstd of .ndjson": (".ndjson.zst", zst(lines())),
    "NaN in another column": (".jsonl", lines([row | {"score": float("nan"), "top": float("inf")} for row in ROWS])),
    "U+2028 and U+0085 in a text": (
        ".jsonl",
        lines([row | {"note": "a\u2028b\x85c"} for row in ROWS], ensure_ascii=False),
    ),
}


def documents_of(path: Path) -> list:
    source = SourceConfig(kind="jsonl", path=str(path))
    return list(documents(source, local_files(source)))


@pytest.fixture(params=FORMS)
def form(request, tmp_path) -> Path:
    suffix, raw = FORMS[request.param]
    path = tmp_path / f"gsm8k{suffix}"
    path.write_bytes(raw)
    return path


def test_a_source_reads_every_form(form):
    assert [(d.text, d.unreadable) for d in documents_of(form)] == [(row["content"], None) for row in ROWS]


def test_a_folder_finds_every_form(form):
    source = SourceConfig(kind="jsonl", path=str(form.parent))
    assert len(list(documents(source, local_files(source)))) == N


def test_a_benchmark_to_decontaminate_against_is_read_in_every_form(form):
    benchmarks = Benchmarks((str(form),))
    assert (benchmarks.n_problems, benchmarks.undetectable) == (N, [])


def test_problems_are_read_in_every_form(form):
    assert [p.task_id for p in tasks.load("mbpp", str(form))] == [f"MBPP/{row['task_id']}" for row in ROWS]


def test_data_of_lm_eval_are_read_in_every_form(form):
    assert harness_data.load(form.parent, "gsm8k").splits["test"]["question"] == [row["question"] for row in ROWS]


def test_the_comparison_of_tokenizers_reads_every_form(form):
    texts, unreadable, _ = read_documents((form,), 10**9)
    assert (set(texts), unreadable) == ({row["content"] for row in ROWS}, 0)


# -- broken rows ------------------------------------------------------------------------------------------------------

GOOD = [json.dumps(row) for row in ROWS]
AT = 7  # the broken row's place


def among(bad: str, how: str = "lines") -> bytes:
    rows = [*GOOD[:AT], bad, *GOOD[AT:]]
    text = {
        "lines": "\n".join(rows),
        "array": f"[{', '.join(rows)}]",
        "array of lines": "[\n" + ",\n".join(rows) + "\n]",
    }[how]
    return text.encode("utf-8", "surrogateescape")


BROKEN_LINES = {
    "brackets": "[" * 100_000,
    "braces": '{"a":' * 100_000,
    "a few brackets": "[" * 300,
    "cut in a text": '{"content": "def f(',
    "cut after a comma": '{"content": "def f(x): pass",',
    "cut after a colon": '{"content": ',
    "its second half": 'rn x"}',
    "a bracket": "[",
    "a brace": "{",
    "the end of an array": "]",
    "words": "Traceback (most recent call last):",
    "zeros": "\0" * 5000,
    "a merge marker": "<<<<<<< HEAD",
    "no quotes": "{content: 1}",
    "Python": "{'content': 'x'}",
    "undefined": '{"content": undefined}',
    "a comma at its end": '{"content": "x",}',
    "a wrong escape": r'{"content": "\x41"}',
    "a raw tab": '{"content": "\t"}',
    "half an escape": r'{"content": "\u12"}',
    "a number of 5,000 digits": '{"content": ' + "9" * 5000 + "}",
    "a byte outside texts": '{"content": \udce9}',
    "a number": "5",
    "a list": "[1, 2]",
    "null": "null",
}
BROKEN_ELEMENTS = (
    "undefined",
    "a comma at its end",
    "a wrong escape",
    "no quotes",
    "brackets",
    "cut after a comma",
    "cut in a text",
    "number",
)
BROKEN = {what: (".jsonl", among(bad), AT + 1) for what, bad in BROKEN_LINES.items()}
BROKEN |= {
    f"{what}, in an array": (".json", among(BROKEN_LINES[what], "array"), 1)
    for what in ("undefined", "a comma at its end", "a wrong escape", "no quotes", "null", "cut after a comma")
}
BROKEN |= {
    f"{what}, in an array of lines": (".json", among(BROKEN_LINES[what], "array of lines"), AT + 2)
    for what in ("undefined", "a wrong escape", "words", "brackets", "cut after a comma", "cut in a text", "a raw tab")
}
BROKEN["an array that does not end"] = (".json", b"[" + ", ".join(GOOD).encode(), 1)
BROKEN["an object over many lines that is cut"] = (".jsonl", b'{\n "content": "x",\n' + lines(indent=1), 1)


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path) -> tuple[Path, int]:
    suffix, raw, line = BROKEN[request.param]
    path = tmp_path / f"gsm8k{suffix}"
    path.write_bytes(raw)
    return path, line


def test_a_broken_row_costs_a_source_only_itself(broken):
    path, line = broken
    found = documents_of(path)
    assert [d.text for d in found if d.unreadable is None] == [row["content"] for row in ROWS]
    (why,) = (d.unreadable for d in found if d.unreadable is not None)
    assert why.startswith(f"line {line:,}: ") and len(why) < 300


def test_a_broken_row_costs_a_benchmark_only_itself(broken, capsys):
    path, line = broken
    benchmarks = Benchmarks((str(path),))
    if path.read_bytes() in {among(BROKEN_LINES[w]) for w in ("a number", "a list", "null")}:
        assert benchmarks.n_problems == N + 1  # JSON, and a problem of a benchmark may be any
        return
    if path.read_bytes() == among("null", "array"):
        assert (benchmarks.n_problems, len(benchmarks.undetectable)) == (N + 1, 1)
        return
    said = capsys.readouterr().err
    assert len(benchmarks.unreadable) == 1
    assert benchmarks.n_problems - len(benchmarks.undetectable) == N
    assert f"{path.name}, line {line}" in said and "1 rows of data.decontaminate cannot be read" in said


def test_a_broken_row_costs_the_comparison_only_itself(broken):
    texts, unreadable, _ = read_documents((broken[0],), 10**9)
    assert (set(texts), unreadable) == ({row["content"] for row in ROWS}, 1)


def test_a_broken_row_among_problems_is_refused_by_its_line(broken):
    path, line = broken
    for read in (lambda: tasks.load("mbpp", str(path)), lambda: harness_data.load(path.parent, "gsm8k")):
        with pytest.raises(KindlingError) as error:
            read()
        said = str(error.value).replace(str(path.parent), "")
        assert f"line {line} " in said and "\n" not in said and len(said) < 600


# -- damaged files ----------------------------------------------------------------------------------------------------


def flipped(raw: bytes) -> bytes:
    at = len(raw) // 2
    return raw[:at] + bytes(b ^ 0xFF for b in raw[at : at + 8]) + raw[at + 8 :]


DAMAGED = {
    "gzip with flipped bytes": (".jsonl.gz", flipped(gzip.compress(lines(), mtime=0))),
    "gzip that is cut": (".jsonl.gz", gzip.compress(lines(), mtime=0)[:-200]),
    "gzip without its end": (".jsonl.gz", gzip.compress(lines(), mtime=0)[:-4]),
    "gzip with more after it": (".jsonl.gz", gzip.compress(lines(), mtime=0) + b"and more"),
    "zstd with flipped bytes": (".jsonl.zst", flipped(zst(lines()))),
    "zstd that is cut": (".jsonl.zst", zst(lines())[:-20]),
    "UTF-16": (".jsonl", lines().decode().encode("utf-16")),
    **{
        f"{encoding} without a mark": (".jsonl", lines().decode().encode(encoding))
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    },
    "UTF-16 in gzip": (".jsonl.gz", gzip.compress(lines().decode().encode("utf-16"), mtime=0)),
    "UTF-16 without a mark in gzip": (".jsonl.gz", gzip.compress(lines().decode().encode("utf-16-le"), mtime=0)),
    "UTF-16 without a mark in zstd": (".jsonl.zst", zst(lines().decode().encode("utf-16-be"))),
    "an array in UTF-16 without a mark": (".json", json.dumps(ROWS, indent=1).encode("utf-16-le")),
    "xz": (".jsonl", lzma.compress(lines())),
    "bzip2": (".jsonl", bz2.compress(lines())),
    "zip": (".json", b"PK\3\4" + bytes(100)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_or_foreign_file_is_one_line_everywhere(what, tmp_path):
    suffix, raw = DAMAGED[what]
    path = tmp_path / f"gsm8k{suffix}"
    path.write_bytes(raw)
    assert sum("the rest of the file" in (d.unreadable or "") for d in documents_of(path)) == 1
    for read in (
        lambda: tasks.load("mbpp", str(path)),
        lambda: harness_data.load(path.parent, "gsm8k"),
        lambda: Benchmarks((str(path),)),
    ):
        with pytest.raises(KindlingError) as error:
            read()
        said = str(error.value).replace(str(tmp_path), "")
        assert path.name in said and "\n" not in said and len(said) < 500
    try:
        assert read_documents((path,), 10**9)[1] >= 1
    except KindlingError as e:
        assert "1 could not be" in str(e)


WIDE = {
    "code": "def f(x):\n    return x\n" * 60,
    "one short line": "x=1\n",
    "two characters": "{}",
    "JSON in Chinese": json.dumps([{"role": "user", "content": "一个中文问题，请你回答。" * 60}], ensure_ascii=False),
    "JSON in Japanese": json.dumps({"text": "これは日本語の文章です。" * 60}, ensure_ascii=False),
    "JSON with emoji": json.dumps({"text": "\U0001f600" * 600}, ensure_ascii=False),
    "Russian": "Привет, это файл с текстом. Он начинается так.\n" * 40,
    "Greek": "Αυτό είναι ένα κείμενο σε αρχείο.\n" * 40,
    "German": "Über die Größe der Bäume im Wald\n" * 40,
    "blank lines first": "\n\n" + lines().decode(),
}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("what", WIDE)
@pytest.mark.parametrize("marked", [False, True])
def test_a_text_in_utf16_or_utf32_is_refused_in_the_same_line(what, encoding, marked, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes((("\ufeff" if marked else "") + WIDE[what]).encode(encoding))
    line = f"the file must be UTF-8, but is {encoding[:6].upper()}; convert it"
    with pytest.raises(UnicodeError, match=line):
        reader.open_text(path)
    for kind in ("text", "jsonl"):
        source = SourceConfig(kind=kind, path=str(path))
        (document,) = documents(source, local_files(source))
        assert document.unreadable == f"the rest of the file: UnicodeError: {line}"
    with pytest.raises(BenchmarkError, match=line):
        Benchmarks((str(path),))
    with pytest.raises(KindlingError, match="1 could not be"):
        read_documents((path,), 10**6)


NULS = {
    "one in a text": '{"a": "x\0"}\n',
    "at the beginning": "\0{\n" + "some text\n" * 20,
    "at the end": "hello\n\0",
    "one only": "x\0",
    "a few at the beginning": "a\0b\0 is a text" + " and more of it" * 80,
    "a few in a short text": "a\0bc\0d\0e f\0g h i\0",
    "a hole that a crash left": "\0" * 300 + '{"a": 1}\n' * 100,
    "a hole in the middle": '{"a": 1}\n' * 40 + "\0" * 999,
    "nothing else": "\0" * 5000,
    "names with one after each": "./a/b.py\0./c/dd.py\0./x.py\0" * 50,
    "names of three letters": "abc\0" * 300,
    "names of one word": "ab\0\0" * 300,
    "every byte below 128": "".join(map(chr, range(128))) * 8,
}


@pytest.mark.parametrize("what", NULS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_text_in_utf8_with_nuls_is_read(what, packed, tmp_path):
    raw = NULS[what].encode()
    (tmp_path / "a.txt").write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    with reader.open_text(tmp_path / "a.txt") as f:
        assert f.read() == NULS[what]


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(0, 3))
def test_a_text_with_fewer_nuls_than_letters_is_read(tmp_path_factory, text, n):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    words = text.replace("\0", "") + "some words " * 4
    whole = "".join(f"{words}\0" for _ in range(n)) + words
    path.write_text(whole, encoding="utf-8", newline="")
    with reader.open_text(path) as f:
        assert f.read() == whole


@pytest.mark.parametrize("raw", [b"", b"\n \n", b"[]", b"[\n]\n", b"{", b"PAR1\0\0"])
def test_a_benchmark_without_a_row_is_refused(raw, tmp_path):
    (tmp_path / "exam.jsonl").write_bytes(raw)
    with pytest.raises(BenchmarkError, match=r"exam\.jsonl"):
        Benchmarks((str(tmp_path / "exam.jsonl"),))


def test_a_text_that_is_no_utf8_is_no_problem_of_lm_eval_or_mbpp(tmp_path):
    bad = json.dumps(ROWS[1] | {"text": "caf\udce9", "question": "caf\udce9"}, ensure_ascii=False)
    escaped = json.dumps(ROWS[1] | {"text": "caf\udce9", "question": "caf\udce9"})
    for line in (bad, escaped):
        (tmp_path / "gsm8k.jsonl").write_bytes(f"{GOOD[0]}\n{line}".encode("utf-8", "surrogateescape"))
        for read in (
            lambda: tasks.load("mbpp", str(tmp_path / "gsm8k.jsonl")),
            lambda: harness_data.load(tmp_path, "gsm8k"),
        ):
            with pytest.raises(KindlingError, match="line 2 has text that cannot be decoded as UTF-8"):
                read()


def test_columns_of_two_kinds_are_refused_in_one_line(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_bytes(lines([ROWS[0], ROWS[1] | {"question": 5}]))
    with pytest.raises(harness_data.HarnessError, match="same kind of value") as error:
        harness_data.load(tmp_path, "gsm8k")
    assert "\n" not in str(error.value)


# -- the family -------------------------------------------------------------------------------------------------------

strings = st.text(st.characters() | st.characters(categories=("Cs",)), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(strings, values, max_size=4)


@settings(max_examples=50)
@given(
    st.lists(objects, min_size=1, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["\n", "\r\n", "\r", "", " ", ",", "\n\n", "\x1e"]),
    st.booleans(),
    st.booleans(),
)
def test_rows_are_what_was_written_whatever_stands_between_them(tmp_path_factory, rows, indent, between, ascii, packed):
    from kindling.json_rows import read_rows

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = between.join(json.dumps(row, indent=indent, ensure_ascii=ascii) for row in rows)
    for whole in (text, f"[{','.join(json.dumps(row, indent=indent) for row in rows)}]"):
        raw = whole.encode("utf-8", "surrogatepass")
        if b"\xed" in raw:  # a surrogate as bytes is not UTF-8
            continue
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
        assert [row.content for row in read_rows(path)] == rows


@pytest.mark.parametrize("at", range(3))
def test_an_object_inside_a_damaged_row_of_an_array_of_lines_is_no_row(tmp_path, at):
    from kindling.json_rows import Broken, read_rows

    texts = ['{"a": 1}', '{"a": 2}', '{"a": 3}']
    texts[at] = '{"a": [null, {"a": 4}, {"a": 5'
    (tmp_path / "rows.json").write_text("[\n" + ",\n".join(texts) + "\n]", encoding="utf-8")
    found = [row.content for row in read_rows(tmp_path / "rows.json")]
    assert [type(content) for content in found] == [Broken if i == at else dict for i in range(3)]
    # of an array that stands in one line of its own, a damaged row costs no other
    (tmp_path / "rows.json").write_text("[\n" + '{"a": "x, {"a": 2}, {"a": 3}' + "\n]", encoding="utf-8")
    assert [row.content for row in read_rows(tmp_path / "rows.json")][-1] == {"a": 3}


@settings(max_examples=50)
@given(st.lists(objects.filter(bool), min_size=3, max_size=8), st.data(), st.sampled_from(["lines", "array of lines"]))
def test_any_damage_to_a_line_costs_that_line_alone(tmp_path_factory, rows, data, how):
    from kindling.json_rows import Broken, read_rows

    texts = [json.dumps(row) for row in rows]
    at = data.draw(st.integers(0, len(rows) - 1))
    texts[at] = texts[at][: data.draw(st.integers(1, len(texts[at]) - 1))]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(texts) if how == "lines" else "[\n" + ",\n".join(texts) + "\n]", encoding="utf-8")
    found = list(read_rows(path))
    assert [row.content for row in found if not isinstance(row.content, Broken)] == rows[:at] + rows[at + 1 :]
    bad = [row.line for row in found if isinstance(row.content, Broken)]
    assert bad == [at + 1 + (how != "lines")]


@pytest.mark.parametrize("form", ["an array on one line", "objects in a row", "one long line among others"])
def test_a_large_file_is_not_held_in_memory(form, tmp_path):
    import tracemalloc

    from kindling.json_rows import read_rows

    row = json.dumps({"content": "x" * 1000})
    n = 24_000  # 16 MB are held, whatever the size
    text = {
        "an array on one line": f"[{','.join([row] * n)}]",
        "objects in a row": row * n,
        "one long line among others": f"{row}\n{row * (n - 2)}\n{row}",
    }[form]
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    size, text = len(text), ""
    tracemalloc.start()
    started = time.perf_counter()
    assert sum(isinstance(row.content, dict) for row in read_rows(tmp_path / "rows.json")) == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{size / 1e6:.0f} MB, at most {peak / 1e6:.1f} MB held, {time.perf_counter() - started:.1f} s")
    assert peak < size / 1.3


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("[" + '{"a": 1},' * 10 + '{"b": x}' + ',{"a": 1}' * 1000 + "]", 1010),
        ('{"a": 1}' * 10 + '{"b": x}' + '{"a": 1}' * 1000, 1010),
        ('[{"a": 1}, {"b": "x" "c": {"a": 7}}, {"a": 3}]', 2),
        ('[{"a": 1}, oops {"a": 2}]', 2),
    ],
)
def test_a_broken_value_among_others_on_its_line_costs_only_itself(tmp_path, text, good):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    found = [row.content for row in reader.read_rows(tmp_path / "rows.json")]
    assert sum(isinstance(content, dict) for content in found) == good
    assert sum(isinstance(content, reader.Broken) for content in found) == 1


def test_the_error_of_a_broken_value_counts_little_text_before_it(tmp_path, monkeypatch):
    """An error counts lines from where the text begins: with all of it, the time is the square of the number of rows."""
    places, parse = [], reader._parse_value
    monkeypatch.setattr(reader, "_parse_value", lambda text, at: places.append(at) or parse(text, at))
    (tmp_path / "rows.json").write_text("[" + '{"a":x},' * 20_000 + "]", encoding="utf-8")
    assert sum(1 for _ in reader.read_rows(tmp_path / "rows.json")) == 20_000
    assert max(places) < reader.PASSED + 100 < 8 * 20_000
