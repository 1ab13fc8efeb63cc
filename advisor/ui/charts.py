"""Charts: data in, a plotly Figure out; no I/O, no widget, and no number that its input did not hold.

Axes stay in SI units; plotly's SI prefixes turn 0.05 s into 50 ms. Colours start from Okabe and Ito's (2008) and are
moved until any two, and the grey of what rests, are at least 20 apart in CIE Lab for full colour vision and for
protanopia, deuteranopia and tritanopia as Machado et al. (2009, doi:10.1109/TVCG.2009.113) simulate them. Beyond six,
and where lines cross, series differ by hatching, dash or mark too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from advisor.schema import Breakdown, Deployment, Interval, Plan, Slo
from advisor.ui.memory import remembered
from advisor.ui.text import BACKENDS, label, part_name, plain_html, show, show_range

COLOURS = ("#0B62BC", "#C81B00", "#129441", "#894E8E", "#E69F00", "#56B4E9")
HATCHES = ("", "/", "x", ".")
DASHES = ("solid", "dash", "dot", "dashdot")
SHAPES = ("circle", "square", "diamond", "cross", "triangle-up")
BACKEND_STYLE = {name: (COLOURS[i], SHAPES[i]) for i, name in enumerate(BACKENDS)}
GREY = "#7F858C"
LOG_TICKS = [digit * 10.0**exponent for exponent in range(-6, 10) for digit in (1, 2, 5)]
UNITS = {"s": "s", "bytes": "B", "W": "W", "w": "W", "J": "J", "j": "J"}


def fill(i: int) -> dict[str, object]:
    """Return how the i-th part of a bar is filled: six colours, then the same hatched."""
    shape = HATCHES[i // len(COLOURS) % len(HATCHES)]
    return {"color": COLOURS[i % len(COLOURS)], "pattern": {"shape": shape, "size": 6, "solidity": 0.4}}


def unit_of(name: str) -> str:
    """Return the unit to print behind an axis number of a quantity."""
    if name.startswith("usd"):
        return "$/h" if name.endswith("_per_h") else "$"
    if "_per_s" in name:
        return "/s"
    for word, unit in (("_s", "s"), ("_w", "W"), ("_bytes", "B")):
        if name.endswith(word) or (f"{word}_" in name and word == "_bytes"):
            return unit
    return "J" if "_j" in name else ""


def axis(name: str, *, is_log: bool = False) -> dict[str, object]:
    """Return the layout of the axis of a quantity: title with unit, SI prefixes, and dollars before the number."""
    unit = unit_of(name)
    made: dict[str, object] = {"title": {"text": f"{label(name)} [{unit}]" if unit else label(name)}}
    if is_log:
        return made | {"type": "log", "tickvals": LOG_TICKS, "ticktext": [tick(name, v) for v in LOG_TICKS]}
    if name.endswith("_frac"):
        return made | {"tickformat": ".0%"}
    if unit.startswith("$"):
        return made | {"tickprefix": "$", "tickformat": ",~r"}
    if name.endswith("requests_per_s"):
        return made | {"tickformat": "~g"}  # a prefix would make half a request 500m
    return made | {"tickformat": "~s", "ticksuffix": unit if unit in {"s", "B", "W", "J"} else ""}


def reach(low: float, high: float) -> dict[str, object]:
    """Return the range of a logarithmic axis whose numbers would have fewer than two ticks, {} for any other."""
    if low <= 0 or sum(low <= t <= high for t in LOG_TICKS) >= 2:
        return {}
    below = max((t for t in LOG_TICKS if t < low), default=low / 2)
    above = min((t for t in LOG_TICKS if t > high), default=2 * high)
    return {"range": [math.log10(below), math.log10(above)]}


def tick(name: str, value: float) -> str:
    """Return an axis number of a quantity with its unit, without trailing zeros."""
    return re.sub(r"\.?0+(?=$| |/)", "", text) if "." in (text := show(name, value)) else text


def line_at(figure: go.Figure, value: float, text: str, colour: str, *, is_x: bool = False, dash: str = "dash") -> None:
    """Draw a line across a chart; its words stand in the legend, where no other line crosses them."""
    line = {"dash": dash, "color": colour, "width": 1.5}
    n_before = len(figure.layout.shapes)
    if is_x:
        figure.add_vline(x=value, line=line, name=plain_html(text))
    else:
        figure.add_hline(y=value, line=line, name=plain_html(text))
    figure.layout.shapes[n_before].showlegend = True  # of a chart of two parts the first one's


def laid_out(figure: go.Figure, *, height: int = 420, **layout: object) -> go.Figure:
    """Return the figure with the margins, the legend and the height that all charts share."""
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 16, "t": 36, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"},
        hoverlabel={"align": "left"},
        **layout,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def held_off_gpu(d: Deployment) -> str:
    """Return what a deployment keeps in host memory or on drives, "" where all is on the GPUs."""
    places = {"cpu": "in host memory", "nvme": "on NVMe"}
    what = {"weights": d.offload, "KV cache": d.kv_offload}
    if d.offload == d.kv_offload != "none":
        return f"weights and KV cache {places[d.offload]}"
    return ", ".join(f"{name} {places[where]}" for name, where in what.items() if where != "none")


def layout(d: Deployment) -> str:
    """Return how a deployment uses its GPUs: card, parallel degrees, format, batch limits."""
    words = [f"TP {d.tp}", *([f"PP {d.pp}"] if d.pp > 1 else []), f"DP {d.dp}", d.weight_dtype]
    if held := held_off_gpu(d):
        words.append(held)
    if d.static_batch:
        words.append(f"batch {d.static_batch}")
    return " · ".join((d.gpu, *words))


def plan_name(plan: Plan) -> str:
    """Return a plan in a few words: its engine and its layout."""
    return f"{BACKENDS.get(plan.backend, plan.backend)} · {layout(plan.deployment)}"


@remembered
def stacked(
    bars: Mapping[str, Breakdown], *, limit: tuple[str, float] | None = None, n_bars: int = 0, n_parts: int = 0
) -> go.Figure:
    """Return one horizontal bar a breakdown, stacked from its parts, so that a bar's end is the breakdown's total.

    limit   : name and value of a vertical line, such as the memory of the card
    n_bars  : the most bars that the same place may show: the height is for as many
    n_parts : the most parts, likewise
    """
    parts = list(dict.fromkeys(part_name(p.name) for b in bars.values() for p in b.parts))
    unit = next(iter(bars.values())).unit if bars else ""
    figure = go.Figure()
    for i, name in enumerate(parts):
        values = [sum(p.value for p in b.parts if part_name(p.name) == name) for b in bars.values()]
        whys = [next((p.why for p in b.parts if part_name(p.name) == name), "") for b in bars.values()]
        figure.add_bar(
            y=[plain_html(bar).replace(" ", "<br>", 1) if len(bar) > 14 else plain_html(bar) for bar in bars],
            x=values,
            name=name,
            orientation="h",
            marker=fill(i),
            text=[
                f"<b>{plain_html(name)}</b>: {show(unit, v)}<br>{plain_html(w)}"
                for v, w in zip(values, whys, strict=True)
            ],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
    if limit is not None:
        figure.add_vline(x=limit[1], line={"dash": "dash", "color": GREY, "width": 2})
        figure.add_annotation(
            x=limit[1], y=1, yref="paper", yanchor="bottom", xanchor="right", text=plain_html(limit[0]), showarrow=False
        )
    figure.update_xaxes({"tickformat": "~s", "ticksuffix": UNITS.get(unit, ""), "rangemode": "tozero"})
    figure.update_yaxes(autorange="reversed", tickfont={"size": 12})
    below = {
        "orientation": "h",
        "y": -0.5 / max(n_bars, len(bars)),
        "yanchor": "top",
        "x": 0,
        "traceorder": "normal",
        "font": {"size": 11},
    }
    height = 112 + 18 * (1 + (max(n_parts, len(parts)) + 1) // 2) + 48 * max(n_bars, len(bars))
    return laid_out(figure, height=height, barmode="stack", bargap=0.35).update_layout(
        legend={"traceorder": "normal", **below}
    )


@remembered
def curves(
    points: Sequence[tuple[float, Mapping[str, Interval]]],
    names: Sequence[str],
    x: str,
    slo: Slo,
    now: float | None = None,
) -> go.Figure:
    """Return quantities against a load, each with its 90 % band; targets of the same quantities are drawn as lines.

    now : the load that the page asks about, drawn as a vertical line
    """
    figure = go.Figure()
    for i, name in enumerate(names):
        found = [(at, values[name]) for at, values in points if name in values]
        colour = COLOURS[i % len(COLOURS)]
        xs = [at for at, _ in found]
        figure.add_scatter(
            x=xs + xs[::-1],
            y=[v.high for _, v in found] + [v.low for _, v in reversed(found)],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.16,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=xs,
            y=[v.value for _, v in found],
            mode="lines+markers",
            name=label(name),
            line={"color": colour, "width": 2, "dash": DASHES[i % len(DASHES)]},
            marker={"symbol": SHAPES[i % len(SHAPES)], "size": 8},
            text=[f"{label(name)} {show(name, v.value)} ({show_range(name, v)})" for _, v in found],
            hovertemplate="%{text}<extra></extra>",
        )
        for target in slo.targets:
            if f"{target.name}_s" == name:
                line_at(figure, target.max_s, f"{label(name)} target {show(name, target.max_s)}", colour)
    if now is not None:
        line_at(figure, now, "this load", GREY, is_x=True, dash="dot")
    figure.update_xaxes(axis(x) | {"rangemode": "tozero"})
    figure.update_yaxes(axis(names[0], is_log=True) | {"title": {"text": f"latency [{unit_of(names[0])}]"}})
    return laid_out(figure)


@remembered
def over_time(times_s: Sequence[float], lines: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    """Return step lines of counts over simulated time."""
    figure = go.Figure()
    for i, (name, values) in enumerate(lines.items()):
        figure.add_scatter(
            x=list(times_s),
            y=list(values),
            mode="lines",
            name=name,
            line={
                "shape": "hv",
                "color": COLOURS[i % len(COLOURS)],
                "width": 1.8,
                "dash": DASHES[i % len(DASHES)],
            },
            hovertemplate=f"{plain_html(name)}: %{{y:,}} at %{{x:.3~s}}s<extra></extra>",
        )
    figure.update_xaxes({"title": {"text": "time in the simulation [s]"}, "tickformat": "~s", "ticksuffix": "s"})
    figure.update_yaxes({"title": {"text": title}, "rangemode": "tozero", "tickformat": "~s"})
    return laid_out(figure, height=320)


@remembered
def hours(names: Sequence[str], gpus: Mapping[str, Sequence[int]], n_gpus: int) -> go.Figure:
    """Return who has how many GPUs in each hour, stacked up to the budget."""
    figure = go.Figure()
    for i, (who, counts) in enumerate(gpus.items()):
        figure.add_bar(
            x=list(names),
            y=list(counts),
            name=who,
            marker={"color": GREY} if who == "idle" else fill(i),
            hovertemplate=f"hour %{{x}}: {plain_html(who)} has %{{y}} GPUs<extra></extra>",
        )
    figure.update_xaxes({"title": {"text": "hour of the plan"}, "dtick": _every(len(names))})
    figure.update_yaxes({"title": {"text": "GPUs"}, "range": [0, n_gpus]})
    return laid_out(figure, height=340, barmode="stack", bargap=0.15)


def _every(n_hours: int) -> int:
    """Return the hours between two ticks: a dozen of them at most."""
    return next((step for step in (2, 3, 6, 12, 24) if n_hours <= 12 * step), 48)


@remembered
def over_hours(at: Sequence[int], lines: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    """Return step lines of values by hour; the last hour is drawn to its end."""
    ends = [float(h) for h in (*at, at[-1] + 1)]
    # a copy: what was drawn before is kept
    figure = go.Figure(over_time(ends, {name: [*values, values[-1]] for name, values in lines.items()}, title))
    ticks = {"tickformat": "d", "ticksuffix": "", "dtick": _every(len(at)), "range": [ends[0], ends[-1]]}
    figure.update_xaxes({"title": {"text": "hour of the plan"}} | ticks)
    figure.update_yaxes(tickformat="~g")
    hour = [f"hour {h}" for h in (*at, at[-1])]
    figure.update_traces(text=hour, hovertemplate=f"%{{text}}: %{{y:.3~g}} {plain_html(title)}<extra></extra>")
    return figure.update_layout(height=240, showlegend=len(lines) > 1)
