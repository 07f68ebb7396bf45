"""The numbers behind the plots of a run and its model.

    curves = curves_of(read_metrics(run.path / "metrics.jsonl"))
    spectra(matrices(model))["qkv"][0].norm        # the largest singular value of layer 0's qkv
    tokens = units(model, tokenizer, text, runtime)

Limit: singular values are computed from the Gram matrix of the smaller side, so only the largest ones are exact. The smallest
are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import IGNORE
from kindling.data.shards import Batch
from kindling.device import Runtime
from kindling.errors import KindlingError
from kindling.evaluation.perplexity import token_losses
from kindling.generation.completion import TextStream
from kindling.plots.figures import Curves, Histogram, Spectrum
from kindling.plots.text_plots import Unit
from kindling.public_paths import public_path
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.metrics import read_metrics
from kindling.tokenization.tokenizer import Tokenizer
from model import LanguageModel

BINS = 81
FEWEST = 16  # weights in a bin of a histogram, so that its tails are no noise
LABELLED = 48  # tokens of a heatmap
CHARS = 64  # characters of a file that are encoded, for each token of the context


class InspectionError(KindlingError):
    """A text or a run that cannot be drawn."""


@dataclass
class InspectedRun:
    """What is drawn: a run with the weights of one checkpoint."""

    run: RunDirectory
    model: LanguageModel
    checkpoint: Path
    tokenizer: Tokenizer
    runtime: Runtime

    @cached_property
    def name(self) -> str:
        """The run's path, as others may see it, and the checkpoint's step, for titles."""
        return f"{public_path(self.run.path)}, step {int(self.checkpoint.name.removeprefix('step_')):,}"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics.jsonl."""
        return read_metrics(self.run.path / "metrics.jsonl")


def curves_of(lines: list[dict[str, Any]]) -> Curves:
    """Return the curves of a run's metrics; null and missing values are NaN. A validation has the tokens of its step.

    Validation losses are of the same texts as the first one: the whole split at the end of a run that was evaluated on a
    part of it is left out.
    """

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
        values = [row.get(name) for row in rows]
        return np.array([v if isinstance(v, (int, float)) else math.nan for v in values], dtype=np.float64)

    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    whole = max((line["val_tokens"] for line in validation if "val_tokens" in line), default=None)
    read = [
        line.get("val_tokens", whole) for line in validation
    ]  # earlier versions read the whole split, and do not say so
    validation = [line for line, n in zip(validation, read) if n == read[0]]
    steps, tokens = column(training, "step"), column(training, "tokens")
    val_steps = column(validation, "step")
    known = np.isfinite(tokens)
    # each step takes the same number of tokens
    each = tokens[known][-1] / steps[known][-1] if known.any() and steps[known][-1] > 0 else math.nan
    val_tokens = np.where(val_steps == 0, 0.0, val_steps * each)
    return Curves(
        steps=steps,
        tokens=tokens,
        loss=column(training, "loss"),
        lr=column(training, "lr"),
        grad_norm=column(training, "grad_norm"),
        skipped=column(training, "skipped_steps"),
        val_steps=val_steps,
        val_tokens=val_tokens,
        val_loss=column(validation, "val_loss"),
        val_perplexity=column(validation, "val_perplexity"),
        val_bits_per_byte=column(validation, "val_bits_per_byte"),
        val_read=next(iter(read), None),
    )


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """A weight matrix (out, in), or an embedding (entries, C), of a layer or of none."""

    kind: str
    layer: int | None
    weight: Tensor


def matrices(model: LanguageModel) -> dict[str, list[Matrix]]:
    """Return the model's matrices by kind, in the order of the forward pass; a tied head is listed as the embedding."""
    gpt = model.for_generation()  # for a transformers backbone a copy under our names
    tied = gpt.head.weight is gpt.wte.weight
    embedding = "token embedding, tied to the head" if tied else "token embedding"
    found = {embedding: [Matrix(embedding, None, gpt.wte.weight)]}
    if gpt.wtp is not None:
        found["pair embedding"] = [Matrix("pair embedding", None, gpt.wtp.weight)]
    if gpt.wpe is not None:
        found["position embedding"] = [Matrix("position embedding", None, gpt.wpe.weight)]
    for kind, owner in (("qkv", "attn"), ("proj", "attn"), ("up", "mlp"), ("gate", "mlp"), ("down", "mlp")):
        modules = [getattr(getattr(block, owner), kind) for block in gpt.blocks]
        own = [Matrix(kind, i, module.weight) for i, module in enumerate(modules) if module is not None]
        if own:
            found[kind] = own
    if not tied:
        found["head"] = [Matrix("head", None, gpt.head.weight)]
    return {kind: [Matrix(m.kind, m.layer, m.weight.detach().float()) for m in own] for kind, own in found.items()}


def histograms(found: dict[str, list[Matrix]]) -> dict[str, list[Histogram]]:
    """Return the distribution of each matrix's weights, from its smallest to its largest; sparse bins are joined."""
    out: dict[str, list[Histogram]] = {}
    for kind, own in found.items():
        limit = max(m.weight.abs().max().item() for m in own)
        _require_finite(limit, kind)
        limit = limit or 1.0  # for a matrix of zeros
        edges = np.linspace(-limit, limit, BINS + 1)
        out[kind] = []
        for m in own:
            counts = torch.histc(m.weight, BINS, -limit, limit).cpu().numpy().astype(np.float64)
            counts, ends = joined(counts, edges, m.weight.min().item(), m.weight.max().item())
            density = counts / counts.sum() / np.diff(ends)
            out[kind].append(Histogram(m.layer, density, ends, m.weight.std(correction=0).item()))
    return out


def joined(counts: np.ndarray, edges: np.ndarray, lowest: float, highest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts (M,) and edges (M + 1,) of a histogram with at least FEWEST in each bin, if there are as many at all.

    The outer edges are the smallest and the largest weight, so a picture shows where each tail ends.
    """
    if lowest == highest:
        return counts, edges
    kept, ends, held = [], [lowest], 0.0
    for count, end in zip(counts.tolist(), edges[1:].tolist()):
        held += count
        if held >= FEWEST and end > ends[-1]:
            kept.append(held)
            ends.append(end)
            held = 0.0
    if not kept:
        return np.array([held]), np.array([lowest, highest])
    kept[-1] += held  # too few for a bin of their own
    while len(kept) > 1 and ends[-2] >= highest:  # rounding
        kept[-2:] = [sum(kept[-2:])]
        del ends[-2]
    return np.array(kept), np.array([*ends[:-1], highest])


def _require_finite(value: float, kind: str) -> None:
    if not math.isfinite(value):
        raise InspectionError(
            f"the weights of the model must be finite, but some of {kind} are not; fall back to an older checkpoint"
        )


def spectrum(m: Matrix) -> Spectrum:
    """Return the largest singular value of a matrix and its stable rank ||W||_F² / ||W||₂² (Rudelson and Vershynin 2007)."""
    w = m.weight if m.weight.size(0) >= m.weight.size(1) else m.weight.T  # (long, short)
    scale = w.abs().max().item() or 1.0  # scaled, because squares of small weights would become 0
    gram = ((w / scale).T @ (w / scale)).cpu().double()  # (short, short), on the CPU, which has float64
    largest = math.sqrt(max(0.0, torch.linalg.eigvalsh(gram)[-1].item()))
    norm = scale * largest
    stable = math.nan if largest == 0 else gram.diagonal().sum().item() / largest**2
    return Spectrum(m.layer, norm if largest else math.nan, stable, w.size(1))


def spectra(found: dict[str, list[Matrix]]) -> dict[str, list[Spectrum]]:
    """Return the spectrum of each matrix."""
    return {kind: [spectrum(m) for m in own] for kind, own in found.items()}


# -- a text -----------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """A text to draw: its token ids (N,), for which tokens the loss is shown (N,), and `what`, which says which text it is.

    If `started`, the first id is the token that begins a document in training, and not part of the text. `name` is shorter than
    `what`: it does not say how much of the text is there. `first_line` is the number of its first line, from 1.
    """

    ids: list[int]
    predicted: list[bool]
    what: str
    started: bool
    name: str = "the text"
    first_line: int = 1


def given_text(tokenizer: Tokenizer, text: str, block_size: int, name: str, crop: bool = False) -> Text:
    """Return a text as the model reads it, after the token that begins a document.

    Raises InspectionError if it is empty, or longer than the context; with `crop` a longer text is cut at its end. Raises
    TokenizerError if the tokenizer cannot encode it.
    """
    if not text:
        raise InspectionError(f"{name} must hold a text, but is empty; give some, or leave it out for held-out text")
    # of a large file, only what can be shown is encoded
    ids = tokenizer.encode(text[: CHARS * block_size] if crop else text)
    if len(ids) > block_size and not crop:
        raise InspectionError(
            f"{name} must fit the model's context of {block_size:,} tokens, but has {len(ids):,}; shorten it, or put it "
            f"in a file for --file, of which the beginning is taken"
        )
    kept = ids[:block_size]
    cropped = len(ids) > block_size or (crop and len(text) > CHARS * block_size)
    what = f"the first {len(kept):,} tokens of {name}" if cropped else name
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return Text([start, *kept], [False] + [True] * len(kept), what, started=True, name=name)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds; empty while a character is incomplete."""
    stream = TextStream(tokenizer)
    out = [stream.add(i) for i in ids]
    return [*out[:-1], out[-1] + stream.finish()] if out else []


def losses_of(model: LanguageModel, text: Text, runtime: Runtime) -> np.ndarray:
    """Return each token's loss in nats, (N,) float64; NaN where it is not predicted."""
    ids = np.array(text.ids, dtype=np.int64)
    targets = np.where(text.predicted, ids, IGNORE)[1:]
    losses = np.full(len(ids), math.nan)
    if len(ids) > 1 and any(text.predicted[1:]):
        with torch.no_grad():
            found = token_losses(model, Batch(ids[None, :-1], targets[None]), runtime)
        losses[1:][targets != IGNORE] = found
    return losses


def units(model: LanguageModel, tokenizer: Tokenizer, text: Text, runtime: Runtime) -> list[Unit]:
    """Return each token's text and loss; tokens that spell one character together are one unit."""
    losses = losses_of(model, text, runtime)
    first = int(text.started)
    out, held = [], 0.0
    for piece, loss in zip(pieces(tokenizer, text.ids[first:]), losses[first:].tolist()):
        if piece:
            out.append(Unit(piece, held + loss))
        held = 0.0 if piece else held + loss
    return out


def attention(model: LanguageModel, tokenizer: Tokenizer, text: Text) -> tuple[np.ndarray, list[str]]:
    """Return all heads' attention weights (n_layer, n_head, T, T) for the text's first tokens, at most 48, and their texts."""
    T = min(LABELLED, len(text.ids), model.cfg.block_size)
    idx = torch.tensor([text.ids[:T]], device=model.head.weight.device)  # (1, T)
    weights = model.attention_weights(idx)[:, 0].float().cpu().numpy()  # (n_layer, n_head, T, T)
    first = int(text.started)
    names = ["(start)"] * first + [piece or "…" for piece in pieces(tokenizer, text.ids[first:T])]
    return weights, names
