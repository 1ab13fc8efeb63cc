"""Load test of an OpenAI-compatible completions endpoint with one workload's lengths and arrivals (a Locust file).

Run it:  locust -f THIS_FILE --host http://localhost:8000
It runs headless with the number of clients that the workload needs and stops by itself. Environment:
OPENAI_API_KEY (sent as bearer token when set), LOAD_RESULTS (a file that gets one JSON line a request).

Times are seconds from the start of the test on this machine's monotonic clock. `first_s` and `last_s` are the arrivals
of the first and last token; a request of an open load counts from its scheduled arrival, so waiting here is not lost.
Prompts are random token ids, so lengths are exact and nothing is found in a prefix cache but what the workload shares.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import random
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust import User, events, task

CONFIG: dict[str, Any] = json.loads("{}")

WORKLOAD = CONFIG.get("workload", {})
LOAD = WORKLOAD.get("load", {"kind": "closed", "concurrency": 1})
IS_CLOSED = LOAD["kind"] == "closed"
TIMEOUT_S = CONFIG.get("timeout_s", 300)
KEY = os.environ.get("OPENAI_API_KEY", "")
MAX_FAILURES_IN_A_ROW = 20


def clip(value: float, bounds: list[int] | None) -> int:
    """Return a length rounded down and kept within its bounds."""
    low, high = bounds or (1, 10**8)
    return max(low, min(high, int(value)))


def draw_lengths(lengths: dict[str, Any], rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield (prompt tokens, output tokens) for ever."""
    if lengths["kind"] == "fixed":
        while True:
            yield lengths["prompt_tokens"], lengths["output_tokens"]
    if lengths["kind"] == "trace":
        while True:
            yield from zip(lengths["prompt_tokens"], lengths["output_tokens"], strict=True)
    sigma = lengths["sigma"]
    while True:
        # mu is chosen so that the mean of the lognormal, exp(mu + sigma^2 / 2), is the workload's.
        drawn = [
            clip(
                rng.lognormvariate(math.log(lengths[kind + "_tokens_mean"]) - sigma**2 / 2, sigma),
                lengths.get(kind + "_clip"),
            )
            for kind in ("prompt", "output")
        ]
        yield drawn[0], drawn[1]


def draw_arrivals(load: dict[str, Any], rng: random.Random) -> Iterator[float]:
    """Yield arrival times [s] of an open load, ascending; ends with the load's duration or count."""
    if load["kind"] == "trace":
        yield from load["arrival_s"]
        return
    mean_gap, now, count = 1 / load["arrivals_per_s"], 0.0, 0
    while True:
        if load["kind"] == "constant":
            gap = mean_gap if count else 0.0
        else:
            # A gamma gap of shape 1 / cv^2 has that coefficient of variation; shape 1 is Poisson.
            shape = 1 / load.get("cv", 1.0) ** 2
            gap = rng.gammavariate(shape, mean_gap / shape)
        now, count = now + gap, count + 1
        if load.get("n_requests") is not None:
            if count > load["n_requests"]:
                return
        elif now > (load.get("duration_s") or 60.0):
            return
        yield now


class State:
    """What all clients share."""

    def __init__(self) -> None:
        seed = CONFIG.get("seed", 0)
        self.rng = random.Random(seed)
        self.lengths = draw_lengths(
            WORKLOAD.get("lengths", {"kind": "fixed", "prompt_tokens": 16, "output_tokens": 16}),
            random.Random(seed + 1),
        )
        low, high = CONFIG.get("token_range", (100, 1000))
        self.low, self.high = low, high
        prefix = WORKLOAD.get("prefix") or {}
        self.hit_frac = prefix.get("conversation_hit_frac", 0.0)
        self.shared = self.rng.choices(range(low, high), k=prefix.get("shared_prefix_tokens", 0))
        self.turns: list[list[int]] = []
        self.n_sent = self.n_done = self.n_failed_in_a_row = 0
        self.started: float | None = None
        self.results: Any = None
        self.samples: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "E2E": []}

    def prompt(self, n_tokens: int) -> list[int]:
        """Return token ids: the shared prefix, the part that an earlier turn left behind, fresh ones."""
        ids = self.shared[:n_tokens]
        rest = n_tokens - len(ids)
        kept = int(rest * self.hit_frac)
        old = self.turns[self.n_sent % len(self.turns)] if self.turns and kept else []
        ids = ids + old[:kept]
        ids = ids + self.rng.choices(range(self.low, self.high), k=n_tokens - len(ids))
        if self.hit_frac and len(self.turns) < 8:
            self.turns.append(ids[len(self.shared) :])
        return ids

    def now(self) -> float:
        """Return seconds since the first request could be sent."""
        if self.started is None:
            self.started = time.perf_counter()
        return time.perf_counter() - self.started


STATE = State()


class Failure(Exception):
    """A request that gave no complete answer; `kind` is for programs, the text for people."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def connect(host: str) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to a base URL and the path under which it serves."""
    url = urlsplit(host)
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(url.netloc, timeout=TIMEOUT_S, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_S)
    return connection, url.path.rstrip("/")


def read_stream(response: http.client.HTTPResponse) -> tuple[list[float], int, int | None]:
    """Return (times of the events that carried tokens, completion tokens, prompt tokens) of one streamed answer.

    vLLM sends an event for every step's tokens, also when their text is still empty (half a character). Other servers
    may close with an empty event that only says why they stopped: it is left out when the token count says so.
    """
    times: list[float] = []
    n_output: int | None = None
    n_prompt: int | None = None
    is_done = has_bare_end = False
    while True:
        line = response.readline()
        if not line:
            break
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            is_done = True
            continue
        at = STATE.now()
        try:
            event = json.loads(data)
        except ValueError as error:
            raise Failure("not_sse", "an event of the stream is not JSON") from error
        if "error" in event:
            raise Failure("server", str(event["error"])[:200])
        for choice in (event.get("choices") or [])[:1]:
            times.append(at)
            has_bare_end = bool(choice.get("finish_reason")) and not choice.get("text")
        usage = event.get("usage") or {}
        n_output = usage.get("completion_tokens", n_output)
        n_prompt = usage.get("prompt_tokens", n_prompt)
    if has_bare_end and n_output is not None and len(times) > n_output:
        times.pop()
    if not times:
        raise Failure("empty", "the stream ended without a token")
    if not is_done:
        raise Failure("cut", "the stream broke off before its end")
    return times, n_output or len(times), n_prompt


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> http.client.HTTPResponse:
    """Return the response to one streaming request, checked to be an event stream."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + KEY} if KEY else {})
    connection.request("POST", path + "/v1/completions", body, headers)
    response = connection.getresponse()
    kind = response.getheader("Content-Type", "")
    if response.status != 200:
        raise Failure("status", f"{response.status} {response.read(200).decode('utf-8', 'replace')}")
    if "text/event-stream" not in kind:
        raise Failure("not_sse", f"content type is {kind[:80]}")
    return response


def is_open(connection: http.client.HTTPConnection) -> bool:
    """Return whether an idle connection can be used again: a server that closed it has sent its end."""
    return connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]


def ask(user: Client, body: bytes) -> tuple[tuple[http.client.HTTPConnection, str], http.client.HTTPResponse]:
    """Return a connection and its response; a kept connection that the server has just closed is replaced once."""
    while user.idle:
        kept = user.idle.pop()
        if is_open(kept[0]):
            try:
                return kept, post(kept[0], kept[1], body)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                user.idle.clear()
        kept[0].close()
    fresh = connect(str(user.host))
    return fresh, post(fresh[0], fresh[1], body)


def prepare() -> tuple[bytes, int]:
    """Return the body of the next request and its prompt's length; done before the request's time, as it takes some."""
    n_prompt, n_output = next(STATE.lengths)
    body = {
        "model": CONFIG.get("model", ""),
        "prompt": STATE.prompt(n_prompt),
        "max_tokens": n_output,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    return json.dumps(body).encode(), n_prompt


def send(user: Client, body: bytes, n_prompt: int, scheduled_s: float | None = None) -> None:
    """Send one request, record it, tell Locust."""
    STATE.n_sent += 1
    start_s = STATE.now()
    record: dict[str, Any] = {"arrival_s": start_s if scheduled_s is None else scheduled_s, "start_s": start_s}
    failure: Failure | None = None
    try:
        connection, response = ask(user, body)
        times, n_answer, n_read = read_stream(response)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        record |= {
            "first_s": times[0],
            "last_s": times[-1],
            "n_events": len(times),
            "itl_max_s": max(gaps, default=0.0),
        }
        record |= {"prompt_tokens": n_read or n_prompt, "output_tokens": n_answer}
        user.idle.append(connection)
    except Failure as error:
        failure = error
    except TimeoutError:
        failure = Failure("stall", f"nothing came for {TIMEOUT_S:g} s")
    except ConnectionRefusedError:
        failure = Failure("refused", f"nobody listens at {user.host}")
    except socket.gaierror:
        failure = Failure("dns", f"the host name of {user.host} is unknown")
    except (OSError, http.client.HTTPException) as error:
        failure = Failure("connection", f"{type(error).__name__}: {error}")
    record["end_s"] = STATE.now()
    if failure is not None:
        record["error"] = {"kind": failure.kind, "text": str(failure)}
    finish(user, record, failure)


def finish(user: Client, record: dict[str, Any], failure: Failure | None) -> None:
    """Write a request's line and stop the test when it was the last, or when nothing but failures come."""
    STATE.n_done += 1
    STATE.n_failed_in_a_row = STATE.n_failed_in_a_row + 1 if failure else 0
    if failure is None:
        STATE.samples["TTFT"].append(record["first_s"] - record["arrival_s"])
        STATE.samples["E2E"].append(record["last_s"] - record["arrival_s"])
        if record["output_tokens"] > 1:
            STATE.samples["TPOT"].append((record["last_s"] - record["first_s"]) / (record["output_tokens"] - 1))
    if STATE.results is not None:
        STATE.results.write(json.dumps(record) + "\n")
        STATE.results.flush()
    user.environment.events.request.fire(
        request_type="POST",
        name="/v1/completions",
        response_time=(record["end_s"] - record["arrival_s"]) * 1000,
        response_length=record.get("output_tokens", 0),
        exception=failure,
        context={},
    )
    wanted = LOAD.get("n_requests") if IS_CLOSED else None
    if (wanted and STATE.n_done >= wanted) or STATE.n_failed_in_a_row >= MAX_FAILURES_IN_A_ROW:
        stop(user)


def stop(user: Client) -> None:
    """End the test from outside the client: quitting ends the client's own greenlet before it has finished."""
    gevent.spawn(user.environment.runner.quit)


def wait_for_end() -> None:
    """Sleep until the test is over: a task that returns is started again, and would send its arrivals at once."""
    while True:
        gevent.sleep(3600)


class Client(User):
    """One client of a closed load, or the dispatcher of an open one."""

    fixed_count = LOAD["concurrency"] if IS_CLOSED else 1

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.idle: list[tuple[http.client.HTTPConnection, str]] = []

    @task
    def generate_load(self) -> None:
        """Send requests one after the other (closed), or each at its time (open)."""
        if IS_CLOSED:
            wanted = LOAD.get("n_requests")
            if wanted and STATE.n_sent >= wanted:
                wait_for_end()
            send(self, *prepare())
            return
        running = []
        for at in draw_arrivals(LOAD, STATE.rng):
            body, n_prompt = prepare()
            gevent.sleep(max(0.0, at - STATE.now()))
            running.append(gevent.spawn(send, self, body, n_prompt, at))
        gevent.joinall(running)
        stop(self)
        wait_for_end()


def set_defaults(parser: Any) -> None:
    """Run headless, all clients at once, unless the command line says otherwise."""
    n = Client.fixed_count
    parser.set_defaults(headless=True, num_users=n, spawn_rate=n, run_time=CONFIG.get("run_time"), only_summary=True)


def open_results(environment: Any, **_: Any) -> None:
    """Open the result file."""
    path = os.environ.get("LOAD_RESULTS")
    if path:
        STATE.results = open(path, "w", encoding="utf-8")  # noqa: SIM115


def summary() -> str:
    """Return a table of the latencies that Locust's own table does not know."""
    lines = ["", f"{'[ms]':<6}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}"]
    for name, values in STATE.samples.items():
        if values:
            ordered = sorted(values)
            # The smallest value that at least this share of the requests does not exceed.
            ranked = [ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.9, 0.95, 0.99)]
            cells = [sum(ordered) / len(ordered), *ranked]
            lines.append(f"{name:<6}" + "".join(f"{1000 * cell:>10.2f}" for cell in cells))
    return "\n".join([*lines, ""])


def close_results(environment: Any, **_: Any) -> None:
    """Close the result file and print the latencies."""
    sys.stdout.write(summary())
    if STATE.results is not None:
        STATE.results.close()
        STATE.results = None


HOOKS: Any = events
HOOKS.init_command_line_parser.add_listener(set_defaults)
HOOKS.test_start.add_listener(open_results)
HOOKS.test_stop.add_listener(close_results)
