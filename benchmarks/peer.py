"""The peer that training is measured against: a model of transformers in a plain loop, as people write it (nanoGPT's style).

    peer = Peer(preset("demo").model, device.resolve(preset("demo").train), lr=1e-3)
    peer.compile()
    loss = peer.step(idx, targets, share=0.1)

AdamW (fused, betas 0.9 and 0.95, weight decay 0.1 on matrices), linear warmup and then cosine to a tenth by the share of the
run that is over, gradients clipped at 1, the cross-entropy of whole logits, dropout 0, under autocast where the precision is
not float32. Of a `config.ModelConfig` only layers, width, heads, context and vocabulary count: the rest is GPT-2's. A shape with
SwiGLU has Llama as its peer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, ModelConfig
from kindling import device
from kindling.data.shards import Batch
from kindling.device import Runtime

WARMUP = 0.03  # of the run
MIN_LR_RATIO = 0.1


def learning_rate_scale(share: float) -> float:
    """Return the factor on the peak learning rate when `share` of the run, from 0 to 1, is over."""
    if share < WARMUP:
        return max(share, WARMUP / 100) / WARMUP  # never a step at rate zero
    progress = min(1.0, (share - WARMUP) / (1 - WARMUP))
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress))


def gpt2(cfg: ModelConfig) -> nn.Module:
    """Return transformers' GPT2LMHeadModel of that shape, with the weights that the library gives it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size,
            n_positions=cfg.block_size,
            n_embd=cfg.n_embd,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,  # the library's own are beyond a small vocabulary
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )


def llama(cfg: ModelConfig) -> nn.Module:
    """Return transformers' LlamaForCausalLM of that shape, with the weights that the library gives it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            max_position_embeddings=cfg.block_size,
            hidden_size=cfg.n_embd,
            intermediate_size=cfg.ff_width,
            num_hidden_layers=cfg.n_layer,
            num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.kv_heads,
            tie_word_embeddings=cfg.tie_embeddings,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )


def transformers_model(cfg: ModelConfig) -> nn.Module:
    """Return transformers' model that is closest to a shape: Llama for SwiGLU, else GPT-2."""
    return llama(cfg) if cfg.activation == "swiglu" else gpt2(cfg)


class Peer:
    """A model of transformers in training."""

    def __init__(self, cfg: ModelConfig, runtime: Runtime, lr: float, seed: int = 0):
        """`lr` is the peak learning rate."""
        torch.manual_seed(seed)
        self.cfg, self.runtime, self.lr = cfg, runtime, lr
        self.model = transformers_model(cfg).to(runtime.device).train()
        self._loss = self.loss
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def compile(self) -> None:
        """Compile the whole model and its loss; that happens in the next step."""
        self._loss = torch.compile(self.loss, dynamic=False)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats of idx and targets, both (B, T) int64."""
        logits = self.model(idx).logits  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)

    def step(self, idx: Tensor, targets: Tensor, share: float) -> Tensor:
        """Do one optimiser step on rows (B, T) on the device; return its loss, a tensor that nothing has waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * learning_rate_scale(share)
        loss = self.backward(idx, targets)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def backward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of the mean loss of rows (B, T) on the device; return the loss."""
        with self.runtime.autocast(), device.attention_of_fixed_shapes(self.runtime):
            loss = self._loss(idx, targets)
        loss.backward()
        return loss.detach()

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Copy a batch's rows and targets, (B, T) each, to the device."""
        idx, targets = (device.to_device(rows, self.runtime) for rows in (batch.idx, batch.targets))
        return idx, targets

    @torch.no_grad()
    def summed_loss(self, batch: Batch) -> tuple[float, int]:
        """Return the summed loss of a batch in nats, without training on it, and its supervised tokens."""
        idx, targets = self.on_device(batch)  # (B, T) each
        with self.runtime.autocast():
            mean = self.loss(idx, targets)  # not the compiled one, which is for training; there is no dropout
        count = int((targets != IGNORE).sum())
        return float(mean) * count, count
