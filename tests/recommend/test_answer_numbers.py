"""Numbers of one answer against each other, as a sceptical reader recomputes them from what is shown."""

from __future__ import annotations

import re
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.recommend.answer import recommend
from advisor.recommend.ask import ask
from advisor.recommend.explain import workload_text
from advisor.schema import Plan, Recommendation, Request

CASES: dict[str, dict[str, Any]] = {
    "chat": {"model": "70b", "gpus": "8xA100", "electricity_usd_per_kwh": 0.2, "pue": 1.3, "grid_kgco2e_per_kwh": 0.4},
    "rag": {"model": "8b", "gpus": "2xH100", "workload": "rag", "rate": 3.0},
    "experts": {"model": "mixtral", "gpus": "4xH100", "rate": 4.0},
    "closed": {"model": "8b", "gpus": "1xL40S", "concurrency": 16, "prompt_tokens": 512, "output_tokens": 128},
}


@pytest.fixture(scope="module", params=CASES)
def answer(request: pytest.FixtureRequest) -> Recommendation:
    return recommend(Request(**CASES[request.param]))


def vllm_plans(answer: Recommendation) -> list[Plan]:
    return [p for p in answer.plans if p.backend == "vllm" and p.prediction.method == "simulated"]


def test_a_breakdown_s_whole_is_the_number_shown(answer: Recommendation) -> None:
    for plan in vllm_plans(answer):
        p = plan.prediction
        whole = {b.name: b.total for b in p.breakdowns}
        free = sum(x.value for b in p.breakdowns if b.name == "memory per GPU" for x in b.parts if x.name == "free")
        assert whole["memory per GPU"] - free == pytest.approx(p["memory_bytes_per_gpu"])
        assert whole["time per output token"] == pytest.approx(p["tpot_mean_s"])
        assert whole["time to first token"] == pytest.approx(p["ttft_mean_s"])
        assert whole["board power"] == pytest.approx(p["board_power_w"])


def test_money_energy_and_carbon_follow_from_the_rates(answer: Recommendation) -> None:
    request = answer.request
    for plan in answer.plans:
        p, q = plan.prediction, plan.prediction.quantities
        tokens_per_s = p["output_tokens_per_s"]
        assert p["usd_per_million_output_tokens"] == pytest.approx(plan.usd_per_h / 3600 / tokens_per_s * 1e6)
        if "board_power_w" in q:
            kw = p["board_power_w"] / 1000
            assert p["energy_j_per_output_token"] == pytest.approx(p["board_power_w"] / tokens_per_s)
            assert p["energy_j_per_request"] == pytest.approx(p["board_power_w"] / p["requests_per_s"])
            grid = request.get("grid_kgco2e_per_kwh")
            if grid:
                assert p["kgco2e_per_h"] == pytest.approx(kw * grid * request["pue"])
        for name, interval in q.items():
            assert interval.low <= interval.value <= interval.high, name


def test_tokens_are_requests_times_the_lengths_that_are_said(answer: Recommendation) -> None:
    question = ask(Request.model_validate(answer.request), load_catalog())
    prompt, output = (
        float(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:prompt|output)", workload_text(question))
    )
    for plan in vllm_plans(answer):
        p = plan.prediction
        assert p["output_tokens_per_s"] == pytest.approx(p["requests_per_s"] * output, rel=0.01)
        assert p["total_tokens_per_s"] == pytest.approx(p["requests_per_s"] * (prompt + output), rel=0.01)


def test_arithmetic_is_that_of_the_tokens_served() -> None:
    """Two operations a weight and token: the drain after the last arrival once diluted them by a quarter."""
    answer = recommend(Request(model="70b", gpus="8xA100"))
    best = answer.best
    assert best is not None
    p = best.prediction
    # Llama 70B: 80 layers of 855.6 M weights; the vocabulary (8192 x 128256) only for sampled tokens
    per_token, head = 2 * 80 * 855.6e6, 2 * 8192 * 128256
    matrices = per_token * p["total_tokens_per_s"] + head * p["output_tokens_per_s"]
    # prefill attention: 4 x 64 heads x 128 x half the mean of squared lengths a token, some per cent on top
    assert 1.0 <= p["mfu_frac"] * 8 * 312e12 / matrices <= 1.08
