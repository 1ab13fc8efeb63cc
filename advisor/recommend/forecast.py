"""One deployment of a pool under some traffic, predicted once for all targets, prices and objectives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from advisor.predict.serving import Forecast, forecast_vllm
from advisor.recommend.aside import side_by_side
from advisor.recommend.ask import Pool, Question
from advisor.recommend.plan import Option, with_offered_rates
from advisor.recommend.sample import sampled, scaled
from advisor.schema import Deployment, Workload

MAX_KEPT_REQUESTS = 5000
"""Requests of the longest replay that is kept: some 0.5 MB; the search's own have up to 4000."""


@dataclass(frozen=True)
class _Asked:
    """One prediction: the name under which it is kept, how it is made, and what to multiply its fleet by."""

    key: Hashable
    make: Callable[[], Forecast]
    scale: float


def _asked(
    question: Question,
    pool: Pool,
    deployment: Deployment,
    workload: Workload,
    method: str,
    steady: Mapping[str, float] | None,
) -> _Asked:
    assert question.vllm is not None
    few, load, scale = sampled(deployment, workload) if method == "simulated" else (deployment, workload, 1.0)
    make = partial(
        forecast_vllm,
        question.model,
        pool.cluster,
        few,
        load,
        question.vllm,
        method=method,
        seed=question.request.seed,
        facts=question.facts,
        power=question.power,
        steady=steady if few is deployment else None,
    )
    return _Asked(("forecast", pool.name, few, load, method), make, scale)


Wanted = tuple[Pool, Deployment, Mapping[str, float]]


def replays(
    question: Question, wanted: Sequence[Wanted], meanwhile: Callable[[], object] | None = None
) -> list[Forecast | None]:
    """Return the replays of several deployments (with the closed form of each) that can be made side by side.

    `meanwhile` is what this process does first (`side_by_side`).

    One that is kept, that cannot, or that does not run, is None: `forecast` finds or makes it.
    """
    asked = [_asked(question, pool, d, question.workload, "simulated", steady) for pool, d, steady in wanted]
    missing = [place for place, one in enumerate(asked) if one.key not in question.kept]
    # each replica has requests of its own, each stage steps: the longest replays begin first
    missing.sort(key=lambda place: -wanted[place][1].dp * wanted[place][1].pp)
    made = side_by_side([asked[place].make for place in missing], meanwhile)
    found = {missing[k]: forecast for k, forecast in made.items()}
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
    asked = _asked(question, pool, deployment, workload, method, steady)
    found = question.kept.get(
        asked.key,
        lambda: made if made is not None else asked.make(),
        lambda result: result.counted is None or len(result.counted.ttft_s) <= MAX_KEPT_REQUESTS,
    )
    prediction = scaled(found.against(question.slo), asked.scale)
    return Option(pool, deployment, with_offered_rates(replace(question, workload=workload), prediction))
