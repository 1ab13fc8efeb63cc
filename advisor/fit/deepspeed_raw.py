"""What the fits of DeepSpeed's coefficients do with records as they are read: choose, cite, put down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from advisor.schema import Coefficient

Raw = dict[str, Any]


def coefficient(
    spread: tuple[float, float, float], unit: str, bounds: tuple[float, float], meaning: str, source: str
) -> Coefficient:
    """Return a coefficient from its value, low and high end."""
    value, low, high = spread
    return Coefficient(value=value, low=low, high=high, unit=unit, bounds=bounds, meaning=meaning, source=source)


def cells_with(records: Sequence[Raw], **wanted: Any) -> list[Raw]:
    """Return the records whose fields have the wanted values."""
    return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]


def run_ids(cells: Iterable[Raw]) -> str:
    """Return the runs that cells belong to, each once, as a source cites them."""
    return "; ".join(dict.fromkeys(r["run_id"] for r in cells))
