"""A few replicas stand for many: the same load on each, so that a fleet costs no more to simulate than a node."""

from __future__ import annotations

from typing import Any

from advisor.schema import Breakdown, ClosedLoad, Deployment, Interval, Prediction, TraceLoad, Workload

MAX_REPLICAS = 4
"""Replicas that are simulated: the router still has a choice, and each replica sees enough requests."""
PER_FLEET = ("requests_per_s", "tokens_per_s")


def sampled(deployment: Deployment, workload: Workload) -> tuple[Deployment, Workload, float]:
    """Return the deployment with few replicas, its share of the load, and the factor back to the whole."""
    load = workload.load
    scale = deployment.dp / MAX_REPLICAS
    if scale <= 1 or isinstance(load, TraceLoad):
        return deployment, workload, 1.0
    share: dict[str, Any]
    if isinstance(load, ClosedLoad):
        if load.concurrency < deployment.dp or load.n_requests is not None:
            return deployment, workload, 1.0
        share = {"concurrency": max(MAX_REPLICAS, round(load.concurrency / scale))}
    else:
        if load.n_requests is not None:
            return deployment, workload, 1.0
        share = {"arrivals_per_s": load.arrivals_per_s / scale}
    few = deployment.model_copy(update={"dp": MAX_REPLICAS})
    return few, workload.model_copy(update={"load": load.model_copy(update=share)}), scale


def scaled(prediction: Prediction, scale: float) -> Prediction:
    """Return the prediction of `scale` times as many replicas under as many times the load: rates and power grow."""
    if scale == 1.0:
        return prediction

    def times(q: Interval) -> Interval:
        return Interval(value=q.value * scale, low=q.low * scale, high=q.high * scale)

    grown = {
        name: times(q)
        for name, q in prediction.quantities.items()
        if name.endswith(PER_FLEET) or name in ("board_power_w", "n_preemptions")
    }
    breakdowns = tuple(_grown(b, scale) if b.unit == "W" else b for b in prediction.breakdowns)
    return prediction.model_copy(update={"quantities": prediction.quantities | grown, "breakdowns": breakdowns})


def _grown(breakdown: Breakdown, scale: float) -> Breakdown:
    parts = tuple(p.model_copy(update={"value": p.value * scale}) for p in breakdown.parts)
    return breakdown.model_copy(update={"total": breakdown.total * scale, "parts": parts})
