"""Charts of trust: the error grid that answers to a click, predicted against measured, what a refit moved.

Data in, a plotly Figure out, as in `charts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from advisor.ui import charts
from advisor.ui.memory import remembered
from advisor.ui.text import plain_html, show

WORST = 0.3
"""Error at which the colours of the grid end."""
COLOURS = "Cividis"
"""Pale yellow to dark blue, in order for any colour vision."""


def text_colour(error: float) -> str:
    """Return black or white, whichever is easier to read on the colour of an error: at least 4.5 : 1.

    Reference: relative luminance and contrast of WCAG 2.2.
    """
    (shade,) = sample_colorscale(COLOURS, [1.0 - min(max(error / WORST, 0.0), 1.0)], colortype="tuple")
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#FFFFFF"


@remembered
def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    errors: Sequence[Sequence[float | None]],
    *,
    counts: Sequence[Sequence[int]] | None = None,
    chosen: tuple[int, int] | None = None,
    n_rows: int = 0,
) -> go.Figure:
    """Return relative errors as a grid, pale to dark; the number stands in each cell.

    counts : measured cells behind each error, for the words under the mouse
    chosen : row and column of the cell that is framed; given, every cell answers to a click (its point carries
             [row, column] as custom data)
    n_rows : the most rows that the same place may show: the height is for as many
    """
    n_rows = max(n_rows, len(rows))
    text = [["" if e is None else f"{e:.1%}" for e in row] for row in errors]
    figure = go.Figure()
    # numbers as words of the cells: as annotations each is measured and placed alone, seconds for a large grid. A trace
    # has one colour of words, so that pale and dark cells are a trace each, of the same colours
    inks = [[None if e is None else text_colour(e) for e in row] for row in errors]
    used = dict.fromkeys(ink for row in inks for ink in row if ink) or ("#000000",)
    for k, ink in enumerate(used):
        figure.add_heatmap(
            z=[[e if inks[i][j] == ink else None for j, e in enumerate(row)] for i, row in enumerate(errors)],
            x=list(range(len(columns))),
            y=list(range(len(rows))),
            text=[[t if inks[i][j] == ink else "" for j, t in enumerate(row)] for i, row in enumerate(text)],
            texttemplate="%{text}",
            textfont={"color": ink, "size": 11},
            colorscale=COLOURS,
            reversescale=True,
            zmin=0,
            zmax=WORST,
            showscale=k == 0,
            # below, so that a narrow screen keeps its width for the cells
            colorbar={
                "tickvals": [0, 0.1, 0.2, WORST],
                "ticktext": ["0 %", "10 %", "20 %", "30 %+"],
                "tickangle": 0,
                "title": {"text": "median error", "side": "top"},
                "thickness": 10,
                "orientation": "h",
                "len": 0.6,
                "y": -18 / (34 * n_rows + 1),
                "yanchor": "top",
            },
            hoverinfo="skip",
            xgap=2,
            ygap=2,
        )
    cells = [(i, j) for i, row in enumerate(errors) for j, e in enumerate(row) if e is not None]
    of = [f", {counts[i][j]} measured cells" if counts else "" for i, j in cells]
    figure.add_scatter(
        x=[j for _, j in cells],
        y=[i for i, _ in cells],
        mode="markers",
        marker={"size": 30, "symbol": "square", "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        customdata=[list(cell) for cell in cells],
        text=[
            f"{plain_html(rows[i])}<br>{plain_html(columns[j])}: {text[i][j]}{n}"
            for (i, j), n in zip(cells, of, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    if chosen is not None and chosen[0] < len(rows) and chosen[1] < len(columns):
        i, j = chosen
        frame = {"color": charts.COLOURS[1], "width": 3}
        figure.add_shape(type="rect", x0=j - 0.5, x1=j + 0.5, y0=i - 0.5, y1=i + 0.5, line=frame)
    names = [plain_html(c).replace("Requests/s", "Req. /s").replace(" ", "<br>", 1) for c in columns]
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=names, tickfont={"size": 10}, tickangle=0, showgrid=False
    )
    # above, where a grid that is higher than the window still shows them
    figure.update_xaxes(zeroline=False, side="top")
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[short_row(r) for r in rows],
        tickfont={"size": 11},
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return charts.laid_out(figure, height=150 + 34 * n_rows).update_layout(margin={"t": 72, "b": 60})


def short_row(name: str) -> str:
    """Return the name of a row as its axis shows it: what all engine starts share is left out, two parts on two lines.

    >>> short_row("vllm-0.26.0__h100-sxm-80gb__8b-awq")
    '8b-awq<br>h100'
    """
    parts = name.split("__")
    if len(parts) == 3:
        return plain_html(parts[2]) + "<br>" + plain_html(parts[1].split("-")[0])
    first, _, gpu = name.partition(" · ")
    return plain_html(first) + ("<br>" + plain_html(gpu.split("-")[0]) if gpu else "")


@remembered
def moved(rows: Sequence[tuple[str, float, float, float, float]]) -> go.Figure:
    """Return by how much a refit moved coefficients: (name, factor, low, high of it, half-width of the old interval).

    A factor of 1 is the value before; the bar behind it is the 90 % interval that the coefficient had.
    """
    figure = go.Figure()
    names = [plain_html(name) for name, *_ in rows]
    figure.add_bar(
        y=names,
        x=[2 * width for *_, width in rows],
        base=[-width for *_, width in rows],
        orientation="h",
        name="90 % interval before",
        marker={"color": "rgba(127,133,140,0.3)"},
        hoverinfo="skip",
    )
    shifts = [factor - 1 for _, factor, _, _, _ in rows]
    figure.add_scatter(
        y=names,
        x=shifts,
        mode="markers",
        name="after the refit",
        marker={"color": charts.COLOURS[1], "size": 10, "symbol": "diamond"},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - factor for _, factor, _, high, _ in rows],
            "arrayminus": [factor - low for _, factor, low, _, _ in rows],
            "thickness": 1.5,
            "width": 3,
        },
        hovertemplate="%{y}: %{x:+.1%}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": charts.GREY, "width": 1.5})
    figure.update_xaxes({"title": {"text": "change of the coefficient"}, "tickformat": "+.0%"})
    figure.update_yaxes(autorange="reversed")
    return charts.laid_out(figure, height=130 + 26 * len(rows), bargap=0.3)


@remembered
def against(groups: Mapping[str, Sequence[tuple[float, float, str]]], unit: str, title: str) -> go.Figure:
    """Return predicted against measured values, (measured, predicted, words) a mark, with the line of equality."""
    figure = go.Figure()
    every = [v for points in groups.values() for m, p, _ in points for v in (m, p) if v > 0]
    for i, (group, points) in enumerate(groups.items()):
        figure.add_scatter(
            x=[m for m, _, _ in points],
            y=[p for _, p, _ in points],
            mode="markers",
            name=plain_html(group),
            marker={
                "color": charts.COLOURS[i % len(charts.COLOURS)],
                "symbol": charts.SHAPES[i % len(charts.SHAPES)],
                "size": 8,
            },
            opacity=0.8,
            text=[f"measured {show(unit, m)}, predicted {show(unit, p)}<br>{plain_html(w)}" for m, p, w in points],
            hovertemplate="%{text}<extra></extra>",
        )
    if every:
        ends = [min(every), max(every)]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", name="equal", line={"dash": "dash", "color": charts.GREY}, hoverinfo="skip"
        )
    ticks = {"type": "log", "tickvals": charts.LOG_TICKS, "ticktext": [charts.tick(unit, v) for v in charts.LOG_TICKS]}
    figure.update_xaxes({"title": {"text": f"{title}, measured"}} | ticks)
    figure.update_yaxes({"title": {"text": f"{title}, predicted"}} | ticks)
    return charts.laid_out(figure, height=440)
