"""Backends side by side where they differ too much for one load: each at the same share of what it can serve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.recommend.ask import ask
from advisor.recommend.duel import Duel, duel
from advisor.recommend.one import predict_one
from advisor.schema import Plan, Prediction, Request

OWN_SHARE = 0.8
"""Share of its own limit at which each backend's latency is shown: busy, but no queue without end."""
OVERLOAD = 30.0
"""Times its load that surely saturates a plan which serves it."""
MOST_RATE = 1e7


@dataclass(frozen=True)
class OwnLimit:
    """The most requests/s that a plan can serve, and what it does at `OWN_SHARE` of them."""

    requests_per_s: float
    prediction: Prediction


def duels(plans: Sequence[Plan]) -> Iterator[tuple[Plan, Plan, Duel]]:
    """Yield every two plans of an open or closed load against each other, vLLM or the better ranked one first."""
    order = sorted(plans, key=lambda p: (p.backend != "vllm", p.rank))
    for one, other in combinations(order, 2):
        yield one, other, duel(one.prediction, other.prediction)


def duels_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return the same for a JSON answer; `winner` is null where the intervals leave none."""
    return [
        {
            "first": one.backend,
            "second": other.backend,
            "quantity": found.name,
            "times": found.times.model_dump(mode="json"),
            "winner": None if found.is_tie else one.backend if found.times.low > 1 else other.backend,
        }
        for one, other, found in duels(plans)
    ]


def _predicted(request: Request, plan: Plan, rate: float, catalog: Catalog) -> Prediction | None:
    """Return what the plan's deployment does at a rate, None where it cannot be told."""
    own = request.model_copy(update={"rate": min(rate, MOST_RATE), "concurrency": None})
    question = ask(own, catalog)
    pools = tuple(p for p in question.pools if p.cluster.gpu.name == plan.deployment.gpu)
    try:
        return predict_one(replace(question, pools=pools[:1]), plan.deployment).prediction
    except DomainError:
        return None


def _limit(request: Request, plan: Plan, catalog: Catalog) -> float | None:
    """Return the rate that saturates a plan: its own, else what it serves of a far larger one."""
    found: Prediction | None = plan.prediction
    if found is not None and "saturation_requests_per_s" in found.quantities:
        return found["saturation_requests_per_s"]
    if found is not None and not found.is_saturated:
        found = _predicted(request, plan, OVERLOAD * found["requests_per_s"], catalog)
    return found["requests_per_s"] if found is not None and found.is_saturated else None


def at_own_limit(request: Request, plans: Iterable[Plan]) -> dict[str, OwnLimit]:
    """Return each backend's limit and its prediction at `OWN_SHARE` of it, by backend.

    An open load that overloads one of two plans says nothing of the overloaded one's latency: it grows with the time of
    watching. A plan whose limit is not found is left out.
    """
    catalog, found = load_catalog(), {}
    for plan in plans:
        limit = _limit(request, plan, catalog)
        prediction = _predicted(request, plan, OWN_SHARE * limit, catalog) if limit else None
        if limit and prediction is not None:
            found[plan.backend] = OwnLimit(limit, prediction)
    return found
