"""What a replay's latencies do not know because they are one draw of their workload."""

from __future__ import annotations

import numpy as np

from advisor.laws.sampling import mean_se_log, quantile_se_log, strata
from advisor.predict.simulate import STATISTICS, Simulation
from advisor.schema import GammaLoad, LognormalLengths, PoissonLoad, TraceLoad, Workload


def draw_errors(sim: Simulation, workload: Workload) -> dict[str, float]:
    """Return the standard error (natural log) that each latency has because a replay is one draw of its workload.

    Nothing is drawn in a recorded trace, nor in constant arrivals or a closed loop of fixed lengths.
    """
    load = workload.load
    is_drawn = isinstance(load, PoissonLoad | GammaLoad) or isinstance(workload.lengths, LognormalLengths)
    if isinstance(load, TraceLoad) or not is_drawn:
        return {}
    order = np.argsort(sim.submitted_s, kind="stable")
    # a replay's lengths are even: what they explain is not left to chance
    is_even = isinstance(workload.lengths, LognormalLengths)
    errors = {}
    for metric, values, even in (
        ("ttft", sim.ttft_s, sim.prompt_tokens),
        ("tpot", sim.tpot_s, sim.output_tokens),
        ("e2e", sim.e2e_s, sim.output_tokens),
    ):
        kept = order[np.isfinite(values[order])]
        x, by = values[kept], strata(even[kept]) if is_even else None
        for statistic in STATISTICS:
            p = float(statistic[1:]) / 100 if statistic != "mean" else None
            errors[f"{metric}_{statistic}"] = mean_se_log(x, by) if p is None else quantile_se_log(x, p, by)
    # the gaps between tokens are those that TPOT averages
    return errors | {f"itl_{statistic}": errors[f"tpot_{statistic}"] for statistic in STATISTICS}
