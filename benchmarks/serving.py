"""Measure the server: how soon text comes, many clients at once, memory, and what broken requests do.

    python benchmarks/serving.py                                     # a quarter of an hour; see that nothing else runs
    python benchmarks/serving.py --llama venv/bin/python             # beside llama.cpp's server, of the package xllamacpp
    python benchmarks/serving.py --sections latency clients          # only these; --toy tries it out

Servers are processes of their own: our export to int8 with the kernel in C, our run in PyTorch (float32), and with `--llama`
llama.cpp's server with the same weights in Q8_0. `--llama` names its binary, or a Python that has xllamacpp. The model is
of the shape of `autocomplete` with random weights, or the run that `--run` names. Its prompts are Python of the standard library.

- latency: from a request to its first text and to the end of a line of 12 tokens, after a prompt of 200 tokens and one more
  with each request, and after one of 200 tokens that has not been seen. Servers take turns.
- clients: 16 clients, each with texts of its own, beside as many requests one by one, and whether greedy texts are the same.
  writing: 64 tokens after a new prompt of 30. typing: a line after a prompt of 100 tokens, and one more with each request.
- decoding: tokens a second after the first, and the time to the first text, with a new prompt of 128 tokens and 128 new ones, at
  the shape of `code-50m`, which llama.cpp has too, or of `--run`; for PyTorch also in bfloat16 and int8.
- memory: of the whole process of the export's server after 1,000 requests. It is what Linux calls resident (VmRSS): memory of its
  own, and pages of mapped files, such as the weights.
- growth: the same after up to 10,000 requests.
- broken: 10,000 malformed, oversized, cut-off requests of 30 kinds, slow ones beside them, and good ones in between.

Writes `benchmarks/results/local/serving.json` and `serving.md`, after each section.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import RESULTS, Watch  # noqa: E402
from serving_broken import KINDS, Slow, good, status_of  # noqa: E402
from serving_servers import Answer, Client, Models, Server, llama_command, make_models, our_command  # noqa: E402
from serving_tables import Results, markdown  # noqa: E402

SECTIONS = ("latency", "clients", "decoding", "memory", "growth", "broken")
DECODED = "code-50m"  # the shape, and with it the prompt and the new tokens of benchmarks/generation.py
OURS, TORCH, FOR_LLAMA, LLAMA = "int8", "PyTorch, fp32", "int8, llama.cpp's shape", "llama.cpp, Q8_0"
LINE, CLIENTS = 12, 16
LOADS = ("writing", "typing")
SLOW_AT_ONCE = 40


class Sizes(NamedTuple):
    """How much is measured."""

    prefix: int = 200
    rounds: int = 7
    requests: int = 8
    """Of each kind, server and round, or of each client."""
    new: int = 64
    """Tokens of a long answer to one of many clients."""
    many: int = 1_000
    grown: int = 10_000
    broken: int = 10_000
    decoded: int = 128
    """Tokens of the prompt, and as many new ones."""


TOY = Sizes(prefix=100, rounds=1, requests=2, new=4, many=40, grown=60, broken=60, decoded=16)


class Prompts:
    """Pieces of source, each from another place."""

    def __init__(self, models: Models, seed: int):
        self._models, self._rng = models, random.Random(seed)

    def typed(self, n: int, steps: int) -> list[str]:
        """Return a prompt of `n` tokens, then the same with one more each."""
        start = self._rng.randrange(len(self._models.ids) - n - steps)
        ids = self._models.ids[start : start + n + steps]
        return [self._models.tokenizer.decode(ids[: n + i]) for i in range(steps + 1)]

    def one(self, n: int) -> str:
        """Return a prompt of `n` tokens."""
        return self.typed(n, 0)[0]


def in_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1000 * statistics.median(seconds), 1)


def at_share(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[max(0, round(share * len(values)) - 1)]


# -- latency ----------------------------------------------------------------------------------------------------------


def latency(servers: dict[str, Server], models: Models, sizes: Sizes) -> Results:
    """Return milliseconds to the first text and to the whole line of each server, with the prefix cached and without."""
    answers: dict[str, dict[str, list[Answer]]] = {name: {"cached": [], "new": []} for name in servers}
    clients = {name: Client(server.port) for name, server in servers.items()}
    for number in range(sizes.rounds + 1):
        for name, client in clients.items():
            prompts = Prompts(models, number)
            first, *typed = prompts.typed(sizes.prefix, sizes.requests)
            client.complete(first, LINE)
            found = {
                "cached": [client.complete(prompt, LINE) for prompt in typed],
                "new": [client.complete(prompts.one(sizes.prefix), LINE) for _ in range(sizes.requests)],
            }
            for kind in found if number else ():  # the first round is the warm-up
                answers[name][kind] += found[kind]
    for client in clients.values():
        client.close()
    return {
        name: {
            kind: {
                "first text, ms": in_ms([one.first_s for one in found]),
                "line, ms": in_ms([one.whole_s for one in found]),
                "line, p95, ms": round(1000 * at_share([one.whole_s for one in found], 0.95), 1),
                "tokens of the prompt that were cached": _cached(found),
                "new tokens": statistics.median([one.n_new for one in found]),
            }
            for kind, found in kinds.items()
        }
        for name, kinds in answers.items()
    }


def _cached(answers: list[Answer]) -> float | None:
    told = [one.n_cached for one in answers if one.n_cached is not None]
    return statistics.median(told) if told else None


def decoding(servers: dict[str, Server], models: Models, sizes: Sizes) -> Results:
    """Return of each server the time to the first text of a new prompt, and the tokens a second after it. They take turns."""
    found: dict[str, list[Answer]] = {name: [] for name in servers}
    clients = {name: Client(server.port) for name, server in servers.items()}
    for number in range(sizes.rounds + 1):
        for name, client in clients.items():
            answer = client.complete(Prompts(models, 300 + number).one(sizes.decoded), sizes.decoded)
            found[name] += [answer] if number else []  # the first round is the warm-up
    for client in clients.values():
        client.close()
    return {
        name: {
            "first text, ms": in_ms([one.first_s for one in answers]),
            "tokens/s": round(statistics.median((one.n_new - 1) / (one.whole_s - one.first_s) for one in answers), 1),
            "tokens/s, best": round(max((one.n_new - 1) / (one.whole_s - one.first_s) for one in answers), 1),
            "new tokens": statistics.median(one.n_new for one in answers),
        }
        for name, answers in found.items()
    }


# -- clients ----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """Requests that were answered, by client, and how long all took."""

    answers: list[list[Answer]]
    seconds: float

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return sum(one.n_new for answers in self.answers for one in answers) / self.seconds

    @property
    def texts(self) -> list[list[str]]:
        """The texts by client."""
        return [[one.text for one in answers] for answers in self.answers]


def ask(port: int, prompts: list[list[str]], n: int, at_once: bool, **more: Any) -> Asked:
    """Send the requests of each client one after the other, and those of different clients at once or not."""
    answers: list[list[Answer]] = [[] for _ in prompts]
    failed: list[BaseException] = []

    def one_client(number: int) -> None:
        client = Client(port)
        try:
            answers[number] += [client.complete(prompt, n, **more) for prompt in prompts[number]]
        except BaseException as e:
            failed.append(e)
        finally:
            client.close()

    started = time.perf_counter()
    threads = [threading.Thread(target=one_client, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
        if not at_once:
            thread.join()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return Asked(answers, time.perf_counter() - started)


def clients(servers: dict[str, Server], models: Models, sizes: Sizes) -> Results:
    """Return tokens a second of 16 clients and of one, the times to the first text, and whether the texts are the same."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {load: [] for load in LOADS} for name in servers}
    for number in range(min(3, sizes.rounds)):
        source = Prompts(models, 100 + number)
        for load in LOADS:
            together, apart = (_of_clients(source, load, sizes) for _ in range(2))
            for name, server in servers.items():
                n = sizes.new if load == "writing" else LINE
                found[name][load].append(_one_round(server, together, apart, n, compares=number == 0))
    return {name: {load: _over_rounds(rounds) for load, rounds in loads.items()} for name, loads in found.items()}


def _of_clients(source: Prompts, load: str, sizes: Sizes) -> list[list[str]]:
    """Return the prompts of each client."""
    if load == "typing":
        return [source.typed(sizes.prefix // 2, sizes.requests // 2 - 1) for _ in range(CLIENTS)]
    return [[source.one(30) for _ in range(max(1, sizes.requests // 4))] for _ in range(CLIENTS)]


def _one_round(
    server: Server, together: list[list[str]], apart: list[list[str]], n: int, compares: bool
) -> dict[str, Any]:
    """Return the rates, the times to the first text, and, if it `compares` them, whether the texts are the same."""
    many = ask(server.port, together, n, at_once=True)
    one = ask(server.port, apart, n, at_once=False)  # other texts, as those before are in the cache
    firsts = [answer.first_s for answers in many.answers for answer in answers]
    same = not compares or ask(server.port, together, n, at_once=False).texts == many.texts
    return {"one": one.rate, "many": many.rate, "firsts": firsts, "same": same}


def _over_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    firsts = [seconds for one in rounds for seconds in one["firsts"]]
    return {
        "one client, tokens/s": round(statistics.median(one["one"] for one in rounds), 1),
        "16 clients, tokens/s": round(statistics.median(one["many"] for one in rounds), 1),
        "times one": round(statistics.median(one["many"] / one["one"] for one in rounds), 2),
        "first text, median, ms": in_ms(firsts),
        "first text, p95, ms": round(1000 * at_share(firsts, 0.95), 1),
        "the same texts": all(one["same"] for one in rounds),
    }


# -- memory -----------------------------------------------------------------------------------------------------------


def some_requests(models: Models, sizes: Sizes, n: int, seed: int) -> list[list[str]]:
    """Return the prompts of `n` requests for each of 16 clients: most are short, one in ten is long."""
    source, rng = Prompts(models, seed), random.Random(seed)
    per_client = [n // CLIENTS + (number < n % CLIENTS) for number in range(CLIENTS)]
    lengths = (sizes.prefix, *[10] * 5, *[30] * 4)
    return [[source.one(rng.choice(lengths)) for _ in range(count)] for count in per_client]


def memory(server: Server, models: Models, sizes: Sizes) -> Results:
    """Return the megabytes of a server's process at its start, and after 1,000 requests of 16 clients."""
    started = server.memory()
    ask(server.port, some_requests(models, sizes, sizes.many, 7), LINE, at_once=True)
    full = [[source.one(sizes.prefix)] for source in (Prompts(models, 200 + k) for k in range(4 * CLIENTS))]
    ask(server.port, full, LINE, at_once=True)  # every row of the cache is in use to its end
    return {"requests": sizes.many + len(full), "at the start": in_mb(started), "then": in_mb(server.memory())}


def growth(server: Server, models: Models, sizes: Sizes) -> Results:
    """Return the megabytes of a server's process after each tenth of 10,000 requests, some with log-probabilities."""
    found, tenth = [in_mb(server.memory())], sizes.grown // 10
    for number in range(10):
        more = {"logprobs": 5, "temperature": 0.8} if number % 2 else {}
        ask(server.port, some_requests(models, sizes, tenth, 1000 + number), 4, at_once=True, **more)
        found.append(in_mb(server.memory()))
    return {"requests": 10 * tenth, "after each tenth": found, "grown since the first tenth": _grown(found[1:])}


def in_mb(found: dict[str, int]) -> dict[str, float]:
    """Return bytes as megabytes."""
    return {name: round(value / 1e6, 1) for name, value in found.items()}


def _grown(found: list[dict[str, float]]) -> float:
    return round(found[-1]["whole"] - found[0]["whole"], 1)


# -- broken requests --------------------------------------------------------------------------------------------------


def broken(server: Server, models: Models, sizes: Sizes) -> Results:
    """Send broken requests; return what came of them, the times of good requests before and between, and memory."""
    rng, statuses, slow = random.Random(3), Counter[tuple[str, int]](), Slow(server.port)
    usual = [_timed_good(server.port) for _ in range(40)]
    for name, send in KINDS.items():  # once each, so that buffers have their size
        statuses[name, send(rng, server.port)] += 1
    found, between, names = [in_mb(server.memory())], [], list(KINDS)
    for number in range(sizes.broken):
        name = names[number % len(names)]
        statuses[name, KINDS[name](rng, server.port)] += 1
        slow.go_on()
        if number % 5 == 0 and slow.n_open < SLOW_AT_ONCE:
            slow.begin(rng)
        if number % 20 == 0:
            between.append(_timed_good(server.port))
        if (number + 1) % (sizes.broken // 10) == 0:
            found.append(in_mb(server.memory()))
    slow.wait(15 if sizes is not TOY else 0)
    for status in slow.statuses:
        statuses["slow", status] += 1
    usual_after = [_timed_good(server.port) for _ in range(40)]
    return {
        "requests": sum(statuses.values()),
        "kinds": len({name for name, _ in statuses}),
        "statuses": {name: _statuses_of(name, statuses) for name in dict.fromkeys(name for name, _ in statuses)},
        "status 500 and above": sum(n for (_, status), n in statuses.items() if status >= 500),
        "slow ones that the server never ended": slow.n_open if sizes is not TOY else 0,
        "good requests in between": len(between),
        "their time, ms": {"before": in_ms(usual), "between": in_ms(between), "after": in_ms(usual_after),
                           "before, p95": round(1000 * at_share(usual, 0.95), 1),
                           "between, p95": round(1000 * at_share(between, 0.95), 1)},
        "memory after each tenth": found,
        "grown since the first tenth": _grown(found[1:]),
    }  # fmt: skip


def _timed_good(port: int) -> float:
    started = time.perf_counter()
    status = status_of(port, good(LINE))
    assert status == 200, f"a good request got {status}"
    return time.perf_counter() - started


def _statuses_of(kind: str, statuses: Counter[tuple[str, int]]) -> dict[str, int]:
    return {str(status): n for (name, status), n in sorted(statuses.items()) if name == kind}


# -- the script ------------------------------------------------------------------------------------------------------


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--run", type=Path, help="measure this run, not random weights")
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-server, or a Python that has xllamacpp")
    parser.add_argument("--no-torch", action="store_true", help="leave out the run in PyTorch")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    return parser.parse_args(argv)


def said(flags: argparse.Namespace, models: Models) -> str:
    """Return what model is measured."""
    shape = ", ".join(f"{name} {models.shape[name]}" for name in ("n_layer", "n_embd", "vocab_size", "block_size"))
    return f"{flags.run or 'random weights'}: {shape}"


def commands(models: Models, flags: argparse.Namespace, each_precision: bool = False) -> dict[str, list[str]]:
    """Return the commands of the servers that are compared, by name; of PyTorch's in each precision, or in float32 alone."""
    found = {OURS: our_command(models.int8)}
    if not flags.no_torch:
        found[TORCH] = our_command(models.run, "--device", "cpu")
        for precision in ("bf16", "int8") if each_precision else ():
            found[f"PyTorch, {precision}"] = our_command(models.run, "--device", "cpu", "--precision", precision)
    if flags.llama is not None:
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        found[FOR_LLAMA] = our_command(models.int8_for_llama)
        found[LLAMA] = llama_command(flags.llama, models.gguf, models.shape["block_size"], threads)
    return found


def main(argv: list[str] | None = None) -> None:
    flags = parsed(argv)
    sizes, watch = TOY if flags.toy else Sizes(), Watch()
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = make_models(folder, flags.run, flags.toy, flags.llama is not None)
        results: Results = {"model": said(flags, models)}

        def keep(section: str, found: Results) -> None:
            results.update({section: found, "machine": watch.describe()})
            (flags.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (flags.out / "serving.md").write_text(markdown(results), encoding="utf-8")

        for section, compare in (("latency", latency), ("clients", clients), ("decoding", decoding)):
            if section in flags.sections:
                with ExitStack() as stack:
                    of = models
                    if section == "decoding" and flags.run is None:
                        (folder / DECODED).mkdir()
                        of = make_models(folder / DECODED, None, flags.toy, flags.llama is not None, DECODED)
                    servers = {
                        name: stack.enter_context(Server(command, folder / f"{number}.txt"))
                        for number, (name, command) in enumerate(commands(of, flags, section == "decoding").items())
                    }
                    results[f"model of {section}"] = said(flags, of)
                    keep(section, compare(servers, of, sizes))
        for section, measure in (("memory", memory), ("growth", growth), ("broken", broken)):
            if section in flags.sections:
                with Server(our_command(models.int8), folder / "log.txt") as server:
                    keep(section, measure(server, models, sizes))
    print((flags.out / "serving.md").read_text(encoding="utf-8"))
    print(f"results in {flags.out}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
