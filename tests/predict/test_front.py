"""The API server between clients and engine: against an event loop played task by task, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.predict.front import Front, server_s
from advisor.predict.replica import client_of
from advisor.predict.simulate import Client, simulate
from tests.predict.test_engine import Cost, limits, traffic

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 30)), min_size=1, max_size=12)
READS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), max_size=12)


def played(tasks: list[tuple[float, float]]) -> list[float]:
    """When each task of an event loop is over, in the order in which they come up: (time, work)."""
    free, over = 0.0, []
    for at, work in sorted(tasks, key=lambda task: task[0]):
        free = max(free, at) + work
        over.append(free)
    return over


@given(steps=STEPS, reads=READS)
def test_it_is_an_event_loop_that_takes_tasks_as_they_come(
    steps: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    """Reads and steps at whole and half milliseconds, so that their order is never in doubt."""
    front = Front(request_s=1e-3, prompt_token_s=1e-5, out_token_s=1e-4)
    ends = sorted((1e-3 * at + 5e-4, n) for at, n in steps)
    sent = sorted((1e-3 * at, n) for at, n in reads)
    for end_s, n in ends:
        front.step(end_s, end_s, 1, n)
    tasks = [(at, 1e-3 + 1e-5 * n) for at, n in sent] + [(end_s, 1e-4 * n) for end_s, n in ends]
    for k, (at, n) in enumerate(sent):
        before = [(t, 1e-3 + 1e-5 * m) for t, m in sent[:k]] + [(t, 1e-4 * m) for t, m in ends if t <= at]
        alone = played(before)[-1] if before else 0.0
        assert front.read([(at, n)]) == pytest.approx([max(alone, at) + 1e-3 + 1e-5 * n])
    last_s = max(at for at, _ in tasks)
    assert front.sent_s(last_s) == pytest.approx(max(last_s, played(tasks)[-1]))


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
    whole, single = Front(0.0, 0.0, 6e-5), Front(0.0, 0.0, 6e-5)
    whole.step(ends[0], ends[-1], n_steps, n)
    for end_s in ends:
        single.step(end_s, end_s, 1, n)
    # midway between two ends: at an end itself rounding decides which side it is on
    asked = sorted(first + (int(cut * n_steps) + 0.5) * apart for cut in cuts)
    for at in [*asked, ends[-1] + apart]:
        found = whole.sent_s(at)
        assert found == pytest.approx(single.sent_s(at))
        assert found >= at


def test_tokens_that_are_not_sent_yet_wait_for_a_request_that_comes_before_them() -> None:
    """What the engine has worked out ahead of the clients is no reason to read a request late."""
    front = Front(2e-3, 0.0, 1e-4)
    front.step(0.5, 0.5, 1, 10)
    front.fixed_s = 0.1
    assert front.sent_s(0.5) == pytest.approx(0.501)
    assert front.read([(0.2, 100)]) == pytest.approx([0.202])
    assert front.read([(0.499, 100)]) == pytest.approx([0.501])
    assert front.sent_s(0.5) == pytest.approx(0.502), "behind the request that came before"


def test_oracle_requests_of_a_burst_reach_the_engine_together() -> None:
    """Three at once, 10 ms each, 8 of them before the others have their turn; a fourth comes when all are read."""
    front = Front(1e-2, 0.0, 0.0, first_frac=0.8)
    assert front.read([(0.0, 9), (0.0, 9), (0.0, 9), (0.1, 9)]) == pytest.approx([0.026, 0.028, 0.030, 0.110])
    late = Front(1e-2, 0.0, 0.0, first_frac=0.8)
    # the second comes while the first is being read and goes before its rest; the third comes during that rest
    assert late.read([(0.0, 9), (0.004, 9), (0.017, 9)]) == pytest.approx([0.018, 0.020, 0.030])


@given(reads=READS, first_frac=st.floats(0.0, 1.0))
def test_invariant_two_turns_end_when_one_does(reads: list[tuple[int, int]], first_frac: float) -> None:
    sent = sorted((1e-3 * at, float(n)) for at, n in reads)
    once, twice = Front(1e-3, 1e-5, 0.0), Front(1e-3, 1e-5, 0.0, first_frac)
    one, two = once.read(sent), twice.read(sent)
    assert twice.free_s == pytest.approx(once.free_s)
    assert all(t >= o - 1e-12 for o, t in zip(one, two, strict=True)), "nobody is read earlier"
    assert all(t >= at + server_s(twice.front_s, n) - 1e-12 for t, (at, n) in zip(two, sent, strict=True))
    assert two == sorted(two), "nobody overtakes"


def test_edge_an_even_share_of_nothing() -> None:
    assert Front(1e-3, 0.0, 0.0, 0.5).read([]) == []
    assert Front(1e-3, 0.0, 0.0, 0.5).read([(2.0, 1.0)]) == pytest.approx([2.001])


def test_without_an_api_server_nothing_waits() -> None:
    free = simulate([Cost()], limits(), traffic([40, 40], [4, 4], [0.0, 0.1]), Client(0.0, 0.0, 0.0))  # type: ignore[list-item]
    none = Client(0.0, 0.0, 0.0, front_s=(0.0, 0.0, 1e-12))
    same = simulate([Cost()], limits(), traffic([40, 40], [4, 4], [0.0, 0.1]), none)  # type: ignore[list-item]
    assert same.ttft_s.tolist() == pytest.approx(free.ttft_s.tolist())
    assert same.e2e_s.tolist() == pytest.approx(free.e2e_s.tolist())


def test_a_burst_is_read_before_its_first_tokens_go_out() -> None:
    """Requests that come at once are tasks that came before any token: the first client waits for the last."""
    client = Client(0.0, 0.0, 0.0, front_s=(0.05, 0.0, 1e-6))
    sim = simulate([Cost()], limits(), traffic([4] * 8, [2] * 8, [0.0] * 8), client)  # type: ignore[list-item]
    assert sim.ttft_s.min() >= 8 * 0.05


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


def test_several_servers_share_the_work(root: Path) -> None:
    fitted = json.loads((root / "data/fitted/vllm.json").read_text())["coefficients"]
    values = {name: coefficient["value"] for name, coefficient in fitted.items()}
    one, four = client_of(values).front_s, client_of(values, n_servers=4).front_s
    assert [4 * part for part in four] == pytest.approx(list(one))
    assert client_of(values, is_http=False, n_servers=4).front_s == client_of(values, is_http=False).front_s
