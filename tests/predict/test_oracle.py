"""The fast scheduler against the slow one, request by request, on random small cells."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.predict.clock import Clock
from advisor.predict.engine_state import LOAD_HEAD_S, EngineLimits
from advisor.predict.simulate import Client, Simulation, simulate
from advisor.predict.traffic import Traffic

_spec = importlib.util.spec_from_file_location("scheduler_oracle", Path(__file__).with_name("oracle.py"))
assert _spec is not None
assert _spec.loader is not None
oracle = importlib.util.module_from_spec(_spec)
sys.modules["scheduler_oracle"] = oracle
_spec.loader.exec_module(oracle)

BLOCK = 4


class LinearCost:
    """A step whose time is linear in everything, so that sums and closed forms agree to the last digit but one."""

    throttle_s = dynamic_power_w = 1.0
    host_seq_s = 3e-6
    host_busy_factor = 1.5
    clock_exponent = 1.0
    window_frac = 1.0  # attention is asked for step by step
    n_experts = 0

    def __init__(self, host_s: float = 1e-4) -> None:
        self.alone_s = self.host_step_s = host_s

    def gpu_s(self, n_prefill: Any, n_pairs: Any, n_decode: Any, n_context: Any, n_sampled: Any) -> Any:
        return (
            5.0013719e-3
            + 1.0000377e-4 * n_prefill
            + 1e-6 * n_pairs
            + 3e-4 * n_decode
            + 7e-6 * n_context
            + 1e-5 * n_sampled
        )

    def host_s(self, n_prefill: Any, n_decode: Any, n_sampled: Any) -> Any:
        layers = self.layer_launch_s(0, n_prefill > 0) * (self.host_busy_factor if n_decode else 1.0)
        return self.alone_s + layers + n_sampled * self.host_seq_s

    def prepare_s(self, n_sampled: Any) -> Any:
        return self.alone_s + n_sampled * self.host_seq_s

    # the same law in the parts that the scheduler copy asks for
    def clock(self) -> Clock:
        return Clock(self)  # type: ignore[arg-type]

    def token_terms(self, _: Any) -> tuple[float, ...]:
        return (5.0013719e-3, 0.0, 0.0, 0.0)

    def sampled_terms(self, n_sampled: Any) -> tuple[float, float, float]:
        return 1e-5 * n_sampled, 0.0, 0.0

    def attention_terms(self, n_prefill: Any, n_pairs: Any, n_decode: Any, n_context: Any) -> tuple[float, float]:
        return 1.0000377e-4 * n_prefill + 1e-6 * n_pairs, 3e-4 * n_decode + 7e-6 * n_context

    def layer_launch_s(self, n_tokens: Any, is_mixed: bool) -> float:
        return 2 * self.alone_s * is_mixed

    def token_j(self, _: Any) -> float:
        return 0.0

    def request_j(self, *_: Any) -> float:
        return 0.0


def traffic_of(cell: dict[str, Any], concurrency: int = 0) -> Traffic:
    prompt = np.array([r[1] for r in cell["requests"]])
    cached = np.array([min(r[3], (r[1] - 1) // BLOCK) * BLOCK for r in cell["requests"]])
    shared = cell["shared"] * BLOCK
    if shared:  # everyone but the first hits the shared prompt, as `draw` gives it
        cached = np.maximum(cached, np.minimum(shared, (prompt - 1) // BLOCK * BLOCK))
    cached[0] = 0
    return Traffic(
        prompt_tokens=prompt,
        output_tokens=np.array([r[2] for r in cell["requests"]]),
        cached_tokens=cached,
        shared_prefix_tokens=shared,
        arrival_s=None if concurrency else np.cumsum([r[0] * 1e-3 for r in cell["requests"]]),
        concurrency=concurrency,
    )


def limits_of(cell: dict[str, Any], traffic: Traffic) -> EngineLimits:
    longest = int((traffic.prompt_tokens + traffic.output_tokens).max())
    return EngineLimits(
        max_num_batched_tokens=max(cell["budget"], cell["seqs"]),
        max_num_seqs=cell["seqs"],
        n_kv_blocks=-(-longest // BLOCK) + cell["spare"] + cell["shared"],
        kv_block_tokens=BLOCK,
        n_in_flight=cell["in_flight"],
        blocks_on_launch=cell["blocking"],
        graph_wait_frac=0.25,
        reserves_full_prompt=cell["reserves"],
        shared_prefix_blocks=cell["shared"],
        cold_heads=frozenset(cell["cold"]),
    )


def head_of(n_sampled: int) -> int:
    """Kernels of the LM head for batches as small as those here: one a pair of sizes."""
    return -(-n_sampled // 2)


def judge(cell: dict[str, Any], traffic: Traffic, client: Client) -> Any:
    limits = limits_of(cell, traffic)
    engine = oracle.Oracle(
        cost=LinearCost(cell["host"]),
        budget=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        n_blocks=limits.n_kv_blocks - limits.shared_prefix_blocks,
        block_tokens=BLOCK,
        n_in_flight=limits.n_in_flight,
        blocks_on_launch=limits.blocks_on_launch,
        graph_wait_frac=limits.graph_wait_frac,
        reserves_full_prompt=limits.reserves_full_prompt,
        cold=set(limits.cold_heads),
        head_of=head_of,
        load_s=LOAD_HEAD_S,
    )

    def request(index: int, submitted_s: float) -> tuple[float, int, Any]:
        cached = int(traffic.cached_tokens[index])
        made = oracle.Request(
            index=index,
            arrival_s=submitted_s,
            prompt=int(traffic.prompt_tokens[index]),
            max_tokens=int(traffic.output_tokens[index]),
            cached=cached,
            shared_blocks=min(cell["shared"], (int(traffic.prompt_tokens[index]) - 1) // BLOCK),
        )
        everyone.append(made)
        return submitted_s + client.submit_s, index, made

    everyone: list[Any] = []
    n = len(traffic.prompt_tokens)
    if traffic.arrival_s is not None:
        engine.run([request(i, float(t)) for i, t in enumerate(traffic.arrival_s)])
    else:
        todo: Iterator[int] = iter(range(n))
        first = [request(i, 0.0) for i in [next(todo) for _ in range(min(traffic.concurrency, n))]]

        def on_end(ended: Any) -> list[Any]:
            index = next(todo, -1)
            return [request(index, ended.end_s + client.return_s)] if index >= 0 else []

        engine.run(first, on_end)
    everyone.sort(key=lambda r: r.index)
    assert len(engine.free) == engine.n_blocks, "every block comes back"
    assert engine.most_blocks <= engine.n_blocks
    return engine, everyone


def compare(cell: dict[str, Any], traffic: Traffic) -> Simulation:
    client = Client(submit_s=1.3e-3, return_s=0.7e-3, serial_s=0.0)
    limits = limits_of(cell, traffic)
    with patch("advisor.predict.engine.head_of", head_of), patch("advisor.predict.stretch.head_of", head_of):
        sim = simulate([LinearCost(cell["host"])], limits, traffic, client)  # type: ignore[list-item]
    engine, everyone = judge(cell, traffic, client)
    np.testing.assert_allclose(sim.submitted_s, [r.arrival_s for r in everyone], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sim.ttft_s, [r.first_s + client.return_s - r.arrival_s for r in everyone], rtol=1e-9)
    np.testing.assert_allclose(sim.e2e_s, [r.end_s + client.return_s - r.arrival_s for r in everyone], rtol=1e-9)
    work = sim.total_work
    assert work.n_steps == engine.n_steps
    assert work.tokens == engine.n_tokens
    assert work.n_preemptions == engine.n_preemptions
    return sim


REQUEST = st.tuples(st.integers(0, 120), st.integers(1, 40), st.integers(1, 30), st.integers(0, 4))
CELL = st.fixed_dictionaries(
    {
        "requests": st.lists(REQUEST, min_size=1, max_size=14),
        "budget": st.integers(1, 48),
        "seqs": st.integers(1, 8),
        "spare": st.integers(0, 40),
        "in_flight": st.sampled_from([1, 2]),
        "blocking": st.booleans(),
        "reserves": st.booleans(),
        "host": st.sampled_from([1.0213e-4, 1.00371e-3, 2.01379e-2]),
        "shared": st.sampled_from([0, 0, 0, 2]),
        "cold": st.sampled_from([(), (), (1, 2, 3, 4), (2, 4)]),
    }
)


@settings(max_examples=300)
@given(CELL)
def test_open_loop_equals_the_step_by_step_scheduler(cell: dict[str, Any]) -> None:
    compare(cell, traffic_of(cell))


@settings(max_examples=300)
@given(CELL, st.integers(1, 10))
def test_closed_loop_equals_the_step_by_step_scheduler(cell: dict[str, Any], concurrency: int) -> None:
    compare(cell, traffic_of(cell, concurrency))
