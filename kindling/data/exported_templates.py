"""The templates of prompts.py in the languages of other programs: Jinja (transformers, llama.cpp) and Go (Ollama).

    tokenizer.chat_template = jinja_template("alpaca", run.tokenizer())

Both are made from `prompt_text`, so they follow a change of it. Messages have no `input`. System messages stand before the
first question, and questions without an answer between them are joined by an empty line, as serve.py does. Each text begins
with that of the same conversation without its last messages: llama-cli relies on it.

Limit: other programs render a conversation as one text and then encode it. In that text nothing tells a control token from its
spelling in a message, so the Jinja template refuses such a message. Ollama's language cannot refuse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kindling.data.jinja_chat import is_jinja
from kindling.data.prompts import Exchange, prompt_text


class Spelling(Protocol):
    """What the templates need of a tokenizer."""

    eos_id: int
    bos_id: int | None

    @property
    def special_tokens(self) -> Sequence[str]:
        """The control tokens that other programs find in a text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, control tokens included."""


class Parts(NamedTuple):
    """The texts of a template around a question."""

    first: str
    """Before the first question."""
    later: str
    """Before a later one."""
    after: str
    """Between question and answer."""


_JINJA = """\
{{%- set control_tokens = {control} -%}}
{{%- set seen = namespace(system=[], first=true, open=false) -%}}
{{%- macro text_of(message) -%}}
{{%- set said = namespace(text='') -%}}
{{%- if message.content is string -%}}
{{%- set said.text = message.content -%}}
{{%- elif message.content -%}}
{{%- for part in message.content -%}}
{{%- if part.type != 'text' -%}}
{{{{- raise_exception('a message must be text only, but has a part of another type; leave out images and files') -}}}}
{{%- endif -%}}
{{%- set said.text = said.text + part.text -%}}
{{%- endfor -%}}
{{%- else -%}}
{{{{- raise_exception('a message must have a text as its content, but has none; write it') -}}}}
{{%- endif -%}}
{{%- for token in control_tokens -%}}
{{%- if token in said.text -%}}
{{{{- raise_exception('a message must not spell a control token, but has ' + token + '; write it in another way') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- said.text -}}}}
{{%- endmacro -%}}
{{%- for message in messages -%}}
{{%- if message.role in ['system', 'developer'] -%}}
{{%- set seen.system = seen.system + [text_of(message)] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set system = seen.system | join('\\n\\n') -%}}
{{{{- {bos} -}}}}
{{%- for message in messages -%}}
{{%- if message.role == 'user' -%}}
{{%- if seen.open -%}}
{{{{- '\\n\\n' -}}}}
{{%- elif seen.first -%}}
{{{{- {first} -}}}}
{{%- if system -%}}
{{{{- system + '\\n\\n' -}}}}
{{%- endif -%}}
{{%- else -%}}
{{{{- {later} -}}}}
{{%- endif -%}}
{{{{- text_of(message) -}}}}
{{%- set seen.first = false -%}}
{{%- set seen.open = true -%}}
{{%- elif message.role == 'assistant' and seen.open -%}}
{{{{- {after} -}}}}
{{%- set answer = text_of(message) -%}}
{{%- if answer -%}}
{{{{- answer + {end} -}}}}
{{%- endif -%}}
{{%- set seen.open = false -%}}
{{%- elif message.role not in ['system', 'developer'] -%}}
{{%- set must = 'a role must be user, assistant after user, or system' -%}}
{{{{- raise_exception(must + ', but is ' + message.role | string + '; correct it') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{%- if not seen.open -%}}
{{{{- raise_exception('messages must end with one of the role user, but do not; add the question') -}}}}
{{%- endif -%}}
{{{{- {after} -}}}}
{{%- endif -%}}
"""
# Ollama joins messages of one role that follow each other, and all system messages, by an empty line
_GO = """\
{{{{- $first := true }}}}{{{{- $open := false }}}}{{{{- $end := "" }}}}
{{{{- range .Messages }}}}
{{{{- if eq .Role "user" }}}}
{{{{- if $open }}}}{{{{ "\\n\\n" }}}}
{{{{- else if $first }}}}{{{{ {first} }}}}{{{{ if $.System }}}}{{{{ $.System }}}}{{{{ "\\n\\n" }}}}{{{{ end }}}}
{{{{- else }}}}{{{{ $end }}}}{{{{ {later} }}}}
{{{{- end }}}}{{{{ .Content }}}}{{{{ $first = false }}}}{{{{ $open = true }}}}
{{{{- else if and $open (eq .Role "assistant") }}}}{{{{ {after} }}}}{{{{ .Content }}}}
{{{{- $open = false }}}}{{{{ $end = "" }}}}{{{{ if .Content }}}}{{{{ $end = {end} }}}}{{{{ end }}}}
{{{{- end }}}}
{{{{- end }}}}
{{{{- if $open }}}}{{{{ {after} }}}}{{{{ end }}}}"""


def parts(template: str) -> Parts:
    """Return the texts of a template that stand around a question."""
    question = Exchange("\0")
    (first, after), (later, same) = (prompt_text(template, question, first).split("\0") for first in (True, False))
    assert after == same, "a question ends the same, first or later"
    return Parts(first, later, after)


def jinja_template(template: str, tokenizer: Spelling) -> str:
    """Return the template as transformers and llama.cpp read it, for models with this tokenizer."""
    if is_jinja(template):
        return template
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    end = tokenizer.decode([tokenizer.eos_id])
    control = sorted({*tokenizer.special_tokens, end, bos} - {""})
    literals = {**parts(template)._asdict(), "bos": bos, "end": end, "control": control}
    return _JINJA.format(**{name: _literal(value) for name, value in literals.items()})


def go_template(template: str, tokenizer: Spelling) -> str:
    """Return the template as Ollama reads it; Ollama itself adds the beginning token."""
    literals = {**parts(template)._asdict(), "end": tokenizer.decode([tokenizer.eos_id])}
    return _GO.format(**{name: _literal(value) for name, value in literals.items()})


def _literal(value: str | list[str]) -> str:
    """Return a text, or a list, as Jinja and Go write it."""
    return json.dumps(value, ensure_ascii=False)  # Jinja knows no pairs of \u escapes
