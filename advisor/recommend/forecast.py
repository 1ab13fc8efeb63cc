"""One deployment of a pool under some traffic, predicted once for all targets, prices and objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from advisor.predict.serving import Forecast, forecast_vllm
from advisor.recommend.aside import side_by_side
from advisor.recommend.ask import Pool, Question
from advisor.recommend.plan import Option, with_offered_rates
from advisor.recommend.sample import sampled, scaled
from advisor.schema import Deployment, Workload

MAX_KEPT_REQUESTS = 5000
"""Requests of the longest replay that is kept: some 0.5 MB; the search's own have up to 4000."""


def _make(
    question: Question,
    pool: Pool,
    deployment: Deployment,
    workload: Workload,
    method: str = "simulated",
    steady: Mapping[str, float] | None = None,
) -> Forecast:
    assert question.vllm is not None
    return forecast_vllm(
        question.model,
        pool.cluster,
        deployment,
        workload,
        question.vllm,
        method=method,
        seed=question.request.seed,
        facts=question.facts,
        power=question.power,
        steady=steady,
    )


Wanted = tuple[Pool, Deployment, Mapping[str, float]]


def replays(question: Question, wanted: Sequence[Wanted]) -> list[Forecast | None]:
    """Return the replays of several deployments (with the closed form of each) that can be made side by side.

    One that cannot, or that does not run, is None: `forecast` makes it.
    """
    jobs = {}
    for place, (pool, deployment, steady) in enumerate(wanted):
        few, load, _ = sampled(deployment, question.workload)
        if ("forecast", pool.name, few, load, "simulated") not in question.kept:
            given = steady if few is deployment else None
            jobs[place] = partial(_make, question, pool, few, load, steady=given)
    made = side_by_side([*jobs.values()])
    found = {place: made[k] for k, place in enumerate(jobs) if k in made}
    return [found.get(place) for place in range(len(wanted))]


def forecast(
    question: Question,
    pool: Pool,
    deployment: Deployment,
    workload: Workload,
    *,
    method: str = "simulated",
    steady: Mapping[str, float] | None = None,
    made: Forecast | None = None,
) -> Option:
    """Return a vLLM deployment with its prediction; a large fleet is simulated by a few of its replicas.

    steady : the closed form of just this, from a caller that has it
    made   : its replay, from a caller that has it (`replays`)
    Raises AdvisorError when the deployment does not run.
    """
    few, load, scale = sampled(deployment, workload) if method == "simulated" else (deployment, workload, 1.0)
    given = steady if few is deployment else None
    found = question.kept.get(
        ("forecast", pool.name, few, load, method),
        lambda: made if made is not None else _make(question, pool, few, load, method, given),
        lambda result: result.counted is None or len(result.counted.ttft_s) <= MAX_KEPT_REQUESTS,
    )
    prediction = scaled(found.against(question.slo), scale)
    return Option(pool, deployment, with_offered_rates(replace(question, workload=workload), prediction))
