"""Templates: how an instruction becomes a prompt. Training, evaluation and chat all use these functions.

    encode("alpaca", [Exchange("Add a and b.", "def add(a, b): ...")], tokenizer)

Prompt and response are encoded separately and their ids joined. So no token spans the border, and the mask follows from
positions: no code searches for a marker in a text or in ids. Every response ends with the end-of-text token; the template
of the next exchange follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

# from Stanford Alpaca (Taori et al. 2023), with a newline after the last marker, so that code begins on a new line
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MARKERS = {
    "alpaca": re.compile(r"^### (?:Instruction|Input|Response):", re.MULTILINE),
    "user-assistant": re.compile(r"^(?:User|Assistant):", re.MULTILINE),
}


@dataclass(frozen=True)
class Exchange:
    """An instruction, its input (often empty), and the response, which is empty if the model is to write it."""

    instruction: str
    response: str = ""
    input: str = ""


class Encoder(Protocol):
    """What `encode` needs of a tokenizer."""

    eos_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without control tokens."""
        ...


class Segment(NamedTuple):
    """The ids of one exchange: its prompt, and its response with the end-of-text token."""

    prompt: list[int]
    response: list[int]


def prompt_text(template: str, exchange: Exchange, first: bool = True) -> str:
    """Return the text before a response. `first`: of the first exchange; else it follows an earlier response."""
    if template == "alpaca":
        text = (ALPACA_INPUT if exchange.input.strip() else ALPACA).format(
            instruction=exchange.instruction, input=exchange.input
        )
        # the preamble stands only before the first exchange; later ones begin with the marker
        return text if first else "\n\n" + text[text.index("### Instruction:") :]
    if template == "user-assistant":  # of the presets smallcoder; no space at its end
        about = f"\n{exchange.input}" if exchange.input.strip() else ""
        return f"{'' if first else chr(10)}User: {exchange.instruction}{about}\nAssistant:"
    raise ValueError(f"no template is called {template!r}")


def find_marker(template: str, text: str) -> str | None:
    """Return the first marker of the template at a line start of `text`, or None. Only the template may write it."""
    found = MARKERS[template].search(text)
    return None if found is None else found[0]


def rendered_template(template: str) -> str:
    """Return the template in all its forms as one text, to notice when a template changes."""
    forms = [(Exchange("{instruction}", input=about), first) for about in ("", "{input}") for first in (True, False)]
    return "\0".join(prompt_text(template, exchange, first) for exchange, first in forms)


def encode(template: str, exchanges: Sequence[Exchange], tokenizer: Encoder) -> list[Segment]:
    """Return the ids of a conversation, a segment for each exchange. An empty response stays without ids."""
    return [_segment(template, exchange, tokenizer, i == 0) for i, exchange in enumerate(exchanges)]


def _segment(template: str, exchange: Exchange, tokenizer: Encoder, first: bool) -> Segment:
    prompt = tokenizer.encode(prompt_text(template, exchange, first))
    if first and tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id, *prompt]
    return Segment(prompt, [*tokenizer.encode(exchange.response), tokenizer.eos_id] if exchange.response else [])


def flatten(segments: Iterable[Segment]) -> list[int]:
    """Return the ids of all segments as one list."""
    return [token for segment in segments for token in (*segment.prompt, *segment.response)]


def fit(
    template: str, exchanges: Sequence[Exchange], tokenizer: Encoder, block_size: int, room: int, before: str = ""
) -> tuple[list[int], int]:
    """Return the ids of a conversation, and how many of its oldest exchanges are left out so that `room` tokens fit after it.

    The text `before` stands in front of the first instruction that is kept. The last exchange is always kept: its ids may leave
    less room, or none.
    """
    dropped, ids, after = len(exchanges), list[int](), list[int]()
    for exchange in reversed(exchanges):  # whole exchanges, as a model was never trained on half a template
        begin = replace(exchange, instruction=before + exchange.instruction)
        longer = [*flatten([_segment(template, begin, tokenizer, first=True)]), *after]
        if ids and len(longer) + room > block_size:
            break
        dropped, ids = dropped - 1, longer
        after = [*flatten([_segment(template, exchange, tokenizer, first=False)]), *after]
    return ids, dropped
