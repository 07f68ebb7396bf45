"""How a request's text becomes a prompt."""

import asyncio
from dataclasses import replace

import pytest
from http_server import FIM, served

from kindling.data.prompts import Exchange, prompt_text
from kindling.generation.settings import Sampling
from kindling.serving.body import BadRequest
from kindling.serving.edit import Edit
from kindling.serving.generation import Piece
from kindling.serving.replies import Answers, Whole, _Mail, collect
from kindling.serving.served_model import Conversation, Options, at_cursor, chat, continuation
from kindling.tokenization.infilling import arrange, prompt_at_cursor

HOW = Options(Sampling(16, temperature=0.0))


@pytest.fixture
def small():
    one = served(block_size=64)
    yield one
    one.scheduler.close(0.0)


def shown(prompt) -> str:
    return "".join(map(chr, prompt.generation.ids))


def test_a_prompt_is_healed_at_its_end_and_cropped_at_its_beginning(small):
    prompt = continuation(small, "0123456789", HOW)
    assert (shown(prompt), prompt.generation.healing.text, prompt.truncated) == ("0123456", "789", False)
    long = continuation(small, "\n".join(["x" * 30] * 300), HOW)
    assert len(long.generation.ids) + len(long.generation.healing.text) == 64 - 16 and long.truncated
    most = continuation(small, "y" * 100, Options(Sampling(10_000)))
    assert len(most.generation.ids) + 3 == 32  # half the context is for the answer


def test_an_empty_prompt_begins_a_document(small):
    assert list(continuation(small, "", HOW).generation.ids) == [small.vocabulary.eos_id]


def test_a_prompt_that_the_tokenizer_cannot_spell_names_its_field(small):
    with pytest.raises(BadRequest, match=r"^input: the text must be ASCII") as e:
        continuation(small, "é", HOW, param="input")
    assert e.value.param == "input"


def test_at_a_cursor_the_suffix_comes_first_and_the_edit_knows_both_sides(small):
    prompt = at_cursor(small, "a\n  b", "c\n", HOW, Edit(max_lines=2))
    generation = prompt.generation
    expected = arrange(FIM, small.vocabulary.encode("a\n  b"), small.vocabulary.encode("c\n"), [], spm=True)
    assert [*generation.ids, *generation.healing.taken_back] == expected
    assert (generation.healing.text, generation.n_taken_back) == ("  b", 3), (
        "after a newline alone no indentation is expected"
    )
    assert generation.edit == Edit(prefix="  b", suffix="c\n", max_lines=2)


@pytest.mark.parametrize("prefix", ["", "ab"])
def test_the_control_tokens_before_a_short_prefix_are_never_taken_back(small, prefix):
    generation = at_cursor(small, prefix, "c\n", HOW, Edit()).generation
    assert generation.ids[-1] == FIM.middle and (generation.healing.text if generation.healing else "") == prefix


@pytest.mark.parametrize("suffix", ["s" * 40, ""])
@pytest.mark.parametrize("before_it", [0, 10_000])
def test_while_somebody_types_most_of_the_prompt_stays(small, suffix, before_it):
    """So that its keys and values are there already: cut token by token, every prompt would begin elsewhere."""
    stays, more = 0, "x" * before_it  # more than is encoded
    text = "".join(chr(ord("A") + i * i % 57) for i in range(190))
    before = at_cursor(small, more + text[:150], suffix, HOW, Edit()).generation.ids
    for end in range(151, 183):
        ids = at_cursor(small, more + text[:end], suffix, HOW, Edit()).generation.ids
        assert 48 - 2 * 8 < len(ids) <= 48
        stays += list(ids[: len(before)]) == list(before)
        before = ids
    assert stays >= 27


def test_a_prompt_at_a_cursor_keeps_what_is_nearest_and_says_what_it_left_out():
    def encode(text: str) -> list[int]:
        return list(map(ord, text))

    for n_prefix in range(0, 90, 7):
        for n_suffix in range(0, 90, 7):
            for step in (1, 8):
                prefix, suffix = "p" * n_prefix + "|", "|" + "s" * n_suffix
                ids, is_cut = prompt_at_cursor(FIM, encode, prefix, suffix, 64, True, step)
                text = "".join(map(chr, ids))
                head, _, rest = text.partition(chr(FIM.middle))
                assert rest.endswith("|") and head[2:].startswith("|") and len(ids) <= 64
                assert is_cut == (len(rest) < len(prefix) or len(head) - 2 < len(suffix))
                if n_prefix + n_suffix + 2 + 2 * step <= 61:
                    assert not is_cut


def test_a_question_is_in_the_template_and_forgets_what_came_before(small):
    wide = replace(small, block_size=256, template="user-assistant")
    exchanges = [Exchange("One?", "1"), Exchange("Two?")]
    prompt = chat(wide, Conversation(exchanges), HOW)
    assert shown(prompt) == prompt_text("user-assistant", exchanges[-1]) and prompt.truncated
    assert prompt.generation.own_text
    both = chat(replace(wide, remembers=True), Conversation(exchanges), HOW)
    assert shown(both) == "User: One?\nAssistant:1\0\nUser: Two?\nAssistant:" and not both.truncated
    with pytest.raises(BadRequest, match="must leave room for an answer"):
        chat(wide, Conversation([Exchange("x" * 300)]), HOW)
    with pytest.raises(BadRequest, match="at most 20,480 characters, but has 99,999"):
        chat(wide, Conversation([Exchange("x" * 99_999)]), HOW)


def test_the_system_message_stands_before_the_first_exchange_that_fits(small):
    wide = replace(small, block_size=256, template="user-assistant", remembers=True)
    exchanges = [Exchange("One?", "1" * 200), Exchange("Two?", "2"), Exchange("Three?")]
    prompt = chat(wide, Conversation(exchanges, "Be short."), HOW)
    assert shown(prompt) == "User: Be short.\n\nTwo?\nAssistant:2\0\nUser: Three?\nAssistant:" and prompt.truncated
    alone = chat(replace(wide, remembers=False), Conversation(exchanges, "Be short."), HOW)
    assert shown(alone) == "User: Be short.\n\nThree?\nAssistant:"
    for length in (300, 99_999):
        with pytest.raises(BadRequest, match="the last message with the system messages must"):
            chat(wide, Conversation(exchanges, "x" * length), HOW)


def test_of_a_long_conversation_only_what_can_fit_is_encoded(small, monkeypatch):
    wide, n_encoded = replace(small, block_size=256, template="user-assistant", remembers=True), 0
    encode = wide.vocabulary.encode

    def counted(text: str) -> list[int]:
        nonlocal n_encoded
        n_encoded += len(text)
        return encode(text)

    monkeypatch.setattr(wide.vocabulary, "encode", counted)
    prompt = chat(wide, Conversation([*[Exchange("a" * 50, "b" * 50)] * 5000, Exchange("Two?")]), HOW)
    assert prompt.truncated and 100 < len(prompt.generation.ids) <= 240 and n_encoded < 1500


def test_what_healing_takes_back_is_part_of_the_prompt_and_not_of_the_answer_nor_of_its_limit(small):
    async def ask() -> Whole:
        with Answers(small, [continuation(small, "0123", Options(Sampling(4, temperature=0.0)))]) as answers:
            (whole,) = await collect(answers, 1)
        return whole

    whole = asyncio.run(ask())
    assert (whole.text, whole.done.n_prompt, whole.done.n_new) == ("4567", 4, 4)


def test_an_event_loop_is_woken_once_for_what_is_said_together(monkeypatch):
    async def ask() -> tuple[int, list]:
        loop, queues, n_woken = asyncio.get_running_loop(), [asyncio.Queue(), asyncio.Queue()], 0
        wake, mail = loop.call_soon_threadsafe, _Mail()

        def counted(*args):
            nonlocal n_woken
            n_woken += 1
            wake(*args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        for text in ("a", "b"):
            for number, queue in enumerate(queues):
                mail.put(loop, queue, (number, Piece(text)))
        got = [[await queue.get() for _ in "ab"] for queue in queues]
        mail.put(loop, queues[0], (0, Piece("c")))
        return n_woken, [*got, await queues[0].get()]

    pieces = [[(number, Piece(text)) for text in "ab"] for number in range(2)]
    assert asyncio.run(ask()) == (2, [*pieces, (0, Piece("c"))])
