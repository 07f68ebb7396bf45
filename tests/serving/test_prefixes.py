from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from kindling.serving.prefixes import Prefixes, common_length

ids = st.lists(st.integers(0, 2), max_size=20)


@given(ids, ids, ids)
def test_the_common_beginning_is_the_longest(both, a, b):
    a, b = both + a, both + b
    n = common_length(a, b)
    assert n >= len(both) and a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def used(*texts: str) -> tuple[FakeEngine, Prefixes]:
    """Return an engine whose rows hold these texts, the first of them used longest ago."""
    engine = FakeEngine(n_rows=len(texts))
    prefixes = Prefixes(engine)
    for row, text in enumerate(texts):
        engine.rows[row] = [ord(c) for c in text]
        prefixes.give_back(row)
    return engine, prefixes


def taken(prefixes: Prefixes, text: str) -> tuple[int, int]:
    """Return the row that a prompt gets, and how much of it that holds."""
    found = prefixes.find([ord(c) for c in text])
    return prefixes.take(found), found.length


def test_the_row_with_the_longest_beginning_goes_on():
    _, prefixes = used("hello", "help me", "other")
    assert taken(prefixes, "help us") == (1, 5)
    assert taken(prefixes, "hello!") == (0, 5)


def test_otherwise_the_least_recently_used_row_is_overwritten():
    engine, prefixes = used("one", "two", "three")
    assert taken(prefixes, "four") == (0, 0) and engine.rows[0] == []
    prefixes.give_back(0)
    assert taken(prefixes, "five")[0] == 0, "an empty row, of which nothing is lost"
    assert taken(prefixes, "six")[0] == 1


def test_a_row_that_another_holds_as_well_is_overwritten_first():
    _, prefixes = used("a document", "another one", "another on", "a third")
    assert taken(prefixes, "new")[0] == 1
    assert taken(prefixes, "more")[0] == 0


def test_a_last_free_row_is_taken_whatever_it_holds():
    engine, prefixes = used("a long document", "b")
    assert taken(prefixes, "b!")[0] == 1
    assert taken(prefixes, "a x") == (0, 2) and engine.rows[0] == [ord("a"), ord(" ")]
    assert prefixes.n_free == 0
