"""The section `decoding` of gpu.py: tokens a second of the `code-50m` shape for some batches, beside transformers' generate.

Random weights in bfloat16 (float32 where the hardware lacks it), other random prompts of 128 tokens in each row, 128 new
tokens, greedy, without end of text. The time is that of the whole call, with the prompts. Both run without cuDNN's attention
(`kindling/device.py`), which prepares a plan for each length.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from child import Child, ChildError
from gpu_common import Plan, say, start_worker

BATCHES, PROMPT, NEW, TURNS = (1, 32, 256), 128, 128, 2
TOY_BATCHES, TOY_PROMPT, TOY_NEW = (1, 3), 8, 8


def worker(device_kind: str, toy: bool) -> None:
    """Build both models, say so, and answer requests of one batch each."""
    import copy

    import torch

    from config import TrainConfig
    from kindling import device
    from kindling.generation.decoding import stream, stream_batch
    from kindling.generation.inference import prepare_for_inference
    from kindling.generation.sampling import Sampling
    from model import TransformersGPT2
    from presets import preset

    runtime = device.resolve(TrainConfig(device=device_kind))
    precision = "bf16" if runtime.precision == "bf16" else "fp32"
    cfg = replace(preset("code-50m").model, backbone="transformers")
    if toy:
        cfg = replace(cfg, n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=512)
    n_prompt, n_new = (TOY_PROMPT, TOY_NEW) if toy else (PROMPT, NEW)
    torch.manual_seed(0)
    backbone = TransformersGPT2(cfg).to(runtime.device).eval()
    theirs = copy.deepcopy(backbone.gpt2).to(device.DTYPES[precision])
    theirs.config.use_cache = theirs.generation_config.use_cache = True
    theirs.generation_config.pad_token_id = 0
    ours = prepare_for_inference(backbone, precision)
    greedy = Sampling(max_new_tokens=n_new, greedy=True)

    def by_ours(prompts: list[list[int]]) -> None:
        if len(prompts) == 1:
            assert sum(1 for _ in stream(ours, prompts[0], greedy, -1)) == n_new
        else:
            rows = [row for row in stream_batch(ours, prompts, greedy, -1, n_rows=len(prompts)) if row.ended]
            assert sum(len(row.out) for row in rows) == n_new * len(prompts)

    def by_theirs(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts, device=runtime.device)
        with torch.inference_mode():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
        assert out.shape == (len(prompts), n_prompt + n_new)

    def seconds(way: Callable[[list[list[int]]], None], prompts: list[list[int]]) -> float:
        device.synchronize(runtime)
        started = time.perf_counter()
        way(prompts)
        device.synchronize(runtime)
        return time.perf_counter() - started

    print(json.dumps({"precision": precision}), flush=True)
    for line in sys.stdin:
        n_rows = json.loads(line)
        shape = (n_rows, n_prompt)
        prompts = torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(n_rows)).tolist()
        took: dict[str, list[float]] = {"ours": [], "transformers": []}
        for number in range(TURNS + 1):  # the first call allocates and does not count
            for name, way in (("ours", by_ours), ("transformers", by_theirs)):
                took[name].append(seconds(way, prompts))
            if number and sum(took["ours"] + took["transformers"]) > 20:
                break
        rates = {name: n_rows * n_new / statistics.median(times[1:]) for name, times in took.items()}
        times = statistics.median(b / a for a, b in zip(took["ours"][1:], took["transformers"][1:]))
        print(json.dumps({"tokens_per_s": rates, "times": times}), flush=True)


class Decoding:
    """Measures in a process of its own."""

    name = "decoding"

    def __init__(self) -> None:
        self.child: Child | None = None

    def prepare(self, plan: Plan) -> None:
        """Start the process."""
        if self.child is None:
            self.child = start_worker(__file__, [plan.device, plan.toy], plan.work / "decoding.log")

    def run(self, plan: Plan, limit_s: float) -> None:
        """Measure one batch after another."""
        self.prepare(plan)
        assert self.child is not None
        ends = time.perf_counter() + limit_s
        found = plan.found[self.name] = {"batches": {}, **self.child.answer(limit_s)}
        for n_rows in TOY_BATCHES if plan.toy else BATCHES:
            left_s = ends - time.perf_counter()
            if left_s <= 0:
                raise ChildError(f"no time is left for batch {n_rows}")
            found["batches"][n_rows] = measured = self.child.ask(n_rows, left_s)
            rate, times = measured["tokens_per_s"]["ours"], measured["times"]
            say(f"decoding: batch {n_rows}: {rate:,.0f} tokens/s, {times:.2f} times transformers' generate")
            plan.save()

    def close(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.kill()


if __name__ == "__main__":
    from kindling.openmp import limit_spinning

    limit_spinning()
    worker(*json.loads(sys.argv[1]))
