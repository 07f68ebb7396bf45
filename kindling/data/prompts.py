"""Templates: how an instruction becomes a prompt. Training, evaluation and chat all use these functions.

    encode("alpaca", [Exchange("Add a and b.", "def add(a, b): ...")], tokenizer)

Prompt and response are encoded separately and their ids joined. So no token spans the border, and the mask follows from
positions: no code searches for a marker in a text or in ids. Every response ends with the end-of-text token; the template
of the next exchange follows it. A template is the name of one of ours, or the text of another model's in Jinja
(jinja_chat.py), whose own special token ends each response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from kindling.data.jinja_chat import (
    Message,
    SpecialEncoder,
    ask,
    cut_turns,
    encode_pieces,
    is_jinja,
    plain,
    render_jinja,
    with_system,
)

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


class Encoder(SpecialEncoder, Protocol):
    """What `encode` needs of a tokenizer."""

    eos_id: int
    bos_id: int | None


class Segment(NamedTuple):
    """The ids of one exchange: its prompt, and its response with the end-of-text token."""

    prompt: list[int]
    response: list[int]


class Spelled(NamedTuple):
    """A segment, and what it spells: without the token that begins a conversation, and without the one that ends the response."""

    segment: Segment
    prompt: str
    response: str


def prompt_text(template: str, exchange: Exchange, first: bool = True) -> str:
    """Return the text before a response. `first`: of the first exchange; else it follows an earlier response."""
    if is_jinja(template):
        return render_jinja(template, _messages([exchange]), ask=True)
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
    found = None if is_jinja(template) else MARKERS[template].search(text)  # a special token is no text
    return None if found is None else found[0]


def rendered_template(template: str) -> str:
    """Return the template in all its forms as one text, to notice when a template changes."""
    if is_jinja(template):
        return template
    forms = [(Exchange("{instruction}", input=about), first) for about in ("", "{input}") for first in (True, False)]
    return "\0".join(prompt_text(template, exchange, first) for exchange, first in forms)


def encode(template: str, exchanges: Sequence[Exchange], tokenizer: Encoder) -> list[Segment]:
    """Return the ids of a conversation, a segment for each exchange. An empty response stays without ids."""
    return [spelled.segment for spelled in encode_spelled(template, exchanges, tokenizer)]


def encode_spelled(template: str, exchanges: Sequence[Exchange], tokenizer: Encoder) -> list[Spelled]:
    """Return a conversation as ids and texts, a prompt and a response for each exchange.

    The response has the end-of-text token after it; an empty one stays without ids. Raises
    TemplateError for a template in Jinja that does not show which text the model is to write.
    """
    if is_jinja(template):
        return _segments_of_jinja(template, _messages(exchanges), tokenizer)
    return [
        Spelled(_segment(template, e, tokenizer, i == 0), prompt_text(template, e, i == 0), e.response)
        for i, e in enumerate(exchanges)
    ]


def _segment(template: str, exchange: Exchange, tokenizer: Encoder, first: bool) -> Segment:
    prompt = tokenizer.encode(prompt_text(template, exchange, first))
    if first and tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id, *prompt]
    return Segment(prompt, [*tokenizer.encode(exchange.response), tokenizer.eos_id] if exchange.response else [])


def _messages(exchanges: Sequence[Exchange]) -> list[Message]:
    """Return exchanges as messages; an empty response, which the model is to write, is none."""
    out: list[Message] = []
    for e in exchanges:
        out.append({"role": "user", "content": f"{e.instruction}\n\n{e.input}" if e.input.strip() else e.instruction})
        out += [{"role": "assistant", "content": e.response}] if e.response else []
    return out


def _segments_of_jinja(template: str, messages: Sequence[Message], tokenizer: Encoder) -> list[Spelled]:
    """Return the ids of a conversation in a template in Jinja."""
    special, out = tokenizer.special_ids, list[Spelled]()
    begin = next((token for token, i in special.items() if i == tokenizer.bos_id), "\0")
    for turn in cut_turns(template, messages, tuple(special)):
        response = [*encode_pieces(turn.words, tokenizer), special[turn.end]] if turn.end else []
        text = plain(turn.prompt if out else turn.prompt.removeprefix(begin))
        out.append(Spelled(Segment(encode_pieces(turn.prompt, tokenizer), response), text, plain(turn.words)))
    return out


def flatten(segments: Iterable[Segment]) -> list[int]:
    """Return the ids of all segments as one list."""
    return [token for segment in segments for token in (*segment.prompt, *segment.response)]


def prompt_that_fits(
    template: str, exchanges: Sequence[Exchange], tokenizer: Encoder, block_size: int, room: int, before: str = ""
) -> tuple[list[int], int]:
    """Return the ids of a conversation, and how many of its oldest exchanges are left out so that `room` tokens fit after it.

    The text `before` stands in front of the first instruction that is kept. The last exchange is always kept: its ids may leave
    less room, or none.
    """
    if is_jinja(template):
        return _fit_jinja(template, exchanges, tokenizer, block_size - room, before)
    dropped, ids, after = len(exchanges), list[int](), list[int]()
    for exchange in reversed(exchanges):  # whole exchanges, as a model was never trained on half a template
        begin = replace(exchange, instruction=before + exchange.instruction)
        longer = [*flatten([_segment(template, begin, tokenizer, first=True)]), *after]
        if ids and len(longer) + room > block_size:
            break
        dropped, ids = dropped - 1, longer
        after = [*flatten([_segment(template, exchange, tokenizer, first=False)]), *after]
    return ids, dropped


def _fit_jinja(
    template: str, exchanges: Sequence[Exchange], tokenizer: Encoder, most: int, before: str
) -> tuple[list[int], int]:
    """Do the same with a template in Jinja, which gets what stands before the first question as a system message."""
    for dropped in range(len(exchanges)):
        messages = with_system(template, before.removesuffix("\n\n"), _messages(exchanges[dropped:]))
        ids = encode_pieces(ask(template, messages, tuple(tokenizer.special_ids)), tokenizer)
        if len(ids) <= most:
            break
    return ids, dropped
