import ast
import gzip
import json

import pytest
from conftest import shared_file

from kindling.data.docstrings import mine_pairs
from kindling.evaluation.tasks import FILES, MBPP_TEST, PROBLEMS, TaskError, load


def rows_of(name: str) -> list[dict]:
    path = PROBLEMS / FILES[name]
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


HUMANEVAL, MBPP = rows_of("humaneval"), rows_of("mbpp")


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def all_of_mbpp(tmp_path_factory):
    """All 974 problems, as if all were of the test split."""
    rows, problems = [dict(row) for row in MBPP], []
    folder = tmp_path_factory.mktemp("mbpp")
    for start in range(0, len(rows), len(MBPP_TEST)):
        part = [row | {"task_id": MBPP_TEST[i]} for i, row in enumerate(rows[start : start + len(MBPP_TEST)])]
        problems += load("mbpp", write_rows(folder / f"{start}.jsonl", part))
    assert len(problems) == 974
    return list(zip(rows, problems))


@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("problems", 100), ("mbpp", 500), ("mbpp-3shot", 500)])
def test_every_benchmark_loads(name, count):
    problems = load(name)
    assert len(problems) == count == len({p.task_id for p in problems})
    for p in problems:
        assert p.benchmark == name and p.instruction and p.mined_instruction and p.entry_point.isidentifier()
        assert "\r" not in p.prompt + p.tests + p.solution + p.instruction
        ast.parse(p.tests), ast.parse(p.solution), ast.parse(p.trusted), ast.parse(p.head)
        assert p.head == "" or (p.prompt == p.head and p.head.endswith("\n"))
        assert (p.level in range(6)) == (name == "problems") and bool(p.shots) == (name == "mbpp-3shot")


# -- HumanEval


def test_the_prompts_of_humaneval_are_as_published_to_the_last_newline():
    for row, p in zip(HUMANEVAL, load("humaneval")):
        assert p.prompt == p.head == p.answer_head == row["prompt"] and p.prompt.endswith("\n")
        assert p.task_id == row["task_id"] and p.remote == (row["entry_point"],)
        assert p.solution == row["prompt"] + row["canonical_solution"]
        assert p.tests.startswith(row["test"]) and p.tests.endswith(f"\ncheck({row['entry_point']})\n")


def test_the_asked_function_is_the_last_of_its_prompt():
    for p in [*load("humaneval"), *load("problems")]:
        assert ast.parse(p.prompt).body[-1].name == p.entry_point


# -- MBPP


def test_mbpp_is_its_test_split():
    assert [p.task_id for p in load("mbpp")] == [f"MBPP/{i}" for i in range(11, 511)]


AUSTIN = (  # figure 1 of arXiv:2108.07732, with tasks 2, 3 and 4 as its appendix has them
    "You are an expert Python programmer, and here is your task: Write a function to find the similar elements from the "
    "given two tuple lists. Your code should pass these tests:\n\n"
    "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
    "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
    "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)\n"
    "[BEGIN]\n"
    "def similar_elements(test_tup1, test_tup2):\n"
    "  res = tuple(set(test_tup1) & set(test_tup2))\n"
    "  return (res) \n"
    "[DONE]\n\n"
    "You are an expert Python programmer, and here is your task: Write a python function to identify non-prime numbers. "
    "Your code should pass these tests:\n\n"
    "assert is_not_prime(2) == False\n"
    "assert is_not_prime(10) == True\n"
    "assert is_not_prime(35) == True\n"
    "[BEGIN]\n"
    "import math\n"
    "def is_not_prime(n):\n"
    "    result = False\n"
    "    for i in range(2,int(math.sqrt(n)) + 1):\n"
    "        if n % i == 0:\n"
    "            result = True\n"
    "    return result\n"
    "[DONE]\n\n"
    "You are an expert Python programmer, and here is your task: Write a function to find the largest integers from a given "
    "list of numbers using heap queue algorithm. Your code should pass these tests:\n\n"
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] \n"
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] \n"
    "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]\n"
    "[BEGIN]\n"
    "import heapq as hq\n"
    "def heap_queue_largest(nums,n):\n"
    "  largest_nums = hq.nlargest(n, nums)\n"
    "  return largest_nums\n"
    "[DONE]\n\n"
)
TASK_11 = (
    "You are an expert Python programmer, and here is your task: Write a python function to remove first and last occurrence of "
    "a given character from the string. Your code should pass these tests:\n\n"
    'assert remove_Occ("hello","l") == "heo"\n'
    'assert remove_Occ("abcda","a") == "bcd"\n'
    'assert remove_Occ("PHP","P") == "H"\n'
    "[BEGIN]\n"
)


def test_three_shots_are_those_of_the_paper_to_the_letter():
    problems = load("mbpp-3shot")
    assert problems[0].prompt == AUSTIN + TASK_11
    assert all(
        p.prompt.startswith(AUSTIN) and p.prompt.count("[BEGIN]") == 4 and p.prompt.count("[DONE]") == 3
        for p in problems
    )
    assert len(problems[0].shots) == 3
    for (asked, said), name in zip(problems[0].shots, ("similar_elements", "is_not_prime", "heap_queue_largest")):
        assert f"assert {name}(" in asked and f"def {name}(" in said


def test_the_zero_shot_prompt_is_a_docstring_of_the_task_and_its_tests():
    assert load("mbpp")[0].prompt == '"""\n' + TASK_11.partition("task: ")[2].replace(
        " Your code should pass these tests:\n\n", "\n"
    ).replace("[BEGIN]\n", '"""\n')


def test_what_is_asked_for_is_the_references_own(all_of_mbpp):
    for row, p in all_of_mbpp:
        defined = {
            node.name for node in ast.parse(p.solution).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert p.entry_point in defined, row["task_id"]
        for test in row["test_list"]:
            names = {
                n.func.id for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            assert p.entry_point in names, row["task_id"]
            assert names & defined <= set(p.remote), row["task_id"]


def test_no_more_names_are_the_programs_than_tests_need(all_of_mbpp):
    more = {row["task_id"]: p.remote[1:] for row, p in all_of_mbpp if len(p.remote) > 1}
    assert more == {367: ("Node",), 601: ("Pair",), 927: ("Node",)}


def test_tests_import_the_modules_that_they_use(all_of_mbpp):
    imported = {row["task_id"]: p.tests.split("\n")[0] for row, p in all_of_mbpp if p.tests.startswith("import ")}
    assert set(imported.values()) <= {
        "import math",
        "import re",
        "import sys",
        "import datetime",
        "import collections",
    }, imported


def test_an_entry_point_may_be_named_like_a_builtin_or_stand_inside_others(tmp_path):
    cases = {
        "assert sum(1, 2) == 3": ("sum", ("sum",)),
        "assert set(f(1)) == set(g for g in [1])": ("f", ("f",)),
        "assert math.isclose(f(2), 1)": ("f", ("f",)),
        "assert sorted(f([1]), key=lambda x: -x) == [1]": ("f", ("f",)),
        "assert str(f(Pair(1), 2)) == '3'": ("f", ("f", "Pair")),
        "assert not f(1)": ("f", ("f",)),
        "assert f(x=1, y=[2]) == {a: b for a, b in []}": ("f", ("f",)),
    }
    rows = [{"task_id": 11 + i, "text": "t", "code": "", "test_list": [test]} for i, test in enumerate(cases)]
    for p, expected in zip(load("mbpp", write_rows(tmp_path / "x.jsonl", rows)), cases.values()):
        assert (p.entry_point, p.remote) == expected


def test_setup_code_runs_before_the_tests(all_of_mbpp):
    p = next(p for row, p in all_of_mbpp if row["task_id"] == 367)
    assert p.tests.index("root = Node(1)") < p.tests.index("assert is_tree_balanced(root)")


def test_the_sanitized_form_of_mbpp_is_read_too(tmp_path):
    row = {
        "source_file": "x.ipynb",
        "task_id": 13,
        "prompt": "Write a function.",
        "code": "def f(x):\n    return x",
        "test_imports": ["import math"],
        "test_list": ["assert f(math.pi) == math.pi"],
    }
    (p,) = load("mbpp", write_rows(tmp_path / "x.jsonl", [row]))
    assert (
        p.tests == "import math\n\nassert f(math.pi) == math.pi"
        and "Write a function." in p.prompt
        and p.remote == ("f",)
    )


# -- what a fine-tuned model is asked


def test_a_model_that_was_fine_tuned_on_docstrings_is_asked_in_their_form():
    for p in [*load("problems"), *load("humaneval")]:
        task, signature = p.mined_instruction.split("\n")
        assert task and ">>>" not in task and signature.startswith(f"def {p.entry_point}(") and signature.endswith(":")
        pairs = [pair for pair in mine_pairs(p.solution) if pair.name == p.entry_point]
        if p.benchmark == "problems":
            assert [pair.instruction for pair in pairs] == [p.mined_instruction]
    for p in load("mbpp"):
        task, signature = p.mined_instruction.split("\n")
        assert p.answer_head == signature + "\n" and ast.parse(f"{signature} pass").body[0].name == p.entry_point
        assert "MBPP" not in task and len(task.split()) > 3


def test_an_instruction_of_mbpp_shows_one_test():
    p = load("mbpp")[0]
    assert p.instruction == (
        "Write a python function to remove first and last occurrence of a given character from the string.\n"
        'The code must pass this test:\nassert remove_Occ("hello","l") == "heo"'
    )
    assert p.mined_instruction.endswith("\ndef remove_Occ(a, b):")


# -- other files, and data sets laid out as the hub serves them


def on_the_hub(folder, name, splits: dict[str, list[dict]]) -> str:
    import pyarrow
    import pyarrow.parquet

    (folder / name).mkdir(parents=True)
    card = f"configs:\n- config_name: {name}\n  default: true\n  data_files:\n"
    schema = pyarrow.Table.from_pylist([row for rows in splits.values() for row in rows]).schema
    for split, rows in splits.items():
        file = f"{name}/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / file)
        card += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_humaneval_of_the_hub_is_the_same(tmp_path):
    folder = on_the_hub(tmp_path / "openai_humaneval", "openai_humaneval", {"test": HUMANEVAL})
    assert load("humaneval", folder) == load("humaneval")


def test_mbpp_of_the_hub_is_the_same(tmp_path):
    ranges = {"train": range(601, 975), "test": range(11, 511), "validation": range(511, 601), "prompt": range(1, 11)}
    splits = {split: [row for row in MBPP if row["task_id"] in ids] for split, ids in ranges.items()}
    assert load("mbpp-3shot", on_the_hub(tmp_path / "mbpp", "full", splits)) == load("mbpp-3shot")


def test_the_published_files_are_the_same():
    assert load("humaneval", str(shared_file("HumanEval.jsonl.gz"))) == load("humaneval")
    assert load("mbpp", str(shared_file("mbpp.jsonl"))) == load("mbpp")


def test_a_file_of_test_problems_alone_is_enough_for_three_shots(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [row for row in MBPP if row["task_id"] == 11])
    assert load("mbpp-3shot", file) == load("mbpp-3shot")[:1]


# -- errors


def one_line(name, source=None) -> str:
    with pytest.raises(TaskError) as e:
        load(name, source)
    message = str(e.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_benchmark_that_does_not_exist_is_named():
    assert "'humanevel'" in one_line("humanevel") and "humaneval" in one_line("humanevel").partition(";")[2]


@pytest.mark.parametrize(("name", "flag"), [("humaneval", "--eval.humaneval"), ("mbpp-3shot", "--eval.mbpp")])
def test_what_cannot_be_read_is_one_clear_line(tmp_path, name, flag):
    missing = one_line(name, str(tmp_path / "missing.jsonl"))
    assert "missing.jsonl" in missing and missing.endswith(f"correct {flag}")
    assert flag in one_line(name, str(tmp_path))  # a folder that holds nothing
    assert flag in one_line(name, "nobody/no-such-set")
    for content, words in {
        '{"a": 1}\n{"b": 2\n': "line 2",
        "[1, 2]\n": "line 1",
        "7\n": "line 1",
        "\udcff\n": "decode",
        '{"a": 1}\n': "KeyError",
        "": "none in 0 rows",
        "\n \n": "none in 0 rows",
    }.items():
        (tmp_path / "x.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
        message = one_line(name, str(tmp_path / "x.jsonl"))
        assert words in message and flag in message and "x.jsonl" in message, message
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    assert flag in one_line(name, str(tmp_path / "x.jsonl.gz"))


@pytest.mark.parametrize("column", ["prompt", "entry_point", "test", "canonical_solution", "task_id"])
def test_a_column_of_humaneval_that_is_missing_or_odd_is_named(tmp_path, column):
    row = dict(HUMANEVAL[0])
    value = row.pop(column)
    assert f"KeyError: '{column}'" in one_line("humaneval", write_rows(tmp_path / "x.jsonl", [row]))
    if column in ("prompt", "entry_point"):
        for odd in (None, 3, [], "odd (", f"not_{value}"):
            one_line("humaneval", write_rows(tmp_path / "x.jsonl", [row | {column: odd}]))


@pytest.mark.parametrize("column", ["text", "test_list", "code", "task_id"])
def test_a_column_of_mbpp_that_is_missing_or_odd_is_named(tmp_path, column):
    row = dict(MBPP[10])
    del row[column]
    missing = "prompt" if column == "text" else column  # as the sanitized form calls it
    assert f"KeyError: '{missing}'" in one_line("mbpp", write_rows(tmp_path / "x.jsonl", [row]))
    for odd in (None, [], [""], [3], ["assert ("], ["x = 1"], {}):
        one_line("mbpp", write_rows(tmp_path / "x.jsonl", [row | {column: odd}]))


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (range(1, 975), MBPP_TEST),  # all of MBPP
        ((2, 3), (2, 3)),
        (range(1, 51), range(1, 51)),
        (("a/1", "a/2"), ("a/1", "a/2")),
        ((600, 601), (600, 601)),
    ],
)
def test_of_mbpp_the_test_split_is_taken_and_of_problems_of_ones_own_all(tmp_path, ids, kept):
    rows = [
        {"task_id": i, "prompt": "Add.", "code": "def f(a):\n    return a", "test_list": ["assert f(1) == 1"]}
        for i in ids
    ]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")  # an array on one line
    assert [p.task_id for p in load("mbpp", str(tmp_path / "mine.json"))] == [f"MBPP/{i}" for i in kept]
