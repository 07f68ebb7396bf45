"""Programming problems with tests: HumanEval, MBPP and the project's own, all as `Problem`.

    for problem in load("humaneval"):
        print(problem.prompt)

Each benchmark is read in its original format: from the file in `problems/`, another file, or a data set on the hub. A problem
has a prompt for a base model (`prompt`), one for a fine-tuned model (`instruction`), and tests.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling import hub
from kindling.errors import KindlingError, did_you_mean, one_line
from kindling.json_rows import read_rows, usable
from kindling.paths import expand_home

if TYPE_CHECKING:
    from config import EvalConfig

PROBLEMS = Path(__file__).resolve().parents[2] / "problems"
FILES = {
    "problems": "graded.jsonl",
    "humaneval": "HumanEval.jsonl.gz",
    "mbpp": "mbpp.jsonl.gz",
    "mbpp-3shot": "mbpp.jsonl.gz",
}
INFILL, NO_SUFFIX = "-infill", "-no-suffix"  # the ends of benchmarks whose lines are filled in
FILES |= {name + INFILL + way: FILES[name] for name in ("problems", "humaneval", "mbpp") for way in ("", NO_SUFFIX)}
MBPP_TEST = range(11, 511)  # the split for reported results (Austin et al. 2021, section 2.1)
MBPP_SHOTS = (2, 3, 4)  # the examples in their prompts
STOP = "[DONE]"  # the marker that ends an example in these prompts


class TaskError(KindlingError):
    """The problems of a benchmark cannot be read."""


@dataclass(frozen=True)
class Problem:
    """One problem. Everything in it is trusted; only generated text is not."""

    benchmark: str
    task_id: str
    entry_point: str
    """The name of the requested function."""
    prompt: str
    """The text that a base model continues."""
    head: str
    """The code before a continuation; empty where the prompt is not part of the program."""
    instruction: str
    """The instruction for a fine-tuned model."""
    trusted: str
    """Code that the tests need."""
    tests: str
    """Statements that raise AssertionError if the program is wrong."""
    solution: str
    """The whole reference program."""
    remote: tuple[str, ...]
    """Names in the tests that the program defines."""
    level: int | None = None
    mined_instruction: str = ""
    """The instruction for a model that was fine-tuned on docstrings: a task and the signature, which is also in `answer_head`."""
    answer_head: str = ""
    """The code before an answer that is only a body."""
    shots: tuple[tuple[str, str], ...] = ()
    """Examples that a fine-tuned model sees first: instructions with their programs."""
    ids: tuple[int, ...] = ()
    """The whole prompt as token ids, where it is already encoded."""
    after: str | None = None
    """The rest of the program, if one line of it is to be filled in: `head` is then the part before that line."""
    suffix: str | None = None
    """The same, if the model sees it: it is asked with the control tokens of fill-in-the-middle."""

    @property
    def of(self) -> str:
        """The task_id of the problem that a line to be filled in belongs to; of a whole problem, its own."""
        return self.task_id if self.after is None else self.task_id.rpartition("/")[0]


def load(name: str, source: str | None = None) -> list[Problem]:
    """Return the problems of a benchmark: from `source`, a file or a data set on the hub, or else from `problems/`.

    Of all of MBPP, only those of its test split. A name that ends in -infill or -infill-no-suffix gives a problem for each line
    of the reference solutions. Raises TaskError if there are none or they cannot be read.
    """
    if name not in FILES:
        raise TaskError(f"no benchmark is called {name!r}; {did_you_mean(name, FILES)}")
    base, infill, _ = name.partition(INFILL)
    if infill:
        return [line for problem in load(base, source) for line in _lines_to_fill(problem, name)]
    origin = source or str(PROBLEMS / FILES[name])
    rows = list(_rows(name, origin))
    try:
        if name in ("humaneval", "problems"):
            problems = [_to_complete(name, row) for row in rows]
        else:
            own = _rows(name, str(PROBLEMS / FILES[name])) if name == "mbpp-3shot" else ()
            shots = [row for row in own if row["task_id"] in MBPP_SHOTS]
            problems = [_mbpp(name, row, shots) for row in _test_split(rows)]
    except (AttributeError, LookupError, StopIteration, SyntaxError, TypeError, ValueError) as e:
        raise TaskError(
            f"{origin} must hold problems in the format of {name}, but does not ({type(e).__name__}: {e}); "
            f"correct {_flag(name)}"
        ) from None
    if not problems:
        raise TaskError(f"{origin} must hold problems, but has none in {len(rows)} rows; correct {_flag(name)}")
    return problems


def _test_split(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of MBPP's test split; of problems of one's own in its format, all rows.

    All of MBPP, in full or sanitized, has test problems and others that are numbered above them.
    """
    ids = [row["task_id"] for row in rows]
    if odd := [i for i in ids if not isinstance(i, (int, str))]:
        raise TypeError(f"a task_id must be a number or a text, but is {odd[0]!r}")
    in_test = [isinstance(i, int) and i in MBPP_TEST for i in ids]
    if any(in_test) and any(isinstance(i, int) and i > MBPP_TEST[-1] for i in ids):
        return [row for row, is_test in zip(rows, in_test) if is_test]
    return rows


def source_of(name: str, cfg: EvalConfig) -> str | None:
    """Return the file, or the data set on the hub, that the settings name for a benchmark; None: the file in `problems/`."""
    return {"humaneval": cfg.humaneval, "mbpp": cfg.mbpp}.get(name.partition("-")[0])


def require_sources(cfg: EvalConfig) -> None:
    """Raise TaskError if a file or data set that the settings name for a benchmark cannot be read, and problems are wanted."""
    for name in ("humaneval", "mbpp") if cfg.n_samples else ():
        if (source := source_of(name, cfg)) is not None:
            load(name, source)


def file_of(name: str, cfg: EvalConfig) -> str:
    """Return the file with a benchmark's problems. For a data set on the hub, this is the file in `problems/`."""
    given = source_of(name, cfg)
    path = None if given is None else expand_home(given, _flag(name))
    return str(path if path is not None and path.is_file() else PROBLEMS / FILES[name])


def _flag(name: str) -> str:
    return f"--eval.{name.partition('-')[0]}"


def _rows(name: str, source: str) -> Iterator[dict[str, Any]]:
    path = expand_home(source, _flag(name))
    try:
        if path.is_file():
            yield from map(usable, read_rows(path))
            return
        with hub.cache_if_unreachable() as why:
            if why is not None and not path.is_dir() and not hub.is_cached("datasets", source):
                raise ConnectionError(why)
            import datasets

            for split in ("train", "test", "validation", "prompt") if name.startswith("mbpp") else ("test",):
                yield from datasets.load_dataset(source, split=split)
    except Exception as e:  # datasets raises any error of its dependencies
        raise TaskError(
            f"the problems of {name} must be a file or a data set on the hub, but {source!r} cannot be read "
            f"({one_line(e)}); correct {_flag(name)}"
        ) from None


def _to_complete(benchmark: str, row: dict[str, Any]) -> Problem:
    """Return a problem of HumanEval or the project's own. Its prompt is the beginning of a function."""
    prompt, name = row["prompt"], row["entry_point"]
    of_humaneval = benchmark == "humaneval"
    return Problem(
        benchmark=benchmark,
        task_id=row["task_id"],
        entry_point=name,
        prompt=prompt,
        head=prompt,
        instruction=f"Complete this Python function.\n\n{prompt}",
        mined_instruction=_mined(prompt, name),
        answer_head=prompt,
        # HumanEval's tests call helpers in the prompt, where the requested function is empty
        trusted=prompt if of_humaneval else "",
        tests=f"{row['test']}\ncheck({name})\n" if of_humaneval else "\n".join(row["test_list"]),
        solution=prompt + row["canonical_solution"],
        remote=(name,),
        level=None if of_humaneval else row["level"],
    )


def _mbpp(name: str, row: dict[str, Any], shots: list[dict[str, Any]]) -> Problem:
    text, asserts = _text(row), [test.strip() for test in row["test_list"]]
    # the tests' own imports. Two problems build trees with classes that the program must define
    tests = _unix("\n".join([*row.get("test_imports", []), row.get("test_setup_code") or "", *asserts]))
    modules = _modules(tests)
    tests = "".join(f"import {module}\n" for module in modules) + tests
    entry_point = _called(asserts[0])
    signature = f"def {entry_point}({', '.join(_parameters(asserts[0], entry_point))}):"
    quoted = "\n".join([text, *asserts]).replace('"""', "'''")
    prompt = f'"""\n{quoted}\n"""\n'
    if shots:  # Austin et al. 2021, figure 1
        prompt = "".join(_shot(shot) + _unix(shot["code"]) + f"\n{STOP}\n\n" for shot in shots) + _shot(row)
    return Problem(
        benchmark=name,
        task_id=f"MBPP/{row['task_id']}",
        entry_point=entry_point,
        prompt=prompt,
        head="",
        instruction=_asked(row),
        mined_instruction=f"{text}\n{signature}",
        answer_head=signature + "\n",
        shots=tuple((_asked(shot), _unix(shot["code"]).rstrip()) for shot in shots),
        trusted="",
        tests=tests,
        solution=_unix(row["code"]),
        remote=tuple(dict.fromkeys([entry_point, *_unknown(tests)])),
    )


def _lines_to_fill(problem: Problem, benchmark: str) -> Iterator[Problem]:
    """Yield a problem for each line of the reference solution that is not blank: the model is to write this line again.

    Of HumanEval, these are the 1,033 tasks of its single-line infilling (Fried et al. 2022, InCoder; Bavarian et al. 2022).
    """
    lines = problem.solution.removeprefix(problem.head).split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        before, after = ("".join(f"{x}\n" for x in lines[:number]), "".join(f"\n{x}" for x in lines[number + 1 :]))
        yield replace(
            problem,
            benchmark=benchmark,
            task_id=f"{problem.task_id}/L{number}",
            prompt=problem.prompt + before,
            head=problem.head + before,
            after=after,
            suffix=None if benchmark.endswith(NO_SUFFIX) else after,
        )


def _text(row: dict[str, Any]) -> str:
    return (row["text"] if "text" in row else row["prompt"]).strip()


def _unix(code: str) -> str:
    return code.replace("\r\n", "\n").replace("\r", "\n")


def _asked(row: dict[str, Any]) -> str:
    return f"{_text(row)}\nThe code must pass this test:\n{row['test_list'][0].strip()}"


def _shot(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {_text(row)} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _called(test: str) -> str:
    """Return the function that an assert tests: the first called name that is not a builtin, else the first called name."""
    names = [name for name, _ in _calls(test)]
    return next((name for name in names if not hasattr(builtins, name)), names[0])


@cache  # an evaluation reads the same tests several times, and parsing all of MBPP takes a second
def _calls(test: str) -> list[tuple[str, ast.Call]]:
    """Return the calls in a test, each with the name that it calls."""
    nodes = ast.walk(ast.parse(test))
    return [(n.func.id, n) for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]


@cache
def _modules(tests: str) -> list[str]:
    """Return the standard modules that a test uses but leaves for the program to import."""
    bases = [
        n.value.id for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    ]
    return sorted(set(bases) & sys.stdlib_module_names & set(_unknown(tests)))


@cache
def _unknown(tests: str) -> tuple[str, ...]:
    """Return the names that a test uses but neither defines nor imports."""
    names = [n for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Name)]
    made = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.arg):
            made.add(node.arg)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return tuple(dict.fromkeys(n.id for n in names if n.id not in made))


def _parameters(test: str, name: str) -> list[str]:
    """Return parameter names for the arguments with which an assert calls a function."""
    call = next(call for called, call in _calls(test) if called == name)
    return list("abcdefghij"[: len(call.args)])


def _mined(head: str, name: str) -> str:
    """Return an instruction in the form of docstrings.py: the first paragraph of the docstring, then the signature."""
    functions = (n for n in ast.parse(head).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    node = next(n for n in functions if n.name == name)
    texts = (s.value.value for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
    docstring = inspect.cleandoc(str(next(texts, "")))  # in HumanEval/115 an import precedes the docstring
    paragraph = " ".join(docstring.split("\n\n")[0].split(">>>")[0].split())
    empty = type(node)(
        name=node.name, args=node.args, body=[], decorator_list=[], returns=node.returns, lineno=node.lineno
    )
    return f"{paragraph}\n{ast.unparse(empty)}"
