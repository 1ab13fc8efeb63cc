"""Scores, service-level objectives and the Pareto front, over arrays of deployments or single predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.predict.capacity import MAX_LOAD_FRAC
from advisor.schema import Objective, Prediction, Request, Slo, Target
from advisor.units import HOUR_S, MILLION

Floats = NDArray[np.float64]
Real = Any  # a number or an array; numpy's stubs cannot say "the same as the argument"
SCORE_BINS = 200.0
"""Scores within 0.5 % (1/200 in the logarithm) count as equal; then the faster plan wins."""
NO_LATENCY = 1e30
"""Stands for the latency of a saturated plan, which is no number, where plans are sorted."""
SATURATED = 1e9
"""Badness of a plan at the edge of saturation: above that of any plan that serves the load somehow."""
_PROXIES = {
    "mean": ("p50",),
    "p90": ("p50", "p99"),
    "p95": ("p50", "p99"),
    "p99": ("p99", "p50"),
    "p50": ("p50",),
}
NORMAL_90, NORMAL_95, NORMAL_99 = 1.2816, 1.6449, 2.3263


def usd_per_h(n_gpus: Real, board_power_w: Real, rent: float, request: Request) -> Real:
    """Return what a plan costs an hour [USD/h]: rent of its GPUs plus, where you pay it, their electricity."""
    return n_gpus * rent + board_power_w / 1000 * request.pue * request.electricity_usd_per_kwh


def usd_per_million_tokens(usd_an_hour: Real, output_tokens_per_s: Real) -> Real:
    """Return what a million output tokens cost [USD]."""
    return usd_an_hour / HOUR_S / np.maximum(output_tokens_per_s, 1e-12) * MILLION


def score(objective: Objective, values: Mapping[str, Real], usd_an_hour: Real, *, is_open: bool) -> Real:
    """Return what the objective minimises.

    cost: USD per million output tokens; latency: median end-to-end time [s]; energy: J per output token; throughput:
    minus the largest rate (open loop) or minus the token rate (closed loop).
    """
    tokens = np.maximum(values["output_tokens_per_s"], 1e-12)
    if objective == "cost":
        return usd_per_million_tokens(usd_an_hour, tokens)
    if objective == "latency":
        return values.get("e2e_p50_s", NO_LATENCY)
    if objective == "energy":
        return values["board_power_w"] / tokens
    if is_open and "saturation_requests_per_s" in values:
        return -values["saturation_requests_per_s"]
    return -(values["requests_per_s"] if is_open else tokens)


def target_value(values: Mapping[str, Real], target: Target) -> Real:
    """Return the predicted statistic of a target, from its closest closed-form stand-in where it is not there.

    Between median and 99th percentile the stand-in is a lognormal through both. The simulation has every statistic;
    the closed form has few, and only chooses what is simulated.
    """
    exact = values.get(f"{target.metric}_{target.statistic}_s")
    if exact is not None:
        return exact
    metric = {"itl": "tpot", "e2e": "e2e"}.get(target.metric, target.metric)
    known = {s: values[f"{metric}_{s}_s"] for s in ("p50", "p99") if f"{metric}_{s}_s" in values}
    if len(known) == 2 and target.statistic in ("p90", "p95"):
        share = (NORMAL_90 if target.statistic == "p90" else NORMAL_95) / NORMAL_99
        middle: Real = known["p50"] * (np.maximum(known["p99"], known["p50"]) / known["p50"]) ** share
        return middle
    for statistic in _PROXIES[target.statistic]:
        if statistic in known:
            return known[statistic]
    return NO_LATENCY


def badness(values: Mapping[str, Real], slo: Slo, is_saturated: Real, offered_per_s: float | None) -> Real:
    """Return by which factor a plan misses its worst target, at most 1 when it meets all.

    An open load must also leave headroom: its share of saturation over `MAX_LOAD_FRAC` counts like a target.

    The latency of a saturated plan is no number (it grows with the time of watching): how far it misses is the offered
    over the served rate, after all plans that serve the load.
    """
    worst: Real = np.zeros_like(np.asarray(values["requests_per_s"], dtype=float))
    for target in slo.targets:
        worst = np.maximum(worst, target_value(values, target) / target.max_s)
    if offered_per_s is not None:
        capacity = np.maximum(values.get("saturation_requests_per_s", values["requests_per_s"]), 1e-12)
        worst = np.maximum(worst, offered_per_s / capacity / MAX_LOAD_FRAC)
        over = SATURATED * np.maximum(offered_per_s / capacity, 1.0)
        worst = np.where(is_saturated, over, worst)
    return worst


def score_bin(score_of: Real) -> Real:
    """Return the bin of a score; scores in one bin count as equal."""
    return np.round(np.sign(score_of) * np.log(np.maximum(np.abs(score_of), 1e-300)) * SCORE_BINS)


def order(
    score_of: Floats, badness_of: Floats, latency_s: Floats, n_gpus: Floats, tier: Floats | None = None
) -> NDArray[np.intp]:
    """Return indices from best to worst: plans that meet the targets by score, then the others by how far they miss.

    Of those that miss, the ones that at least serve the load come first. Of each of these three kinds, a higher tier
    (less certain, unmaintained) comes later. Equal scores (within 0.5 %) go to the lower latency, then to fewer GPUs.
    """
    tier = np.zeros(len(score_of)) if tier is None else tier
    misses = badness_of > 1
    bins = score_bin(score_of)
    first = np.where(misses, np.round(np.log(np.maximum(badness_of, 1e-300)) * SCORE_BINS), 0.0)
    kind = misses.astype(float) + (badness_of >= SATURATED)
    return np.lexsort((n_gpus, latency_s, bins, first, tier, kind))


def pareto(points: Floats) -> NDArray[np.bool_]:
    """Return which rows no other row beats: lower is better in every column, equal rows both stay."""
    keep = np.ones(len(points), dtype=bool)
    for i, point in enumerate(points):
        better = np.all(points <= point, axis=1) & np.any(points < point, axis=1)
        keep[i] = not better.any()
    return keep


def values_of(prediction: Prediction) -> dict[str, float]:
    """Return the central values of a prediction by name."""
    return {name: interval.value for name, interval in prediction.quantities.items()}


def missed(values: Mapping[str, float], slo: Slo) -> list[Target]:
    """Return the targets that a prediction misses."""
    return [t for t in slo.targets if float(target_value(values, t)) > t.max_s]


def first_of_each(keys: Sequence[object], ranked: Sequence[int]) -> list[int]:
    """Return the best index of each key, best first."""
    seen: set[object] = set()
    found = []
    for i in ranked:
        if keys[i] not in seen:
            seen.add(keys[i])
            found.append(i)
    return found
