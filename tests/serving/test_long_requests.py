"""Requests whose texts take long to read: meanwhile, the others are answered."""

import json
import threading
import time

import pytest
from http_server import Vocabulary, running, served, until

from kindling.serving.safety import SLICE, dumped


class Slow(Vocabulary):
    """Encodes and decodes when the test lets it, and counts the characters."""

    def __init__(self):
        self.go, self.n_working, self.longest = threading.Event(), 0, 0

    def wait(self, n: int) -> None:
        self.n_working += 1
        self.longest = max(self.longest, n)
        assert self.go.wait(10)

    def encode(self, text: str) -> list[int]:
        self.wait(len(text))
        return super().encode(text)

    def decode(self, ids) -> str:
        if threading.current_thread().name != "scheduler":
            self.wait(len(ids))
        return super().decode(ids)


TEXT = [{"role": "user", "content": "7"}]
REQUESTS = [
    ("/tokenize", {"content": "7"}),
    ("/tokenize", {"content": "7", "with_pieces": True}),
    ("/detokenize", {"tokens": [55]}),
    ("/apply-template", {"messages": TEXT}),
    ("/completion", {"prompt": "7"}),
    ("/completion", {"prompt": ["7", 55]}),
    ("/infill", {"input_prefix": "7", "input_suffix": "\nend"}),
    ("/v1/completions", {"prompt": "7"}),
    ("/v1/completions", {"prompt": [55], "echo": True}),
    ("/v1/fim/completions", {"prompt": "7", "suffix": "\nend"}),
    ("/v1/chat/completions", {"messages": TEXT}),
    ("/api/generate", {"prompt": "7", "raw": True}),
    ("/api/generate", {"prompt": "7"}),
    ("/api/generate", {"prompt": "7", "suffix": "\nend"}),
    ("/api/chat", {"messages": TEXT}),
]


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
def test_while_a_text_is_encoded_or_decoded_others_are_answered(path, fields):
    slow = Slow()
    with running(served(vocabulary=slow, template="alpaca")) as server:
        answers = []
        client = threading.Thread(target=lambda: answers.append(server.ask("POST", path, fields)[0]))
        client.start()
        try:
            until(lambda: slow.n_working > 0)
            assert server.ask("GET", "/health")[0] == 200
            assert answers == []
        finally:
            slow.go.set()
            client.join(20)
        assert answers == [200]


def test_no_more_of_a_prompt_is_encoded_than_can_fit():
    fast = Slow()
    fast.go.set()
    with running(served(vocabulary=fast, block_size=64)) as server:
        for prompt in ("5" * 20_000, ["5" * 20_000, 54], [53, "5" * 20_000], ["1" * 20_000 + "\n", 54]):
            answer = server.post("/completion", prompt=prompt, n_predict=2)
            assert fast.longest <= 80 * 64 and answer["truncated"] and answer["content"] in ("67", "78")
        assert server.post("/completion", prompt=["1" * 70, 53, 54], n_predict=2)["truncated"]
        assert not server.post("/completion", prompt=["1", 53, "7"], n_predict=2)["truncated"]


def test_a_long_line_before_the_end_of_a_prompt_is_not_dropped_with_it():
    with running(served(block_size=64)) as server:
        assert server.post("/completion", prompt="7" * 20_000 + "\n", n_predict=1)["tokens_evaluated"] > 30


def test_ids_are_decoded_only_where_they_are_echoed():
    slow = Slow()
    slow.go.set()
    with running(served(vocabulary=slow)) as server:
        assert server.post("/v1/completions", prompt=[55] * 200, max_tokens=1)["choices"][0]["text"] == "8"
        assert slow.longest < 200
        assert (
            server.post("/v1/completions", prompt=[55] * 200, max_tokens=1, echo=True)["choices"][0]["text"]
            == "7" * 200 + "8"
        )


def test_long_lists_are_written_as_json_in_slices():
    content = {"a": [{"x": "é"}] * (2 * SLICE + 1), "b": [], "c": "\n"}
    assert json.loads(dumped(content)) == content and dumped({"a": [1]}) == b'{"a": [1]}'


def test_the_tokenizer_of_an_export_lets_other_threads_run(tmp_path):
    from config import TokenizerConfig
    from kindling.int8.tokenizer import ExportTokenizer
    from kindling.tokenization.train_tokenizer import train_bpe

    trained = train_bpe(["ab " * 50], TokenizerConfig(), 300)
    tokenizer = exported(tmp_path, trained, ExportTokenizer)
    text, ids = "ab " * 40_000, []
    worst, total = longest_pause(lambda: ids.extend(tokenizer.encode(text)))
    assert tokenizer.decode(ids) == text and worst < total / 2, (worst, total)


def exported(folder, trained, kind):
    from types import SimpleNamespace

    from kindling.int8.model import TOKENIZER

    (folder / TOKENIZER).write_text(trained.to_json(), encoding="utf-8")
    meta = {"eos_id": trained.eos_id, "bos_id": None}
    return kind(folder, SimpleNamespace(meta=meta, m={"vocab_size": 300}))


def longest_pause(work) -> tuple[float, float]:
    """Return how long this thread could not run while another worked, and how long that took."""
    started, times = threading.Event(), []

    def working() -> None:
        started.wait()
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)

    thread = threading.Thread(target=working)
    thread.start()
    started.set()
    worst, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.0005)
        worst, last = max(worst, time.perf_counter() - last), time.perf_counter()
    return worst, times[0]
