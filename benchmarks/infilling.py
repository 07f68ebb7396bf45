"""Measure what fill-in-the-middle costs from left to right, and what a model that was trained with it fills in.

    python benchmarks/infilling.py --minutes 60 --tokens 2000000     # on a CPU: autocomplete, three seeds
    python benchmarks/infilling.py --device cuda --minutes 4 --corpus FOLDER --out FOLDER
    python benchmarks/infilling.py --toy --tokens 4096               # tiny sizes, to try it out
    python benchmarks/infilling.py --ways plain fim -- --train.lr 6e-4 --model.n-layer 4

Trains a preset once for each seed and way of cutting, by the project's own scripts, and evaluates each run:

- plain: all text from left to right
- fim: half of the pieces are filled in (`--data.fim-rate 0.5`)
- lines: so too, and half of these are cut at lines and blocks (`--data.fim-line-share 0.5`)

All runs have the same documents, steps and settings, and a seed has the same weights at its start. So losses are compared in
pairs, document by document. What stands after `--` are more flags of main.py, for all runs. The data are built once for each
way. Then a short trial gives the speed. Without `--tokens`, the runs get as many tokens as `--minutes` allow. On a GPU several
trainings run at the same time (`--at-once`), and evaluations beside them. Each has its steps, so this changes times only.

Results are written after each run: infilling.json, and infilling.md with the tables. At the end, runs.tar.gz has the runs
without weights, and logs.tar.gz what the scripts printed. With `--benchmarks humaneval-infill problems-infill` the models also
fill in lines of programs, greedily, which are run in the sandbox; where it does not work, `python evaluate.py RUN --grade` runs
them elsewhere. A run that fails is a line of the results. FOLDER of --corpus holds
source.jsonl.gz (rows of path, language, content). Without it, the corpus is this machine's Python source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_common import MANY_CORES, Command, Plan, keep_logs, logged_figures, say, source_flags  # noqa: E402
from gpu_training import pack, sandbox_of  # noqa: E402
from infilling_tables import markdown, run_figures  # noqa: E402
from machine import RESULTS  # noqa: E402

FIM = ["--data.fim-rate", "0.5"]
WAYS = {
    "plain": ["--data.fim-rate", "0"],
    "fim": FIM,
    "lines": [*FIM, "--data.fim-line-share", "0.5"],
}  # flags of the data
SETTINGS = ["--data.val-fraction", "0.03", "--data.test-fraction", "0.005"]
SETTINGS += ["--train.lr", "1e-3", "--train.warmup-steps", "100"]
ONLY_THE_END = ["--train.eval-every", "1000000", "--train.save-every", "1000000", "--train.sample-prompts"]
TOY = ["--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "64"]
TOY += ["--model.vocab-size", "512", "--data.val-fraction", "0.2", "--data.test-fraction", "0.1"]
TRIAL_STEPS = {"cuda": 100, "mps": 20, "cpu": 5}
SHARE = 0.6  # of the time that is left after the trial, for training; the rest is for starts and evaluations
PATIENCE = 4  # times as long as a run should take, and a minute: then it is ended
START_S = 60.0
POLL_S = 0.05


@dataclass
class Job:
    """A run: its training, its evaluation, and then the lines of programs, if they are wanted."""

    way: str
    seed: int
    stage: str = "training"
    command: Command | None = None
    limit_s: float = START_S
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.way}-{self.seed}"


class Measurement:
    """Builds the data, trains and evaluates all runs of the benchmark."""

    def __init__(self, plan: Plan, flags: argparse.Namespace):
        self.plan, self.flags = plan, flags
        self.commands: list[Command] = []
        self.builds: dict[str, Command] = {}
        self.running: list[Job] = []
        self.evaluated: list[Job] = []  # whose lines of programs wait until nothing is left to train
        self.n_steps, self.train_s = 0, 0.0
        self.many_cores = (os.cpu_count() or 1) >= MANY_CORES
        self.sandbox = sandbox_of() if flags.benchmarks else "later"

    def run(self) -> None:
        """Do all of it, and add what is found to `plan.found` as it comes."""
        found = self.plan.found
        found |= {"builds": {}, "trial": {}, "runs": {}}
        waiting = [Job(way, seed) for seed in self.flags.seeds for way in self.flags.ways]
        first, *others = self.flags.ways
        self.build(first)
        for way in others if self.many_cores else ():
            self.build(way)
        self.wait_for_build(first)
        self.set_steps(first, len(waiting))
        while waiting or self.running or self.evaluated:
            if not self.unfinished_builds():
                for way in [way for way in others if way not in self.builds][:1]:
                    self.build(way)
            self.start_jobs(waiting)
            for job in list(self.running):
                try:
                    self.advance(job)
                except Exception as e:  # a run stands alone, so whatever happens to it is its result
                    self.end(job, " ".join(f"{type(e).__name__}: {e}".split())[:300])
            if self.plan.left_s <= 0:
                self.out_of_time(waiting)
                break
            time.sleep(POLL_S)

    # -- the data -----------------------------------------------------------------------------------------------------

    def data_flags(self, way: str) -> list[str]:
        """Return the flags of the model and the data, which are those of the build."""
        flags, corpus = self.flags, self.plan.corpus
        given = ["--preset", flags.preset, *SETTINGS, *(TOY if flags.toy else []), "--data.sources.0.globs", "None"]
        return [*given, *source_flags(corpus, flags.megabytes * 10**6), *WAYS[way], *flags.more]

    def build(self, way: str) -> None:
        """Start to build the data of a way. Others than the first give way to what else is running."""
        self.builds[way] = self.command(f"build-{way}", "data_pipeline.py", *self.data_flags(way))
        if len(self.builds) > 1 and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, self.builds[way].process.pid, 10)

    def wait_for_build(self, way: str) -> None:
        """Wait for the end of a build, and note how long it took, or why it failed."""
        command, found = self.builds[way], self.plan.found["builds"]
        if way in found:
            return
        reason = command.wait(self.plan.left_s)
        found[way] = {"seconds": command.took_s} | ({"failed": reason} if reason else {})
        say(f"data, {way}: {reason or f'built in {command.took_s:.0f} s'}")
        self.plan.save()

    def unfinished_builds(self) -> list[str]:
        """Return the ways whose data are being built; notes those that have ended."""
        going_on = []
        for way, command in self.builds.items():
            if command.process.poll() is None:
                going_on.append(way)
            else:
                self.wait_for_build(way)
        return going_on

    # -- the length of the runs ---------------------------------------------------------------------------------------

    def set_steps(self, way: str, n_runs: int) -> None:
        """Train a few steps for the speed, which also fills the compiler's cache, and set the steps of all runs."""
        plan, flags = self.plan, self.flags
        steps = TRIAL_STEPS[plan.device]
        command = self.command("trial", "main.py", *self.train_flags(way, 0, steps), "--name", "trial")
        reason = command.wait(min(180.0, plan.left_s))
        found = {} if reason else logged_figures(plan.work / "runs" / "trial")
        plan.found["trial"] = found or {"failed": reason or "no step was logged"}
        tokens_per_s = found.get("tokens_per_s", 0.0)
        tokens = flags.tokens or int(SHARE * plan.left_s * tokens_per_s / n_runs) or 10_000_000
        self.n_steps = max(1, tokens // flags.step_tokens)
        self.train_s = tokens / tokens_per_s if tokens_per_s else 60.0
        plan.found["tokens"] = self.n_steps * flags.step_tokens
        say(f"trial: {reason or f'{tokens_per_s:,.0f} tokens/s'}; {self.n_steps:,} steps, {tokens:,} tokens a run")
        plan.save()

    def train_flags(self, way: str, seed: int, steps: int) -> list[str]:
        """Return the flags of a training of so many steps."""
        flags = ["--train.device", self.plan.device, "--train.seed", str(seed), "--train.max-steps", str(steps)]
        rows = str(self.flags.rows)
        flags += ["--train.batch-size", rows, "--train.micro-batch-size", rows, "--train.log-every", "5"]
        flags += ["--train.compile", "on" if self.plan.device == "cuda" and not self.flags.toy else "off"]
        return [*flags, *ONLY_THE_END, *self.data_flags(way)]

    # -- the runs -----------------------------------------------------------------------------------------------------

    def start_jobs(self, waiting: list[Job]) -> None:
        """Start trainings whose data are built, as long as there is room."""
        self.unfinished_builds()
        built = self.plan.found["builds"]
        for job in [job for job in waiting if job.way in built]:
            # with many cores, an evaluation leaves room for the next training
            if sum(not (self.many_cores and job.stage != "training") for job in self.running) >= self.flags.at_once:
                return
            waiting.remove(job)
            if "failed" in built[job.way]:
                self.end(job, f"building the data: {built[job.way]['failed']}")
                continue
            flags = [*self.train_flags(job.way, job.seed, self.n_steps), "--name", job.name]
            job.command = self.command(f"training-{job.name}", "main.py", *flags)
            job.limit_s = START_S + PATIENCE * self.flags.at_once * self.train_s
            self.running.append(job)
        if not waiting and all(job.stage == "lines" for job in self.running):
            self.start_lines()

    def start_lines(self) -> None:
        """Let evaluated models fill in lines of programs. Those that were trained to come first."""
        self.evaluated.sort(key=lambda job: job.way == "plain")
        while self.evaluated and len(self.running) < self.flags.at_once:
            job = self.evaluated.pop(0)
            self.running.append(job)
            self.go_on(job, "lines", "0", *self.flags.benchmarks)

    def advance(self, job: Job) -> None:
        """Go on to the next stage after the one before; end a job that is done, has failed or takes too long."""
        assert job.command is not None
        over = time.perf_counter() - job.command.started > job.limit_s
        if job.command.process.poll() is None and not over:
            return
        reason = job.command.wait(0.1)
        run = self.plan.work / "runs" / job.name
        found = logged_figures(run) if job.stage == "training" and not reason else run_figures(run)
        job.figures |= found | {f"{job.stage}_s": job.command.took_s}
        if reason or not found:
            self.end(job, f"{job.stage}: {reason or 'no figures were written'}")
        elif job.stage == "training":
            self.go_on(job, "evaluation", str(self.flags.infills), "none")
        elif job.stage == "evaluation" and self.flags.benchmarks:
            self.keep(job)
            self.running = [other for other in self.running if other is not job]
            self.evaluated.append(job)
        else:
            self.end(job, "")

    def go_on(self, job: Job, stage: str, *what: str) -> None:
        """Keep what a job has found, and start its next stage, an evaluation.

        Lines of programs have an evaluation of their own, so that the figures before it are there if time ends.
        """
        self.keep(job)
        job.stage, job.limit_s = stage, 10 * START_S
        job.command = self.command(f"{stage}-{job.name}", "evaluate.py", job.name, *self.evaluate_flags(*what))

    def keep(self, job: Job) -> None:
        """Write what a job has found so far."""
        self.plan.found["runs"][job.name] = self.result_of(job)
        self.plan.save()

    def evaluate_flags(self, infills: str, *benchmarks: str) -> list[str]:
        """Return the flags of an evaluation with so many gaps and these benchmarks."""
        flags = ["--device", self.plan.device, "--infills", infills, "--eval.signatures", "0"]
        flags += ["--eval.contamination-tokens", "0", "--eval.temperature", "0", "--eval.batch-size", "128"]
        flags += ["--sandbox", self.sandbox, *(["--eval.limit", "2"] if self.flags.toy else [])]
        return [*flags, "--eval.benchmarks", *benchmarks]

    def result_of(self, job: Job) -> dict[str, Any]:
        return {"way": job.way, "seed": job.seed, **job.figures}

    def end(self, job: Job, failed: str) -> None:
        """Note the results of a job."""
        self.plan.found["runs"][job.name] = self.result_of(job) | ({"failed": failed} if failed else {})
        self.running = [other for other in self.running if other is not job]
        bits = job.figures.get("bits_per_byte")
        say(f"{job.name}: {failed or f'{bits:.4f} bits per byte, {self.plan.left_s:.0f} s left'}")
        self.plan.save()

    def out_of_time(self, waiting: list[Job]) -> None:
        """Note the jobs that had no time."""
        for job in [*self.running, *self.evaluated, *waiting]:
            self.end(job, "the time was over " + ("before it ended" if job.command else "before it began"))

    def command(self, name: str, script: str, *flags: str) -> Command:
        """Start a script of the project in the folder of the runs."""
        threads = {} if self.plan.device == "cpu" else {"OMP_NUM_THREADS": "2"}  # several processes share the cores
        command = Command(
            [ROOT / script, *flags], self.plan.work / f"{name}.log", self.plan.work, {"HF_HUB_OFFLINE": "1", **threads}
        )
        self.commands.append(command)
        return command

    def close(self) -> None:
        """End what is still running."""
        for command in self.commands:
            if command.process.poll() is None:
                command.kill()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line. Flags of main.py are checked here, before the long work."""
    from kindling.cli import parse_cli
    from main import Flags as Training

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="for all of it; what has not ended then is ended")
    parser.add_argument("--tokens", type=int, help="of each run; without it, as many as the minutes allow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--preset", default="autocomplete")
    parser.add_argument("--rows", type=int, help="in a step; by default 64, and 8 on a CPU")
    parser.add_argument("--megabytes", type=int, help="of the corpus to read; by default 120, and 1 with --toy")
    parser.add_argument("--infills", type=int, help="gaps of each kind; by default 200, and 2 with --toy")
    parser.add_argument("--benchmarks", nargs="+", help="also fill in lines that are run, such as humaneval-infill")
    parser.add_argument("--at-once", type=int, help="trainings at the same time; by default 3, and 1 on a CPU")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], default="cpu")
    parser.add_argument("--corpus", type=Path, help="a folder with the corpus; without it, this machine's Python")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that all of it works, measures nothing")
    parser.add_argument("more", nargs="*", help="after --: flags of main.py")
    flags = parser.parse_args(argv)
    small = flags.device == "cpu"
    by_default = {"rows": 8 if small else 64, "at_once": 1 if small else 3}
    by_default |= {"megabytes": 1, "infills": 2} if flags.toy else {"megabytes": 120, "infills": 200}
    for name, value in by_default.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    given = [
        flags.rows,
        flags.megabytes,
        flags.infills,
        flags.at_once,
        *([] if flags.tokens is None else [flags.tokens]),
    ]
    if flags.minutes <= 0 or min(given) < 1:
        parser.error("--minutes must be above 0, and --tokens, --rows, --megabytes, --infills and --at-once at least 1")
    if flags.corpus is not None and not (flags.corpus / "source.jsonl.gz").is_file():
        parser.error(f"--corpus must hold source.jsonl.gz, but {flags.corpus} lacks it")
    flags.corpus = None if flags.corpus is None else flags.corpus.resolve()
    plan = Plan(flags.device, flags.toy, flags.corpus, flags.out, flags.out, float("inf"))
    trained = Measurement(plan, flags).train_flags(flags.ways[-1], 0, 1)
    flags.step_tokens = flags.rows * parse_cli(Training, "", trained).config.model.block_size
    return flags


def main() -> int:
    """Measure, and write the results as they come. Return 1 if a run or a build failed."""
    flags = parse()
    from machine import Watch

    from kindling.files import write_atomic, write_json

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    flags.out.mkdir(parents=True, exist_ok=True)
    watch, started = Watch(), time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="kindling-infilling-"))
    plan = Plan(flags.device, flags.toy, flags.corpus, flags.out.resolve(), work, started + 60 * flags.minutes)
    settings = {k: v for k, v in vars(flags).items() if not isinstance(v, Path)}

    def save() -> None:
        head: dict[str, Any] = {"machine": watch.describe(), "settings": settings, "toy": flags.toy}
        results = head | {"seconds": time.perf_counter() - started} | plan.found
        write_json(plan.out / "infilling.json", results)
        write_atomic(plan.out / "infilling.md", markdown(results))

    plan.save = save
    measurement = Measurement(plan, flags)
    try:
        measurement.run()
    finally:
        measurement.close()
        save()
        pack(plan)
        keep_logs(plan)
        shutil.rmtree(work, ignore_errors=True)
    bad = [f"{n}: {x['failed']}" for part in ("builds", "runs") for n, x in plan.found[part].items() if "failed" in x]
    print(f"\nresults in {plan.out / 'infilling.md'}" + (f"; NOT all worked: {'; '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
