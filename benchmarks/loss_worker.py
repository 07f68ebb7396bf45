"""One training against the clock, in a process of its own; time_to_loss.py and portability.py start it.

    python benchmarks/loss_worker.py SPEC.json RESULT.json

The clock counts compiling and whole training steps, reading their rows included, and stands still while the model is
evaluated. Compiling begins with an empty cache. A point of the curve is taken on an even choice of the validation split's
rows, the final figures on whole splits.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if TYPE_CHECKING:
    from config import Config, ModelConfig
    from kindling.data.shards import Batch, TokenDataset
    from kindling.device import Runtime
    from model import LanguageModel

CURVE_TOKENS = 65_536  # of the validation split, for a point of the curve
ROWS = 16  # in an evaluation's batch
PROBE_STEPS = 4
SummedLoss = Callable[["Batch"], tuple[float, int]]  # gives nats, and supervised tokens


@dataclass(frozen=True)
class Spec:
    """What a worker does: trains "ours" or the "peer", or measures which way ("probe") the peer trains fastest."""

    side: str
    data: str
    """The folder with the shards."""
    minutes: float
    shares: list[float]
    """Of the time, at which points of the curve are taken."""
    final: bool = False
    """Whole splits are evaluated at the end."""
    functions: bool = False
    """Ours writes functions at the end."""
    lr: float = 0.0
    batch: int = 8
    precision: str = "fp32"
    compiled: bool = False
    layers: int = 0
    width: int = 0
    """The peer's shape; 0 stands for the preset's."""
    preset: str = "demo"
    """Whose recipe ours is, and whose shape the peer has."""
    seed: int | None = None
    """Of ours; None: the preset's."""
    steps: int | None = None
    """Ours takes so many, however long that takes; None: as many as the time allows."""
    compile: str | None = None
    """"on" or "off" for ours; None: as the preset has it."""
    flags: Sequence[str] = ()
    """What changes the preset, as the flags that main.py takes."""


class Way(NamedTuple):
    """How the peer is run."""

    precision: str
    compiled: bool


# -- data and evaluation ----------------------------------------------------------------------------------------------


def configured(data: Path, name: str, flags: Sequence[str] = ()) -> Config:
    """Return a preset with the flags of main.py, and with the vocabulary of the shards."""
    from kindling.cli import parse_cli
    from kindling.data.shards import read_manifest
    from main import Flags

    cfg = parse_cli(Flags, "", ["--preset", name, *flags]).config
    return replace(cfg, model=replace(cfg.model, vocab_size=read_manifest(data)["vocab_size"]))


def bits_per_byte(summed_loss: SummedLoss, dataset: TokenDataset, cfg: ModelConfig, every: int = 1) -> float:
    """Return bits per byte over one of `every` batches of a split, in its order.

    Of the whole split this is `validation.validate`'s figure; of a part, the mean loss of its tokens and the split's own
    number of tokens a byte.
    """
    nats, count = 0.0, 0
    for batch in itertools.islice(dataset.in_order(cfg, ROWS), 0, None, every):
        loss, n = summed_loss(batch)
        nats, count = nats + loss, count + n
    return nats / count / math.log(2) * (len(dataset) - 1) / dataset.info.bytes


def sparse(dataset: TokenDataset) -> int:
    """Return the step in batches that leaves about CURVE_TOKENS of a split."""
    return max(1, len(dataset) // CURVE_TOKENS)


class Curve:
    """The points of a training: evaluates whenever a share of the time is over."""

    def __init__(self, spec: Spec, summed_loss: SummedLoss, cfg: ModelConfig):
        from kindling.data.shards import TokenDataset

        self.val = TokenDataset(Path(spec.data), "val")
        self._evaluate = lambda: bits_per_byte(summed_loss, self.val, cfg, sparse(self.val))
        self._spec, self._due = spec, sorted(spec.shares)
        self.points: list[dict[str, float]] = []

    def take(self, seconds: float, steps: int) -> None:
        """Note the loss if the next share of the time is over by now."""
        share = steps / self._spec.steps if self._spec.steps else seconds / (60 * self._spec.minutes)
        if not self._due or share < self._due[0]:
            return
        self._due = [other for other in self._due if other > share]
        self.points.append({"seconds": seconds, "steps": steps, "bits_per_byte": self._evaluate()})
        print(
            f"  {self._spec.side}: {seconds:.0f} s, {steps:,} steps, {self.points[-1]['bits_per_byte']:.4f} bits per byte",
            flush=True,
        )


def whole_splits(summed_loss: SummedLoss, data: Path, cfg: ModelConfig) -> dict[str, float]:
    """Return bits per byte over the validation and the test split."""
    from kindling.data.shards import TokenDataset

    return {split: bits_per_byte(summed_loss, TokenDataset(data, split), cfg) for split in ("val", "test")}


# -- the two trainings ------------------------------------------------------------------------------------------------


def summed_loss_of(model: LanguageModel, runtime: Runtime) -> SummedLoss:
    """Return what evaluates our model, which trains on afterwards."""
    import torch

    from kindling.training.validation import summed_loss

    @torch.no_grad()
    def loss_of(batch: Batch) -> tuple[float, int]:
        model.eval()
        loss, n = summed_loss(model, batch, runtime)
        model.train()
        return float(loss), int(n)

    return loss_of


def train_ours(spec: Spec) -> dict[str, Any]:
    """Train the preset's recipe for the time, or for the steps."""
    from kindling import device
    from kindling.data.examples import training_rows
    from kindling.data.shards import TokenDataset
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.compilation import wants_compile
    from kindling.training.start_or_resume import new_model
    from kindling.training.trainer import Trainer

    data = Path(spec.data)
    cfg = configured(data, spec.preset, spec.flags)
    seed = cfg.train.seed if spec.seed is None else spec.seed
    minutes, compile = None if spec.steps else spec.minutes, spec.compile or cfg.train.compile
    cfg = replace(cfg, train=replace(cfg.train, max_minutes=minutes, max_steps=spec.steps, seed=seed, compile=compile))
    device.set_threads(cfg.train.threads)
    runtime = device.resolve(cfg.train)
    model, rows = new_model(cfg, runtime), training_rows(cfg, TokenDataset(data, "train"))

    loss_of = summed_loss_of(model, runtime)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(cfg, RunDirectory(Path(folder, "run")), model, rows, None, runtime)
        curve = Curve(spec, loss_of, cfg.model)
        model.train()
        compiled = wants_compile(cfg, model, runtime) and trainer.compile()
        compile_s = trainer.state.elapsed_s
        while trainer.share() < 1:
            trainer.train_step()
            curve.take(trainer.state.elapsed_s, trainer.state.step)
    tokens = trainer.state.row_index * cfg.model.block_size
    found = {"steps": trainer.state.step, "tokens": tokens, "seconds": trainer.state.elapsed_s, "compile_s": compile_s}
    way = {"precision": runtime.precision, "compiled": compiled, "parameters": model.n_parameters()}
    out = {**found, **way, "skipped": trainer.state.skipped, "points": curve.points}
    model.disable_compile()  # other shapes come
    out |= whole_splits(loss_of, data, cfg.model) if spec.final else {}
    return out | ({"functions": functions(model.eval(), data, cfg)} if spec.functions else {})


def functions(model: Any, data: Path, cfg: Config) -> dict[str, dict[str, int]]:
    """Return of each held-out split how many signatures of functions the model continued, and how many of these compile."""
    from config import EvalConfig
    from kindling.data.shards import TokenDataset
    from kindling.evaluation.check_correctness import check_samples
    from kindling.evaluation.code_eval import syntax
    from kindling.evaluation.heldout import problems_from_documents
    from kindling.evaluation.samples import write
    from kindling.tokenization.tokenizer import load_json

    tokenizer, how, out = load_json(data / "tokenizer.json", cfg.tokenizer), EvalConfig(), {}
    for split in ("val", "test"):
        problems = problems_from_documents(
            TokenDataset(data, split), tokenizer, how.signatures, how.n_workers, lambda n: None
        )
        written = write(model, tokenizer, [(problem, 1) for problem in problems], None, how)
        rates = syntax(written, check_samples(written, None, "none", how), "")  # without tests nothing is run
        out[split] = {key: rates[key] for key in ("samples", "passes", "non_trivial")}
        print(f"  ours: {rates['passes']} of {rates['samples']} functions of the {split} split compile", flush=True)
    return out


def peer_shape(spec: Spec, cfg: ModelConfig) -> ModelConfig:
    """Return the peer's shape: the preset's, or that of the spec in heads of the preset's width."""
    width = spec.width or cfg.n_embd
    heads = max(1, width // cfg.head_dim)
    while width % heads:
        heads -= 1
    return replace(
        cfg,
        n_layer=spec.layers or cfg.n_layer,
        n_embd=width,
        n_head=heads,
        n_kv_head=None,
        position="learned",
        document_mask=False,
    )


def runtime_of(precision: str) -> Runtime:
    """Return where the peer runs: what our own would choose, in that precision."""
    from config import TrainConfig
    from kindling import device

    return device.resolve(TrainConfig(precision=precision))


def train_peer(spec: Spec) -> dict[str, Any]:
    """Train a GPT-2 for the time; its schedule is that of the time after compiling."""
    from peer import Peer

    from kindling import device
    from kindling.data.shards import PackedBlocks, TokenDataset

    data = Path(spec.data)
    cfg = peer_shape(spec, configured(data, spec.preset).model)
    runtime, budget_s = runtime_of(spec.precision), 60 * spec.minutes
    peer = Peer(cfg, runtime, spec.lr)
    rows = PackedBlocks(TokenDataset(data, "train"), cfg.block_size, seed=1337)
    curve = Curve(spec, peer.summed_loss, cfg)
    elapsed_s, steps, compile_s = 0.0, 0, 0.0
    if spec.compiled:
        started = time.perf_counter()
        peer.compile()
        compile_pass(peer, rows.rows(0, spec.batch))
        device.synchronize(runtime)
        elapsed_s = compile_s = time.perf_counter() - started
    while elapsed_s < budget_s:
        share = (elapsed_s - compile_s) / (budget_s - compile_s)
        started = time.perf_counter()
        peer.step(*peer.on_device(rows.rows(steps * spec.batch, spec.batch)), share)
        device.synchronize(runtime)
        elapsed_s, steps = elapsed_s + time.perf_counter() - started, steps + 1
        curve.take(elapsed_s, steps)
    tokens = steps * spec.batch * cfg.block_size
    found = {"steps": steps, "tokens": tokens, "seconds": elapsed_s, "compile_s": compile_s, "lr": spec.lr}
    parameters = sum(p.numel() for p in peer.model.parameters())
    way = {"precision": spec.precision, "compiled": spec.compiled, "parameters": parameters}
    out = {**found, **way, "shape": f"{cfg.n_layer} x {cfg.n_embd}", "points": curve.points}
    return out | (whole_splits(peer.summed_loss, data, cfg) if spec.final else {})


def compile_pass(peer: Any, batch: Batch) -> None:
    """Run one batch forward and back, which compiles, without a step."""
    peer.backward(*peer.on_device(batch))
    peer.optimizer.zero_grad(set_to_none=True)


# -- which way the peer is fastest ------------------------------------------------------------------------------------


def probe(spec: Spec) -> dict[str, Any]:
    """Return the seconds of compiling and of a step of each way, and the way that takes the most steps in the time."""
    return best_way([timed(spec, way) for way in ways()], 60 * spec.minutes)


def ways() -> Iterator[Way]:
    """Yield the ways that this machine has."""
    from kindling import device

    kind = runtime_of("fp32").device.type
    for precision in ["fp32"] + ["bf16"] * device.has_bf16(kind):
        yield Way(precision, False)
        if device.has_compiler(kind):
            yield Way(precision, True)


def timed(spec: Spec, way: Way) -> dict[str, Any]:
    """Return what compiling and a step of a way take."""
    import statistics

    from peer import Peer

    from kindling import device
    from kindling.data.shards import PackedBlocks, TokenDataset

    data = Path(spec.data)
    cfg, runtime = peer_shape(spec, configured(data, spec.preset).model), runtime_of(way.precision)
    peer, rows = Peer(cfg, runtime, 1e-3), PackedBlocks(TokenDataset(data, "train"), cfg.block_size, seed=0)
    if way.compiled:
        peer.compile()
    seconds = []
    for number in range(PROBE_STEPS + 1):
        started = time.perf_counter()
        peer.step(*peer.on_device(rows.rows(number * spec.batch, spec.batch)), share=0.5)
        device.synchronize(runtime)
        seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[1:])
    return {**way._asdict(), "compile_s": max(0.0, seconds[0] - step_s) if way.compiled else 0.0, "step_s": step_s}


def best_way(measured: list[dict[str, Any]], budget_s: float) -> dict[str, Any]:
    """Return the way that takes the most steps in the time, compiling counted, and all that were measured."""
    steps = [max(0.0, budget_s - way["compile_s"]) / way["step_s"] for way in measured]
    best = measured[steps.index(max(steps))]
    return {"precision": best["precision"], "compiled": best["compiled"], "measured": measured}


if __name__ == "__main__":
    from kindling.openmp import limit_spinning

    limit_spinning()
    given, target = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = Spec(**json.loads(given.read_text(encoding="utf-8")))
    result = {"ours": train_ours, "peer": train_peer, "probe": probe}[wanted.side](wanted)
    target.write_text(json.dumps({"spec": asdict(wanted), **result}), encoding="utf-8")
