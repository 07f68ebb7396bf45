"""The texts that instructions and answers are made into: the one place that training, evaluation and chat share.

    encode("alpaca", [Exchange("Add a and b.", "def add(a, b): ...")], tokenizer)

Prompt and response are encoded on their own and their ids joined, so that no token straddles the border and the mask goes
by position: nothing ever looks for a marker in a text or in ids. Every response is closed by end-of-text. In later
exchanges of a conversation the template follows that end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# Stanford Alpaca's (Taori et al. 2023), with a line end after the last marker, so that code begins at a line's start
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
    """One instruction, what it is about (often nothing), and the response; empty where that is still to come."""

    instruction: str
    response: str = ""
    input: str = ""


class Encoder(Protocol):
    """What is needed of a tokenizer."""

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
    """Return all that the model is given before a response; `first`, or after the end of an earlier one."""
    if template == "alpaca":
        text = (ALPACA_INPUT if exchange.input.strip() else ALPACA).format(
            instruction=exchange.instruction, input=exchange.input
        )
        # the preamble once: what follows an earlier answer begins with the marker
        return text if first else "\n\n" + text[text.index("### Instruction:") :]
    if template == "user-assistant":  # seed 004's, without a space at its end
        about = f"\n{exchange.input}" if exchange.input.strip() else ""
        return f"{'' if first else chr(10)}User: {exchange.instruction}{about}\nAssistant:"
    raise ValueError(f"no template is called {template!r}")


def marker_in(template: str, text: str) -> str | None:
    """Return the first line start of a text that only the template may write, or None."""
    found = MARKERS[template].search(text)
    return None if found is None else found[0]


def rendered(template: str) -> str:
    """Return the template in each of its forms, so that a change of it is noticed."""
    forms = [(Exchange("{instruction}", input=about), first) for about in ("", "{input}") for first in (True, False)]
    return "\0".join(prompt_text(template, exchange, first) for exchange, first in forms)


def encode(template: str, exchanges: Sequence[Exchange], tokenizer: Encoder) -> list[Segment]:
    """Return the ids of a conversation, segment by segment; an empty response stays empty, for the model to write."""
    segments = []
    for i, exchange in enumerate(exchanges):
        prompt = tokenizer.encode(prompt_text(template, exchange, first=i == 0))
        if i == 0 and tokenizer.bos_id is not None:
            prompt = [tokenizer.bos_id, *prompt]
        response = [*tokenizer.encode(exchange.response), tokenizer.eos_id] if exchange.response else []
        segments.append(Segment(prompt, response))
    return segments


def flatten(segments: Iterable[Segment]) -> list[int]:
    """Return the ids of segments, one after the other."""
    return [token for segment in segments for token in (*segment.prompt, *segment.response)]
