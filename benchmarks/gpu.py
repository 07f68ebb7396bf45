"""Check and measure everything on a GPU, in one command.

    python benchmarks/gpu.py                                       # 8 minutes on a fast GPU; see that nothing else runs
    python benchmarks/gpu.py --minutes 25                          # on a small one
    python benchmarks/gpu.py --corpus FOLDER --out FOLDER          # a machine without a network
    python benchmarks/gpu.py --device cpu --toy                    # every section at toy size, to try it out

Four sections, each of which stands alone. If one fails, the result says why, and the next begins:

- right: the tests of tests/gpu
- fast: training steps of seven shapes, beside transformers' models
- decoding: tokens a second of `code-50m`, beside transformers' generate
- real: `code-50m` and `modern-50m` trained by the clock, fine-tuned, evaluated

Each has a part of the time. On a machine with many cores, what is not measured is prepared while the section before it runs.
Results are written as they come: gpu.json, and gpu.md with the tables. FOLDER of --corpus holds source.jsonl.gz (rows of path,
language, content), instructions.jsonl.gz (rows of instruction, input, output) and starcoder2_tokenizer.json. Without it, the
corpus is this machine's Python source. The exit code is 1 if a section or a test failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from child import short  # noqa: E402
from gpu_checks import Checks  # noqa: E402
from gpu_common import MANY_CORES, Plan, Section, keep_logs, say  # noqa: E402
from gpu_decoding import Decoding  # noqa: E402
from gpu_speed import Speed  # noqa: E402
from gpu_tables import markdown, verdict  # noqa: E402
from gpu_training import Training  # noqa: E402
from machine import RESULTS  # noqa: E402

SECTIONS = {"right": Checks, "fast": Speed, "decoding": Decoding, "real": Training}
SHARES = {"right": 0.27, "fast": 0.24, "decoding": 0.06}  # of all the time, at most; the last section has what is left
CORPUS = ("source.jsonl.gz", "instructions.jsonl.gz", "starcoder2_tokenizer.json")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all sections together")
    parser.add_argument("--corpus", type=Path, help="a folder with the corpus; without it, this machine's Python")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that all of it works, measures nothing")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    flags = parser.parse_args()
    if flags.minutes <= 0:
        parser.error(f"--minutes must be above 0, but is {flags.minutes:g}")
    if flags.device == "cpu" and not flags.toy:
        parser.error("--device cpu must be with --toy, as the sizes are those of a GPU, but is without it")
    if flags.corpus is not None:
        missing = [name for name in CORPUS if not (flags.corpus / name).is_file()]
        if missing:
            parser.error(f"--corpus must hold {', '.join(CORPUS)}, but {flags.corpus} lacks {', '.join(missing)}")
    return flags


def run_sections(plan: Plan, sections: dict[str, Section], minutes: float) -> None:
    """Run all sections in order. A section that fails is a line in the results."""
    if (os.cpu_count() or 1) >= MANY_CORES and not plan.toy:
        for name, section in sections.items():
            try:
                section.prepare(plan)
            except OSError as e:  # the section tries again, and then it is its result
                say(f"{name}: cannot be prepared: {e}")
    for name, section in sections.items():
        limit_s = plan.left_s
        if name != list(sections)[-1] and not plan.toy:
            limit_s = min(limit_s, SHARES.get(name, 1.0) * 60 * minutes)
        started = time.perf_counter()
        say(f"{name}: at most {limit_s:.0f} s")
        try:
            section.run(plan, limit_s)
        except Exception as e:  # a section stands alone, so whatever happens in it is its result
            reason = short(f"{type(e).__name__}: {e}")
            plan.found.setdefault(name, {})["failed"] = reason
            say(f"{name}: failed: {reason}")
        finally:
            section.close()
        plan.found[name]["seconds"] = time.perf_counter() - started
        plan.save()
        keep_logs(plan)


def main() -> int:
    flags = parse()
    import torch
    from machine import Watch

    from kindling.files import write_atomic, write_json

    if flags.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: there must be a CUDA GPU, but torch finds none; --device cpu --toy tries all of it out",
            file=sys.stderr,
        )
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    flags.out.mkdir(parents=True, exist_ok=True)
    watch, started = Watch(), time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="kindling-gpu-"))
    corpus = None if flags.corpus is None else flags.corpus.resolve()
    plan = Plan(flags.device, flags.toy, corpus, flags.out.resolve(), work, started + 60 * flags.minutes)

    def save() -> None:
        head: dict[str, Any] = {"machine": watch.describe(), "toy": flags.toy, "seconds": time.perf_counter() - started}
        results = head | {"sections": plan.found}
        write_json(plan.out / "gpu.json", results)
        write_atomic(plan.out / "gpu.md", markdown(results))

    plan.save = save
    sections: dict[str, Section] = {name: make() for name, make in SECTIONS.items() if name in flags.sections}
    try:
        run_sections(plan, sections, flags.minutes)
    finally:
        for section in sections.values():
            section.close()
        shutil.rmtree(work, ignore_errors=True)
    bad = verdict(plan.found)
    print(f"\nresults in {plan.out / 'gpu.md'}" + (f"; NOT all passed: {'; '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
