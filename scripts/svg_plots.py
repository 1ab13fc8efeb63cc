"""Two pictures for the documentation, as SVG text without any library; same numbers in, same text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

INK, FAINT, GRID = "#1f2328", "#59636e", "#d8dee4"
BLUE, ORANGE = "#0072b2", "#d55e00"
"""Okabe and Ito's palette: told apart by colour-blind readers too."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LABEL_PX, PANEL_PX, ROW_PX, GAP_PX, TOP_PX = 118, 146, 17, 26, 44
MOST = 0.4
"""Right end of the error axis; what lies beyond is drawn at the edge with its number."""


def _text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "start", colour: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _whole(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, Segoe UI, DejaVu Sans, sans-serif">'
    )
    ground = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>"]) + "\n"


def panels(groups: Mapping[str, Mapping[str, tuple[float, float]]], *, targets: Mapping[str, float]) -> str:
    """Return one panel a quantity, one row an engine start: a dot at the median, a line to the P90."""
    rows = list(dict.fromkeys(name for panel in groups.values() for name in panel))
    height = TOP_PX + ROW_PX * len(rows) + 46
    width = LABEL_PX + (PANEL_PX + GAP_PX) * len(groups) + 24
    bottom = TOP_PX + ROW_PX * len(rows)
    parts = [_text(LABEL_PX - 8, TOP_PX + ROW_PX * (i + 0.72), name, anchor="end") for i, name in enumerate(rows)]
    for k, (title, panel) in enumerate(groups.items()):
        left = LABEL_PX + k * (PANEL_PX + GAP_PX)

        def at(error: float, left: float = left) -> float:
            return left + PANEL_PX * min(error, MOST) / MOST

        parts.append(_text(left, TOP_PX - 22, title, size=13))
        for tick in range(0, int(MOST * 100) + 1, 10):
            x = at(tick / 100)
            parts.append(_line(x, TOP_PX - 4, x, bottom + 4, GRID))
            parts.append(_text(x, bottom + 17, f"{tick}", size=10, anchor="middle", colour=FAINT))
        if title in targets:
            parts.append(_line(at(targets[title]), TOP_PX - 10, at(targets[title]), bottom + 4, ORANGE, 1.0, "3 3"))
        for i, name in enumerate(rows):
            if name not in panel:
                continue
            median, p90 = panel[name]
            y = TOP_PX + ROW_PX * (i + 0.5)
            parts.append(_line(at(median), y, at(p90), y, BLUE, 2.0))
            parts.append(f'<circle cx="{at(median):.1f}" cy="{y:.1f}" r="3.6" fill="{BLUE}"/>')
            if p90 > MOST:
                parts.append(_text(at(p90) + 2, y + 3.5, f"{100 * p90:.0f}", size=9, colour=BLUE))
    foot = "error in per cent: dot = median of the start's cells, line to their P90, dashed = target of the median"
    parts.append(_text(LABEL_PX, bottom + 36, foot, size=11, colour=FAINT))
    return _whole(width, height, "Error of each engine start when it is left out of the fit", parts)


def scatter(groups: Mapping[str, Sequence[tuple[float, float, str]]]) -> str:
    """Return one logarithmic panel a quantity: each cell measured (across) and predicted (up), coloured by GPU."""
    side, gap, left0, top = 176, 34, 34, 40
    width, height = left0 + (side + gap) * len(groups), top + side + 54
    gpus = list(dict.fromkeys(label.split()[0] for points in groups.values() for _, _, label in points))
    parts = []
    for k, (title, points) in enumerate(groups.items()):
        left = left0 + k * (side + gap)
        values = [v for m, p, _ in points for v in (m, p) if v > 0]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        span = max(high - low, 1)

        def px(value: float, low: int = low, span: int = span) -> float:
            return side * (math.log10(value) - low) / span

        parts.append(_text(left, top - 14, title, size=13))
        for decade in range(low, high + 1):
            offset = px(10.0**decade)
            parts.append(_line(left + offset, top, left + offset, top + side, GRID))
            parts.append(_line(left, top + side - offset, left + side, top + side - offset, GRID))
            parts.append(_text(left + offset, top + side + 14, f"1e{decade}", size=9, anchor="middle", colour=FAINT))
        parts.append(_line(left, top + side, left + side, top, FAINT, 1.0))
        for m, p, label in points:
            if m > 0 and p > 0:
                colour = PALETTE[gpus.index(label.split()[0]) % len(PALETTE)]
                x, y = left + px(m), top + side - px(p)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" fill-opacity="0.6"/>')
    for i, gpu in enumerate(gpus):
        x = left0 + 90 * i
        parts.append(f'<circle cx="{x:.1f}" cy="{height - 14:.1f}" r="4" fill="{PALETTE[i % len(PALETTE)]}"/>')
        parts.append(_text(x + 9, height - 10, gpu, colour=FAINT))
    foot = "across: measured, up: predicted (s, requests/s, W)"
    parts.append(_text(left0 + 90 * len(gpus) + 20, height - 10, foot, colour=FAINT))
    return _whole(width, height, "Predicted against measured", parts)
