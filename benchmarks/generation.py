"""Measures how fast a model writes, beside transformers, and what completion without PyTorch takes.

    python benchmarks/generation.py                         # see that nothing else runs

Decoding: the `code-50m` shape with random weights, a prompt of 128 tokens, 128 new ones, greedy, batch 1, without end of text;
all ways in turn, in one process, in rounds. The rate is that of the 127 tokens after the first; medians, the best round, and
the median ratio within rounds. Completion: the `autocomplete` shape in processes of its own, from the start to the first
token, then tokens a second, and peak memory. Serving: the same shape with the kernel in C, a prompt of 200 tokens, and the next
token of 1 and of 16 texts after it. Random weights cost the same time as trained ones. Writes
`benchmarks/results/local/generation.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import results_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from model import TransformersGPT2

ROUNDS, PROMPT, NEW = 7, 128, 128
SERVED, ROWS = 200, 16  # tokens before the cursor, and texts at once
Way = Callable[[], Iterator[int]]  # gives the new tokens, each as it is made


class Clock:
    """A streamer for transformers' generate: tells when it gets the prompt and each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token was put."""


def transformers_way(
    backbone: TransformersGPT2, dtype: torch.dtype, ids: list[int]
) -> Callable[[], tuple[float, list[int]]]:
    """Return a call of transformers' generate with its cache, which gives the seconds after the first token, and the text."""
    import torch

    model = copy.deepcopy(backbone.gpt2).to(dtype)
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.pad_token_id = 0
    prompt = torch.tensor([ids])

    def call() -> tuple[float, list[int]]:
        clock = Clock()
        with torch.inference_mode():
            mask = torch.ones_like(prompt)
            out = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, streamer=clock)
        assert len(clock.times) == NEW + 1, "the prompt, then each token"
        return clock.times[-1] - clock.times[1], out[0, len(ids) :].tolist()

    return call


def timed(way: Way) -> Callable[[], tuple[float, list[int]]]:
    """Return a call that gives the same of our own ways."""

    def call() -> tuple[float, list[int]]:
        tokens = way()
        out = [next(tokens)]
        started = time.perf_counter()
        out += tokens
        assert len(out) == NEW
        return time.perf_counter() - started, out

    return call


def decoding_ways(folder: Path) -> dict[str, Callable[[], tuple[float, list[int]]]]:
    """Return every way to write the new tokens, by name."""
    import torch

    from autocomplete import Sampling, stream
    from kindling.formats.int8_format import write
    from kindling.generation.decoding import stream as torch_stream
    from kindling.generation.inference import prepare_for_inference
    from kindling.generation.sampling import Sampling as TorchSampling
    from kindling.int8.model import Model
    from kindling.tokenization.train_tokenizer import train_bpe
    from model import TransformersGPT2
    from presets import preset

    torch.manual_seed(0)
    cfg = preset("code-50m")
    backbone = TransformersGPT2(replace(cfg.model, backbone="transformers")).eval()
    ids = torch.randint(cfg.model.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    greedy, int8_greedy = TorchSampling(max_new_tokens=NEW, greedy=True), Sampling(0.0, 0, NEW, 0)
    ways = {
        f"transformers, {name}": transformers_way(backbone, dtype, ids)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for precision in ("fp32", "bf16", "int8"):
        gpt = prepare_for_inference(backbone, precision)
        ways[f"generate.py, {precision}"] = timed(lambda gpt=gpt: torch_stream(gpt, ids, greedy, -1))
    (folder / "code-50m").mkdir()
    write(folder / "code-50m", backbone.for_generation(), train_bpe(["def"], cfg.tokenizer, 300), "random weights")
    for kernel in ("numpy", "c"):
        exported = Model(folder / "code-50m")
        if kernel == "c":
            exported.compile()
        ways[f"autocomplete.py, int8, {kernel}"] = timed(lambda model=exported: stream(model, ids, int8_greedy, -1))
    return ways


def decoding(folder: Path) -> dict[str, float]:
    """Return tokens a second of each way, and how each compares with transformers in float32 and in its own precision."""
    ways = decoding_ways(folder)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts = {name: call()[1] for name, call in ways.items()}  # also the warm-up
    for _ in range(ROUNDS):
        for name, call in ways.items():
            seconds[name].append(call()[0])
    found: dict[str, float] = {}
    for name, times in seconds.items():
        found[f"{name}, tokens/s"] = (NEW - 1) / statistics.median(times)
        found[f"{name}, tokens/s, best"] = (NEW - 1) / min(times)
        other = "transformers, bf16" if "bf16" in name else "transformers, fp32"
        if not name.startswith("transformers"):
            ratios = [theirs / ours for theirs, ours in zip(seconds[other], times)]
            found[f"{name}, times {other}"] = statistics.median(ratios)
    same = texts["generate.py, fp32"] == texts["transformers, fp32"]
    return found | {"greedy text in float32 equal to transformers'": float(same)}


def exported_autocomplete(folder: Path) -> None:
    """Write an int8 export of the `autocomplete` shape, with a tokenizer of its size."""
    import torch

    from kindling.formats.int8_format import write
    from kindling.tokenization.train_tokenizer import train_bpe
    from model import GPT
    from presets import preset

    cfg = preset("autocomplete")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    torch.manual_seed(0)
    folder.mkdir()
    write(folder, GPT(cfg.model).eval(), train_bpe(texts, cfg.tokenizer, cfg.model.vocab_size), "random weights")
    (folder / "prompt.py").write_text(texts[0][:3000], encoding="utf-8")


def completion(folder: Path, kernel: str) -> dict[str, float]:
    """Return the figures of processes that complete a text: seconds to the first token, tokens a second, peak memory."""
    code = """
import sys, time
started = float(sys.argv.pop())
sys.path.insert(0, sys.argv.pop())
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import json
from pathlib import Path
import autocomplete
folder = Path(sys.argv[1])
completer = autocomplete.Completer(folder)
if sys.argv[2] == "c":
    completer.model.compile()
text = (folder / "prompt.py").read_text(encoding="utf-8")
sampling = autocomplete.Sampling(0.2, 10, 128, 0)
ids, _ = completer.prompt_ids(text, 128)
assert len(ids) == 128, len(ids)
tokens = autocomplete.stream(completer.model, ids, sampling, -1)
next(tokens)
first = time.time()
n = sum(1 for _ in tokens)
rate = n / (time.time() - first)
print(json.dumps([first - started, rate, autocomplete.peak_memory_bytes()]))
"""
    runs = []
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", code, str(folder), kernel, str(ROOT), str(time.time())]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(out))
    first, rate, memory = (statistics.median(column) for column in zip(*runs))
    return {
        f"{kernel}, first token after the start of the process, s": first,
        f"{kernel}, tokens/s": rate,
        f"{kernel}, peak memory, MB": memory / 1e6,
    }


def serving(folder: Path) -> dict[str, float]:
    """Return seconds of one call of the kernel in C: a prompt, the next token of one text, and of many texts."""
    from kindling.int8.model import Model

    model = Model(folder)
    model.compile()
    ids = [(i * i * 31 + 7) % model.m["vocab_size"] for i in range(SERVED)]
    cache = model.new_cache(ROWS)

    def call(rows: int, new: list[int]) -> float:
        for row in range(rows):
            cache.truncate(row, SERVED - len(new))
        started = time.perf_counter()
        model.forward([(row, new) for row in range(rows)], cache)
        return time.perf_counter() - started

    for row in range(ROWS):
        model.forward_cached(ids, cache, row)
    shapes = {f"prompt of {SERVED} tokens": (1, ids), "1 text": (1, ids[-1:]), f"{ROWS} texts": (ROWS, ids[-1:])}
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    for _ in range(3 * ROUNDS):
        for name, shape in shapes.items():
            seconds[name].append(call(*shape))
    found = {f"{name}, ms": 1000 * statistics.median(times) for name, times in seconds.items()}
    ratios = [ROWS * one / many for one, many in zip(seconds["1 text"], seconds[f"{ROWS} texts"])]
    return found | {f"tokens/s of {ROWS} texts, times 1 text": statistics.median(ratios)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported_autocomplete(folder / "autocomplete")
        for kernel in ("numpy", "c"):
            results |= {
                f"completion: {key}": value for key, value in completion(folder / "autocomplete", kernel).items()
            }
        results |= {f"serving: {key}": value for key, value in serving(folder / "autocomplete").items()}
        results |= {f"decoding: {key}": value for key, value in decoding(folder).items()}
    for key, value in results.items():
        print(f"{key:<70} {value:,.2f}" if isinstance(value, float) else f"{key:<70} {value}")
    target = results_file("generation.json")
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"results in {target.relative_to(ROOT)}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
