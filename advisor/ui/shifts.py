"""Offline work of a day's plan: which engine and plan runs each job in which hours, why, and why not another way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import streamlit as st

from advisor.recommend.offline import Used, ways_used, worked_how
from advisor.schema.mixed import MixedAnswer, MixedPlan, OfflineJob, Way
from advisor.ui import parts
from advisor.ui.text import BACKENDS, clause, plain, sentence, show
from advisor.units import format_s, plural

LIST_PX = 240
"""Height of the boxes for the lists of a day's plan, which are short."""
TRAINING = "deepspeed-train-"
"""How the names of backends begin that train."""


def engine_of(way: Way) -> str:
    """Return the engine of a way of working as people call it."""
    return "DeepSpeed training" if way.backend.startswith(TRAINING) else BACKENDS.get(way.backend, way.backend)


def name_of(job: OfflineJob, way: Way) -> str:
    """Return a job and its way of working in a few words: 'batch: vLLM, 4 GPUs (TP 4)'."""
    if way.backend.startswith(TRAINING):
        stage = way.plan.split(",", 1)[0]
        return f"{job.name}: {stage}, {plural(way.n_gpus, 'GPU')}"
    return f"{job.name}: {engine_of(way)}, {way.plan or plural(way.n_gpus, 'GPU')}"


def gpus_by_way(plan: MixedPlan, jobs: Sequence[OfflineJob]) -> dict[str, list[int]]:
    """Return the GPUs of each hour that each job has in each of its ways, ways not taken left out."""
    found: dict[str, list[int]] = {}
    for job in jobs:
        for i, way in enumerate(job.ways):
            counts = [hour.job_groups[job.name][i] * way.n_gpus for hour in plan.hours]
            if any(counts):
                name = name_of(job, way)
                before = found.get(name, [0] * len(counts))
                found[name] = [a + b for a, b in zip(before, counts, strict=True)]
    return found


def hours_text(groups: Sequence[int]) -> str:
    """Return in which hours groups work: '0 to 2, 22 to 23', with their number where it is not one throughout.

    >>> hours_text([1, 1, 1, 0, 1])
    '0 to 2, 4'
    >>> hours_text([2, 2, 1, 0])
    '0 to 1 (2 groups), 2 (1 group)'
    """
    spans: list[list[int]] = []
    for hour, n in enumerate(groups):
        if n and spans and spans[-1][1] == hour - 1 and spans[-1][2] == n:
            spans[-1][1] = hour
        elif n:
            spans.append([hour, hour, n])
    is_one = all(n == 1 for *_, n in spans)
    texts = []
    for first, last, n in spans:
        span = f"{first} to {last}" if last > first else f"{first}"
        texts.append(span if is_one else f"{span} ({plural(n, 'group')})")
    return ", ".join(texts)


def around(answer: MixedAnswer, jobs: Sequence[OfflineJob], switch_s: float) -> list[str]:
    """Return what an answer says of the two ways to divide the GPUs, without what `work` shows of each job."""
    best = answer.plan(answer.best)
    told = {line for job in jobs for line in worked_how(best, job, switch_s)}
    return [line for line in answer.why if line not in told]


def work(plan: MixedPlan, jobs: Sequence[OfflineJob], switch_s: float) -> None:
    """Show who does the offline work: a row a way that is taken, with its hours and its reason, then the others.

    switch_s : what a start is taken to lose [s]
    """
    if not jobs:
        return
    st.subheader("Who does the offline work, and when")
    rows: list[dict[str, Any]] = []
    taken: list[str] = []
    left_out: list[str] = []
    for job in jobs:
        found = ways_used(plan, job, switch_s)
        taken.append(_ending(plan, job, switch_s))
        for used in found:
            where = f"**{plain(name_of(job, used.way))}**"
            if not used.gpu_hours:
                left_out.append(f"{where}: {clause(used.why)}.")
                continue
            rows.append(_row(plan, job, used))
            if used.why:
                taken.append(f"{where}: {clause(used.why)}.")
    if rows:
        parts.table(rows, {"tokens": partial(show, "_tokens"), "a GPU": partial(show, "tokens_per_s")}, "shifts")
    left, right = st.columns(2)
    with left:
        parts.listed("When it is done, and why so", taken, height=LIST_PX)
    with right:
        parts.listed("Ways not taken, and why", left_out, height=LIST_PX)


def _row(plan: MixedPlan, job: OfflineJob, used: Used) -> dict[str, Any]:
    i = job.ways.index(used.way)
    return {
        "job": job.name,
        "in hours": hours_text([h.job_groups[job.name][i] for h in plan.hours]),
        "GPU hours": used.gpu_hours,
        "engine": engine_of(used.way),
        "plan of a group": used.way.plan,
        "a GPU": used.way.tokens_per_s / used.way.n_gpus,
    }


def _ending(plan: MixedPlan, job: OfflineJob, switch_s: float) -> str:
    """Return a line on when a job ends, or what is undone at its deadline, and on its starts."""
    if not any(any(h.job_groups[job.name]) for h in plan.hours):
        return f"{sentence(worked_how(plan, job, switch_s)[0])}."
    late, end = plan.shortfall_tokens.get(job.name, 0.0), plan.finish_hour.get(job.name)
    undone = f"{show('_tokens', late)} of {show('_tokens', job.total_tokens)} undone at hour {job.deadline_hour}"
    text = undone if late else f"done at hour {end:.1f}, due at hour {job.deadline_hour}"
    starts = sum(h.job_starts[job.name] for h in plan.hours)
    counted = f"; {plural(starts, 'start')} of {format_s(switch_s)} counted" if starts else ""
    return f"**{plain(job.name)}**: {clause(text + counted)}."
