"""A vLLM deployment under lower power limits: the same traffic replayed on slower boards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from advisor.predict.serving import Run, busy_span_s, replay_replica
from advisor.predict.simulate import Simulation
from advisor.predict.spend import Activity, LimitCurve, activity_of, power_limit_curve
from advisor.predict.step import StepCost
from advisor.schema import ClosedLoad, CoefficientSet, Deployment, Gpu, Workload

PROBE_CLOCK_FRAC = 0.8
"""Clock at which the share of time that follows it is read: in the range that the exponent was fitted on."""


@dataclass(frozen=True)
class LimitedRun:
    """What a board limit leaves of a deployment: clock, speed, mean power of one board, and the stretched replay."""

    limit_w: float
    clock_frac: float
    speed_frac: float
    board_power_w: float
    simulation: Simulation
    """at full speed, with arrivals as much closer as the boards are slower: divide its times by `speed_frac`"""


def clock_bound_frac(stages: Sequence[StepCost], sim: Simulation) -> float:
    """Return the share of the GPU time of a replay that stretches when the clock falls, in [0, 1].

    The mean step with prompts and the mean step without are timed at the nominal clock and with all arithmetic at 0.8
    of it: a matrix product that waits for its weights hides slower arithmetic, so it counts as far as it shows.
    """
    work = sim.total_work
    decode = max(work.sampled - len(sim.ttft_s), 0.0)
    n_decode = decode / max(work.n_steps, 1.0)
    context = work.context_tokens / max(work.n_steps, 1.0)
    mixed = max(work.prefill_steps, 1e-9)
    prompt, pairs, first = (work.tokens - decode) / mixed, work.pairs / mixed, len(sim.ttft_s) / mixed

    def gpu_s(clock: float) -> float:
        total = 0.0
        for stage in stages:
            slow = replace(
                stage,
                gemm_flops_per_s=stage.gemm_flops_per_s * clock,
                head_flops_per_s=stage.head_flops_per_s * clock,
                expert_flops_per_s=stage.expert_flops_per_s * clock,
                attention_flops_per_s=stage.attention_flops_per_s * clock,
            )
            with_prompts = slow.seconds(prompt, pairs, n_decode, context, n_decode + first)
            without = slow.seconds(0.0, 0.0, n_decode, context, n_decode)
            total += work.prefill_steps * float(with_prompts)
            total += max(work.n_steps - work.prefill_steps, 0.0) * float(without)
        return total

    full = gpu_s(1.0)
    if full <= 0.0:
        return 0.0
    return float(np.clip((gpu_s(PROBE_CLOCK_FRAC) / full - 1.0) / (1.0 / PROBE_CLOCK_FRAC - 1.0), 0.0, 1.0))


def _while_busy(activity: Activity) -> Activity:
    """Return the activity of the time in which the GPU runs steps."""
    busy = max(float(activity.busy_frac), 1e-6)
    return Activity(
        {kind: rate / busy for kind, rate in activity.flops_per_s.items()},
        activity.bytes_per_s / busy,
        activity.cache_bytes_per_s / busy,
        activity.link_bytes_per_s / busy,
        1.0,
    )


def limited_runs(
    run: Run,
    gpu: Gpu,
    deployment: Deployment,
    power: CoefficientSet,
    *,
    board_power_w: float,
    is_saturated: bool,
    limits_w: Sequence[float],
    seed: int = 0,
) -> list[LimitedRun]:
    """Return a replay under each power limit, ascending; the board's own limit gives back the replay itself.

    board_power_w : mean of one board at its own limit, which the others are scaled to [W]
    limits_w      : of one board, above its idle power and at most its own limit

    A board that is slower by s in every step serves arrivals at rate r as a full-speed one serves r/s, with all times
    divided by s; so an open load is replayed at r/s. Host time is stretched too, which errs to the slow side. Raises
    DomainError for limits that the board cannot have.
    """
    sim, load = run.simulation, run.workload.load
    stages, n_replicas = run.replica.stages, deployment.dp

    def activity(of: Simulation) -> Activity:
        span_s = busy_span_s(of, run.workload, is_saturated)
        return activity_of(stages, of.total_work, span_s, deployment.weight_dtype, n_replicas=n_replicas)

    share = clock_bound_frac(stages, sim)

    def curve(of: Activity, limits: Sequence[float]) -> LimitCurve:
        return power_limit_curve(_while_busy(of), gpu, power, compute_frac=share, limits_w=limits)

    base = activity(sim)
    full_w = float(curve(base, [gpu.board_power_w]).power_w[0])
    full_dynamic_w = max(float(base.busy_frac) * (full_w - gpu.idle_power_w), 1e-9)
    whole = curve(base, limits_w)
    found = []
    rows = zip(whole.limit_w, whole.clock_frac, whole.speed_frac, whole.power_w, strict=True)
    for limit, clock, speed, watts in (tuple(float(x) for x in row) for row in rows):
        slowed, busy = sim, float(base.busy_frac)
        if speed < 1.0 - 1e-6 and not isinstance(load, ClosedLoad) and not is_saturated:
            slowed = _replay_faster(run, deployment, speed, seed)
            now = activity(slowed)
            busy = float(now.busy_frac)
            watts = float(curve(now, [limit]).power_w[0])
        dynamic_w = (board_power_w - gpu.idle_power_w) * busy * (watts - gpu.idle_power_w) / full_dynamic_w
        mean_w = min(limit, board_power_w, gpu.idle_power_w + max(dynamic_w, 0.0))
        found.append(LimitedRun(limit, clock, min(speed, 1.0), mean_w, slowed))
    return found


def _replay_faster(run: Run, deployment: Deployment, speed: float, seed: int) -> Simulation:
    """Return the same requests on full-speed boards, arriving closer together by `speed`."""
    load = run.workload.load
    rate = getattr(load, "arrivals_per_s", None)
    if rate is None:
        return run.simulation
    duration = getattr(load, "duration_s", None)
    closer = {"arrivals_per_s": rate / speed} | ({"duration_s": duration * speed} if duration else {})
    workload: Workload = run.workload.model_copy(update={"load": load.model_copy(update=closer)})
    return replay_replica(run.replica, deployment, workload, seed)
