"""The API server's process between the clients and the engine: one event loop reads requests and hands out tokens.

The tokens of a step are few tasks that come up together and hold nothing up for long: they go out first, and requests
are read in what time is left. An engine that makes more tokens a second than the loop can send therefore leaves its
clients behind, and new requests wait until it has sent the rest. A request comes up twice: whoever awaits something
goes behind all others, so that requests of a burst reach the engine in the second half of its reading.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping

N_TURNS = 2
"""How often a request comes up before it is with the engine: its connection, its body."""

BUSY = 0.7
"""Share of its time that an API server may work before the answer says so."""


def front_of(values: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the API server's time for a request, for each token of its prompt, and for each token sent [s]."""
    return values["http_s"], values["http_token_s"], values["http_out_s"]


def server_s(front_s: tuple[float, float, float], prompt_tokens: float, output_tokens: float = 0.0) -> float:
    """Return an API server's time to read a request and to send so many of its tokens [s].

    >>> round(server_s((1e-3, 1e-6, 5e-5), 1000.0, 200.0), 6)
    0.012
    """
    request_s, prompt_token_s, out_token_s = front_s
    return request_s + prompt_token_s * prompt_tokens + out_token_s * output_tokens


def server_text(busy: float) -> str:
    """Return a sentence on an API server that works for that share of its time, empty where that is no matter.

    >>> server_text(0.5), server_text(0.85).partition(":")[0]
    ('', "a replica's API server would be busy 85 % of the time")
    """
    if busy < BUSY:
        return ""
    return (
        f"a replica's API server would be busy {100 * min(busy, 1.0):.0f} % of the time: one process reads each request"
        " and sends every token; four (--api-server-count) sent 3 and 9 % more than one where we tried"
    )


class Tokens:
    """The tokens of the engine's steps on their way out: a step's wait for those of the steps before, for no more."""

    def __init__(self, out_token_s: float) -> None:
        self.out_token_s = out_token_s
        self.free_s = 0.0
        self._due: deque[tuple[float, float, int, int]] = deque()

    def step(self, first_end_s: float, last_end_s: float, n_steps: int, n_sequences: int) -> None:
        """Note steps that end evenly from `first_end_s` to `last_end_s`, each with a token for so many sequences."""
        self._due.append((first_end_s, last_end_s, n_steps, n_sequences))

    def sent_s(self, end_s: float) -> float:
        """Return when the tokens of the steps up to `end_s` have been sent [s]."""
        due = self._due
        while due and due[0][0] <= end_s:
            first_s, last_s, n_steps, n = due.popleft()
            if last_s > end_s and n_steps > 1:
                apart_s = (last_s - first_s) / (n_steps - 1)
                n_now = min(n_steps - 1, 1 + int((end_s - first_s) / apart_s))
                next_s = first_s + n_now * apart_s
                due.appendleft((next_s, last_s, n_steps - n_now, n))
                last_s, n_steps = next_s - apart_s, n_now
            each_s = n * self.out_token_s
            # of evenly spaced steps the queue is longest behind the first or behind the last one
            self.free_s = max(max(self.free_s, first_s) + n_steps * each_s, last_s + each_s)
        return max(end_s, self.free_s)


class Front:
    """An API server of one replica: its time for a request, for each token of the prompt, for each token sent [s].

    Whoever plays the engine asks `next_s`, plays it up to then (`step` tells of its steps, which may put `next_s` off),
    and takes what is read (`take`) once nothing puts it off any more.
    """

    def __init__(self, request_s: float, prompt_token_s: float, out_token_s: float, n_turns: int = N_TURNS) -> None:
        self.front_s = (request_s, prompt_token_s, out_token_s)
        self.n_turns = n_turns
        self.tokens = Tokens(out_token_s)
        self.free_s = 0.0
        """Everything that came up before this time is done."""
        self._come: list[tuple[float, int, float]] = []
        self._turns: deque[tuple[int, float, int]] = deque()
        self._steps: deque[tuple[float, float, int, float]] = deque()
        self._next: tuple[float, int, int] | None = None

    def step(self, first_end_s: float, last_end_s: float, n_steps: int, n_sequences: int) -> None:
        """Note steps that end evenly from `first_end_s` to `last_end_s`, each with a token for so many sequences."""
        self.tokens.step(first_end_s, last_end_s, n_steps, n_sequences)
        apart_s = (last_end_s - first_end_s) / (n_steps - 1) if n_steps > 1 else 0.0
        self._steps.append((first_end_s, apart_s, n_steps, n_sequences * self.front_s[2]))
        if self._next and self._next[0] > first_end_s:
            self._next = None

    def send(self, at_s: float, number: int, prompt_tokens: float) -> None:
        """Note a request that comes in at a time [s], later than anything that has been taken."""
        heapq.heappush(self._come, (at_s, number, prompt_tokens))
        self._next = None

    def next_s(self) -> float:
        """Return when the turn of a request that is next ends, as far as the engine's steps are known; inf: no turn."""
        if self._next is None:
            if self._turns:
                self._next = self._worked(self.free_s, self._turns[0][1])
            elif self._come:
                # with nobody else there, all turns of the one who has come are one
                at_s, _, prompt_tokens = self._come[0]
                n_turns = self.n_turns if len(self._come) == 1 else 1
                self._next = self._worked(at_s, n_turns * self._turn_s(prompt_tokens))
            else:
                return math.inf
        return self._next[0]

    def take(self) -> int | None:
        """End the turn that is next; return the request if it has been read, or None if it goes behind the others."""
        end_s = self.next_s()
        _, n_runs, n_steps = self._next or (end_s, 0, 0)
        for _ in range(n_runs):
            self._steps.popleft()
        if n_steps:
            first_s, apart_s, n, each_s = self._steps.popleft()
            self._steps.appendleft((first_s + n_steps * apart_s, apart_s, n - n_steps, each_s))
        is_alone = not self._turns and len(self._come) == 1
        if not self._turns:
            self._admit()
        number, turn_s, n_left = self._turns.popleft()
        self.free_s, self._next = end_s, None
        while self._come and self._come[0][0] <= end_s:
            self._admit()
        if n_left > 1 and not is_alone:
            self._turns.append((number, turn_s, n_left - 1))
            return None
        return number

    def _admit(self) -> None:
        _, number, prompt_tokens = heapq.heappop(self._come)
        self._turns.append((number, self._turn_s(prompt_tokens), self.n_turns))

    def _turn_s(self, prompt_tokens: float) -> float:
        return server_s(self.front_s, prompt_tokens) / self.n_turns

    def _worked(self, come_s: float, work_s: float) -> tuple[float, int, int]:
        """Return when work that has come then is done, and the steps sent before: whole runs, steps of the next."""
        time_s, n_runs, k = self.free_s, 0, 0
        while n_runs < len(self._steps):
            first_s, apart_s, n, each_s = self._steps[n_runs]
            next_s = first_s + k * apart_s
            if next_s > time_s:
                begin_s = max(time_s, come_s)
                if next_s >= begin_s + work_s:
                    break
                work_s -= max(0.0, next_s - begin_s)
                time_s = next_s
            # steps that come up while those before are being sent are sent at once, too
            n_sent = n - k if each_s >= apart_s else min(n - k, 1 + int((time_s - next_s) / (apart_s - each_s)))
            time_s += n_sent * each_s
            k += n_sent
            if k == n:
                n_runs, k = n_runs + 1, 0
        return max(time_s, come_s) + work_s, n_runs, k
