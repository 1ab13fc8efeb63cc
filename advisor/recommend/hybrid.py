"""A mixed plan: serve online by day, run batch work or training on what is left, hour by hour, on one GPU budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from advisor.errors import DomainError
from advisor.recommend.explain import layout_text
from advisor.recommend.training_flips import label
from advisor.schema import Deployment, Note, Prediction
from advisor.schema.mixed import HOURS, HourPlan, MixedAnswer, MixedPlan, OfflineJob, OnlineNeed
from advisor.schema.training import TrainJob, TrainPrediction
from advisor.units import HOUR_S, format_count, format_j, format_usd, plural

Mode = Literal["share", "split"]
DEFAULT_SWITCH_S = 300.0
"""Assumed time that a group of GPUs loses when it changes sides (stop, load weights, compile, warm up): an input."""
STEEP_RAMP = 1.5
"""Growth of the load from one hour to the next above which replicas should start an hour early."""


def daily_load(peak_requests_per_s: float, *, night_frac: float = 0.2, peak_hour: float = 14.0) -> tuple[float, ...]:
    """Return 24 hourly rates of a smooth day: ``peak * (n + (1 - n) (1 + cos(2 pi (h - peak hour) / 24)) / 2)``.

    night_frac n : lowest rate as a share of the peak, in [0, 1]. A shape for planning, not a measurement: give 24 rates
    of your own where you have them. Raises DomainError outside the ranges.

    >>> [round(r, 1) for r in daily_load(10.0)][::6]
    [3.1, 6.0, 8.9, 6.0]
    """
    if not 0 <= night_frac <= 1 or peak_requests_per_s < 0 or not 0 <= peak_hour < HOURS:
        raise DomainError(
            f"daily_load needs peak >= 0, night_frac in [0, 1] and peak_hour in [0, 24), got {peak_requests_per_s:g},"
            f" {night_frac:g} and {peak_hour:g}"
        )
    return tuple(
        peak_requests_per_s
        * (night_frac + (1 - night_frac) * (1 + math.cos(2 * math.pi * (hour - peak_hour) / HOURS)) / 2)
        for hour in range(HOURS)
    )


def slo_capacity(meets_slo: Callable[[float], bool], highest: float, *, relative: float = 0.02) -> float:
    """Return the largest rate that meets the SLO, by bisection between 0 and `highest`; 0 when none does.

    `meets_slo(rate)` must be true below some rate and false above it.
    """
    if meets_slo(highest):
        return highest
    low, high = 0.0, highest
    while high - low > relative * max(low, highest * 1e-3):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if meets_slo(middle) else (low, middle)
    return low


def training_job(
    name: str, job: TrainJob, prediction: TrainPrediction, *, total_tokens: float, deadline_hour: int
) -> OfflineJob:
    """Return a training job as offline work: one group of its GPUs at the predicted rate."""
    power = prediction.quantities.get("board_power_w")
    return OfflineJob(
        name=name,
        kind="train",
        backend=f"deepspeed-train-zero{job.zero_stage}",
        plan=label(job),
        total_tokens=total_tokens,
        gpus_per_group=job.n_gpus,
        tokens_per_s_per_group=prediction["tokens_per_s"],
        max_groups=1,
        deadline_hour=deadline_hour,
        board_power_w_per_gpu=power.value / job.n_gpus if power else 0.0,
    )


def batch_job(
    name: str, deployment: Deployment, prediction: Prediction, *, total_tokens: float, deadline_hour: int
) -> OfflineJob:
    """Return a batch queue as offline work: groups of one replica at the deployment's total token rate."""
    replicas = 1 if deployment.backend == "deepspeed-zero-inference" else deployment.dp
    power = prediction.quantities.get("board_power_w")
    return OfflineJob(
        name=name,
        backend=deployment.backend,
        plan=layout_text(deployment),
        total_tokens=total_tokens,
        gpus_per_group=deployment.n_gpus // replicas,
        tokens_per_s_per_group=prediction["total_tokens_per_s"] / replicas,
        deadline_hour=deadline_hour,
        board_power_w_per_gpu=power.value / deployment.n_gpus if power else 0.0,
    )


def replicas_needed(need: OnlineNeed, hour: int) -> int:
    """Return the replicas of an hour of day: load over capacity with headroom, at least the minimum."""
    rate = need.requests_per_s[hour % HOURS]
    usable = need.capacity_requests_per_s * (1 - need.headroom_frac)
    if usable <= 0:
        raise DomainError(f"headroom_frac {need.headroom_frac:g} leaves no capacity; use a value below 1")
    return max(need.min_replicas, math.ceil(rate / usable * (1 - 1e-9)))


def _serving(need: OnlineNeed, n_gpus: int, hour: int, mode: Mode) -> tuple[int, float]:
    """Return (replicas that run, requests/s left unserved) of an hour."""
    hours = range(HOURS) if mode == "split" else (hour,)
    wanted = max(replicas_needed(need, h) for h in hours)
    running = min(wanted, n_gpus // need.gpus_per_replica)
    unserved = max(0.0, need.requests_per_s[hour % HOURS] - running * need.capacity_requests_per_s)
    return running, unserved


def schedule(
    n_gpus: int,
    need: OnlineNeed,
    jobs: Sequence[OfflineJob],
    mode: Mode,
    *,
    usd_per_gpu_h: float = 0.0,
    idle_power_w: float = 0.0,
    switch_s: float = DEFAULT_SWITCH_S,
) -> MixedPlan:
    """Return the hour-by-hour schedule of one mode.

    *split*: the peak's replicas stay up all day, the other GPUs do offline work. *share*: replicas follow the load, and
    what they free works offline; a group that starts in an hour loses `switch_s` of it. Jobs are served by earliest
    deadline; the plan runs until the last deadline, at least one day. Serving always comes first.
    """
    if n_gpus < 1:
        raise DomainError(f"a mixed plan needs at least one GPU, got {n_gpus}")
    names = [j.name for j in jobs]
    if len(set(names)) != len(names):
        raise DomainError(f"two jobs are called '{next(n for n in names if names.count(n) > 1)}'; names must differ")
    horizon = max([HOURS, *(j.deadline_hour for j in jobs)])
    left = {j.name: j.total_tokens for j in jobs}
    finish: dict[str, float | None] = dict.fromkeys(names)
    late: dict[str, float] = dict.fromkeys(names, 0.0)
    before = dict.fromkeys(names, 0)
    hours = []
    for hour in range(horizon):
        running, unserved = _serving(need, n_gpus, hour, mode)
        serving = running * need.gpus_per_replica
        free = n_gpus - serving
        gpus, done = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        job_energy = 0.0
        for job in sorted(jobs, key=lambda j: (j.deadline_hour, j.name)):
            if left[job.name] <= 0:
                continue
            groups = min(free // job.gpus_per_group, job.max_groups)
            full = job.tokens_per_s_per_group * HOUR_S
            needed = math.ceil(left[job.name] / (job.tokens_per_s_per_group * max(HOUR_S - switch_s, 1.0)) - 1e-9)
            groups = min(groups, needed)
            started = max(0, groups - before[job.name])
            lost = started * job.tokens_per_s_per_group * min(switch_s, HOUR_S)
            able = groups * full - lost
            work = min(left[job.name], able)
            left[job.name] -= work
            gpus[job.name], done[job.name] = groups * job.gpus_per_group, work
            free -= gpus[job.name]
            share = work / able if able > 0 else 0.0
            job_energy += gpus[job.name] * HOUR_S * (job.board_power_w_per_gpu * share + idle_power_w * (1 - share))
            if left[job.name] <= 0:
                finish[job.name] = hour + share
        before = {j.name: gpus[j.name] // j.gpus_per_group for j in jobs}
        for job in jobs:
            if hour + 1 == job.deadline_hour:
                late[job.name] = max(0.0, left[job.name])
        capacity = running * need.capacity_requests_per_s
        load = min(1.0, need.requests_per_s[hour % HOURS] / capacity) if capacity else 0.0
        serving_w = idle_power_w + load * max(0.0, need.board_power_w_per_gpu - idle_power_w)
        hours.append(
            HourPlan(
                hour=hour,
                n_replicas=running,
                serving_gpus=serving,
                job_gpus=gpus,
                idle_gpus=free,
                job_tokens=done,
                unserved_requests_per_s=unserved,
                energy_j=serving * serving_w * HOUR_S + job_energy + free * idle_power_w * HOUR_S,
            )
        )
    unserved_any = any(h.unserved_requests_per_s > 0 for h in hours)
    return MixedPlan(
        mode=mode,
        n_gpus=n_gpus,
        hours=tuple(hours),
        finish_hour=finish,
        shortfall_tokens=late,
        meets_all=not unserved_any and not any(late.values()),
        usd=usd_per_gpu_h * n_gpus * horizon,
        energy_j=sum(h.energy_j for h in hours),
        idle_gpu_hours=float(sum(h.idle_gpus for h in hours)),
        notes=tuple(_risks(need, jobs, mode, hours, late, switch_s)),
    )


def _risks(
    need: OnlineNeed,
    jobs: Sequence[OfflineJob],
    mode: Mode,
    hours: Sequence[HourPlan],
    late: dict[str, float],
    switch_s: float,
) -> list[Note]:
    notes = []
    short = [h.hour for h in hours if h.unserved_requests_per_s > 0]
    if short:
        notes.append(
            Note(
                level="error", text=f"the online load exceeds all GPUs in {len(short)} hours, first in hour {short[0]}"
            )
        )
    notes += [
        Note(level="error", text=f"'{name}' misses its deadline by {format_count(tokens)} tokens")
        for name, tokens in late.items()
        if tokens > 0
    ]
    if mode == "share":
        notes.append(
            Note(
                text=f"GPUs change sides: {switch_s / 60:.0f} minutes a change are counted, weights stay in host memory"
            )
        )
        rates = need.requests_per_s
        steep = [h for h in range(HOURS) if rates[h - 1] > 0 and rates[h] / rates[h - 1] > STEEP_RAMP]
        if steep:
            hour = ", ".join(str(h) for h in steep)
            notes.append(
                Note(level="warning", text=f"the load grows fast into hour {hour}: start those replicas an hour early")
            )
        if any(j.kind == "train" for j in jobs):
            notes.append(
                Note(level="warning", text="training is interrupted when serving needs its GPUs: checkpoint every hour")
            )
        notes.append(
            Note(
                level="warning", text="a burst while GPUs work offline waits for a change of sides; headroom covers it"
            )
        )
    if mode == "split" and len({replicas_needed(need, h) for h in range(HOURS)}) > 1:
        notes.append(Note(text="serving GPUs idle outside the peak; in exchange nothing ever changes sides"))
    return notes


def fewest_gpus(need: OnlineNeed, jobs: Sequence[OfflineJob], mode: Mode, *, highest: int = 4096) -> int | None:
    """Return the fewest GPUs that hold the peak with its headroom and meet all deadlines, None above `highest`."""
    low = max(1, max(replicas_needed(need, h) for h in range(HOURS)) * need.gpus_per_replica)
    if low > highest or not schedule(highest, need, jobs, mode).meets_all:
        return None
    high = highest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if schedule(middle, need, jobs, mode).meets_all else (middle + 1, high)
    return low


def badness(plan: MixedPlan) -> tuple[float, ...]:
    """Return what orders plans, the better one first: meets all, fewest GPUs, least undone, least energy, simpler."""
    undone = sum(plan.shortfall_tokens.values())
    fewest = float(plan.min_gpus) if plan.min_gpus is not None else math.inf
    return (0.0 if plan.meets_all else 1.0, fewest, undone, plan.energy_j, 0.0 if plan.mode == "split" else 1.0)


def plan_mixed(
    n_gpus: int,
    need: OnlineNeed,
    jobs: Sequence[OfflineJob],
    *,
    usd_per_gpu_h: float = 0.0,
    idle_power_w: float = 0.0,
    switch_s: float = DEFAULT_SWITCH_S,
) -> MixedAnswer:
    """Return both ways to divide the budget, with the fewest GPUs each needs, and the better one with its reasons.

    Better is: meets everything; then fewer GPUs needed; then less left undone; then less energy.
    """
    plans = []
    for mode in ("share", "split"):
        plan = schedule(
            n_gpus,
            need,
            jobs,
            mode,
            usd_per_gpu_h=usd_per_gpu_h,
            idle_power_w=idle_power_w,
            switch_s=switch_s,
        )
        plans.append(plan.model_copy(update={"min_gpus": fewest_gpus(need, jobs, mode)}))

    best = min(plans, key=badness)
    other = next(p for p in plans if p.mode != best.mode)
    why = []
    for plan in (best, other):
        fewest = plural(plan.min_gpus, "GPU") if plan.min_gpus is not None else "no number of GPUs up to 4096"
        state = "meets everything" if plan.meets_all else "misses something"
        why.append(
            f"{plan.mode}: {state} on {plural(plan.n_gpus, 'GPU')}, needs {fewest},"
            f" idles {plan.idle_gpu_hours:.0f} GPU hours, {format_j(plan.energy_j)}"
        )
    if best.min_gpus is not None and other.min_gpus is not None and usd_per_gpu_h and best.min_gpus < other.min_gpus:
        saved = (other.min_gpus - best.min_gpus) * usd_per_gpu_h * HOURS
        why.append(f"{best.mode} saves {plural(other.min_gpus - best.min_gpus, 'GPU')}, {format_usd(saved)} a day")
    return MixedAnswer(best=best.mode, why=tuple(why), plans=tuple(plans))
