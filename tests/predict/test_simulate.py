"""Statistics of a replay against numpy on the requests one by one; samples over time; goodput."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from advisor.catalog import load_catalog
from advisor.predict.breakdown import queue_grows
from advisor.predict.replica import replica_of
from advisor.predict.simulate import STATISTICS, Simulation, simulate, weighted_statistics
from advisor.predict.traffic import Traffic, draw
from advisor.predict.transfer import transferred
from advisor.schema import (
    ClosedLoad,
    Deployment,
    FixedLengths,
    GammaLoad,
    LognormalLengths,
    PoissonLoad,
    Slo,
    Target,
    TraceLoad,
    Workload,
)

CATALOG = load_catalog()
GPU = CATALOG.gpu("h100-sxm-80gb")
VALUES = transferred(CATALOG.coefficients("vllm"), GPU)
LENGTHS = LognormalLengths(prompt_tokens_mean=400, output_tokens_mean=120, sigma=0.6)


def replayed(load: object, lengths: object = LENGTHS, n_samples: int = 0, **plan: object) -> tuple[Simulation, Traffic]:
    deployment = Deployment.model_validate({"model": "llama-3.1-8b", "gpu": GPU.name, **plan})
    replica = replica_of(CATALOG.model("llama-3.1-8b")[0], GPU, deployment, VALUES)
    traffic = draw(Workload.model_validate({"lengths": lengths, "load": load}), 3, prefix_caching=False)
    sim = simulate(
        list(replica.stages),
        replica.limits,
        traffic,
        replica.client,
        dp=deployment.dp,
        send_s=replica.send_s,
        n_samples=n_samples,
    )
    return sim, traffic


def test_percentiles_are_numpys() -> None:
    sim, _ = replayed(PoissonLoad(arrivals_per_s=6, n_requests=300))
    for metric, values in (("ttft", sim.ttft_s), ("e2e", sim.e2e_s), ("tpot", sim.tpot_s)):
        assert sim.latency(metric, "mean") == pytest.approx(np.nanmean(values))  # type: ignore[arg-type]
        for q in (50, 90, 95, 99):
            assert sim.latency(metric, f"p{q}") == pytest.approx(np.nanpercentile(values, q))  # type: ignore[arg-type]
    steps = [sim.latency("itl", s) for s in ("p50", "p90", "p95", "p99")]
    assert steps == sorted(steps)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), min_size=1, max_size=30))
def test_weighted_statistics_are_those_of_repeated_values(pairs: list[tuple[float, int]]) -> None:
    values, weights = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)
    repeated = np.repeat(values, weights.astype(int))
    assert weighted_statistics(values, weights, ["mean"])[0] == pytest.approx(repeated.mean(), abs=1e-9)
    for q in (50, 90, 99):
        lower = np.percentile(repeated, q, method="inverted_cdf")
        upper = np.percentile(repeated, q, method="higher")
        found = weighted_statistics(values, weights, [f"p{q}"])[0]
        assert lower - 1e-9 <= found <= upper + 1e-9


def test_no_values_have_no_statistic() -> None:
    sim, _ = replayed(ClosedLoad(concurrency=2, n_requests=4), FixedLengths(prompt_tokens=50, output_tokens=1))
    assert math.isnan(sim.latency("tpot", "p50"))
    assert math.isnan(sim.latency("itl", "p99"))
    assert math.isnan(weighted_statistics(np.array([]), np.array([]), ["mean"])[0])


def test_every_latency_is_consistent_with_itself() -> None:
    sim, traffic = replayed(GammaLoad(arrivals_per_s=6, cv=2.0, n_requests=300))
    assert (sim.ttft_s > 0).all()
    assert (sim.e2e_s >= sim.ttft_s).all()
    more = traffic.output_tokens > 1
    np.testing.assert_allclose(
        sim.e2e_s[more], (sim.ttft_s + sim.tpot_s * (traffic.output_tokens - 1))[more], rtol=1e-9
    )
    assert sim.requests_per_s == pytest.approx(300 / sim.duration_s)
    # gaps between tokens add up to the decode time of all requests
    decode = float((sim.e2e_s - sim.ttft_s).sum())
    assert float((sim.itl_s * sim.itl_weights).sum()) == pytest.approx(decode, rel=0.02)


def test_attainment_counts_requests_one_by_one() -> None:
    sim, _ = replayed(PoissonLoad(arrivals_per_s=6, n_requests=200))
    bound = float(np.median(sim.ttft_s))
    slo = Slo(targets=(Target(metric="ttft", statistic="p99", max_s=bound),))
    assert sim.attainment(slo).mean() == pytest.approx(0.5, abs=0.01)
    assert sim.attainment(Slo()).all()


def test_samples_over_time_stay_inside_the_limits() -> None:
    sim, _ = replayed(PoissonLoad(arrivals_per_s=10, n_requests=300), n_samples=50)
    assert 10 <= len(sim.timeline) <= 60
    times = [sample[0] for sample in sim.timeline]
    assert times == sorted(times)
    for _, running, waiting, blocks in sim.timeline:
        assert 0 <= running <= 256
        assert waiting >= 0
        assert blocks >= 0
    assert max(s[1] for s in sim.timeline) > 1
    assert sim.term_seconds().keys() >= {"linear", "decode_attention"}


def test_a_shorter_replay_without_warm_up_keeps_the_rest() -> None:
    sim, _ = replayed(PoissonLoad(arrivals_per_s=6, n_requests=200))
    rest = sim.since(float(np.median(sim.submitted_s)))
    assert len(rest.ttft_s) == pytest.approx(100, abs=1)
    assert sim.since(1e9) is sim, "nothing left: all of it"


def test_trace_and_constant_arrivals_agree() -> None:
    lengths = FixedLengths(prompt_tokens=200, output_tokens=50)
    times = tuple(0.25 * (i + 1) for i in range(60))
    one, _ = replayed(TraceLoad(arrival_s=times), lengths)
    other, _ = replayed({"kind": "constant", "arrivals_per_s": 4.0, "n_requests": 60}, lengths)
    np.testing.assert_allclose(one.ttft_s, other.ttft_s, rtol=1e-6)


def test_load_to_zero_gives_the_unloaded_latency() -> None:
    lengths = FixedLengths(prompt_tokens=500, output_tokens=64)
    alone, _ = replayed(ClosedLoad(concurrency=1, n_requests=1), lengths)
    rare, _ = replayed({"kind": "constant", "arrivals_per_s": 0.01, "n_requests": 20}, lengths)
    np.testing.assert_allclose(rare.ttft_s, alone.ttft_s[0], rtol=1e-9)
    np.testing.assert_allclose(rare.e2e_s, alone.e2e_s[0], rtol=1e-9)


def test_more_load_is_never_faster() -> None:
    lengths = FixedLengths(prompt_tokens=500, output_tokens=64)
    means = []
    for rate in (0.5, 2.0, 8.0, 32.0):
        sim, _ = replayed(PoissonLoad(arrivals_per_s=rate, n_requests=150), lengths)
        means.append((sim.latency("ttft", "mean"), sim.latency("tpot", "mean")))
    assert means == sorted(means)
    assert [m[1] for m in means] == sorted(m[1] for m in means)


@pytest.mark.parametrize("plan", [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2, "dp": 2}])
def test_every_parallel_shape_finishes(plan: dict[str, int]) -> None:
    sim, traffic = replayed(ClosedLoad(concurrency=8, n_requests=40), **plan)
    assert np.isfinite(sim.e2e_s).all()
    assert set(STATISTICS) == {"mean", "p50", "p90", "p95", "p99"}
    assert sim.total("sampled") == traffic.output_tokens.sum()


def test_a_crowd_that_came_by_chance_is_no_overload() -> None:
    """The last quarter waits long in both; in a crowd some are served at once again, in a growing queue nobody is."""
    n = 400
    submitted = np.arange(n, dtype=float)
    zeros, ones = np.zeros(n), np.ones(n, dtype=np.int64)

    def run(ttft_s: NDArray[np.float64]) -> Simulation:
        return Simulation(ttft_s, zeros, ttft_s, submitted, ones, ones, zeros, zeros, float(n), ())

    growing = 0.1 + np.maximum(submitted - 50.0, 0.0) * 0.02
    crowd = np.where((submitted > 300) & (submitted < 380), 5.0, 0.1)
    assert queue_grows(run(growing))
    assert not queue_grows(run(crowd))
    assert not queue_grows(run(np.full(n, 0.1)))
