"""Invariants of the scheduler copy: tokens and blocks are conserved, nothing idles that could work, time is exact."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.laws.kv import KvGroups
from advisor.predict import engine as engine_module
from advisor.predict import stretch
from advisor.predict.clock import Clock
from advisor.predict.engine import Engine
from advisor.predict.engine_state import EngineLimits, Sequence_
from advisor.predict.simulate import Client, Simulation, simulate
from advisor.predict.traffic import Traffic

NO_CLIENT = Client(0.0, 0.0, 0.0)


class Cost:
    """A step of one linear term that draws no power."""

    throttle_s = dynamic_power_w = 1.0
    host_s = 1.07e-4
    host_step_s = 0.0
    host_seq_s = 0.0
    host_busy_factor = clock_exponent = 1.0
    window_frac = 1.0  # attention is asked for step by step
    n_experts = 0

    def gpu_s(self, n_prefill: float, n_pairs: float, n_decode: float, n_context: float, n_sampled: float) -> float:
        return 4.0013e-3 + 9.0077e-5 * n_prefill + 1e-6 * n_pairs + 2e-4 * n_decode + 5e-6 * n_context

    def clock(self) -> Clock:
        return Clock(self)  # type: ignore[arg-type]

    def token_terms(self, _: float) -> tuple[float, ...]:
        return (0.0,) * 4

    def sampled_terms(self, _: float) -> tuple[float, ...]:
        return (0.0,) * 3

    def attention_terms(self, *step: float) -> tuple[float, float]:
        return self.gpu_s(*step, 0.0), 0.0

    def layer_launch_s(self, n_tokens: float, is_mixed: bool) -> float:
        return self.host_s

    def token_j(self, _: float) -> float:
        return 0.0

    def request_j(self, *_: float) -> float:
        return 0.0


def traffic(prompt: list[int], output: list[int], arrivals: list[float] | None = None, clients: int = 0) -> Traffic:
    n = len(prompt)
    return Traffic(
        prompt_tokens=np.array(prompt),
        output_tokens=np.array(output),
        cached_tokens=np.zeros(n, dtype=np.int64),
        shared_prefix_tokens=0,
        arrival_s=None if arrivals is None else np.array(arrivals),
        concurrency=clients,
    )


def limits(**changes: Any) -> EngineLimits:
    values = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "n_kv_blocks": 200, "kv_block_tokens": 4}
    return EngineLimits(**{**values, **changes})


def run(cell: Traffic, bounds: EngineLimits, n_stages: int = 1, **more: Any) -> Simulation:
    return simulate([Cost() for _ in range(n_stages)], bounds, cell, NO_CLIENT, **more)  # type: ignore[misc]


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 80)), min_size=1, max_size=12)
SHAPES = st.fixed_dictionaries(
    {"n_kv_blocks": st.integers(26, 120), "max_num_seqs": st.integers(1, 8), "pp": st.sampled_from([1, 1, 2, 3])}
)


def cell_of(requests: list[tuple[int, int, int]]) -> Traffic:
    prompt, output, gaps = zip(*requests, strict=True)
    return traffic(list(prompt), list(output), (np.cumsum(gaps) * 1e-3).tolist())


TABLES = st.sampled_from([KvGroups(1, 1, 0), KvGroups(1, 1, 1), KvGroups(1, 1, 5), KvGroups(1, 0, 1)])
"""Block tables of a sequence: of layers that see all, and of layers that see a window."""


@given(LENGTHS, SHAPES, TABLES, st.integers(1, 60))
def test_tokens_and_blocks_are_conserved(
    requests: list[tuple[int, int, int]], shape: dict[str, int], tables: KvGroups, window: int
) -> None:
    shape = shape | {"n_kv_blocks": shape["n_kv_blocks"] * tables.n_tables}
    bounds = limits(n_in_flight=shape["pp"] + 1, kv_groups=tables, window_tokens=window, **shape)
    engine = Engine([Cost() for _ in range(shape["pp"])], bounds)  # type: ignore[misc]
    prompt, output, gaps = zip(*requests, strict=True)
    arrivals = np.cumsum(gaps) * 1e-3
    fewest = engine.free_blocks
    finished: list[tuple[Sequence_, float]] = []

    def advance(until_s: float) -> None:
        nonlocal fewest
        while done := engine.advance(until_s):
            finished.extend(done)
            fewest = min(fewest, engine.free_blocks)
            assert 0 <= engine.free_blocks <= bounds.n_kv_blocks
            assert engine.n_running <= bounds.max_num_seqs

    for i, at in enumerate(arrivals):
        advance(float(at))
        if engine.is_idle:
            engine.idle_until(float(at))
        engine.enqueue(Sequence_(i, prompt[i], output[i]))
    advance(float("inf"))
    assert sorted(s.index for s, _ in finished) == list(range(len(requests)))
    assert engine.free_blocks == bounds.n_kv_blocks, "every block comes back"
    assert engine.is_idle
    assert engine.n_running == 0
    for group in engine.groups:
        assert group.n == 0
        assert not any(group.residues)
    # one forward pass over each prompt and each output token but the last, and again what a preemption threw away
    work = engine.work
    least = sum(prompt) + sum(output) - len(requests)
    assert least <= work.tokens <= least + work.recomputed_tokens
    if not work.n_preemptions:
        assert work.tokens == least
        assert work.sampled == sum(output)
    ends = [end for _, end in finished]
    assert ends == sorted(ends)
    assert all(s.first_token_s <= end for s, end in finished)


@given(LENGTHS, st.booleans(), st.sampled_from([1, 2]))
def test_stretches_summed_or_stepped_are_the_same(
    requests: list[tuple[int, int, int]], blocking: bool, in_flight: int
) -> None:
    bounds = limits(n_kv_blocks=60, blocks_on_launch=blocking, n_in_flight=in_flight)
    fast = run(cell_of(requests), bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretch, "MAX_STRETCH_STEPS", 1)
        slow = run(cell_of(requests), bounds)
    np.testing.assert_allclose(fast.ttft_s, slow.ttft_s, rtol=1e-9)
    np.testing.assert_allclose(fast.e2e_s, slow.e2e_s, rtol=1e-9)
    one, other = fast.total_work, slow.total_work
    for name in ("n_steps", "tokens", "context_tokens", "sampled", "busy_s", "pairs"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9), name
    assert sum(one.terms) == pytest.approx(sum(other.terms), rel=1e-9)
    assert fast.latency("itl", "mean") == pytest.approx(slow.latency("itl", "mean"), rel=1e-9, nan_ok=True)


class LinearCost(Cost):
    """The same with attention by its coefficients, so that runs of decodes are taken together; it heats the board."""

    window_frac = 0.0
    throttle_s, clock_exponent = 0.05, 0.5

    def token_terms(self, n_tokens: Any) -> tuple[Any, ...]:
        return 4.0013e-3 + 9.0077e-5 * n_tokens, 0.0, 0.0, 0.0

    def attention_terms(self, n_prefill: Any, n_pairs: Any, n_decode: Any, n_context: Any) -> tuple[Any, Any]:
        return 1e-6 * n_pairs, 5e-6 * n_context

    def token_j(self, n_tokens: Any) -> Any:
        return 5e-3 + 2e-4 * n_tokens


@given(LENGTHS, SHAPES, st.booleans(), st.sampled_from([1.0, 1.7]))
def test_runs_of_decodes_in_a_pipeline_are_the_same_step_by_step(
    requests: list[tuple[int, int, int]], shape: dict[str, int], blocking: bool, per_step: float
) -> None:
    pp = shape["pp"] = max(2, shape["pp"])
    more = {"n_in_flight": pp + 1, "blocks_on_launch": blocking, "tokens_per_step": per_step, "graph_wait_frac": 0.5}
    costs = [LinearCost() for _ in range(pp)]
    cell, bounds = cell_of(requests), limits(**shape, **more)
    fast = simulate(costs, bounds, cell, NO_CLIENT, send_s=1e-4)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "run_decodes", lambda engine, until_s, n_most: 0)
        slow = simulate(costs, bounds, cell, NO_CLIENT, send_s=1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(fast.ttft_s, slow.ttft_s, rtol=1e-9)
    np.testing.assert_allclose(fast.e2e_s, slow.e2e_s, rtol=1e-9)
    one, other = fast.total_work, slow.total_work
    for name in ("n_steps", "tokens", "context_tokens", "sampled", "busy_s", "pairs", "n_preemptions"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9), name
    assert one.terms == pytest.approx(other.terms, rel=1e-9)
    for statistic in ("mean", "p99"):
        assert fast.latency("itl", statistic) == pytest.approx(slow.latency("itl", statistic), rel=1e-9, nan_ok=True)


@given(LENGTHS)
def test_the_gpu_never_waits_while_requests_run(requests: list[tuple[int, int, int]]) -> None:
    """All at once, no host in the way: from the first arrival to the last token some step is always running."""
    prompt, output, _ = zip(*requests, strict=True)
    sim = run(traffic(list(prompt), list(output), [0.0] * len(prompt)), limits())
    assert sim.total_work.busy_s == pytest.approx(sim.duration_s, rel=1e-9)


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 5))
def test_far_apart_requests_see_the_unloaded_latency(prompt: int, output: int, n: int) -> None:
    """By hand: one prefill, then decodes of one sequence, with nobody else."""
    cost = Cost()
    ttft = cost.gpu_s(prompt, prompt * (prompt + 1) / 2, 0, 0, 1)
    e2e = ttft + sum(cost.gpu_s(0, 0, 1, prompt + j, 1) for j in range(1, output))
    sim = run(traffic([prompt] * n, [output] * n, [100.0 * i for i in range(n)]), limits())
    np.testing.assert_allclose(sim.ttft_s, ttft, rtol=1e-9)
    np.testing.assert_allclose(sim.e2e_s, e2e, rtol=1e-9)


def test_a_prompt_above_the_budget_is_computed_in_chunks() -> None:
    cost = Cost()
    sim = run(traffic([150], [1], [0.0]), limits())
    chunks = [(64, 64 * 65 / 2), (64, 64 * (64 + 32.5)), (22, 22 * (128 + 11.5))]
    assert sim.ttft_s[0] == pytest.approx(sum(cost.gpu_s(n, pairs, 0, 0, 1) for n, pairs in chunks), rel=1e-9)
    assert sim.total_work.n_steps == 3


def test_an_arrival_in_a_step_starts_two_steps_later() -> None:
    """Two batches in flight: while step k runs k + 1 is fixed, so what arrives in k has its first token after k + 2."""
    cost = Cost()
    first = cost.gpu_s(8, 36, 0, 0, 1)
    step = [cost.gpu_s(0, 0, 1, 8 + j, 1) for j in range(1, 60)]
    ends = first + np.cumsum(step)
    k = 20
    at = float(ends[k - 1] + 0.3 * step[k])  # while step k runs
    sim = run(traffic([8, 8], [60, 1], [0.0, at]), limits())
    mixed = cost.gpu_s(8, 36, 1, 8 + k + 3, 2)
    assert sim.ttft_s[1] == pytest.approx(float(ends[k + 1]) + mixed - at, rel=1e-9)


@given(LENGTHS, st.integers(26, 60))
def test_with_room_for_all_more_cache_changes_nothing(requests: list[tuple[int, int, int]], extra: int) -> None:
    need = sum(-(-(p + o) // 4) for p, o, _ in requests)
    one, more = (run(cell_of(requests), limits(n_kv_blocks=n)) for n in (need, need + extra))
    np.testing.assert_array_equal(one.e2e_s, more.e2e_s)


def test_more_cache_shortens_a_preempted_run() -> None:
    cell = traffic([40] * 8, [60] * 8, [0.0] * 8)
    tight, wide = run(cell, limits(n_kv_blocks=90)), run(cell, limits(n_kv_blocks=200))
    assert tight.total_work.n_preemptions > 0
    assert wide.total_work.n_preemptions == 0
    assert wide.duration_s < tight.duration_s
    assert wide.e2e_s.max() < tight.e2e_s.max()


def test_equal_input_gives_equal_output() -> None:
    rng = np.random.default_rng(5)
    cell = traffic(
        rng.integers(1, 60, 200).tolist(),
        rng.integers(1, 60, 200).tolist(),
        np.cumsum(rng.exponential(0.02, 200)).tolist(),
    )
    one, two = run(cell, limits()), run(cell, limits())
    np.testing.assert_array_equal(one.e2e_s, two.e2e_s)
    assert one.total_work == two.total_work


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_pipeline_groups_all_finish_and_beat_no_physics(pp: int) -> None:
    n = 24
    cell = traffic([20] * n, [30] * n, clients=8)
    bounds = limits(pp=pp, n_in_flight=pp + 1)
    sim = run(cell, bounds, n_stages=pp, send_s=1e-4)
    assert np.isfinite(sim.e2e_s).all()
    cost = Cost()
    # a token passes every stage, one after the other
    assert np.nanmin(sim.tpot_s) >= pp * cost.gpu_s(0, 0, 1, 21, 1)
    assert sim.total_work.busy_s <= sim.duration_s * (1 + 1e-9)
    one = run(traffic([20], [30], clients=1), bounds, n_stages=pp, send_s=1e-4)
    decodes = sum(pp * cost.gpu_s(0, 0, 1, 20 + j, 1) + pp * 1e-4 for j in range(1, 30))
    assert one.e2e_s[0] - one.ttft_s[0] == pytest.approx(decodes, rel=0.02)


@given(st.integers(1, 6), st.integers(1, 40))
def test_replicas_share_and_two_are_never_slower_than_one(dp: int, n: int) -> None:
    cell = traffic([20] * n, [10] * n, [0.0] * n)
    sim = run(cell, limits(), dp=dp)
    assert len(sim.work) == dp
    assert np.isfinite(sim.e2e_s).all()
    assert sim.total("tokens") == n * (20 + 9)
    if dp > 1:
        busy = [work.n_steps > 0 for work in sim.work]
        assert sum(busy) == min(dp, n), "the least loaded replica is asked first"
    assert sim.duration_s <= run(cell, limits()).duration_s * (1 + 1e-9)


def test_equal_replicas_behave_as_one_under_their_share() -> None:
    whole = run(traffic([16] * 40, [20] * 40, clients=8), limits(), dp=2)
    half = run(traffic([16] * 20, [20] * 20, clients=4), limits())
    np.testing.assert_allclose(np.sort(whole.e2e_s), np.sort(np.tile(half.e2e_s, 2)), rtol=1e-9)


def test_speculation_gives_the_expected_tokens_a_step() -> None:
    plain = run(traffic([20], [401], [0.0]), limits(max_num_seqs=1))
    fast = run(traffic([20], [401], [0.0]), limits(max_num_seqs=1, tokens_per_step=2.5, verify_tokens=4))
    assert plain.total_work.n_steps == 401
    assert fast.total_work.n_steps == pytest.approx(1 + 400 / 2.5, abs=1)
    assert fast.e2e_s[0] < plain.e2e_s[0]


@pytest.mark.parametrize("shared", [0, 60])
def test_a_request_larger_than_the_cache_is_refused(shared: int) -> None:
    with pytest.raises(DomainError, match="needs more KV cache"):
        run(traffic([700], [200], [0.0]), limits(shared_prefix_blocks=shared))


def test_memory_grows_with_requests_and_not_with_tokens() -> None:
    """A long run holds its results and its gaps between tokens, so a million requests need about a gigabyte."""

    def most_bytes(n: int, output: int) -> int:
        rng = np.random.default_rng(0)
        cell = traffic([32] * n, [output] * n, np.cumsum(rng.exponential(0.005 * output + 0.01, n)).tolist())
        tracemalloc.start()
        try:
            assert np.isfinite(run(cell, limits(n_kv_blocks=2000)).e2e_s).all()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    a_request = (most_bytes(3000, 4) - most_bytes(1000, 4)) / 2000
    assert a_request < 1500, f"{a_request:.0f} bytes a request"
    assert most_bytes(1000, 400) < 2 * most_bytes(1000, 40)


def test_a_shared_prefix_is_read_whole_once_a_step() -> None:
    """n decodes over one prefix read n - 1 of its copies for less; a lone decode reads all of its context."""
    cost, hot = Cost(), 6.0
    lone = run(traffic([8], [2], [0.0]), limits(hot_context_tokens=hot))
    assert lone.tpot_s[0] == pytest.approx(cost.gpu_s(0, 0, 1, 9, 1))
    three = run(traffic([8] * 3, [2] * 3, [0.0] * 3), limits(hot_context_tokens=hot))
    assert three.tpot_s[-1] == pytest.approx(cost.gpu_s(0, 0, 3, 3 * 9 - 2 * hot, 3))
    cold = run(traffic([8] * 3, [2] * 3, [0.0] * 3), limits())
    assert cold.tpot_s[-1] == pytest.approx(cost.gpu_s(0, 0, 3, 27, 3))


def test_windows_leave_room_for_more_sequences_and_change_nothing_else() -> None:
    # eight prompts of 60 tokens: 15 blocks of 4 in each of two tables, or 15 and the 3 that a window of 8 touches
    cell = traffic([60] * 8, [20] * 8, clients=8)
    whole = run(cell, limits(n_kv_blocks=190, kv_groups=KvGroups(1, 1, 1), window_tokens=1000))
    window = run(cell, limits(n_kv_blocks=190, kv_groups=KvGroups(1, 1, 1), window_tokens=8))
    roomy = run(cell, limits(n_kv_blocks=10_000))
    assert window.duration_s < whole.duration_s
    assert window.duration_s == pytest.approx(roomy.duration_s, rel=1e-12), "20 and 3 blocks each, for all at once"
    engine = EngineLimits(64, 8, 150, 4, kv_groups=KvGroups(1, 1, 1), window_tokens=8)
    assert (engine.blocks_held(60), engine.blocks_held(4), engine.cache_tokens) == (15 + 3, 2, 300)
    assert (engine.opens(8), engine.opens(9)) == (2, 1)
