"""What the projects behind the presets claim, as data: a figure each, and the other figures that it can be recomputed from.

The kinds: `parameters` of a preset's shape; `product`, `sum`, `ratio` and `difference` of figures; `exp` and `log` of one;
`count`: the nearest whole number of right answers, as a percentage; `low` and `high`: the ends of the 95% interval of such a
percentage (Wilson); `flops_per_s` that a time implies. `least` and `most` are what still adds up: most often what rounds to
the claim. `why` says where they are from, if not from rounding. A claim without `given` is only implied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "parameters", "product", "sum", "ratio", "difference", "exp", "log", "count", "low", "high", "flops_per_s"
]


@dataclass(frozen=True)
class Claim:
    """A figure that a project gives, and how it is recomputed."""

    seed: str
    what: str
    claimed: str
    """As it is shown."""
    kind: Kind
    inputs: tuple[float, ...]
    least: float
    most: float
    preset: str = ""
    why: str = ""
    given: float | None = None
    """The claimed figure, to which a difference is relative."""


CLAIMS = (
    Claim("000", "parameters, smallest", "50M", "parameters", (), 49.5e6, 51.5e6, "code-50m", given=50e6),
    Claim("000", "parameters, middle", "150M", "parameters", (), 145e6, 155e6, "code-150m", "untied it has 161M", given=150e6),
    Claim("000", "parameters, largest", "225M", "parameters", (), 224.5e6, 225.5e6, "code-225m", given=225e6),
    Claim("000", "tokens for each parameter, largest against smallest", "the same recipe",
          "ratio", (3e9 / 225_317_760, 819e6 / 50_910_208),
          0.95, 1.05, why="tokens over exact parameters; the largest model saw fewer for each", given=1),
    Claim("000", "loss after fine-tuning, middle, of perplexity 2.16", "not given", "log", (2.16,), 0.765, 0.775),
    Claim("000", "perplexity before fine-tuning, middle", "not given", "exp", (0.7701 / 0.56,), 3.9, 4.0,
          why="from the loss after it and the fall"),
    Claim("000", "instructions seen in three epochs", "not given", "product", (18_612, 3), 55_836, 55_836),
    Claim("001", "parameters", "3.5M", "parameters", (), 3.4e6, 3.6e6, "tinystories", given=3.5e6),
    Claim("001", "tokens of a step", "256 rows in 16 x 16", "product", (16, 16, 256), 65_536, 65_536, given=65_536),
    Claim("001", "passes over the 47,500 stories of its training split", "not given",
          "ratio", (10_000 * 65_536, 47_500 * 220), 1, 100,
          why="at about 220 tokens a story"),
    Claim("001", "speed of training on a CPU, FLOP/s", "30 minutes",
          "flops_per_s", (10_000 * 65_536, 1800), 0, 1e12, "tinystories",
          "a CPU of 16 cores gives about 1e12 at most", 1e12),
    Claim("001", "perplexity of the training loss 1.8", "25 to 35 in validation", "exp", (1.8,), 25, 35, given=25),
    Claim("001", "untrained perplexity, of a uniform guess", "8,000", "exp", (8.987,), 7_900, 8_100, given=8_000),
    Claim("002", "parameters", "33,551,168", "parameters", (), 33_551_168, 33_551_168, "autocomplete", given=33_551_168),
    Claim("002", "sum of its parts", "33,551,168",
          "sum", (4_096_000, 131_072, 25_219_072, 1_024, 4_104_000), 33_551_168, 33_551_168, given=33_551_168),
    Claim("002", "eight blocks", "25,219,072", "product", (3_152_384, 8), 25_219_072, 25_219_072, given=25_219_072),
    Claim("002", "weights in fp32, MB", "under 150 MB of RAM", "product", (33_551_168, 4e-6), 0, 150,
          why="without the interpreter and PyTorch, which need more than the rest", given=150),
    Claim("002", "steps of 32 rows of 256 for 402M tokens", "not given", "ratio", (402e6, 32 * 256), 49_000, 49_200),
    Claim("003", "parameters", "44M", "parameters", (), 43.5e6, 44.5e6, "fineweb-nano", given=44e6),
    Claim("003", "rows of 1,024 in a step", "99M tokens in 10,000 steps", "ratio", (99e6, 10_000 * 1024), 9.95, 10.05,
          why="a step has a whole number of rows", given=10),
    Claim("003", "perplexity of the loss 2.15", "8.5", "exp", (2.15,), 8.45, 8.65, given=8.5),
    Claim("003", "hours of 46,695 s", "about 13", "ratio", (46_695, 3600), 12.5, 13.5, given=13),
    Claim("003", "speed, tokens/s", "not given", "ratio", (99e6, 46_695), 0, 1e5),
    Claim("003", "speed, FLOP/s", "a laptop's GPU",
          "flops_per_s", (99e6, 46_695), 0, 1.5e13, "fineweb-nano", "an M-series GPU gives 2.6e12 to 1.5e13", 1.5e13),
    Claim("004", "parameters", "303M", "parameters", (), 302.5e6, 303.5e6, "smallcoder-1", given=303e6),
    Claim("004", "tokens of the four stages, in billions", "29.8", "sum", (6.3, 7.5, 10, 6), 29.75, 29.85, given=29.8),
    Claim("004", "shares of stage 2, per cent", "100", "sum", (60, 40), 100, 100, given=100),
    Claim("004", "shares of stage 3, per cent", "100", "sum", (40, 35, 15, 10), 100, 100, given=100),
    Claim("004", "shares of stage 4, per cent", "100", "sum", (45, 30, 15, 10), 100, 100, given=100),
    Claim("004", "loss of a uniform guess over 49,152 tokens", "10.87 at the start", "log", (49_152,), 10.77, 10.97, given=10.87),
    Claim("004", "HumanEval, per cent of 164", "27.4", "count", (27.4, 164), 27.35, 27.45, given=27.4),
    Claim("004", "MBPP, per cent of 500", "31.0", "count", (31.0, 500), 30.95, 31.05, given=31.0),
    Claim("004", "GSM8K, per cent of 1,319", "4.55", "count", (4.55, 1319), 4.545, 4.555, given=4.55),
    Claim("004", "ARC Easy, per cent of 2,376", "34.6", "count", (34.6, 2376), 34.55, 34.65, given=34.6),
    Claim("004", "ARC Challenge, per cent of 1,172, over the chance of 25", "22.8", "difference", (22.8, 25), 0, 75,
          why="below what guessing among four gives", given=25),
    Claim("004", "HellaSwag, per cent of 10,042", "28.3", "count", (28.3, 10_042), 28.25, 28.35, given=28.3),
    Claim("004", "HumanEval, upper end over 164 problems, against Mistral 7B", "30.5, near parity",
          "high", (45, 164), 30.5, 100, given=30.5),
    Claim("004", "MBPP, upper end over 500 problems, against Mistral 7B", "47.5, competes",
          "high", (155, 500), 47.5, 100, given=47.5),
    Claim("004", "HumanEval, lower end over 164 problems, against TinyLlama", "26.4, outperforms",
          "low", (45, 164), 26.4, 100, given=26.4),
    Claim("004", "MBPP, lower end over 500 problems, against TinyLlama", "27.6, outperforms",
          "low", (155, 500), 27.6, 100, given=27.6),
    Claim("004", "MBPP, upper end over 500 problems, against Zephyr 1.3B", "34.0, rivals",
          "high", (155, 500), 34.0, 100, given=34.0),
    Claim("004", "size of 7B against 303M", "23 times", "ratio", (7e9, 303e6), 22.5, 23.5, given=23),
    Claim("004", "Wikitext, nats a word that stage 4 lost", "not given", "log", (167.6 / 35.4,), 0, 2,
          why="of word perplexities 35.4 after stage 3 and 167.6 after stage 4"),
)  # fmt: skip
