"""One deployment of a pool under some traffic, predicted once for all targets, prices and objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from advisor.predict.serving import forecast_vllm
from advisor.recommend.ask import Pool, Question
from advisor.recommend.plan import Option, with_offered_rates
from advisor.recommend.sample import sampled, scaled
from advisor.schema import Deployment, Workload

MAX_KEPT_REQUESTS = 5000
"""Requests of the longest replay that is kept: some 0.5 MB; the search's own have up to 4000."""


def forecast(
    question: Question,
    pool: Pool,
    deployment: Deployment,
    workload: Workload,
    *,
    method: str = "simulated",
    steady: Mapping[str, float] | None = None,
) -> Option:
    """Return a vLLM deployment with its prediction; a large fleet is simulated by a few of its replicas.

    steady : the closed form of just this, from a caller that has it
    Raises AdvisorError when the deployment does not run.
    """
    vllm, power, facts, seed = question.vllm, question.power, question.facts, question.request.seed
    assert vllm is not None
    few, load, scale = sampled(deployment, workload) if method == "simulated" else (deployment, workload, 1.0)
    given = steady if few is deployment else None
    found = question.kept.get(
        ("forecast", pool.name, few, load, method),
        lambda: forecast_vllm(
            question.model,
            pool.cluster,
            few,
            load,
            vllm,
            method=method,
            seed=seed,
            facts=facts,
            power=power,
            steady=given,
        ),
        lambda made: made.counted is None or len(made.counted.ttft_s) <= MAX_KEPT_REQUESTS,
    )
    prediction = scaled(found.against(question.slo), scale)
    return Option(pool, deployment, with_offered_rates(replace(question, workload=workload), prediction))
