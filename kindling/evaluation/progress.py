"""The progress bars of an evaluation, all of one form.

with progress_bar("memorisation", len(dataset), "token") as bar:
    longest_overlaps(samples, dataset, bar.update)
"""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(what: str, total: int, unit: str, shown: bool = True) -> tqdm:
    """Return a progress bar for a `with` statement. It disappears when it is done, and is never visible unless `shown`."""
    return tqdm(
        total=total, unit=unit, unit_scale=True, desc=f"{what:<16}", mininterval=0.5, leave=False, disable=not shown
    )
