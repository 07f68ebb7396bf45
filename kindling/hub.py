"""Asks the hub once whether it answers, since its libraries would retry for half a minute, with a line each time.

    with hub.cache_if_unreachable() as why:  # None: the hub answers, or HF_HUB_OFFLINE says not to ask
        load_dataset(name)  # if the hub does not answer, the libraries use only their cache here

HF_ENDPOINT names another hub. Proxies and certificates are those of `huggingface_hub`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Literal

from kindling.errors import one_line

ANSWER_S = 1.5  # seconds in which the hub must answer


@cache
def _asked(endpoint: str) -> tuple[Thread, list[str | None], float]:
    """Ask a hub in a thread, once in a process. Return the thread, where it puts what it finds, and when to stop waiting."""
    from huggingface_hub import get_session

    said: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=ANSWER_S)
            said.append(None)
        except Exception as e:  # of connection, of a proxy, of a certificate: they have no common base class
            said.append(one_line(e, 120))

    asking = Thread(target=ask, daemon=True)  # a look-up of the name has no time limit of its own
    asking.start()
    return asking, said, time.monotonic() + ANSWER_S


def ask_ahead() -> None:
    """Ask the hub without waiting, so that it answers while something else is done, unless the environment says not to ask."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _asked(constants.ENDPOINT)


@cache
def _why_unreachable(endpoint: str) -> str | None:
    """Return why a hub cannot be reached, or None if it answers, whatever it says."""
    asking, said, end = _asked(endpoint)
    asking.join(max(0.0, end - time.monotonic()))
    found = said[0] if said else f"no answer in {ANSWER_S:g} s"
    return None if found is None else f"{endpoint} does not answer ({found})"


@contextmanager
def cache_if_unreachable() -> Iterator[str | None]:
    """Yield why the hub cannot be reached. If it cannot, its libraries use only their cache inside the `with` statement."""
    from huggingface_hub import constants

    why = None if constants.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT)
    if why is None:
        yield None
        return
    variable, saved = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by `datasets` when it is imported
    constants.HF_HUB_OFFLINE = True
    try:
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        yield why
    finally:
        constants.HF_HUB_OFFLINE = saved
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = saved
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable


def is_offline() -> bool:
    """Return whether the environment says not to ask the hub, or it did not answer."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def is_cached(kind: Literal["datasets", "models"], name: str) -> bool:
    """Return whether the libraries may have something of a repository in their caches."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    downloaded = Path(constants.HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}")
    return downloaded.is_dir() or (kind == "datasets" and (prepared / name.replace("/", "___")).is_dir())
