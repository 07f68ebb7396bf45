"""The templates as other programs render them; tests/formats/test_chats.py has the ids."""

import re
from functools import cache

import pytest
from chats import HARD, asked, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config import TokenizerConfig
from kindling.data.exported_templates import go_template, jinja_template, parts
from kindling.data.prompts import Exchange, prompt_text
from kindling.tokenization.train_tokenizer import train_bpe

TEMPLATES = ("alpaca", "user-assistant")
END = "<|endoftext|>"
TOKENIZER = train_bpe(["no merges"], TokenizerConfig(), 261)
JINJA = {template: jinja_template(template, TOKENIZER) for template in TEMPLATES}


@cache
def compiled(source: str):
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)


def rendered(source: str, messages: list[dict], asks: bool = True) -> str:
    """Render as llama-cpp-python does; transformers differs in that `raise_exception` is a global."""

    def raise_exception(message):
        raise TemplateError(message)

    return compiled(source).render(messages=messages, add_generation_prompt=asks, raise_exception=raise_exception)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", HARD, ids=lambda messages: repr(messages[0]["content"])[:30])
def test_jinja_gives_the_text_of_prompts_py(template, messages):
    assert rendered(JINJA[template], messages) == text_of(template, messages, END)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: "<" not in text)


@settings(max_examples=30)
@given(st.sampled_from(TEMPLATES), st.lists(TEXTS, min_size=1, max_size=7), st.lists(TEXTS, max_size=2))
def test_any_conversation_has_our_text_and_begins_with_that_of_its_earlier_messages(template, texts, system):
    messages = asked(*texts, system=tuple(system))
    whole = rendered(JINJA[template], messages, asks=len(texts) % 2 == 1)
    if len(texts) % 2:
        assert whole == text_of(template, messages, END)
    for n in range(len(system), len(messages)):  # llama-cli writes only what is new
        assert whole.startswith(rendered(JINJA[template], messages[:n], asks=False))


@pytest.mark.parametrize(
    "messages, said",
    [
        (asked("a", "b"), "must end with one of the role user"),
        (asked(system=("a",)), "must end with one of the role user"),
        (asked("a", "b")[1:] + asked("c"), "user, assistant after user, or system, but is assistant; correct it"),
        ([*asked("a", "b"), *asked("x", "c")[1:], *asked("d")], "but is assistant"),
        ([*asked("a"), {"role": "tool", "content": "b"}], "but is tool"),
        ([{"role": "user"}], "must have a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text only"),
        (asked("What is <|endoftext|>?"), r"must not spell a control token, but has <\|endoftext\|>"),
        (asked("a", "x <fim_middle> y", "b"), "has <fim_middle>"),
        (asked("a", system=("<fim_pad>",)), "has <fim_pad>"),
    ],
)
def test_what_our_code_refuses_and_what_the_text_cannot_say_is_refused_in_one_line(messages, said):
    with pytest.raises(TemplateError, match=rf"^[^\n]*{said}[^\n]*$"):
        rendered(JINJA["alpaca"], messages)


def test_the_beginning_token_stands_first_and_once():
    tokenizer = train_bpe(["no merges"], TokenizerConfig(bos_token="<bos>"), 270)
    source = jinja_template("alpaca", tokenizer)
    messages = asked("a", "b", "c")
    assert rendered(source, messages) == "<bos>" + text_of("alpaca", messages, END)
    with pytest.raises(TemplateError, match="<bos>"):
        rendered(source, asked("<bos>"))


def test_tokens_that_json_would_escape_are_written_as_they_are():
    tokenizer = train_bpe(["no merges"], TokenizerConfig(eos_token='<｜end▁😀"\\|>'), 270)
    messages = asked("a", "b", "c")
    assert rendered(jinja_template("alpaca", tokenizer), messages) == text_of("alpaca", messages, '<｜end▁😀"\\|>')


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_parts_around_a_question_are_those_of_the_prompt(template):
    around = parts(template)
    assert around.first + "Add." + around.after == prompt_text(template, Exchange("Add."))
    assert around.later + "Add." + around.after == prompt_text(template, Exchange("Add."), first=False)


def test_the_go_template_is_as_it_was_when_go_rendered_it():
    """Rendered by Go's text/template as Ollama calls it, it gave the text of prompts.py for 3,000 conversations."""
    assert (
        go_template("user-assistant", TOKENIZER)
        == r"""{{- $first := true }}{{- $open := false }}{{- $end := "" }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if $open }}{{ "\n\n" }}
{{- else if $first }}{{ "User: " }}{{ if $.System }}{{ $.System }}{{ "\n\n" }}{{ end }}
{{- else }}{{ $end }}{{ "\nUser: " }}
{{- end }}{{ .Content }}{{ $first = false }}{{ $open = true }}
{{- else if and $open (eq .Role "assistant") }}{{ "\nAssistant:" }}{{ .Content }}
{{- $open = false }}{{ $end = "" }}{{ if .Content }}{{ $end = "<|endoftext|>" }}{{ end }}
{{- end }}
{{- end }}
{{- if $open }}{{ "\nAssistant:" }}{{ end }}"""
    )
    alpaca = go_template("alpaca", TOKENIZER)
    assert re.sub(r'{{ "[^"]+" }}', "", alpaca) == re.sub(
        r'{{ "[^"]+" }}', "", go_template("user-assistant", TOKENIZER)
    )
