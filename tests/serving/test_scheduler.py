import threading
import time
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, FakeVocabulary

from kindling.generation.settings import Sampling
from kindling.serving.generation import Done, Failed, Generation, Piece, Refused
from kindling.serving.scheduler import NO_PLACE, Busy, Scheduler

LONG_S = 30.0  # only ends a test that hangs


class Client:
    """Keeps what a request is told."""

    def __init__(self, scheduler: Scheduler, text: str, n: int = 5, **fields):
        self.events: list = []
        self.done = threading.Event()
        ids = FakeVocabulary().encode(text)
        self.cancel = scheduler.submit(Generation(ids, Sampling(max_new_tokens=n, greedy=True), **fields), self.say)

    def say(self, event) -> None:
        self.events.append(event)
        if not isinstance(event, Piece):
            self.done.set()

    def text(self) -> str:
        """Wait for the end; return the text."""
        assert self.done.wait(LONG_S)
        return "".join(event.text for event in self.events[:-1])


class Gate:
    """An engine whose passes wait until the test lets them go."""

    def __init__(self, engine: FakeEngine):
        self.engine, self.arrived, self.go = engine, threading.Semaphore(0), threading.Semaphore(0)
        engine.before_pass = self.wait

    def wait(self, texts) -> None:
        self.arrived.release()
        assert self.go.acquire(timeout=LONG_S)

    def at_pass(self) -> None:
        """Wait until a pass is about to begin."""
        assert self.arrived.acquire(timeout=LONG_S)

    def both_at_pass(self) -> None:
        """Wait until a pass of all requests so far is about to begin: the first pass may have begun before the last of them."""
        self.at_pass()
        self.go.release()
        self.at_pass()

    def open(self) -> None:
        """Let all passes go from now on."""
        self.engine.before_pass = lambda texts: None
        self.go.release()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(n_rows=2)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(engine, clock) -> Iterator[Scheduler]:
    before = threading.active_count()
    scheduler = Scheduler(engine, FakeVocabulary(), max_queue=1, clock=clock)
    yield scheduler
    scheduler.close(0.0)
    assert threading.active_count() == before, "no thread is left behind"


def test_requests_from_many_threads_all_get_their_answers(engine):
    scheduler = Scheduler(engine, FakeVocabulary(), max_queue=100)
    clients: list[Client] = []
    threads = [
        threading.Thread(target=lambda c=c: clients.append(Client(scheduler, f"x{c}", 20))) for c in "abcdefgh" * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
    assert sorted({client.text() for client in clients}) == [alphabet[i : i + 20] for i in range(1, 9)]
    scheduler.close(0.0)
    assert scheduler.counters.requests["limit"] == 24 and scheduler.counters.n_running == 0


def test_a_request_joins_what_is_being_decoded(engine, scheduler):
    gate = Gate(engine)
    first = Client(scheduler, "xa", 3)
    gate.at_pass()
    second = Client(scheduler, "xm", 3)
    gate.open()
    assert (first.text(), second.text()) == ("bcd", "nop")
    assert engine.passes[1] == [(0, "b"), (1, "m")]  # x is copied from the other's row


def test_past_the_queue_a_client_is_told_when_to_come_again(engine, scheduler, clock):
    gate = Gate(engine)
    clients = [Client(scheduler, "xa")]
    gate.at_pass()
    clients += [Client(scheduler, "ya"), Client(scheduler, "za")]
    clock.now = 7.0
    with pytest.raises(Busy, match="as many requests as it takes; ask again in") as e:
        Client(scheduler, "wa")
    assert e.value.retry_after_s == 11  # three requests that wait share two rows, and one has held a row for 7 s
    gate.open()
    assert [client.text() for client in clients] == ["bcdef"] * 3
    assert scheduler.counters.requests["refused"] == 1 and Client(scheduler, "wa").text() == "bcdef"


def test_after_a_cancellation_nothing_is_said(engine, scheduler):
    gate = Gate(engine)
    client = Client(scheduler, "xa", 50)
    gate.at_pass()
    client.cancel()
    client.cancel()
    gate.open()
    assert Client(scheduler, "ym").text() == "nopqr"
    assert client.events == [] and scheduler.counters.requests["cancelled"] == 1


def test_a_cancelled_request_leaves_the_queue_at_once(engine, scheduler):
    gate = Gate(engine)
    clients = [Client(scheduler, "xa"), Client(scheduler, "xb"), Client(scheduler, "xc")]
    gate.at_pass()
    waiting = [client for client in clients]
    waiting[2].cancel()
    last = Client(scheduler, "xd")
    gate.open()
    assert last.text() == "efghi" and clients[2].events == []


def test_a_client_may_cancel_from_inside_what_it_is_told(engine, scheduler):
    events = []
    cancel = None
    ready, gone = threading.Event(), threading.Event()

    def say(event):
        events.append(event)
        ready.wait(LONG_S)
        cancel()
        gone.set()

    cancel = scheduler.submit(Generation([97], Sampling(max_new_tokens=9, greedy=True)), say)
    ready.set()
    assert gone.wait(LONG_S) and Client(scheduler, "xa").text() == "bcdef" and len(events) == 1


def test_the_time_limit_counts_from_the_request_also_in_the_queue(engine, scheduler, clock):
    gate = Gate(engine)
    clients = [Client(scheduler, "xa", 50), Client(scheduler, "ya", 50)]
    gate.both_at_pass()
    late = Client(scheduler, "za", time_limit_s=5.0)
    clock.now = 5.0
    gate.go.release()
    gate.at_pass()
    assert late.events == [Refused(NO_PLACE, 3.0)], "before a row is free, and that is no answer"
    assert scheduler.counters.requests["refused"] == 1
    gate.open()
    assert [client.text()[:5] for client in clients] == ["bcdef"] * 2


def test_closing_waits_for_what_is_being_written_and_takes_nothing_more(engine, clock):
    scheduler = Scheduler(engine, FakeVocabulary(), max_queue=9, clock=clock)
    gate = Gate(engine)
    clients = [Client(scheduler, text) for text in ("xa", "ya", "za")]
    gate.at_pass()
    engine.before_pass = lambda texts: None
    closing = threading.Thread(target=scheduler.close, args=(60.0,))
    closing.start()
    while scheduler._stop_at is None:
        time.sleep(0)
    with pytest.raises(Busy, match="stopping"):
        Client(scheduler, "wa")
    gate.go.release()
    closing.join(LONG_S)
    n_written = sum(client.text() == "bcdef" for client in clients)
    assert n_written in (1, 2)  # the second may have come while the first pass waited
    assert all(isinstance(client.events[-1], (Done, Refused)) for client in clients)
    scheduler.close(0.0)


def test_closing_without_patience_ends_what_is_being_written(engine, clock):
    scheduler = Scheduler(engine, FakeVocabulary(), max_queue=9, clock=clock)
    gate = Gate(engine)
    client = Client(scheduler, "xa", 40)
    gate.at_pass()
    closing = [threading.Thread(target=scheduler.close, args=(patience,)) for patience in (60.0, 0.0)]
    for thread in closing:
        thread.start()
    while scheduler._stop_at != 0.0:
        time.sleep(0)
    gate.open()
    for thread in closing:
        thread.join(LONG_S)
    assert client.events[-1] == Failed("the server is stopping") and not scheduler._thread.is_alive()


def test_the_scheduler_goes_on_after_an_error_of_its_own(engine, scheduler, monkeypatch, capsys):
    monkeypatch.setattr(scheduler._batch, "_parts", lambda: 1 / 0)
    client = Client(scheduler, "xa")
    assert client.text() == "" and isinstance(client.events[-1], Failed)
    monkeypatch.undo()
    assert Client(scheduler, "xa").text() == "bcdef" and "ZeroDivisionError" in capsys.readouterr().err


def test_a_prompt_that_leaves_no_room_is_refused_at_once(scheduler):
    for text in ("", "x" * 64):
        with pytest.raises(ValueError, match="from 1 to 63 tokens"):
            Client(scheduler, text)


def test_an_idle_scheduler_uses_no_processor(engine, scheduler, monkeypatch):
    assert Client(scheduler, "xa").text() == "bcdef"
    waits = []
    wait = scheduler._changed.wait
    monkeypatch.setattr(scheduler._changed, "wait", lambda *args: (waits.append(args), wait(*args))[1])
    assert Client(scheduler, "xa").text() == "bcdef"
    assert set(waits) <= {()}, "it waits without a time limit"


def test_the_counters_say_what_was_done(engine, scheduler, clock):
    Client(scheduler, "xa").text()
    Client(scheduler, "xab").text()
    scheduler.close(1.0)
    counters = scheduler.counters
    assert counters.prompt_tokens == 5 and counters.cached_tokens == 2 and counters.new_tokens == 10
    assert sum(counters.first_token_s.counts) == 2 and sum(counters.token_s.counts) == 8
    assert counters.n_rows == 2 and counters.n_running == counters.n_waiting == 0
