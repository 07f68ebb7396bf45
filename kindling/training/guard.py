"""Which gradient norms are outliers, by the norms of the good steps before.

    guard = SpikeGuard(ratio=10)
    bad = not norm <= guard.limit(step)  # so that NaN is bad too
    guard.add(step, norm, good=not bad)

One batch of rubbish gives a gradient many times as long as the others, and an optimiser with momentum carries it for
hundreds of steps. So the trainer skips a step whose norm is above `ratio` times the median of those that were not
skipped. What was skipped never enters the window: one NaN costs one step.

Limit: the norms are taken to stay of one size over a window. Where they grow by more than `ratio` for good within less
than half of it, every step from there on is skipped, because the window stands still; it is the trainer that ends this, which
rolls back, and at last gives up, after some number of skipped steps in a row.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

WARM = 32  # good norms before anything is called an outlier
WINDOW = 128
LAG = 2  # on a GPU a step is launched before the norm of the one before it is known


class SpikeGuard:
    """Says from the gradient norms of earlier good steps above which norm a step is an outlier."""

    def __init__(self, ratio: float) -> None:
        """A `ratio` of 0 switches it off; the norms are kept all the same, for a resume that switches it on."""
        self.ratio = ratio
        self._known: deque[tuple[int, float]] = deque(maxlen=WINDOW + LAG - 1)  # steps, ascending, and their norms

    def limit(self, step: int) -> float:
        """Return the norm above which `step` is an outlier: `ratio` times the median of the newest WINDOW good norms.

        It is infinite until WARM of them are known. Only norms of steps up to step - LAG count, even where later ones
        were added, so that it does not matter when a device's results were read. Steps are asked for in ascending order.
        """
        norms = [norm for known, norm in self._known if known <= step - LAG][-WINDOW:]
        if not self.ratio or len(norms) < WARM:
            return math.inf
        return self.ratio * median(norms)

    def add(self, step: int, norm: float, good: bool) -> None:
        """Take in what a step came to; steps ascend.

        What is not good or not finite never enters the window. Neither does 0, the gradient of a batch without a target:
        it says nothing of the others, and a median of 0 would let no step pass.
        """
        if good and 0 < norm < math.inf:
            self._known.append((step, norm))

    def state_dict(self) -> dict[str, Any]:
        """Return the window as plain values."""
        return {"steps": [step for step, _ in self._known], "norms": [norm for _, norm in self._known]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the window of `state_dict`, in place of one's own."""
        self._known.clear()
        self._known.extend(zip(state["steps"], state["norms"], strict=True))
