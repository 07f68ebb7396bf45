"""Reads how texts are to be generated from a request: each protocol has its own names for the same settings."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import NamedTuple

from kindling.generation.settings import Sampling
from kindling.serving.body import HUGE, BadRequest, Fields
from kindling.serving.edit import Edit
from kindling.serving.served_model import Options, Prompt, Served

SEEDS = 2**62  # clients send up to 64 bits
LOWEST_TEMPERATURE = 0.01  # below it, sampling is greedy
STOP_CHARACTERS = 1000
# Ghost text is shown unasked, so it is the most likely text, and the same again for the same place.
AT_CURSOR = Sampling(max_new_tokens=64, temperature=0.0)


class Names(NamedTuple):
    """What a protocol calls a setting."""

    max_new_tokens: tuple[str, ...]
    no_limit: tuple[int, ...] = ()
    """Numbers of tokens that mean as many as the server allows."""
    seed: str = "seed"
    random_seed: tuple[int, ...] = ()
    """Seeds that mean any."""
    repetition_penalty: str = "repetition_penalty"
    stop: str = "stop"


def sampling(served: Served, fields: Fields, names: Names, default: Sampling) -> Sampling:
    """Return the sampling that a request asks for; what it leaves out is as in `default`. Without a seed, it is random."""
    high = served.limits.max_new_tokens
    temperature = fields.number("temperature", 0, 100)
    top_k = fields.integer("top_k", -1, HUGE)
    top_p = fields.number("top_p", 0, 1)
    min_p = fields.number("min_p", 0, 1)
    penalty = fields.number(names.repetition_penalty, 0.01, 100)
    seed = fields.integer(names.seed, min((0, *names.random_seed)), 2**64 - 1)
    stop = fields.texts(names.stop, served.limits.stops)
    if not all(0 < len(text) <= STOP_CHARACTERS for text in stop):
        raise fields.wrong(names.stop, f"texts of 1 to {STOP_CHARACTERS} characters")
    if seed is None or seed in names.random_seed:
        seed = secrets.randbelow(2**31)
    asked = max_new_tokens(fields, names)
    found = replace(
        default,
        max_new_tokens=min(high, default.max_new_tokens if asked is None else asked or high),
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k if top_k > 0 else None,
        top_p=default.top_p if top_p is None else top_p,
        min_p=default.min_p if min_p is None else min_p,
        repetition_penalty=1.0 if penalty is None else penalty,
        seed=seed % SEEDS,
        stop=stop,
    )
    if found.temperature < LOWEST_TEMPERATURE or found.top_p == 0:
        found = replace(found, temperature=0.0, top_p=found.top_p or 1.0)
    found.check()
    return found


def max_new_tokens(fields: Fields, names: Names) -> int | None:
    """Return the number of new tokens that a request asks for; 0 means no limit of its own, and None that it names none."""
    for name in names.max_new_tokens:
        asked = fields.integer(name, min((1, *names.no_limit)), HUGE)
        if asked is not None:
            if asked < 1 and asked not in names.no_limit:
                raise fields.wrong(name, "at least 1")
            return max(0, asked)
    return None


def only_warms_cache(fields: Fields) -> bool:
    """Return whether a request wants no text: llama.cpp's editors let a prompt be read before they need what follows."""
    return fields.integer("n_predict", -2, HUGE) == 0


def refuse_penalties(fields: Fields, instead: str) -> None:
    """Raise BadRequest for penalties that this server does not have, and name the one that it has; zeros pass."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.number(name, -2, 2)
        fields.refuse(name, (0,), f"use {instead}")


def edit(served: Served, fields: Fields, n_indent: int = 0) -> Edit:
    """Return the rules for text at a cursor. `max_lines` and `min_confidence` are this server's own fields."""
    confidence = fields.number("min_confidence", 0, 1)
    return Edit(
        max_lines=fields.integer("max_lines", 1, HUGE),
        stop_at_dedent=fields.flag("stop_at_dedent", n_indent > 0),
        min_confidence=served.min_confidence if confidence is None else confidence,
    )


def options(served: Served, chosen: Sampling, n_logprobs: int | None = None) -> Options:
    """Return the options of a request."""
    return Options(chosen, n_logprobs, served.limits.time_s)


def with_seeds(prompts: list[Prompt], n: int) -> list[Prompt]:
    """Return `n` of each prompt, the first with its seed, the others with the seeds after it."""
    return [
        prompt._replace(
            generation=replace(
                prompt.generation,
                sampling=replace(prompt.generation.sampling, seed=prompt.generation.sampling.seed + k),
            )
        )
        for prompt in prompts
        for k in range(n)
    ]


def require_few(served: Served, n_prompts: int, n: int, param: str) -> None:
    """Raise BadRequest if a request asks for too many texts."""
    if not 1 <= n_prompts * n <= served.limits.n:
        raise BadRequest(
            f"{param} must ask for 1 to {served.limits.n} texts, but {n_prompts * n} are asked for; send several requests",
            param,
        )
