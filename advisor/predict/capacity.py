"""How much load a deployment carries within its latency targets."""

from __future__ import annotations

import math

from advisor.errors import DomainError
from advisor.predict.breakdown import queue_grows
from advisor.predict.serving import MAX_E2E_S, counted, replay
from advisor.predict.simulate import Simulation
from advisor.predict.steady import sweep
from advisor.schema import Cluster, CoefficientSet, Deployment, EngineFacts, Model, PoissonLoad, Slo, Workload

MAX_LOAD_FRAC = 0.9
"""Load over saturation up to which a plan counts as good: beyond it waiting grows without measure, which some hundred
simulated requests do not show (M/M/1: ten service times at 0.9; Kleinrock 1975, Queueing Systems 1, section 3.2). At
0.97 of saturation a replay of 1200 requests had a TTFT P99 of 0.7 s, one of 20,000 had 6 s."""


def steady_replay(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    rate_per_s: float,
    *,
    facts: EngineFacts | None = None,
    seed: int = 0,
) -> Simulation | None:
    """Return the requests that count of a replay at a Poisson rate; None when the load has no steady state."""
    loaded = workload.model_copy(update={"load": PoissonLoad(arrivals_per_s=rate_per_s)})
    e2e_s = float(sweep(model, cluster.gpu, [deployment], loaded, coefficients, facts)["e2e_p50_s"][0])
    e2e_s = min(e2e_s, MAX_E2E_S) if math.isfinite(e2e_s) else 0.0
    try:
        run = replay(model, cluster, deployment, loaded, coefficients, seed=seed, facts=facts, e2e_s=e2e_s)
    except DomainError:
        return None
    if queue_grows(run.simulation):
        return None
    return counted(run.simulation, run.workload, e2e_s, False)[0]


def max_rate(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    slo: Slo,
    *,
    facts: EngineFacts | None = None,
    tolerance: float = 0.02,
    seed: int = 0,
) -> float:
    """Return the largest Poisson rate at which every target of `slo` holds [requests/s]; 0 when none does.

    Bisection between nothing and `MAX_LOAD_FRAC` of saturation with steady-state replays; the same seed at every rate
    keeps it monotone.
    """
    probe = workload.model_copy(update={"load": PoissonLoad(arrivals_per_s=1.0)})
    most = float(sweep(model, cluster.gpu, [deployment], probe, coefficients, facts)["saturation_requests_per_s"][0])

    def holds(rate: float) -> bool:
        sim = steady_replay(model, cluster, deployment, workload, coefficients, rate, facts=facts, seed=seed)
        return sim is not None and all(not sim.latency(t.metric, t.statistic) > t.max_s for t in slo.targets)

    low, high = most * tolerance, MAX_LOAD_FRAC * most
    if holds(high):
        return high
    if not holds(low):
        return 0.0
    while high - low > tolerance * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
