"""Local data of lm-eval's tasks: the plain forms give the hub's rows, and what cannot be read is named."""

import gzip
import re

import pytest
from conftest import shared_file
from eval_files import ACTIVITY, PAGES, WIKIHOW, arc_rows, gsm8k_rows, write_jsonl, write_plain
from hypothesis import given
from hypothesis import strategies as st

from kindling.evaluation.harness_data import TASKS, HarnessError, arc_row, hellaswag_rows, load, wikitext_pages


def reference_pages(text: str) -> list[str]:
    """The rule of lm-eval's first wikitext task, by which the hub's data set was made."""
    pages, lines = [], []
    for line in text.split("\n"):
        folded = line.replace("= = =", "===").replace("= =", "==").strip()
        if folded.startswith("= ") and folded.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [page for page in (*pages, "\n".join(lines)) if page.strip()]


def test_wikitext_is_cut_before_each_title():
    pages = [row["page"] for row in wikitext_pages("".join(PAGES))]
    assert [page.split()[1] for page in pages] == ["Ada", "River"]
    assert "\n".join(pages) == "".join(PAGES).removeprefix(" \n")  # the blank line before the first title is no page


LINES = [" = A = ", "= B b =", " = = C = = ", " = = = D = = = ", "= = E =", "= F = =", " ", "x = y", "= ="]


@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_pages_are_those_of_the_hubs_data_set(lines):
    text = "\n".join(lines)
    assert [row["page"] for row in wikitext_pages(text)] == reference_pages(text)


def test_the_pages_of_the_real_wikitext_are_those_of_the_hubs_data_set():
    local = load(shared_file("eval"), "wikitext")
    assert len(local.splits["test"]) == 62  # what lm-eval reports for its data set
    text = "\n".join(local.splits["test"]["page"])
    assert local.splits["test"]["page"] == reference_pages(text)
    assert "6.3% of the words are <unk>" in local.note


def test_hellaswags_last_words_are_told_from_its_sentences():
    activity, wikihow = hellaswag_rows(ACTIVITY + WIKIHOW, "it")
    assert (activity["ctx_a"], activity["ctx_b"]) == ("A woman fills a kettle. She turns it on.", "the woman then")
    assert (wikihow["ctx_a"], wikihow["ctx_b"]) == ("How to sweep a floor. Take a broom. Begin in a corner.", "")
    assert activity["activity_label"] == "Making tea" and activity["label"] == "2"
    assert activity["endings"] == ACTIVITY[2:]


def test_context_and_last_words_of_the_real_hellaswag_are_its_text():
    rows = load(shared_file("eval"), "hellaswag").splits["validation"]
    assert len(rows) == 10_042
    begun = [row["ctx_b"] for row in rows if row["ctx_b"]]
    assert len(begun) == 3239  # 3,242 rows are ActivityNet's; three end in a quotation or a comma
    assert not any(words[0].isupper() for words in begun)


def test_arc_gets_its_question_labels_and_key():
    assert arc_row(arc_rows(3)[2], "it") == {
        "question": "What is 2 plus one?",
        "choices": {"text": ["2", "3", "a cat"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


@pytest.mark.parametrize("task", TASKS)
def test_each_plain_form_has_the_columns_of_the_hub(task, tmp_path):
    local = load(write_plain(tmp_path / "eval"), task)
    assert tuple(local.splits[TASKS[task].split].column_names) == TASKS[task].columns
    assert local.overrides["test_split"] == TASKS[task].split


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", "/"])
def test_each_form_of_the_hubs_columns_is_read_alike(suffix, tmp_path):
    from datasets import Dataset

    rows = gsm8k_rows(4)
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "gsm8k.parquet")
    elif suffix == "/":
        Dataset.from_list(rows).save_to_disk(tmp_path / "gsm8k")
    else:
        write_jsonl(tmp_path / f"gsm8k{suffix}", rows)
    local = load(tmp_path, "gsm8k")
    assert local.splits["test"].to_list() == rows
    assert local.overrides["fewshot_split"] == "test"  # nothing else is there


def test_a_whole_data_set_gives_its_few_shot_examples_from_the_training_split(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = gsm8k_rows(6)
    DatasetDict(train=Dataset.from_list(rows[:4]), test=Dataset.from_list(rows[4:])).save_to_disk(tmp_path / "gsm8k")
    local = load(tmp_path, "gsm8k")
    assert local.overrides["fewshot_split"] == "train" and local.splits["test"].to_list() == rows[4:]


def test_a_task_that_is_not_known_here_may_have_a_file_too(tmp_path):
    write_jsonl(tmp_path / "piqa.jsonl", [{"goal": "g"}])
    assert load(tmp_path, "piqa").splits["test"].to_list() == [{"goal": "g"}]
    assert load(tmp_path, "gsm8k") is None


def test_a_line_is_one_of_the_file_not_of_unicode(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "a\u2028b\x85", "answer": "c"}\n', encoding="utf-8")
    assert load(tmp_path, "gsm8k").splits["test"]["question"] == ["a\u2028b\x85"]


def test_the_hubs_columns_come_before_a_plain_form(tmp_path):
    write_jsonl(tmp_path / "gsm8k_test.jsonl", gsm8k_rows(3))
    write_jsonl(tmp_path / "gsm8k.jsonl.gz", gsm8k_rows(2))
    assert load(tmp_path, "gsm8k").path.name == "gsm8k.jsonl.gz"


ARC = arc_rows(1)[0]


@pytest.mark.parametrize(
    "name, content, says",
    [
        (
            "gsm8k.jsonl",
            '{"question": "q", "answer": "a"}\n{"question"',
            "must hold JSON objects, but line 2 is not JSON",
        ),
        ("gsm8k.jsonl", "[1]\n", "must hold JSON objects, but line 1 is a list"),
        ("gsm8k.jsonl", '{"question": "q"}\n', "must have question, answer, but lacks answer among question"),
        ("gsm8k.jsonl", "", "is empty"),
        ("gsm8k.txt", "some text", "must be JSON lines"),
        ("gsm8k.jsonl", b"\xff\xfe", "must be readable"),
        ("gsm8k.jsonl.gz", b"no gzip", "must hold JSON objects, but line 1 is not JSON"),
        ("gsm8k.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "must be readable"),
        ("gsm8k.parquet", b"no parquet", "must be readable"),
        ("hellaswag.txt", "\n".join(ACTIVITY[:5]), "six lines for each task, but has 5"),
        ("hellaswag.txt", "\n".join(ACTIVITY[1:] + ACTIVITY[:1]), "line 1, must be an activity"),
        ("arc_easy.jsonl", f"{ARC}".replace("'", '"').replace('"gold": 1', '"gold": 3'), "gold is 3"),
        ("arc_easy.jsonl", '{"query": "q", "gold": 1}', "lacks choices"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HarnessError, match=re.escape(says)) as error:
        load(tmp_path, name.partition(".")[0])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(HarnessError, match="written by save_to_disk") as error:
        load(tmp_path, "gsm8k")
    assert "\n" not in str(error.value)


def test_a_data_set_without_the_scored_split_is_refused(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(gsm8k_rows(2))).save_to_disk(tmp_path / "gsm8k")
    with pytest.raises(HarnessError, match="must have the split test, but has train"):
        load(tmp_path, "gsm8k")
