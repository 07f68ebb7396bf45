"""The presets: functions that return a whole `Config`. Most have the shape, data and schedule of a published project.

    python presets.py                       # list them: parameters, tokens, data source

To add one, write a function and name it in `PRESETS`. The projects:

- `code-*` and `alpaca`: a scaling study of GPT-2 models for Python code, with 50M, 150M and 225M parameters
- `tinystories`: a GPT from scratch in PyTorch, trained on TinyStories
- `autocomplete`: Code-AutoComplete-LLM, a small model for offline code completion
- `fineweb-nano`: kotlarmilos/gpt2-nano, with a BPE tokenizer and a transformer written by hand
- `smallcoder-*`: SmallCoder, a Llama trained in four stages

`demo`, `demo-infill`, `modern-*`, `portable-*` and `docstrings` are our own recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from config import RUN, Config, DataConfig, ModelConfig, SourceConfig, Template, TokenizerConfig, TrainConfig
from kindling.errors import ConfigError, did_you_mean

STARCODER2 = TokenizerConfig(kind="pretrained", path="bigcode/starcoder2-3b")
CODE_FILTERS: dict[str, Any] = {"min_chars": 100, "max_chars": 100_000, "min_lines": 5, "max_lines": 2_000,
                                "min_alphanumeric": 0.25}


def modern(preset: str, depth: int, block_size: int, data: DataConfig, **train: Any) -> Config:
    """Return our own recipe, scaled by `depth`; benchmarks/ablation.py measures what each ingredient gains.

    The model has `depth` layers and heads, 64 * depth channels, 1,024 * depth tokens of vocabulary and four rows of the bigram
    hash embedding for each of them. AdamW's learning rates fall as 1 / width. That of the embeddings does not, as they are only
    looked up; nor does Muon's, as its update has spectral norm 1 at any width.
    """
    vocab_size = 1024 * depth
    return Config(
        preset=preset, data=data,
        model=ModelConfig(block_size=block_size, vocab_size=vocab_size, n_layer=depth, n_head=depth, n_embd=64 * depth,
                          position="rope", norm="rmsnorm", activation="relu2", bias=False, qk_norm=True, tie_embeddings=False,
                          residual_init="zero", bigram_rows=4 * vocab_size),
        train=TrainConfig(**{"optimizer": "muon", "lr": 9e-3 / depth, "embd_lr": 0.1, "head_lr": 0.03 / depth, "muon_lr": 0.02,
                             "schedule": "linear", "warmup_steps": 20, "min_lr_ratio": 0.0, "weight_decay": 0.01, **train}),
    )


def demo() -> Config:
    """Five minutes on two CPU cores, offline, on the Python source of this machine.

    The recipe of `modern` with twice the layers for its width and a larger bigram hash embedding, which measured best for five
    minutes.
    """
    cfg = modern("demo", 2, 256, _local_python(), max_steps=1500, batch_size=8, save_every=150,
                  sample_every=500)
    return replace(cfg, model=replace(cfg.model, n_layer=4, vocab_size=4096, bigram_rows=32_768))


def demo_infill() -> Config:
    """`demo` with half of its pieces filled in, so that it completes code in the middle of a file, in an editor."""
    cfg = demo()
    return replace(cfg, preset="demo-infill", data=replace(cfg.data, fim_rate=0.5))


def _local_python() -> DataConfig:
    return DataConfig(sources=(SourceConfig(kind="local-python", max_bytes=30_000_000),), min_chars=100, min_lines=3,
                      max_line_chars=1000, min_alphanumeric=0.25, drop_generated=True, val_fraction=0.04, test_fraction=0.04)


def modern_5m() -> Config:
    """Our recipe at depth 3, for an hour or two on a small machine: 38M tokens, about five passes over its Python source."""
    return modern("modern-5m", 3, 512, _local_python(), max_steps=4_640, batch_size=16, save_every=464)


def modern_50m() -> Config:
    """Our recipe at depth 8: 587M tokens of Python from The Stack, 20 for each parameter of blocks and head."""
    return modern("modern-50m", 8, 1024, _stack(587_000_000), max_steps=8_960, batch_size=64, micro_batch_size=8,
                   save_every=896)


def modern_150m() -> Config:
    """Our recipe at depth 12: 1.9B tokens of Python from The Stack, 20 for each parameter of blocks and head."""
    return modern("modern-150m", 12, 1024, _stack(1_900_000_000), max_steps=14_500, batch_size=128, micro_batch_size=8,
                   save_every=1000)


def _portable(preset: str, depth: int, block_size: int, data: DataConfig, n_kv_head: int | None = None, **train: Any) -> Config:
    """Return our recipe in the shape of Qwen3, which transformers, llama.cpp and others know, scaled by the same dial.

    It has no table of pairs, SwiGLU of as many parameters as squared ReLU, and learned QK-norm. The head stays untied: if it were
    tied, it could not have another rate than the embeddings, whose high rate is what `modern` gains most from.
    """
    cfg = modern(preset, depth, block_size, data, **train)
    return replace(cfg, model=replace(cfg.model, n_kv_head=n_kv_head, d_ff=64 * round(8 * depth / 3), activation="swiglu",
                                      qk_norm="learned", bigram_rows=0))


def portable_5m() -> Config:
    """The portable recipe at depth 3, with the data, tokenizer and steps of `modern-5m`, and so of about its time.

    What it lacks of five million parameters is the table of pairs, which is half of `modern-5m`.
    """
    return _portable("portable-5m", 3, 512, _local_python(), max_steps=4_640, batch_size=16, save_every=464)


def portable_50m() -> Config:
    """The portable recipe at depth 9: 823M tokens of Python from The Stack, 20 for each parameter of blocks and head."""
    return _portable("portable-50m", 9, 1024, _stack(823_000_000), max_steps=12_560, batch_size=64, micro_batch_size=8,
                     save_every=1000)


def portable_150m() -> Config:
    """The portable recipe at depth 14: 2.7B tokens of Python from The Stack, 20 for each parameter of blocks and head.

    Two heads share their keys and values, which halves the cache.
    """
    return _portable("portable-150m", 14, 1024, _stack(2_710_000_000), n_kv_head=7, max_steps=20_700, batch_size=128,
                     micro_batch_size=8, save_every=1000)


def _stack(max_tokens: int) -> DataConfig:
    stack = SourceConfig(kind="datasets", path="bigcode/the-stack-dedup", data_dir="data/python", language="python")
    return DataConfig(sources=(stack,), max_tokens=max_tokens, val_fraction=0.001, test_fraction=0.001, **CODE_FILTERS)


def _gpt2_code(preset: str, n_layer: int, n_embd: int, n_head: int, lr: float, batch_size: int, max_steps: int) -> Config:
    """The scaling study: GPT-2's architecture on Python from The Stack, in blocks of 1,024 tokens of StarCoder2's tokenizer."""
    model = ModelConfig(block_size=1024, vocab_size=49_152, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    tokens = max_steps * batch_size * model.block_size
    return Config(
        preset=preset, model=model, tokenizer=STARCODER2,
        data=_stack(tokens),
        train=TrainConfig(max_steps=max_steps, batch_size=batch_size, micro_batch_size=4, lr=lr, warmup_steps=1000,
                          save_every=1000),
    )


def code_50m() -> Config:
    """The smallest model of the scaling study: 819M tokens."""
    return _gpt2_code("code-50m", 8, 512, 8, lr=6e-4, batch_size=32, max_steps=25_000)


def code_150m() -> Config:
    """The middle model of the scaling study: 2B tokens. Its name rounds 123.6M parameters up."""
    return _gpt2_code("code-150m", 12, 768, 12, lr=6e-4, batch_size=64, max_steps=30_518)


def code_225m() -> Config:
    """The largest model of the scaling study: 3B tokens. The study runs it on transformers: `--model.backbone transformers`."""
    return _gpt2_code("code-225m", 16, 960, 16, lr=4e-4, batch_size=64, max_steps=45_777)


def tinystories() -> Config:
    """A small GPT on the first 50,000 texts of TinyStories."""
    stories = SourceConfig(kind="datasets", path="roneneldan/TinyStories", field="text", language="english", max_documents=50_000)
    return Config(
        preset="tinystories",
        model=ModelConfig(block_size=256, vocab_size=8_000, n_layer=4, n_head=4, n_embd=128, d_ff=512, activation="gelu",
                          dropout=0.1),
        data=DataConfig(sources=(stories,), val_fraction=0.05),
        train=TrainConfig(max_steps=10_000, batch_size=256, micro_batch_size=16, lr=3e-4, warmup_steps=500, save_every=500,
                          sample_prompts=("Once upon a time",), sample_every=1000),
    )


def autocomplete() -> Config:
    """Code-AutoComplete-LLM: Python, C and Java from cloned repositories in a folder `repos/`, half of it filled in."""
    repos = SourceConfig(kind="files", path="repos", globs=("**/*.py", "**/*.c", "**/*.h", "**/*.java"))
    return Config(
        preset="autocomplete",
        model=ModelConfig(block_size=256, vocab_size=8_000, n_layer=8, n_head=8, n_embd=512, activation="gelu",
                          tie_embeddings=False, head_bias=True),
        tokenizer=TokenizerConfig(normalizer="nfkc", pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"),
        data=DataConfig(sources=(repos,), min_lines=3, max_lines=4_000, max_non_ascii=0.1, drop_tests=True, drop_generated=True,
                        max_header_lines=20, fim_rate=0.5),
        train=TrainConfig(max_steps=49_072, batch_size=32, micro_batch_size=8, lr=3e-4, warmup_steps=500, save_every=1000),
    )


def fineweb_nano() -> Config:
    """gpt2-nano: FineWeb-Edu, with sinusoidal positions, without attention output projection and without final norm."""
    web = SourceConfig(kind="datasets", path="HuggingFaceFW/fineweb-edu", subset="sample-10BT", field="text", language="english")
    return Config(
        preset="fineweb-nano",
        model=ModelConfig(block_size=1024, vocab_size=9_157, n_layer=12, n_head=8, n_embd=512, position="sinusoidal",
                          activation="relu", attn_out_proj=False, final_norm=False, tie_embeddings=False, head_bias=True,
                          embd_init_std=1.0),
        tokenizer=TokenizerConfig(kind="handwritten"),
        data=DataConfig(sources=(web,), max_tokens=99_000_000),
        train=TrainConfig(max_steps=10_000, batch_size=32, micro_batch_size=8, lr=3e-4, warmup_steps=100, min_lr_ratio=0.0,
                          save_every=500, sample_prompts=("The nature of",), sample_every=1000),
    )


def _hub(path: str, weight: float = 1.0, **fields: Any) -> SourceConfig:
    return SourceConfig(**{"kind": "datasets", "path": path, "weight": weight, "field": "text", "language": "english", **fields})


def _smallcoder(stage: int, billion_tokens: float, lr: float, *sources: SourceConfig, template: Template = "alpaca",
                **train: Any) -> Config:
    """SmallCoder: a Llama with 302M parameters. Each stage starts from the weights of the stage before."""
    batch_size, block_size = 512, 1024
    max_steps = math.ceil(billion_tokens * 1e9 / (batch_size * block_size))
    return Config(
        preset=f"smallcoder-{stage}",
        model=ModelConfig(block_size=block_size, vocab_size=49_152, n_layer=24, n_head=8, n_kv_head=8, n_embd=768, d_ff=3072,
                          position="rope", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False,
                          tie_embeddings=False),
        tokenizer=TokenizerConfig(kind="pretrained", path="bigcode/starcoder"),
        data=DataConfig(sources=sources, max_tokens=max_steps * batch_size * block_size, val_fraction=0.0005,
                        test_fraction=0.0005, check_syntax=False, template=template),
        train=TrainConfig(max_steps=max_steps, batch_size=batch_size, micro_batch_size=8, lr=lr, warmup_steps=500,
                          init_from=f"smallcoder-{stage - 1}" if stage > 1 else None, save_every=500, **train),
    )


def smallcoder_1() -> Config:
    """SmallCoder, stage 1, language: FineWeb-Edu."""
    return _smallcoder(1, 6.3, 6e-4, _hub("HuggingFaceFW/fineweb-edu", subset="sample-10BT"))


def smallcoder_2() -> Config:
    """SmallCoder, stage 2, code: synthetic code 60%, StarCoderData 40%."""
    return _smallcoder(2, 7.5, 4e-4, _hub("nvidia/Nemotron-Pretraining-Code-v1", 60, subset="Synthetic-Code"),
                       _hub("bigcode/starcoderdata", 40, data_dir="python", field="content", language="python"))


def smallcoder_3() -> Config:
    """SmallCoder, stage 3, mathematics and knowledge: four sources, 40/35/15/10."""
    return _smallcoder(3, 10, 4e-4, _hub("nvidia/Nemotron-CC-Math-v1", 40, subset="4plus"),
                       _hub("HuggingFaceFW/finewiki", 35, subset="en"),
                       _hub("nvidia/Nemotron-CC-Math-v1", 15, subset="4plus_MIND"), _hub("open-web-math/open-web-math", 10))


def smallcoder_4() -> Config:
    """SmallCoder, stage 4, fine-tuning on instructions: four sources, 45/30/15/10."""
    answers = {"field": "input", "response_field": "output"}
    return _smallcoder(4, 6, 2e-4,
                       _hub("nvidia/Nemotron-Pretraining-SFT-v1", 45, subset="Nemotron-SFT-Code", **answers),
                       _hub("nvidia/OpenCodeInstruct", 30, **answers),
                       _hub("nvidia/OpenMathInstruct-2", 15, field="problem", response_field="generated_solution"),
                       _hub("nvidia/Nemotron-Pretraining-SFT-v1", 10, subset="Nemotron-SFT-General", **answers),
                       template="user-assistant", sample_prompts=TASKS)


TASKS = ("Write a Python function that returns the sum of two numbers.", "Reverse a string in Python.",
         "Write a Python program to check whether a number is prime.")


def docstrings() -> Config:
    """Fine-tuning, offline, on the documented functions of this machine's Python source.

    Reads the files of `demo` in the same order. The splits are chosen by the same hash of the content, so what is held out
    here was held out there.
    """
    return Config(
        preset="docstrings",
        data=DataConfig(sources=(SourceConfig(kind="docstrings", language="python", max_bytes=30_000_000),), val_fraction=0.04,
                        test_fraction=0.04, max_non_ascii=0.1),
        train=TrainConfig(max_steps=None, epochs=2, batch_size=16, lr=1e-3, warmup_steps=10, min_lr_ratio=0.0, weight_decay=0.01,
                          save_every=100,
                          sample_prompts=("Return the sum of a and b.\ndef add(a, b):",
                                          "Return True if the path names a file that exists.\ndef is_file(path):",
                                          "Return the number of items in the list that are equal to value.\n"
                                          "def count(items, value):")),
    )


def alpaca() -> Config:
    """The scaling study's fine-tuning, for any base: 18,612 Python instructions, three epochs.

    The study's shorter run is `--train.epochs 1`. The `prompt` column of the data set holds the answer too, so prompts are made
    from the columns `instruction` and `input`.
    """
    pairs = _hub("iamtarun/python_code_instructions_18k_alpaca", field="instruction", input_field="input",
                 response_field="output")
    return Config(
        preset="alpaca",
        data=DataConfig(sources=(pairs,), val_fraction=0.05, test_fraction=0.05),
        train=TrainConfig(max_steps=None, epochs=3, batch_size=8, micro_batch_size=4, lr=2e-4, warmup_steps=50, weight_decay=0.01,
                          save_every=200, sample_prompts=TASKS),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    f.__name__.replace("_", "-"): f
    for f in (demo, demo_infill, modern_5m, modern_50m, modern_150m, portable_5m, portable_50m, portable_150m, code_50m,
              code_150m, code_225m, tinystories, autocomplete, fineweb_nano, smallcoder_1, smallcoder_2, smallcoder_3,
              smallcoder_4, docstrings, alpaca)
}
FINE_TUNING = {"smallcoder-3": "smallcoder-4"} | dict.fromkeys(
    ("modern-50m", "modern-150m", "portable-50m", "portable-150m", "code-50m", "code-150m", "code-225m"), "alpaca")


def preset(name: str) -> Config:
    """Return the preset called `name`; raises ConfigError, which names similar presets, if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()


def list_presets() -> str:
    """Return the table that `python config.py` prints."""
    rows = [("preset", "parameters", "tokens", "data source")]
    for name, make in PRESETS.items():
        cfg = make()
        weights = sum(s.weight for s in cfg.data.sources)
        several = len(cfg.data.sources) > 1
        source = " + ".join((f"{s.weight / weights:.0%} " if several else "") + s.label for s in cfg.data.sources)
        any_base = cfg.data.instructions and cfg.train.init_from is None
        if cfg.train.max_minutes is not None:
            length = f"{cfg.train.max_minutes:g} minutes"
        elif cfg.train.max_steps is None:
            length = f"{cfg.train.epochs:g} epochs"
        else:
            length = f"{cfg.tokens / 1e6:,.{0 if cfg.tokens > 1e8 else 1}f}M"
        rows.append((name, "its base's" if any_base else f"{cfg.model.n_parameters:,}", length, source))
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join(f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]}" for r in rows)


def main() -> None:
    """Print the table of presets, and the preset that is trained by default."""
    print(list_presets())
    print(f"\n`python main.py` trains {RUN!r}; choose another with --preset NAME. Sources of instructions are for sft_train.py.")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)
