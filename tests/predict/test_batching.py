"""Static batches and the replayed sample: invariants, and hand-computed queues."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.predict.batching import Served, sample_arrivals, serve_static
from advisor.predict.traffic import draw_lengths
from advisor.schema import ClosedLoad, FixedLengths, GammaLoad, LognormalLengths, PoissonLoad, TraceLoad, Workload


def static(prompts: list[int], outputs: list[int], *, batch: int, clients: int = 0, arrivals: object = None) -> Served:
    return serve_static(
        np.array(prompts),
        np.array(outputs),
        arrivals=None if arrivals is None else np.asarray(arrivals, dtype=float),
        clients=clients,
        batch=batch,
        prefill_s=lambda n, p: 1.0,
        decode_s=lambda n, c: 0.1,
    )


def test_a_batch_ends_with_its_longest_answer() -> None:
    served = static([10, 10], [3, 11], batch=2, clients=2)
    assert served.duration_s == pytest.approx(1.0 + 0.1 * 10)
    assert list(served.e2e_s) == pytest.approx([2.0, 2.0])
    assert list(served.ttft_s) == pytest.approx([1.0, 1.0])


def test_who_arrives_during_a_batch_waits_for_its_end() -> None:
    # first at 0 alone until 2.0; the next two (0.5, 1.5) go together then
    served = static([1] * 3, [11] * 3, batch=8, arrivals=[0.0, 0.5, 1.5])
    assert list(served.ttft_s) == pytest.approx([1.0, 2.5, 1.5])
    assert served.duration_s == pytest.approx(4.0)


@given(
    outputs=st.lists(st.integers(1, 50), min_size=10, max_size=60),
    batch=st.integers(1, 16),
    clients=st.integers(1, 40),
)
def test_every_request_is_served_once_and_the_clock_is_the_sum_of_batches(
    outputs: list[int], batch: int, clients: int
) -> None:
    served = static([4] * len(outputs), outputs, batch=batch, clients=clients)
    assert served.n_requests == len(outputs)
    assert served.n_output_tokens == sum(outputs)
    assert served.busy_frac == pytest.approx(1.0)
    assert (served.e2e_s >= served.ttft_s - 1e-9).all()


@pytest.mark.parametrize(
    "load",
    [
        PoissonLoad(arrivals_per_s=5.0),
        GammaLoad(arrivals_per_s=5.0, cv=2.0),
        TraceLoad(arrival_s=tuple(float(i) / 5 for i in range(50))),
    ],
)
def test_samples_have_the_asked_rate_and_replicas_share_it(load: object) -> None:
    workload = Workload(lengths=FixedLengths(prompt_tokens=1, output_tokens=1), load=load)
    for share in (1.0, 0.5):
        times = sample_arrivals(workload, 3000, share, np.random.default_rng(0))
        assert len(times) / times[-1] == pytest.approx(5.0 * share, rel=0.12)
        assert (np.diff(times) >= 0).all()


def test_lognormal_samples_keep_the_mean() -> None:
    lengths = LognormalLengths(prompt_tokens_mean=500, output_tokens_mean=100, sigma=0.8)
    workload = Workload(lengths=lengths, load=ClosedLoad(concurrency=1))
    prompts, outputs = draw_lengths(workload.lengths, 40_000, np.random.default_rng(0))
    assert prompts.mean() == pytest.approx(500, rel=0.03)
    assert outputs.mean() == pytest.approx(100, rel=0.03)
