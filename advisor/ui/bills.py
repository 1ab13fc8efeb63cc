"""The money and the power of a day's plan: a month's bill by provider, energy, emissions, power limits, racks."""

from __future__ import annotations

import streamlit as st

from advisor.recommend.power import Terms
from advisor.schema import Interval, Request
from advisor.schema.mixed import MixedPlan
from advisor.schema.month import Month
from advisor.schema.power import LimitRow, PowerReport, RackFit
from advisor.ui import charts, charts_plans, parts
from advisor.ui.text import HELP, plain, sentence, show

HOSTED = "hosted_usd_per_month"
MONEY = {
    "usd_per_h": "An hour",
    "usd_per_month": "A month",
    "usd_per_year": "A year",
    "usd_per_1000_requests": "1000 requests",
    "usd_per_million_tokens": "1M tokens, input and output",
    "usd_per_million_output_tokens": "1M output tokens, bearing the whole bill",
    "split_usd_per_million_input_tokens": "1M input tokens, bill split by energy",
    "split_usd_per_million_output_tokens": "1M output tokens, bill split by energy",
    HOSTED: "The same tokens at the hosted API, a month",
}
ENERGY = {
    "power_w": ("Power", "W"),
    "energy_j_per_output_token": ("An output token", "J"),
    "energy_j_per_request": ("A request", "J"),
    "prefill_energy_j_per_request": ("Prefill of a request", "J"),
    "decode_energy_j_per_output_token": ("Decode of an output token", "J"),
    "energy_wh_per_1000_requests": ("1000 requests", "Wh"),
    "kgco2e_per_1000_requests": ("Emissions, 1000 requests", "kg CO2e"),
    "kgco2e_per_million_output_tokens": ("Emissions, 1M output tokens", "kg CO2e"),
}


def _amount(interval: Interval, unit: str) -> str:
    """Return an amount with its 90 % interval, such as '1,085 kWh (1,005 to 1,166)'."""

    def one(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    if interval.low == interval.high:
        return f"{one(interval.value)} {unit}"
    return f"{one(interval.value)} {unit} ({one(interval.low)} to {one(interval.high)})"


def _shown(name: str, interval: Interval) -> str:
    unit = ENERGY[name][1]
    if unit not in ("J", "W"):
        return _amount(interval, unit)
    return f"{show(unit, interval.value)} ({show(unit, interval.low)} to {show(unit, interval.high)})"


def money(month: Month, plan: MixedPlan, report: PowerReport, terms: Terms) -> None:
    """Show what a month of the day costs at every provider, and a token at the peak."""
    best = month.bills[0] if month.bills else None
    columns = st.columns(3)
    if best is not None:
        parts.metric(
            columns[0],
            "Cheapest rent, a month",
            show("usd", best.usd_per_month),
            f"{best.provider}, {best.kind}",
            "All GPUs of the plan, day and night.",
        )
        parts.metric(
            columns[1],
            "The same, only hours in use",
            show("usd", best.usd_per_month_following),
            f"{month.gpu_hours_per_day:,.0f} GPU hours a day",
            "Where GPUs can be given back whenever the day leaves them idle.",
        )
    else:
        parts.metric(columns[0], "Rent", "no price known", "give your own in the side bar", HELP["usd_per_h"])
    if month.own_usd is not None:
        text = "The price over the years of use, a month of it."
        parts.metric(
            columns[2], "Own hardware, a month", show("usd", month.own_usd), "with its electricity where given", text
        )
    elif month.electricity_usd is not None:
        e = month.electricity_usd
        text = f"{show('usd', e.low)} to {show('usd', e.high)}"
        parts.metric(columns[2], "Electricity, a month", show("usd", e.value), text, HELP["pue"])
    if not plan.meets_all:
        st.warning("These GPUs do not do it all; the bill is for them nevertheless. The day's view says why.")
    if month.bills:
        st.subheader(f"Rent of {month.n_gpus} GPUs for a month, by provider")
        parts.chart(charts_plans.rents(month.bills), "rents", "Rent of a month by provider and kind of price")
        rows = [
            {
                "provider": b.provider,
                "kind": b.kind,
                "region": b.region,
                "a GPU hour": b.usd_per_gpu_h,
                "a month, day and night": b.usd_per_month,
                "a month, hours in use": b.usd_per_month_following,
                "price read": b.date,
            }
            for b in month.bills
        ]
        dollars = "${:,.2f}".format
        names = ("a GPU hour", "a month, day and night", "a month, hours in use")
        parts.table(rows, dict.fromkeys(names, dollars), "bills", parts.BILLS_PX)
        st.caption("A month has 730 hours. Spot GPUs can be taken away at any time; a price is one zone's at one time.")
    _at_peak(report, terms)
    parts.downloads(
        {
            "Month (JSON)": ("month.json", "application/json", month.model_dump_json(indent=1)),
            "Bills (CSV)": ("bills.csv", "text/csv", parts.to_csv([b.model_dump() for b in month.bills])),
            "Bill at the peak (JSON)": ("power.json", "application/json", report.model_dump_json(indent=1)),
        },
        "money",
    )


def _at_peak(report: PowerReport, terms: Terms) -> None:
    found = report.money
    st.subheader("What a token costs at the load of the peak")
    rows = [
        {"what": text, "cost": _usd(found[name]) if name in found else "no such price known"}
        for name, text in MONEY.items()
        if name in found or name != HOSTED
    ]
    parts.text_table(rows, "peak-bill")
    if "break_even_load_frac" in found:
        share, rate = found["break_even_load_frac"].value, found["break_even_requests_per_s"].value
        most = report.plan.prediction.quantities.get("saturation_requests_per_s")
        if share <= 1:
            text = f"Cheaper than the hosted API from {share:.0%} of this load on, {show('requests_per_s', rate)}."
        elif most is not None and rate > most.value:
            text = (
                f"The hosted API is cheaper: break-even is at {show('requests_per_s', rate)}, and these GPUs serve"
                f" {show('requests_per_s', most.value)} at most."
            )
        else:
            text = f"The hosted API is cheaper below {show('requests_per_s', rate)}, {share:.1f} times this load."
        st.markdown(f"- {plain(text)}")
    if "pay_back_years" in found:
        years = found["pay_back_years"].value
        st.markdown(f"- Against renting, hardware of your own pays back after {years:.2g} years.")
    if terms.capex_usd_per_gpu is not None:
        parts.notes(n for n in report.notes if "electricity" in n.text)


def _usd(interval: Interval) -> str:
    value = show("usd", interval.value)
    return (
        value
        if interval.low == interval.high
        else (f"{value} ({show('usd', interval.low)} to {show('usd', interval.high)})")
    )


def power(month: Month, plan: MixedPlan, report: PowerReport, request: Request) -> None:
    """Show energy and emissions of the month, power over the day, power limits of a board and racks."""
    columns = st.columns(3)
    parts.metric(columns[0], "Boards, a month", *_apart(month.board_kwh, "kWh"), HELP["power"])
    text = f"Whole nodes, with CPUs, fans and network cards, times the PUE of {request.pue:g}."
    parts.metric(columns[1], "Facility, a month", *_apart(month.facility_kwh, "kWh"), text)
    if month.kgco2e is not None:
        parts.metric(columns[2], "Emissions, a month", *_apart(month.kgco2e, "kg CO2e"), HELP["grid"])
    elif month.electricity_usd is not None:
        e = month.electricity_usd
        text = f"{show('usd', e.low)} to {show('usd', e.high)}"
        parts.metric(columns[2], "Electricity, a month", show("usd", e.value), text, HELP["pue"])
    else:
        parts.metric(columns[2], "Emissions, a month", "no grid chosen", "choose one in the side bar", HELP["grid"])
    st.subheader("Power of the boards over the day")
    hours = [h.hour for h in plan.hours]
    lines = {"all boards": list(month.board_power_w)}
    if request.power_cap_w is not None:
        lines["power cap"] = [request.power_cap_w] * len(hours)
    figure = charts.over_hours(hours, lines, "mean power [W]")
    parts.chart(figure, "day-power", "Mean power of all boards by hour")
    peak = max(month.board_power_w)
    if request.power_cap_w is not None and peak > request.power_cap_w:
        st.warning(
            f"In its busiest hour the day draws {show('W', peak)} in the mean, more than the cap of"
            f" {show('W', request.power_cap_w)}. The cap limits one plan; offline work comes on top."
        )
    _limits(report)
    _rack(report.rack)
    st.subheader("Energy at the peak's load")
    rows = [
        {"what": text, "boards": _shown(n, report.energy[n]), "whole nodes": _shown(n, report.node_energy[n])}
        for n, (text, _) in ENERGY.items()
        if n in report.energy
    ]
    parts.text_table(rows, "energy")
    if report.board_power is not None:
        figure = charts.stacked({"board power": report.board_power})
        parts.chart(figure, "board-power", "Parts of the board power")
    parts.notes(report.notes)
    limits = [r.model_dump(exclude={"latency_s"}) | r.latency_s for r in report.limits]
    parts.downloads(
        {
            "Power (JSON)": ("power.json", "application/json", report.model_dump_json(indent=1)),
            "Power limits (CSV)": ("limits.csv", "text/csv", parts.to_csv(limits)),
            "Month (JSON)": ("month.json", "application/json", month.model_dump_json(indent=1)),
        },
        "power",
    )


def _apart(interval: Interval, unit: str) -> tuple[str, str]:
    return f"{interval.value:,.0f} {unit}", f"{interval.low:,.0f} to {interval.high:,.0f} {unit}"


def _limits(report: PowerReport) -> None:
    if not report.limits:
        return
    st.subheader("Power limit of a board: slower, but fewer joules a token", help=HELP["power_limit"])
    marks = {}
    if report.best_slo_limit_w is not None:
        marks["best within load and targets"] = report.best_slo_limit_w
    parts.chart(
        charts_plans.power_limits(report.limits, marks),
        "limits",
        "Energy per output token and speed against the power limit of a board",
    )
    st.markdown(f"- {sentence(advice(report))}")
    st.caption("Open marks miss a target or the load. The same requests are replayed at each limit.")


def advice(report: PowerReport) -> str:
    """Return what limit to set, or why none, as a sentence."""
    own = report.limits[-1]
    best: LimitRow | None = next((r for r in report.limits if r.limit_w == report.best_slo_limit_w), None)
    if best is None:
        return "No limit to recommend: " + (
            "the load is more than it can serve." if own.is_saturated else "the targets are missed without one too."
        )
    if best.clock_frac >= 1.0 or best is own:
        drawn = show("W", own.board_power_w / report.plan.deployment.n_gpus)
        return f"No lower limit at a measured clock saves energy of whole nodes: a board draws {drawn} at this load."
    boards = 1.0 - best.energy_j_per_output_token / own.energy_j_per_output_token
    nodes = 1.0 - best.node_energy_j_per_output_token / own.node_energy_j_per_output_token
    return (
        f"A limit of {show('W', best.limit_w)} saves {boards:.0%} of the boards' energy a token ({nodes:.0%} with the"
        f" node) and slows steps to {show('_frac', best.speed_frac)} of their speed; load and targets hold."
    )


def _rack(rack: RackFit | None) -> None:
    st.subheader("A rack" if rack is None else f"A rack of {show('W', rack.rack_w)}")
    columns = st.columns(3)
    text = "Each is reserved its boards' limits and the upper end of the rest of a node: a breaker does not average."
    if rack is None:
        parts.metric(columns[0], "Nodes", "no rack given", "give its power in the side bar", text)
        return
    parts.metric(columns[0], f"Nodes of {rack.gpus_per_node} GPUs", f"{rack.n_nodes:,}", None, text)
    parts.metric(
        columns[1],
        "Such deployments",
        f"{rack.n_deployments:,}",
        f"{show('W', rack.node_reserve_w)} a node",
        "Deployments of this plan's size that the rack's nodes hold.",
    )
    rate = show("output_tokens_per_s", rack.output_tokens_per_s)
    parts.metric(columns[2], "Output tokens together", rate, None, HELP["throughput"])
    if rack.n_nodes_at_best_limit is not None and rack.best_limit_w is not None:
        st.caption(f"With boards limited to {rack.best_limit_w:.0f} W it feeds {rack.n_nodes_at_best_limit:,} nodes.")
