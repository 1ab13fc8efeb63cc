"""Capacity: the GPUs that a day's traffic needs, what a month of it costs, draws and emits, the best power limit."""

from __future__ import annotations

from functools import partial
from typing import Any

import streamlit as st

from advisor.catalog import load_catalog
from advisor.predict.bill import HostedPrice
from advisor.recommend.day import Day, DayPlan, Offline
from advisor.recommend.hybrid import daily_load, replicas_needed
from advisor.recommend.power import Terms
from advisor.schema import Request
from advisor.schema.mixed import HOURS, MixedPlan
from advisor.ui import bills, call, charts, inputs, later, parts, shifts, state
from advisor.ui.command import mixed_words, power_words, shell
from advisor.ui.text import plain, sentence, show
from advisor.units import J_PER_KWH

NONE, BATCH, TRAINING, BOTH = "none", "batch", "training", "both"
SHARE, SPLIT = "shared by the hour", "split for the day"
DAY, MONEY, POWER = "The day", "Money", "Power and energy"
FIELDS = ("tp", "pp", "weight_dtype", "kv_dtype", "max_num_seqs", "max_num_batched_tokens")


def render() -> None:
    """Show the page."""
    st.title("A day's traffic: GPUs, money, power")
    view = state.segments("view", "Show", (DAY, MONEY, POWER), default=DAY, help="Three views of the same day.")
    request = inputs.scenario(has_load=False, is_money_open=view != DAY)
    day, wanted = _inputs()
    request = request.model_copy(update={"rate": day.peak_requests_per_s})
    # a place of its own for each view: none moves what another one had there
    with st.container(key=f"view-{view.split()[-1].lower()}"):
        _view(view, request, day, wanted)


def _view(view: str, request: Request, day: Day, wanted: Offline) -> None:
    terms = _terms(view)
    found, key = call.day_plan(request, day, wanted)
    if found is None:
        _load_alone(day, key)
        return
    st.markdown(
        f"One replica is **{plain(charts.layout(found.replica))}** and carries"
        f" **{plain(show('requests_per_s', found.need.capacity_requests_per_s))}** within the latency targets."
    )
    commands = [shell(mixed_words(request, day, wanted))]
    if view == DAY:
        _day(found, request)
    else:
        chosen = at_peak(found)
        report = call.power(request, chosen, terms)
        if view == MONEY:
            mode = _mode(found)
            bills.money(call.month(request, found, mode.mode, terms), mode, report, terms)
        else:
            mode = found.answer.plan(found.answer.best)
            bills.power(call.month(request, found, mode.mode, terms), mode, report, request)
        commands.append(shell(power_words(request, chosen, terms)))
    words = ("ttft", "tpot", "tp", "dp", "slo", "way", "zero_inference", "pue", "grid", "power_limit", "price_kind")
    parts.glossary(*words, "interval")
    parts.equal_command("\n".join(commands))


def _load_alone(day: Day, key: str) -> None:
    """Show what is known before the day is planned."""
    later.fill_in(key, "The day is being planned: which replica, what it carries, what the free GPUs can do ...")
    st.subheader("Load of the day")
    rates = daily_load(day.peak_requests_per_s, night_frac=day.night_frac, peak_hour=day.peak_hour)
    figure = charts.over_hours(list(range(HOURS)), {"arriving": list(rates)}, "requests/s")
    parts.chart(figure, "load-alone", "Requests per second by hour")


def _inputs() -> tuple[Day, Offline]:
    """Return the day's traffic and the offline work of the side bar."""
    with st.sidebar:
        st.markdown("**The day**")
        peak = state.number(
            "peak", "Peak [requests/s]", default=2.0, low=0.001, high=1e6, help="Arrivals in the busiest hour."
        )
        night = state.number(
            "night",
            "Lowest hour [share of the peak]",
            default=0.2,
            low=0.0,
            high=1.0,
            help="The day between the lowest and the busiest hour is a smooth wave.",
        )
        hour = state.whole("peak_hour", "Busiest hour [0 to 23]", default=14, low=0, high=23, help="Of the day.")
        headroom = state.number(
            "headroom", "Headroom [share]", default=0.2, low=0.0, high=0.9, help="Capacity kept free for bursts."
        )
        kind = state.segments(
            "offline",
            "Offline work",
            (NONE, BATCH, TRAINING, BOTH),
            default=BATCH,
            help="Work without users that wait, done on the GPUs that the day leaves free.",
        )
        fields: dict[str, object] = {}
        if kind in (BATCH, BOTH):
            fields["batch_tokens"] = state.whole(
                "batch_tokens", "Batch [tokens]", default=50_000_000, high=10**15, help="Prompt and output tokens."
            )
            fields["batch_deadline"] = state.whole(
                "batch_deadline", "Batch done by hour", default=24, high=24 * 31, help="Counted from hour 0."
            )
        if kind in (TRAINING, BOTH):
            fields["train_tokens"] = state.whole(
                "train_tokens", "Train on [tokens]", default=100_000_000, high=10**15, help="Of the whole job."
            )
            fields["train_deadline"] = state.whole(
                "train_deadline", "Training done by hour", default=24, high=24 * 31, help="Counted from hour 0."
            )
            fields["train_gpus"] = state.whole(
                "train_gpus", "GPUs of the training job", default=4, high=1024, help="All within one node."
            )
            models = list(load_catalog().models())
            typed = state.choice(
                "job_model", "Model to train", models, default="llama-3.1-8b", free=True, help="Trained with DeepSpeed."
            )
            fields["train_model"] = state.catalogue_name(typed, "model")
    day = Day(peak_requests_per_s=peak, night_frac=night, peak_hour=float(hour), headroom_frac=headroom)
    return day, Offline.model_validate(fields)


def _terms(view: str) -> Terms:
    """Return what the user pays and compares with; raises DomainError with a sentence."""
    if view == DAY:
        return Terms()
    fields: dict[str, Any] = {}
    if view == POWER:
        with st.sidebar:
            kw = state.maybe_number(
                "rack", "Power of one rack [kW]", high=1e4, hint="not asked", help="How many nodes it feeds."
            )
        return Terms(rack_w=kw * 1e3 if kw is not None else None)
    with st.expander("Own hardware, or a hosted API to compare with"):
        one, two, three = st.columns(3)
        with one:
            fields["capex_usd_per_gpu"] = state.maybe_number(
                "capex", "Own GPU [$]", high=1e6, hint="rented", help="With its share of the node and network."
            )
            fields["years"] = state.number(
                "years", "Years of use", default=4.0, low=0.1, high=50.0, help="Until it is replaced."
            )
        with two:
            fields["utilization_frac"] = state.number(
                "use",
                "Hours with this load [share]",
                default=1.0,
                low=0.001,
                high=1.0,
                help="Share of the paid hours in which the peak's load is on, for the costs a token.",
            )
        with three:
            hosted_in = state.maybe_number(
                "hosted_in", "Hosted API, input [$/1M tokens]", high=1e4, hint="none", help="Give both prices."
            )
            hosted_out = state.maybe_number(
                "hosted_out", "Hosted API, output [$/1M tokens]", high=1e4, hint="none", help="Give both prices."
            )
    if hosted_in is not None and hosted_out is not None:
        fields["hosted"] = HostedPrice(hosted_in, hosted_out)
    elif hosted_in is not None or hosted_out is not None:
        st.info("A hosted API has two prices: give the one for input and the one for output tokens.")
    return Terms(**fields)


def at_peak(found: DayPlan) -> dict[str, Any]:
    """Return the deployment of the busiest hour: as many replicas as it needs, or as the GPUs hold."""
    plan, need = found.answer.plans[0], found.need
    wanted = max(replicas_needed(need, hour) for hour in range(HOURS))
    most = max(1, plan.n_gpus // need.gpus_per_replica)
    return {key: getattr(found.replica, key) for key in FIELDS} | {"dp": max(1, min(wanted, most))}


def _mode(found: DayPlan) -> MixedPlan:
    titles = {"share": SHARE, "split": SPLIT}
    shown = state.segments(
        "mode",
        "How the GPUs are divided",
        (SHARE, SPLIT),
        default=titles[found.answer.best],
        help="Shared: replicas follow the load, offline work takes what they free. Split: the peak's replicas stay up.",
    )
    return found.answer.plan("share" if shown == SHARE else "split")


def _day(found: DayPlan, request: Request) -> None:
    plan = _mode(found)
    _headline(plan, found)
    ways = shifts.gpus_by_way(plan, found.jobs)
    gpus = {"serving": [h.serving_gpus for h in plan.hours]} | ways
    gpus["idle"] = [h.idle_gpus for h in plan.hours]
    parts.chart(charts.hours([str(h.hour) for h in plan.hours], gpus, plan.n_gpus), "hours", "GPUs by use and hour")
    hours = [h.hour for h in plan.hours]
    st.subheader("Load of the day")
    load = {
        "arriving": [found.need.requests_per_s[h % HOURS] for h in hours],
        "what the replicas carry": [h.n_replicas * found.need.capacity_requests_per_s for h in plan.hours],
    }
    parts.chart(charts.over_hours(hours, load, "requests/s"), "day", "Requests per second by hour, and the capacity")
    shifts.work(plan, found.jobs, found.restart_s)
    left, right = st.columns(2)
    with left:
        around = shifts.around(found.answer, found.jobs, found.restart_s)
        parts.listed("The two ways to divide the GPUs", map(sentence, around), height=shifts.LIST_PX)
    with right:
        st.subheader("Remarks")
        parts.notes(plan.notes, shifts.LIST_PX)
    left_out = {"job_gpus", "job_groups", "job_starts", "job_tokens"}
    rows = [h.model_dump(exclude=left_out) | {name: ways[name][i] for name in ways} for i, h in enumerate(plan.hours)]
    parts.downloads(
        {
            "Schedule (JSON)": ("schedule.json", "application/json", partial(found.model_dump_json, indent=1)),
            "Hours (CSV)": ("hours.csv", "text/csv", parts.to_csv(rows)),
            "Month (JSON)": ("month.json", "application/json", partial(_month_json, found, request, plan.mode)),
        },
        "capacity",
    )


def _month_json(found: DayPlan, request: Request, mode: str) -> str:
    return call.month(request, found, mode, Terms()).model_dump_json(indent=1)


def _headline(plan: MixedPlan, found: DayPlan) -> None:
    columns = st.columns(4)
    fewest = "none up to 4,096" if plan.min_gpus is None else f"{plan.min_gpus}"
    text = "The smallest pool with which serving keeps its targets and the offline work its deadline."
    parts.metric(columns[0], "Fewest GPUs", fewest, f"of {plan.n_gpus} given", text)
    rent = show("usd", plan.usd) if found.usd_per_gpu_h else "no price known"
    text = f"All {plan.n_gpus} GPUs for these hours, at the price of the side bar."
    each = show("usd_per_gpu_h", found.usd_per_gpu_h) if found.usd_per_gpu_h else "give one in the side bar"
    parts.metric(columns[1], f"Rent of these {len(plan.hours)} h", rent, each, text)
    kwh, text = f"{plan.energy_j / J_PER_KWH:,.3g} kWh", "Of all GPUs over these hours."
    parts.metric(columns[2], "Energy at the boards", kwh, show("energy_j", plan.energy_j), text)
    text = "Hours of single GPUs in which they have nothing to do."
    every = f"of {plan.n_gpus * len(plan.hours):,}"
    parts.metric(columns[3], "Idle", f"{plan.idle_gpu_hours:,.0f} GPU hours", every, text)
