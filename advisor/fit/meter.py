"""Which readings of run records can be used: of power, and of a rate."""

from __future__ import annotations

from advisor.schema import RunRecord

MIN_DURATION_S = 1.0
"""Cells shorter than this have no power figure: NVML updates its reading every 20 to
100 ms, and the board's average lags."""

MIN_AVERAGED_DURATION_S = 2.0
"""Cells whose meter averages over a second (no `is_instant`) must be longer, or the cell before is in the mean."""

MIN_RATE_DURATION_S = 1.0
"""A cell shorter than this has no throughput of its own: a prompt or two, whose rate is their latency over again."""


def has_rate(record: RunRecord) -> bool:
    """Return whether a record's requests a second say more than their latencies: it lasted long enough."""
    return (record.measured.duration_s or 0.0) >= MIN_RATE_DURATION_S


def has_power(record: RunRecord) -> bool:
    """Return whether a record's mean board power can be used: there is one, over a long enough window."""
    power, duration_s = record.measured.board_power_w, record.measured.duration_s
    if power is None or duration_s is None or power.mean <= 0:
        return False
    return duration_s >= (MIN_DURATION_S if getattr(power, "is_instant", False) else MIN_AVERAGED_DURATION_S)
