"""Predicted beside measured, and which coefficient the largest gap points at."""

from __future__ import annotations

import math

from pydantic import Field

from advisor.schema import Interval, Noun, Prediction

# A gap below this is noise between two runs of one engine start (repeats in data/runs differ by 1-3 %).
NOTICEABLE = 0.05
START, LIGHT, LOAD = "start", "light", "load"
WHERE = {START: "at start", LIGHT: "of the light cell", LOAD: "of the load cell"}
BLAME = {
    (START, "kv"): "memory: utilisation, activation peak or graph memory differ from the plan's, so does the KV cache",
    (LIGHT, "tpot"): "memory bandwidth efficiency, or the constant overhead of a step (one sequence decodes alone)",
    (LIGHT, "ttft"): "prefill compute efficiency, or the server's fixed latency (nothing queues)",
    (LOAD, "tpot"): "attention over the KV cache, or prefills that interrupt decodes (max_num_batched_tokens)",
    (LOAD, "ttft"): "queueing: KV cache size, max_num_seqs, or the prefill rate under load",
    (LOAD, "e2e"): "lengths or limits that differ from the workload's",
    (LOAD, "requests"): "saturation: the engine runs out of KV cache or of steps before the prediction says so",
    (LOAD, "output"): "saturation: the engine runs out of KV cache or of steps before the prediction says so",
}
# A cache of another size changes every loaded cell, so it comes first.
# The light cell has no queue and no batch: when it is off, it explains the loaded cell, so it is looked at first.
ORDER = (START, LIGHT, LOAD)


class Row(Noun):
    """One quantity: predicted with its interval, measured, and how far apart they are."""

    cell: str
    name: str
    predicted: Interval
    measured: float
    promised: Interval | None = Field(
        default=None, description="what the plan says of its workload; `predicted` is for the very requests sent"
    )
    error_frac: float = Field(description="measured / predicted - 1")
    is_inside: bool = Field(description="the measured value lies in the predicted interval")


def compare(
    cell: str, prediction: Prediction, values: dict[str, float], promised: Prediction | None = None
) -> tuple[Row, ...]:
    """Return a row for each quantity that was both predicted and measured."""
    rows = []
    for name, value in values.items():
        predicted = prediction.quantities.get(name)
        if predicted is None or predicted.value <= 0:
            continue
        rows.append(
            Row(
                cell=cell,
                name=name,
                predicted=predicted,
                promised=promised.quantities.get(name) if promised is not None else None,
                measured=value,
                error_frac=value / predicted.value - 1,
                is_inside=predicted.low <= value <= predicted.high,
            )
        )
    return tuple(rows)


def _size(row: Row) -> float:
    return abs(math.log(max(row.measured, 1e-12) / row.predicted.value))


def _metric(row: Row) -> str:
    return row.name.split("_", 1)[0]


def has_gap(rows: tuple[Row, ...]) -> bool:
    """Return whether a typical value of a cell lies outside its interval by more than noise."""
    typical = [r for r in rows if r.cell != START and ("mean" in r.name or "p50" in r.name)]
    return any(abs(r.error_frac) > NOTICEABLE and not r.is_inside for r in typical)


def blame(rows: tuple[Row, ...]) -> str:
    """Return one sentence: which coefficient the largest unexplained gap points at, or that none does."""
    for cell in ORDER:
        typical = [
            row
            for row in rows
            if row.cell == cell and any(word in row.name for word in ("mean", "p50", "per_s", "tokens"))
        ]
        off = [r for r in typical if abs(r.error_frac) > NOTICEABLE and not r.is_inside and (cell, _metric(r)) in BLAME]
        if not off:
            continue
        # End-to-end time and rates follow from the other two; they speak only when those are right.
        own = [row for row in off if _metric(row) in ("ttft", "tpot")] or off
        worst = max(own, key=_size)
        direction = "above" if worst.error_frac > 0 else "below"
        return (
            f"{worst.name} {WHERE[cell]} is {abs(worst.error_frac):.0%} {direction} the prediction; "
            f"that points at {BLAME[cell, _metric(worst)]}"
        )
    if not rows:
        return "nothing that was measured was predicted"
    tails = [row for row in rows if not row.is_inside and abs(row.error_frac) > NOTICEABLE]
    if tails:
        worst = max(tails, key=_size)
        gap = f"{worst.name} by {worst.error_frac:+.0%}"
        return f"typical values agree; the tail is off: {gap} (bursts, or too few requests)"
    return "the prediction holds: every gap is inside its interval or below 5 %"
