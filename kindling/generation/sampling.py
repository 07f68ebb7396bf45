"""Samples the next token from logits: filters the distribution, then draws from it.

    next_token_probabilities(logits, Sampling(temperature=0.8, top_k=50, min_p=0.05))

The filters have the order of transformers' processors: repetition penalty, temperature, top-k, top-p, min-p. Limit: there is
no beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kindling.generation.settings import GenerationError, Sampling
from kindling.generation.text_stream import EndIds, all_ends

if TYPE_CHECKING:
    import torch


def apply_repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the logits (..., V), lowered for the tokens that were `seen` (..., V) bool.

    Positive logits are divided by the penalty, negative ones multiplied: division would make those more likely.
    Source: CTRL (Keskar et al. 2019), section 4.1, with the sign as in transformers.
    """
    import torch

    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_token_probabilities(
    logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the distributions (..., V) to sample from, given logits (..., V).

    `seen` (..., V) bool says which tokens get the repetition penalty. Of equally likely tokens, no more than `top_k` are kept.
    Sources: nucleus sampling, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
    """
    import torch

    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        # by index rather than by a threshold, or ties would keep more than top_k
        kept, order = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, order, kept)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of the tokens before; so the first is always kept
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


@dataclass
class SamplingState:
    """What the draws of one text depend on beside the logits: its random state, and the tokens it already has."""

    generator: torch.Generator
    seen: torch.Tensor | None = None
    """(V,) bool. None without a repetition penalty."""

    @classmethod
    def of(cls, sampling: Sampling, seed: int, ids: Sequence[int], vocab_size: int, eos_id: EndIds) -> SamplingState:
        """Return the state after the prompt `ids`.

        A token that ends a text gets no penalty: a conversation has many of them, and its next answer must be able to end.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        if sampling.repetition_penalty == 1:
            return cls(generator)
        seen = torch.zeros(vocab_size, dtype=torch.bool)
        ends = all_ends(eos_id)
        seen[[token for token in ids if token not in ends]] = True
        return cls(generator, seen)


def sample_tokens(logits: torch.Tensor, sampling: Sampling, sampling_states: Sequence[SamplingState]) -> list[int]:
    """Return the next token for each row of logits (B, V), drawn with the row's own sampling_state, which is updated."""
    import torch

    from kindling.device import has_float64

    if not has_float64(logits.device):
        logits = logits.cpu()
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.stack([state.seen for state in sampling_states if state.seen is not None])  # (B, V)
        seen = seen.to(logits.device)
    if sampling.is_greedy:
        if seen is not None:
            logits = apply_repetition_penalty(logits.float(), seen, sampling.repetition_penalty)
        tokens = logits.argmax(-1).tolist()
    else:
        up_to = next_token_probabilities(logits, sampling, seen).double().cumsum(-1)  # (B, V)
        # drawn on the CPU, so the numbers are the same on every device
        drawn = torch.stack([torch.rand(1, generator=d.generator, dtype=torch.float64) for d in sampling_states]).to(
            logits.device
        )  # (B, 1)
        drawn_tokens = torch.searchsorted(up_to, drawn * up_to[:, -1:], right=True)  # (B, 1)
        tokens = drawn_tokens.masked_fill(~up_to[:, -1:].isfinite(), -1).squeeze(1).tolist()  # the device is read once
        if -1 in tokens:
            raise GenerationError(
                "a model's logits must be numbers, but are not; fall back to an older checkpoint, or use --precision fp32"
            )
    for sampling_state, token in zip(sampling_states, tokens):
        if sampling_state.seen is not None:
            sampling_state.seen[token] = True
    return tokens
