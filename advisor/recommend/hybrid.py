"""A mixed plan: serve online by day, run batch work or training on what is left, hour by hour, on one GPU budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

from advisor.errors import DomainError
from advisor.recommend.offline import Room, Work, work, worked_how
from advisor.schema import Note
from advisor.schema.mixed import HOURS, START_S, HourPlan, MixedAnswer, MixedPlan, OfflineJob, OnlineNeed
from advisor.units import HOUR_S, format_count, format_j, format_s, format_usd, plural

Mode = Literal["share", "split"]
MOST_ORDERED = 3
"""Jobs up to which every order of precedence is tried."""
MOST_GPUS = 4096
"""Largest budget that is looked at for the fewest GPUs."""
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


def replicas_needed(need: OnlineNeed, hour: int) -> int:
    """Return the replicas of an hour of day: load over capacity with headroom, at least the minimum."""
    rate = need.requests_per_s[hour % HOURS]
    usable = need.capacity_requests_per_s * (1 - need.headroom_frac)
    if usable <= 0:
        raise DomainError(f"headroom_frac {need.headroom_frac:g} leaves no capacity; use a value below 1")
    return max(need.min_replicas, math.ceil(rate / usable * (1 - 1e-9)))


def _serving(need: OnlineNeed, n_gpus: int, mode: Mode) -> list[tuple[int, float]]:
    """Return (replicas that run, requests/s left unserved) of each hour of day."""
    wanted = [replicas_needed(need, hour) for hour in range(HOURS)]
    found = []
    for hour, rate in enumerate(need.requests_per_s):
        running = min(max(wanted) if mode == "split" else wanted[hour], n_gpus // need.gpus_per_replica)
        found.append((running, max(0.0, rate - running * need.capacity_requests_per_s)))
    return found


def _worked(
    n_gpus: int, need: OnlineNeed, jobs: Sequence[OfflineJob], replicas: Sequence[int], horizon: int, switch_s: float
) -> dict[str, Work]:
    """Return what each job does beside so many replicas in each hour of day, in the order that leaves least undone."""
    running = [replicas[hour % HOURS] for hour in range(horizon + 1)]
    soonest = sorted(jobs, key=lambda j: (j.deadline_hour, j.name))
    best: dict[str, Work] = {}
    least = math.inf
    for order in permutations(soonest) if len(jobs) <= MOST_ORDERED else [soonest]:
        room = Room.of(n_gpus, need.gpus_per_replica, running)
        done = {job.name: work(job, room, horizon, switch_s) for job in order}
        undone = sum(w.late_tokens / w.job.total_tokens for w in done.values())
        if undone < least:
            best, least = done, undone
        if not undone:
            break
    return best


def schedule(
    n_gpus: int,
    need: OnlineNeed,
    jobs: Sequence[OfflineJob],
    mode: Mode,
    *,
    usd_per_gpu_h: float = 0.0,
    idle_power_w: float = 0.0,
    switch_s: float = START_S,
) -> MixedPlan:
    """Return the hour-by-hour schedule of one mode.

    *split*: the peak's replicas stay up all day, the other GPUs do offline work. *share*: replicas follow the load, and
    what they free works offline. Each hour a job runs in the ways that do the most by its deadline on the GPUs it has:
    a group that starts in another way loses `switch_s` of the hour, and so does one that hands its GPUs to a replica,
    which starts before its hour; serving engines that the load lets go work on without a restart. Serving always comes
    first, then jobs by earliest deadline, or in the order that leaves least undone. The plan runs until the last
    deadline, at least one day.
    """
    if n_gpus < 1:
        raise DomainError(f"a mixed plan needs at least one GPU, got {n_gpus}")
    names = [j.name for j in jobs]
    if len(set(names)) != len(names):
        raise DomainError(f"two jobs are called '{next(n for n in names if names.count(n) > 1)}'; names must differ")
    horizon = max([HOURS, *(j.deadline_hour for j in jobs)])
    serving = _serving(need, n_gpus, mode)
    done = _worked(n_gpus, need, jobs, [replicas for replicas, _ in serving], horizon, switch_s)
    hours = []
    for hour in range(horizon):
        replicas, unserved = serving[hour % HOURS]
        in_use = replicas * need.gpus_per_replica
        at = {name: done[name].hours[hour] for name in names}
        idle = n_gpus - in_use - sum(h.gpus for h in at.values())
        capacity = replicas * need.capacity_requests_per_s
        load = min(1.0, need.requests_per_s[hour % HOURS] / capacity) if capacity else 0.0
        serving_w = idle_power_w + load * max(0.0, need.board_power_w_per_gpu - idle_power_w)
        watts = in_use * serving_w + idle * idle_power_w + sum(h.board_power_w(idle_power_w) for h in at.values())
        hours.append(
            HourPlan(
                hour=hour,
                n_replicas=replicas,
                serving_gpus=in_use,
                job_gpus={name: h.gpus for name, h in at.items()},
                job_groups={name: h.groups for name, h in at.items()},
                job_starts={name: h.starts for name, h in at.items()},
                idle_gpus=idle,
                job_tokens={name: h.tokens for name, h in at.items()},
                unserved_requests_per_s=unserved,
                energy_j=watts * HOUR_S,
            )
        )
    late = {name: done[name].late_tokens for name in names}
    unserved_any = any(h.unserved_requests_per_s > 0 for h in hours)
    return MixedPlan(
        mode=mode,
        n_gpus=n_gpus,
        hours=tuple(hours),
        finish_hour={name: done[name].finish_hour for name in names},
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
                level="error",
                text=f"the online load exceeds all GPUs in {plural(len(short), 'hour')}, first in hour {short[0]}",
            )
        )
    notes += [
        Note(level="error", text=f"'{name}' misses its deadline by {format_count(tokens)} tokens")
        for name, tokens in late.items()
        if tokens > 0
    ]
    if mode == "share":
        notes.append(
            Note(text=f"GPUs change sides: {format_s(switch_s)} a restart are counted, weights stay in host memory")
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
    notes += [
        Note(
            level="warning",
            text=f"'{job.name}' changes its number of GPUs: it resumes from a universal checkpoint"
            ' (DeepSpeed\'s ds_to_universal.py --inject_missing_state, then "load_universal": true); its batch a step'
            " stays the same",
        )
        for job in jobs
        if job.kind == "train" and len({h.job_groups[job.name] for h in hours if h.job_gpus[job.name]}) > 1
    ]
    if mode == "split" and len({replicas_needed(need, h) for h in range(HOURS)}) > 1:
        notes.append(Note(text="serving GPUs idle outside the peak; in exchange nothing ever changes sides"))
    return notes


def fewest_gpus(
    need: OnlineNeed,
    jobs: Sequence[OfflineJob],
    mode: Mode,
    *,
    switch_s: float = START_S,
    highest: int = MOST_GPUS,
) -> int | None:
    """Return the fewest GPUs that hold the peak with its headroom and meet all deadlines, None above `highest`."""
    low = max(1, max(replicas_needed(need, h) for h in range(HOURS)) * need.gpus_per_replica)

    horizon = max([HOURS, *(j.deadline_hour for j in jobs)])

    def is_enough(n_gpus: int) -> bool:
        replicas = [n for n, _ in _serving(need, n_gpus, mode)]
        return not any(w.late_tokens for w in _worked(n_gpus, need, jobs, replicas, horizon, switch_s).values())

    if low > highest:
        return None
    # a bracket by doublings first: schedules of few GPUs are found sooner than those of thousands
    high = low
    while not is_enough(high):
        if high >= highest:
            return None
        low, high = high + 1, min(2 * high, highest)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
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
    switch_s: float = START_S,
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
        plans.append(plan.model_copy(update={"min_gpus": fewest_gpus(need, jobs, mode, switch_s=switch_s)}))

    best = min(plans, key=badness)
    other = next(p for p in plans if p.mode != best.mode)
    why = []
    for plan in (best, other):
        fewest = plural(plan.min_gpus, "GPU") if plan.min_gpus is not None else f"more than {MOST_GPUS:,} GPUs"
        state = "meets everything" if plan.meets_all else "misses something"
        why.append(
            f"{plan.mode}: {state} on {plural(plan.n_gpus, 'GPU')}, needs {fewest},"
            f" idles {plural(round(plan.idle_gpu_hours), 'GPU hour')}, {format_j(plan.energy_j)}"
        )
    if best.min_gpus is not None and other.min_gpus is not None and usd_per_gpu_h and best.min_gpus < other.min_gpus:
        saved = (other.min_gpus - best.min_gpus) * usd_per_gpu_h * HOURS
        why.append(f"{best.mode} saves {plural(other.min_gpus - best.min_gpus, 'GPU')}, {format_usd(saved)} a day")
    for job in jobs:
        why += worked_how(best, job, switch_s)
    return MixedAnswer(best=best.mode, why=tuple(why), plans=tuple(plans))
