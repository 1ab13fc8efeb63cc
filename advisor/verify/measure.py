"""From the load script's lines to statistics: TTFT, TPOT, E2E and rates over the requests of a cell."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from advisor.schema import Noun
from advisor.schema.base import NonNegativeFloat, NonNegativeInt
from advisor.schema.run_record import Measured, Percentiles

PERCENTS = (50, 90, 95, 99)


class Traced(Noun):
    """One answered request; seconds from the start of the cell on the client's clock."""

    arrival_s: NonNegativeFloat
    start_s: NonNegativeFloat
    first_s: NonNegativeFloat
    last_s: NonNegativeFloat
    end_s: NonNegativeFloat
    n_events: NonNegativeInt
    itl_max_s: NonNegativeFloat
    prompt_tokens: NonNegativeInt
    output_tokens: NonNegativeInt

    @property
    def ttft_s(self) -> float:
        """Return the time to the first token, waiting in the client included [s]."""
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Return (last - first token) / (tokens - 1) [s], None for one token."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Failed(Noun):
    """How one request failed: the load script's kind and its text."""

    kind: str
    text: str


def read_results(path: Path) -> tuple[list[Traced], list[Failed]]:
    """Return the answered and the failed requests of a result file; a last line cut short by a kill is left out."""
    answered: list[Traced] = []
    failed: list[Failed] = []
    if not path.exists():
        return answered, failed
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "error" in record:
            failed.append(Failed.model_validate(record["error"]))
        else:
            answered.append(Traced.model_validate(record))
    return answered, failed


def spread(values: list[float]) -> Percentiles | None:
    """Return mean and percentiles [s], linearly interpolated between order statistics; None without values."""
    if not values:
        return None
    found = np.percentile(np.asarray(values), PERCENTS)
    fields = {f"p{q}": max(0.0, float(x)) for q, x in zip(PERCENTS, found, strict=True)}
    return Percentiles(mean=max(0.0, float(np.mean(values))), **fields)


def measured(requests: list[Traced]) -> Measured:
    """Return the statistics of a cell, counted from the first arrival to the last completion."""
    start_s = min(r.arrival_s for r in requests)
    duration_s = max(max(r.last_s for r in requests) - start_s, 1e-9)
    return Measured(
        n_requests=len(requests),
        duration_s=duration_s,
        requests_per_s=len(requests) / duration_s,
        output_tokens_per_s=sum(r.output_tokens for r in requests) / duration_s,
        input_tokens_per_s=sum(r.prompt_tokens for r in requests) / duration_s,
        ttft_s=spread([r.ttft_s for r in requests]),
        tpot_s=spread([r.tpot_s for r in requests if r.tpot_s is not None]),
        e2e_s=spread([r.last_s - r.arrival_s for r in requests]),
        itl_max_s=spread([r.itl_max_s for r in requests]),
    )


def client_lag_s(requests: list[Traced]) -> float:
    """Return how late the client itself was: the 99th percentile of (sent - scheduled) [s]."""
    return float(np.percentile([r.start_s - r.arrival_s for r in requests], 99))


def flat(cell: Measured) -> dict[str, float]:
    """Return the statistics under the names that predictions use, such as 'ttft_p99_s'."""
    values: dict[str, float] = {}
    for name in ("ttft", "tpot", "e2e"):
        found: Percentiles | None = getattr(cell, f"{name}_s")
        if found is not None:
            values |= {f"{name}_{stat}_s": getattr(found, stat) for stat in ("mean", "p50", "p90", "p95", "p99")}
    for name in ("requests_per_s", "output_tokens_per_s"):
        value = getattr(cell, name)
        if value is not None:
            values[name] = value
    return values


def most_common(failures: list[Failed]) -> Failed:
    """Return the first failure of the most frequent kind."""
    kind = Counter(f.kind for f in failures).most_common(1)[0][0]
    return next(f for f in failures if f.kind == kind)
