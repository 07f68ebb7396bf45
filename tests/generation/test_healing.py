import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.generation.healing import Healing, Spellings, split_for_healing, token_texts

VOCABULARY = ["", "a", "b", "ab", "abc", " ", " →", "bc", "c"]


def spelt(healing: Healing, draw) -> str:
    """What comes of drawing from the allowed tokens until the text is spelt."""
    out: list[int] = []
    while (mask := healing.allowed(out)) is not None:
        allowed = [token for token, holds in enumerate(mask) if holds]
        assert allowed, (healing.text, out)
        out.append(draw(allowed))
    return "".join(VOCABULARY[token] for token in out)


@given(st.lists(st.integers(1, len(VOCABULARY) - 1), min_size=2, max_size=8), st.randoms())
@settings(max_examples=300, deadline=None)
def test_whatever_is_drawn_there_is_a_next_token_and_it_spells_what_was_taken_back(ids, random):
    kept, healing = split_for_healing(ids, VOCABULARY)
    assert (
        kept == ids[: max(1, len(ids) - 3)] and "".join(VOCABULARY[token] for token in ids[len(kept) :]) == healing.text
    )
    assert spelt(healing, random.choice).startswith(healing.text)


def test_a_token_behind_which_the_rest_cannot_be_spelt_is_not_allowed():
    allowed = Healing(" →", VOCABULARY).allowed([])
    assert allowed[VOCABULARY.index(" →")] and not allowed[VOCABULARY.index(" ")]


def test_all_is_allowed_once_the_text_is_spelt_and_when_there_is_none():
    assert Healing("ab", VOCABULARY).allowed([1, 2]) is None
    assert Healing("ab", VOCABULARY).allowed([4]) is None
    assert Healing("", VOCABULARY).allowed([]) is None


@pytest.mark.parametrize("ids", [[1], [0, 0, 0], [3, 0]])
def test_a_first_token_and_those_without_a_text_are_never_taken_back(ids):
    kept, healing = split_for_healing(ids, VOCABULARY)
    assert kept == ids and healing.text == ""


def test_the_texts_of_tokens_are_those_inside_a_text():
    def decode_batch(batch: list[list[int]]) -> list[str]:
        """As SentencePiece: the space of a first token is dropped."""
        pieces = [" x", " y", "\ufffd", "<end>"]
        return ["".join(pieces[token] for token in ids).removeprefix(" ") for ids in batch]

    assert token_texts(decode_batch, 0, 4, 6, {"<end>"}) == [" x", " y", "", "", "", ""]


@given(st.lists(st.text("ab→\U0010ffff", max_size=4), max_size=12), st.text("ab→\U0010ffff", min_size=1, max_size=3))
def test_tokens_are_found_by_their_text_and_by_its_beginning(texts, wanted):
    spellings = Spellings(texts)
    assert sorted(spellings.of(wanted)) == [i for i, text in enumerate(texts) if text == wanted]
    assert sorted(spellings.beginning(wanted)) == [i for i, text in enumerate(texts) if text.startswith(wanted)]
