"""How much of a prediction hangs on the host's CPU, of which an intended deployment says nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advisor.predict.steady import swept
from advisor.predict.transfer import on_host
from advisor.schema import Deployment, EngineFacts, Gpu, Model, Workload

FASTER = 0.7
"""CPU time of the host that a prediction is compared with, over the typical one's: fourteen hosts lie 20 % to either
side of their mean, and one host's launches have two paces that differ by half."""
FULL_GAIN = 0.1
"""Change by that host at which its spread is as wide as the law's own error. One number for all metrics, tuned on the
left-out errors of 110 starts: their P90 is 1, 1.3, 1.5 and 3 times that of cells below 1 %, for changes of less than
1, 3, 10 % and more."""
HOST_PACED = 0.03
"""A figure that such a host would change by more than this share is said to be paced by the host."""

NAMES = {"ttft_s.p50": "TTFT P50", "ttft_s.p99": "TTFT P99", "tpot_s.p50": "TPOT P50", "requests_per_s": "requests/s"}
COLUMNS = {
    "ttft_s.p50": "ttft_p50_s",
    "ttft_s.p99": "ttft_p99_s",
    "tpot_s.p50": "tpot_p50_s",
    "requests_per_s": "requests_per_s",
}


def host_gains(
    model: Model,
    gpu: Gpu,
    deployment: Deployment,
    workload: Workload,
    values: Mapping[str, float],
    facts: EngineFacts | None = None,
) -> dict[str, float]:
    """Return by how much a host with `FASTER` CPU time would change each figure (natural log, >= 0).

    values : coefficient values for this GPU (see `transfer`)

    From the closed form of the fitted release, so that it costs no replay; an older one, whose GPU waits for each step
    of its host, hangs on it no less. A plan that is overloaded has no latency of its own: its figure is then that of
    its capacity.
    """
    hosts = (values, on_host(values, FASTER))
    mine, faster = (swept(model, gpu, [deployment], workload, v, facts, has_releases=False) for v in hosts)

    def gain(column: str) -> float:
        a, b = float(mine[column][0]), float(faster[column][0])
        return abs(math.log(b / a)) if math.isfinite(a) and math.isfinite(b) else gain("saturation_requests_per_s")

    return {metric: gain(column) for metric, column in COLUMNS.items()}


def host_text(gains: Mapping[str, float]) -> str:
    """Return a sentence on the figures that the host paces, empty where there is none.

    >>> host_text({"ttft_s.p50": 0.1, "tpot_s.p50": 0.001, "requests_per_s": 0.05}).partition(":")[0]
    'a host with a CPU that takes 30 % less time would have TTFT P50 -10 %, requests/s +5 %'
    """
    paced = {metric: gain for metric, gain in gains.items() if gain >= HOST_PACED}
    if not paced:
        return ""
    said = ", ".join(
        f"{NAMES[metric]} {100 * math.expm1(gain if metric == 'requests_per_s' else -gain):+.0f} %"
        for metric, gain in paced.items()
    )
    return (
        f"a host with a CPU that takes {100 * (1 - FASTER):.0f} % less time would have {said}: which host you get is"
        " not known, and the intervals of these figures are wider for it"
    )


def spread_factor(gain: float) -> float:
    """Return how much wider an interval is than where the host does not matter.

    >>> spread_factor(0.0), round(spread_factor(0.1), 3)
    (1.0, 1.414)
    """
    return math.hypot(1.0, gain / FULL_GAIN)
