"""Every setting of Kindling: plain, frozen, validated config classes, and `RUN`, which says what is trained.

    python config.py                        # list the presets: parameters, tokens, data source
    python main.py --preset code-50m --train.max-steps 200

Edit `RUN` (what a bare `python main.py` trains), or a preset function in presets.py, or override any field on the
command line as `--section.field value`. `None` means "derive", and is read through the property of the
same meaning (`model.kv_heads`, `train.micro_batch`): a saved config holds what was chosen, not what
followed from it. This file imports no heavy library.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal, dataclass_transform

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from kindling.errors import require, require_range

RUN = "demo"  # the preset that a bare `python main.py` trains
BENCHMARKS = ("problems", "humaneval", "mbpp", "mbpp-3shot")  # what evaluate.py grades models on
Template = Literal["alpaca", "user-assistant"]
IGNORE = -100  # the target of a token that is not supervised, as in torch's cross-entropy


@dataclass_transform(frozen_default=True)
def _frozen(cls: type) -> type:
    """Make a frozen dataclass that pydantic validates."""
    return dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)


@_frozen
class ModelConfig:
    """The shape of the model. The defaults are GPT-2's choices at toy size."""

    block_size: int = 256
    """Context length in tokens, T."""
    vocab_size: int = 4096
    """Rows of the embedding. A tokenizer trained on the run's data gets this size; a pretrained one must fit in it."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Query heads of each attention layer."""
    n_kv_head: int | None = None
    """Key / value heads (grouped-query attention). None: as many as n_head."""
    n_embd: int = 128
    """Width of the residual stream, C."""
    d_ff: int | None = None
    """Hidden width of the feed-forward layer. None: 4 * n_embd."""
    position: Literal["learned", "sinusoidal", "rope"] = "learned"
    """Learned or fixed sinusoidal absolute positions, or rotary embeddings on queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-layer."""
    norm_eps: float = 1e-5
    """Added to the variance inside the normalisation."""
    final_norm: bool = True
    """Normalise once more before the head."""
    activation: Literal["gelu", "gelu_new", "relu", "relu2", "swiglu"] = "gelu_new"
    """gelu is the exact erf form, gelu_new GPT-2's tanh form, relu2 the squared ReLU."""
    bias: bool = True
    """Biases in all linear layers and LayerNorms of the blocks."""
    head_bias: bool = False
    """A bias in the head that gives the logits (untied heads only)."""
    attn_out_proj: bool = True
    """The attention output projection W_O. False: concatenated heads go straight into the residual stream."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of each head before attention (no parameters)."""
    pair_rows: int = 0
    """Rows of a second embedding table, added to the first: a token and the one before it pick a row by a hash. 0: none."""
    tie_embeddings: bool = True
    """The head shares the token embedding's matrix."""
    dropout: float = 0.0
    """Dropout on embeddings, attention weights and both sub-layers' outputs, in training."""
    document_mask: bool = False
    """In training and evaluation, a token attends only to its own document in a packed block, and positions restart with it."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation of matrices."""
    embd_init_std: float | None = None
    """Standard deviation of the token embedding's. None: init_std."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """Projections into the residual stream start scaled by 1/sqrt(2 * n_layer), or at zero."""
    backbone: Literal["kindling", "transformers"] = "kindling"
    """transformers: run GPT-2's shape on transformers' GPT2LMHeadModel instead of our own GPT."""

    @property
    def kv_heads(self) -> int:
        """Key / value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def ff_width(self) -> int:
        """Hidden width of the feed-forward layer."""
        return 4 * self.n_embd if self.d_ff is None else self.d_ff

    @property
    def n_parameters(self) -> int:
        """Trainable parameters, to the unit; a tied matrix counts once, fixed positions count nothing."""
        C, ff, kv = self.n_embd, self.ff_width, self.kv_heads * self.head_dim
        norm = 2 * C if self.norm == "layernorm" and self.bias else C
        linears = [(C, C + 2 * kv)]
        linears += [(C, C)] if self.attn_out_proj else []
        linears += [(C, ff), (C, ff), (ff, C)] if self.activation == "swiglu" else [(C, ff), (ff, C)]
        block = 2 * norm + sum(i * o + (o if self.bias else 0) for i, o in linears)
        head = 0 if self.tie_embeddings else self.vocab_size * C + (self.vocab_size if self.head_bias else 0)
        outside = (self.vocab_size + self.pair_rows) * C + self.n_position_parameters + (norm if self.final_norm else 0) + head
        return outside + self.n_layer * block

    @property
    def n_position_parameters(self) -> int:
        """Parameters of learned positions, which some projects leave out of their counts."""
        return self.block_size * self.n_embd if self.position == "learned" else 0

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        require_range("model", self, 1, "block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff")
        require_range("model", self, 0, "rope_theta", "norm_eps", "init_std", "embd_init_std", open_low=True)
        require_range("model", self, 0, "dropout", high=0.99)
        lower, upper = self.n_embd // self.n_head * self.n_head, -(-self.n_embd // self.n_head) * self.n_head
        require(self.n_embd % self.n_head == 0, "model.n_embd", f"a multiple of n_head={self.n_head}", self.n_embd,
                f"set --model.n-embd to {f'{lower} or ' if lower else ''}{upper}, or change --model.n-head")
        require(self.pair_rows == 0 or self.pair_rows >= 2, "model.pair_rows", "at least 2, or 0 for none", self.pair_rows,
                "set --model.pair-rows")
        require(self.n_head % self.kv_heads == 0, "model.n_kv_head", f"a divisor of n_head={self.n_head}", self.n_kv_head,
                "choose one, or None for plain multi-head attention")
        require(self.position != "rope" or self.head_dim % 2 == 0, "model.n_embd / n_head", "even for rotary positions",
                self.head_dim, "change --model.n-head or --model.n-embd")
        require(self.position != "sinusoidal" or self.n_embd % 2 == 0, "model.n_embd", "even for sinusoidal positions",
                self.n_embd, "add one")
        require(not (self.tie_embeddings and self.head_bias), "model.head_bias", "False where the head is tied", True,
                "set --model.tie-embeddings False or --model.head-bias False")
        if self.backbone == "transformers":
            gpt2 = {"position": "learned", "norm": "layernorm", "final_norm": True, "activation": "gelu_new", "bias": True,
                    "head_bias": False, "attn_out_proj": True, "qk_norm": False, "pair_rows": 0,
                    "tie_embeddings": True, "residual_init": "scaled", "document_mask": False}
            for field, must in gpt2.items():
                require(getattr(self, field) == must, f"model.{field}", f"{must!r} on transformers' GPT-2",
                        getattr(self, field), "set it so, or --model.backbone kindling")
            require(self.embd_init_std is None, "model.embd_init_std", "None on transformers' GPT-2", self.embd_init_std,
                    "set it so, or --model.backbone kindling")
            require(self.kv_heads == self.n_head, "model.n_kv_head", "None on transformers' GPT-2", self.n_kv_head,
                    "set it so, or --model.backbone kindling")
        return self


@_frozen
class TokenizerConfig:
    """Where the tokenizer comes from."""

    kind: Literal["bpe", "handwritten", "sentencepiece", "pretrained"] = "bpe"
    """bpe: byte-level BPE trained on the run's own training split by `tokenizers`; handwritten: the same by bpe.py;
    sentencepiece: trained likewise by SentencePiece, with bytes to fall back on; pretrained: loaded from `path`."""
    sentencepiece_model: Literal["bpe", "unigram"] = "bpe"
    """For sentencepiece: merges of frequent pairs, or a unigram language model."""
    path: str | None = None
    """For pretrained: a tokenizer.json, a folder that holds one, or a hub name such as bigcode/starcoder2-3b."""
    normalizer: Literal["none", "nfkc"] = "none"
    """nfkc rewrites characters (² to 2, … to ...), so decoding no longer gives the source back: off unless asked for."""
    eos_token: str = "<|endoftext|>"
    """Ends every document; generation stops at it."""
    bos_token: str | None = None
    """Begins every document, where set."""
    pad_token: str | None = None
    """An id for padding, where set; never the end token."""
    unk_token: str | None = None
    """Kept for vocabularies that list one (SentencePiece always does); none of our tokenizers ever produces it."""
    train_bytes: int = 10_000_000
    """Bytes of source that a tokenizer is trained on."""

    @property
    def special_tokens(self) -> list[str]:
        """The control tokens in the order of their ids: pad, unk, bos, eos, without those that are not set."""
        return [t for t in (self.pad_token, self.unk_token, self.bos_token, self.eos_token) if t is not None]

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        require_range("tokenizer", self, 1, "train_bytes")
        require(self.kind != "pretrained" or bool(self.path), "tokenizer.path", "set for a pretrained tokenizer", self.path,
                "set --tokenizer.path to a tokenizer.json, a folder or a hub name")
        require(self.kind != "pretrained" or self.normalizer == "none", "tokenizer.normalizer",
                "none for a pretrained tokenizer, which has its own", self.normalizer, "set --tokenizer.normalizer none")
        require(self.kind in ("bpe", "pretrained") or self.normalizer == "none", "tokenizer.normalizer",
                f"none for a {self.kind} tokenizer, which keeps text as it is", self.normalizer,
                "set --tokenizer.normalizer none, or --tokenizer.kind bpe")
        require(all(self.special_tokens), "tokenizer special tokens", "non-empty", self.special_tokens, "name them, or use None")
        require(len(set(self.special_tokens)) == len(self.special_tokens), "tokenizer special tokens",
                "different from each other", self.special_tokens, "padding must never be the end token")
        return self


@_frozen
class SourceConfig:
    """One source of documents. Several make a mixture, drawn by `weight` in tokens."""

    kind: Literal["local-python", "files", "text", "jsonl", "parquet", "datasets", "docstrings"] = "local-python"
    """local-python: the interpreter's standard library and installed packages; files: one document a file, by `globs`;
    text: files of documents between `separator`s; jsonl, parquet: rows; datasets: the hub, streamed; docstrings: instructions
    and answers for fine-tuning, mined from the documented functions of Python files."""
    path: str | None = None
    """A file or folder, or the hub's name of a data set. Not used by local-python; docstrings without it reads the same files."""
    globs: tuple[str, ...] | None = None
    """Which files of a folder, for files, text, jsonl and parquet. None: those that the kind usually has."""
    subset: str | None = None
    """The configuration (`name`) of a data set on the hub."""
    data_dir: str | None = None
    """The folder inside a data set on the hub, such as data/python."""
    split: str = "train"
    """The split of a data set on the hub."""
    field: str = "content"
    """The column that holds a row's text, or its instruction."""
    response_field: str | None = None
    """Set where rows are instructions and this is the answer's column: for fine-tuning, refused for pre-training."""
    input_field: str | None = None
    """Of rows of instructions, the column with the input that an instruction is about; empty or missing where it has none."""
    messages_field: str | None = None
    """Set where rows are conversations: the column with the list of messages, each {"role": ..., "content": ...} (or
    "from" and "value"), user and assistant in turn: for fine-tuning, refused for pre-training."""
    language: str | None = None
    """Language of the documents. None: by a row's `language` or `lang` column, else by the file's suffix."""
    separator: str = "<|endoftext|>"
    """Between the documents of a text file; empty: the whole file is one document."""
    weight: float = 1.0
    """Share of the mixture's tokens, relative to the other sources."""
    max_documents: int | None = None
    """Read no more documents than this. None: all."""
    max_bytes: int | None = None
    """Read no more bytes than this, from files in pseudo-random order. None: all."""

    @property
    def file_globs(self) -> tuple[str, ...]:
        """Which files of a folder are read."""
        if self.globs is not None:
            return self.globs
        suffixes = {"text": ("txt",), "jsonl": ("jsonl", "json"), "parquet": ("parquet",)}.get(self.kind)
        return ("**/*.py",) if suffixes is None else tuple(f"**/*.{s}{gz}" for s in suffixes for gz in ("", ".gz"))

    @property
    def is_instructions(self) -> bool:
        """Whether it holds instructions and answers, rather than documents."""
        return self.kind == "docstrings" or self.response_field is not None or self.messages_field is not None

    @property
    def label(self) -> str:
        """A short name for tables."""
        return "/".join(part for part in (self.path or self.kind, self.subset, self.data_dir) if part)

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        require_range("data.sources", self, 1, "max_documents", "max_bytes")
        require_range("data.sources", self, 0, "weight", open_low=True)
        require(self.kind in ("local-python", "docstrings") or bool(self.path), "data.sources.path",
                f"set for a {self.kind} source", self.path, "name a file, a folder or a data set")
        require(self.kind != "local-python" or self.path is None, "data.sources.path",
                "None for a local-python source, which reads this machine's own", self.path,
                "say what it holds with --data.sources.0.kind files (or jsonl, parquet, text, datasets)")
        fields = [f for f in (self.response_field, self.messages_field) if f is not None]
        rows = self.kind in ("jsonl", "parquet", "datasets")
        require(not fields or (rows and len(fields) == 1), "data.sources.response_field and messages_field",
                "at most one of them, and of rows (jsonl, parquet or datasets)", (self.kind, *fields), "leave the others None")
        require(self.input_field is None or self.response_field is not None, "data.sources.input_field",
                "None where there is no response_field", self.input_field, "set --data.sources.0.response-field")
        require(self.globs != (), "data.sources.globs", "at least one pattern", self.globs, "name one, or None")
        return self


@_frozen
class DataConfig:
    """What becomes training data: sources, filters and splits."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """The sources; set one field of one as --data.sources.0.path."""
    min_chars: int = 1
    """Drop documents with fewer characters."""
    max_chars: int = 250_000
    """Drop documents with more characters."""
    min_lines: int = 1
    """Drop documents with fewer lines."""
    max_lines: int = 10_000
    """Drop documents with more lines."""
    max_line_chars: int | None = None
    """Drop documents with a longer line (data, minified code). None: any length, as prose needs."""
    min_alphanumeric: float = 0.0
    """Drop documents in which a smaller share of the characters is letters and digits."""
    max_non_ascii: float = 1.0
    """Drop documents in which a larger share of the characters is not ASCII."""
    drop_tests: bool = False
    """Drop dedicated test files: by their name, by a folder called test or tests, or as a suite of test classes."""
    drop_generated: bool = False
    """Drop source files that say in a comment of their first lines that a program wrote them."""
    max_header_lines: int | None = None
    """Cut off an initial comment block or module docstring with more lines than this. None: keep them all."""
    check_syntax: bool = True
    """Drop Python documents that this interpreter's compile() refuses."""
    dedup: bool = True
    """Drop documents whose content was seen before (sha256)."""
    near_dedup: float | None = 0.6
    """Drop documents whose sets of word pairs have at least this Jaccard similarity, estimated by MinHash, to one kept
    before; so none straddles the splits. Holds half a kB of memory for each document kept. None: keep them."""
    decontaminate: tuple[str, ...] = ("humaneval", "mbpp")
    """Drop documents that share 13 words in a row with these: benchmarks in problems/, or any text or JSONL file."""
    val_fraction: float = 0.01
    """Share of the documents, by content hash, held out for validation."""
    test_fraction: float = 0.01
    """Share of the documents, by content hash, kept for final tables only."""
    template: Template = "alpaca"
    """Of sources of instructions: the text that an instruction and its answer are made into (`prompts.py`)."""
    too_long: Literal["drop", "cut"] = "drop"
    """Of sources of instructions: what happens to an example with more tokens than the context. cut: the last answer is, and
    end-of-text follows it all the same, which teaches to stop there."""
    max_tokens: int | None = None
    """Stop reading once the training split holds this many tokens. None: read the sources whole."""
    when_dry: Literal["repeat", "stop", "continue"] = "repeat"
    """Of a mixture, when a source has no more documents: repeat it until all others were read whole too (its training
    documents only), stop the build, so that the shares hold without repetition, or continue with the others."""
    workers: int | None = None
    """Processes that filter and tokenise. None: one a core."""

    @property
    def instructions(self) -> bool:
        """Whether the sources hold instructions and answers, rather than documents."""
        return self.sources[0].is_instructions

    @property
    def n_workers(self) -> int:
        """Processes that filter and tokenise."""
        return self.workers or os.cpu_count() or 1

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        require_range("data", self, 0, "min_chars", "max_chars", "min_lines", "max_lines", "max_header_lines")
        require_range("data", self, 1, "max_line_chars", "max_tokens", "workers")
        require_range("data", self, 0, "min_alphanumeric", "max_non_ascii", high=1)
        require_range("data", self, 0, "near_dedup", high=1, open_low=True)
        require_range("data", self, 0, "val_fraction", "test_fraction", open_low=True, high=0.5)
        require(self.val_fraction + self.test_fraction < 1, "data.val_fraction + test_fraction", "below 1",
                self.val_fraction + self.test_fraction, "leave something to train on")
        require(bool(self.sources), "data.sources", "at least one source", self.sources, "name one")
        require(len({s.is_instructions for s in self.sources}) == 1, "data.sources", "all of instructions, or all of documents",
                tuple(s.label for s in self.sources), "fine-tune on the ones and pre-train on the others")
        return self


@_frozen
class TrainConfig:
    """The optimiser, the schedule and the run's housekeeping."""

    max_steps: int | None = 1000
    """Optimiser steps of the whole run. None: as many as `epochs` take."""
    epochs: float = 1.0
    """Passes over the training data, where max_steps is None."""
    max_minutes: float | None = None
    """Train for this long, whatever max_steps and epochs say: warmup apart, the schedule follows the elapsed share, so that the
    run ends annealed on any machine. Compiling counts, evaluating and saving do not. The clock is no seed: a run by steps can
    be had again bit for bit, a run by minutes cannot."""
    batch_size: int = 32
    """Sequences per optimiser step, over all micro-batches and ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; must divide batch_size. None: batch_size. Each rank takes at most as many."""
    activation_checkpointing: bool = False
    """Keep of each block only its input, and compute the rest anew in the backward pass: less memory, up to a third more work."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the hidden matrices, AdamW on embeddings, head and vectors."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    embd_lr: float | None = None
    """Peak learning rate of the embeddings, a tied head among them. None: lr."""
    head_lr: float | None = None
    """Peak learning rate of a head that is not tied. None: lr."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon (its update has spectral norm 1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate decays after the warmup."""
    decay_share: float = 1.0
    """The share of the run, after the warmup, in which the learning rate decays; before that it stays at its peak."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    eps: float = 1e-8
    """AdamW's epsilon; 1e-5 calms loss spikes in low precision."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    spike_ratio: float = 10.0
    """Skip a step whose gradient norm is above this many times the median of the steps before. 0: none is an outlier."""
    max_skipped_steps: int = 20
    """After this many steps in a row with a loss or gradient that is not finite or an outlier, go back to the checkpoint before
    them and leave out their rows; end the run if that happens again and again."""
    init_from: str | None = None
    """Start from the weights of this run (a name under runs/, or a folder), or of a folder in the Hugging Face format, with a
    fresh optimiser."""
    seed: int = 1337
    """Seeds the weights, dropout and the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: where a compiler exists and the run is long enough to pay for it."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How torchrun's ranks share a run. ddp: each holds all of the model; fsdp: its share of weights, gradients and optimiser
    state, for models that are too large for one GPU, and checkpoints are written in parts."""
    threads: int | None = None
    """CPU threads. None: torch's choice, and on resuming the number that the run began with."""
    eval_every: int = 250
    """Steps between evaluations of the whole validation set."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best one stays as well."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_prompts: tuple[str, ...] = ("import os\n", "class Stack:\n    def __init__(self", 'def read_file(path):\n    """')
    """Prompts that are continued and shown when the run ends; of a run that fine-tunes, instructions that are answered."""
    packing: bool = True
    """In fine-tuning: several examples a row, none of which sees another. False: one a row, padded, with those of about the
    same length in a batch."""
    held_out_answers: int = 20
    """In fine-tuning: answer this many held-out instructions at the end, and say how many answers stopped by themselves."""

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        require_range("train", self, 1, "max_steps", "batch_size", "micro_batch_size", "max_skipped_steps", "threads",
                      "eval_every", "save_every", "keep_checkpoints", "log_every")
        require_range("train", self, 0, "epochs", "max_minutes", open_low=True)
        require_range("train", self, 0, "decay_share", high=1, open_low=True)
        require_range("train", self, 0, "warmup_steps", "weight_decay", "grad_clip", "held_out_answers")
        require(self.spike_ratio == 0 or self.spike_ratio > 1, "train.spike_ratio", "above 1, or 0 for none", self.spike_ratio,
                "set --train.spike-ratio")
        require_range("train", self, 0, "seed", high=2**63 - 1)
        require_range("train", self, 0, "lr", "embd_lr", "head_lr", "muon_lr", "eps", open_low=True)
        require_range("train", self, 0, "min_lr_ratio", high=1)
        require_range("train", self, 0, "beta1", "beta2", high=0.999999)
        require(self.decay_share == 1 or self.schedule != "constant", "train.decay_share", "1 where the schedule is constant",
                self.decay_share, "set --train.schedule linear")
        require(self.batch_size % self.micro_batch == 0, "train.micro_batch_size",
                f"a divisor of batch_size={self.batch_size}", self.micro_batch_size, "choose one, or None")
        return self


@_frozen
class Config:
    """Everything a run is made from."""

    preset: str = RUN
    """The preset that the other settings start from; `python config.py` lists them."""
    name: str | None = None
    """The folder under runs/. None: the preset's name."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    data: DataConfig = DataConfig()
    """Data."""
    train: TrainConfig = TrainConfig()
    """Training."""

    @property
    def run_name(self) -> str:
        """The folder under runs/."""
        return self.name or self.preset

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on. Raises ConfigError where the steps depend on the data (`with_steps`)."""
        steps = self.train.max_steps
        require(steps is not None and self.train.max_minutes is None, "train.max_steps",
                "a number, and train.max_minutes None, to tell the tokens of the run before it begins",
                (steps, self.train.max_minutes), "set --train.max-steps and --train.max-minutes None")
        assert steps is not None  # or `require` raised
        return steps * self.train.batch_size * self.model.block_size

    def with_steps(self, n_rows: int) -> Config:
        """Return the config with `train.max_steps` set: where it is None, to what the epochs take over `n_rows` rows; and None
        where the run goes by minutes.
        """
        if self.train.max_minutes is not None:
            return replace(self, train=replace(self.train, max_steps=None))
        if self.train.max_steps is not None:
            return self
        steps = max(1, round(self.train.epochs * n_rows / self.train.batch_size))
        return replace(self, train=replace(self.train, max_steps=steps))

    @model_validator(mode="after")
    def _check(self) -> Config:
        bad = self.name is not None and (not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"))
        require(not (self.data.instructions and self.train.packing and self.model.backbone == "transformers"), "train.packing",
                "False on transformers' GPT-2, which has no mask across examples", True, "set --train.packing False")
        require(self.train.head_lr is None or not self.model.tie_embeddings, "train.head_lr",
                "None where the head is tied, as it then has the rate of the embeddings", self.train.head_lr,
                "set --train.embd-lr, or --model.tie-embeddings False")
        require(not bad, "name", "the plain name of a folder under runs/", self.name, "leave out slashes")
        return self


@_frozen
class EvalConfig:
    """What evaluate.py measures, and how much of it; the defaults take a small model minutes on two cores."""

    benchmarks: tuple[str, ...] = ("problems:10", "humaneval:5", "mbpp:1", "mbpp-3shot:1")
    """Which problems, and how many samples of each: problems are the project's own. `none` for no code to be run."""
    humaneval: str | None = None
    """Another file of HumanEval, or a data set on the hub such as openai/openai_humaneval. None: the one in problems/.
    Its tests run outside the sandbox: take problems only from whom you trust."""
    mbpp: str | None = None
    """Another file of MBPP, or a data set on the hub such as google-research-datasets/mbpp. None: that in problems/. As above."""
    limit: int | None = None
    """Only the first so many problems of each. None: all."""
    signatures: int = 100
    """Functions of held-out files (instructions, of a fine-tuned run) that are continued to see whether what comes compiles."""
    max_new_tokens: int = 256
    """Of each sample; never more than the context leaves room for."""
    temperature: float = 0.2
    """0 is greedy, for which one sample is enough."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same samples."""
    batch_size: int = 32
    """Samples that are generated at a time."""
    workers: int | None = None
    """Sandboxes side by side. None: one for each core."""
    cpu_s: int = 10
    """CPU seconds that a program may take."""
    memory_mb: int = 512
    """Memory that a program may take."""
    stride: int | None = None
    """Predict every held-out token with at least block_size - stride tokens before it. None: in blocks, as in training."""
    contamination_tokens: int = 50_000_000
    """Training tokens that are searched for the benchmarks' problems; of more, evenly spaced pieces."""

    @property
    def n_workers(self) -> int:
        """Sandboxes side by side."""
        return self.workers or os.cpu_count() or 1

    @property
    def n_samples(self) -> dict[str, int]:
        """How many samples of each problem, by benchmark; greedy ones would all be the same."""
        named = [entry.partition(":") for entry in self.benchmarks if entry != "none"]
        return {name: int(count or 1) if self.temperature else 1 for name, _, count in named}

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        require_range("eval", self, 1, "limit", "max_new_tokens", "batch_size", "workers", "cpu_s", "stride")
        require_range("eval", self, 0, "signatures", "seed", "contamination_tokens", "temperature")
        require_range("eval", self, 0, "top_p", high=1, open_low=True)
        require_range("eval", self, 64, "memory_mb")
        for entry in self.benchmarks:
            name, _, count = entry.partition(":")
            require(name in BENCHMARKS or entry == "none", "eval.benchmarks", f"of {', '.join(BENCHMARKS)}, or none", entry,
                    "write NAME or NAME:SAMPLES")
            require(entry == name or (count.isdecimal() and int(count) > 0), "eval.benchmarks", "NAME or NAME:SAMPLES", entry,
                    "give a number of samples")
        names = [entry.partition(":")[0] for entry in self.benchmarks]
        require(len(set(names)) == len(names) and ("none" not in names or len(names) == 1), "eval.benchmarks",
                "each once, or none alone", self.benchmarks, "leave out the others")
        return self


if __name__ == "__main__":
    from presets import main

    main()
