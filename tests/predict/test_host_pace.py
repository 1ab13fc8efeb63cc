"""What of a prediction hangs on the host's CPU."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.predict.host_pace import FASTER, HOST_PACED, host_gains, host_text, spread_factor
from advisor.predict.serving import predict_vllm
from advisor.predict.transfer import HOST_TIMES, in_process, transferred
from advisor.schema import ClosedLoad, Cluster, Deployment, FixedLengths, Load, PoissonLoad, Workload

CATALOG = load_catalog()
COEFFICIENTS = CATALOG.coefficients("vllm")
CARD = CATALOG.gpu("h100-sxm-80gb")
VALUES = transferred(COEFFICIENTS, CARD)


def gains(
    model: str, load: Load, prompt: int = 1024, values: dict[str, float] = VALUES, **more: object
) -> dict[str, float]:
    deployment = Deployment.model_validate({"backend": "vllm", "model": model, "gpu": CARD.name, **more})
    workload = Workload(lengths=FixedLengths(prompt_tokens=prompt, output_tokens=128), load=load)
    return host_gains(CATALOG.model(model)[0], CARD, deployment, workload, values)


def test_oracle_a_decode_step_that_only_the_host_paces_follows_it() -> None:
    """Without GPU time to speak of a step takes as long as its host: its time falls by all that the host's does."""
    no_gpu = {k: (1e-12 if k in ("layer_s", "step_s", "seq_s", "decode_wave_s") else v) for k, v in VALUES.items()}
    slow = no_gpu | {k: 1e3 * no_gpu[k] for k in HOST_TIMES}
    found = gains("llama-3.2-1b", ClosedLoad(concurrency=4, n_requests=8), values=slow)
    assert found["tpot_s.p50"] == pytest.approx(-math.log(FASTER), rel=0.01)


def test_measured_hosts_differ_where_the_law_says_so() -> None:
    # one 8B decodes within 4 % on all hosts, a 1B's decodes differ (docs/accuracy.md: noise floor)
    one = ClosedLoad(concurrency=1, n_requests=8)
    assert gains("llama-3.1-70b", one, tp=4)["tpot_s.p50"] < 0.005
    assert gains("llama-3.1-8b", one)["tpot_s.p50"] < 0.01
    alone = in_process(VALUES)  # reading the prompt is the host's work too, of an API server
    assert gains("llama-3.1-8b", one, prompt=16384, values=alone)["ttft_s.p50"] < 0.01
    assert gains("llama-3.1-8b", one, prompt=16384)["ttft_s.p50"] > 0.01
    assert gains("llama-3.1-8b", one, prompt=600)["ttft_s.p50"] > 0.1
    assert gains("llama-3.2-1b", ClosedLoad(concurrency=64, n_requests=128))["tpot_s.p50"] > HOST_PACED


@given(st.floats(0, 3), st.floats(0, 3))
def test_invariant_the_spread_grows_with_what_the_host_changes(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 1.0 <= spread_factor(low) <= spread_factor(high)


def test_edge_an_overloaded_plan_hangs_as_its_capacity_does() -> None:
    found = gains("llama-3.1-8b", PoissonLoad(arrivals_per_s=1e4))
    assert all(math.isfinite(g) and g >= 0 for g in found.values())
    assert found["ttft_s.p50"] == found["requests_per_s"]


def test_a_forecast_says_it_and_is_wider_for_it() -> None:
    workload = Workload(lengths=FixedLengths(prompt_tokens=256, output_tokens=64), load=ClosedLoad(concurrency=8))
    widths = {}
    for model in ("llama-3.2-1b", "qwen2.5-32b"):
        cluster = Cluster(gpu=CARD, gpus_per_node=1, n_nodes=1)
        deployment = Deployment(model=model, gpu=CARD.name, max_model_len=4096)
        found = predict_vllm(CATALOG.model(model)[0], cluster, deployment, workload, COEFFICIENTS)
        tpot = found.quantities["tpot_p50_s"]
        widths[model] = math.log(tpot.high / tpot.value)
        assert any("which host you get" in note.text for note in found.notes) == (model == "llama-3.2-1b")
    assert widths["llama-3.2-1b"] > 1.2 * widths["qwen2.5-32b"]
    assert host_text({"tpot_s.p50": 0.0}) == ""
