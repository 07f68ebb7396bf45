"""The progress bar of training. It counts steps, or seconds for a run of `train.max_minutes`."""

from __future__ import annotations

import sys

from tqdm import tqdm

from config import TrainConfig


class ProgressBar:
    """Shows how much of a run is done, its loss and its speed. Without `shown` it is silent."""

    def __init__(self, train: TrainConfig, step: int, elapsed_s: float, shown: bool):
        self._by_clock = train.max_minutes is not None
        interval_s = 0.5 if sys.stderr.isatty() else 15
        if train.max_minutes is None:
            self._bar = tqdm(
                total=train.max_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                mininterval=interval_s,
                disable=not shown,
            )
        else:
            total_s = 60 * train.max_minutes
            self._bar = tqdm(
                total=total_s,
                initial=min(elapsed_s, total_s),  # tqdm drops a total that is exceeded
                bar_format="{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}",
                dynamic_ncols=True,
                mininterval=interval_s,
                disable=not shown,
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, step_s: float) -> None:
        """Count one step, which took `step_s` seconds."""
        self._bar.update(max(0.0, min(step_s, self._bar.total - self._bar.n)) if self._by_clock else 1)

    def go_back(self, step: int) -> None:
        """Show that the run is back at `step`. Elapsed seconds do not go back."""
        self._bar.update(0 if self._by_clock else min(0, step - self._bar.n))

    def show(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show the newest figures after the bar."""
        at = f"step {step:,}, " if self._by_clock else ""
        self._bar.set_postfix_str(f"{at}loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)

    def refresh(self) -> None:
        """Draw the bar again after other output."""
        self._bar.refresh()
