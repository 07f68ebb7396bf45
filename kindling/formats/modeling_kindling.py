"""Kindling's architectures for transformers: every shape that `GPT2LMHeadModel` and `LlamaForCausalLM` do not hold.

    model = AutoModelForCausalLM.from_pretrained("runs/demo/hf", trust_remote_code=True)

An exported folder holds a copy of this file, so it needs torch and transformers (version 5) and nothing else. Parameter
names and logits are those of Kindling's own `GPT`. A batch is padded on the left or the right, by `attention_mask`.
With a table of token pairs, a call with a cache needs the token before, `previous_ids`, which `generate` passes by itself.
Limits: no text beyond the context, which raises; no attention weights as output; no documents packed into one row; no
`prefill_chunk_size` with a table of pairs, which raises.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class KindlingConfig(PretrainedConfig):
    """The shape of a model; the names are those of Kindling's `ModelConfig`."""

    model_type = "kindling"
    attribute_map = {  # noqa: RUF012 (transformers' own way)
        "hidden_size": "n_embd",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        block_size: int = 256,
        vocab_size: int = 4096,
        n_layer: int = 4,
        n_head: int = 4,
        n_kv_head: int | None = None,
        n_embd: int = 128,
        d_ff: int | None = None,
        position: str = "learned",
        rope_theta: float = 10_000.0,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        final_norm: bool = True,
        activation: str = "gelu_new",
        bias: bool = True,
        head_bias: bool = False,
        attn_out_proj: bool = True,
        qk_norm: bool | str = False,
        pair_rows: int = 0,
        d_head: int | None = None,
        qkv_bias: bool | None = None,
        rope_factors: tuple[float, ...] = (),
        tie_word_embeddings: bool = True,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs,
    ):
        """Take the shape; the defaults are GPT-2's choices at toy size."""
        self.block_size, self.vocab_size, self.n_layer, self.n_embd = block_size, vocab_size, n_layer, n_embd
        self.n_head, self.n_kv_head = n_head, n_head if n_kv_head is None else n_kv_head
        self.d_ff = 4 * n_embd if d_ff is None else d_ff
        self.position, self.rope_theta = position, rope_theta
        self.norm, self.norm_eps, self.final_norm = norm, norm_eps, final_norm
        self.activation, self.bias, self.head_bias = activation, bias, head_bias
        self.attn_out_proj, self.qk_norm, self.pair_rows = attn_out_proj, qk_norm, pair_rows
        self.d_head, self.qkv_bias, self.rope_factors = d_head, qkv_bias, list(rope_factors)
        self.dropout, self.initializer_range, self.use_cache = dropout, initializer_range, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head if self.d_head is None else self.d_head


def norm_of(cfg: KindlingConfig) -> nn.Module:
    """Return LayerNorm, with or without bias, or RMSNorm."""
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)


def pair_ids(idx: Tensor, previous: Tensor, n_rows: int) -> Tensor:
    """Return the row of the table of pairs for each token of idx and the one before it in `previous`, -1 where none is."""
    return (1 + (previous * 2_654_435_761 + idx * 2_246_822_519) % (n_rows - 1)) * (previous >= 0)


def rotary_table(cfg: KindlingConfig) -> Tensor:
    """Return cos and sin of RoPE, (block_size, 2, D), in Llama's half-rotation layout."""
    rate = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu") / cfg.head_dim)
    if cfg.rope_factors:  # all frequencies, or as in Llama 3.1 those that turn seldom within its context
        factor, low, high, context = (*cfg.rope_factors, 1, 2, 0)[:4]
        kept = ((rate * (context / (2 * math.pi)) - low) / (high - low)).clip(0, 1)
        rate = rate * kept + rate / factor * (1 - kept)
    angle = torch.arange(cfg.block_size, dtype=torch.float32, device="cpu")[:, None] * rate  # (S, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (S, D)
    return torch.stack((angle.cos(), angle.sin()), dim=1)  # (S, 2, D)


def sinusoidal_table(cfg: KindlingConfig) -> Tensor:
    """Return the fixed position encodings (block_size, C) of Vaswani et al. 2017, section 3.5."""
    even = torch.arange(0, cfg.n_embd, 2, dtype=torch.float64, device="cpu")  # (C/2,)
    rate = torch.exp(even * (-math.log(10_000.0) / cfg.n_embd))  # (C/2,)
    angle = torch.arange(cfg.block_size, dtype=torch.float64, device="cpu")[:, None] * rate  # (S, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()  # (S, C)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its position's angle; rope (B, T, 2, D)."""
    cos, sin = rope[:, None].unbind(-2)  # (B, 1, T, D)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention."""

    def __init__(self, cfg: KindlingConfig, layer: int):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        bias = cfg.bias if cfg.qkv_bias is None else cfg.qkv_bias
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim, bias=bias)
        self.proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias) if cfg.attn_out_proj else None
        learned = cfg.qk_norm == "learned"
        self.q_norm, self.k_norm = (nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps) if learned else None for _ in "qk")

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        """Attend within x (B, T, C) and what the cache holds; mask (B, 1, T, S), or None for the causal one."""
        cfg, (B, T, _) = self.cfg, x.shape
        widths = [n * cfg.head_dim for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]
        q, k, v = (
            t.view(B, T, -1, cfg.head_dim).transpose(1, 2) for t in self.qkv(x).split(widths, dim=-1)
        )  # (B, H, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif cfg.qk_norm:
            q, k = F.rms_norm(q, (cfg.head_dim,)), F.rms_norm(k, (cfg.head_dim,))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, n_kv_head, S, D)
        if cfg.n_kv_head != cfg.n_head:
            k, v = (t.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1) for t in (k, v))  # (B, n_head, S, D)
        dropout = cfg.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return y if self.proj is None else self.proj(y)


class MLP(nn.Module):
    """The feed-forward layer: up, activation, down; SwiGLU has a gate beside up."""

    def __init__(self, cfg: KindlingConfig):
        super().__init__()
        self.up = nn.Linear(cfg.n_embd, cfg.d_ff, bias=cfg.bias)
        self.gate = nn.Linear(cfg.n_embd, cfg.d_ff, bias=cfg.bias) if cfg.activation == "swiglu" else None
        self.down = nn.Linear(cfg.d_ff, cfg.n_embd, bias=cfg.bias)
        self.activation = cfg.activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (B, T, C)."""
        h = self.up(x)  # (B, T, d_ff)
        if self.activation == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.activation in ("gelu", "gelu_new"):
            h = F.gelu(h, approximate="none" if self.activation == "gelu" else "tanh")
        else:
            h = F.relu(h) if self.activation == "relu" else F.relu(h).square()
        return self.down(h)  # (B, T, C)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, cfg: KindlingConfig, layer: int):
        super().__init__()
        self.norm_1, self.attn = norm_of(cfg), Attention(cfg, layer)
        self.norm_2, self.mlp = norm_of(cfg), MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        """Return the residual stream (B, T, C) after the block."""
        x = x + self.dropout(self.attn(self.norm_1(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class KindlingForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model with its head."""

    config_class = KindlingConfig
    _tied_weights_keys = {"head.weight": "wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: KindlingConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wtp = nn.Embedding(config.pair_rows, config.n_embd) if config.pair_rows else None
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm_f = norm_of(config) if config.final_norm else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        # no buffer: transformers builds a model without memory, and fills in only what is in the weights' file
        self._table: Tensor | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, as a change of the vocabulary does."""
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.head = value

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        """Return what `forward` gets, of all tokens so far: those that the cache has not, and which came before them."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        n_cached = input_ids.size(1) - inputs["input_ids"].size(1)
        if self.wtp is not None and n_cached:
            inputs["previous_ids"] = input_ids[:, n_cached - 1]  # (B,)
        return inputs

    def _pairs(self, input_ids: Tensor, position_ids: Tensor, previous_ids: Tensor | None) -> Tensor:
        """Return what the table of pairs adds to each token, (B, T, C); the token at position 0 has none before it."""
        first = input_ids.new_full(input_ids.shape[:1], -1) if previous_ids is None else previous_ids  # (B,)
        previous = torch.cat((first[:, None], input_ids[:, :-1]), dim=1).masked_fill(position_ids == 0, -1)  # (B, T)
        return self.wtp(pair_ids(input_ids, previous, self.config.pair_rows))

    def _embed(
        self, input_ids: Tensor, position_ids: Tensor, previous_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the first block's input (B, T, C) and, where positions are rotary, cos and sin (B, T, 2, D)."""
        x = self.wte(input_ids)  # (B, T, C)
        if self.wtp is not None:
            x = x + self._pairs(input_ids, position_ids, previous_ids)
        if self.wpe is not None:
            return self.dropout(x + self.wpe(position_ids)), None
        if self._table is None or self._table.device != x.device:
            of = rotary_table if self.config.position == "rope" else sinusoidal_table
            self._table = of(self.config).to(x.device)
        table = self._table[position_ids.expand(x.shape[:2])]  # (B, T, ...)
        if self.config.position == "rope":
            return self.dropout(x), table
        return self.dropout(x + table.to(x.dtype)), None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        previous_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits (B, T, V) or of the last `logits_to_keep` tokens, the cache, and with labels the mean loss.

        input_ids (B, T); attention_mask (B, S), 0 for padding, S with the tokens in the cache; labels (B, T), -100
        where nothing is supervised, shifted here; previous_ids (B,) the tokens before input_ids, which a model with a
        table of pairs needs where the cache holds some. Raises ValueError without them, and for a text longer than the
        context.
        """
        T = input_ids.size(1)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = None if self.training else DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past + T > self.config.block_size:
            raise ValueError(f"a text must be at most {self.config.block_size} tokens, but has {past + T}; crop it")
        if self.wtp is not None and past and previous_ids is None:
            raise ValueError(
                f"previous_ids must be the {input_ids.size(0)} tokens before input_ids where a cache holds text and the model "
                f"has a table of pairs (pair_rows={self.config.pair_rows}), but is None; pass them, or no cache"
            )
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
        elif position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]  # (1, T)
        mask = None
        if attention_mask is not None or past:
            mask = torch.ones(1, 1, T, past + T, dtype=torch.bool, device=input_ids.device).tril(past)  # (1, 1, T, S)
        if attention_mask is not None:  # padding sees itself: a softmax over nothing would not be a number
            itself = mask & ~mask.tril(past - 1)
            mask = mask & attention_mask[:, None, None, :].bool() | itself  # (B, 1, T, S)
        x, rope = self._embed(input_ids, position_ids, previous_ids)
        for block in self.blocks:
            x = block(x, rope, mask, past_key_values)
        x = x[:, -logits_to_keep:] if logits_to_keep else x  # (B, T or fewer, C)
        logits = self.head(x if self.norm_f is None else self.norm_f(x))  # (B, T or fewer, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output
