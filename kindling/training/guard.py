"""Finds outliers among gradient norms, by comparison with the norms of earlier good steps.

    guard = SpikeGuard(ratio=10)
    bad = not norm <= guard.limit(step)  # written so that NaN is bad too
    guard.add(step, norm, good=not bad)

One bad batch can give a gradient many times larger than the others, and an optimiser with momentum keeps it for hundreds
of steps. So the trainer skips a step whose norm is above `ratio` times the median norm of the steps that were not skipped.
A skipped step never enters the window: one NaN costs one step.

Limit: norms are assumed to change slowly. If they grow by more than `ratio` within less than half a window and stay there,
the window gets no new norms, and every later step is skipped. After some number of skipped steps in a row the trainer rolls
back. If that does not help, `accept_new_level` takes the larger norms as the usual ones.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

MAX_LEVELS = 3  # that a run may accept
WARM = 32  # good norms that must be known before a step can be an outlier
WINDOW = 128
LAG = 2  # on a GPU a step is launched before the norm of the one before it is known


class SpikeGuard:
    """Computes the gradient norm above which a step is an outlier, from the norms of earlier good steps."""

    def __init__(self, ratio: float) -> None:
        """A `ratio` of 0 switches the guard off. It still collects norms, so that a resumed run can switch it on."""
        self.ratio = ratio
        self._known: deque[tuple[int, float]] = deque(maxlen=WINDOW + LAG - 1)  # steps, ascending, and their norms
        self._all_finite = True  # losses and norms of the bad steps since the last good one
        self._levels = 0  # accepted

    def limit(self, step: int) -> float:
        """Return the norm above which `step` is an outlier: `ratio` times the median of the newest WINDOW good norms.

        It is infinite until WARM of them are known. Only norms of steps up to step - LAG count, even if later ones are
        known already. So it does not matter when the results are read from a device. `step` must ascend from call to call.
        """
        norms = [norm for known, norm in self._known if known <= step - LAG][-WINDOW:]
        if not self.ratio or len(norms) < WARM:
            return math.inf
        return self.ratio * median(norms)

    def add(self, step: int, norm: float, good: bool, finite: bool = True) -> None:
        """Add the norm of a finished step, whose loss and norm are `finite` or not. `step` must ascend from call to call.

        Norms that are not good or not finite never enter the window. Nor does 0, the norm of a batch without targets: with
        a median of 0, every later step would be an outlier.
        """
        self._all_finite = good or (self._all_finite and finite)
        if good and 0 < norm < math.inf:
            self._known.append((step, norm))

    def accept_new_level(self) -> bool:
        """Forget the norms, so that none is an outlier until WARM new ones are known, if all bad steps in a row were finite.

        Return whether they were; False after MAX_LEVELS times.
        """
        accepted = self._all_finite and self._levels < MAX_LEVELS
        if accepted:
            self._known.clear()
            self._levels += 1
        return accepted

    def state_dict(self) -> dict[str, Any]:
        """Return the window as plain values."""
        steps, norms = [step for step, _ in self._known], [norm for _, norm in self._known]
        return {"steps": steps, "norms": norms, "all_finite": self._all_finite, "levels": self._levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the window by one that `state_dict` returned."""
        self._known.clear()
        self._known.extend(zip(state["steps"], state["norms"], strict=True))
        self._all_finite = state.get("all_finite", False)  # earlier versions did not save these
        self._levels = state.get("levels", 0)
