"""The steps that several studies have: data, a pre-training, an evaluation; and how they are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from config import Config, SourceConfig, TokenizerConfig
from kindling.data.sources import documents, local_files
from kindling.studies.inputs import Inputs
from kindling.studies.sizes import flags_of, saved_every, size_text
from kindling.studies.speed import GOLD_TOKENS, Clock
from kindling.studies.steps import Step

BYTES_PER_TOKEN = 3.5  # of code, with the small vocabularies of the dial
KEPT = 0.7  # of what is read, after the filters
MOST_BYTES = 150_000_000
LEAST_RATE = 1e-30  # a learning rate; 0 is refused, as a run that learns nothing is most often a mistake
PROGRAM_S = 0.08  # a generated program in its sandbox
PROBLEMS = {"problems": 44, "humaneval": 164, "mbpp": 500, "mbpp-3shot": 500}  # whose programs are run
EXAMPLE_TOKENS_PER_BYTE = 0.02  # of Python source: what its documented functions give
FEWEST_FOR_EXAMPLES, MOST_FOR_EXAMPLES = (
    8_000_000,
    30_000_000,
)  # bytes; of fewer, a split may be left without an example
MOST_PASSES = 4  # over local data: up to here, repeated tokens are nearly as good as new ones (Muennighoff et al. 2023)
SIGNATURES = 30  # held-out functions or instructions that are answered
NEW_TOKENS, FULL_NEW_TOKENS = 64, 512  # of a sample at most: of a small model, and of one of the project's size
REFERENCES_S = 12.0  # of an evaluation: its own tests, reading the training tokens for the benchmarks' problems


def bytes_for(tokens: float, fewest: float = 2e6) -> int:
    """Return how many bytes to read for so many training tokens, rounded up to a MB."""
    wanted = min(MOST_BYTES, max(fewest, tokens * BYTES_PER_TOKEN / KEPT))
    return 1_000_000 * -int(-wanted // 1_000_000)


def bytes_read(cfg: Config, inputs: Inputs) -> float:
    """Return how many bytes the build of a config reads: local files up to a limit, and of the hub as many as it needs."""
    wanted = cfg.data.max_tokens or cfg.tokens
    return wanted * BYTES_PER_TOKEN / KEPT if inputs.preset else bytes_for(cfg.tokens)


def bytes_for_examples(tokens: float) -> int:
    """Return how many bytes of Python source to read for so many tokens of instructions, in whole MB."""
    wanted = round(tokens / EXAMPLE_TOKENS_PER_BYTE / 1e6) * 1_000_000
    return min(MOST_FOR_EXAMPLES, max(FEWEST_FOR_EXAMPLES, wanted))


def tokens_of_examples(source: SourceConfig) -> float:
    """Return about how many tokens of instructions a local source gives: mined from Python source, or in a file of rows."""
    most = source.max_bytes or MOST_FOR_EXAMPLES
    return most * EXAMPLE_TOKENS_PER_BYTE if source.kind == "docstrings" else bytes_of_rows(source) / BYTES_PER_TOKEN


@cache
def bytes_of_rows(source: SourceConfig) -> int:
    """Return how many bytes of text are read of a local source of rows, whether it is a file, a packed one or a folder."""
    return sum(row.size for row in documents(source, local_files(source)))


def read_at_most(cfg: Config, tokens: float, passes: float = MOST_PASSES) -> Config:
    """Return the config with fewer steps, if it would read so many tokens of data more than `passes` times."""
    train, each = cfg.train, cfg.train.batch_size * cfg.model.block_size
    most = max(1, round(passes * tokens / each))
    if (train.max_steps or 0) <= most:
        return cfg
    warmup = min(train.warmup_steps, max(1, most // 10))
    return replace(cfg, train=replace(train, max_steps=most, warmup_steps=warmup, save_every=saved_every(most)))


def on_local(cfg: Config, source: SourceConfig, drop_generated: bool = False) -> Config:
    """Return the config with a local source, and a tokenizer trained on it in place of a pretrained one."""
    data = replace(
        cfg.data,
        sources=(source,),
        max_tokens=None,
        val_fraction=0.04,
        test_fraction=0.04,
        drop_generated=drop_generated,
    )
    kept = cfg.tokenizer.kind != "pretrained"
    return replace(cfg, data=data, tokenizer=cfg.tokenizer if kept else TokenizerConfig())


def data_step(
    cfg: Config,
    clock: Clock,
    n_bytes: float,
    name: str = "data",
    after: tuple[str, ...] = (),
    sources: str | None = None,
) -> Step:
    """Return the step that builds the shards of a config. A build gets its name, with 12 digits of a hash, when it is whole.

    `sources` as in `flags_of`.
    """
    return Step(
        name,
        "data_pipeline.py",
        flags_of(cfg, sources),
        f"data/{cfg.preset}-{'?' * 12}/manifest.json",
        after,
        clock.building(n_bytes),
        f"{n_bytes / 1e6:.0f} MB at most",
    )


def training_step(
    cfg: Config, name: str, clock: Clock, after: tuple[str, ...] = (), sources: str | None = None
) -> Step:
    """Return a pre-training by steps, as a run of this name; `sources` as in `flags_of`."""
    named = replace(cfg, name=name)
    steps = cfg.train.max_steps
    done = f"runs/{name}/step_{steps:06d}/manifest.json"
    return Step(name, "main.py", flags_of(named, sources), done, after, clock.training(cfg), size_text(cfg))


def untrained(cfg: Config) -> Config:
    """Return the config of a run that keeps the weights of step 0: one step, at a rate at which no float32 notices it.

    Weights are drawn by shape and seed, so they are those that the run of `cfg` starts from.
    """
    train = replace(cfg.train, max_steps=1, lr=LEAST_RATE, warmup_steps=0, save_every=1, sample_every=None)
    return replace(cfg, train=train)


def evaluation_step(
    run: str,
    cfg: Config,
    clock: Clock,
    sandbox: bool,
    more: tuple[str, ...] = (),
    code: bool = True,
    held_out: float = 0.3e6,
    benchmarks: Mapping[str, int] = MappingProxyType({"problems": 5}),
    new_tokens: int = NEW_TOKENS,
) -> Step:
    """Return the evaluation of a run: held-out losses, reference solutions, and with `code` samples that are run.

    `benchmarks` are those whose programs are run, with the samples of each problem; one has at most `new_tokens`.
    """
    samples = 0
    flags: tuple[str, ...] = ("--eval.benchmarks", "none", "--eval.signatures", "0")
    if code:
        samples = sum(PROBLEMS[name] * n for name, n in benchmarks.items()) + SIGNATURES
        flags = ("--eval.benchmarks", *(f"{name}:{n}" for name, n in benchmarks.items()), "--eval.max-level", "1",
                 "--eval.signatures", f"{SIGNATURES}", "--eval.max-new-tokens", f"{new_tokens}",
                 *(() if sandbox else ("--sandbox", "later")))  # fmt: skip
    seconds = (
        clock.start_s
        + clock.reading(cfg, held_out + GOLD_TOKENS)
        + clock.generation(cfg, -(-samples // 32), new_tokens)
    )
    seconds += REFERENCES_S + samples * PROGRAM_S
    return Step(
        f"evaluate-{run}", "evaluate.py", (f"runs/{run}", *flags, *more), f"runs/{run}/eval.json", (run,), seconds,
        f"held-out losses, {samples} samples" if samples else "held-out losses",
    )  # fmt: skip


def described(inputs: Inputs, *said: str) -> str:
    """Return the line on what was read, for the table."""
    return "as the presets say, from the hub" if inputs.preset else "; ".join(said)
