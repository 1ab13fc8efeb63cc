"""The API server's process between the clients and the engine: one event loop reads requests and hands out tokens.

Work is taken in the order in which it comes up. A burst of requests is therefore read before its first tokens go out,
and an engine that makes more tokens a second than the loop can send leaves its clients behind. A request comes up
twice: whoever awaits something goes behind all others, so that requests of a burst reach the engine together, near its
end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

BUSY = 0.7
"""Share of its time that an API server may work before the answer says so."""


def front_of(values: Mapping[str, float], n_servers: int = 1) -> tuple[float, float, float]:
    """Return the API server's time for a request, for each token of its prompt, and for each token sent [s].

    Several (`--api-server-count`) get the work done so many times as fast.
    """
    return values["http_s"] / n_servers, values["http_token_s"] / n_servers, values["http_out_s"] / n_servers


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
        " and sends every token; further ones (--api-server-count) share that work"
    )


class Front:
    """An API server of one replica: its time for a request, for each token of the prompt, for each token sent [s].

    first_frac : share of a request's time after which it goes behind the others that have come meanwhile
    """

    def __init__(self, request_s: float, prompt_token_s: float, out_token_s: float, first_frac: float = 0.0) -> None:
        self.front_s = (request_s, prompt_token_s, out_token_s)
        self.first_frac = first_frac
        self.free_s = 0.0
        self.fixed_s = math.inf
        """No request is sent before this time that has not been read; later tokens may yet have to wait for some."""
        self._due: deque[tuple[float, float, int, int]] = deque()

    def step(self, first_end_s: float, last_end_s: float, n_steps: int, n_sequences: int) -> None:
        """Note steps that end evenly from `first_end_s` to `last_end_s`, each with a token for so many sequences."""
        self._due.append((first_end_s, last_end_s, n_steps, n_sequences))

    def read(self, sent: Sequence[tuple[float, float]]) -> list[float]:
        """Return when each of some requests has been read [s]; `sent`: when it is sent [s] and its prompt's tokens.

        In the order of sending, here and from call to call: those of an earlier call are read before these.
        """
        if len(sent) == 1:
            ((at_s, prompt_tokens),) = sent
            self._send_until(at_s)
            self.free_s = max(self.free_s, at_s) + server_s(self.front_s, prompt_tokens)
            return [self.free_s]
        done = [0.0] * len(sent)
        queue: deque[tuple[int, float, bool]] = deque()
        come = 0

        def admit(at_s: float, prompt_tokens: float) -> None:
            self._send_until(at_s)
            self.free_s = max(self.free_s, at_s)
            queue.append((come, server_s(self.front_s, prompt_tokens), True))

        while come < len(sent) or queue:
            if not queue:
                admit(*sent[come])
                come += 1
            number, work_s, is_first = queue.popleft()
            self.free_s += work_s * (self.first_frac if is_first else 1.0 - self.first_frac)
            done[number] = self.free_s
            if is_first:
                while come < len(sent) and sent[come][0] <= self.free_s:
                    admit(*sent[come])
                    come += 1
                queue.append((number, work_s, False))
        return done

    def sent_s(self, end_s: float) -> float:
        """Return when the tokens of the steps up to `end_s` have been sent [s]."""
        if end_s <= self.fixed_s:
            self._send_until(end_s)
            return max(end_s, self.free_s)
        self._send_until(self.fixed_s)
        kept = self.free_s, self._due.copy()
        self._send_until(end_s)
        found_s = max(end_s, self.free_s)
        self.free_s, self._due = kept
        return found_s

    def _send_until(self, time_s: float) -> None:
        due = self._due
        while due and due[0][0] <= time_s:
            first_s, last_s, n_steps, n = due.popleft()
            if last_s > time_s and n_steps > 1:
                apart_s = (last_s - first_s) / (n_steps - 1)
                n_now = min(n_steps - 1, 1 + int((time_s - first_s) / apart_s))
                next_s = first_s + n_now * apart_s
                due.appendleft((next_s, last_s, n_steps - n_now, n))
                last_s, n_steps = next_s - apart_s, n_now
            each_s = n * self.front_s[2]
            # of evenly spaced steps the queue is longest behind the first or behind the last one
            self.free_s = max(max(self.free_s, first_s) + n_steps * each_s, last_s + each_s)
