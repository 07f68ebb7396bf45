"""Every architecture of the presets in one `GPT`, on `F.scaled_dot_product_attention` (on some CPUs, `blockwise_attention`).

    model = build_model(preset("code-50m").model)
    loss_sum, n_targets = model(idx, targets)

`config.ModelConfig` chooses between the architectures. Parameter names: `wte`, `wpe`, `blocks.N` with `norm_1`,
`attn.qkv`, `attn.q_norm`, `attn.k_norm`, `attn.proj`, `norm_2`, `mlp.up`, `mlp.gate`, `mlp.down`; then `norm_f` and `head`;
`wtp` is the bigram hash embedding. Given `position_ids` that restart with each document of a packed block
(`shards.document_position_ids`), no token sees another document. For generation, a `Cache` keeps keys and values (cache.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import IGNORE, ModelConfig
from kindling.blockwise_attention import blockwise_attention
from kindling.cache import Cache
from kindling.gpt2_backbone import build_gpt2, gpt2_attention, gpt2_weights, require_no_positions
from kindling.loss import linear_cross_entropy, softmax_and_nll
from kindling.norm import Norm
from kindling.positions import bigram_ids, document_mask, previous_tokens, rotary_tables, rotate, sinusoidal_positions

Rotary = tuple[Tensor, Tensor]  # cos and sin of each position
# takes the keys and values of new tokens, returns those of all tokens so far
Cached = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CausalSelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention; `mask` (B, 1, T, T), where given, says what each token may see."""

    blockwise = False
    """Whether `blockwise_attention` computes it for rows that fill the context. `LanguageModel.enable_compile` sets it."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.kv_heads, cfg.head_dim
        self.qk_norm, self.dropout, self.block_size = cfg.qk_norm, cfg.dropout, cfg.block_size
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.kv_heads) * cfg.head_dim, bias=cfg.has_qkv_bias)
        self.proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias) if cfg.attn_out_proj else None
        self.q_norm, self.k_norm = (Norm(cfg, qk=True) if cfg.qk_norm == "learned" else None for _ in "qk")

    def heads(self, x: Tensor, rope: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, n_head, T, D), keys and values (B, n_kv_head, T, D) of x (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head + 2 * n_kv_head, T, D)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)  # (B, H, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def forward(
        self, x: Tensor, rope: Rotary | None = None, mask: Tensor | None = None, cached: Cached | None = None
    ) -> Tensor:
        """Attend within x (B, T, C), and with `cached` also to the tokens before x."""
        q, k, v = self.heads(x, rope)
        if cached is not None:
            k, v = cached(k, v)  # (B, n_kv_head, S, D)
            q = q.to(k.dtype)  # the cache may be wider than the weights
        dropout = self.dropout if self.training else 0.0
        # for each other length, two more functions would be compiled
        blockwise = self.blockwise and cached is None and q.size(2) == self.block_size
        grouped = self.n_head != self.n_kv_head
        if grouped and (mask is not None or blockwise):
            # blockwise_attention needs as many key heads as query heads, and so does CUDA's memory-efficient kernel that takes
            # a mask. With fewer, torch may fall back to a kernel that forms all attention weights.
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))  # (B, n_head, T, D)
            grouped = False
        if blockwise:  # autocast casts arguments for torch's operators only
            y = blockwise_attention(q.to(v.dtype), k.to(v.dtype), v, mask, dropout)  # (B, n_head, T, D)
        else:
            # FlexAttention and variable-length kernels would skip what a mask hides, but each would be one more path.
            # A mask is causal itself, and one new token sees everything in the cache.
            is_causal = mask is None and q.size(2) == k.size(2)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
            )
        y = y.transpose(1, 2).flatten(2).to(x.dtype)  # (B, T, C)
        return y if self.proj is None else self.proj(y)

    def weights(self, x: Tensor, rope: Rotary | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the attention weights (B, n_head, T, T). `forward` uses the same ones but never forms them."""
        q, k, _ = self.heads(x, rope)
        k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, n_head, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # (B, n_head, T, T)
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()  # (T, T)
        return scores.masked_fill(~mask, -math.inf).softmax(-1)


class MLP(nn.Module):
    """The feed-forward layer: up, activation, down. SwiGLU (Shazeer 2020) has a gate as well."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.up = nn.Linear(cfg.n_embd, cfg.ff_width, bias=cfg.bias)
        self.gate = nn.Linear(cfg.n_embd, cfg.ff_width, bias=cfg.bias) if cfg.activation == "swiglu" else None
        self.down = nn.Linear(cfg.ff_width, cfg.n_embd, bias=cfg.bias)
        self.activation = cfg.activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, d_ff)
        if self.gate is not None:
            h = F.silu(self.gate(x)) * h
        elif self.activation == "gelu":
            h = F.gelu(h)
        elif self.activation == "gelu_new":
            h = F.gelu(h, approximate="tanh")
        elif self.activation == "relu":
            h = F.relu(h)
        elif self.activation == "relu2":
            h = F.relu(h).square()
        return self.down(h)  # (B, T, C)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm_1, self.attn = Norm(cfg), CausalSelfAttention(cfg)
        self.norm_2, self.mlp = Norm(cfg), MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(
        self, x: Tensor, rope: Rotary | None = None, mask: Tensor | None = None, cached: Cached | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), rope, mask, cached))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x


class LanguageModel(nn.Module):
    """The interface for training, evaluation and generation: `hidden` and `head`, and logits or loss computed from them."""

    cfg: ModelConfig
    checkpoint_activations = False
    """Whether training keeps only the input of each block and computes the rest again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174): less memory, a third more work, the same bits."""

    if TYPE_CHECKING:  # a submodule, or a property that returns one

        @property
        def head(self) -> nn.Linear: ...

    def hidden(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the features (B, T, C) that the head turns into logits."""
        raise NotImplementedError

    def attention_weights(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return every head's attention weights (n_layer, B, n_head, T, T) for idx (B, T)."""
        raise NotImplementedError

    def for_generation(self) -> GPT:
        """Return the model as a GPT, which has `forward_cached`: itself or a copy."""
        raise NotImplementedError

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, T, vocab_size), or with targets the summed loss and the count of supervised tokens, as tensors.

        idx (B, T) int64 with T at most block_size; targets (B, T) int64, -100 where nothing is supervised; positions
        (B, T) int64, each token's place in its document, so that no token sees another document. None: each row is one
        document. The loss is a sum in nats, so every average of the project is a total over a total.
        Raises ValueError if T is too long.
        """
        if idx.size(1) > self.cfg.block_size:
            raise ValueError(
                f"a sequence must be at most block_size={self.cfg.block_size} tokens, but has {idx.size(1)}; crop it"
            )
        x = self.hidden(idx, position_ids)  # (B, T, C)
        if targets is None:
            return self.head(x)  # (B, T, vocab_size)
        weight, bias = self.head.weight, self.head.bias
        loss = linear_cross_entropy(x.flatten(0, 1), weight, bias, targets.flatten(), self._softmax_and_nll)
        return loss, (targets != IGNORE).sum()

    _softmax_and_nll = staticmethod(softmax_and_nll)

    def enable_compile(self, blockwise: bool = False) -> None:
        """Compile the transformer blocks (once, as they share their code) and the loss kernel, in place.

        Parameters keep their names, so checkpoints stay the same. `blockwise`: whether `blockwise_attention` computes attention
        where it can, which is faster on some CPUs (`Runtime.prefers_blockwise_attention`).
        """
        self._set_blockwise(blockwise)
        for block in self.modules_to_compile():
            block.compile(dynamic=False)
        self._softmax_and_nll = torch.compile(softmax_and_nll, dynamic=False)

    def disable_compile(self) -> None:
        """Undo `enable_compile`."""
        self._set_blockwise(False)
        for block in self.modules_to_compile():
            block._compiled_call_impl = None
        self._softmax_and_nll = softmax_and_nll

    def _set_blockwise(self, wanted: bool) -> None:
        for attention in (m for m in self.modules() if isinstance(m, CausalSelfAttention)):
            attention.blockwise = wanted

    def modules_to_compile(self) -> list[nn.Module]:
        """Return the repeated modules that are worth compiling."""
        raise NotImplementedError

    def n_parameters(self) -> int:
        """Count the trainable parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def n_matmul_parameters(self) -> int:
        """Count the parameters that every token is multiplied with: all but the lookup tables."""
        tables = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)} - {self.head.weight}
        return self.n_parameters() - sum(table.numel() for table in tables)


class GPT(LanguageModel):
    """A decoder-only transformer of any shape of `ModelConfig`, initialised from torch's global random generator."""

    head: nn.Linear
    positions: Tensor  # (block_size, C), if positions are sinusoidal
    rope_cos: Tensor  # (block_size, D), like rope_sin, if positions are rotary
    rope_sin: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.cache_dtype: torch.dtype | None = None  # of keys and values in generation; None: the weights' type
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wtp = nn.Embedding(cfg.bigram_rows, cfg.n_embd) if cfg.bigram_rows else None
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.position == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        blocks = [Block(cfg) for _ in range(cfg.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_f = Norm(cfg) if cfg.final_norm else None
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=cfg.head_bias)
        if cfg.tie_embeddings:
            self.head.weight = self.wte.weight
        if cfg.position == "sinusoidal":
            self.register_buffer("positions", sinusoidal_positions(cfg.block_size, cfg.n_embd), persistent=False)
        elif cfg.position == "rope":
            cos, sin = rotary_tables(cfg.block_size, cfg.head_dim, cfg.rope_theta, cfg.rope_factors)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(partial(self._init, std=cfg.init_std))
        nn.init.normal_(self.wte.weight, std=cfg.init_std if cfg.embd_init_std is None else cfg.embd_init_std)
        if self.wtp is not None:  # at first a pair adds nothing to its token
            nn.init.zeros_(self.wtp.weight)
        for proj in [proj for block in blocks for proj in (block.attn.proj, block.mlp.down) if proj is not None]:
            if cfg.residual_init == "zero":
                nn.init.zeros_(proj.weight)
            else:  # so that the residual stream's variance does not grow with depth (GPT-2, section 2.3)
                nn.init.normal_(proj.weight, std=cfg.init_std / math.sqrt(2 * cfg.n_layer))

    @staticmethod
    def _init(module: nn.Module, std: float) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(
        self, idx: Tensor, position_ids: Tensor | None = None, before: Tensor | None = None
    ) -> tuple[Tensor, Rotary | None]:
        """Return the first block's input (B, T, C), and for rotary positions cos and sin of each position, else None.

        They are (T, D), or (B, 1, T, D) with position_ids (B, T). `before` (B,) is the token before each row's first one; it is
        used where that one is not at position 0.
        """
        T = idx.size(1)
        x = self.wte(idx)  # (B, T, C)
        if self.wtp is not None:
            previous = previous_tokens(idx, position_ids, before)  # (B, T)
            x = x + self.wtp(bigram_ids(idx, previous, self.cfg.bigram_rows))
        if self.wpe is not None:
            x = x + (self.wpe.weight[:T] if position_ids is None else self.wpe(position_ids))
        elif self.cfg.position == "sinusoidal":
            x = x + (self.positions[:T] if position_ids is None else self.positions[position_ids])
        rope = None
        if self.cfg.position == "rope" and position_ids is None:
            rope = self.rope_cos[:T], self.rope_sin[:T]  # (T, D)
        elif self.cfg.position == "rope":
            rope = self.rope_cos[position_ids][:, None], self.rope_sin[position_ids][:, None]  # (B, 1, T, D)
        return self.dropout(x), rope

    def hidden(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x, rope = self.embed(idx, position_ids)  # (B, T, C)
        mask = None if position_ids is None else document_mask(position_ids)  # (B, 1, T, T), once for all blocks
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            # `checkpoint` restores the random state, so dropout is the same the second time
            x = checkpoint(block, x, rope, mask, use_reentrant=False) if recompute else block(x, rope, mask)
        return x if self.norm_f is None else self.norm_f(x)

    def new_cache(self, n_rows: int) -> Cache:
        """Return an empty cache in `cache_dtype`, or in the type of the weights."""
        return Cache(self.cfg, n_rows, self.wte.weight.new_empty(0, dtype=self.cache_dtype))

    @torch.no_grad()
    def forward_cached(self, idx: Tensor, cache: Cache) -> Tensor:
        """Run the next tokens idx (B, T) of each row of the cache; return the logits (B, V) after each row's last token.

        No row may get longer than block_size tokens.
        """
        position_ids = cache.positions(idx.size(1))  # (B, T)
        x, rope = self.embed(idx, position_ids, cache.last)  # (B, T, C)
        S = int(cache.lengths.max()) + idx.size(1)
        mask = cache.mask(position_ids, S)  # (B, 1, T, S)
        for layer, block in enumerate(self.blocks):
            extend = partial(cache.extend, layer, position_ids=position_ids, S=S)
            x = block(x, rope, mask, extend)
        x = cache.advance(idx, x)  # (B, C)
        return self.head(x if self.norm_f is None else self.norm_f(x))

    def for_generation(self) -> GPT:
        return self

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        was_training = self.training
        self.eval()  # without dropout
        x, rope = self.embed(idx, position_ids)
        mask = None if position_ids is None else document_mask(position_ids)  # (B, 1, T, T)
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            layers.append(block.attn.weights(block.norm_1(x), rope, mask))
            x = block(x, rope, mask)
        self.train(was_training)
        return torch.stack(layers)  # (n_layer, B, n_head, T, T)

    def modules_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)


class TransformersGPT2(LanguageModel):
    """The same interface on transformers' `GPT2LMHeadModel`; the project behind `code-225m` runs its model so.

    Limit: no mask across documents. The config refuses `document_mask`, and `hidden` raises ValueError for position_ids.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.gpt2 = build_gpt2(cfg)

    @property
    def head(self) -> nn.Linear:
        return self.gpt2.lm_head

    @property
    def checkpoint_activations(self) -> bool:
        return self.gpt2.is_activation_checkpointing

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        if wanted:
            self.gpt2.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.gpt2.activation_checkpointing_disable()

    def hidden(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        require_no_positions(position_ids)
        return self.gpt2.transformer(idx).last_hidden_state

    @torch.no_grad()
    def attention_weights(self, idx: Tensor, position_ids: Tensor | None = None) -> Tensor:
        require_no_positions(position_ids)
        return gpt2_attention(self.gpt2, idx)

    def modules_to_compile(self) -> list[nn.Module]:
        return list(self.gpt2.transformer.h)

    @torch.no_grad()
    def for_generation(self) -> GPT:
        """Return a copy of the weights in our own GPT, which gives the same logits."""
        gpt = GPT(replace(self.cfg, backbone="kindling"))
        ours = dict(gpt.named_parameters())
        for name, weight in gpt2_weights(self.gpt2):
            ours.pop(name).copy_(weight)
        assert not ours, "every weight of ours has one of GPT-2's"
        return gpt.to(self.head.weight.device).eval()


def build_model(cfg: ModelConfig) -> LanguageModel:
    """Return a model of the shape and backbone of `cfg`, initialised from torch's global random generator."""
    return TransformersGPT2(cfg) if cfg.backbone == "transformers" else GPT(cfg)
