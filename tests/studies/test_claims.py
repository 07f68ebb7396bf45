"""The audit of the projects' claims: exact figures, and which add up."""

import math

import pytest

from kindling.studies.audit import adds_up, audit_text, recomputed, shown, verdict
from kindling.studies.claims import CLAIMS, Claim


def claim(seed: str, what: str) -> Claim:
    (found,) = [c for c in CLAIMS if c.seed == seed and c.what == what]
    return found


@pytest.mark.parametrize(
    ("seed", "what", "value"),
    [
        ("000", "parameters, middle", 123_591_168),
        ("001", "parameters", 1_850_112),
        ("002", "sum of its parts", 33_551_168),
        ("003", "parameters", 44_062_661),
        ("003", "speed, tokens/s", 99e6 / 46_695),
        ("003", "perplexity of the loss 2.15", math.exp(2.15)),
        ("003", "speed, FLOP/s", 6 * 44_062_661 * 99e6 / 46_695),
        ("004", "GSM8K, per cent of 1,319", 100 * 60 / 1319),
        ("004", "tokens of the four stages, in billions", 29.8),
    ],
)
def test_a_figure_is_recomputed_exactly(seed, what, value):
    assert recomputed(claim(seed, what)) == pytest.approx(value, rel=1e-12)


def test_the_fall_of_44_per_cent_and_the_perplexity_give_the_one_before():
    found = claim("000", "perplexity before fine-tuning, middle")
    assert recomputed(found) == pytest.approx(2.16 ** (1 / 0.56), rel=1e-3)


@pytest.mark.parametrize(
    ("seed", "what", "said"),
    [
        ("000", "parameters, middle", "NO, by -17.6%"),
        ("000", "parameters, largest", "adds up"),
        ("001", "parameters", "NO, by -47.1%"),
        ("001", "speed of training on a CPU, FLOP/s", "NO, by a factor of 4.0"),
        ("003", "rows of 1,024 in a step", "NO, by -3.3%"),
        ("004", "ARC Challenge, per cent of 1,172, over the chance of 25", "NO, by -2.2"),
        ("004", "Wikitext, nats a word that stage 4 lost", "implied"),
    ],
)
def test_a_verdict_says_by_how_much(seed, what, said):
    assert verdict(claim(seed, what), recomputed(claim(seed, what))) == said


def test_what_is_only_implied_cannot_be_wrong():
    assert all(adds_up(c, recomputed(c)) for c in CLAIMS if c.given is None)


def test_every_claim_has_what_its_kind_needs():
    for c in CLAIMS:
        assert (c.kind in ("parameters", "flops_per_s")) == bool(c.preset), c.what
        assert math.isfinite(recomputed(c)) and c.least <= c.most, c.what


def test_the_text_counts_and_shows_every_project():
    text = audit_text()
    wrong = sum(not adds_up(c, recomputed(c)) for c in CLAIMS)
    assert f"{wrong} do not" in text and all(f"Project 00{n}" in text for n in range(5))
    assert shown(33_551_168) == "33,551,168" and shown(4.04e12) == "4.040e+12" and shown(8.584) == "8.58"
