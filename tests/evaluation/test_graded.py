"""The project's own graded problems: their form, and that their tests tell right from wrong.

The code in the file is the project's own, so it runs in this process; a trace stops what loops for ever.
"""

import ast
import builtins
import doctest
import inspect
import json
import re
import sys
from collections import Counter

import pytest

from kindling.data.decontamination import PROBLEMS, Benchmarks
from kindling.data.duplicates import word_hashes

KEYS = ["task_id", "level", "entry_point", "prompt", "canonical_solution", "test_list", "wrong"]
MAX_LINES = 20_000  # of Python that one call may run; the slowest solution runs fewer than 1,000
MAX_TEST_CHARACTERS = 120
ROWS = [json.loads(line) for line in (PROBLEMS / "graded.jsonl").read_text(encoding="utf-8").splitlines()]
problem = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['task_id'].split('/')[1]}-{row['entry_point']}")


def run(code: str, namespace: dict) -> None:
    """Execute code, and raise TimeoutError once it has run MAX_LINES lines: a count does not depend on a busy machine."""
    left = MAX_LINES

    def count(frame, event, arg):
        nonlocal left
        left -= 1
        if left < 0:
            raise TimeoutError(f"more than {MAX_LINES} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        exec(compile(code, "<graded>", "exec"), namespace)
    finally:
        sys.settrace(before)


def passes(row: dict, body: str) -> bool:
    """Return whether the function with this body passes all the tests of its problem."""
    namespace: dict = {}
    try:
        run(row["prompt"] + body, namespace)
        for test in row["test_list"]:
            run(test, namespace)
    except Exception:
        return False
    return True


def parse_test(test: str, name: str) -> tuple[list, object]:
    """Return the arguments and the value of `assert NAME(ARGUMENTS) == VALUE`, or of `assert abs(... - VALUE) < 1e-9`."""
    (statement,) = ast.parse(test).body
    assert isinstance(statement, ast.Assert) and statement.msg is None
    compare = statement.test
    assert isinstance(compare, ast.Compare) and len(compare.ops) == 1
    call, value = compare.left, compare.comparators[0]
    if isinstance(compare.ops[0], ast.Lt):
        assert ast.unparse(call.func) == "abs" and ast.literal_eval(value) == 1e-9
        (difference,) = call.args
        assert isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub)
        call, value = difference.left, difference.right
    else:
        assert isinstance(compare.ops[0], ast.Eq)
    assert isinstance(call, ast.Call) and ast.unparse(call.func) == name and not call.keywords
    return [ast.literal_eval(argument) for argument in call.args], ast.literal_eval(value)


def docstring(row: dict) -> str:
    (function,) = (node for node in ast.parse(row["prompt"]).body if isinstance(node, ast.FunctionDef))
    assert function.name == row["entry_point"]
    return ast.get_docstring(function)


def shown_examples(row: dict) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(docstring(row))


def shown_calls(row: dict) -> set[str]:
    """Return the arguments that the docstring shows, as text."""
    trees = (ast.parse(example.source) for example in shown_examples(row))
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {repr(list(map(ast.literal_eval, c.args))) for c in calls if ast.unparse(c.func) == row["entry_point"]}


def task_sentence(row: dict) -> str:
    """Return the first paragraph of the docstring on one line."""
    return " ".join(docstring(row).split("\n\n")[0].split())


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_numbered_and_graded_from_easy_to_hard():
    # level 0 came later: the others keep their numbers, by which runs are compared
    numbers = [*range(71, 101), *range(1, 71)]
    assert [row["task_id"] for row in ROWS] == [f"Kindling/{i}" for i in numbers]
    levels = [row["level"] for row in ROWS]
    assert levels == sorted(levels) and set(levels) == {0, 1, 2, 3, 4, 5}
    assert min(Counter(levels).values()) >= 12


def test_every_line_is_written_the_same_way():
    text = (PROBLEMS / "graded.jsonl").read_text(encoding="utf-8")
    assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    assert all(list(row) == KEYS for row in ROWS)


def test_no_function_and_no_task_comes_twice():
    assert max(Counter(row["entry_point"] for row in ROWS).values()) == 1
    assert max(Counter(task_sentence(row) for row in ROWS).values()) == 1


def test_no_prompt_or_solution_holds_thirteen_words_of_humaneval_or_mbpp():
    benchmarks = Benchmarks(("humaneval", "mbpp"))
    found = {}
    for row in ROWS:
        text = row["prompt"] + row["canonical_solution"]
        if (problem := benchmarks.find(text, word_hashes(text))) is not None:
            found[row["task_id"]] = problem
    assert found == {}


def test_harder_levels_have_longer_solutions():
    lines = {level: [r["canonical_solution"].count("\n") for r in ROWS if r["level"] == level] for level in range(6)}
    means = [sum(n) / len(n) for n in lines.values()]
    assert means == sorted(means) and set(lines[0]) == set(lines[1]) == {1}


def test_level_0_holds_nothing_but_one_constant_argument_operator_or_call():
    for row in (row for row in ROWS if row["level"] == 0):
        (function,) = ast.parse(row["prompt"] + row["canonical_solution"]).body
        steps = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Subscript, ast.List)
        assert sum(isinstance(node, steps) for node in ast.walk(function.body[-1])) <= 1, row["task_id"]


# -- each problem -----------------------------------------------------------------------------------------------------


@problem
def test_the_prompt_is_a_function_head_with_one_sentence_and_examples_that_hold(row):
    assert row["prompt"].endswith('    """\n') and "\t" not in row["prompt"]
    assert max(map(len, row["prompt"].splitlines())) <= 92
    sentence = task_sentence(row)
    assert re.fullmatch(r"Return .*[^.]\.", sentence) and not re.search(r"[.!?] ", re.sub('".*?"', "quoted", sentence))
    assert 1 <= len(shown_examples(row)) <= 2
    namespace: dict = {}
    run(row["prompt"] + row["canonical_solution"], namespace)
    cases = doctest.DocTestParser().get_doctest(docstring(row), namespace, row["task_id"], None, 0)
    assert doctest.DocTestRunner(verbose=False).run(cases).failed == 0


@problem
def test_the_tests_are_single_asserts_on_at_least_five_inputs_of_which_one_is_shown_at_most(row):
    assert len(row["test_list"]) >= 6 and max(map(len, row["test_list"])) <= MAX_TEST_CHARACTERS
    inputs = [repr(parse_test(test, row["entry_point"])[0]) for test in row["test_list"]]
    assert len(set(inputs)) == len(inputs)
    assert len(set(inputs) & shown_calls(row)) <= 1
    for test in row["test_list"]:
        names = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
        assert names - set(dir(builtins)) == {row["entry_point"]}


@problem
def test_the_solution_passes_and_prints_nothing(row, capsys):
    assert passes(row, row["canonical_solution"])
    assert capsys.readouterr().out == ""


@problem
def test_the_solution_returns_the_very_type_that_the_tests_name_and_leaves_its_arguments_alone(row):
    namespace: dict = {}
    run(row["prompt"] + row["canonical_solution"], namespace)
    for test in row["test_list"]:
        arguments, value = parse_test(test, row["entry_point"])
        before = repr(arguments)
        result = namespace[row["entry_point"]](*arguments)
        assert type(result) is type(value) and repr(arguments) == before


@problem
def test_every_wrong_body_fails(row):
    assert len(row["wrong"]) >= 3 and len({*row["wrong"], row["canonical_solution"]}) == len(row["wrong"]) + 1
    for body in row["wrong"]:
        ast.parse(row["prompt"] + body)
        assert not passes(row, body), body


@problem
def test_bodies_without_a_thought_fail(row):
    wants = [example.want.strip() for example in shown_examples(row)]
    assert all(ast.literal_eval(want) is not None for want in wants)
    values = Counter(repr(parse_test(test, row["entry_point"])[1]) for test in row["test_list"])
    run(row["prompt"], namespace := {})
    parameters = list(inspect.signature(namespace[row["entry_point"]]).parameters)
    for value in ["None", *wants, *values, *parameters]:
        body = f"    return {value}\n"  # the first problems of level 0 ask for no more than this
        assert not passes(row, body) or (row["level"] == 0 and asks_for(row, value)), value


def asks_for(row: dict, value: str) -> bool:
    """Return whether the solution returns this constant or argument."""
    trees = [
        ast.parse(text, mode="eval") for text in (row["canonical_solution"].strip().removeprefix("return "), value)
    ]
    return ast.dump(trees[0]) == ast.dump(trees[1])


# -- the guard --------------------------------------------------------------------------------------------------------


def test_what_loops_for_ever_is_stopped_and_fails():
    assert not passes(ROWS[0], "    while True:\n        a += b\n")


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1)",
        "assert f(1) == g(1)",
        "assert f(x) == 1",
        "assert f(1) != 2",
        "assert g(1) == 1",
        "assert f(1) == 1, 'no'",
        "assert abs(f(1) - 1) < 0.1",
        "x = f(1)",
    ],
)
def test_other_forms_of_a_test_are_refused(test):
    with pytest.raises((AssertionError, ValueError, AttributeError)):
        parse_test(test, "f")
