"""The decoding of several requests, step by step and without a thread."""

from dataclasses import replace

import numpy as np
import pytest
from fake_engine import EOS, FakeEngine, FakeVocabulary, counts_up

from kindling.generation.healing import Healing, split_for_healing
from kindling.generation.settings import Sampling
from kindling.serving.batch import Batch, Job
from kindling.serving.counters import Counters
from kindling.serving.edit import Edit
from kindling.serving.generation import Done, Failed, Generation, Piece, Token

VOCABULARY = FakeVocabulary()


class Desk:
    """A batch that is moved on by hand, and what each of its clients was told."""

    def __init__(self, engine: FakeEngine):
        self.engine, self.counters, self.now = engine, Counters(), 0.0
        self.batch = Batch(engine, VOCABULARY, self.counters, lambda: self.now)
        self.waiting: list[Job] = []

    def ask(self, text: str, n: int = 5, **fields) -> tuple[Job, list]:
        """Put a request into the queue; return its job, and the list that its events go to."""
        sampling = fields.pop("sampling", Sampling(max_new_tokens=n, greedy=True))
        events: list = []
        job = Job(Generation(VOCABULARY.encode(text), sampling, **fields), VOCABULARY, events.append, self.now)
        self.waiting.append(job)
        return job, events

    def step(self) -> list[tuple[int, str]]:
        """Let requests join, and run a pass; return what the engine was given."""
        self.batch.admit(self.waiting)
        n = len(self.engine.passes)
        self.batch.step()
        return self.engine.passes[n] if len(self.engine.passes) > n else []

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self.waiting or self.batch.jobs:
            self.step()

    def answer(self, text: str, n: int = 5, **fields) -> tuple[str, Done]:
        """Return the text that a request gets, alone, and how it ended."""
        _, events = self.ask(text, n, **fields)
        self.run()
        return said(events), events[-1]


def said(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


@pytest.fixture
def desk() -> Desk:
    return Desk(FakeEngine())


def test_requests_that_come_together_are_decoded_together_and_join_and_leave_between_tokens(desk):
    _, first = desk.ask("xa", 3)
    desk.step()
    _, second = desk.ask("ym", 4)
    passes = [desk.step() for _ in range(5)]
    assert passes == [[(0, "b"), (1, "ym")], [(0, "c"), (1, "n")], [(1, "o")], [(1, "p")], []]
    assert first == [Piece("b"), Piece("c"), Piece("d"), Done("limit", 2, 0, 3)]
    assert said(second) == "nopq" and second[-1] == Done("limit", 2, 0, 4)


def test_what_is_to_be_said_is_said_once_all_have_their_token(desk):
    heard: list[list[int]] = []
    (first, _), (second, _) = desk.ask("xa", 2), desk.ask("ym", 2)
    for job in (first, second):
        job._say = lambda event: heard.append([len(first.out), len(second.out)])
    desk.step()
    assert heard == [[1, 1]] * 2
    desk.run()
    assert heard[2:] == [[2, 2]] * 4, "a last piece and the end, of each"


def test_a_long_prompt_is_read_in_pieces_while_other_texts_get_their_tokens(desk):
    desk.ask("xa", 9)
    desk.step()
    _, events = desk.ask("p" * 20, 1)
    assert [desk.step() for _ in range(3)] == [
        [(0, "b"), (1, "p" * 8)],
        [(0, "c"), (1, "p" * 8)],
        [(0, "d"), (1, "p" * 4)],
    ]
    assert said(events) == "q"


def test_a_short_prompt_does_not_wait_for_a_long_one(desk):
    desk.ask("p" * 40)
    desk.step()
    _, events = desk.ask("xa")
    assert desk.step() == [(0, "p" * 6), (1, "xa")]
    assert said(events) == "b"


def test_the_oldest_prompt_gets_half_of_each_pass(desk):
    desk.ask("p" * 40)
    for c in "abc":
        desk.ask(c * 9)
    assert desk.step() == [(0, "pppp"), (1, "aaaa")]


def test_a_text_ends_at_the_end_of_text_at_a_stop_string_and_where_the_context_is_full():
    desk = Desk(FakeEngine(lambda text: "" if text[-1] == "e" else counts_up(text), block_size=16))
    assert desk.answer("ab", 9) == ("cde", Done("end of text", 2, 0, 3))
    assert desk.answer("fg", 99) == ("hijklmnopqrstu", Done("context", 2, 0, 14))
    stop = Sampling(max_new_tokens=9, greedy=True, stop=("jk", "z"))
    assert desk.answer("xg", sampling=stop) == ("hi", Done("stop", 2, 0, 4, "jk"))
    assert desk.counters.requests["end of text"] == desk.counters.requests["stop"] == 1
    assert desk.counters.new_tokens == 3 + 14 + 4


def test_control_tokens_of_infilling_end_a_text():
    vocabulary = FakeVocabulary()
    vocabulary.fim = (1, 2, 3, 4)
    desk = Desk(FakeEngine(lambda text: "\2" if text[-1] == "c" else counts_up(text)))
    desk.batch = Batch(desk.engine, vocabulary, desk.counters, lambda: 0.0)
    assert desk.answer("a") == ("bc", Done("end of text", 1, 0, 2))


def test_what_was_typed_on_reads_only_what_is_new(desk):
    assert desk.answer("hello a")[1].n_cached == 0
    desk.engine.passes.clear()
    assert desk.answer("hello abcx") == ("yzabc", Done("limit", 10, 9, 5))  # a to c are what was generated
    assert desk.engine.passes[0] == [(0, "x")]
    assert desk.answer("hello abcx")[1].n_cached == 9  # the last token runs again, for its logits
    assert desk.answer("hellx")[1].n_cached == 4
    assert desk.counters.prompt_tokens == 32 and desk.counters.cached_tokens == 22


def test_a_prefix_in_a_row_that_is_busy_is_copied(desk):
    desk.ask("hello world", 20)
    for _ in range(3):
        desk.step()
    job, _ = desk.ask("hello woods")
    desk.step()
    assert (job.row, job.n_cached) == (1, 8) and desk.engine.rows[0][:11] == VOCABULARY.encode("hello world")


def test_of_two_rows_with_the_same_beginning_the_free_one_goes_on(desk):
    for n in (2, 3):
        desk.ask("hello world", n)
    desk.run()
    newest, _ = desk.ask("hello world", 30)
    desk.step()
    job, _ = desk.ask("hello world x")
    desk.step()
    assert (newest.row, job.row, job.n_cached) == (1, 0, 11)


def test_a_row_of_which_little_is_used_again_is_kept(desk):
    for text in ("hello world", "a", "b", "c"):
        desk.answer(text)
    assert desk.answer("hex")[1].n_cached == 2
    assert desk.answer("hello world x")[1].n_cached == 11


def test_the_same_prompt_several_times_is_read_once(desk):
    prompt = "p" * 30
    all_events = [desk.ask(prompt, sampling=Sampling(max_new_tokens=3, seed=seed))[1] for seed in range(4)]
    desk.run()
    assert sum(len(tokens) for texts in desk.engine.passes for _, tokens in texts) == 30 + 3 + 4 * 2
    assert sorted(events[-1].n_cached for events in all_events) == [0, 29, 29, 29]


def test_a_text_is_the_same_in_any_company():
    """Also with random draws, penalties and a company that comes and goes."""

    def follows(text: str) -> str:
        return chr(33 + hash_of(text) % 90)

    def hash_of(text: str) -> int:
        return sum((i + 1) * ord(c) for i, c in enumerate(text))

    prompts = [f"{'same beginning ' * (i % 3)}{i}" for i in range(9)]
    sampling = Sampling(max_new_tokens=8, temperature=5.0, top_k=None, repetition_penalty=1.2)
    alone = [Desk(FakeEngine(follows)).answer(p, sampling=replace(sampling, seed=i))[0] for i, p in enumerate(prompts)]
    desk = Desk(FakeEngine(follows, n_rows=3))
    together = [desk.ask(p, sampling=replace(sampling, seed=i))[1] for i, p in enumerate(prompts)]
    desk.run()
    assert [said(events) for events in together] == alone and len(set(alone)) > 5


def test_a_request_whose_client_has_gone_gets_no_more_tokens(desk):
    job, events = desk.ask("xa", 50)
    desk.step()
    job.cancel()
    assert desk.step() == [] and desk.batch.jobs == []
    assert events == [Piece("b")] and desk.counters.requests["cancelled"] == 1


def test_a_client_that_cannot_be_told_is_a_client_that_has_gone(desk, capsys):
    job, _ = desk.ask("xa", 50)

    def say(event):
        raise RuntimeError("the loop is closed")

    job._say = say
    _, events = desk.ask("ya", 3)
    desk.run()
    assert said(events) == "bcd" and desk.counters.requests["cancelled"] == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_request_that_takes_too_long_ends_with_what_it_has(desk):
    _, events = desk.ask("xa", 50, time_limit_s=10.0)
    desk.step()
    desk.step()
    desk.now = 10.0
    assert desk.step() == []
    assert said(events) == "bc" and events[-1] == Done("time", 2, 0, 2)


def test_a_limit_for_lines_counts_from_the_first_token_and_ends_no_first_line():
    desk = Desk(FakeEngine(lambda text: "ab\ncd\nef\ngh"[text.count("") - 3]))
    _, events = desk.ask("xy", 9, lines_limit_s=2.0)
    desk.now = 30.0  # in the queue
    for _ in range(6):
        desk.step()
        desk.now += 1.0
    assert said(events) == "ab\nc" and events[-1].ended_by == "time"
    assert desk.answer("xy", 9)[1].ended_by == "limit"


def test_a_line_break_that_healing_took_back_is_none_of_the_answer():
    desk = Desk(FakeEngine(lambda text: "\nabcdefgh"[text.count("") - 2]))
    healing = Healing("\n", VOCABULARY.spellings)
    _, events = desk.ask("x", 5, lines_limit_s=1.0, healing=healing)
    for _ in range(9):
        desk.step()
        desk.now += 1.0
    assert said(events) == "abcde" and events[-1].ended_by == "limit"


@pytest.mark.parametrize("n_rows", [1, 4])
def test_a_failure_of_the_engine_ends_only_the_request_that_it_concerns(n_rows, capsys):
    desk = Desk(FakeEngine(n_rows=n_rows))
    forward = desk.engine.forward

    def fail(texts, n_last):
        logits = forward(texts, n_last)  # so the rows are longer than they should be
        if any(ord("!") in ids for _, ids in texts):
            raise RuntimeError("a bad\ntoken")
        return logits

    desk.engine.forward = fail
    all_events = [desk.ask(text, 4)[1] for text in ("xa", "x!", "xm")]
    desk.run()
    assert said(all_events[0]) == "bcde" and said(all_events[2]) == "nopq"
    if n_rows > 1:
        assert VOCABULARY.decode(desk.engine.rows[0]) == "xabcd", "what was run twice is there once"
    assert all_events[1] == [Failed("the model failed (RuntimeError: a bad token)")]
    assert desk.counters.requests["failed"] == 1 and desk.counters.requests["limit"] == 2
    assert capsys.readouterr().err == "error: a request failed (RuntimeError: a bad token)\n"
    assert desk.answer("xa", 2)[0] == "bc"


def test_a_row_that_cannot_be_prepared_ends_only_its_request(desk, capsys):
    desk.ask("hello", 9)
    desk.step()

    def copy_row(*args):
        raise MemoryError

    desk.engine.copy_row = copy_row
    _, events = desk.ask("hello x", 2)
    _, others = desk.ask("abc", 2)
    desk.run()
    assert isinstance(events[0], Failed) and said(others) == "de"
    assert "\n" not in events[0].reason and capsys.readouterr().err


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(repetition_penalty=1.1)])
def test_logits_that_are_no_numbers_fail_the_request(bad, sampling):
    engine = FakeEngine()
    forward = engine.forward
    desk = Desk(engine)

    def broken(texts, n_last):
        logits = forward(texts, n_last)
        logits[[row == 0 for row, _ in texts], 5] = bad
        return logits

    engine.forward = broken
    _, events = desk.ask("xa", sampling=sampling)
    _, others = desk.ask("xb", 2)
    desk.run()
    assert isinstance(events[0], Failed) and "numbers" in events[0].reason and said(others) == "cd"


def test_the_first_tokens_spell_what_was_taken_back_and_are_no_part_of_the_answer():
    desk = Desk(FakeEngine(lambda text: "z"))
    kept, healing = split_for_healing(VOCABULARY.encode("say hello"), VOCABULARY.spellings)
    assert healing.text == "llo"
    events = []
    sampling = Sampling(max_new_tokens=2, greedy=True)
    job = Job(Generation(kept, sampling, healing, n_logprobs=0), VOCABULARY, events.append, 0.0)
    desk.waiting.append(job)
    desk.run()
    assert said(events) == "zz" and events[-1].n_new == 2 and VOCABULARY.decode(job.out) == "llozz"
    assert [[(t.id, t.begins) for t in event.tokens] for event in events[:-1]] == [[(ord("z"), 0)], [(ord("z"), 1)]]


def healed(text: str, **fields) -> dict:
    """Return what `Desk.ask` needs for a prompt that ends in the middle of something."""
    kept, healing = split_for_healing(VOCABULARY.encode(text), VOCABULARY.spellings)
    return {"text": VOCABULARY.decode(kept), "healing": healing, **fields}


def test_the_tokens_that_were_taken_back_are_run_with_the_prompt_as_long_as_they_are_drawn_again():
    desk = Desk(FakeEngine())
    text, done = desk.answer(**healed("xabcd"), n=2)
    assert text == "ef" and done.n_new == 2
    assert desk.engine.passes == [[(0, "xabcd")], [(0, "e")]], "one pass to the first new token"
    assert VOCABULARY.decode(desk.engine.tokens(0)) == "xabcde"


class Words(FakeVocabulary):
    """The last token is a word."""

    def __init__(self, word: str):
        self.spellings = (*FakeVocabulary.spellings[:-1], word)

    def decode(self, ids):
        return "".join(map(self.spellings.__getitem__, ids))


def test_a_token_that_is_not_drawn_again_is_forgotten_with_those_behind_it():
    words, engine = Words("cdo"), FakeEngine(lambda text: {"b": chr(127), chr(127): "g"}.get(text[-1], "b"))
    kept, healing = split_for_healing(words.encode("xabcd"), words.spellings)
    batch, events = Batch(engine, words, Counters(), lambda: 0.0), []
    job = Job(Generation(kept, Sampling(max_new_tokens=2, greedy=True), healing), words, events.append, 0.0)
    batch.admit([job])
    batch.step()
    assert healing.text == "bcd" and job.out == [ord("b"), 127] and list(engine.tokens(0)) == list(b"xab")
    batch.step()
    assert said(events) == "og" and engine.passes == [[(0, "xabcd")], [(0, chr(127))]]


def test_a_text_that_ends_among_the_tokens_that_were_taken_back_is_answered():
    desk = Desk(FakeEngine(lambda text: ""))
    healing = Healing("", VOCABULARY.spellings, VOCABULARY.encode("bcd"))
    text, done = desk.answer("xa", healing=healing)
    assert text == "" and done.ended_by == "end of text" and not desk.batch.jobs
    assert desk.answer("xa", 1)[1].n_cached == 1, "the row can be used again"


@pytest.mark.parametrize("seed", range(3))
def test_healed_texts_are_the_same_with_and_without_a_guess(seed):
    def answer(guess: bool) -> str:
        desk = Desk(FakeEngine(lambda text: "abcxyz"[sum(map(ord, text)) % 6]))
        desk.engine.sure = 4.0
        asked = healed("xabcabc", n=9, sampling=Sampling(max_new_tokens=9, seed=seed))
        if not guess:
            asked["healing"].taken_back = []
        return desk.answer(**asked)[0]

    assert answer(True) == answer(False) != ""


def test_a_token_that_ends_what_the_prompt_began_says_how_much_of_it_is_the_answer():
    words = Words("print")
    kept, healing = split_for_healing(words.encode("xpri"), words.spellings)
    engine = FakeEngine(lambda text: "(" if text[-1] == chr(127) else chr(127))
    batch, events = Batch(engine, words, Counters(), lambda: 0.0), []
    sampling = Sampling(max_new_tokens=2, greedy=True)
    batch.admit([Job(Generation(kept, sampling, healing, n_logprobs=0), words, events.append, 0.0)])
    while batch.jobs:
        batch.step()
    assert said(events) == "nt("
    assert [(t.id, t.begins) for piece in events[:-1] for t in piece.tokens] == [(127, -3), (ord("("), 2)]


def test_inside_a_token_rivals_are_only_those_that_may_follow():
    words = Words("print")
    kept, healing = split_for_healing(words.encode("xpri"), words.spellings)
    batch, events = Batch(FakeEngine(lambda text: chr(127)), words, Counters(), lambda: 0.0), []
    sampling = Sampling(max_new_tokens=1, greedy=True)
    batch.admit([Job(Generation(kept, sampling, healing, n_logprobs=8), words, events.append, 0.0)])
    while batch.jobs:
        batch.step()
    (token,) = events[0].tokens
    assert {i for i, _ in token.likely} == {127, ord("p")}
    assert np.isfinite([p for _, p in token.likely]).all(), "JSON has no infinity"


def test_each_token_has_its_log_probability_and_its_rivals():
    desk = Desk(FakeEngine())
    _, events = desk.ask("xa", 1, n_logprobs=2)
    desk.run()
    (token,) = events[0].tokens
    total = np.log(np.exp(10.0) + 127)
    assert token.id == ord("b") and token.logprob == pytest.approx(10 - total)
    assert [i for i, _ in token.likely] == [ord("b"), 0]
    assert [p for _, p in token.likely] == pytest.approx([10 - total, -total])


def test_the_tokens_of_a_piece_are_those_that_its_text_begins_in():
    desk = Desk(FakeEngine(lambda text: "ab\n"[len(text) % 3]))
    stop = Sampling(max_new_tokens=9, greedy=True, stop=("\nab\n",))
    _, events = desk.ask("x", sampling=stop, n_logprobs=0)
    desk.run()
    assert [(event.text, [chr(t.id) for t in event.tokens]) for event in events[:-1]] == [("b", ["b"])]


def test_a_token_that_is_held_back_is_not_given_with_the_text_before_it():
    script = dict(zip(["x", "xc", "xcd", "xcdc"], "cdcx"))
    desk = Desk(FakeEngine(script.__getitem__))
    stop = Sampling(max_new_tokens=4, greedy=True, stop=("cde",))
    _, events = desk.ask("x", sampling=stop, n_logprobs=0)
    desk.run()
    assert [(event.text, "".join(chr(t.id) for t in event.tokens)) for event in events[:-1]] == [
        ("cd", "cd"),
        ("cx", "cx"),
    ]


def test_an_answer_of_its_own_is_decoded_on_its_own():
    """As by SentencePiece, which drops the space that a text begins with."""
    vocabulary = FakeVocabulary()
    vocabulary.decode = lambda ids: "".join(map(chr, ids)).removeprefix(" ")
    for own_text, expected in ((True, "b"), (False, " b")):
        events = []
        sampling = Sampling(max_new_tokens=2, greedy=True)
        desk = Desk(FakeEngine(lambda text: " " if text == "x" else "b"))
        desk.waiting.append(Job(Generation([ord("x")], sampling, own_text=own_text), vocabulary, events.append, 0.0))
        desk.run()
        assert said(events) == expected


def test_the_penalty_counts_what_was_written():
    desk = Desk(FakeEngine(lambda text: "z"))
    forward = desk.engine.forward

    def second_best(texts, n_last):
        logits = forward(texts, n_last)
        logits[:, ord("y")] = 8.0
        return logits

    desk.engine.forward = second_best
    penalty = Sampling(max_new_tokens=4, greedy=True, repetition_penalty=2.0)
    assert desk.answer("a", sampling=penalty)[0] == "zyzz"


@pytest.mark.parametrize("least, expected, ended_by", [(0.99, "bcd", "limit"), (0.999, "", "edit")])
def test_a_text_that_the_model_is_not_sure_of_is_not_said(least, expected, ended_by):
    desk = Desk(FakeEngine())
    _, events = desk.ask("xa", 3, edit=Edit("x", min_confidence=least), n_logprobs=0)
    desk.run()
    assert 0.99 < np.exp(10) / (np.exp(10) + 127) < 0.999
    assert said(events) == expected and events[-1].ended_by == ended_by and len(events) <= 2
    if expected:
        assert len(events[0].tokens) == 3 and isinstance(events[0].tokens[0], Token)


class Bytes(FakeVocabulary):
    """A token is a byte of UTF-8: a letter from 64 on, below it the first or a later byte of a longer character."""

    def decode(self, ids):
        return bytes(i + 192 if i < 32 else i + 128 if i < 64 else i for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize(("script", "n", "text"), [("\x03", 1, ""), ("\x03\x29", 2, "é"), ("\x03", 9, "\ufffd")])
def test_half_of_a_character_is_left_out_where_a_limit_cuts_it(script, n, text):
    engine = FakeEngine(lambda written: (script + "\0")[len(written) - 1])
    batch, events = Batch(engine, Bytes(), Counters(), lambda: 0.0), []
    batch.admit([Job(Generation([ord("x")], Sampling(max_new_tokens=n, greedy=True)), Bytes(), events.append, 0.0)])
    while batch.jobs:
        batch.step()
    assert said(events) == text


def test_a_rule_of_an_edit_ends_the_request():
    desk = Desk(FakeEngine(lambda text: "\n" if text[-1] == "d" else counts_up(text)))
    assert desk.answer("xb", 50, edit=Edit("xb", max_lines=1)) == ("cd", Done("edit", 2, 0, 3))


def test_an_end_of_text_at_once_is_an_empty_answer():
    desk = Desk(FakeEngine(lambda text: ""))
    assert desk.answer("xa") == ("", Done("end of text", 2, 0, 0)) and EOS == 0
