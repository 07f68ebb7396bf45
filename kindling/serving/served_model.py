"""A model that is being served: what it is, what it can do, and how a request's text becomes a prompt.

A prompt that is longer than the context loses its beginning, so that the new tokens fit behind it, or half the context
(generation/healing.py). At a cursor, prefix and suffix are cut around it (tokenization/infilling.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

from kindling.data.prompts import Exchange, prompt_that_fits
from kindling.errors import KindlingError
from kindling.generation.healing import longest_prompt, newest_text, split_for_healing
from kindling.generation.settings import Sampling
from kindling.int8.model import CompletionError
from kindling.serving.body import BadRequest
from kindling.serving.edit import Edit
from kindling.serving.engine import Vocabulary
from kindling.serving.generation import Generation
from kindling.serving.metrics import Metrics
from kindling.serving.scheduler import Scheduler
from kindling.tokenization.infilling import CHARACTERS, FIM_TOKENS, left_out, prompt_at_cursor

ENCODING = (KindlingError, CompletionError)  # what the tokenizers of a run and of an export raise
STEPS = 8  # a prompt at a cursor is cut in eighths of the context, so that most keys pressed there need one new token
OPEN_ANSWER = 4  # earlier exchanges leave an answer at least a quarter of the context, as in generate.py


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 2 * 2**20
    n: int = 16
    """Texts that one request may ask for: prompts times samples."""
    stops: int = 16
    logprobs: int = 20
    messages: int = 1000
    max_new_tokens: int = 512
    """A request for more gets this many."""
    time_s: float = 60.0
    """From a request to its last token."""
    body_s: float = 10.0
    """To send a request's body; its headers have as long."""
    connections: int = 256


@dataclass(frozen=True)
class Served:
    """A model with all that answers requests."""

    name: str
    vocabulary: Vocabulary
    scheduler: Scheduler
    block_size: int
    template: str | None = None
    """The template of a run that was fine-tuned on instructions."""
    remembers: bool = False
    """The run was fine-tuned on conversations of several exchanges."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the page shows of the model."""
    sampling: Sampling = field(default_factory=Sampling)
    min_confidence: float = 0.0
    literal_fim: bool = False
    log_prompts: bool = False
    limits: Limits = Limits()
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def can_infill(self) -> bool:
        """Whether the model was trained to fill in the middle."""
        return self.vocabulary.fim is not None

    @property
    def n_tokens(self) -> int:
        """One more than the largest token id that a prompt may have."""
        return len(self.vocabulary.spellings)

    def require_infill(self, param: str = "suffix") -> None:
        """Raise BadRequest unless the model can use a suffix."""
        if not self.can_infill:
            raise BadRequest(
                f"{param} must be empty for {self.name}, but is not: the model was never trained to fill in the middle; "
                f"train one with --data.fim-rate 0.5",
                param,
            )


class Prompt(NamedTuple):
    """A generation, and whether a part of the request's text was left out of it."""

    generation: Generation
    truncated: bool = False


class Conversation(NamedTuple):
    """Exchanges, the last without a response."""

    exchanges: Sequence[Exchange]
    system: str = ""
    """What a system message says. A template has no place for it, so it stands before the first question that is kept."""

    @property
    def before(self) -> str:
        """What stands before the first question."""
        return f"{self.system}\n\n" if self.system else ""


class Options(NamedTuple):
    """How a request's texts are to be generated."""

    sampling: Sampling
    n_logprobs: int | None = None
    time_limit_s: float = 60.0
    lines_limit_s: float | None = None


def encoded(served: Served, text: str, param: str) -> list[int]:
    """Return the ids of a text. Raises BadRequest for one that the tokenizer cannot spell."""
    try:
        return served.vocabulary.encode(text)
    except ENCODING as e:
        raise BadRequest(f"{param}: {e}", param) from None


def continuation(
    served: Served, text: str, options: Options, edit: Edit | None = None, param: str = "prompt"
) -> Prompt:
    """Return the generation that goes on after a text, also where it ends inside a token.

    With `edit` the text is typed on: what does not fit is cut in steps, so that most of the prompt stays as it was.
    """
    vocabulary, most, step = served.vocabulary, CHARACTERS * served.block_size, 1 if edit is None else _step(served)
    end = newest_text(text, most) if edit is None else text[left_out(len(text), most, CHARACTERS * step) :]
    ids = encoded(served, end, param)
    if len(end) == len(text) and vocabulary.bos_id is not None:
        ids = [vocabulary.bos_id, *ids]
    whole = ids or [vocabulary.eos_id]  # in training, a document begins after an end-of-text
    ids = cropped(served, whole, options, step)
    return Prompt(healed(served, ids, options, edit), len(end) < len(text) or len(ids) < len(whole))


def healed(served: Served, ids: list[int], options: Options, edit: Edit | None) -> Generation:
    """Return the generation that goes on after a prompt whose text may end inside a token."""
    kept, healing = split_for_healing(ids, served.vocabulary.spellings)
    generation = _generation(kept, options, edit)
    return replace(generation, healing=healing, n_taken_back=len(ids) - len(kept)) if healing.text else generation


def after_ids(served: Served, ids: Sequence[int], options: Options) -> Prompt:
    """Return the generation that goes on after these very tokens."""
    whole = list(ids) or [served.vocabulary.eos_id]
    kept = cropped(served, whole, options)
    return Prompt(_generation(kept, options, None), len(kept) < len(whole))


def after_parts(served: Served, parts: Sequence[str | int], options: Options) -> Prompt:
    """Return the generation that goes on after texts and token ids."""
    newest: list[int] = []  # the last one first
    is_cut = False
    for part in reversed(parts):
        is_cut = is_cut or len(newest) >= served.block_size
        if is_cut:
            break
        if isinstance(part, str):
            end = newest_text(part, CHARACTERS * served.block_size)
            newest += reversed(encoded(served, end, "prompt"))
            is_cut = len(end) < len(part)
        else:
            newest.append(part)
    prompt = after_ids(served, newest[::-1], options)
    return prompt._replace(truncated=prompt.truncated or is_cut)


def cropped(served: Served, ids: list[int], options: Options, step: int = 1) -> list[int]:
    """Return the end of a prompt that leaves room for the new tokens. A multiple of `step` tokens is left out."""
    return ids[left_out(len(ids), longest_prompt(served.block_size, options.sampling.max_new_tokens), step) :]


def _step(served: Served) -> int:
    """Return in steps of how many tokens a prompt at a cursor is cut."""
    return max(1, served.block_size // STEPS)


def at_cursor(served: Served, prefix: str, suffix: str, options: Options, edit: Edit) -> Prompt:
    """Return the generation of what stands between prefix and suffix. Raises BadRequest if the model cannot infill."""
    edit = replace(edit, prefix=prefix.rpartition("\n")[2], suffix=suffix)
    if not suffix.strip():  # at the end of a file, a model goes on as in training left to right
        return continuation(served, prefix, options, edit)
    served.require_infill()
    assert served.vocabulary.fim is not None
    most = longest_prompt(served.block_size, options.sampling.max_new_tokens)
    ids, is_cut = prompt_at_cursor(
        served.vocabulary.fim,
        lambda text: encoded(served, text, "prompt or suffix"),
        prefix,
        suffix,
        most,
        spm=True,  # the prefix is last, so what is typed on leaves the earlier tokens as they are
        step=_step(served),
    )
    # in training the prefix was encoded on its own, but the model goes on from it as from any text: newline and indentation are
    # one token nearly everywhere
    return Prompt(healed(served, ids, options, edit), is_cut)


def is_literal_fim(served: Served, text: str) -> bool:
    """Return whether a text spells `<fim_prefix>`, `<fim_suffix>` and `<fim_middle>`, and the server reads them as commands."""
    begin, end, between = FIM_TOKENS[0], FIM_TOKENS[1], FIM_TOKENS[2]
    return served.literal_fim and text.startswith(begin) and text.endswith(end) and between in text


def literal(served: Served, text: str, options: Options, edit: Edit) -> Prompt | None:
    """Return the generation for a text that spells the control tokens; None if it does not.

    Raises BadRequest for code that itself spells `<fim_suffix>`: nobody knows where its cursor is.
    """
    if not is_literal_fim(served, text):
        return None
    prefix, *suffixes = text[len(FIM_TOKENS[0]) : -len(FIM_TOKENS[1])].split(FIM_TOKENS[2])
    if len(suffixes) > 1:
        raise BadRequest(
            f"prompt must have {FIM_TOKENS[2]} once, but has it {len(suffixes)} times; for code that spells it, send a suffix",
            "prompt",
        )
    return at_cursor(served, prefix, suffixes[0], options, edit)


def require_chat(served: Served) -> str:
    """Return the template of a run that was fine-tuned on instructions. Raises BadRequest for any other."""
    if served.template is None:
        raise BadRequest(
            f"{served.name} must be fine-tuned on instructions to chat, but has no template of questions; fine-tune it with "
            f"sft_train.py (and export that run, for an export), or use a completion"
        )
    return served.template


def chat(served: Served, conversation: Conversation, options: Options) -> Prompt:
    """Return the generation of the response to the last exchange. Raises BadRequest if the run cannot chat."""
    template = require_chat(served)
    exchanges, before = conversation.exchanges, conversation.before
    what = "the last message with the system messages" if before else "the last message"
    asked = _newest(
        exchanges if served.remembers else exchanges[-1:], CHARACTERS * served.block_size, len(before), what
    )
    room = min(options.sampling.max_new_tokens, served.block_size // OPEN_ANSWER)
    try:
        ids, dropped = prompt_that_fits(template, asked, served.vocabulary, served.block_size, room, before)
    except ENCODING as e:
        raise BadRequest(f"messages: {e}", "messages") from None
    if len(ids) >= served.block_size:
        raise BadRequest(
            f"{what} must leave room for an answer in the context of {served.block_size} tokens, but has "
            f"{len(ids)} with its template; shorten it",
            "messages",
        )
    generation = replace(_generation(ids, options, None), own_text=True)
    return Prompt(generation, dropped > 0 or len(asked) < len(exchanges))


def _newest(exchanges: Sequence[Exchange], n_chars: int, n_before: int, what: str) -> list[Exchange]:
    """Return the last exchanges that can fit after `n_before` characters, so that no long text is encoded in vain.

    Raises BadRequest, which says `what` is too long, if the last one cannot.
    """
    lengths = [len(exchange.instruction) + len(exchange.response) for exchange in reversed(exchanges)]
    lengths[0] += n_before
    if lengths[0] > n_chars:
        raise BadRequest(
            f"{what} must have at most {n_chars:,} characters, but has {lengths[0]:,}; shorten it", "messages"
        )
    n = sum(length <= n_chars for length in accumulate(lengths))
    return list(exchanges[-n:])


def _generation(ids: Sequence[int], options: Options, edit: Edit | None) -> Generation:
    return Generation(
        ids,
        options.sampling,
        edit=edit,
        n_logprobs=options.n_logprobs,
        time_limit_s=options.time_limit_s,
        lines_limit_s=options.lines_limit_s,
    )
