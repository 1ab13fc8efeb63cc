"""The API server between clients and engine: against an event loop played task by task, and what follows from it."""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.predict.front import N_TURNS, Front, server_s
from advisor.predict.replica import client_of
from advisor.predict.simulate import Client, simulate
from tests.predict.test_engine import Cost, limits, traffic

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 30)), max_size=12)
READS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), min_size=1, max_size=12)


def ticked(steps: list[tuple[int, int]], reads: list[tuple[int, int]], n_turns: int) -> dict[int, int]:
    """When each request has been read, tick by tick: tokens that are due go first, turns in the order of coming up.

    steps : (end, ticks that its tokens take); reads : (coming, ticks a turn)
    """
    coming = deque((at, number, turn) for number, (at, turn) in enumerate(reads))
    due = sorted(steps)
    queue: deque[list[int]] = deque()
    over: dict[int, int] = {}
    sending, again = 0, None
    for tick in itertools.count():
        while due and due[0][0] <= tick:
            sending += due.pop(0)[1]
        while coming and coming[0][0] <= tick:
            _, number, turn = coming.popleft()
            queue.append([number, turn, turn, n_turns])
        if again is not None:
            queue.append(again)
            again = None
        if sending:
            sending -= 1
        elif queue:
            queue[0][1] -= 1
            if queue[0][1] == 0:
                number, _, turn, left = queue.popleft()
                if left == 1:
                    over[number] = tick + 1
                else:
                    again = [number, turn, turn, left - 1]
        if len(over) == len(reads):
            return over
    raise AssertionError


def taken(front: Front) -> dict[int, float]:
    """When each request that has been sent has been read."""
    over = {}
    while front.next_s() < math.inf:
        if (number := front.take()) is not None:
            over[number] = front.free_s
    return over


@given(steps=STEPS, reads=READS, n_turns=st.integers(1, 3))
def test_oracle_an_event_loop_tick_by_tick(
    steps: list[tuple[int, int]], reads: list[tuple[int, int]], n_turns: int
) -> None:
    steps, reads = sorted(steps), sorted(reads)
    front = Front(request_s=0.0, prompt_token_s=float(n_turns), out_token_s=1.0, n_turns=n_turns)
    for end, n in steps:
        front.step(end, end, 1, n)
    for number, (at, turn) in enumerate(reads):
        front.send(at, number, turn)
    assert taken(front) == pytest.approx(ticked(steps, reads, n_turns))


@given(steps=STEPS, reads=READS)
def test_steps_that_become_known_later_put_a_turn_off(
    steps: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    """As the engine is played: asked, told of the steps up to then, asked again, taken."""
    steps, reads = sorted(steps), sorted(reads)
    front = Front(0.0, 2.0, 1.0, n_turns=2)
    for number, (at, turn) in enumerate(reads):
        front.send(at, number, turn)
    unknown, over = deque(steps), {}
    while (next_s := front.next_s()) < math.inf:
        told = [unknown.popleft() for _ in range(sum(end < next_s for end, _ in unknown))]
        for end, n in told:
            front.step(end, end, 1, n)
        assert front.next_s() >= next_s
        if front.next_s() == next_s and (number := front.take()) is not None:
            over[number] = front.free_s
    assert over == pytest.approx(ticked(steps, reads, 2))


@given(
    first=st.floats(0.0, 1.0),
    apart=st.floats(1e-4, 0.1),
    n_steps=st.integers(1, 60),
    n=st.integers(1, 300),
    cuts=st.lists(st.floats(0.0, 1.0), max_size=5),
)
def test_a_run_of_steps_is_its_steps_one_by_one(
    first: float, apart: float, n_steps: int, n: int, cuts: list[float]
) -> None:
    """However often somebody asks in between."""
    ends = [first + i * apart for i in range(n_steps)]
    whole, single = Front(1e-3, 0.0, 6e-5), Front(1e-3, 0.0, 6e-5)
    whole.step(ends[0], ends[-1], n_steps, n)
    for end_s in ends:
        single.step(end_s, end_s, 1, n)
    # midway between two ends: at an end itself rounding decides which side it is on
    asked = sorted(first + (int(cut * n_steps) + 0.5) * apart for cut in cuts)
    for number, at in enumerate(asked):
        whole.send(at, number, 0.0)
        single.send(at, number, 0.0)
    assert taken(whole) == pytest.approx(taken(single))
    for at in [*asked, ends[-1] + apart]:
        found = whole.tokens.sent_s(at)
        assert found == pytest.approx(single.tokens.sent_s(at))
        assert found >= at


def test_requests_wait_for_tokens_and_tokens_for_none() -> None:
    """Ten tokens of 0.1 ms each come up in the middle of a request of 2 ms."""
    front = Front(2e-3, 0.0, 1e-4, n_turns=1)
    front.step(0.5, 0.5, 1, 10)
    front.send(0.2, 0, 100)
    front.send(0.499, 1, 100)
    assert taken(front) == pytest.approx({0: 0.202, 1: 0.502})
    assert front.tokens.sent_s(0.5) == pytest.approx(0.501)


def test_while_more_tokens_come_up_than_can_be_sent_nobody_is_read() -> None:
    front = Front(1e-3, 0.0, 1e-4, n_turns=1)
    front.step(0.01, 1.0, 100, 200)  # 20 ms of sending every 10 ms
    front.send(0.05, 0, 1)
    assert taken(front) == pytest.approx({0: 0.01 + 100 * 0.02 + 1e-3})


def test_requests_of_a_burst_reach_the_engine_together() -> None:
    """Three at once, two turns of 5 ms each; a fourth comes when all are read."""
    front = Front(1e-2, 0.0, 0.0, n_turns=2)
    for number, at in enumerate((0.0, 0.0, 0.0, 0.1)):
        front.send(at, number, 9)
    assert taken(front) == pytest.approx({0: 0.020, 1: 0.025, 2: 0.030, 3: 0.110})


@given(reads=READS, n_turns=st.integers(1, 4))
def test_invariant_turns_end_when_one_does(reads: list[tuple[int, int]], n_turns: int) -> None:
    sent = sorted((1e-3 * at, float(n)) for at, n in reads)
    fronts = Front(1e-3, 1e-5, 0.0, n_turns=1), Front(1e-3, 1e-5, 0.0, n_turns=n_turns)
    for number, (at, n) in enumerate(sent):
        for front in fronts:
            front.send(at, number, n)
    one, many = (taken(front) for front in fronts)
    assert fronts[1].free_s == pytest.approx(fronts[0].free_s)
    assert all(many[k] >= one[k] - 1e-12 for k in one), "nobody is read earlier"
    assert all(many[k] >= at + server_s(fronts[1].front_s, n) - 1e-12 for k, (at, n) in enumerate(sent))


def test_edge_nobody_has_come() -> None:
    front = Front(1e-3, 0.0, 0.0)
    assert front.next_s() == math.inf
    front.step(1.0, 1.0, 1, 5)
    assert front.next_s() == math.inf
    front.send(2.0, 7, 1.0)
    assert taken(front) == pytest.approx({7: 2.001})


def test_without_an_api_server_nothing_waits() -> None:
    free = simulate([Cost()], limits(), traffic([40, 40], [4, 4], [0.0, 0.1]), Client(0.0, 0.0, 0.0))  # type: ignore[list-item]
    none = Client(0.0, 0.0, 0.0, front_s=(0.0, 0.0, 1e-12))
    same = simulate([Cost()], limits(), traffic([40, 40], [4, 4], [0.0, 0.1]), none)  # type: ignore[list-item]
    assert same.ttft_s.tolist() == pytest.approx(free.ttft_s.tolist())
    assert same.e2e_s.tolist() == pytest.approx(free.e2e_s.tolist())


def test_no_request_of_a_burst_is_answered_before_half_of_all_reading_is_done() -> None:
    """Each of eight at once has its first turn before the first has its second."""
    client = Client(0.0, 0.0, 0.0, front_s=(0.05, 0.0, 1e-6))
    sim = simulate([Cost()], limits(), traffic([4] * 8, [2] * 8, [0.0] * 8), client)  # type: ignore[list-item]
    assert sim.ttft_s.min() >= 8 * 0.05 / N_TURNS


def test_a_server_slower_than_the_engine_sets_the_pace_and_the_gaps_add_up() -> None:
    """Little's law of a saturated loop: tokens a second = 1 / (time a token + share of its request's reading)."""
    out_s, read_s, n_out, clients = 1e-3, 1e-4, 40, 16
    client = Client(0.0, 0.0, 0.0, front_s=(read_s, 0.0, out_s))
    cell = traffic([8] * 160, [n_out] * 160, clients=clients)
    sim = simulate([Cost()], limits(), cell, client)  # type: ignore[list-item]
    wanted = 1.0 / (out_s + read_s / n_out)
    assert sim.output_tokens.sum() / sim.duration_s == pytest.approx(wanted, rel=0.05)
    assert float(np.median(sim.e2e_s)) == pytest.approx(clients * n_out / wanted, rel=0.1)
    in_gaps = float(sim.itl_s @ sim.itl_weights)
    assert in_gaps == pytest.approx(float((sim.tpot_s * (sim.output_tokens - 1)).sum()), rel=1e-6)
    fast = simulate([Cost()], limits(), cell, Client(0.0, 0.0, 0.0))  # type: ignore[list-item]
    assert fast.duration_s < sim.duration_s


def test_servers_sent_as_many_tokens_as_the_fit_says(root: Path) -> None:
    """128 tokens to each of 256 clients: 10,400 to 18,000 a second, of engines that make 1.5 to 3 times as many."""
    fitted = json.loads((root / "data/fitted/vllm.json").read_text())["coefficients"]
    values = {name: coefficient["value"] for name, coefficient in fitted.items()}
    request_s, prompt_token_s, out_token_s = client_of(values).front_s
    most = 1.0 / (out_token_s + (request_s + 128 * prompt_token_s) / 128)
    files = [root / f"data/runs/vllm-0.26.0_{name}.jsonl" for name in ("h100-http-3", "h200-http")]
    cells = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    measured = [
        c["measured"]["output_tokens_per_s"]
        for c in cells
        if (c["load"].get("concurrency"), c["lengths"].get("output_tokens")) == (256, 128)
        and (c["gpu"].startswith("h100") or c["model"] in ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-3b"))
        and c.get("api_server_count", 1) == 1
    ]
    assert len(measured) == 7
    assert most == pytest.approx(float(np.median(measured)), rel=0.25)


def test_more_servers_sent_no_more_tokens_to_our_one_client(root: Path) -> None:
    """1B to 256 clients: four API servers sent 1.03 and, on another H100 host, 1.09 times as many as one."""
    files = [root / f"data/runs/vllm-0.26.0_{name}.jsonl" for name in ("h200-http", "h100-http-4", "h100-http-5")]
    cells = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rates = {
        (c["gpu"], c.get("api_server_count", 1)): c["measured"]["output_tokens_per_s"]
        for c in cells
        if (c["model"], c["load"].get("concurrency"), c["lengths"].get("output_tokens")) == ("llama-3.2-1b", 256, 128)
    }
    for gpu in ("h100-sxm-80gb", "h200-sxm-141gb"):
        assert 1.0 < rates[gpu, 4] / rates[gpu, 1] < 1.15
