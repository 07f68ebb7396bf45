"""lm-eval's tasks run on a tiny model; what cannot be had is said in one line."""

import importlib.util
import json
import re
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shared_file
from eval_files import gsm8k_rows, write_jsonl, write_plain

from config import ModelConfig, TokenizerConfig
from kindling.evaluation import harness
from kindling.evaluation.harness import HarnessError, run
from kindling.evaluation.harness_data import TASKS
from kindling.tokenization.train_tokenizer import train_bpe
from model import build_model

CPU = torch.device("cpu")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install -r requirements-harness.txt"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([Path(__file__).read_text(encoding="utf-8")], TokenizerConfig(), 500)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(block_size=128, vocab_size=500, n_layer=1, n_head=2, n_embd=32, dropout=0.1))


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HarnessError, match=r"run `pip install -r requirements-harness\.txt`"):
        run(None, None, ["gsm8k"], CPU)
    assert re.fullmatch(r"lm-eval==[\d.]+\n", (ROOT / "requirements-harness.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "given, says",
    [
        ({"tasks": []}, "--harness must name a task"),
        ({"data": Path("/no/such/folder")}, "must be a folder"),
        ({"limit": 0}, "--harness-limit must be at least 1, but is 0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given, says, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(HarnessError, match=re.escape(says)):
        run(None, None, **{"tasks": ["gsm8k"], "device": CPU, **given})


@needs_lm_eval
def test_each_task_runs_on_its_plain_form_and_gives_its_published_metric(model, tokenizer, tmp_path, capfd, caplog):
    results = run(model, tokenizer, list(TASKS), CPU, write_plain(tmp_path / "eval"), progress=False)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert {task: (r["metric"], r["n"], r["shots"]) for task, r in results.items()} == {
        "wikitext": ("word_perplexity", 2, 0),
        "hellaswag": ("acc_norm", 2, 0),
        "arc_easy": ("acc_norm", 6, 0),
        "arc_challenge": ("acc_norm", 6, 0),
        "gsm8k": ("exact_match,strict-match", 8, 5),
    }
    assert all(r["value"] == r["all"][r["metric"]] for r in results.values())
    assert "bits_per_byte" in results["wikitext"]["all"] and results["wikitext"]["stderr"] is None
    assert results["arc_easy"]["stderr"] == results["arc_easy"]["all"]["acc_norm_stderr"]
    assert results["arc_easy"]["requests"] == 18  # three choices each
    assert "<unk>" in results["wikitext"]["notes"][0]
    assert results["gsm8k"]["cropped"] == 8 and "8 of 8 requests lost the beginning" in results["gsm8k"]["notes"][1]
    assert results["gsm8k"]["notes"][0].startswith("the 5 shots are other rows of the split")
    assert capfd.readouterr() == ("", "") and not caplog.records  # lm-eval and its libraries say much


@needs_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_each_task_runs_on_its_real_data(task, model, tokenizer):
    (result,) = run(model, tokenizer, [task], CPU, shared_file("eval"), limit=5, progress=False).values()
    assert result["n"] == 5 and result["value"] >= 0
    assert result["notes"][-1] == "only the first 5 questions"


@needs_lm_eval
def test_hellaswag_asks_what_the_hubs_rows_would(tmp_path):
    manager = harness._manager(("hellaswag",))
    local = harness.load(write_plain(tmp_path / "eval"), "hellaswag")
    (task,) = harness._load(manager, "hellaswag", local, False)["tasks"].values()
    assert [doc["query"] for doc in task.eval_docs] == [
        "Making tea: A woman fills a kettle. She turns it on. The woman then",
        "Home and Garden: How to sweep a floor. Take a broom. Begin in a corner.",
    ]


@needs_lm_eval
@pytest.mark.parametrize("has_training_split", [False, True])
def test_no_question_is_among_its_own_shots(has_training_split, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = gsm8k_rows(16)
    if has_training_split:
        DatasetDict(train=Dataset.from_list(rows[:8]), test=Dataset.from_list(rows[8:])).save_to_disk(
            tmp_path / "gsm8k"
        )
    else:
        write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    local = harness.load(tmp_path, "gsm8k")
    (task,) = harness._load(harness._manager(("gsm8k",)), "gsm8k", local, False)["tasks"].values()
    task.build_all_requests()
    shots = {row["question"] for row in (rows[:8] if has_training_split else rows)}
    for request in task.instances:
        *asked, last = re.findall(r"Question: (.*)", request.args[0])
        assert len(asked) == 5 and last not in asked and set(asked) <= shots


@needs_lm_eval
def test_right_answers_are_counted(tmp_path, model, tokenizer, monkeypatch):
    """lm-eval scores what the adapter hands it: here the right answers, once as text and once as log-likelihoods."""
    from kindling.evaluation.harness_model import KindlingLM

    data = write_plain(tmp_path / "eval")
    monkeypatch.setattr(KindlingLM, "generate_until", lambda self, requests: [r.doc["answer"] for r in requests])
    monkeypatch.setattr(
        KindlingLM,
        "loglikelihood",
        lambda self, requests: [
            (0.0 if r.args[1] == f" {r.doc['choices']['text'][1]}" else -9.0, True) for r in requests
        ],
    )
    results = run(model, tokenizer, ["gsm8k", "arc_easy"], CPU, data, progress=False)
    assert [results[task]["value"] for task in ("gsm8k", "arc_easy")] == [1.0, 1.0]


@needs_lm_eval
def test_a_limit_leaves_questions_out_and_says_so(model, tokenizer, tmp_path):
    data = write_plain(tmp_path / "eval")
    result = run(model, tokenizer, ["arc_easy"], CPU, data, limit=2, progress=False)["arc_easy"]
    assert (result["n"], result["requests"], result["notes"]) == (2, 6, ["only the first 2 questions"])


def test_what_is_no_finite_number_is_none_in_json():
    given = {"alias": "gsm8k", "sample_len": 3, "acc,none": 0.5, "ppl,none": float("inf"), "acc_stderr,none": "N/A"}
    assert harness._numbers(given) == {"acc": 0.5, "ppl": None, "acc_stderr": None}


@pytest.mark.parametrize("served", [True, False])
def test_only_where_the_hub_does_not_answer_its_libraries_are_told_to_keep_off_it(served, monkeypatch):
    import datasets
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for config in (constants, datasets.config):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    if served:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    with harness._hub(needed=True) as answers:
        assert answers == served
        assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == (not served)
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    if served:
        server.shutdown()


@needs_lm_eval
def test_the_models_dropout_is_off_meanwhile_and_back_afterwards(model, tokenizer, tmp_path):
    data = write_plain(tmp_path / "eval")
    model.train()
    one, other = (run(model, tokenizer, ["wikitext"], CPU, data, progress=False) for _ in range(2))
    assert one == other and model.training


@needs_lm_eval
def test_a_task_that_is_neither_local_nor_reachable_says_what_to_put_where(model, tokenizer, tmp_path):
    started = time.monotonic()
    with pytest.raises(HarnessError, match="the task gsm8k must have its data, but the hub cannot be reached") as error:
        run(model, tokenizer, ["gsm8k"], CPU, tmp_path, progress=False)
    assert "put gsm8k/ (written by save_to_disk) or gsm8k.jsonl with question, answer" in str(error.value)
    assert "\n" not in str(error.value) and time.monotonic() - started < 60  # tries the hub once


@needs_lm_eval
def test_too_few_rows_for_the_shots_are_refused(model, tokenizer, tmp_path):
    write_jsonl(tmp_path / "gsm8k.jsonl", gsm8k_rows(3))
    with pytest.raises(HarnessError, match="the task gsm8k must be one that lm-eval can run on its data"):
        run(model, tokenizer, ["gsm8k"], CPU, tmp_path, progress=False)


@needs_lm_eval
def test_any_task_of_lm_eval_is_known_and_may_have_a_local_file(model, tokenizer, tmp_path):
    """The one test that reads lm-eval's whole index, which takes ten seconds."""
    with pytest.raises(HarnessError, match="no task called 'arc_chalenge'; did you mean arc_challenge"):
        run(model, tokenizer, ["arc_chalenge"], CPU, tmp_path, progress=False)
    with pytest.raises(HarnessError, match="name the tasks in it"):
        run(model, tokenizer, ["ai2_arc"], CPU, tmp_path, progress=False)
    rows = [{"goal": f"boil {i}", "sol1": "heat it", "sol2": "cool it", "label": 0} for i in range(3)]
    write_jsonl(tmp_path / "piqa.jsonl", rows)
    assert run(model, tokenizer, ["piqa"], CPU, tmp_path, progress=False)["piqa"]["n"] == 3
