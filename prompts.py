"""The texts that instructions and answers are made into, the same for training and for use."""

from __future__ import annotations


def user_assistant(instruction: str, response: str) -> str:
    """Return one exchange in seed 004's template; the end-of-text token follows the response as it does any document."""
    return f"User: {instruction}\nAssistant: {response}"
