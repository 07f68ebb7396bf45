"""Generates token ids after a prompt: one text as a stream, or many prompts in a batch.

    for token in stream(model, ids, Sampling(), tokenizer.eos_id): ...
    for row in stream_batch(model, prompts, Sampling(), tokenizer.eos_id): ...  # each prompt gets the same as alone

Limit: in a stream, each token beyond the context costs a pass over the whole context; in a batch, a text ends there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from kindling.cache import PromptRows
from kindling.generation.sampling import Sampling, SamplingState, sample_tokens
from kindling.generation.text_stream import EndIds, all_ends
from model import GPT, LanguageModel

CHECK_EVERY = 8  # a caller sees a row after this many tokens again
TOKENS_A_PASS = 8192  # of prompts that are read together: enough to keep a GPU busy, and few beside a step of training

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
    model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: EndIds, allowed: Allowed | None = None
) -> Iterator[int]:
    """Yield the new token ids after the prompt `ids` (at least one) as they are sampled, from those that are `allowed`.

    The end-of-text token ends the stream and is not yielded. The prompt is one document, also for a model that was trained with
    `document_mask`: an end-of-text token at its beginning has position 0, as in training; a later one, which only a
    conversation has, does not hide the tokens before it. Beyond the context, the window moves on by one token at a time.
    """
    gpt = model.for_generation()
    block_size, cache = gpt.cfg.block_size, gpt.new_cache(1)
    device = cache.last.device
    ends = all_ends(eos_id)
    sampling_state = SamplingState.of(sampling, sampling.seed, ids, gpt.cfg.vocab_size, ends)
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
        if token in ends:
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
    eos_id: EndIds,
    seeds: Sequence[int] | None = None,
    n_rows: int = 32,
    begins: torch.Tensor | None = None,
    together: bool | None = None,
) -> Iterator[Row]:
    """Yield the row of each prompt after every CHECK_EVERY tokens, and when it has ended.

    `n_rows` rows are generated at a time; where one ends, the next prompt begins. A row ends at end of text, after
    `sampling.max_new_tokens`, when the context is full, or when the caller sets its `ended` to True. `seeds` are one for each
    prompt; without them each has `sampling.seed` and gets the same tokens as from `stream`. `begins` (V,) bool says which
    tokens may come first. `together`: read the prompts that begin at the same time in one pass, padded to one length, and wait
    until an eighth of the rows are free; None: on every device but the CPU, which gains nothing from it. Raises ValueError for
    a prompt that leaves no room in the context.
    """
    gpt = model.for_generation()
    for ids in prompts:
        if not 0 < len(ids) < gpt.cfg.block_size:
            raise ValueError(
                f"a prompt must have from 1 to {gpt.cfg.block_size - 1} tokens, but has {len(ids)}; crop it"
            )
    if seeds is None:
        seeds = [sampling.seed] * len(prompts)
    batch = _Batch(gpt, prompts, seeds, sampling, all_ends(eos_id), min(n_rows, max(1, len(prompts))), begins, together)
    while batch.begin() or batch.active:
        yield from batch.seen()
        if batch.active:
            batch.step()
            yield from batch.seen()


def passes(prompts: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Yield prompts, which come by length, in groups of at most TOKENS_A_PASS tokens with their padding, or of one prompt."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        if group and (len(group) + 1) * len(prompt) > TOKENS_A_PASS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


class _Batch:
    """The rows of a cache. Each continues its own prompt, and takes the next prompt when it has ended."""

    def __init__(
        self,
        gpt: GPT,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        ends: frozenset[int],
        n_rows: int,
        begins: torch.Tensor | None,
        together: bool | None,
    ):
        self.gpt, self.prompts, self.seeds, self.sampling = gpt, prompts, seeds, sampling
        self.ends = ends
        self.n_rows, self.cache = n_rows, gpt.new_cache(n_rows)
        self.device = self.cache.last.device
        self.together = self.device.type != "cpu" if together is None else together
        self.single = gpt.new_cache(0 if self.together else 1)
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
        while free := [place for place in range(self.n_rows) if place not in self.active]:
            if self.together and self.active and 8 * len(free) < self.n_rows:
                break  # a pass over few prompts takes as long as one over many
            numbers = list(itertools.islice(self.waiting, len(free)))
            if not numbers:
                break
            begun = True
            with reading():
                places = dict(zip(free, numbers))
                logits = self._read_together(places) if self.together else self._read(places)
                self._begin(places, logits)
        return begun

    def _read(self, places: dict[int, int]) -> torch.Tensor:
        """Read prompts into their places, one after another; return the logits (N, V) after each."""
        logits = []
        for place, number in places.items():
            if self.prompts[number] != self.read:
                self.read = self.prompts[number]
                self.single.lengths.zero_()
                self.first = self.gpt.forward_cached(torch.tensor([self.read], device=self.device), self.single)
            self.cache.copy_row(place, self.single)
            logits.append(self.first)
        return torch.cat(logits)

    def _read_together(self, places: dict[int, int]) -> torch.Tensor:
        """Read prompts into their places, many in one pass; return the logits (N, V) after each."""
        same: dict[tuple[int, ...], list[int]] = {}  # the places of each prompt
        for place, number in places.items():
            same.setdefault(tuple(self.prompts[number]), []).append(place)
        logits: dict[int, torch.Tensor] = {}
        for prompts in passes(sorted(same, key=len)):
            lengths = [len(prompt) for prompt in prompts]
            idx = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts])  # (N, T)
            rows = PromptRows(self.cache, [same[prompt][0] for prompt in prompts], lengths)
            for prompt, after in zip(prompts, self.gpt.forward_cached(idx.to(self.device), rows)):
                first, *others = same[prompt]
                logits[first] = after  # (V,)
                for place in others:
                    self.cache.copy_row(place, self.cache, first)
                    logits[place] = after
        return torch.stack([logits[place] for place in places])

    def _begin(self, places: dict[int, int], logits: torch.Tensor) -> None:
        """Give each new row its first token, from the logits (N, V) after its prompt."""
        if self.begins is not None:
            logits = logits.masked_fill(~self.begins, -torch.inf)
        states = []
        for place, number in places.items():
            prompt = self.prompts[number]
            limit = min(self.sampling.max_new_tokens, self.gpt.cfg.block_size - len(prompt))
            states.append(
                SamplingState.of(self.sampling, self.seeds[number], prompt, self.gpt.cfg.vocab_size, self.ends)
            )
            self.active[place] = Row(number, states[-1], limit)
        for place, token in zip(places, sample_tokens(logits, self.sampling, states)):
            self._take(place, token)

    def step(self) -> None:
        """Give each active row its next token."""
        places = sorted(self.active)
        last = [self.active[place].out[-1] if place in self.active else 0 for place in range(self.n_rows)]
        self.cache.lengths[[place for place in range(self.n_rows) if place not in self.active]] = 0  # idle rows
        with reading():
            logits = self.gpt.forward_cached(torch.tensor(last, device=self.device)[:, None], self.cache)  # (B, V)
            if len(places) < self.n_rows:
                logits = logits[places]
            tokens = sample_tokens(logits, self.sampling, [self.active[place].sampling_state for place in places])
        for place, token in zip(places, tokens):
            self._take(place, token)

    def _take(self, place: int, token: int) -> None:
        """Add a token to a row, which may end it."""
        row = self.active[place]
        if token not in self.ends:
            row.out.append(token)
        row.ended = token in self.ends or len(row.out) >= row.limit
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
