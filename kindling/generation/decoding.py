"""Generates token ids after a prompt: one text as a stream, or many prompts in a batch.

    for token in stream(model, ids, Sampling(), tokenizer.eos_id): ...
    for row in stream_batch(model, prompts, Sampling(), tokenizer.eos_id): ...  # each prompt gets the same as alone

Limit: in a stream, each token beyond the context costs a pass over the whole context; in a batch, a text ends there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from kindling.generation.sampling import Sampling, SamplingState, sample_tokens
from model import GPT, LanguageModel

CHECK_EVERY = 8  # a caller sees a row after this many tokens again

Allowed = Callable[[Sequence[int]], np.ndarray | None]
"""Takes the new tokens so far; returns which tokens may come next, (V,) bool, or None for all."""


@contextmanager
def reading() -> Iterator[None]:
    """Run a pass without gradients. Leave it before each yield, or the caller would run without gradients too."""
    # lengths change with each token, so a compiled model runs uncompiled; if nothing was compiled, do not import the compiler
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), compiler:
        yield


def stream(
    model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: int, allowed: Allowed | None = None
) -> Iterator[int]:
    """Yield the new token ids after the prompt `ids` (at least one) as they are sampled, from those that are `allowed`.

    The end-of-text token ends the stream and is not yielded. The prompt is one document, also for a model that was trained with
    `document_mask`: an end-of-text token at its beginning has position 0, as in training; a later one, which only a
    conversation has, does not hide the tokens before it. Beyond the context, the window moves on by one token at a time.
    """
    gpt = model.for_generation()
    block_size, cache = gpt.cfg.block_size, gpt.new_cache(1)
    device = cache.lengths.device
    sampling_state = SamplingState.of(sampling, sampling.seed, ids, gpt.cfg.vocab_size, eos_id)
    ids, n_prompt, n_read = list(ids), len(ids), 0
    for _ in range(sampling.max_new_tokens):
        if len(ids) > block_size:  # all positions change, so the cache is void
            n_read = len(ids) - block_size
            cache.lengths.zero_()
        with reading():
            logits = gpt.forward_cached(torch.tensor([ids[n_read:]], device=device), cache)  # (1, V)
            if allowed is not None and (mask := allowed(ids[n_prompt:])) is not None:
                logits = logits.masked_fill(torch.from_numpy(~mask).to(device), -torch.inf)
            (token,) = sample_tokens(logits, sampling, [sampling_state])
        if token == eos_id:
            return
        n_read = len(ids)
        ids.append(token)
        yield token


@dataclass
class Row:
    """One text of a batch: the new tokens after the prompt with this number."""

    number: int
    sampling_state: SamplingState
    limit: int
    """The most tokens it can get: `max_new_tokens`, or what the context has left."""
    out: list[int] = field(default_factory=list)
    ended: bool = False
    """It gets no more tokens. The caller sets it to end the row early."""


def stream_batch(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    eos_id: int,
    seeds: Sequence[int] | None = None,
    n_rows: int = 32,
    begins: torch.Tensor | None = None,
) -> Iterator[Row]:
    """Yield the row of each prompt after every CHECK_EVERY tokens, and when it has ended.

    `n_rows` rows are generated at a time; where one ends, the next prompt begins. A row ends at end of text, after
    `sampling.max_new_tokens`, when the context is full, or when the caller sets its `ended` to True. `seeds` are one for each
    prompt; without them each has `sampling.seed` and gets the same tokens as from `stream`. `begins` (V,) bool says which
    tokens may come first. Raises ValueError for a prompt that leaves no room in the context.
    """
    gpt = model.for_generation()
    for ids in prompts:
        if not 0 < len(ids) < gpt.cfg.block_size:
            raise ValueError(
                f"a prompt must have from 1 to {gpt.cfg.block_size - 1} tokens, but has {len(ids)}; crop it"
            )
    if seeds is None:
        seeds = [sampling.seed] * len(prompts)
    batch = _Batch(gpt, prompts, seeds, sampling, eos_id, min(n_rows, max(1, len(prompts))), begins)
    while batch.begin() or batch.active:
        yield from batch.seen()
        if batch.active:
            batch.step()
            yield from batch.seen()


class _Batch:
    """The rows of a cache. Each continues its own prompt, and takes the next prompt when it has ended."""

    def __init__(
        self,
        gpt: GPT,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        eos_id: int,
        n_rows: int,
        begins: torch.Tensor | None,
    ):
        self.gpt, self.prompts, self.seeds, self.sampling = gpt, prompts, seeds, sampling
        self.eos_id = eos_id
        self.n_rows, self.cache, self.single = n_rows, gpt.new_cache(n_rows), gpt.new_cache(1)
        self.device = self.cache.lengths.device
        self.begins = None if begins is None else begins.to(self.device)
        self.active: dict[int, Row] = {}  # by row of the cache
        self.waiting = iter(range(len(prompts)))
        # the prompt that `single` holds; samples of one prompt come one after another, so it is often the next one, too
        self.read: list[int] = []
        self.first = torch.empty(0)  # (1, V), the logits after it
        self.due: list[tuple[int, Row]] = []  # rows to yield, each with its place in the cache

    def begin(self) -> bool:
        """Begin the next prompts in the free rows; return whether any began."""
        begun = False
        for place in range(self.n_rows):
            while place not in self.active and (number := next(self.waiting, None)) is not None:
                begun = True
                self._begin(place, number)
        return begun

    def _begin(self, place: int, number: int) -> None:
        prompt = self.prompts[number]
        with reading():
            if prompt != self.read:
                self.read = prompt
                self.single.lengths.zero_()
                self.first = self.gpt.forward_cached(torch.tensor([prompt], device=self.device), self.single)
                if self.begins is not None:
                    self.first = self.first.masked_fill(~self.begins, -torch.inf)
            self.cache.copy_row(place, self.single)
            limit = min(self.sampling.max_new_tokens, self.gpt.cfg.block_size - len(prompt))
            sampling_state = SamplingState.of(
                self.sampling, self.seeds[number], prompt, self.gpt.cfg.vocab_size, self.eos_id
            )
            self.active[place] = Row(number, sampling_state, limit)
            self._take(place, sample_tokens(self.first, self.sampling, [sampling_state])[0])

    def step(self) -> None:
        """Give each active row its next token."""
        places = sorted(self.active)
        last = [self.active[place].out[-1] if place in self.active else 0 for place in range(self.n_rows)]
        self.cache.lengths[[place for place in range(self.n_rows) if place not in self.active]] = 0  # idle rows
        with reading():
            logits = self.gpt.forward_cached(torch.tensor(last, device=self.device)[:, None], self.cache)  # (B, V)
            tokens = sample_tokens(
                logits[places], self.sampling, [self.active[place].sampling_state for place in places]
            )
        for place, token in zip(places, tokens):
            self._take(place, token)

    def _take(self, place: int, token: int) -> None:
        """Add a token to a row, which may end it."""
        row = self.active[place]
        if token != self.eos_id:
            row.out.append(token)
        row.ended = token == self.eos_id or len(row.out) >= row.limit
        if row.ended:
            del self.active[place]
        if row.ended or len(row.out) % CHECK_EVERY == 0:
            self.due.append((place, row))

    def seen(self) -> Iterator[Row]:
        """Yield the rows that are due, and free the place of each that the caller ends."""
        while self.due:
            place, row = self.due.pop(0)
            was_active = not row.ended
            yield row
            if was_active and row.ended:
                del self.active[place]
