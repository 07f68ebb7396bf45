"""Continue a prompt with a trained run, or talk to one that was fine-tuned.

    python generate.py runs/demo --prompt "def fib(n):"
    python generate.py runs/demo-sft --chat

Sampling by temperature, top-k and top-p, or greedy; it stops at end of text. A prompt longer than the context is
cropped from the left; a conversation never is: it loses its oldest exchanges, and an answer ends where the context does.
Many prompts are continued together by `generate_batch`. Limit: text beyond the context costs a pass over the whole context
for each token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from cli import parse_cli, run_script
from config import KindlingError
from prompts import Exchange, encode

if TYPE_CHECKING:
    import torch

    from checkpoint import RunDirectory
    from model import LanguageModel
    from tokenizer import Tokenizer


CHECK_EVERY = 8  # tokens between two questions to a caller whether a row is finished


class GenerationError(KindlingError):
    """Settings that nothing can be sampled with, or a question that cannot be answered."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    """Stop after this many tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 is greedy."""
    top_k: int | None = 50
    """Keep only this many most likely tokens. None: all."""
    top_p: float = 1.0
    """Keep only the most likely tokens that together have this probability (nucleus sampling)."""
    greedy: bool = False
    """Always take the most likely token."""
    seed: int = 0
    """The same seed gives the same text."""

    def check(self) -> None:
        """Raise GenerationError for a value that cannot be used."""
        for name, holds, must in (
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or 0.01 <= self.temperature <= 100,
                "from 0.01 to 100, or 0 for greedy",
            ),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise GenerationError(f"--{name} must be {must}, but is {getattr(self, name.replace('-', '_'))}")


def next_token_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distributions (..., V) that are sampled from, of logits (..., V): temperature, then top-k, then top-p."""
    import torch

    logits = logits.float()
    if sampling.greedy or sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        # by index, not by a threshold: ties must not let more through
        kept, order = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, order, kept)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the tokens ahead; the first is always kept
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))
    return probabilities


def _drawn(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Return the next token of each row of logits (B, V), each drawn by its own generator."""
    import torch

    logits = logits.cpu()  # the same draws on every device
    if sampling.greedy or sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    up_to = next_token_probabilities(logits, sampling).double().cumsum(-1)  # (B, V)
    drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # (B, 1)
    return torch.searchsorted(up_to, drawn * up_to[:, -1:], right=True).squeeze(1).tolist()


def stream(model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: int) -> Iterator[int]:
    """Yield the new token ids after the prompt `ids` (at least one) as they are sampled.

    The end-of-text token ends them and is not among them. The prompt is one document, also for a model trained with
    `document_mask`: an end-of-text token at its beginning is position 0, as in training; one further on, which only a
    conversation has, does not hide what precedes it. Beyond the context, the window moves on token by token.
    """
    import torch

    gpt = model.for_generation()
    block_size, cache = gpt.cfg.block_size, gpt.new_cache(1)
    device = cache.lengths.device
    generator = torch.Generator().manual_seed(sampling.seed)
    ids, n_read = list(ids), 0
    for _ in range(sampling.max_new_tokens):
        if len(ids) > block_size:  # every position changes, and with them all that is cached
            n_read = len(ids) - block_size
            cache.lengths.zero_()
        # left before each yield, or whoever takes the tokens would run without gradients too
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # lengths change with each token
            logits = gpt.read(torch.tensor([ids[n_read:]], device=device), cache)  # (1, V)
            (token,) = _drawn(logits, sampling, [generator])
        if token == eos_id:
            return
        n_read = len(ids)
        ids.append(token)
        yield token


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    eos_id: int,
    seeds: Sequence[int] | None = None,
    n_rows: int = 32,
    finished: Callable[[int, list[int]], bool] | None = None,
    progress: Callable[[int], object] | None = None,
    begins: torch.Tensor | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, `n_rows` of them generated at a time; where a row ends, the next prompt begins.

    A row ends at end of text, after `sampling.max_new_tokens`, where the context is full, or when `finished`, asked now and
    then with the prompt's number and its tokens so far, says so. `seeds` are those of the prompts; without them each has
    `sampling.seed`, and is what `generate` gives for it. `progress` is told of each prompt that is done: 1. `begins`
    (V,) bool says what a first token may be. Raises ValueError for a prompt that leaves no room in the context.
    """
    import torch

    gpt = model.for_generation()
    block_size, device = gpt.cfg.block_size, gpt.head.weight.device
    for ids in prompts:
        if not 0 < len(ids) < block_size:
            raise ValueError(f"a prompt must have from 1 to {block_size - 1} tokens, but has {len(ids)}; crop it")
    outputs: list[list[int]] = [[] for _ in prompts]
    waiting = iter(range(len(prompts)))
    cache, single = gpt.new_cache(min(n_rows, max(1, len(prompts)))), gpt.new_cache(1)
    active: dict[int, tuple[int, torch.Generator]] = {}  # by row of the cache: the prompt's number and its random state
    read: list[int] = []  # the prompt that `single` holds: samples of one problem follow one another
    first = torch.empty(0)  # (1, V)

    def take(row: int, token: int) -> None:
        """Add a token to a row, which it may end."""
        number = active[row][0]
        out = outputs[number]
        if token != eos_id:
            out.append(token)
        limit = min(sampling.max_new_tokens, block_size - len(prompts[number]))
        ended = token == eos_id or len(out) >= limit
        if ended or (finished is not None and len(out) % CHECK_EVERY == 0 and finished(number, out)):
            del active[row]
            if progress is not None:
                progress(1)

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        while True:
            for row in range(len(cache.lengths)):
                while row not in active and (number := next(waiting, None)) is not None:
                    if prompts[number] != read:
                        read = prompts[number]
                        single.lengths.zero_()
                        first = gpt.read(torch.tensor([read], device=device), single)
                        if begins is not None:
                            first = first.masked_fill(~begins.to(device), -torch.inf)
                    cache.copy_row(row, single)
                    seed = sampling.seed if seeds is None else seeds[number]
                    active[row] = number, torch.Generator().manual_seed(seed)
                    take(row, _drawn(first, sampling, [active[row][1]])[0])
            if not active:
                return outputs
            rows = sorted(active)
            last = [outputs[active[row][0]][-1] if row in active else 0 for row in range(len(cache.lengths))]
            idle = [row for row in range(len(cache.lengths)) if row not in active]
            cache.lengths[idle] = 0
            logits = gpt.read(torch.tensor(last, device=device)[:, None], cache)  # (B, V)
            for row, token in zip(rows, _drawn(logits[rows], sampling, [active[row][1] for row in rows])):
                take(row, token)


def generate(model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: int) -> list[int]:
    """Return all that `stream` yields."""
    return list(stream(model, ids, sampling, eos_id))


def complete(model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """Return the text that the model puts after `prompt`; an empty prompt starts a new document."""
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    ids = ids or [tokenizer.eos_id]  # in training, what follows an end of text is a new document
    if len(ids) > model.cfg.block_size:
        print(
            f"note: the prompt has {len(ids)} tokens and the context {model.cfg.block_size}: its beginning is cropped",
            file=sys.stderr,
        )
    return tokenizer.decode(generate(model, ids, sampling, tokenizer.eos_id))


class TextStream:
    """Turns token ids into text as they come, character by whole character.

    A character whose bytes are spread over tokens is held back until the last of them. The pieces joined are
    `tokenizer.decode` of all ids: SentencePiece may drop the space of a text's first token, so each token is decoded
    with all before it, which costs next to nothing beside the model's pass over them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = 0  # characters that were returned

    def add(self, token: int) -> str:
        """Return the text that is whole with this token, often none."""
        self._ids.append(token)
        # U+FFFD at the end is most likely a character of which bytes are still to come
        return self._beyond(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """Return what was held back: no more tokens will come."""
        return self._beyond(self._tokenizer.decode(self._ids))

    def _beyond(self, text: str) -> str:
        new = text[self._said :]
        self._said += len(new)
        return new


class Answer(NamedTuple):
    """What a model said to a question."""

    text: str
    stopped: bool
    """End of text came by itself, not by a limit."""
    cut_by: str = ""
    """Otherwise, the limit in words."""


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    template: str,
    exchanges: Sequence[Exchange],
    sampling: Sampling,
    say: Callable[[str], None] | None = None,
    room: int = 1,
) -> Answer:
    """Return the response to the last of the `exchanges`, which has none yet.

    `say` is called with each piece of text as it becomes whole. Prompt and response together are at most block_size
    tokens. The oldest exchanges are left out, with a note, while the response has room for fewer than `room` tokens.
    Raises GenerationError if the last one alone leaves no room for any.
    """
    block_size = model.cfg.block_size
    ids = _conversation_ids(tokenizer, template, exchanges, block_size, room)
    free = block_size - len(ids)
    limit = min(sampling.max_new_tokens, free)
    text, pieces, n_tokens = TextStream(tokenizer), [], 0

    def put(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if say is not None:
                say(piece)

    for token in stream(model, ids, replace(sampling, max_new_tokens=limit), tokenizer.eos_id):
        n_tokens += 1
        put(text.add(token))
    put(text.finish())
    cut_by = ""
    if n_tokens == limit:
        cut_by = f"the context of {block_size} tokens" if limit == free else f"--max-new-tokens {limit}"
    return Answer("".join(pieces), not cut_by, cut_by)


def _conversation_ids(
    tokenizer: Tokenizer, template: str, exchanges: Sequence[Exchange], block_size: int, room: int
) -> list[int]:
    """Return the ids of as many of the latest exchanges as leave `room`, at least of the last, which must leave some."""
    assert exchanges and not exchanges[-1].response, "the response is for the model to write"
    for dropped in range(len(exchanges)):  # whole exchanges: a model was never trained on half a template
        segments = encode(template, exchanges[dropped:], tokenizer)
        ids = [token for segment in segments for token in (*segment.prompt, *segment.response)]
        if len(ids) + room <= block_size:
            break
    if len(ids) >= block_size:
        raise GenerationError(
            f"a question must leave room for an answer in the context of {block_size} tokens, but has {len(ids)} "
            f"with its template; shorten it"
        )
    if dropped:
        what = "oldest exchange is" if dropped == 1 else f"{dropped} oldest exchanges are"
        print(f"note: the {what} left out: the context has {block_size} tokens", file=sys.stderr)
    return ids


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    prompt: str = ""
    """The text to continue; empty starts a new document."""
    chat: bool = False
    """Talk to a fine-tuned run: questions from the terminal or a pipe, answers as they are written."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()


def _require_chat(run: RunDirectory, prompt: str) -> None:
    """Raise GenerationError unless one can chat with the run, and nothing else was asked for."""
    if prompt:
        raise GenerationError(
            f"--prompt must be empty with --chat, which reads the questions itself, but is {prompt[:40]!r}; leave one out"
        )
    if not run.config().data.instructions:
        raise GenerationError(
            f"{run.path} must be a fine-tuned run to chat with, but has only seen documents; fine-tune it with "
            f"`python sft_train.py {run.path}`, or continue a text with --prompt"
        )


def _chat(run: RunDirectory, model: LanguageModel, sampling: Sampling) -> None:
    """Talk to the user with the template of the run, and with a memory if it was fine-tuned on conversations."""
    from chat import chat
    from examples import require_template
    from shards import read_manifest

    template, tokenizer, manifest = run.config().data.template, run.tokenizer(), read_manifest(run.data)
    require_template(manifest, template)
    room = min(sampling.max_new_tokens, model.cfg.block_size // 4)  # a memory must not crowd out the answer
    # torch imports for seconds at its first token, and is unusable if Ctrl-C stops the imports of an answer halfway
    generate(model, [tokenizer.eos_id], replace(sampling, max_new_tokens=1), tokenizer.eos_id)

    def reply(exchanges: list[Exchange], number: int, say: Callable[[str], None]) -> str:
        its_own = replace(sampling, seed=sampling.seed + number)
        return answer(model, tokenizer, template, exchanges, its_own, say, room).cut_by

    chat(f"{run.path}, template {template}", reply, remembers=manifest["max_exchanges"] > 1)


def main(argv: list[str] | None = None) -> int:
    """Print a continuation of the prompt, or chat."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    flags.sampling.check()
    prompt = os.fsencode(flags.prompt).decode("utf-8", "replace")  # UTF-8 whatever the locale says
    from checkpoint import find_run, load_model
    from device import resolve

    run = find_run(flags.run)
    if flags.chat:
        _require_chat(run, prompt)
    model, _ = load_model(run, resolve(replace(run.config().train, device=flags.device)).device)
    if flags.chat:
        _chat(run, model, flags.sampling)
        return 0
    print(prompt + complete(model, run.tokenizer(), prompt, flags.sampling))
    return 0


if __name__ == "__main__":
    run_script(main)
