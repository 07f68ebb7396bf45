"""The benchmark of the server, on a model that only pretends, and in one process; the whole script at toy size is slow."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests/serving")]

import serving
import serving_broken
import serving_servers
from http_server import Vocabulary, running, served, until

MACHINE = {"gpu": None, "torch": "2.13", "threads": 2, "cores": 2, "instructions": [], "stolen_share": None}


@pytest.fixture(scope="module")
def server():
    with running(served(n_rows=3)) as one:
        process = SimpleNamespace(pid=os.getpid())
        memory = serving_servers.Server.memory
        yield SimpleNamespace(port=one.port, memory=lambda: memory(SimpleNamespace(process=process)), served=one.served)


@pytest.fixture(autouse=True)
def four_clients(monkeypatch):
    monkeypatch.setattr(serving, "CLIENTS", 4)


@pytest.fixture(scope="module")
def models() -> SimpleNamespace:
    rng = random.Random(0)
    return SimpleNamespace(ids=[rng.randrange(97, 123) for _ in range(5000)], tokenizer=Vocabulary())


def test_a_prompt_that_is_typed_on_is_read_from_the_cache_and_a_new_one_is_not(server, models):
    found = serving.latency({"one": server}, models, serving.TOY)["one"]
    assert found["cached"]["tokens of the prompt that were cached"] > serving.TOY.prefix - 5
    assert found["new"]["tokens of the prompt that were cached"] < 5
    for one in found.values():
        assert 0 < one["first text, ms"] <= one["line, ms"] <= one["line, p95, ms"]
        assert one["new tokens"] == 10  # the digits; then the text ends


def test_the_rate_of_decoding_is_that_after_the_first_text(server, models):
    one = serving.decoding({"one": server}, models, serving.TOY)["one"]
    assert one["new tokens"] == 10 and 0 < one["tokens/s"] <= one["tokens/s, best"]
    results = {"model": "m", "machine": MACHINE, "decoding": {"int8": one}}
    assert f"| int8 | {one['first text, ms']} | {one['tokens/s']} |" in serving.markdown(results)


def test_clients_at_once_get_their_own_texts_and_other_texts_are_noticed(server, models, monkeypatch):
    found = serving.clients({"one": server}, models, serving.TOY)["one"]
    assert all(one["the same texts"] is True and one["times one"] > 0 for one in found.values())
    asked = serving.ask(server.port, [["5"], ["7"]], 12, at_once=True)
    assert asked.texts == [["6789"], ["89"]] and asked.rate == pytest.approx(6 / asked.seconds)
    real = serving.ask
    shorter = lambda port, prompts, n, at_once: real(port, prompts, max(1, n - 5 * at_once), at_once)  # noqa: E731
    monkeypatch.setattr(serving, "ask", shorter)
    found = serving.clients({"one": server}, models, serving.TOY)["one"]
    assert not any(one["the same texts"] for one in found.values())


def test_a_request_that_fails_is_no_figure(server):
    with pytest.raises(serving_servers.ServerError, match="got 400"):
        serving.ask(server.port, [["a"], ["é"]], 3, at_once=True)


def test_a_connection_that_was_closed_while_idle_is_opened_again(server):
    client = serving_servers.Client(server.port)
    assert client.complete("7", 5).text == "89"
    client._connection.sock.shutdown(2)
    assert client.complete("6", 5).text == "789"
    client.close()


def test_all_requests_are_sent_and_memory_is_that_of_the_process(server, models):
    def n_served() -> int:
        return sum(server.served.metrics.requests.values())

    until(lambda: server.served.metrics.n_open == 0)  # those of other tests are counted after their answers, too
    before = n_served()
    found = serving.memory(server, models, serving.TOY)
    assert found["requests"] == serving.TOY.many + 4 * serving.CLIENTS
    until(lambda: n_served() - before == found["requests"])  # they are counted after their answers
    parts = [found["then"][name] for name in ("own", "of files", "shared")]
    assert found["then"]["whole"] == pytest.approx(sum(parts), abs=1)
    grown = serving.growth(server, models, serving.TOY)
    assert len(grown["after each tenth"]) == 11 and grown["requests"] == serving.TOY.grown
    assert grown["grown since the first tenth"] < 50


def test_broken_requests_of_thirty_kinds_get_no_500(server, models):
    assert len(serving_broken.KINDS) == 30
    found = serving.broken(server, models, serving.TOY)
    assert found["requests"] >= serving.TOY.broken and found["status 500 and above"] == 0
    wrong = {name for name, statuses in found["statuses"].items() if "200" in statuses}
    may_be_good = {"changed bytes", "a wrong type or range"}
    assert wrong <= may_be_good | {"a prompt of 300,000 characters"}
    assert len(found["memory after each tenth"]) == 11 and found["grown since the first tenth"] < 50
    assert set(found["statuses"]["a body above the limit"]) == {"413"}
    assert set(found["statuses"]["a foreign host"]) == {"403"}


def test_slow_connections_send_a_byte_at_a_time_and_are_counted(server, monkeypatch):
    monkeypatch.setattr(serving_broken.Slow, "PIECE_S", 0.0)
    slow = serving_broken.Slow(server.port)
    head = serving_broken.head("/infill", "Content-Length: 5")
    monkeypatch.setattr(serving_broken, "good", lambda n: head + b"[1] ..")  # all but the last byte is sent
    slow.begin(SimpleNamespace(choice=lambda values: values[-1] if values[0] == 0 else values[1]))
    assert slow.n_open == 1
    slow.wait(5)
    assert slow.statuses == [400] and slow.n_open == 0


def test_llama_cpps_model_has_the_weights_of_the_export_beside_it(tmp_path, monkeypatch):
    from kindling.formats.gguf_format import read
    from kindling.int8.model import Model

    real = serving_servers.python_source
    monkeypatch.setattr(serving_servers, "python_source", lambda n: real(20_000))
    models = serving_servers.make_models(tmp_path, None, toy=True, with_gguf=True)
    stored, ours, exact = read(models.gguf), Model(models.int8_for_llama), Model(models.int8)
    assert (ours.m["activation"], exact.m["activation"]) == ("gelu_new", "gelu")
    assert ours.head.bias is None and exact.head.bias is not None
    for name, matrix in (("head", ours.head), ("blocks.0.mlp.up", ours.blocks[0].up)):
        weights = stored[f"{name}.weight"].numpy()
        assert abs(weights - matrix.q * matrix.scale[:, None]).max() < 0.01 * abs(weights).max()
    # an answer does not end by chance, and no part of a character holds it back
    nothing = [i for i in range(len(exact.head.q)) if not models.tokenizer.decode([i]).isascii()]
    assert len(nothing) > 100 and not exact.head.q[[*nothing, models.tokenizer.eos_id]].any()


def test_the_tables_have_a_row_for_each_server():
    times = {"first text, ms": 1.0, "line, ms": 2.0, "line, p95, ms": 3.0}
    results = {
        "model": "random weights",
        "machine": MACHINE,
        "latency": {name: {"cached": times, "new": times} for name in ("ours", "theirs")},
        "clients": {name: {load: {"times one": 4.5} for load in serving.LOADS} for name in ("ours", "theirs")},
        "memory": {"requests": 5, "at the start": {"whole": 50.5}, "then": {"whole": 149.0}},
    }
    lines = serving.markdown(results).splitlines()
    assert lines.count("| cached but for one token | theirs | 1.0 | 2.0 | 3.0 |") == 1
    assert "| typing | ours | 4.5 |" in lines and "| after 5 requests | 149.0 |" in lines


def test_the_rank_of_a_share():
    assert [serving.at_share(list(range(1, 21)), share) for share in (0.0, 0.5, 0.95, 1.0)] == [1, 10, 19, 20]


@pytest.mark.slow
def test_the_whole_script_runs_at_toy_size(tmp_path):
    flags = ["--toy", "--no-torch", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks/serving.py"), *flags], check=True, timeout=300)
    found = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert set(serving.SECTIONS) < set(found) and found["broken"]["status 500 and above"] == 0
