import gzip
import json

import pytest
from conftest import shared_file

from config import DataConfig
from kindling.data.decontamination import BenchmarkError, Benchmarks, _problems, benchmark_files, benchmark_path
from kindling.data.duplicates import word_hashes

PROBLEMS = {name: list(_problems(benchmark_path(name))) for name in ("humaneval", "mbpp")}
OWN = Benchmarks(("humaneval", "mbpp"))


def rows_of(name: str) -> list[dict]:
    with gzip.open(benchmark_path(name), "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def found(text: str, benchmarks: Benchmarks = OWN) -> str | None:
    return benchmarks.find(text, word_hashes(text))


def test_the_projects_benchmarks_are_whole():
    assert (len(PROBLEMS["humaneval"]), len(PROBLEMS["mbpp"])) == (164, 974)
    assert OWN.undetectable == []
    for name in ("HumanEval.jsonl.gz", "mbpp.jsonl"):
        theirs = shared_file(name).read_bytes()
        ours = benchmark_path(name.split(".")[0].lower()).read_bytes()
        assert (gzip.decompress(theirs) if name.endswith(".gz") else theirs) == gzip.decompress(ours)


def test_every_prompt_of_humaneval_is_found_in_a_document_around_it(corpus):
    around = (corpus / "json/decoder.py").read_text(encoding="utf-8")
    assert found(around) is None
    half = len(around) // 2
    for row in rows_of("humaneval"):
        planted = around[:half] + "\n" + row["prompt"].replace("    ", "\t").upper() + "\n" + around[half:]
        assert found(planted) is not None, row["task_id"]


def test_every_problem_of_mbpp_is_found_with_its_text_and_code():
    for row in rows_of("mbpp"):
        assert found(f'"""{row["text"]}"""\n{row["code"]}\n') is not None, row["task_id"]


@pytest.mark.parametrize(
    "text",
    [
        "for i in range(1, m + 1):\n    for j in range(1, n + 1):\n        pass\n" * 3,
        "digits = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 'a', 'b', 'c', 'd', 'e', 'f']\n",
        "",
        "two words",
    ],
)
def test_what_everyone_writes_is_no_benchmark(text):
    assert found(text) is None


def test_the_answer_names_the_problem_and_the_words():
    row = rows_of("humaneval")[0]
    assert found(row["prompt"]).startswith("HumanEval/0: 'from typing import list def has_close_elements")


def test_any_text_or_jsonl_file_can_be_named(tmp_path):
    words = "one small committed input whose fourteen words no other text in this suite has ever held"
    (tmp_path / "exam.txt").write_text(f"Question: {words}?", encoding="utf-8")
    (tmp_path / "exam.jsonl").write_text(
        json.dumps({"q": words, "n": 5, "more": ["x", {"y": "z"}]}) + "\n", encoding="utf-8"
    )
    for name in ("exam.txt", "exam.jsonl"):
        benchmarks = Benchmarks((str(tmp_path / name),))
        assert found(f"# {words.upper()}", benchmarks).startswith("exam")
        assert found("# " + words.replace("fourteen", "many"), benchmarks) is None


def test_a_benchmark_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"humaneval, mbpp.*nowhere\.txt.*--data\.decontaminate"):
        benchmark_files(DataConfig(decontaminate=("nowhere.txt",)))
    with pytest.raises(BenchmarkError, match=r"bad\.jsonl"):
        Benchmarks((str(tmp_path / "bad.jsonl"),))


def test_all_problems_of_a_document_are_named_each_with_its_words():
    rows = rows_of("humaneval")
    text = "\n".join(rows[i]["prompt"] for i in (3, 0, 5))
    named = OWN.find_all(text, word_hashes(text))
    assert {"HumanEval/3", "HumanEval/0", "HumanEval/5"} <= named.keys()
    assert f"HumanEval/3: {named['HumanEval/3']!r}" == found(text)
    assert all(len(words.split()) == 13 for words in named.values())
    assert OWN.find_all("", word_hashes("")) == {} == Benchmarks(()).find_all(text, word_hashes(text))


def test_words_that_two_problems_share_name_both(tmp_path):
    words = "a task which two of the problems of this exam have got in common word for word"
    rows = "".join(json.dumps({"task_id": name, "q": f"{words} {name}"}) + "\n" for name in ("x/1", "x/2"))
    (tmp_path / "exam.jsonl").write_text(rows, encoding="utf-8")
    benchmarks = Benchmarks((str(tmp_path / "exam.jsonl"),))
    assert benchmarks.find_all(words, word_hashes(words)).keys() == {"x/1", "x/2"}
    assert benchmarks.n_problems == 2


def test_every_run_of_words_of_a_benchmark_is_found_wherever_it_lies_among_the_hashes():
    for name, text in PROBLEMS["humaneval"][:40]:
        assert name in OWN.find_all(text, word_hashes(text)), name
