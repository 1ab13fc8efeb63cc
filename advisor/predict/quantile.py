"""Quantiles of sorted values."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def quantile(ordered: NDArray[Any], share: float) -> float:
    """Return the quantile of ascending values, linear between two of them.

    As numpy.quantile, which sorts for every call, and whose first one imports numpy.ma.
    """
    rank = share * (len(ordered) - 1)
    below = int(rank)
    part = rank - below
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)
