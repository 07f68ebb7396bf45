"""Reads local files of lm-eval's tasks as the rows that lm-eval would get from the hub.

    local = load(Path("data/eval"), "gsm8k")
    local.splits["test"][0]["question"]

A file has the name of its task, and the columns of the hub's data set: a folder `TASK/` written by `save_to_disk`, or
`TASK.jsonl`, `TASK.jsonl.gz` or `TASK.parquet` with the rows to score. Or it has one of four plain formats in which these data
sets are also distributed; the same columns are made from them:

- wikitext: `wikitext.txt` or `wikitext-2/test.txt`, also with .gz: the lines of WikiText-2, which are split into its pages;
- hellaswag: `hellaswag.txt` or `hellaswag_val_full.txt`, also with .gz: six lines for each question;
- arc_easy and arc_challenge: JSON lines of query, choices and gold;
- gsm8k: also under the name `gsm8k_test`.

Limit: HellaSwag's plain format does not mark where the context ends and the first words of the ending begin. This is guessed
from the punctuation.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kindling.errors import KindlingError, one_line
from kindling.json_rows import DAMAGE, PACKED, open_text, read_rows, usable
from kindling.json_rows import SUFFIXES as ROW_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (*(s + p for s in ROW_SUFFIXES for p in ("", *PACKED)), ".parquet")
PLAIN_SUFFIXES = (".txt", *(f".txt{p}" for p in PACKED))


class HarnessError(KindlingError):
    """lm-eval, one of its tasks or the data of a task is missing or cannot be used."""


class Task(NamedTuple):
    """What this module knows about one of lm-eval's tasks."""

    folder: str
    """The folder with its settings, among lm-eval's tasks."""
    hub: str
    """Its data set on the hub."""
    split: str
    """The split that lm-eval scores."""
    columns: tuple[str, ...]
    """The columns that a row must have."""
    plain_name: str | None = None
    """Another name of its file."""


TASKS = {
    "wikitext": Task("wikitext", "EleutherAI/wikitext_document_level", "test", ("page",), "wikitext-2/test"),
    "hellaswag": Task(
        "hellaswag",
        "Rowan/hellaswag",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        "hellaswag_val_full",
    ),
    "arc_easy": Task("arc", "allenai/ai2_arc, ARC-Easy", "test", ("question", "choices", "answerKey")),
    "arc_challenge": Task("arc", "allenai/ai2_arc, ARC-Challenge", "test", ("question", "choices", "answerKey")),
    "gsm8k": Task("gsm8k", "openai/gsm8k, main", "test", ("question", "answer"), "gsm8k_test"),
}


class Local(NamedTuple):
    """The local data of a task."""

    path: Path
    splits: dict[str, Dataset]
    overrides: dict[str, str]
    """The settings of the task that name its splits."""
    note: str = ""
    """Why its figures may differ from published ones."""


def find(folder: Path, task: str) -> Path | None:
    """Return the file or folder with the data of a task, or None. Files with the hub's columns come first."""
    known = TASKS.get(task)
    if (folder / task).is_dir():
        return folder / task
    for name in (task, known and known.plain_name):
        for suffix in (*SUFFIXES, *PLAIN_SUFFIXES):
            if name and (path := folder / f"{name}{suffix}").is_file():
                return path
    return None


def wanted(task: str) -> str:
    """Return which file must have the data of a task, in words for an error."""
    if (known := TASKS.get(task)) is None:
        return f"{task}/ (written by save_to_disk) or {task}.jsonl"
    return f"{task}/ (written by save_to_disk) or {task}.jsonl with {', '.join(known.columns)} ({known.hub})"


def load(folder: Path, task: str) -> Local | None:
    """Return the data of a task in a folder, or None if there are none.

    A data set that was saved as a whole has the hub's splits. A single file is the split to score, and few-shot examples come
    from its other rows. Raises HarnessError for data that cannot be read or belong to another task.
    """
    if (path := find(folder, task)) is None:
        return None
    from datasets import Dataset, DatasetDict, load_from_disk

    known, note = TASKS.get(task), ""
    if path.is_dir():
        try:
            content = load_from_disk(str(path))
        except Exception as e:  # its errors have no common base class
            raise HarnessError(
                f"{path} must be a data set written by save_to_disk, but cannot be read ({one_line(e)}); save it again"
            ) from None
    else:
        rows, note = _rows(path, task)
        if not rows:
            raise HarnessError(f"{path} must have the rows of {task}, but is empty; fetch it again")
        try:
            content = Dataset.from_list(rows)
        except (ValueError, TypeError, OverflowError) as e:  # Arrow's errors are among them
            raise HarnessError(
                f"{path} must have the same kind of value in a column of every row, but has not ({one_line(e)}); correct it"
            ) from None
    if not isinstance(content, DatasetDict):
        content = DatasetDict({known.split if known else "test": content})
    elif known is None:
        return Local(path, dict(content), {})  # it has all splits, under the names in its settings
    scored = known.split if known else "test"
    if scored not in content:
        raise HarnessError(
            f"{path} must have the split {scored}, but has {', '.join(content)}; save the whole data set"
        )
    _require_columns(path, known.columns if known else (), content[scored].column_names)
    # if the scored split is also the few-shot split, lm-eval draws shots from all its rows but the question's own
    splits = {"test_split": scored, "fewshot_split": "train" if "train" in content else scored}
    return Local(path, dict(content), splits, note)


def _require_columns(where: Path | str, columns: Sequence[str], given: Iterable[str]) -> None:
    if missing := [name for name in columns if name not in (given := list(given))]:
        raise HarnessError(
            f"{where} must have {', '.join(columns)}, but lacks {', '.join(missing)} among {', '.join(given) or 'nothing'}; "
            f"rename the columns as the hub's data set has them"
        )


def _rows(path: Path, task: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a file with the hub's columns, and a note if they are not exactly the hub's data."""
    if path.suffix == ".parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table

        try:
            return read_table(path).to_pylist(), ""
        except (OSError, ArrowException) as e:
            raise _unreadable(path, e) from None
    if path.name.endswith(PLAIN_SUFFIXES):
        text = _read(path)
        if task == "wikitext":
            return wikitext_pages(text), _share_of_unk(text)
        if task == "hellaswag":
            return hellaswag_rows(text.splitlines(), str(path)), ""
        raise HarnessError(f"{path} must be JSON lines, but is plain text; put {wanted(task)} there")
    return list(_json_rows(path, task)), ""


def _json_rows(path: Path, task: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file with the columns of a task; raises HarnessError for one that lacks them."""
    try:
        for found in read_rows(path):
            where = f"{path}, line {found.line},"
            try:
                row = usable(found)
            except ValueError as e:
                raise HarnessError(f"{path} must hold JSON objects, but {e}; fetch it again or correct it") from None
            if task.startswith("arc_") and "query" in row:
                row = arc_row(row, where)
            _require_columns(where, TASKS[task].columns if task in TASKS else (), row)
            yield row
    except DAMAGE as e:
        raise _unreadable(path, e) from None


def _read(path: Path) -> str:
    try:
        with open_text(path, "utf-8-sig") as f:
            text = f.read()
        text.encode("utf-8")  # raises an error for a byte that is not UTF-8
        return text
    except DAMAGE as e:
        raise _unreadable(path, e) from None


def _unreadable(path: Path, error: Exception) -> HarnessError:
    return HarnessError(
        f"{path} must be readable, but is not ({one_line(error)}); fetch it again or fix its permissions"
    )


# a heading of the first level; a second-level heading is "= = Title = =", and so on
_TITLE = re.compile(r"\s*= (?!=)(?:.* )?(?<!= )=\s*")


def wikitext_pages(text: str) -> list[dict[str, str]]:
    """Return the pages of WikiText, split before each title as in EleutherAI/wikitext_document_level.

    Lines keep their spaces and pages their order. Joined by newlines, the pages give the text, without blank pages.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    return [{"page": page} for page in map("\n".join, pages) if page.strip()]


def _share_of_unk(text: str) -> str:
    words = text.split()
    if not (unknown := words.count("<unk>")):
        return ""
    return (
        f"{unknown / len(words):.1%} of the words are <unk>, as in the tokenized form of WikiText-2: "
        f"not to be compared with published figures, which are of the raw form"
    )


def hellaswag_rows(lines: Sequence[str], where: str) -> list[dict[str, Any]]:
    """Return the rows of HellaSwag's plain format: "activity: context", the number of the right ending, four endings.

    `ctx_b` is the beginning of the sentence that the endings complete: the text after the context's last sentence. Contexts of
    WikiHow ("How to ...") have none. lm-eval capitalises it with `str.capitalize`. Raises HarnessError with the line's number
    for any other content.
    """
    if len(lines) % 6:
        raise HarnessError(f"{where} must have six lines for each task, but has {len(lines)}; fetch it again")
    rows = []
    for start in range(0, len(lines), 6):
        first, label, *endings = lines[start : start + 6]
        activity, colon, context = first.partition(": ")
        if not colon or label not in ("0", "1", "2", "3"):
            raise HarnessError(
                f"{where}, line {start + 1}, must be an activity, a colon and a context, and the next line a number from "
                f"0 to 3, but they are {first[:40]!r} and {label[:8]!r}; fetch the file again"
            )
        begun = None if context.startswith("How to ") else re.fullmatch(r"(.*[.!?][\"')]*) ([^.!?]*\w)", context)
        ctx_a, ctx_b = begun.groups() if begun else (context, "")
        rows.append({"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings, "label": label})
    return rows


def arc_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row with ARC's columns, made from one with query ("Question: ..."), choices (texts) and gold (an index)."""
    _require_columns(where, ("query", "choices", "gold"), row)
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not (isinstance(query, str) and isinstance(choices, list) and gold in range(len(choices))):
        raise HarnessError(
            f"{where} must have a text as query, a list as choices and the index of one of them as gold, but gold is "
            f"{gold!r}; fetch the file again"
        )
    labels = list(string.ascii_uppercase[: len(choices)])
    return {
        "question": query.removeprefix("Question: "),
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[gold],
    }
