"""Offline work by the hour: in which of its ways a job runs on the GPUs that it has, restarts counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from advisor.recommend.fill import Groups, Size, fullest, gpus, options, rate
from advisor.schema.mixed import HOURS, MixedPlan, OfflineJob, Way
from advisor.units import HOUR_S, format_rate, format_s, plural, times

MOST_UNUSED = 4
"""Ways not taken that are told, those with the most tokens a GPU."""
AS_MUCH = 1.01
"""Times as much work below which two ways count as equal in words."""


@dataclass
class Room:
    """What serving and the jobs before leave to a job, by hour. A job that is placed takes its part out of it."""

    free: list[int]
    released: list[int]
    """serving engines that the load lets go at the hour's begin; negative: that it calls back"""
    growth: list[int]
    """GPUs that replicas take at the hour's end: they start within the hour"""
    gpus_per_replica: int

    @classmethod
    def of(cls, n_gpus: int, gpus_per_replica: int, replicas: Sequence[int]) -> Room:
        """Return the room beside so many replicas in each hour and the one after the last."""
        n = len(replicas) - 1
        change = [replicas[h + 1] - replicas[h] for h in range(n)]
        return cls(
            free=[n_gpus - replicas[h] * gpus_per_replica for h in range(n)],
            released=[0, *(-c for c in change[:-1])],
            growth=[max(0, c) * gpus_per_replica for c in change],
            gpus_per_replica=gpus_per_replica,
        )


@dataclass(frozen=True)
class Hour:
    """What a job does in one hour."""

    ways: tuple[Way, ...]
    groups: Groups
    starts: int
    tokens: float

    @property
    def gpus(self) -> int:
        """Return the GPUs that the job has."""
        return sum(n * way.n_gpus for n, way in zip(self.groups, self.ways, strict=True))

    def board_power_w(self, idle_power_w: float) -> float:
        """Return the mean power of its GPUs: idle while they start or have nothing left to do."""
        pairs = [(n, way) for n, way in zip(self.groups, self.ways, strict=True) if n]
        full = sum(n * way.tokens_per_s for n, way in pairs) * HOUR_S
        share = self.tokens / full if full else 0.0
        return sum(
            n * way.n_gpus * (way.board_power_w_per_gpu * share + idle_power_w * (1 - share)) for n, way in pairs
        )


@dataclass(frozen=True)
class Work:
    """A job's hours, when it ends (None = not within the plan), and what is undone at its deadline."""

    job: OfflineJob
    hours: tuple[Hour, ...]
    finish_hour: float | None
    late_tokens: float


class _Around(NamedTuple):
    """An hour's part of the room."""

    free: int
    released: int
    growth: int


@dataclass(frozen=True)
class _Law:
    """What a job does in an hour, given its groups now and in the hour before."""

    sizes: tuple[Size, ...]
    engine: int
    """the way that is the serving engine, -1 for none"""
    gpus_per_replica: int
    switch_s: float

    def starts(self, groups: Groups, before: Groups, at: _Around) -> tuple[int, ...]:
        """Return the groups of each way that start."""
        return tuple(
            max(0, now - max(0, then + (at.released if i == self.engine else 0)))
            for i, (now, then) in enumerate(zip(groups, before, strict=True))
        )

    def taken(self, groups: Groups, at: _Around) -> tuple[int, ...]:
        """Return the groups of each way that give way early to replicas that start for the next hour.

        Idle GPUs go first, then serving engines, which take requests at once, then the slowest groups.
        """
        rest = at.growth - (at.free - gpus(self.sizes, groups))
        if self.engine >= 0:
            rest -= groups[self.engine] * self.gpus_per_replica
        found = [0] * len(groups)
        for i in sorted(range(len(groups)), key=lambda i: self.sizes[i][1] / self.sizes[i][0]):
            while i != self.engine and rest > 0 and found[i] < groups[i]:
                found[i] += 1
                rest -= self.sizes[i][0]
        return tuple(found)

    def able(self, groups: Groups, before: Groups, at: _Around) -> float:
        """Return the tokens that the groups can do in the hour."""
        if not any(groups):
            return 0.0
        lost = min(self.switch_s, HOUR_S)
        stopped = self.taken(groups, at) if at.growth else (0,) * len(groups)
        found = 0.0
        for (_, per_s), now, new, gone in zip(
            self.sizes, groups, self.starts(groups, before, at), stopped, strict=True
        ):
            found += per_s * (now * HOUR_S - min(now * HOUR_S, (new + gone) * lost))
        return found

    def fewest(self, groups: Groups, before: Groups, at: _Around, tokens: float) -> Groups:
        """Return the groups without those that `tokens` need not, the largest dropped first."""
        while True:
            fewer = [
                tuple(n - (k == i) for k, n in enumerate(groups))
                for i in sorted(range(len(groups)), key=lambda i: -self.sizes[i][0])
                if groups[i]
            ]
            enough = next((g for g in fewer if self.able(g, before, at) >= tokens), None)
            if enough is None:
                return groups
            groups = enough


def _path(law: _Law, max_groups: int, before: Groups, window: tuple[_Around, ...]) -> list[Groups]:
    """Return the groups of each hour of a window that do the most work in all of it (Viterbi over the fillings)."""
    value: dict[Groups, float] = {before: 0.0}
    steps: list[dict[Groups, Groups]] = []
    for at in window:
        came: dict[Groups, Groups] = {}
        new: dict[Groups, float] = {}
        for groups in options(law.sizes, at.free, max_groups):
            new[groups], came[groups] = max(
                ((value[then] + law.able(groups, then, at), then) for then in value), key=itemgetter(0)
            )
        steps.append(came)
        value = new
    # of equals the one on the fewest GPUs
    last = max(value, key=lambda groups: (value[groups], -gpus(law.sizes, groups)))
    path = [last]
    for came in reversed(steps[1:]):
        path.append(came[path[-1]])
    return path[::-1]


def work(job: OfflineJob, room: Room, horizon: int, switch_s: float) -> Work:
    """Return a job's hours on what the room leaves, and take them out of it.

    Looks a day ahead, or to the deadline where that is nearer, for the ways that do the most until then.
    """
    engine = next((i for i, way in enumerate(job.ways) if way.is_serving_engine), -1)
    sizes = tuple((way.n_gpus, way.tokens_per_s) for way in job.ways)
    law = _Law(sizes, engine, room.gpus_per_replica, switch_s)
    none = (0,) * len(sizes)
    seen: dict[tuple[Groups, tuple[_Around, ...]], list[Groups]] = {}
    hours: list[Hour] = []
    plan: list[Groups] = []
    left, before, finish, late = job.total_tokens, none, None, 0.0
    for hour in range(horizon):
        if left <= 0 and before == none:
            hours += [Hour(job.ways, none, 0, 0.0)] * (horizon - hour)
            break
        if left > 0 and not plan:
            end = min(hour + HOURS, job.deadline_hour if hour < job.deadline_hour else horizon)
            window = tuple(_Around(room.free[h], room.released[h], room.growth[h]) for h in range(hour, end))
            if (before, window) not in seen:
                seen[before, window] = _path(law, job.max_groups, before, window)
            plan = list(seen[before, window])
        at = _Around(room.free[hour], room.released[hour], room.growth[hour])
        groups = plan.pop(0) if left > 0 else none
        able = law.able(groups, before, at)
        if able >= left > 0:
            groups = law.fewest(groups, before, at, left)
            able = law.able(groups, before, at)
            finish = hour + left / able
        done = min(left, able)
        left = left - done if done < left else 0.0
        hours.append(Hour(job.ways, groups, sum(law.starts(groups, before, at)), done))
        _take(room, law, hour, groups, before)
        before = groups
        if hour + 1 == job.deadline_hour:
            late = left
    return Work(job, tuple(hours), finish, late)


def _take(room: Room, law: _Law, hour: int, groups: Groups, before: Groups) -> None:
    """Leave to the jobs after this one what it does not use: free GPUs, engines let go, replicas to give way to."""
    at = _Around(room.free[hour], room.released[hour], room.growth[hour])
    engines = groups[law.engine] - before[law.engine] if law.engine >= 0 else 0
    others = gpus(law.sizes, groups) - gpus(law.sizes, before) - engines * law.gpus_per_replica
    room.growth[hour] -= min(
        at.growth,
        sum(n * each for n, (each, _) in zip(law.taken(groups, at), law.sizes, strict=True))
        + (groups[law.engine] * law.gpus_per_replica if law.engine >= 0 else 0),
    )
    room.released[hour] -= engines + max(0, -(-others // law.gpus_per_replica))
    room.free[hour] -= gpus(law.sizes, groups)


def _words(way: Way) -> str:
    return f"{way.backend}, {way.plan}" if way.plan else way.backend


def _unused(plan: MixedPlan, job: OfflineJob, i: int, hours: Sequence[int], switch_s: float) -> str:
    """Return why a job does not run in one of its ways."""
    way, most = job.ways[i], max(h.job_gpus[job.name] + h.idle_gpus for h in plan.hours)
    if way.n_gpus > most:
        return f"it takes {way.n_gpus} GPUs at once, at most {most} are free"
    fastest = max(w.tokens_per_s for w, used in zip(job.ways, hours, strict=True) if used)
    if job.max_groups == 1 and way.tokens_per_s <= fastest:
        pair = format_rate(way.tokens_per_s, "tokens"), format_rate(fastest, "tokens")
        return f"slower, {pair[0]} in all against {pair[1]}"
    each = max(w.tokens_per_s / w.n_gpus for w, used in zip(job.ways, hours, strict=True) if used)
    if way.tokens_per_s / way.n_gpus * AS_MUCH < each:
        return f"what runs does {times(each * way.n_gpus / way.tokens_per_s)} a GPU"
    others = tuple((w.n_gpus, w.tokens_per_s) for k, w in enumerate(job.ways) if k != i)
    ratio = rate(others, fullest(others, way.n_gpus, job.max_groups)) / way.tokens_per_s if others else 0.0
    if ratio > AS_MUCH:
        return f"on as many GPUs the others do {times(ratio)}"
    if ratio >= 1:
        return "on as many GPUs the others do as much"
    return f"its gain does not pay {format_s(switch_s)} a start"


class Used(NamedTuple):
    """One way of a job in a plan: GPU hours that run in it (0 = not taken), and why, "" where it needs no reason."""

    way: Way
    gpu_hours: int
    why: str


def ways_used(plan: MixedPlan, job: OfflineJob, switch_s: float) -> list[Used]:
    """Return the ways in which a job runs in a plan, most GPU hours first, then those not taken, best first.

    Empty where the job does not run. switch_s : what a start is taken to lose [s]
    """
    hours = [0] * len(job.ways)
    for h in plan.hours:
        hours = [total + n * way.n_gpus for total, n, way in zip(hours, h.job_groups[job.name], job.ways, strict=True)]
    if not any(hours):
        return []
    engine = next((way for way in job.ways if way.is_serving_engine), None)
    taken, unused = [], []
    for i in sorted(range(len(hours)), key=lambda i: -hours[i]):
        way, each = job.ways[i], job.ways[i].tokens_per_s / job.ways[i].n_gpus
        if not hours[i]:
            unused.append((-each, _words(way), Used(way, 0, _unused(plan, job, i, hours, switch_s))))
            continue
        why = ""
        if way is engine:
            why = "the engines that serve, which the load lets go without a restart"
        elif engine is not None:
            more = each / (engine.tokens_per_s / engine.n_gpus) - 1
            few = "too few GPUs for another engine that serves"
            why = f"{times(1 + more)} compared with the engines that serve" if round(more, 2) > 0 else few
            if more <= 0 and way.n_gpus >= engine.n_gpus:
                why = "as much as the engines that serve, which would restart too"
        taken.append(Used(way, hours[i], why))
    return taken + [used for *_, used in sorted(unused, key=itemgetter(0, 1))]


def worked_how(plan: MixedPlan, job: OfflineJob, switch_s: float) -> list[str]:
    """Say in which ways a job runs in a plan, and why not in the others."""
    found = ways_used(plan, job, switch_s)
    if not found:
        least = min(way.n_gpus for way in job.ways)
        most = max(h.idle_gpus for h in plan.hours)
        free = f"at most {plural(most, 'GPU')} {'is' if most == 1 else 'are'}" if most else "none is"
        return [f"{job.name} does not run: it needs {plural(least, 'GPU')} at once, {free} ever free"]
    lines, unused = [], []
    for way, hours, why in found:
        text = f"{_words(way)} ({format_rate(way.tokens_per_s / way.n_gpus, 'tokens')} a GPU)"
        if hours:
            lines.append(f"{job.name}: {plural(hours, 'GPU hour')} by {text}{why and f': {why}'}")
        else:
            unused.append(f"{job.name}, not by {text}: {why}")
    lines += unused[:MOST_UNUSED]
    starts = [h.job_starts[job.name] for h in plan.hours]
    if sum(starts):
        lines.append(f"{job.name}: {plural(sum(starts), 'start')} of {format_s(switch_s)} counted")
    return lines
