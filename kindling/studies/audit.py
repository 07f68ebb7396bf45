"""Recomputes what can be recomputed of the claims in claims.py, and says where they do not add up.

print(audit_text())
"""

from __future__ import annotations

import math

from kindling.evaluation.intervals import wilson
from kindling.studies.claims import CLAIMS, Claim
from kindling.tables import Section, as_text
from presets import preset


def recomputed(claim: Claim) -> float:
    """Return the figure of a claim, from the others."""
    a = claim.inputs
    if claim.kind == "parameters":
        return float(preset(claim.preset).model.n_parameters)
    if claim.kind == "product":
        return math.prod(a)
    if claim.kind == "sum":
        return math.fsum(a)
    if claim.kind == "ratio":
        return a[0] / a[1]
    if claim.kind == "difference":
        return a[0] - a[1]
    if claim.kind == "exp":
        return math.exp(a[0])
    if claim.kind == "log":
        return math.log(a[0])
    if claim.kind == "count":
        return 100 * round(a[0] / 100 * a[1]) / a[1]
    if claim.kind in ("low", "high"):
        return 100 * getattr(wilson(int(a[0]), int(a[1])), claim.kind)
    tokens, seconds = a  # flops_per_s: 6 for each parameter and token
    return 6 * preset(claim.preset).model.n_parameters * tokens / seconds


def adds_up(claim: Claim, value: float) -> bool:
    """Return whether a figure is within what adds up."""
    return claim.least <= value <= claim.most


def verdict(claim: Claim, value: float) -> str:
    """Return whether a claim adds up, and if not, by how much the recomputed figure differs from it."""
    if adds_up(claim, value):
        return "adds up" if claim.given is not None else "implied"
    assert claim.given is not None, "what is only implied cannot be wrong"
    if claim.kind == "difference":
        return f"NO, by {value:+.1f}"
    off = value / claim.given - 1
    return f"NO, by {off:+.1%}" if abs(off) < 1 else f"NO, by a factor of {1 + off:.1f}"


def shown(value: float) -> str:
    """Return a figure with as many digits as say something."""
    if value == round(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.3e}" if abs(value) >= 1e10 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def audit_sections() -> list[Section]:
    """Return a table for each project."""
    found = []
    for seed in sorted({claim.seed for claim in CLAIMS}):
        own = [claim for claim in CLAIMS if claim.seed == seed]
        rows = [[c.what, c.claimed, shown(recomputed(c)), verdict(c, recomputed(c))] for c in own]
        notes = [f"{c.what}: {c.why}" for c in own if c.why]
        found.append(Section(f"Project {seed}", ["figure", "claimed", "recomputed", ""], rows, notes, names=2))
    return found


def audit_text() -> str:
    """Return the whole audit for a terminal."""
    given = [claim for claim in CLAIMS if claim.given is not None]
    well = sum(adds_up(claim, recomputed(claim)) for claim in given)
    implied = len(CLAIMS) - len(given)
    head = [
        f"{len(given)} claims recomputed: {well} add up, {len(given) - well} do not; {implied} figures are only implied"
    ]
    return as_text(head, audit_sections())
