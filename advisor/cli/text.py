"""Text for people: tables that fit 100 columns, numbers with intervals, wrapped sentences."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from advisor.errors import printable
from advisor.schema import Breakdown, Interval
from advisor.units import (
    format_bytes,
    format_count,
    format_frac,
    format_j,
    format_s,
    format_usd,
    format_w,
)

WIDTH = 100
_BY_SUFFIX: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("tokens_per_s", lambda v: f"{format_count(v)} tokens/s"),
    ("requests_per_s", lambda v: f"{format_count(v)} requests/s"),
    ("_flops_per_s", lambda v: f"{v / 1e12:,.0f} TFLOP/s"),
    ("_bytes_per_gpu", format_bytes),
    ("_bytes_per_node", format_bytes),
    ("_bytes", format_bytes),
    ("_frac", format_frac),
    ("usd_per_h", format_usd),
    ("usd_per_million_output_tokens", format_usd),
    ("j_per_output_token", format_j),
    ("j_per_request", format_j),
    ("j_per_token", format_j),
    ("_power_w", format_w),
    ("_w", format_w),
    ("_w_per_gpu", format_w),
    ("_j", format_j),
    ("_s", format_s),
)
BREAKDOWNS = {"memory_bytes_per_gpu": "memory per GPU", "step_s": "time of a step"}
_BY_UNIT: dict[str, Callable[[float], str]] = {"s": format_s, "bytes": format_bytes, "W": format_w, "J": format_j}


def out(text: str = "") -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def print_json(form: Any) -> None:
    """Print one JSON object; NaN and infinity are refused, since JSON has none."""
    out(json.dumps(form, indent=2, ensure_ascii=False, allow_nan=False))


def format_quantity(name: str, value: float) -> str:
    """Return a quantity in the unit that its name ends with."""
    for suffix, text in _BY_SUFFIX:
        if name.endswith(suffix):
            return text(value)
    return format_count(value)


def format_interval(name: str, interval: Interval) -> str:
    """Return 'value [low - high]' of the 90 % interval."""
    shown = (format_quantity(name, v) for v in (interval.value, interval.low, interval.high))
    value, low, high = shown
    return value if low == high else f"{value} [{low} - {high}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return lines of a table: the first `left` columns to the left, numbers to the right."""
    body = [[printable(cell, 80) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *body]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return [line(head), *(line(row) for row in body)]


def wrapped(text: str, indent: str = "  ", first: str | None = None) -> list[str]:
    """Return text in lines of at most 100 columns."""
    return textwrap.wrap(
        _clean(text), WIDTH, initial_indent=first if first is not None else indent, subsequent_indent=indent
    ) or [indent.rstrip()]


def bullet(text: str) -> list[str]:
    """Return text as an item of a list."""
    return wrapped(text, indent="    ", first="  - ")


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()


def breakdown_lines(breakdown: Breakdown) -> list[str]:
    """Return a breakdown as a table whose parts sum to its whole."""

    def plain(value: float) -> str:
        return f"{value:,.4g} {breakdown.unit}"

    shown = _BY_UNIT.get(breakdown.unit, plain)
    total = breakdown.total or 1.0
    rows = [(f"  {p.name}", shown(p.value), format_frac(p.value / total), p.why) for p in breakdown.parts]
    widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else [0, 0, 0]
    lines = [f"{BREAKDOWNS.get(breakdown.name, breakdown.name.replace('_', ' '))}: {shown(breakdown.total)}"]
    for name, value, share, why in rows:
        lines.append(
            f"  {name.ljust(widths[0])}  {value.rjust(widths[1])}  {share.rjust(widths[2])}  {why}"[:WIDTH].rstrip()
        )
    return lines
