"""What is drawn of a run and its model, as numbers.

    curves = curves_of(read_metrics(run.path / "metrics.jsonl"))
    spectra(matrices(model))["qkv"][0].norm        # the largest singular value of layer 0's
    tokens = units(model, tokenizer, text, runtime)

Limit: singular values come from the Gram matrix of the smaller side, so only those near the largest are exact; the smallest
are not asked for.
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
from kindling.data.examples import Examples
from kindling.data.shards import Batch, TokenDataset
from kindling.device import Runtime
from kindling.errors import KindlingError
from kindling.evaluation.perplexity import token_losses
from kindling.generation.completion import TextStream
from kindling.plots.figures import Curves, Histogram, Spectrum
from kindling.plots.text_plots import Unit
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.metrics import read_metrics
from kindling.tokenization.tokenizer import Tokenizer
from model import LanguageModel

BINS = 81
LINES = 30  # of a held-out document
FEWEST = 8  # lines, below which a longer document is looked for
PROBED = 200  # documents of a split that are looked at
LABELLED = 48  # tokens of a heatmap
CHARS = 64  # for each token of the context, that are encoded of a file


class InspectionError(KindlingError):
    """A text that cannot be looked at, or a run without what is to be drawn."""


@dataclass
class Subject:
    """What is looked at: a run with the weights of one checkpoint."""

    run: RunDirectory
    model: LanguageModel
    checkpoint: Path
    tokenizer: Tokenizer
    runtime: Runtime

    @cached_property
    def name(self) -> str:
        """The run and its step, for titles."""
        return f"{self.run.path}, step {int(self.checkpoint.name.removeprefix('step_')):,}"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics."""
        return read_metrics(self.run.path / "metrics.jsonl")


def curves_of(lines: list[dict[str, Any]]) -> Curves:
    """Return the curves of a run's metrics; what is null or missing is NaN. A validation's tokens are those of its step."""

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
        values = [row.get(name) for row in rows]
        return np.array([v if isinstance(v, (int, float)) else math.nan for v in values], dtype=np.float64)

    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
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
    )


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """A weight matrix (out, in), or an embedding (entries, C), of a layer or of none."""

    kind: str
    layer: int | None
    weight: Tensor


def matrices(model: LanguageModel) -> dict[str, list[Matrix]]:
    """Return the model's matrices by kind, in the order of the computation; a tied head is its embedding."""
    gpt = model.for_generation()  # of a transformers backbone a copy under our names
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
    """Return the distribution of each matrix's weights, all of a kind between the same edges, from the least to the greatest."""
    out: dict[str, list[Histogram]] = {}
    for kind, own in found.items():
        limit = max(m.weight.abs().max().item() for m in own)
        _require_finite(limit, kind)
        limit = limit or 1.0  # of zeros alone
        edges = np.linspace(-limit, limit, BINS + 1)
        out[kind] = []
        for m in own:
            counts = torch.histc(m.weight, BINS, -limit, limit).cpu().numpy().astype(np.float64)
            density = counts / counts.sum() / (edges[1] - edges[0])
            out[kind].append(Histogram(m.layer, density, edges, m.weight.std(correction=0).item()))
    return out


def _require_finite(value: float, kind: str) -> None:
    if not math.isfinite(value):
        raise InspectionError(
            f"the weights of the model must be finite, but some of {kind} are not; fall back to an older checkpoint"
        )


def spectrum(m: Matrix) -> Spectrum:
    """Return the largest singular value of a matrix, and its stable rank ||W||_F² / ||W||₂² (Rudelson and Vershynin 2007)."""
    w = m.weight if m.weight.size(0) >= m.weight.size(1) else m.weight.T  # (long, short)
    scale = w.abs().max().item() or 1.0  # squares of small weights must not vanish
    gram = ((w / scale).T @ (w / scale)).cpu().double()  # (short, short), where there is float64
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
    """Token ids (N,) that are looked at; `predicted` (N,) bool says whose loss is shown. `what` says which text it is.

    The first id is what the text begins with in training, and is `started`: no part of it.
    """

    ids: list[int]
    predicted: list[bool]
    what: str
    started: bool


def given_text(tokenizer: Tokenizer, text: str, block_size: int, name: str, crop: bool = False) -> Text:
    """Return a text as the model reads it, from the token that begins a document.

    Raises InspectionError if it is empty, or longer than the context unless `crop` takes its beginning; TokenizerError if
    the tokenizer cannot hold it.
    """
    if not text:
        raise InspectionError(f"{name} must hold a text, but is empty; give some, or leave it out for held-out text")
    # of a large file only as much is encoded as can be shown
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
    return Text([start, *kept], [False] + [True] * len(kept), what, started=True)


def held_out_text(dataset: TokenDataset, tokenizer: Tokenizer, block_size: int) -> Text:
    """Return the beginning of the first held-out document that decodes to itself and is not very short, or a conversation.

    Raises InspectionError if no document decodes to itself.
    """
    best: Text | None = None
    start, n_lines = 0, 0
    for number, length in enumerate(dataset.lengths[:PROBED].tolist()):
        ids = dataset.read(start, length).tolist()
        start += length
        text = _document(dataset, number, ids[:-1], tokenizer, block_size)
        if text is None:
            continue
        lines = tokenizer.decode(text.ids).count("\n")
        if best is None or lines > n_lines:
            best, n_lines = text, lines
        if n_lines >= FEWEST:
            break
    if best is None:
        raise InspectionError(
            f"the {dataset.split} split must hold a text that its tokens decode to, but the first "
            f"{len(dataset.lengths[:PROBED]):,} documents do not; give one with --text"
        )
    return best


def _document(dataset: TokenDataset, number: int, ids: list[int], tokenizer: Tokenizer, block_size: int) -> Text | None:
    """Return what is shown of a document's `ids`, or None if its text would come back as other tokens."""
    name = f"document {number:,} of the {dataset.split} split"
    if isinstance(dataset, Examples):
        predicted = dataset.example(number).supervised[: len(ids)].tolist()
        if "\ufffd" in tokenizer.decode(ids) or not ids:
            return None
        what = name.replace("document", "conversation") + ", of which the responses are predicted"
        return Text(ids[: block_size + 1], predicted[: block_size + 1], what, started=False)
    ids = [i for i in ids if i != tokenizer.bos_id]
    text = tokenizer.decode(ids)
    # a document of megabytes is not encoded again whole
    if "\ufffd" in text or not text.strip() or tokenizer.encode(text[:2000])[:50] != ids[:50]:
        return None
    beginning = "".join(text.splitlines(keepends=True)[:LINES])
    found = given_text(tokenizer, beginning, block_size, name, crop=True)
    found.what = f"the first {len(found.ids) - 1:,} of {len(ids):,} tokens of {name}"
    return found


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds: nothing where a character is not whole yet."""
    stream = TextStream(tokenizer)
    out = [stream.add(i) for i in ids]
    return [*out[:-1], out[-1] + stream.finish()] if out else []


def units(model: LanguageModel, tokenizer: Tokenizer, text: Text, runtime: Runtime) -> list[Unit]:
    """Return the loss of each token over the text that it spells; tokens that spell one character together are one."""
    ids = np.array(text.ids, dtype=np.int64)
    targets = np.where(text.predicted, ids, IGNORE)[1:]
    losses = np.full(len(ids), math.nan)
    if len(ids) > 1 and any(text.predicted[1:]):
        with torch.no_grad():
            found = token_losses(model, Batch(ids[None, :-1], targets[None]), runtime)
        losses[1:][targets != IGNORE] = found
    first = int(text.started)
    out, held = [], 0.0
    for piece, loss in zip(pieces(tokenizer, text.ids[first:]), losses[first:].tolist()):
        if piece:
            out.append(Unit(piece, held + loss))
        held = 0.0 if piece else held + loss
    return out


def attention(model: LanguageModel, tokenizer: Tokenizer, text: Text) -> tuple[np.ndarray, list[str]]:
    """Return all heads' weights (n_layer, n_head, T, T) of the text's first tokens, at most 48, and what these spell."""
    T = min(LABELLED, len(text.ids), model.cfg.block_size)
    idx = torch.tensor([text.ids[:T]], device=model.head.weight.device)  # (1, T)
    weights = model.attention_weights(idx)[:, 0].float().cpu().numpy()  # (n_layer, n_head, T, T)
    first = int(text.started)
    names = ["(start)"] * first + [piece or "…" for piece in pieces(tokenizer, text.ids[first:T])]
    return weights, names
