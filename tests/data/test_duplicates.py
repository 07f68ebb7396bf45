import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kindling.data.duplicates import BANDS, SLOTS, MinHashIndex, signature, window_hashes, word_hashes


def mark(text: str) -> bytes:
    return signature(word_hashes(text))


def jaccard(a: str, b: str) -> float:
    sets = [set(itertools.pairwise(w)) for w in (re.findall(r"\w+", t.lower()) for t in (a, b))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_a_window_hash_stands_for_its_words_in_their_order(words, length):
    hashes = window_hashes(word_hashes(" ".join(words)), length).tolist()
    windows = list(zip(*(words[i:] for i in range(length))))
    assert len(hashes) == len(windows)
    assert len(set(hashes)) == len(set(windows))


def test_words_do_not_depend_on_layout_case_or_process():
    assert word_hashes("def  Foo(x):\n\treturn x").tolist() == word_hashes("DEF foo x return X").tolist()
    assert word_hashes("a").tolist() == [3405396810240292928]  # not the interpreter's own hash, which differs each time
    assert mark("one") == b""


def test_the_estimate_is_the_jaccard_similarity_of_word_pairs(corpus):
    rng = random.Random(0)
    errors = []
    for path in sorted(corpus.rglob("*.py"))[:40]:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if len(lines) < 30:
            continue
        other = "\n".join(line for line in lines if rng.random() > 0.1)
        index = MinHashIndex(0.01)
        index.add(mark(text))
        found = index.find(mark(other))
        assert found is not None
        errors.append(found[1] - jaccard(text, other))
    assert len(errors) > 20
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06  # the theory says 0.04


def test_the_index_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    index, marks = MinHashIndex(0.7), np.empty((2500, SLOTS), np.uint8)
    for i in range(2500):  # beyond two growths
        if i % 3 == 2:  # a copy of an earlier one with some slots changed
            slots = marks[int(rng.integers(i))].copy()
            slots[rng.choice(SLOTS, size=int(rng.integers(0, 30)), replace=False)] += 1
        else:
            slots = rng.integers(0, 256, SLOTS, dtype=np.uint8)
        new = slots.tobytes()
        equal = (marks[:i] == slots).mean(axis=1) if i else np.zeros(1)
        best = (equal.max() - 1 / 256) / (1 - 1 / 256)
        found = index.find(new)
        assert (found is not None) == (best >= 0.7)
        assert found is None or (found[1] == pytest.approx(best) and equal[found[0]] == equal.max())
        assert index.add(new) == i
        marks[i] = slots
    assert len(index) == 2500 and SLOTS % BANDS == 0


def test_texts_too_short_for_a_signature_are_never_near_duplicates():
    index = MinHashIndex(0.5)
    assert [index.add(mark("x =")), index.add(mark("x ="))] == [0, 1]
    assert index.find(mark("x =")) is None
