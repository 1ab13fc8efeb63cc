"""Two predictions of one scenario against each other: who wins, or that the intervals leave no winner."""

from __future__ import annotations

import math
from dataclasses import dataclass

from advisor.schema import Interval, Prediction
from advisor.units import format_count, format_s


def ratio_of(a: Interval, b: Interval) -> Interval:
    """Return a / b with its interval: the relative widths of both joined as independent.

    >>> r = ratio_of(Interval(value=2.0, low=1.8, high=2.2), Interval(value=1.0, low=0.9, high=1.1))
    >>> round(r.low, 2), round(r.value, 2), round(r.high, 2)
    (1.74, 2.0, 2.31)
    """

    def log(x: float, y: float) -> float:
        return math.log(max(x, 1e-300) / max(y, 1e-300))

    value = max(a.value, 1e-300) / max(b.value, 1e-300)
    down = math.hypot(log(a.value, a.low), log(b.high, b.value))
    up = math.hypot(log(a.high, a.value), log(b.value, b.low))
    return Interval(value=value, low=value * math.exp(-down), high=value * math.exp(min(up, 300.0)))


@dataclass(frozen=True)
class Duel:
    """How many times as good the first of two predictions is in the quantity that tells them apart."""

    name: str
    first: Interval
    second: Interval
    is_time: bool

    @property
    def times(self) -> Interval:
        """Return how many times as fast the first is."""
        return ratio_of(self.second, self.first) if self.is_time else ratio_of(self.first, self.second)

    @property
    def is_tie(self) -> bool:
        """Return whether the interval of the ratio holds 1: no winner."""
        return self.times.low <= 1 <= self.times.high

    def text(self, other: str) -> str:
        """Return the outcome in words; `other` names the second."""
        shown = format_s if self.is_time else format_count
        values = f"{self.name} {shown(self.second.value)} against {shown(self.first.value)}"
        t = self.times
        if self.is_tie:
            return f"{values}: within the intervals of both (ratio {t.low:.2g} to {t.high:.2g}), so no winner"
        if t.low > 1:
            return f"{values}: {other} is {t.value:.2g} times as slow [{t.low:.2g} - {t.high:.2g}]"
        return f"{values}: {other} is {1 / t.value:.2g} times as fast [{1 / t.high:.2g} - {1 / t.low:.2g}]"


def duel(first: Prediction, second: Prediction) -> Duel:
    """Return the two in what tells them apart: latency where both serve all that arrives, else tokens a second."""
    both = [p.quantities.get("e2e_p50_s") for p in (first, second)]
    rates = [p.quantities["output_tokens_per_s"] for p in (first, second)]
    is_served = not first.is_saturated and not second.is_saturated
    alike = abs(math.log(max(rates[0].value, 1e-300) / max(rates[1].value, 1e-300))) < 1e-3
    if is_served and alike and both[0] is not None and both[1] is not None:
        return Duel("median end-to-end", both[0], both[1], True)
    return Duel("output tokens/s", rates[0], rates[1], False)
