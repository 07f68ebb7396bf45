"""A model's tokens after those of a prompt: one text as a stream, or many together.

    for token in stream(model, ids, Sampling(), tokenizer.eos_id): ...
    for row in stream_batch(model, prompts, Sampling(), tokenizer.eos_id): ...  # to each prompt what it gets alone

Limit: in a stream, text beyond the context costs a pass over the whole context for each token; in a batch, it ends there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from kindling.generation.sampling import Drawer, Sampling, draw
from model import GPT, LanguageModel

CHECK_EVERY = 8  # tokens after which a caller sees a row again

Allowed = Callable[[Sequence[int]], np.ndarray | None]
"""Gets the new tokens so far and returns which may come next, (V,) bool, or None for all."""


@contextmanager
def _reading() -> Iterator[None]:
    """Enter what a pass needs. It is left before each yield, or whoever takes the tokens would run without gradients."""
    # lengths change with each token, so a compiled model runs as it is; without any, asking would import for seconds
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), compiler:
        yield


def stream(
    model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: int, allowed: Allowed | None = None
) -> Iterator[int]:
    """Yield the new token ids after the prompt `ids` (at least one) as they are sampled, from those that are `allowed`.

    The end-of-text token ends them and is not among them. The prompt is one document, also for a model trained with
    `document_mask`: an end-of-text token at its beginning is position 0, as in training; one further on, which only a
    conversation has, does not hide what precedes it. Beyond the context, the window moves on token by token.
    """
    gpt = model.for_generation()
    block_size, cache = gpt.cfg.block_size, gpt.new_cache(1)
    device = cache.lengths.device
    drawer = Drawer.of(sampling, sampling.seed, ids, gpt.cfg.vocab_size, eos_id)
    ids, n_prompt, n_read = list(ids), len(ids), 0
    for _ in range(sampling.max_new_tokens):
        if len(ids) > block_size:  # every position changes, and with them all that is cached
            n_read = len(ids) - block_size
            cache.lengths.zero_()
        with _reading():
            logits = gpt.read(torch.tensor([ids[n_read:]], device=device), cache)  # (1, V)
            if allowed is not None and (mask := allowed(ids[n_prompt:])) is not None:
                logits = logits.masked_fill(torch.from_numpy(~mask).to(device), -torch.inf)
            (token,) = draw(logits, sampling, [drawer])
        if token == eos_id:
            return
        n_read = len(ids)
        ids.append(token)
        yield token


@dataclass
class Row:
    """One text that is being written: the new tokens of the prompt with this number."""

    number: int
    drawer: Drawer
    limit: int
    """The most tokens that it can have: of its sampling, or of the context."""
    out: list[int] = field(default_factory=list)
    ended: bool = False
    """No more tokens come. Whoever has seen enough sets it."""


def stream_batch(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    eos_id: int,
    seeds: Sequence[int] | None = None,
    n_rows: int = 32,
    begins: torch.Tensor | None = None,
) -> Iterator[Row]:
    """Yield the row of each prompt when it has ended, and before that after every CHECK_EVERY tokens.

    `n_rows` are generated at a time; where one ends, the next prompt begins. A row ends at end of text, after
    `sampling.max_new_tokens`, where the context is full, or when its `ended` is set to True. `seeds` are those of the prompts;
    without them each has `sampling.seed`, and gets what it gets from `stream`. `begins` (V,) bool says what a first token may
    be. Raises ValueError for a prompt that leaves no room in the context.
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
    """The rows of a cache: each writes behind a prompt of its own, and is free for the next when that has ended."""

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
        self.read: list[int] = []  # the prompt that `single` holds: samples of one prompt follow one another
        self.first = torch.empty(0)  # (1, V), the logits behind it
        self.due: list[tuple[int, Row]] = []  # what the caller has yet to see, with its row of the cache

    def begin(self) -> bool:
        """Begin the next prompts in the rows that are free; return whether there were any."""
        begun = False
        for place in range(self.n_rows):
            while place not in self.active and (number := next(self.waiting, None)) is not None:
                begun = True
                self._begin(place, number)
        return begun

    def _begin(self, place: int, number: int) -> None:
        prompt = self.prompts[number]
        with _reading():
            if prompt != self.read:
                self.read = prompt
                self.single.lengths.zero_()
                self.first = self.gpt.read(torch.tensor([prompt], device=self.device), self.single)
                if self.begins is not None:
                    self.first = self.first.masked_fill(~self.begins, -torch.inf)
            self.cache.copy_row(place, self.single)
            limit = min(self.sampling.max_new_tokens, self.gpt.cfg.block_size - len(prompt))
            drawer = Drawer.of(self.sampling, self.seeds[number], prompt, self.gpt.cfg.vocab_size, self.eos_id)
            self.active[place] = Row(number, drawer, limit)
            self._take(place, draw(self.first, self.sampling, [drawer])[0])

    def step(self) -> None:
        """Give each active row its next token."""
        places = sorted(self.active)
        last = [self.active[place].out[-1] if place in self.active else 0 for place in range(self.n_rows)]
        self.cache.lengths[[place for place in range(self.n_rows) if place not in self.active]] = 0  # idle rows
        with _reading():
            logits = self.gpt.read(torch.tensor(last, device=self.device)[:, None], self.cache)  # (B, V)
            tokens = draw(logits[places], self.sampling, [self.active[place].drawer for place in places])
        for place, token in zip(places, tokens):
            self._take(place, token)

    def _take(self, place: int, token: int) -> None:
        """Add a token to a row, which it may end."""
        row = self.active[place]
        if token != self.eos_id:
            row.out.append(token)
        row.ended = token == self.eos_id or len(row.out) >= row.limit
        if row.ended:
            del self.active[place]
        if row.ended or len(row.out) % CHECK_EVERY == 0:
            self.due.append((place, row))

    def seen(self) -> Iterator[Row]:
        """Yield the rows that are due, and free those that the caller ends."""
        while self.due:
            place, row = self.due.pop(0)
            was_active = not row.ended
            yield row
            if was_active and row.ended:
                del self.active[place]
