"""Drawn traffic: means, rates and burstiness of what was asked for, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.predict.traffic import arrival_times, draw, draw_lengths, mean_lengths
from advisor.schema import (
    ClosedLoad,
    ConstantLoad,
    FixedLengths,
    GammaLoad,
    Load,
    LognormalLengths,
    PoissonLoad,
    PrefixSharing,
    TraceLengths,
    TraceLoad,
    Workload,
)

FIXED = FixedLengths(prompt_tokens=100, output_tokens=20)


def workload(load: Load, **more: object) -> Workload:
    return Workload.model_validate({"lengths": FIXED, "load": load, **more})


@given(st.integers(0, 2**32), st.floats(0.1, 1.5))
def test_equal_seeds_give_equal_traffic(seed: int, sigma: float) -> None:
    lengths = LognormalLengths(prompt_tokens_mean=300, output_tokens_mean=100, sigma=sigma)
    w = workload(PoissonLoad(arrivals_per_s=5, n_requests=50), lengths=lengths)
    one, two = (draw(w, seed, prefix_caching=False) for _ in range(2))
    other = draw(w, seed + 1, prefix_caching=False)
    np.testing.assert_array_equal(one.prompt_tokens, two.prompt_tokens)
    np.testing.assert_array_equal(one.arrival_s, two.arrival_s)
    assert not np.array_equal(one.arrival_s, other.arrival_s)


def test_a_lognormal_keeps_its_mean_and_spread() -> None:
    lengths = LognormalLengths(prompt_tokens_mean=1000, output_tokens_mean=300, sigma=0.6)
    prompt, output = draw_lengths(lengths, 200_000, np.random.default_rng(0))
    # rounding down loses half a token; the standard error of the mean is 0.15 %
    assert prompt.mean() == pytest.approx(999.5, rel=0.006)
    assert output.mean() == pytest.approx(299.5, rel=0.006)
    assert np.log(prompt).std() == pytest.approx(0.6, rel=0.02)
    assert mean_lengths(lengths) == pytest.approx((999.5, 299.5), rel=0.01)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 3))
def test_clipped_lengths_stay_inside(low: int, span: int, sigma: float) -> None:
    lengths = LognormalLengths(
        prompt_tokens_mean=200, output_tokens_mean=50, sigma=sigma, prompt_clip=(low, low + span), output_clip=(1, 10)
    )
    prompt, output = draw_lengths(lengths, 100, np.random.default_rng(1))
    assert prompt.min() >= low
    assert prompt.max() <= low + span
    assert output.min() >= 1
    assert output.max() <= 10
    mean = mean_lengths(lengths)
    assert low <= mean[0] <= low + span


def test_gaps_have_the_rate_and_the_burstiness() -> None:
    rng = np.random.default_rng(2)
    for load, cv in (
        (PoissonLoad(arrivals_per_s=8, n_requests=100_000), 1.0),
        (GammaLoad(arrivals_per_s=8, cv=2.5, n_requests=100_000), 2.5),
        (GammaLoad(arrivals_per_s=8, cv=0.3, n_requests=100_000), 0.3),
        (ConstantLoad(arrivals_per_s=8, n_requests=1000), 0.0),
    ):
        gaps = np.diff(arrival_times(load, rng), prepend=0.0)
        assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


@given(st.integers(0, 2**32), st.integers(1, 300), st.floats(0.1, 50), st.floats(0.2, 4))
def test_a_draw_has_the_rate_that_was_asked_for(seed: int, n: int, rate: float, cv: float) -> None:
    """A few hundred arrivals would otherwise bring up to 15 % more or less load than the question said."""
    for load in (PoissonLoad(arrivals_per_s=rate, n_requests=n), GammaLoad(arrivals_per_s=rate, cv=cv, n_requests=n)):
        times = arrival_times(load, np.random.default_rng(seed))
        assert len(times) == n
        assert times[-1] == pytest.approx(n / rate)
        assert (np.diff(times) >= 0).all()


@given(st.integers(2, 300), st.floats(1, 100))
def test_a_known_count_and_duration_are_both_kept(n: int, duration: float) -> None:
    load = PoissonLoad(arrivals_per_s=n / duration, n_requests=n, duration_s=duration)
    times = arrival_times(load, np.random.default_rng(3))
    assert len(times) == n
    assert (np.diff(times) >= 0).all()
    assert times[-2] <= duration < times[-1]


def test_a_duration_alone_ends_with_the_first_arrival_past_it() -> None:
    times = arrival_times(PoissonLoad(arrivals_per_s=20, duration_s=10), np.random.default_rng(4))
    assert times[-2] <= 10 < times[-1]
    assert len(times) == pytest.approx(200, abs=60)


def test_a_trace_is_replayed_from_its_start() -> None:
    trace = TraceLengths(prompt_tokens=(5, 7), output_tokens=(1, 2))
    w = workload(TraceLoad(arrival_s=(10.0, 10.5, 12.0)), lengths=trace)
    found = draw(w, 0, prefix_caching=False)
    assert found.arrival_s is not None
    assert found.arrival_s.tolist() == [0.0, 0.5, 2.0]
    assert found.prompt_tokens.tolist() == [5, 7, 5]  # lengths repeat when they end
    assert mean_lengths(trace) == (6.0, 1.5)


@given(st.integers(0, 200), st.floats(0, 1), st.sampled_from([1, 16, 32]))
def test_hits_are_whole_blocks_and_leave_a_token_to_compute(shared: int, hit: float, block: int) -> None:
    w = workload(
        ClosedLoad(concurrency=4, n_requests=10),
        prefix=PrefixSharing(shared_prefix_tokens=shared, conversation_hit_frac=hit),
    )
    found = draw(w, 0, prefix_caching=True, block_tokens=block)
    assert (found.cached_tokens % block == 0).all()
    assert (found.cached_tokens < found.prompt_tokens).all()
    assert found.cached_tokens[0] == 0  # the first request fills the cache
    warm = w.model_copy(update={"prefix": w.prefix.model_copy(update={"is_warm": True})})
    hits = draw(warm, 0, prefix_caching=True, block_tokens=block).cached_tokens
    assert (hits[1:] == found.cached_tokens[1:]).all()
    assert hits[0] >= found.cached_tokens[0]  # a warm cache serves it, too
    assert not draw(w, 0, prefix_caching=False, block_tokens=block).cached_tokens.any()


def test_a_full_hit_by_hand() -> None:
    w = workload(ClosedLoad(concurrency=1, n_requests=2), prefix=PrefixSharing(shared_prefix_tokens=100))
    # 100 tokens hit 6 blocks of 16; a prompt of 100 must compute at least its last token
    assert draw(w, 0, prefix_caching=True, block_tokens=16).cached_tokens.tolist() == [0, 96]


def test_closed_loops_have_clients_and_no_times() -> None:
    found = draw(workload(ClosedLoad(concurrency=7)), 0, prefix_caching=False)
    assert found.arrival_s is None
    assert found.concurrency == 7
    assert len(found.prompt_tokens) == 64


def test_too_many_requests_are_refused() -> None:
    with pytest.raises(DomainError, match="shorten duration_s"):
        arrival_times(PoissonLoad(arrivals_per_s=1e6, duration_s=1e6), np.random.default_rng(0))
