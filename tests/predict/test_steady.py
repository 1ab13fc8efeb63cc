"""The closed form of a sweep: one deployment or many give the same, bounds hold, and the replay agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.predict.serving import predict_vllm, replay
from advisor.predict.steady import sweep
from advisor.schema import ClosedLoad, Cluster, Deployment, EngineFacts, FixedLengths, PoissonLoad, Workload

CATALOG = load_catalog()
SET = CATALOG.coefficients("vllm")
GPU = CATALOG.gpu("h100-sxm-80gb")
MODEL = CATALOG.model("llama-3.1-8b")[0]
FACTS = EngineFacts.from_table(CATALOG.engine("vllm"), "0.26.0")
LENGTHS = FixedLengths(prompt_tokens=512, output_tokens=128)


def plan(**changes: Any) -> Deployment:
    return Deployment(model="llama-3.1-8b", gpu=GPU.name, **changes)


def swept(plans: list[Deployment], load: Any, lengths: Any = LENGTHS) -> dict[str, np.ndarray]:
    return sweep(MODEL, GPU, plans, Workload(lengths=lengths, load=load), SET, FACTS)


PLANS = [
    plan(tp=tp, pp=pp, dp=dp, max_num_seqs=seqs, max_num_batched_tokens=budget, weight_dtype=dtype)
    for tp in (1, 2, 4)
    for pp in (1, 2)
    for dp in (1, 3)
    for seqs in (16, 256)
    for budget in (2048, 8192)
    for dtype in ("bf16", "fp8")
]


@settings(max_examples=10)
@given(
    st.one_of(
        st.floats(0.1, 200).map(lambda r: PoissonLoad(arrivals_per_s=r)),
        st.integers(1, 500).map(lambda c: ClosedLoad(concurrency=c)),
    )
)
def test_a_sweep_is_its_plans_one_by_one(load: Any) -> None:
    together = swept(PLANS, load)
    for i in range(0, len(PLANS), 17):
        alone = swept([PLANS[i]], load)
        for name, values in together.items():
            assert values[i] == pytest.approx(alone[name][0], rel=1e-9), name


@given(st.floats(0.05, 300))
@settings(max_examples=25)
def test_bounds_of_an_open_load(rate: float) -> None:
    found = swept(PLANS, PoissonLoad(arrivals_per_s=rate))
    assert (found["requests_per_s"] <= rate * (1 + 1e-9)).all()
    assert (found["requests_per_s"] <= found["saturation_requests_per_s"] * (1 + 1e-9)).all()
    assert ((found["is_saturated"] > 0) == (rate >= found["saturation_requests_per_s"])).all()
    assert (found["ttft_p99_s"] >= found["ttft_p50_s"]).all()
    assert np.isinf(found["ttft_p50_s"][found["is_saturated"] > 0]).all()
    assert ((found["mbu_frac"] >= 0) & (found["mbu_frac"] <= 1)).all()
    np.testing.assert_allclose(found["output_tokens_per_s"], found["requests_per_s"] * 128)
    # Little's law on one replica: what runs is what arrives times how long it decodes
    calm = found["is_saturated"] == 0
    held = found["requests_per_s"] * 128 * found["tpot_p50_s"]
    # step time jumps by tiles of 64 rows, so a load can fall between two numbers of running sequences
    np.testing.assert_allclose(found["n_running"][calm], held[calm], rtol=5e-3)


@given(st.floats(0.1, 20), st.floats(1.01, 2))
@settings(max_examples=25)
def test_more_load_never_shortens_a_step(rate: float, more: float) -> None:
    here, there = (swept(PLANS[:8], PoissonLoad(arrivals_per_s=r)) for r in (rate, rate * more))
    assert (there["tpot_p50_s"] >= here["tpot_p50_s"] * (1 - 1e-6)).all()
    assert (there["ttft_p99_s"] >= here["ttft_p99_s"] * (1 - 1e-6)).all()


def test_replicas_multiply_the_saturation() -> None:
    one, three = swept([plan(), plan(dp=3)], PoissonLoad(arrivals_per_s=3))["saturation_requests_per_s"]
    assert three == pytest.approx(3 * one)


def test_a_closed_load_runs_at_most_its_clients() -> None:
    for concurrency in (1, 7, 400):
        found = swept(PLANS, ClosedLoad(concurrency=concurrency))
        assert (found["n_running"] <= concurrency * (1 + 1e-6)).all()
        assert not found["is_saturated"].any()


@pytest.mark.parametrize(
    ("load", "tpot", "rate"),
    [
        (ClosedLoad(concurrency=1), 0.05, 0.1),
        # the replay's median client is spared most prompts of its group, the closed form's mean is not; nor does the
        # closed form put several prompts of a crowd into one step. Clients who ended together begin together: a crowd's
        # prompts are nearly all computed before its decodes.
        (ClosedLoad(concurrency=16), 0.4, 0.15),
        (ClosedLoad(concurrency=256), 0.6, 0.3),
        (PoissonLoad(arrivals_per_s=5), 0.1, 0.03),
        (PoissonLoad(arrivals_per_s=15), 0.25, 0.03),
    ],
)
def test_the_closed_form_is_near_enough_to_the_replay_to_rank(load: Any, tpot: float, rate: float) -> None:
    workload = Workload(lengths=LENGTHS, load=load)
    replayed = predict_vllm(MODEL, Cluster(gpu=GPU, gpus_per_node=8), plan(), workload, SET, facts=FACTS)
    found = swept([plan()], load)
    assert found["tpot_p50_s"][0] == pytest.approx(replayed["tpot_p50_s"], rel=tpot)
    assert found["requests_per_s"][0] == pytest.approx(replayed["requests_per_s"], rel=rate)


def test_more_sequences_than_any_graph_holds_do_not_lower_what_an_open_load_gets() -> None:
    """Decode steps of over 512 sequences are launched kernel by kernel; without a flood no engine gets there."""
    plans = [plan(tp=8, max_num_seqs=n, max_num_batched_tokens=2048) for n in (256, 512, 1024)]
    most = swept(plans, PoissonLoad(arrivals_per_s=1))["saturation_requests_per_s"]
    assert most[0] <= most[1] * 1.001
    assert most[1] <= most[2] * 1.001


@pytest.mark.parametrize("output", [32, 128, 512])
def test_saturation_is_what_a_flooded_replay_serves(output: int) -> None:
    lengths = FixedLengths(prompt_tokens=256, output_tokens=output)
    workload = Workload(lengths=lengths, load=PoissonLoad(arrivals_per_s=2000, n_requests=2500))
    served = replay(MODEL, Cluster(gpu=GPU, gpus_per_node=8), plan(), workload, SET, facts=FACTS).simulation
    closed_form = swept([plan()], PoissonLoad(arrivals_per_s=1), lengths)["saturation_requests_per_s"][0]
    assert closed_form == pytest.approx(served.requests_per_s, rel=0.3)
