"""Makes a Kindling model usable by lm-evaluation-harness, which asks for log-likelihoods and for text.

    lm = KindlingLM(model, tokenizer, device, batch_size=16, progress=True)
    lm.loglikelihood([instance])                    # [(log-probability in nats, whether it is the greedy continuation)]

Texts are encoded in the same way as by lm-eval's own `HFLM`. Only harness.py may import this file, as lm-eval is optional.
Limits: every choice of a question is run with its whole context; no chat template is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from kindling.generation.completion import has_stop
from kindling.generation.decoding import stream_batch
from kindling.generation.healing import longest_prompt
from kindling.generation.sampling import Sampling
from kindling.loss import CHUNK

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel


class Window(NamedTuple):
    """A piece of a request that fits in the context. Its last `n_scored` tokens are predicted from the tokens before them."""

    request: int
    ids: list[int]
    """At most block_size + 1 tokens: the last is only predicted."""
    n_scored: int


def windows(request: int, context: list[int], continuation: list[int], block_size: int) -> list[Window]:
    """Return the windows for a continuation: one, or several if it is longer than the context.

    Each token of the continuation is predicted once, from as many tokens before it as fit in the window. With a single token of
    context, these are lm-eval's rolling windows.
    """
    ids, pieces = context + continuation, []
    for start in range(0, len(continuation), block_size):
        n_scored = min(block_size, len(continuation) - start)
        end = len(context) + start + n_scored
        pieces.append(Window(request, ids[max(0, end - block_size - 1) : end], n_scored))
    return pieces


def first_of(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    return text[: min((found for stop in stops if stop and (found := text.find(stop)) >= 0), default=None)]


class KindlingLM(TemplateLM):
    """Answers lm-eval's requests, and counts those whose context was cropped to fit the model."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, device: torch.device, batch_size: int, progress: bool
    ):
        super().__init__()
        self.model, self.tokenizer, self._device = model, tokenizer, device
        self.batch_size, self.progress = batch_size, progress
        self.block_size = model.cfg.block_size
        self.n_requests = self.n_cropped = self.n_apart = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a document, as in training."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text, after the beginning-of-text token if the tokenizer has one and special tokens are wanted."""
        bos = [] if self.tokenizer.bos_id is None or add_special_tokens is False else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both together and split after the context's own number of ids, as lm-eval does.

        If the context's last token contains the whole continuation, nothing would be left to score. Then each is encoded
        alone, and counted.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation and not continuation_ids:
            self.n_apart += 1
            return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
        return context_ids, continuation_ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)  # encoding is too fast to need a bar

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether each of its tokens is the most likely one."""
        pieces = []
        for i, (_, context, continuation) in enumerate(requests):
            context = context or [
                self.prefix_token_id
            ]  # the context was only spaces, which are now in the continuation
            self.n_requests += 1
            self.n_cropped += len(context) > 1 and len(context) + len(continuation) > self.block_size + 1
            pieces += windows(i, context, continuation, self.block_size)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        pieces.sort(
            key=lambda piece: -len(piece.ids)
        )  # for little padding, and so that a batch that is too large fails at once
        with self._bar(len(pieces), "scoring") as bar:
            for start in range(0, len(pieces), self.batch_size):
                batch = pieces[start : start + self.batch_size]
                for piece, (total, is_greedy) in zip(batch, self._score(batch)):
                    totals[piece.request] += total
                    greedy[piece.request] &= is_greedy
                bar.update(len(batch))
        return list(zip(totals, greedy))

    @torch.inference_mode()
    def _score(self, batch: Sequence[Window]) -> list[tuple[float, bool]]:
        width = max(len(piece.ids) for piece in batch) - 1
        idx = torch.zeros(
            len(batch), width, dtype=torch.int64
        )  # (B, T); padding is on the right, where no token attends to it
        scored = torch.zeros(len(batch), width, dtype=torch.bool)  # (B, T)
        for i, (_, ids, n_scored) in enumerate(batch):
            idx[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            scored[i, len(ids) - 1 - n_scored : len(ids) - 1] = True
        targets = torch.tensor([token for _, ids, n in batch for token in ids[-n:]], device=self._device)  # (N,)
        x = self.model.hidden(idx.to(self._device))[scored.to(self._device)]  # (N, C)
        log_p, hit = [], []
        for rows, wanted in zip(x.split(CHUNK), targets.split(CHUNK)):  # all logits at once would be gigabytes
            logits = self.model.head(rows).float()  # (n, V)
            log_p.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])  # (n,)
            hit.append(logits.argmax(-1) == wanted)  # (n,)
        lengths = [piece.n_scored for piece in batch]
        sums = _sums(torch.cat(log_p), lengths)
        return [(total, bool(hits.all())) for total, hits in zip(sums, torch.cat(hit).cpu().split(lengths))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability in nats of each whole text. Its first token is predicted like the first of a document."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [total for total, _ in self._loglikelihood_tokens([("", [self.prefix_token_id], ids) for ids in texts])]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop string, end of text or the limit of tokens.

        The context is cropped so that the answer fits after it, but never to less than half of the block.
        """
        texts = [""] * len(requests)
        same: dict[str, list[int]] = {}  # requests of one task have the same settings, those of a group may differ
        for i, request in enumerate(requests):
            same.setdefault(repr(request.args[1]), []).append(i)
        for indices in same.values():
            asked = normalize_gen_kwargs(requests[indices[0]].args[1])
            sampling = Sampling(
                max_new_tokens=asked["max_gen_toks"],
                temperature=asked.get("temperature", 0.0),  # greedy
                top_k=asked.get("top_k"),
                top_p=asked.get("top_p", 1.0),
            )
            sampling.check()
            room = longest_prompt(self.block_size, sampling.max_new_tokens)
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices]
            self.n_requests += len(prompts)
            self.n_cropped += sum(len(prompt) > room for prompt in prompts)
            answers = self._generate([prompt[-room:] for prompt in prompts], sampling, asked["until"])
            for i, answer in zip(indices, answers):
                texts[i] = first_of(self.tokenizer.decode(answer), asked["until"])
        return texts

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, until: Sequence[str]) -> list[list[int]]:
        """Return the new token ids after each prompt, without end of text. Generation stops soon after a stop string."""
        answers: list[list[int]] = [[] for _ in prompts]
        seeds = range(len(prompts))  # so that sampled answers differ if a task repeats a prompt
        with self._bar(len(prompts), "generating") as bar:
            for row in stream_batch(self.model, prompts, sampling, self.tokenizer.end_ids, seeds, self.batch_size):
                row.ended = row.ended or has_stop(self.tokenizer.decode(row.out), until)
                if row.ended:
                    answers[row.number] = row.out
                    bar.update(1)
        return answers

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit=" requests", leave=False, disable=None if self.progress else True)


def _sums(values: Tensor, lengths: list[int]) -> list[float]:
    """Return the sum of each piece of values (N,), in float64, because a document's total has thousands of terms."""
    return [piece.sum().item() for piece in values.double().cpu().split(lengths)]
