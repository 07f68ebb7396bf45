"""Chat templates in Jinja, which other people's models bring with them: rendered, cut into turns, and encoded.

    turns = cut_turns(template, messages, specials)     # the texts of each prompt and each answer
    ids = encode_pieces(text, tokenizer)

A template renders a whole conversation. To see which of it the model is to write, each conversation is rendered up to each
question and up to each answer, and every text must begin with the one before it. A special token is one only where the template
writes it: in a message it stays text. `strftime_now` is not defined, so that a template renders the same on every day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from kindling.errors import KindlingError, one_line

MARK = "\ufdd0"  # breaks special tokens in messages while a template is rendered; Unicode keeps it free for such uses
OURS = "train with a template of ours, --data.template alpaca"
Message = dict[str, str]


class TemplateError(KindlingError):
    """A chat template that cannot be rendered, or from which it does not follow what the model is to write."""


class SpecialEncoder(Protocol):
    """What `encode_pieces` needs of a tokenizer."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of the special tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without control tokens."""


class TurnText(NamedTuple):
    """The texts of an exchange: what stands before the answer, the answer, and the special token that ends it."""

    prompt: str
    words: str
    end: str


def is_jinja(template: str) -> bool:
    """Return whether a template is the text of one in Jinja, and not the name of one of ours."""
    return "{{" in template or "{%" in template


@cache
def _compiled(source: str) -> Any:
    """Return a template as transformers compiles it. Raises TemplateError for one that is no Jinja."""
    from jinja2 import TemplateError as JinjaError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    # {% generation %} marks the answers for transformers; it changes no text
    plain = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    plain = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", plain)
    try:
        return environment.from_string(plain)
    except JinjaError as e:
        raise TemplateError(f"a chat template must be Jinja, but is not ({one_line(e)}); {OURS}") from None


def render_jinja(template: str, messages: Sequence[Message], ask: bool) -> str:
    """Return a conversation as text by a Jinja template; `ask`: up to where the model begins its answer. Raises TemplateError."""
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=ask, tools=None, documents=None
        )
    except TemplateError:
        raise
    except Exception as e:  # a template is a program, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(
            f"the chat template must render messages of {roles}, but gives {one_line(e)}; {OURS}"
        ) from None


def protected(text: str, specials: Sequence[str]) -> str:
    """Return a message in which no special token is written as such, until `plain` undoes it."""
    for token in specials:
        text = text.replace(token, token[0] + MARK + token[1:])
    return text


def plain(text: str) -> str:
    """Undo `protected`."""
    return text.replace(MARK, "")


def _any_of(specials: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds each special token, the longest first, and nothing without one."""
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def cut_turns(template: str, messages: Sequence[Message], specials: Sequence[str]) -> list[TurnText]:
    """Return the texts of each exchange of a conversation; the last one may have no answer yet.

    The texts are `protected`. Raises TemplateError if no answer can be told from what the template writes around it.
    """
    guarded = [message | {"content": protected(message["content"], specials)} for message in messages]
    special, done, turns = _any_of(specials), "", list[TurnText]()
    for i, message in enumerate(guarded):
        if message["role"] != "user":
            continue
        asked = render_jinja(template, guarded[: i + 1], ask=True)
        if not asked.startswith(done):
            raise TemplateError(
                "the chat template must write earlier answers as it wrote them before, but changes them when the next question "
                f"comes; train on conversations of one exchange, or {OURS}"
            )
        prompt = asked[len(done) :]
        if i + 1 == len(guarded):
            turns.append(TurnText(prompt, "", ""))
            break
        whole = render_jinja(template, guarded[: i + 2], ask=False)
        rest = whole[len(asked) :] if whole.startswith(asked) else ""
        found = special.search(rest)
        words = rest[: found.start()] if found else ""
        if found is None or guarded[i + 1]["content"].strip() not in words:
            raise TemplateError(
                "the chat template must write an answer directly after the prompt for it, and end it with a special token, but "
                f"does not; {OURS}"
            )
        turns.append(TurnText(prompt, words, found[0]))
        done = asked + rest[: found.end()]
    return turns


def ask(template: str, messages: Sequence[Message], specials: Sequence[str]) -> str:
    """Return a whole conversation up to where the model begins its answer, `protected`. Raises TemplateError."""
    return render_jinja(template, [m | {"content": protected(m["content"], specials)} for m in messages], ask=True)


def require_trainable(template: str, specials: Sequence[str]) -> None:
    """Raise TemplateError unless it follows from a template what the model is to write."""
    end_of_answers(template, specials)


def end_of_answers(template: str, specials: Sequence[str]) -> str:
    """Return the special token that ends each answer. Raises TemplateError as `cut_turns` does."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    return cut_turns(template, messages, specials)[0].end


def with_system(template: str, system: str, messages: Sequence[Message]) -> list[Message]:
    """Return a conversation that begins with a system message, or where the template has none, says it in the first question."""
    if not system:
        return list(messages)
    if _has_system(template):
        return [{"role": "system", "content": system}, *messages]
    first, *others = messages
    return [first | {"content": f"{system}\n\n{first['content']}"}, *others]


@cache
def _has_system(template: str) -> bool:
    """Return whether a template writes system messages."""
    try:
        said = render_jinja(
            template, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question"}], True
        )
    except TemplateError:
        return False
    return "be brief" in said


def encode_pieces(text: str, tokenizer: SpecialEncoder) -> list[int]:
    """Return the ids of a rendered, `protected` text: of the special tokens in it, and of the texts between them."""
    ids, at, known = [], 0, tokenizer.special_ids
    for found in _any_of(tuple(known)).finditer(text):
        ids += [*tokenizer.encode(plain(text[at : found.start()])), known[found[0]]]
        at = found.end()
    return ids + tokenizer.encode(plain(text[at:]))
