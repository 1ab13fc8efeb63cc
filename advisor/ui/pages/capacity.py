"""Capacity: how many GPUs a day's traffic needs, hour by hour, and what offline work fits beside it."""

from __future__ import annotations

import streamlit as st

from advisor.catalog import load_catalog
from advisor.recommend.day import Day, DayPlan, Offline
from advisor.schema.mixed import MixedPlan
from advisor.ui import call, charts, inputs, parts, state
from advisor.ui.command import mixed_words, shell
from advisor.ui.text import plain, show

BATCH, TRAINING, BOTH = "batch", "training", "both"
SHARE, SPLIT = "shared by the hour", "split for the day"


def render() -> None:
    """Show the page."""
    st.title("One GPU budget over a day")
    request = inputs.scenario(has_load=False)
    day, wanted = _inputs()
    request = request.model_copy(update={"rate": day.peak_requests_per_s})
    found = call.day_plan(request, day, wanted)
    chosen = found.answer.plan(found.answer.best)
    st.markdown(
        f"One replica is **{plain(charts.layout(found.replica))}** and carries"
        f" **{plain(show('requests_per_s', found.need.capacity_requests_per_s))}** within the latency targets."
    )
    parts.sentences("What to do", found.answer.why)
    _headline(chosen, found)
    _hours(found)
    parts.notes(chosen.notes)
    rows = [h.model_dump(exclude={"job_gpus", "job_tokens"}) | h.job_gpus for h in chosen.hours]
    parts.downloads(
        {
            "Schedule (JSON)": ("schedule.json", "application/json", found.model_dump_json(indent=1)),
            "Hours (CSV)": ("hours.csv", "text/csv", parts.to_csv(rows)),
        },
        "capacity",
    )
    parts.equal_command(shell(mixed_words(request, day, wanted)))
    parts.glossary("ttft", "tpot", "tp", "dp", "slo")


def _inputs() -> tuple[Day, Offline]:
    """Return the day's traffic and the offline work of the side bar."""
    with st.sidebar:
        st.markdown("**The day**")
        peak = state.number("peak", "Peak [requests/s]", default=2.0, low=0.001, high=1e6)
        night = state.number("night", "Lowest hour [share of the peak]", default=0.2, low=0.0, high=1.0)
        hour = state.whole("peak_hour", "Busiest hour [0 to 23]", default=14, low=0, high=23)
        headroom = state.number(
            "headroom", "Headroom [share]", default=0.2, low=0.0, high=0.9, help="Capacity kept free for bursts."
        )
        kind = state.segments("offline", "Offline work", (BATCH, TRAINING, BOTH), default=BATCH)
        fields: dict[str, object] = {}
        if kind != TRAINING:
            fields["batch_tokens"] = state.whole("batch_tokens", "Batch [tokens]", default=50_000_000, high=10**15)
            fields["batch_deadline"] = state.whole("batch_deadline", "Batch done by hour", default=24, high=24 * 31)
        if kind != BATCH:
            fields["train_tokens"] = state.whole("train_tokens", "Train on [tokens]", default=100_000_000, high=10**15)
            fields["train_deadline"] = state.whole("train_deadline", "Training done by hour", default=24, high=24 * 31)
            fields["train_gpus"] = state.whole("train_gpus", "GPUs of the training job", default=4, high=1024)
            models = list(load_catalog().models())
            typed = state.choice("job_model", "Model to train", models, default="llama-3.1-8b", free=True)
            fields["train_model"] = state.catalogue_name(typed, "model")
    day = Day(peak_requests_per_s=peak, night_frac=night, peak_hour=float(hour), headroom_frac=headroom)
    return day, Offline.model_validate(fields)


def _headline(plan: MixedPlan, found: DayPlan) -> None:
    columns = st.columns(4)
    fewest = "none up to 4,096" if plan.min_gpus is None else f"{plan.min_gpus}"
    columns[0].metric("Fewest GPUs that do it all", fewest, border=True, height="stretch")
    columns[1].metric(
        f"Rent of these {len(plan.hours)} h",
        show("usd", plan.usd) if found.usd_per_gpu_h else "no price known",
        border=True,
        height="stretch",
    )
    columns[2].metric("Energy at the boards", show("energy_j", plan.energy_j), border=True, height="stretch")
    columns[3].metric("Idle", f"{plan.idle_gpu_hours:,.0f} GPU hours", border=True, height="stretch")


def _hours(found: DayPlan) -> None:
    titles = {"share": SHARE, "split": SPLIT}
    best = titles[found.answer.best]
    shown = state.segments(
        "mode",
        "How the GPUs are divided",
        (SHARE, SPLIT),
        default=best,
        help="Shared: replicas follow the load, offline work takes what they free. Split: the peak's replicas stay up.",
    )
    plan = found.answer.plan("share" if shown == SHARE else "split")
    gpus = {"serving": [h.serving_gpus for h in plan.hours]}
    gpus |= {job.name: [h.job_gpus.get(job.name, 0) for h in plan.hours] for job in found.jobs}
    gpus["idle"] = [h.idle_gpus for h in plan.hours]
    parts.chart(charts.hours([str(h.hour) for h in plan.hours], gpus, plan.n_gpus), "hours", "GPUs by use and hour")
    load = {"arriving": [found.need.requests_per_s[h.hour % 24] for h in plan.hours]}
    st.subheader("Load of the day")
    hours = [h.hour for h in plan.hours]
    parts.chart(charts.over_hours(hours, load, "requests/s"), "day", "Requests per second by hour")
