"""Measure two FSDP2 steps of smallcoder-1 (302M parameters) on two processes with one thread each, and its checkpoint.

    python benchmarks/fsdp_smallcoder.py                  # a few minutes on two cores; see that nothing else runs
    python benchmarks/fsdp_smallcoder.py --checkpoint     # recompute each block's activations in the backward pass

A step is one row of 1024 tokens for each process, in float32. Prints what each process held at most in each stage, and the
seconds, and writes `benchmarks/results/local/fsdp_smallcoder.json`. Limit: tokens are random, so the loss says only that it
falls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WORLD, STEPS = 2, 2


def work(rank: int, folder: Path, recompute: bool) -> dict[str, Any]:
    """Train, save and load as one of the processes; return peak GiB and seconds of each stage, and the losses."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from kindling import device
    from kindling.runs import fsdp
    from kindling.training.optim import make_optimizers
    from model import build_model
    from presets import preset

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    runtime = device.Runtime(torch.device("cpu"), "fp32")
    peaks, seconds, losses = {}, {}, []
    started = time.perf_counter()

    def end(stage: str) -> None:
        nonlocal started
        seconds[stage] = time.perf_counter() - started
        peaks[stage] = device.peak_memory_bytes(runtime) / 2**30
        device.reset_peak_memory(runtime)
        if rank == 0:
            print(f"{stage}: {seconds[stage]:.1f} s, at most {peaks[stage]:.2f} GiB in process 0", flush=True)
        dist.barrier()
        started = time.perf_counter()

    cfg = preset("smallcoder-1")
    torch.manual_seed(0)
    model = build_model(cfg.model)
    if recompute:
        model.checkpoint_activations = True
    end("build")
    fsdp.shard(model, WORLD, None)
    optimizers = make_optimizers(model, cfg.train, torch.float32)
    end("shard")
    rows = torch.randint(
        0, cfg.model.vocab_size, (WORLD, cfg.model.block_size + 1), generator=torch.Generator().manual_seed(0)
    )
    row = rows[rank : rank + 1]
    for step in range(STEPS):
        loss, _ = model(row[:, :-1], row[:, 1:])
        loss = loss / (WORLD * cfg.model.block_size)
        loss.backward()
        norm = fsdp.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), cfg.train.grad_clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(total := loss.detach())
        losses.append({"loss": float(total), "gradient_norm": float(norm)})
        end(f"step {step + 1}")
    if rank == 0:
        fsdp.begin_sharded(folder / "saved", model, optimizers)
    dist.barrier()
    fsdp.save_sharded(folder / "saved", model, optimizers)
    end("save")
    digest = fsdp.state_digest(model, optimizers)
    end("digest")
    fsdp.load_sharded(folder / "saved", model, optimizers)
    end("load")
    same = fsdp.state_digest(model, optimizers) == digest
    size = sum(part.stat().st_size for part in (folder / "saved").iterdir())
    dist.destroy_process_group()
    return {"peak_gib": peaks, "seconds": seconds, "steps": losses, "loads_its_bits": same, "saved_gib": size / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--worker", nargs=2, metavar=("RANK", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        rank, folder = int(args.worker[0]), Path(args.worker[1])
        (folder / f"{rank}.json").write_text(json.dumps(work(rank, folder, args.checkpoint)), encoding="utf-8")
        return
    from machine import Watch, results_file

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *(["--checkpoint"] if args.checkpoint else []), "--worker"]
        processes = [subprocess.Popen([*command, str(rank), folder]) for rank in range(WORLD)]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"the processes ended with {codes}")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]
    path = results_file("fsdp_smallcoder.json")
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    case = "recomputed activations" if args.checkpoint else "kept activations"
    results = old | {case: {"ranks": ranks, "machine": watch.describe()}}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for stage in ranks[0]["peak_gib"]:
        figures = [(rank["peak_gib"][stage], rank["seconds"][stage]) for rank in ranks]
        print(f"{stage}: " + "; ".join(f"{peak:.2f} GiB, {seconds:.1f} s" for peak, seconds in figures))
    print(f"losses {[round(s['loss'], 4) for s in ranks[0]['steps']]}; checkpoint {ranks[0]['saved_gib']:.2f} GiB")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
