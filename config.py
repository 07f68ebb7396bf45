"""Every setting of Kindling, as frozen and validated dataclasses, and `RUN`, the preset that is trained.

    python config.py                        # list the presets: parameters, tokens, data source
    python main.py --preset code-50m --train.max-steps 200

To change what is trained, edit `RUN` (what `python main.py` trains without flags), edit a preset in presets.py, or
override any field on the command line: `--section.field value`. `None` means "derive this value"; the code then reads a
property, such as `model.kv_heads`. A saved config holds what was chosen. This file imports no heavy library.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal, dataclass_transform, get_args

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from kindling.config_checks import check_eval, check_source
from kindling.errors import require, require_range

RUN = "demo"  # the preset that `python main.py` trains without flags
BENCHMARKS = ("problems", "humaneval", "mbpp", "mbpp-3shot", "problems-infill", "humaneval-infill", "mbpp-infill")
Template = Literal["alpaca", "user-assistant"]
IGNORE = -100  # the target of tokens without supervision, as in torch's cross-entropy


@dataclass_transform(frozen_default=True)
def _frozen(cls: type) -> type:
    """Make a class a frozen dataclass that pydantic validates; unknown fields are an error."""
    return dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)


@_frozen
class ModelConfig:
    """The shape of the model. The defaults are GPT-2's choices at toy size."""

    block_size: int = 256
    """Context length in tokens, T."""
    vocab_size: int = 4096
    """Rows of the token embedding. A tokenizer trained for the run gets this size; a pretrained one must fit in it."""
    n_layer: int = 4
    """Number of transformer blocks."""
    n_head: int = 4
    """Query heads of each attention layer."""
    n_kv_head: int | None = None
    """Key / value heads (grouped-query attention). None: as many as n_head."""
    n_embd: int = 128
    """Width of the residual stream, C."""
    d_head: int | None = None
    """Width of each head. None: n_embd / n_head."""
    d_ff: int | None = None
    """Hidden width of the feed-forward layer. None: 4 * n_embd."""
    position: Literal["learned", "sinusoidal", "rope"] = "learned"
    """Position encoding: learned or sinusoidal absolute positions, or rotary embeddings (RoPE) on queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (RoPE theta)."""
    rope_factors: tuple[float, ...] = ()
    """Stretched rotary positions. (factor,): linear; (factor, low, high, context): Llama 3's, by its names; (): as they are."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-layer."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation, added to the variance."""
    final_norm: bool = True
    """Add a normalisation before the head."""
    activation: Literal["gelu", "gelu_new", "relu", "relu2", "swiglu"] = "gelu_new"
    """Activation of the feed-forward layer. gelu: the exact form (erf); gelu_new: GPT-2's form (tanh); relu2: squared ReLU."""
    bias: bool = True
    """Biases in the linear layers of the blocks and in all LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values, which Qwen2 has alone. None: as `bias`."""
    head_bias: bool = False
    """A bias in the output head. Only for untied heads."""
    attn_out_proj: bool = True
    """The attention output projection W_O. False: the concatenated heads are added to the residual stream as they are."""
    qk_norm: bool | Literal["learned"] = False
    """RMS-normalise queries and keys of each head before attention. True: without weights; learned: with them, as in Qwen3."""
    bigram_rows: int = 0
    """Rows of the bigram hash embedding, added to a token's: a hash of the token and the one before it picks one. 0: off."""
    tie_embeddings: bool = True
    """Use the token embedding's matrix as the output head."""
    dropout: float = 0.0
    """Dropout in training: on embeddings, attention weights and the outputs of both sub-layers."""
    document_mask: bool = False
    """In training and evaluation, a token attends only to its own document in a packed block, and positions restart there."""
    init_std: float = 0.02
    """Standard deviation of the normal distribution that matrices are initialised from."""
    embd_init_std: float | None = None
    """The same for the token embedding. None: init_std."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """Start of the projections into the residual stream. scaled: standard deviation init_std / sqrt(2 * n_layer); zero: zeros."""
    backbone: Literal["kindling", "transformers"] = "kindling"
    """Which code runs the model. transformers: GPT2LMHeadModel, for GPT-2's shape only; kindling: our own GPT."""

    @property
    def kv_heads(self) -> int:
        """Key / value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head if self.d_head is None else self.d_head

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def ff_width(self) -> int:
        """Hidden width of the feed-forward layer."""
        return 4 * self.n_embd if self.d_ff is None else self.d_ff

    @property
    def n_parameters(self) -> int:
        """The exact number of trainable parameters. A tied matrix counts once; sinusoidal positions do not count."""
        C, ff, q, qkv = self.n_embd, self.ff_width, *(n * self.head_dim for n in (self.n_head, self.n_head + 2 * self.kv_heads))
        norm = 2 * C if self.norm == "layernorm" and self.bias else C
        linears = [(q, C)] if self.attn_out_proj else []
        linears += [(C, ff), (C, ff), (ff, C)] if self.activation == "swiglu" else [(C, ff), (ff, C)]
        block = 2 * norm + C * qkv + self.has_qkv_bias * qkv + sum(i * o + self.bias * o for i, o in linears)
        head = 0 if self.tie_embeddings else self.vocab_size * C + (self.vocab_size if self.head_bias else 0)
        outside = (self.vocab_size + self.bigram_rows) * C + self.n_position_parameters + (norm if self.final_norm else 0) + head
        return outside + self.n_layer * (block + (2 * self.head_dim if self.qk_norm == "learned" else 0))

    @property
    def n_position_parameters(self) -> int:
        """Parameters of learned positions. Some projects leave them out of their counts."""
        return self.block_size * self.n_embd if self.position == "learned" else 0

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        require_range("model", self, 1, "block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ff", "d_head")
        require_range("model", self, 0, "rope_theta", "norm_eps", "init_std", "embd_init_std", open_low=True)
        require_range("model", self, 0, "dropout", high=0.99)
        lower, upper = self.n_embd // self.n_head * self.n_head, -(-self.n_embd // self.n_head) * self.n_head
        require(self.n_embd % self.n_head == 0 or self.d_head is not None, "model.n_embd", f"a multiple of n_head={self.n_head}",
                self.n_embd, f"set --model.n-embd to {f'{lower} or ' if lower else ''}{upper}, or change --model.n-head")
        require(self.attn_out_proj or self.n_head * self.head_dim == self.n_embd, "model.d_head", "None without attn_out_proj",
                self.d_head, "set --model.attn-out-proj True")
        s = self.rope_factors
        require(not s or (s[0] >= 1 and (len(s) == 1 or (len(s) == 4 and 0 < s[1] < s[2] < s[3]))), "model.rope_factors",
                "(factor,) or (factor, low, high, context), with a factor of at least 1", s, "set --model.rope-factors")
        require(self.bigram_rows == 0 or self.bigram_rows >= 2, "model.bigram_rows", "at least 2, or 0 for none",
                self.bigram_rows, "set --model.bigram-rows")
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
                    "head_bias": False, "attn_out_proj": True, "qk_norm": False, "bigram_rows": 0, "embd_init_std": None,
                    "tie_embeddings": True, "residual_init": "scaled", "document_mask": False, "d_head": None, "qkv_bias": None}
            for field, must in gpt2.items():
                require(getattr(self, field) == must, f"model.{field}", f"{must!r} on transformers' GPT-2",
                        getattr(self, field), "set it so, or --model.backbone kindling")
            require(self.kv_heads == self.n_head, "model.n_kv_head", "None on transformers' GPT-2", self.n_kv_head,
                    "set it so, or --model.backbone kindling")
        return self


@_frozen
class TokenizerConfig:
    """Where the tokenizer comes from."""

    kind: Literal["bpe", "handwritten", "sentencepiece", "pretrained"] = "bpe"
    """bpe: byte-level BPE, trained by `tokenizers` on the run's training split; handwritten: the same, trained by our own code;
    sentencepiece: trained by SentencePiece, with byte fallback; pretrained: loaded from `path`."""
    sentencepiece_model: Literal["bpe", "unigram"] = "bpe"
    """For sentencepiece: the algorithm, BPE or a unigram language model."""
    path: str | None = None
    """For pretrained: a tokenizer.json, a folder with one, or a name on the hub, such as bigcode/starcoder2-3b."""
    normalizer: Literal["none", "nfkc"] = "none"
    """nfkc: replace characters by compatible ones (² by 2, … by ...). Decoding then does not give the exact source back."""
    lossy: bool = False
    """Accept a tokenizer that changes text, for example to NFC, and count the documents that it changes. False: refuse it."""
    eos_token: str = "<|endoftext|>"
    """The end-of-text token: ends every document, and stops generation."""
    end_tokens: tuple[str, ...] = ()
    """More tokens that stop generation, as some pretrained models have them."""
    bos_token: str | None = None
    """A token that begins every document. None: no such token."""
    pad_token: str | None = None
    """A token for padding, different from the end-of-text token. None: no such token."""
    unk_token: str | None = None
    """A token for unknown text, for vocabularies that list one (SentencePiece always does). Our tokenizers never produce it."""
    train_bytes: int = 10_000_000
    """Bytes of text that the tokenizer is trained on."""

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens that are set, in the order of their ids: pad, unk, bos, eos."""
        return [t for t in (self.pad_token, self.unk_token, self.bos_token, self.eos_token) if t is not None]

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        require_range("tokenizer", self, 1, "train_bytes")
        require(self.kind != "pretrained" or bool(self.path), "tokenizer.path", "set for a pretrained tokenizer", self.path,
                "set --tokenizer.path to a tokenizer.json, a folder or a hub name")
        require(self.kind == "bpe" or self.normalizer == "none", "tokenizer.normalizer", f"none for a {self.kind} tokenizer",
                self.normalizer, "set --tokenizer.normalizer none, or --tokenizer.kind bpe")
        require(all(self.special_tokens), "tokenizer special tokens", "non-empty", self.special_tokens, "name them, or use None")
        require(len(set(self.special_tokens)) == len(self.special_tokens), "tokenizer special tokens",
                "different from each other", self.special_tokens, "padding must never be the end token")
        return self


@_frozen
class SourceConfig:
    """One source of documents. Several sources make a mixture; `weight` sets each one's share of the tokens."""

    kind: Literal["local-python", "files", "text", "jsonl", "parquet", "datasets", "docstrings"] = "local-python"
    """local-python: Python's standard library and the installed packages; files: each file that `globs` matches is a document;
    text: files that hold several documents, divided by `separator`; jsonl, parquet: each row is a document; datasets: a data
    set on the hub, streamed; docstrings: instructions and answers for fine-tuning, made from documented Python functions."""
    path: str | None = None
    """A file, a folder, or a data set on the hub. local-python takes none; docstrings without one reads local-python's files."""
    globs: tuple[str, ...] | None = None
    """For files, text, jsonl and parquet: patterns of the files to read. None: the usual suffixes of the kind."""
    subset: str | None = None
    """The configuration (`name`) of a data set on the hub."""
    data_dir: str | None = None
    """The folder inside a data set on the hub, such as data/python."""
    split: str = "train"
    """The split of a data set on the hub."""
    field: str = "content"
    """The column with the text, or with the instruction."""
    response_field: str | None = None
    """For instructions: the column with the answer."""
    input_field: str | None = None
    """For instructions: the column with an instruction's input, which may be empty or missing."""
    messages_field: str | None = None
    """For conversations: the column with messages, each {"role": ..., "content": ...} or {"from": ..., "value": ...}."""
    language: str | None = None
    """Language of the documents. None: from a row's `language` or `lang` column, or from the file's suffix."""
    separator: str = "<|endoftext|>"
    """For text: what stands between two documents of a file. Empty: the whole file is one document."""
    weight: float = 1.0
    """Share of the tokens, relative to the weights of the other sources."""
    max_documents: int | None = None
    """Read at most this many documents. None: all."""
    max_bytes: int | None = None
    """Read at most this many bytes, from files in pseudo-random order. None: all."""

    @property
    def file_globs(self) -> tuple[str, ...]:
        """The patterns of the files to read."""
        if self.globs is not None:
            return self.globs
        suffixes = {"text": ("txt",), "jsonl": ("jsonl", "ndjson", "json"), "parquet": ("parquet",)}.get(self.kind)
        packed = ("", ".gz", ".zst")
        return ("**/*.py",) if suffixes is None else tuple(f"**/*.{s}{p}" for s in suffixes for p in packed)

    @property
    def is_instructions(self) -> bool:
        """Whether the source holds instructions and answers, not documents."""
        return self.kind == "docstrings" or self.response_field is not None or self.messages_field is not None

    @property
    def label(self) -> str:
        """A short name for tables."""
        return "/".join(part for part in (self.path or self.kind, self.subset, self.data_dir) if part)

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        check_source(self)
        return self


@_frozen
class DataConfig:
    """The training data: sources, filters and splits."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """The sources. To set one field of the first source: --data.sources.0.path."""
    min_chars: int = 1
    """Drop documents with fewer characters."""
    max_chars: int = 250_000
    """Drop documents with more characters."""
    min_lines: int = 1
    """Drop documents with fewer lines."""
    max_lines: int = 10_000
    """Drop documents with more lines."""
    max_line_chars: int | None = None
    """Drop documents with a line longer than this, which is often data or minified code. None: allow any length."""
    min_alphanumeric: float = 0.0
    """Drop documents with a smaller share of letters and digits."""
    max_non_ascii: float = 1.0
    """Drop documents with a larger share of characters that are not ASCII."""
    drop_tests: bool = False
    """Drop test files, recognised by their name, by a folder called test or tests, or by their test classes."""
    drop_generated: bool = False
    """Drop source files with a mark of their generator in a comment or docstring above the code (see data/generated.py)."""
    max_header_lines: int | None = None
    """Remove a comment block or module docstring at the start if it has more lines than this. None: keep it."""
    check_syntax: bool = True
    """Drop Python documents that do not compile with this interpreter."""
    dedup: bool = True
    """Drop exact duplicates (the same sha256)."""
    near_dedup: float | None = 0.6
    """Drop near-duplicates: documents whose word pairs have at least this Jaccard similarity to those of a kept document,
    estimated with MinHash. None is then in another split. Needs half a kB of memory for each document. None: keep them."""
    decontaminate: tuple[str, ...] = ("humaneval", "mbpp")
    """Drop documents that have 13 words in a row in common with these: benchmarks in problems/, or text or JSONL files."""
    val_fraction: float = 0.01
    """Share of the documents in the validation split, chosen by a hash of their content."""
    test_fraction: float = 0.01
    """Share of the documents in the test split, chosen by a hash of their content. Use it for final results only."""
    template: str = "alpaca"
    """For instructions: alpaca or user-assistant, the template that makes a text of an instruction and its answer (prompts.py).
    A model of others brings its own, in Jinja."""
    too_long: Literal["drop", "cut"] = "drop"
    """Of an example longer than the context: drop: leave it out; cut: truncate its last answer, and append end-of-text."""
    fim_rate: float = 0.0
    """Share of the training documents' pieces that become fill-in-the-middle (prefix, suffix, then middle). 0: none."""
    fim_spm_share: float = 0.5
    """Of these pieces, the share in which the suffix comes first (SPM). In the others the prefix does (PSM)."""
    fim_line_share: float = 0.0
    """Of these pieces, the share whose middle is (the end of) a line or of a block of lines. The others: any two characters."""
    max_tokens: int | None = None
    """Stop reading when the training split has this many tokens. None: read the sources to their end."""
    stopping_strategy: Literal["repeat", "stop", "continue"] = "repeat"
    """For a mixture: what to do when a source has no more documents. repeat: repeat its training documents until all sources
    are read to their end; stop: end the build, so the shares are exact; continue: go on with the other sources."""
    workers: int | None = None
    """Processes that filter and tokenise. None: one for each core."""

    @property
    def instructions(self) -> bool:
        """Whether the sources hold instructions and answers, not documents."""
        return self.sources[0].is_instructions

    @property
    def n_workers(self) -> int:
        """Processes that filter and tokenise."""
        return self.workers or os.cpu_count() or 1

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        require_range("data", self, 0, "min_chars", "max_chars", "min_lines", "max_lines", "max_header_lines")
        require_range("data", self, 1, "max_line_chars", "max_tokens", "workers")
        require_range("data", self, 0, "min_alphanumeric", "max_non_ascii", "fim_rate", "fim_spm_share", "fim_line_share", high=1)
        require_range("data", self, 0, "near_dedup", high=1, open_low=True)
        require_range("data", self, 0, "val_fraction", "test_fraction", open_low=True, high=0.5)
        require(self.val_fraction + self.test_fraction < 1, "data.val_fraction + test_fraction", "below 1",
                self.val_fraction + self.test_fraction, "leave something to train on")
        require(bool(self.sources), "data.sources", "at least one source", self.sources, "name one")
        known = self.template in get_args(Template) or "{{" in self.template or "{%" in self.template
        require(known, "data.template", f"{' or '.join(get_args(Template))}, or Jinja", self.template, "choose one")
        require(len({s.is_instructions for s in self.sources}) == 1, "data.sources", "all of instructions, or all of documents",
                tuple(s.label for s in self.sources), "fine-tune on the ones and pre-train on the others")
        require(self.fim_rate == 0 or not self.instructions, "data.fim_rate", "0 for instructions", self.fim_rate, "set it so")
        return self


@_frozen
class TrainConfig:
    """The optimiser, the schedule, precision, and how often to evaluate and save."""

    max_steps: int | None = 1000
    """Optimiser steps of the whole run. None: as many as `epochs` need."""
    epochs: float = 1.0
    """Passes over the training data, if max_steps is None."""
    max_minutes: float | None = None
    """Train for this long instead of max_steps or epochs. After the warmup, the learning rate follows the elapsed time. Compiling
    counts; evaluating and saving do not. Such a run cannot be repeated bit for bit; a run by steps can."""
    batch_size: int = 32
    """Sequences per optimiser step, in all micro-batches and ranks together."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; a rank takes at most this many. Must divide batch_size. None: batch_size."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again in the backward pass: less memory, up to a third more work."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the hidden matrices, and AdamW for embeddings, head and vectors."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    embd_lr: float | None = None
    """Peak learning rate of the embeddings, including a tied head. None: lr."""
    head_lr: float | None = None
    """Peak learning rate of an untied head. None: lr."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon (its update has spectral norm 1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate decays after the warmup."""
    decay_fraction: float = 1.0
    """Fraction of the run, without the warmup, in which the learning rate decays. Before that it stays at its peak."""
    warmup_steps: int = 100
    """Steps of linear warmup from zero."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean of the gradient."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean of the squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon. 1e-5 reduces loss spikes in low precision."""
    weight_decay: float = 0.1
    """Decoupled weight decay, for matrices only."""
    grad_clip: float = 1.0
    """Clip the gradient to this norm. 0: do not clip."""
    spike_ratio: float = 10.0
    """Skip a step if its gradient norm is more than this many times the median of the steps before. 0: do not check."""
    max_skipped_steps: int = 20
    """After this many bad steps in a row (not finite, or a spike), go back to the checkpoint before and leave out their rows."""
    init_from: str | None = None
    """Start from the weights of a run (its name or folder) or of a folder in the Hugging Face format, with a fresh optimiser."""
    extend: str | None = None
    """Go on with a run, as a new run with another end: from its last checkpoint before the decay, with all of its state."""
    seed: int = 1337
    """Seeds the weights, dropout and the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware has it, else fp16 on CUDA, else fp32."""
    deterministic: bool = False
    """On a GPU: use only kernels that give the same bits each time, so that resuming is exact. Slower. A CPU's always do."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: if there is a compiler, and the run is long enough to win back the time of compiling."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each rank of torchrun holds the whole model; fsdp: a part of weights, gradients and optimiser (docs/scale.md)."""
    threads: int | None = None
    """CPU threads. None: torch's choice for a new run, and the same number as before for a resumed one."""
    eval_every: int | None = None
    """Steps between evaluations on validation data. None: a tenth of the run, at most 1,000."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, besides the best one."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_prompts: tuple[str, ...] | None = None
    """Prompts (fine-tuning: instructions) to continue at the end of the run. None: of Python or of English, as the data."""
    sample_every: int | None = None
    """Steps between samples during training, which print what the model writes after these prompts. None or 0: no samples."""
    packing: bool = True
    """In fine-tuning: several examples in a row; none sees another. False: one in a row, padded, in batches of similar length."""
    held_out_answers: int = 20
    """In fine-tuning: answer this many held-out instructions at the end, and count the answers that end with end-of-text."""

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def evaluation_rows(self) -> int:
        """Sequences per forward pass of an evaluation: no more than in training, so that what trains can be evaluated."""
        return min(16, self.micro_batch)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        require_range("train", self, 1, "max_steps", "batch_size", "micro_batch_size", "max_skipped_steps", "threads",
                      "eval_every", "save_every", "keep_checkpoints", "log_every")
        require_range("train", self, 0, "epochs", "max_minutes", open_low=True)
        require_range("train", self, 0, "decay_fraction", high=1, open_low=True)
        require_range("train", self, 0, "warmup_steps", "weight_decay", "grad_clip", "held_out_answers", "sample_every")
        require(self.spike_ratio == 0 or self.spike_ratio > 1, "train.spike_ratio", "above 1, or 0 for none", self.spike_ratio,
                "set --train.spike-ratio")
        require_range("train", self, 0, "seed", high=2**63 - 1)
        require_range("train", self, 0, "lr", "embd_lr", "head_lr", "muon_lr", "eps", open_low=True)
        require_range("train", self, 0, "min_lr_ratio", high=1)
        require_range("train", self, 0, "beta1", "beta2", high=0.999999)
        require(self.decay_fraction == 1 or self.schedule != "constant", "train.decay_fraction",
                "1 where the schedule is constant", self.decay_fraction, "set --train.schedule linear")
        require(self.batch_size % self.micro_batch == 0, "train.micro_batch_size",
                f"a divisor of batch_size={self.batch_size}", self.micro_batch_size, "choose one, or None")
        return self


@_frozen
class Config:
    """All settings of a run."""

    preset: str = RUN
    """The preset that gives the default of every other setting. `python config.py` lists the presets."""
    name: str | None = None
    """Name of the run's folder under runs/. None: the preset's name."""
    model: ModelConfig = ModelConfig()
    """The shape of the model."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    data: DataConfig = DataConfig()
    """The training data."""
    train: TrainConfig = TrainConfig()
    """The training."""

    @property
    def run_name(self) -> str:
        """Name of the run's folder under runs/."""
        return self.name or self.preset

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on. Raises ConfigError if the steps depend on the data (see `with_steps`)."""
        steps = self.train.max_steps
        require(steps is not None and self.train.max_minutes is None, "train.max_steps",
                "a number, and train.max_minutes None, to know the tokens of the run before it begins",
                (steps, self.train.max_minutes), "set --train.max-steps and --train.max-minutes None")
        assert steps is not None  # or `require` raised
        return steps * self.train.batch_size * self.model.block_size

    def with_steps(self, n_rows: int) -> Config:
        """Return the config with `train.max_steps` set: if it is None, to the steps that the epochs take over `n_rows` rows.

        A run by minutes gets None.
        """
        steps = self.train.max_steps or max(1, round(self.train.epochs * n_rows / self.train.batch_size))
        return replace(self, train=replace(self.train, max_steps=steps if self.train.max_minutes is None else None))

    @model_validator(mode="after")
    def _check(self) -> Config:
        bad = self.name is not None and (not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"))
        require(not (self.data.instructions and self.train.packing and self.model.backbone == "transformers"), "train.packing",
                "False on transformers' GPT-2, which has no mask across examples", True, "set --train.packing False")
        require(self.data.fim_rate == 0 or self.model.block_size >= 16, "model.block_size", "at least 16 with data.fim_rate",
                self.model.block_size, "set --data.fim-rate 0")
        require(self.train.head_lr is None or not self.model.tie_embeddings, "train.head_lr",
                "None where the head is tied, as it then has the rate of the embeddings", self.train.head_lr,
                "set --train.embd-lr, or --model.tie-embeddings False")
        require(not bad, "name", "the plain name of a folder under runs/", self.name, "leave out slashes")
        return self


@_frozen
class EvalConfig:
    """What evaluate.py measures. With the defaults, a small model takes less than a minute on two cores."""

    full: bool = False
    """Run code as for a final table (FULL_EVAL in config.py). Benchmarks that are named are run as a whole without it, too."""
    benchmarks: tuple[str, ...] = ("problems:10",)
    """Benchmarks, each with its number of samples per problem. problems: our own; -infill: each line of the solutions is filled
    in, with what follows it and without (of a problem, the samples are for each line); none: no code, and no solutions."""
    max_level: int = 1
    """Of `problems`, run only those up to this level, from 0 to 5. The solutions of all levels are predicted."""
    humaneval: str | None = None
    """HumanEval from a file or a data set on the hub that you trust: its tests run outside the sandbox. None: from problems/."""
    mbpp: str | None = None
    """The same for MBPP. On the hub they are openai/openai_humaneval and google-research-datasets/mbpp."""
    limit: int | None = None
    """Use only this many problems of each benchmark, from its start. None: all."""
    signatures: int = 50
    """Held-out functions (after fine-tuning: instructions) that the model continues, to check whether the result compiles."""
    max_new_tokens: int = 64
    """Most new tokens of each sample; the context may leave room for fewer."""
    temperature: float = 0.2
    """Sampling temperature. 0: greedy, with one sample for each problem."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 32
    """Samples that are generated at the same time."""
    workers: int | None = None
    """Sandboxes that run at the same time. None: one for each core."""
    cpu_s: int = 10
    """CPU seconds that a program may use."""
    memory_mb: int = 512
    """Memory in MB that a program may use."""
    stride: int | None = None
    """Predict every held-out token from at least block_size - stride tokens before it. None: in blocks, as in training."""
    contamination_tokens: int = 50_000_000
    """Search this many training tokens for the benchmarks' problems. Of a larger training split, evenly spaced pieces."""

    @property
    def n_workers(self) -> int:
        """Sandboxes that run at the same time."""
        return self.workers or os.cpu_count() or 1

    @property
    def n_samples(self) -> dict[str, int]:
        """Samples of each problem, by benchmark. Greedy samples would all be the same, so there is one."""
        named = [entry.partition(":") for entry in self.benchmarks if entry != "none"]
        ways = [(name + way, n) for name, _, n in named for way in ("", "-no-suffix")[: 1 + name.endswith("-infill")]]
        return {name: int(n or 1) if self.temperature else 1 for name, n in ways}

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        check_eval(self, BENCHMARKS)
        return self


FULL_EVAL = EvalConfig(full=True, benchmarks=("problems:10", "humaneval:5", "mbpp:1", "mbpp-3shot:1"), max_level=5,
                       signatures=100, max_new_tokens=256)


if __name__ == "__main__":
    from kindling.cli import run_script
    from presets import main
    run_script(main)
