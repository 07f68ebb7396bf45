"""Conversations as messages, with what is awkward in them, and what our own code makes of such messages."""

from dataclasses import replace

from kindling.data.prompts import Exchange, encode, flatten, prompt_text
from kindling.serving.body import Fields
from kindling.serving.openai_chat import conversation_of


def asked(*texts: str, system: tuple[str, ...] = ()) -> list[dict]:
    """Return the messages of a conversation: system messages, then question, answer, ..., question."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": text} for text in system] + turns


HARD = [
    asked("Add a and b."),
    asked("Add.", "def add(a, b):\n    return a + b", "Now subtract."),
    asked("Add.", "```python\na + b\n```", "Again.", "(a, b)", "Once more."),  # begins with a mark that joins a colon
    asked("Add.", "\n\n    indented", "\n  Again ", "   three spaces\n", " more\n\n"),
    asked("naïve 😀 e\u0301 \u2028?", "→ ✓", "日本語", "\u0301 begins with an accent", "²ﬁ…\r\n"),
    asked("{{ messages }} {% raw %} {0} {} \\n \"quoted\" 'too'", "{{ x }}", "a\0b"),
    asked("### Response:\nUser: x\nAssistant: y", "no marker", "### Instruction:"),
    asked("an answer without text", "", "next"),
    asked("", "an empty question", ""),
    asked("Add.", system=("Be brief.",)),
    asked("Add.", "a + b", "Again.", system=("Be brief.\n", "  Use Python.")),
    asked("Add.", system=("",)),
    asked("Add.", system=("", "")),
    [{"role": "developer", "content": "Be brief."}, *asked("Add.")],
    [*asked("Add.", "a + b"), *asked("Again."), *asked("Now.", "x", "And now.")],  # two questions follow each other
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}],
]


def exchanges_of(messages: list[dict]) -> list[Exchange]:
    """Return the exchanges that serve.py makes of messages."""
    conversation = conversation_of(Fields({"messages": messages}), 1000)
    first, *others = conversation.exchanges
    return [replace(first, instruction=conversation.before + first.instruction), *others]


def text_of(template: str, messages: list[dict], end: str) -> str:
    """Return the text of prompts.py."""
    turns = enumerate(exchanges_of(messages))
    return "".join(prompt_text(template, e, i == 0) + (e.response and e.response + end) for i, e in turns)


def ids_of(template: str, messages: list[dict], tokenizer) -> list[int]:
    """Return the ids of prompts.py."""
    return flatten(encode(template, exchanges_of(messages), tokenizer))
