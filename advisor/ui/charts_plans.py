"""Charts of plans: the Pareto cloud, the roofline with its operating points, power limits, rents, pipelines.

Data in, a plotly Figure out, as in `charts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from advisor.recommend.form import settled
from advisor.schema import Interval, Plan, Slo
from advisor.schema.month import CloudBill
from advisor.schema.power import LimitRow
from advisor.schema.roofline import OperatingPoint, Roofline
from advisor.ui import charts
from advisor.ui.memory import remembered
from advisor.ui.text import BACKENDS, label, plain_html, show, show_range

ENERGY = "energy_j_per_output_token"
SCALE = [[0.0, charts.COLOURS[0]], [0.5, "#A0A0A0"], [1.0, charts.COLOURS[4]]]
"""Colours of the third axis, low to high: blue to orange, apart for any colour vision and on white and black."""


def value_of(plan: Plan, name: str) -> Interval | None:
    """Return a quantity of a plan, its rent too; None where the plan lacks it or where it grows without end."""
    if name == "usd_per_h" and plan.usd_per_h:
        return Interval(value=plan.usd_per_h, low=plan.usd_per_h, high=plan.usd_per_h)
    return settled(plan.prediction).get(name)


def _whiskers(intervals: Sequence[Interval]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.value for i in intervals],
        "arrayminus": [i.value - i.low for i in intervals],
        "thickness": 1,
        "width": 2,
        "color": charts.GREY,
    }


def _hover(plan: Plan, names: Sequence[str]) -> str:
    lines = [f"<b>{plan.rank}. {plain_html(charts.plan_name(plan))}</b>"]
    lines += [f"{label(n)} {show(n, v.value)} ({show_range(n, v)})" for n in names if (v := value_of(plan, n))]
    kept = "keeps the targets" if plan.meets_slo else "misses a target"
    return "<br>".join([*lines, "overload: waiting grows without end" if plan.prediction.is_saturated else kept])


@remembered
def pareto(plans: Sequence[Plan], x: str, y: str, slo: Slo, third: str = "") -> go.Figure:
    """Return the cloud of plans, one shape an engine, with 90 % intervals, the front and the targets.

    x, y  : names of quantities of the predictions, or 'usd_per_h'; plans that lack one are left out
    third : a quantity shown as colour; without it the colour tells the engine, as the shape does
    """
    figure = go.Figure()
    shown = [(p, a, b) for p in plans if (a := value_of(p, x)) is not None and (b := value_of(p, y)) is not None]
    names = list(dict.fromkeys((x, y, third or ENERGY)))
    for backend, (colour, shape) in charts.BACKEND_STYLE.items():
        mine = [point for point in shown if point[0].backend == backend]
        known = [point for point in mine if third and (v := value_of(point[0], third)) is not None and v.value > 0]
        unknown = [point for point in mine if point not in known]
        for points in filter(None, (known, unknown)):
            marker: dict[str, object] = {
                "symbol": [shape if p.meets_slo else f"{shape}-open" for p, _, _ in points],
                "size": [15 if p.is_pareto else 10 for p, _, _ in points],
            }
            if points is known:
                values = [math.log10(v.value) for p, _, _ in points if (v := value_of(p, third)) is not None]
                line = {"width": 2, "color": values, "coloraxis": "coloraxis"}
                marker |= {"color": values, "coloraxis": "coloraxis", "line": line}
            else:
                plain = charts.GREY if third else colour
                marker |= {"color": plain, "line": {"width": 2, "color": plain}}
            figure.add_scatter(
                x=[a.value for _, a, _ in points],
                y=[b.value for _, _, b in points],
                error_x=_whiskers([a for _, a, _ in points]),
                error_y=_whiskers([b for _, _, b in points]),
                mode="markers",
                marker=marker,
                text=[_hover(p, names) for p, _, _ in points],
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
            )
        if mine:  # the legend's own mark: a scale of colours has none that shows on white and on black
            key = {"symbol": shape, "size": 10, "color": charts.GREY if third else colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", name=BACKENDS[backend], marker=key)
    if third:
        bar = {
            "title": {**charts.axis(third)["title"], "side": "top"},  # type: ignore[dict-item]
            "tickvals": [math.log10(t) for t in charts.LOG_TICKS],
            "ticktext": [charts.tick(third, t) for t in charts.LOG_TICKS],
            "thickness": 10,
            "orientation": "h",
            "y": -0.24,
            "yanchor": "top",
        }
        figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": bar})
    for target in slo.targets:
        name = f"{target.name}_s"
        text = f"{target.metric.upper()} {target.statistic.upper()} at most {show('s', target.max_s)}"
        if name in (x, y):
            charts.line_at(figure, target.max_s, text, charts.COLOURS[1], is_x=name == x)
    aims = {f"{t.name}_s": [t.max_s] for t in slo.targets}
    across, up = [a for _, a, _ in shown], [b for _, _, b in shown]
    for name, found, update in ((x, across, figure.update_xaxes), (y, up, figure.update_yaxes)):
        ends = [end for interval in found for end in (interval.low, interval.high)] + aims.get(name, [])
        update(charts.axis(name, is_log=True) | (charts.reach(min(ends), max(ends)) if ends else {}))
    return charts.laid_out(figure, height=540 if third else 460)


@remembered
def roofline(found: Roofline, name: str) -> go.Figure:
    """Return a card's roof, what kernels reach of it, and where prefill and decode lie under it.

    name : of the card
    """
    every = [p.flops_per_byte for p in (*found.points, *found.prefill, *found.decode)]
    low, high = min(*every, 1.0) / 1.6, max(*every, found.ridge_flops_per_byte) * 1.6
    figure = go.Figure()
    roofs = (
        (f"{plain_html(name)}, datasheet", found.peak_flops_per_s, found.memory_bandwidth_bytes_per_s, "solid"),
        ("what kernels reach (fitted)", found.reached_flops_per_s, found.reached_bytes_per_s, "dot"),
    )
    for title, peak, bandwidth, dash in roofs:
        ridge = peak / bandwidth
        xs = [low, ridge, high]
        figure.add_scatter(
            x=xs,
            y=[min(peak, bandwidth * at) for at in xs],
            mode="lines",
            name=title,
            line={"color": charts.GREY, "width": 2.5 if dash == "solid" else 1.5, "dash": dash},
            hovertemplate=f"{title}: {show('flops_per_s', peak)}, {show('bytes_per_s', bandwidth)}"
            f"<br>ridge at {ridge:.0f} operations a byte<extra></extra>",
        )
    styles = {"prefill": (charts.COLOURS[4], "square"), "decode": (charts.COLOURS[0], "circle")}
    for title, trail in (("prefill", found.prefill), ("decode", found.decode)):
        colour, shape = styles[title]
        figure.add_scatter(
            x=[p.flops_per_byte for p in trail],
            y=[p.flops_per_s for p in trail],
            mode="lines+markers",
            name=f"{title}: {'longer prompts' if title == 'prefill' else 'larger batches'}",
            line={"color": colour, "width": 1},
            marker={"color": colour, "symbol": f"{shape}-open", "size": 6},
            text=[_operating(p) for p in trail],
            hovertemplate="%{text}<extra></extra>",
        )
    styles["whole run"] = (charts.COLOURS[1], "diamond")
    for point in found.points:
        colour, shape = styles[point.name]
        figure.add_scatter(
            x=[point.flops_per_byte],
            y=[point.flops_per_s],
            mode="markers",
            name=f"{point.name} at this load",
            marker={"color": colour, "symbol": shape, "size": 15, "line": {"width": 1.5, "color": "#FFFFFF"}},
            text=[_operating(point)],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_xaxes(
        {"type": "log", "title": {"text": "operational intensity [operations per byte]"}, "tickformat": "~g"}
    )
    figure.update_yaxes({"type": "log", "title": {"text": "operations of one GPU [FLOP/s]"}})
    steps = [(digit, n) for n in range(6, 19) for digit in (1, 2, 5)]
    texts = [f"{digit * 10 ** (n % 3)}{'MGTPE'[n // 3 - 2]}" for digit, n in steps]
    figure.update_yaxes(tickvals=[digit * 10.0**n for digit, n in steps], ticktext=texts)
    decades = [10.0**n for n in range(-3, 7)]
    figure.update_xaxes(tickvals=decades, ticktext=[f"{v:g}" for v in decades], tickangle=0)
    return charts.laid_out(figure, height=500).update_layout(
        legend={"y": -0.2, "yanchor": "top"}, margin={"t": 30, "l": 10, "r": 16, "b": 10}
    )


def _operating(p: OperatingPoint) -> str:
    host = "<br>the GPU waits for the host that launches the step" if p.is_host_bound else ""
    return (
        f"<b>{p.name}</b>: {plain_html(p.what)}<br>{show('flops_per_s', p.flops_per_s)} at"
        f" {p.flops_per_byte:.3g} operations a byte<br>{show('s', p.seconds)}{host}"
    )


@remembered
def power_limits(rows: Sequence[LimitRow], marks: Mapping[str, float]) -> go.Figure:
    """Return energy per token and speed against the power limit of a board.

    marks : words to a limit [W], drawn as vertical lines
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.58, 0.42])
    limits = [r.limit_w for r in rows]
    hover = [
        f"limit {show('W', r.limit_w)}: clock {show('_frac', r.clock_frac)}, speed {show('_frac', r.speed_frac)}"
        + "".join(f"<br>{label(n)} {show(n, r.latency_s[n])}" for n in ("ttft_p99_s", "tpot_p99_s") if n in r.latency_s)
        + ("<br>overload" if r.is_saturated else "<br>keeps load and targets" if r.meets_slo else "<br>misses a target")
        for r in rows
    ]
    lines = (
        ("boards", [r.energy_j_per_output_token for r in rows], 1, charts.COLOURS[0], "circle", "solid"),
        ("whole nodes", [r.node_energy_j_per_output_token for r in rows], 1, charts.COLOURS[2], "diamond", "dash"),
        ("speed of a step", [r.speed_frac for r in rows], 2, charts.COLOURS[1], "square", "solid"),
    )
    for title, values, row, colour, shape, dash in lines:
        figure.add_scatter(
            x=limits,
            y=values,
            mode="lines+markers",
            name=title,
            line={"color": colour, "width": 2, "dash": dash},
            marker={"symbol": [shape if r.meets_slo else f"{shape}-open" for r in rows], "size": 8},
            text=[
                f"<b>{title}: {show('J' if row == 1 else '_frac', v)}</b><br>{h}"
                for v, h in zip(values, hover, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
            row=row,
            col=1,
        )
    for words, limit in marks.items():
        charts.line_at(figure, limit, words, charts.GREY, is_x=True)
    figure.update_xaxes({"title": {"text": "power limit of one board [W]"}, "ticksuffix": "W"}, row=2, col=1)
    figure.update_yaxes({"title": {"text": "energy per output token [J]"}, "ticksuffix": "J"}, row=1, col=1)
    figure.update_yaxes({"title": {"text": "speed"}, "tickformat": ".0%"}, row=2, col=1)
    return charts.laid_out(figure, height=480).update_layout(
        legend={"y": -0.16, "yanchor": "top"}, margin={"t": 40, "l": 10, "r": 16, "b": 10}
    )


MIN_BILLS = 5
"""Bills for which the chart of rents has room: another kind of price has fewer."""


@remembered
def rents(bills: Sequence[CloudBill]) -> go.Figure:
    """Return a month's rent by provider and kind: GPUs kept day and night, and only those in use."""
    names = [f"{b.provider}, {b.kind}" for b in bills]
    figure = go.Figure()
    series = (
        ("day and night", [b.usd_per_month for b in bills], charts.COLOURS[0]),
        ("only the hours in use", [b.usd_per_month_following for b in bills], charts.COLOURS[4]),
    )
    for title, values, colour in series:
        figure.add_bar(
            y=[plain_html(n) for n in names],
            x=values,
            name=title,
            orientation="h",
            marker={"color": colour},
            text=[show("usd", v) for v in values],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"%{{y}}, {title}: %{{text}} a month<extra></extra>",
        )
    # a phone needs a quarter of the bar's width for the number behind the longest one
    most = max((b.usd_per_month for b in bills), default=1.0)
    figure.update_xaxes(range=[0, 1.3 * most])
    figure.update_xaxes({"title": {"text": "rent of a month [$]"}, "tickprefix": "$", "tickformat": "~s"})
    figure.update_yaxes(autorange="reversed")
    return charts.laid_out(figure, height=130 + 52 * max(MIN_BILLS, len(bills)), barmode="group", bargap=0.25)


MIN_STAGES = 4
"""Stages for which the chart of a pipeline has room, so that fewer of them change nothing below it."""


@remembered
def slots(rows: Sequence[tuple[str, str, float, float]]) -> go.Figure:
    """Return bars of (stage, kind, begin, end) in seconds on one line a stage, and the bubbles between them hatched."""
    figure = go.Figure()
    colours = {"forward": charts.COLOURS[0], "backward": charts.COLOURS[4]}
    every = [*rows, *bubbles(rows)]
    for kind in dict.fromkeys(k for _, k, _, _ in every):
        mine = [r for r in every if r[1] == kind]
        is_bubble = kind not in colours
        figure.add_bar(
            y=[stage for stage, _, _, _ in mine],
            x=[end - begin for _, _, begin, end in mine],
            base=[begin for _, _, begin, _ in mine],
            orientation="h",
            name=kind,
            marker={
                "color": "rgba(127,133,140,0.25)" if is_bubble else colours[kind],
                "pattern": {"shape": "/" if is_bubble else "", "fgcolor": charts.GREY, "size": 6},
                "line": {"width": 0.5, "color": "#FFFFFF" if not is_bubble else charts.GREY},
            },
            customdata=[end - begin for _, _, begin, end in mine],
            hovertemplate=f"%{{y}}: {kind}, %{{customdata:.3~s}}s from %{{base:.3~s}}s<extra></extra>",
        )
    figure.update_xaxes({"title": {"text": "time [s]"}, "tickformat": "~s", "ticksuffix": "s"})
    figure.update_yaxes(autorange="reversed")
    n_stages = max(MIN_STAGES, len({r[0] for r in rows}))
    return charts.laid_out(figure, height=150 + 30 * n_stages, barmode="overlay", bargap=0.15)


def bubbles(rows: Sequence[tuple[str, str, float, float]]) -> list[tuple[str, str, float, float]]:
    """Return the times in which a stage waits, between the first and the last pass of all stages."""
    if not rows:
        return []
    first, last = min(r[2] for r in rows), max(r[3] for r in rows)
    found = []
    for stage in dict.fromkeys(r[0] for r in rows):
        at = first
        for _, _, begin, end in sorted((r for r in rows if r[0] == stage), key=lambda r: r[2]):
            if begin > at + 1e-9 * (last - first):
                found.append((stage, "bubble", at, begin))
            at = max(at, end)
        if last > at + 1e-9 * (last - first):
            found.append((stage, "bubble", at, last))
    return found


def busiest_frac(rows: Sequence[tuple[str, str, float, float]]) -> float:
    """Return the share of the schedule in which its busiest stage computes."""
    span = max(r[3] for r in rows) - min(r[2] for r in rows)
    stages = {r[0] for r in rows}
    return max(sum(end - begin for name, _, begin, end in rows if name == stage) for stage in stages) / span
