"""Prepares a model for generation: weights in the precision, and on a CPU in the memory layout, that are fastest for one token.

    gpt = prepare_for_inference(model, "int8")

To generate one token, every weight is read once, so time depends on bytes: bf16 halves them, int8 quarters them. Limits: the
prepared model cannot be trained; int8 runs on the CPU only and multiplies in bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from kindling.errors import KindlingError
from kindling.generation.int8_linear import Int8Linear
from model import GPT, LanguageModel

Precision = Literal["fp32", "bf16", "int8"]


@torch.no_grad()
def prepare_for_inference(model: LanguageModel, precision: Precision) -> GPT:
    """Return `model` as a GPT that is ready for `forward_cached`. A GPT is changed in place.

    Raises KindlingError for int8 on any device but the CPU.
    """
    gpt = model.for_generation().eval()
    device = gpt.wte.weight.device
    if precision == "int8" and device.type != "cpu":
        raise KindlingError(
            f"--precision int8 must run on the CPU, but the device is {device}; use bf16, or --device cpu"
        )
    if precision != "fp32":
        for p in gpt.parameters():  # not the buffers: rotary angles would lose too much precision
            p.data = p.data.bfloat16()
        if gpt.cfg.position == "sinusoidal":
            gpt.positions = gpt.positions.bfloat16()
    if device.type == "cpu":
        gpt.cache_dtype = torch.float32  # attention in bfloat16 takes four times as long on a CPU
    if precision == "int8":
        for parent in [m for m in gpt.modules() if not isinstance(m, nn.Linear)]:
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    elif device.type == "cpu":
        for linear in [m for m in gpt.modules() if isinstance(m, nn.Linear) and m.out_features > m.in_features]:
            # a tall matrix times a vector is faster when stored by columns; the shape and all names stay
            linear.weight.data = linear.weight.data.t().contiguous().t()
    return gpt
