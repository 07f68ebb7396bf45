"""The settings of sampling: how the next token is chosen. Imports no torch, as the server for int8 exports uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Optional

from tyro.constructors import PrimitiveConstructorSpec

from kindling.errors import KindlingError

# any number of texts, each an argument; a plain `tuple`, because for tuple[str, ...] tyro imports typeguard, which takes 0.1 s
Texts = Annotated[
    tuple,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]


class GenerationError(KindlingError):
    """Settings, a prompt or a question for which nothing can be generated."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    """Stop after this many tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 is greedy."""
    top_k: Optional[int] = 50  # not `int | None`, for which tyro imports typeguard, which takes 0.1 s
    """Keep only this many of the most likely tokens. None: all."""
    top_p: float = 1.0
    """Keep only the most likely tokens that together have this probability (nucleus sampling)."""
    greedy: bool = False
    """Always take the most likely token."""
    seed: int = 0
    """The same seed gives the same text."""
    min_p: float = 0.0
    """Keep only tokens with at least this fraction of the most likely token's probability. 0: off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely. 1: off."""
    stop: Texts = ()
    """End before the first of these strings, which is not printed. A newline is $'\\n' in most shells."""

    def check(self) -> None:
        """Raise GenerationError for a value that cannot be used."""
        for name, holds, must in (
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or 0.01 <= self.temperature <= 100,
                "from 0.01 to 100, or 0 for greedy",
            ),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition-penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100, and 1 for none"),
            ("stop", all(self.stop), "a string of at least one character"),
        ):
            if not holds:
                raise GenerationError(f"--{name} must be {must}, but is {getattr(self, name.replace('-', '_'))!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.greedy or self.temperature == 0
