"""The requests that are being generated, each in its row of the engine, a token at a time. One thread uses it."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np

from kindling.errors import one_line
from kindling.generation.numpy_sampling import apply_repetition_penalty, distribution, draw, log_total, most_likely
from kindling.serving.answer import Answer
from kindling.serving.counters import Counters
from kindling.serving.engine import Engine, Vocabulary
from kindling.serving.generation import Done, Ending, Event, Failed, Generation, Token
from kindling.serving.prefixes import Found, Prefixes, common_length

WORTH_WAITING = 16  # tokens that another request is about to read, for which a request waits rather than read them too


class Job:
    """A request on its way."""

    def __init__(self, generation: Generation, vocabulary: Vocabulary, say: Callable[[Event], None], now: float):
        self.generation, self.answer = generation, Answer(generation, vocabulary)
        self.ids = list(generation.ids)
        self.submitted, self.began, self.last_token = now, now, now
        self.deadline = now + generation.time_limit_s
        self.row = -1
        self.n_cached = 0
        self.lines_deadline = math.inf
        self.n_line_breaks = 0 if generation.healing is None else -generation.healing.text.count("\n")  # of the answer
        self.unread = self.ids  # tokens to run before the next one can be drawn
        self.out: list[int] = []
        self.rng: np.random.Generator | None = (
            None if generation.sampling.is_greedy else np.random.default_rng(generation.sampling.seed)
        )
        self.seen = (
            set(self.ids).difference(vocabulary.end_ids) if generation.sampling.repetition_penalty != 1 else None
        )
        self._say = say
        self._lock = threading.RLock()  # so that nothing is said after `cancel` has returned
        self.cancelled = False

    def say(self, event: Event) -> None:
        """Give an event to the client, unless it has gone."""
        with self._lock:
            if not self.cancelled:
                try:
                    self._say(event)
                except Exception as e:  # as from an event loop that has ended
                    self.cancelled = True
                    print(f"error: a client could not be answered ({one_line(e)})", file=sys.stderr)

    def cancel(self) -> None:
        """Say nothing more."""
        with self._lock:
            self.cancelled = True

    @property
    def n_read(self) -> int:
        """The tokens that its row holds."""
        return len(self.ids) + len(self.out) - 1 if self.out else len(self.ids) - len(self.unread)


class _Part(NamedTuple):
    """Tokens that a job runs in a pass."""

    job: Job
    tokens: list[int]
    guess: Sequence[int] = ()
    """Tokens that are likely to be drawn after these, and are run with them: those that healing took back."""


class Batch:
    """The rows of an engine, and the jobs in them."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, counters: Counters, clock: Callable[[], float]):
        self._engine, self._vocabulary, self._counters, self._clock = engine, vocabulary, counters, clock
        self._prefixes = Prefixes(engine)
        self._ends = {*vocabulary.end_ids, *(vocabulary.fim or ())}  # a control token can be no part of an answer
        self._unsaid: list[tuple[Job, Event]] = []
        self.jobs: list[Job] = []
        self.held_s: float | None = None
        """How long a job holds its row, on average, the newest counting most."""

    def admit(self, waiting: list[Job]) -> None:
        """Move those of the waiting jobs to a row that have one and need not wait for what another is about to read."""
        for job in list(waiting):
            if self._prefixes.n_free == 0:
                return
            try:
                found = self._prefixes.find(job.ids)
                if not self._another_reads(job, found):
                    self._begin(job, found)
                    waiting.remove(job)
            except Exception as e:  # as when there is no memory to copy a row
                waiting.remove(job)
                self._counters.requests["failed"] += 1
                self._say_failed(e)
                job.say(Failed(f"the model failed ({one_line(e)})"))

    def _another_reads(self, job: Job, found: Found) -> bool:
        """Return whether a job reads more of the same prompt than any row holds yet; then that is read only once."""
        last = len(job.ids) - 1
        common = [min(common_length(other.ids, job.ids), last) for other in self.jobs if not other.out]
        return any(n > found.length and (n == last or n - found.length >= WORTH_WAITING) for n in common)

    def _begin(self, job: Job, found: Found) -> None:
        job.began, job.n_cached = self._clock(), found.length
        job.row = self._prefixes.take(found)
        job.unread = job.ids[found.length :]
        self.jobs.append(job)
        self._counters.prompt_tokens += len(job.ids)
        self._counters.cached_tokens += found.length

    def step(self) -> None:
        """Run a piece of the prompts that are being read and the next token of the texts that are being written.

        What there is to say is said at the end: who hears it then works while the model computes, and not between two tokens.
        """
        try:
            self._step()
        finally:
            self._say_all()

    def _step(self) -> None:
        now = self._clock()
        for job in list(self.jobs):
            if job.cancelled:
                self._leave(job, "cancelled")
            elif now >= job.deadline:
                self._finish(job, "time")
        ready, rows = [], []
        for part, logits in self._forward(self._parts()):
            if not part.job.out:
                del part.job.unread[: len(part.tokens)]
            if part.job.out or not part.job.unread:
                ready.append(part)
                rows.append(logits)
        if ready:
            self._draw(ready, np.concatenate(rows))

    def fail_all(self, reason: str) -> None:
        """End all jobs."""
        for job in list(self.jobs):
            self.fail(job, reason)
        self._say_all()

    def _say_all(self) -> None:
        events, self._unsaid = self._unsaid, []
        for job, event in events:
            job.say(event)

    def fail(self, job: Job, reason: str) -> None:
        """End a job that cannot go on, and forget what its row holds."""
        if job in self.jobs:
            with contextlib.suppress(Exception):  # of an engine that has failed
                self._engine.truncate(job.row, 0)
            self._leave(job, "failed")
            self._unsaid.append((job, Failed(reason)))

    def _parts(self) -> list[_Part]:
        """Return what is run in the next pass: a token of each text that is written, and a piece of the prompts.

        Half a piece is for the prompt that came first, the rest for those of which least is left.
        """
        parts = [_Part(job, job.out[-1:]) for job in self.jobs if job.out]
        reading = [job for job in self.jobs if not job.out]
        left = self._engine.piece
        take = {id(job): 0 for job in reading}
        if reading:
            first = reading[0]
            take[id(first)] = min((left + 1) // 2, len(first.unread))
            left -= take[id(first)]
        for job in sorted(reading, key=lambda job: len(job.unread)):
            more = min(left, len(job.unread) - take[id(job)])
            take[id(job)] += more
            left -= more
        for job in (job for job in reading if take[id(job)]):
            n, healing = take[id(job)], job.generation.healing
            guess = healing.taken_back if healing is not None and n == len(job.unread) else []
            parts.append(_Part(job, job.unread[:n], guess))
        return parts

    def _forward(self, parts: list[_Part]) -> list[tuple[_Part, np.ndarray]]:
        """Return the logits (n, V) after each part: after its tokens, and after each of its guess.

        Where the engine fails, each job runs alone, and those end that fail again.
        """
        if not parts:
            return []
        n_last = [1 + len(part.guess) for part in parts]
        try:
            logits = self._engine.forward([(part.job.row, [*part.tokens, *part.guess]) for part in parts], n_last)
            return list(zip(parts, np.split(logits, np.cumsum(n_last)[:-1])))
        except Exception as e:
            if len(parts) == 1:
                self._say_failed(e)
                self.fail(parts[0].job, f"the model failed ({one_line(e)})")
                return []
        for part in parts:
            self._engine.truncate(part.job.row, part.job.n_read)
        return [done for part in parts for done in self._forward([part])]

    def _draw(self, parts: list[_Part], logits: np.ndarray) -> None:
        """Give each job its next token, and one more after each token that was guessed right, from logits (N, V)."""
        best = logits.argmax(1)  # (N,)
        is_number = np.isfinite(logits[np.arange(len(logits)), best])  # of a row with a NaN, argmax returns its place
        now, rows = self._clock(), zip(logits, best.tolist(), is_number.tolist())
        for part in parts:
            own = list(islice(rows, 1 + len(part.guess)))
            try:
                self._draw_for(part, own, now)
            except Exception as e:
                self._say_failed(e)
                self.fail(part.job, f"the server failed ({one_line(e)})")

    def _draw_for(self, part: _Part, rows: list[tuple[np.ndarray, int, bool]], now: float) -> None:
        """Give a job its tokens, from the logits after its part and after each token of the guess."""
        job = part.job
        for (logits, most, good), guess in zip_longest(rows, part.guess):
            if not good:
                self.fail(job, "a model's logits must be numbers, but are not; serve an older checkpoint, or use fp32")
                return
            self._take(job, self._next_token(job, logits, most), now)
            if job not in self.jobs or job.out[-1] != guess:
                break
        if part.guess and job in self.jobs:
            self._engine.truncate(job.row, job.n_read)

    @staticmethod
    def _say_failed(error: Exception) -> None:
        """Tell who runs the server; what a client wrote is no part of it."""
        print(f"error: a request failed ({one_line(error)})", file=sys.stderr)

    def _next_token(self, job: Job, logits: np.ndarray, best: int) -> Token:
        """Return the next token, given logits (V,) and the most likely one by them."""
        generation, sampling = job.generation, job.generation.sampling
        if generation.healing is not None and (mask := generation.healing.allowed(job.out)) is not None:
            logits = np.where(mask, logits, -np.inf)
            best = int(logits.argmax())
        filtered = logits
        if job.seen is not None:
            filtered = apply_repetition_penalty(logits, job.seen, sampling.repetition_penalty)
            best = int(filtered.argmax())
        if job.rng is None:
            token = best
        else:
            kept = distribution(filtered, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            token = draw(*kept, job.rng)
        n = generation.n_logprobs
        if n is None and (generation.edit is None or generation.edit.min_confidence == 0):
            return Token(token, np.nan, ())
        total = log_total(logits)
        likely = most_likely(logits, n or 0)
        likely = likely[np.isfinite(logits[likely])]  # at a cursor inside a token, few may follow
        likely = likely[np.argsort(-logits[likely], kind="stable")]
        return Token(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in likely))

    def _take(self, job: Job, token: Token, now: float) -> None:
        """Add a token to a job, which may end it."""
        if job.out:
            self._counters.token_s.add(now - job.last_token)
        else:
            self._counters.first_token_s.add(now - job.submitted)
            if job.generation.lines_limit_s is not None:
                job.lines_deadline = now + job.generation.lines_limit_s
        job.last_token = now
        if token.id in self._ends:
            self._finish(job, "end of text")
            return
        self._counters.new_tokens += 1
        job.out.append(token.id)
        if job.seen is not None:
            job.seen.add(token.id)
        job.n_line_breaks += self._vocabulary.spellings[token.id].count("\n")
        if (piece := job.answer.add(token)) is not None:
            self._unsaid.append((job, piece))
        if (ended_by := job.answer.ended_by) is not None:
            self._finish(job, ended_by)
        elif job.answer.n_counted >= job.generation.sampling.max_new_tokens:
            self._finish(job, "limit")
        elif len(job.ids) + len(job.out) >= self._engine.block_size:
            self._finish(job, "context")
        elif job.n_line_breaks > 0 and now > job.lines_deadline:
            self._finish(job, "time")

    def _finish(self, job: Job, ended_by: Ending) -> None:
        piece, ended_by = job.answer.finish(ended_by)
        self._leave(job, ended_by)
        if piece is not None:
            self._unsaid.append((job, piece))
        n_prompt = len(job.ids) + job.generation.n_taken_back
        done = Done(ended_by, n_prompt, job.n_cached, job.answer.n_counted, job.answer.stop)
        self._unsaid.append((job, done))

    def _leave(self, job: Job, ending: str) -> None:
        """Free the row of a job, and count it."""
        self.jobs.remove(job)
        self._prefixes.give_back(job.row)
        self._counters.requests[ending] += 1
        held = self._clock() - job.began
        self.held_s = held if self.held_s is None else 0.8 * self.held_s + 0.2 * held
