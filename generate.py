"""Continue a prompt with a trained run.

    python generate.py runs/demo --prompt "def fib(n):"

Sampling by temperature, top-k and top-p, or greedy; it stops at end of text. A prompt longer than the context is
cropped from the left. Limit: no key / value cache, so each token costs a pass over the whole context.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from cli import parse_cli, run_script
from config import KindlingError

if TYPE_CHECKING:
    import torch

    from model import LanguageModel
    from tokenizer import Tokenizer


class GenerationError(KindlingError):
    """Settings that nothing can be sampled with."""


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
    """Return the distribution (V,) that is sampled from, of logits (V,): temperature, then top-k, then top-p."""
    import torch

    logits = logits.float()
    if sampling.greedy or sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        kept = logits.topk(sampling.top_k).indices  # indices, not a threshold: ties must not let more through
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the tokens ahead; the first is always kept
        probabilities = probabilities.index_fill(0, order[before >= sampling.top_p], 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


def generate(model: LanguageModel, ids: list[int], sampling: Sampling, eos_id: int) -> list[int]:
    """Return the new token ids after the prompt `ids` (at least one), without the end-of-text token that ended them.

    The prompt is one document, also for a model trained with `document_mask`: an end-of-text token at its beginning is
    position 0, as in training; one further on, which no text encodes to, would not hide what precedes it.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)  # on the CPU: the same draws on every device
    new: list[int] = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # lengths change with each token
        while len(new) < sampling.max_new_tokens:
            context = torch.tensor([(ids + new)[-model.cfg.block_size :]], device=device)  # (1, T)
            logits = model.head(model.hidden(context)[:, -1])[0]  # (V,)
            token = int(torch.multinomial(next_token_probabilities(logits.cpu(), sampling), 1, generator=generator))
            if token == eos_id:
                break
            new.append(token)
    return new


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


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Path | None] = None
    """The run's folder, or its name under runs/. The newest if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    prompt: str = ""
    """The text to continue; empty starts a new document."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()


def main(argv: list[str] | None = None) -> int:
    """Print a continuation of the prompt."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    flags.sampling.check()
    prompt = os.fsencode(flags.prompt).decode("utf-8", "replace")  # UTF-8 whatever the locale says
    from checkpoint import find_run, load_model
    from device import resolve

    run = find_run(flags.run)
    model, _ = load_model(run, resolve(replace(run.config().train, device=flags.device)).device)
    print(prompt + complete(model, run.tokenizer(), prompt, flags.sampling))
    return 0


if __name__ == "__main__":
    run_script(main)
