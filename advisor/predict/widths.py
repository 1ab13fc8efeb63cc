"""Half-widths of 90 % intervals, and intervals made from others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advisor.predict.host_pace import spread_factor
from advisor.predict.transfer import joined_rel
from advisor.schema import Interval

DEFAULT_Q90 = {"ttft": 0.30, "tpot": 0.10, "requests_per_s": 0.10, "board_power_w.mean": 0.15}
"""Half-widths (natural log) where a coefficient set brings none of its own: twice the targets of docs/accuracy.md."""

Z_95 = 1.6449
"""Standard errors to either side of a 90 % interval of a normal distribution."""


class Widths:
    """Half-widths of intervals: the fit's errors on left-out engine starts, joined with the transfer's.

    `gains` say how much each figure hangs on the host (`host_pace.host_gains`): without them, nothing does.
    """

    def __init__(
        self, error_q90: Mapping[str, float], rel: float, is_eager: bool, gains: Mapping[str, float] | None = None
    ) -> None:
        # engines without CUDA graphs have wider intervals of their own
        eager = {k.removesuffix("@eager"): v for k, v in error_q90.items() if k.endswith("@eager")}
        self.error_q90 = {**error_q90, **eager} if is_eager else error_q90
        self.rel = rel
        self.gains = gains or {}

    def of(self, name: str) -> float:
        """Return the half-width (natural log) of a metric such as 'ttft_p99' or 'requests_per_s'."""
        if name == "requests_per_s":
            own = self._own(name, name)
        else:
            metric, statistic = name.split("_")
            is_tail = statistic in ("p95", "p99")
            if metric == "ttft":
                own = self._own(f"ttft_s.{'p99' if is_tail else 'p50'}", metric)
            else:
                own = self._own("tpot_s.p50", "tpot") * (2.0 if metric == "itl" or is_tail else 1.0)
        return joined_rel(own, math.log1p(self.rel))

    def _own(self, key: str, default: str) -> float:
        return self.error_q90.get(key, DEFAULT_Q90[default]) * spread_factor(self.gains.get(key, 0.0))

    def interval(self, value: float, name: str, drawn: float = 0.0) -> Interval:
        """Return a value with its 90 % interval; `drawn` is its standard error (natural log) from the drawn traffic."""
        width = joined_rel(self.of(name), Z_95 * drawn)
        return Interval(value=value, low=value * math.exp(-width), high=value * math.exp(width))


def bounded(interval: Interval, most: float) -> Interval:
    """Return an interval cut off above."""
    return Interval(value=min(interval.value, most), low=min(interval.low, most), high=min(interval.high, most))


def scaled(interval: Interval, factor: float) -> Interval:
    """Return an interval in another unit."""
    return Interval(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)


def widened(interval: Interval, rel: float, floor: float, ceiling: float) -> Interval:
    """Return an interval that is wider by a share to both sides, within bounds."""
    low = max(min(interval.low, interval.value * (1 - rel)), min(floor, interval.value))
    return Interval(value=interval.value, low=low, high=max(interval.value, min(interval.high * (1 + rel), ceiling)))
