"""An engine and a vocabulary for tests of the scheduler: each text goes on as a script says, and passes are written down."""

from collections.abc import Callable, Sequence

import numpy as np

from kindling.generation.settings import Sampling
from kindling.serving.batch import Batch, Job
from kindling.serving.counters import Counters
from kindling.serving.generation import Generation

EOS, VOCAB = 0, 128


class FakeVocabulary:
    """A token is a character of ASCII; 0 is the end of text."""

    eos_id, bos_id, fim = EOS, None, None
    end_ids, special_ids = (EOS,), {}
    special_tokens: Sequence[str] = []
    spellings: Sequence[str] = ["", *map(chr, range(1, VOCAB))]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def piece(self, token: int) -> str:
        return self.decode([token])


def counts_up(text: str) -> str:
    """Return the character after the last one, from a to z and again."""
    return chr(ord("a") + (ord(text[-1]) - ord("a") + 1) % 26)


class FakeEngine:
    """Says `follows(text)` after each text; "" is the end of text. `passes` has the row and the tokens of each text."""

    vocab_size = VOCAB
    sure = 10.0  # the logit of what follows; those of all others are 0

    def __init__(
        self, follows: Callable[[str], str] = counts_up, n_rows: int = 4, block_size: int = 64, piece: int = 8
    ):
        self.follows, self.n_rows, self.block_size, self.piece = follows, n_rows, block_size, piece
        self.rows: list[list[int]] = [[] for _ in range(n_rows)]
        self.passes: list[list[tuple[int, str]]] = []
        self.before_pass: Callable[[list[tuple[int, str]]], None] = lambda texts: None

    def tokens(self, row: int) -> Sequence[int]:
        return self.rows[row]

    def truncate(self, row: int, length: int) -> None:
        assert 0 <= length <= len(self.rows[row])
        del self.rows[row][length:]

    def copy_row(self, row: int, source: int, length: int) -> None:
        assert row != source and 0 < length <= len(self.rows[source])
        self.rows[row] = self.rows[source][:length]

    def forward(self, texts: Sequence[tuple[int, Sequence[int]]], n_last: Sequence[int] = ()) -> np.ndarray:
        shown = [(row, "".join(map(chr, ids))) for row, ids in texts]
        self.passes.append(shown)
        self.before_pass(shown)
        assert len({row for row, _ in texts}) == len(texts)
        logits = []
        for (row, ids), n in zip(texts, n_last or [1] * len(texts)):
            self.rows[row] += ids
            assert ids and len(self.rows[row]) <= self.block_size
            for end in range(len(self.rows[row]) - n + 1, len(self.rows[row]) + 1):
                after = self.follows("".join(map(chr, self.rows[row][:end])))
                logits.append(np.zeros(VOCAB, np.float32))
                logits[-1][ord(after) if after else EOS] = self.sure
        return np.stack(logits)


def greedy_tokens(engine, vocabulary, prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """Return the new tokens of all prompts, which come together, the first of them one pass before the others."""
    batch = Batch(engine, vocabulary, Counters(), lambda: 0.0)
    sampling = Sampling(max_new_tokens=n, greedy=True)
    jobs = [Job(Generation(ids, sampling), vocabulary, lambda event: None, 0.0) for ids in prompts]
    waiting = jobs[:1]
    batch.admit(waiting)
    batch.step()
    waiting += jobs[1:]
    while waiting or batch.jobs:
        batch.admit(waiting)
        batch.step()
    return [job.out for job in jobs]
