"""Measures how well a model fills gaps in held-out files, and what the text after a gap is worth to it.

    figures = infill(model, tokenizer, gaps(texts, 200), bar.update)
    figures["line"]["ways"]["PSM"]["exact"]

A gap is a line, or a span of characters that may begin and end anywhere. The model fills it three times: with the suffix after
the prefix (PSM), with the suffix first (SPM, as serve.py asks), and without the suffix. In the last two the text goes on from
the prefix, so they have token healing: after a newline alone, a model does not expect the indentation that it has learnt as one
token with the newline. Exact: the text is what stood there. Similarity: 1 - edit distance / the longer length (Levenshtein
1966). Without a suffix nothing says where a span ends, so its text is cut to the right length there, which favours it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from kindling.data.infilling import KINDS, PSM, SPM
from kindling.files import UNENCODABLE
from kindling.tokenization.infilling import prompt_at_cursor, require_fim

if TYPE_CHECKING:
    from kindling.generation.sampling import Sampling
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

LINE, SPAN = "line", "span"
PER_DOCUMENT = 5  # gaps of each kind, so that no file dominates
SHORTEST, LONGEST = 8, 80  # characters of a line without its indentation, and of any gap
WITHOUT = "no suffix"
WAY_OUT = "evaluate with --infills 0, and without the benchmarks that end in -infill"
AT_A_TIME = 64  # gaps
TOKENS_OF_GAP = 48  # most new tokens; of a small context, a quarter


class Gap(NamedTuple):
    """A part of a document to be filled in."""

    document: int
    kind: str
    prefix: str
    middle: str
    suffix: str


def gaps(texts: Iterable[str], n: int) -> Iterator[Gap]:
    """Yield gaps of documents: up to `n` lines and up to `n` spans, drawn by the hash of each text."""
    left = {LINE: n, SPAN: n}
    for number, text in enumerate(texts):
        if not any(left.values()):
            break
        rng = random.Random(int.from_bytes(hashlib.sha256(text.encode("utf-8", UNENCODABLE)).digest()[:8], "big"))
        for kind, places in ((LINE, _lines(text)), (SPAN, _spans(text, rng))):
            for start, stop in rng.sample(places, min(PER_DOCUMENT, len(places), left[kind])):
                left[kind] -= 1
                yield Gap(number, kind, text[:start], text[start:stop], text[stop:])


def _lines(text: str) -> list[tuple[int, int]]:
    """Return where the lines with enough text in them begin and end, without the first line."""
    found, start = [], 0
    for line in text.split("\n"):
        if start and len(line) <= LONGEST and len(line.strip()) >= SHORTEST:
            found.append((start, start + len(line)))
        start += len(line) + 1
    return found


def _spans(text: str, rng: random.Random) -> list[tuple[int, int]]:
    """Return spans of up to LONGEST characters anywhere in a text, of random lengths."""
    lengths = [1 + int(rng.random() * LONGEST) for _ in range(PER_DOCUMENT)]
    starts = [int(rng.random() * (len(text) - length + 1)) for length in lengths if length < len(text)]
    return [(start, start + length) for start, length in zip(starts, lengths)]


def edit_similarity(a: str, b: str) -> float:
    """Return 1 - edit distance / the longer length, from 0 to 1; 1 for two empty texts."""
    distances = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, distances[0] = distances[0], i
        for j, y in enumerate(b, 1):
            before, distances[j] = distances[j], min(distances[j] + 1, distances[j - 1] + 1, before + (x != y))
    return 1 - distances[-1] / max(len(a), len(b), 1)


def infill(
    model: LanguageModel, tokenizer: Tokenizer, all_gaps: Iterable[Gap], progress: Callable[[int], object]
) -> dict[str, Any]:
    """Return the figures of eval.json: by kind of gap and by way of filling it, exact matches and similarity.

    `by_document` has for each document its number of gaps, the exact matches and the sum of the similarities. `progress` is
    called with the number of gaps that are done. Raises TokenizerError for a vocabulary without the control tokens.
    """
    filler, left = Filler(model, tokenizer), iter(all_gaps)
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    while some := list(islice(left, AT_A_TIME)):
        for way in (KINDS[PSM], KINDS[SPM], WITHOUT):
            for gap, text in zip(some, filler.fill_all(some, way)):
                by_document = found.setdefault(gap.kind, {}).setdefault(way, {})
                counts = by_document.setdefault(gap.document, [0, 0, 0.0])
                counts[0], counts[1] = counts[0] + 1, counts[1] + (text == gap.middle)
                counts[2] += edit_similarity(text, gap.middle)
        progress(len(some))
    out: dict[str, Any] = {}
    for kind, ways in found.items():
        out[kind] = {"gaps": int(sum(counts[0] for counts in next(iter(ways.values())).values())), "ways": {}}
        for way, by_document in ways.items():
            rows = list(by_document.values())
            n, exact, similarity = (sum(column) for column in zip(*rows))
            out[kind]["ways"][way] = {"exact": exact / n, "similarity": similarity / n, "by_document": rows}
    return out


def prompt_around(tokenizer: Tokenizer, prefix: str, suffix: str, longest: int, spm: bool = False) -> list[int]:
    """Return the prompt of a gap, of at most `longest` tokens: as much of prefix and suffix around it as fits.

    Raises TokenizerError for a vocabulary without the control tokens.
    """
    fim = require_fim(tokenizer, WAY_OUT)
    return prompt_at_cursor(fim, tokenizer.encode, prefix, suffix, longest, spm)[0]


class Filler:
    """Fills gaps with a model, greedily."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        from kindling.generation.completion import token_spellings
        from kindling.generation.sampling import Sampling

        self.model, self.tokenizer = model, tokenizer
        require_fim(tokenizer, WAY_OUT)
        self.n_new = min(TOKENS_OF_GAP, model.cfg.block_size // 4)
        self.sampling: Sampling = Sampling(self.n_new, temperature=0.0)
        self._spellings = token_spellings(tokenizer, model.cfg.vocab_size)

    def fill_all(self, some: Sequence[Gap], way: str) -> list[str]:
        """Return what the model writes into each gap. Those with the suffix after the prefix are filled together."""
        if way != KINDS[PSM]:
            return [self._go_on(gap, way) for gap in some]
        from kindling.generation.completion import complete_batch

        texts = [""] * len(some)
        for kind in (LINE, SPAN):
            numbers = [n for n, gap in enumerate(some) if gap.kind == kind]
            prompts = [self.prompt(some[n], spm=False) for n in numbers]
            sampling = self._sampling(kind)
            for number, done in complete_batch(self.model, self.tokenizer, prompts, [0] * len(prompts), sampling):
                texts[numbers[number]] = done.text
        return texts

    def _sampling(self, kind: str) -> Sampling:
        """Return how a kind of gap is filled. A line ends at its newline."""
        return replace(self.sampling, stop=("\n",) if kind == LINE else ())

    def prompt(self, gap: Gap, spm: bool) -> list[int]:
        """Return the prompt of a gap, with as much of prefix and suffix around it as leaves room for the new tokens."""
        return prompt_around(self.tokenizer, gap.prefix, gap.suffix, self.model.cfg.block_size - self.n_new, spm)

    def _go_on(self, gap: Gap, way: str) -> str:
        """Return what the model writes after the prefix of a gap, also where that ends inside a token."""
        from kindling.generation.completion import encode_document, extend_healed

        if way == WITHOUT:
            ids = encode_document(self.tokenizer, gap.prefix)[-(self.model.cfg.block_size - self.n_new) :]
        else:
            ids = self.prompt(gap, spm=True)
        text = extend_healed(self.model, self.tokenizer, ids, self._sampling(gap.kind), self._spellings).text
        return text[: len(gap.middle)] if way == WITHOUT and gap.kind == SPAN else text
