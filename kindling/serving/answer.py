"""The text of one request as its tokens come: whole characters, up to a stop string, by the rules of an edit."""

from __future__ import annotations

import math
from dataclasses import replace

from kindling.generation.text_stream import TextStream
from kindling.serving.edit import EditText
from kindling.serving.engine import Vocabulary
from kindling.serving.generation import Ending, Generation, Piece, Token


class Answer:
    """Turns new tokens into the pieces of text that a client gets."""

    def __init__(self, generation: Generation, vocabulary: Vocabulary):
        healing, after = generation.healing, () if generation.own_text else generation.ids[-1:]
        skip = 0 if healing is None else len(healing.text)
        self._text = TextStream(vocabulary, generation.sampling.stop, after, skip)
        self._edit = None if generation.edit is None else EditText(generation.edit)
        self._least = 0.0 if generation.edit is None else generation.edit.min_confidence
        self._wants_tokens = generation.n_logprobs is not None
        self._heals = skip > 0
        self._begins = self._text.n_decoded + skip  # the answer, in the decoded text
        self._held: list[Token] = []  # tokens whose text has not been said
        self._n_said = 0
        self._probabilities: list[float] = []
        self._pieces: list[str] = []  # said at the end
        self.n_counted = 0
        """Tokens that are part of the answer, or were part of its text before it was cut."""

    @property
    def ended_by(self) -> Ending | None:
        """What ended the text: a stop string, or a rule of the edit."""
        if self._text.stopped:
            return "stop"
        return "edit" if self._edit is not None and self._edit.ended else None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._text.found

    def add(self, token: Token) -> Piece | None:
        """Return what may be said after this token."""
        begins = self._text.n_decoded - self._begins
        new = self._text.add(token.id)
        # with healing, the first tokens only spell what was taken back; without, one may end the prompt's last character
        if not self._heals or begins >= 0 or self._text.n_decoded > self._begins:
            self.n_counted += 1
            if self._wants_tokens:
                self._held.append(replace(token, begins=begins))
            if self._least > 0:
                self._probabilities.append(math.exp(token.logprob))
        return self._piece(new if self._edit is None else self._edit.add(new))

    def finish(self, ended_by: Ending) -> tuple[Piece | None, Ending]:
        """Return what was held back and may be said, and what ended the text, which may be a rule of the edit after all."""
        new = self._text.finish(cut=ended_by in ("limit", "context", "time"))
        if self._edit is not None:
            new = self._edit.add(new) + self._edit.finish(complete=ended_by == "end of text")
            ended_by = "edit" if self._edit.ended and ended_by != "stop" else ended_by
        if self._least == 0:
            return self._piece(new), ended_by
        if sum(self._probabilities) < self._least * len(self._probabilities):
            return None, "edit"
        self._least = 0.0  # so that the text is said
        return self._piece("".join([*self._pieces, new])), ended_by

    def _piece(self, new: str) -> Piece | None:
        """Return the piece of this text, with its tokens."""
        if self._least > 0:
            self._pieces.append(new)
            return None
        if not new:
            return None
        self._n_said += len(new)
        n = sum(token.begins < self._n_said for token in self._held)
        tokens, self._held = self._held[:n], self._held[n:]
        return Piece(new, tuple(tokens))
