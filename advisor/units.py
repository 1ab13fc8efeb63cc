"""Unit constants and formatters: the only place that knows 1e9, 2**30 and ms.

Everything inside the package is SI and decimal; these functions make text for people.
"""

from __future__ import annotations

import math

KIB = 2**10
MIB = 2**20
GIB = 2**30
KB = 1e3
MB = 1e6
GB = 1e9
TERA = 1e12
GIGA = 1e9
MILLION = 1e6
HOUR_S = 3600.0
DAY_S = 86400.0
MONTH_HOURS = 730.0
YEAR_HOURS = 8760.0
MS = 1e-3
US = 1e-6
J_PER_KWH = 3.6e6
BITS_PER_BYTE = 8


def _significant(value: float, digits: int = 3) -> str:
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _scaled(value: float, unit: str, steps: tuple[tuple[float, str], ...]) -> str:
    for size, prefix in steps:
        if abs(value) >= size * 0.9995:
            return f"{_significant(value / size)} {prefix}{unit}"
    return f"{_significant(value / steps[-1][0])} {steps[-1][1]}{unit}"


def format_s(seconds: float) -> str:
    """Return a duration as text in the unit that reads best (us, ms, s, min, h)."""
    if not math.isfinite(seconds):
        return "never"
    if seconds < 1e-3:
        return f"{_significant(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_significant(seconds * 1e3)} ms"
    if seconds < 600:
        return f"{_significant(seconds)} s"
    if seconds < 2 * HOUR_S:
        return f"{_significant(seconds / 60)} min"
    return f"{_significant(seconds / HOUR_S)} h"


def format_bytes(n_bytes: float) -> str:
    """Return a size as decimal GB (datasheet convention)."""
    return _scaled(n_bytes, "B", ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")))


def format_rate(per_s: float, what: str) -> str:
    """Return a rate such as '1,230 tokens/s'."""
    return f"{_significant(per_s)} {what}/s"


def format_count(value: float) -> str:
    """Return a large count with a suffix, such as '8.03B' parameters."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{_significant(value / size)}{suffix}"
    return _significant(value)


def format_w(watts: float) -> str:
    """Return a power in W or kW."""
    return _scaled(watts, "W", ((1e6, "M"), (1e3, "k"), (1, "")))


def format_j(joules: float) -> str:
    """Return an energy in J, kJ or MJ."""
    return _scaled(joules, "J", ((1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")))


def plural(n: int, noun: str) -> str:
    """Return a number with its noun.

    >>> plural(1, "GPU"), plural(2, "GPU")
    ('1 GPU', '2 GPUs')
    """
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def format_usd(usd: float) -> str:
    """Return an amount of US dollars with sensible decimals."""
    if abs(usd) >= 1000:
        return f"${usd:,.0f}"
    return f"${usd:,.2f}" if abs(usd) >= 0.095 or usd == 0 else f"${usd:.4f}"


def format_change(frac: float, decimals: int = 0) -> str:
    """Return a relative change with its sign, never '-0%'.

    >>> format_change(0.123), format_change(-0.001), format_change(-0.0016, 1)
    ('+12%', '0%', '-0.2%')
    """
    text = f"{100 * frac:+,.{decimals}f}"
    return f"{text if float(text.replace(',', '')) else text[1:]}%"


def times(ratio: float, noun: str = "") -> str:
    """Return how much more a ratio above 1 is: a percentage up to twice as much, else how many times.

    >>> times(1.33), times(15.5), times(1.3, "time a token")
    ('33% more', '15.5 times as much', '30% more time a token')
    """
    what = f" {noun}" if noun else ""
    return f"{ratio - 1:.0%} more{what}" if ratio <= 2 else f"{_significant(ratio)} times as much{what}"


def format_frac(frac: float) -> str:
    """Return a fraction as a percentage."""
    return f"{_significant(100 * frac)} %"
