"""How much each minute of calibration on a new host is worth: errors there against minutes measured there.

For each host but the reference: coefficients that never saw the host, then its speed and energy factors fitted to the
first cells of one of its engine starts; then the later cells of that start (the same model) and every other start of
the host (other models) are predicted. Prints a table; asserts nothing.

    python -m benchmarks.calibration_curve
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advisor.catalog import load_catalog
from advisor.fit.adapt import solve
from advisor.fit.estimate import estimate
from advisor.fit.objective import values_for
from advisor.fit.parameters import HOST_POWER_PRIOR_REL, HOST_SPEED_PRIOR_REL
from advisor.fit.records import Cell
from advisor.fit.run import load_data
from advisor.fit.validate import Row, predict_cell, rows_of, table

MINUTES = (0.0, 0.1, 0.25, 0.5, 1.0)
METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s")


def main() -> None:
    """Print the curve."""
    catalog = load_catalog()
    fitted = catalog.coefficients("vllm")
    transfer = fitted.transfer
    data = load_data(catalog.root / "runs", catalog)
    start = {name: c.value for name, c in fitted.coefficients.items()}
    full = estimate(data.cells, kernels=data.kernels, transfer=transfer, start=start, max_steps=1)
    for host in sorted({c.host for c in data.cells}):
        theta = full.without(data.of(host=host))
        theta |= {f"host@{host}": 1.0, f"power@{host}": 1.0}
        runs = sorted({c.run_id for c in data.cells if c.host == host})
        for minutes in MINUTES:
            rows: dict[str, list[Row]] = {"same model, later cells": [], "other models": []}
            for run in runs:
                cells = first_minutes([c for c in data.cells if c.run_id == run], minutes)
                most = len(first_minutes([c for c in data.cells if c.run_id == run], MINUTES[-1] / 2))
                known = adapted(theta, host, cells[:most], transfer)

                def predict(cell: Cell, known: dict[str, float] = known) -> Mapping[str, float]:
                    return predict_cell(cell, values_for(cell, known, transfer), None)

                rows["same model, later cells"] += rows_of([c for c in data.cells if c.run_id == run][most:], predict)
                others = [c for c in data.cells if c.host == host and c.run_id != run]
                rows["other models"] += rows_of(others, predict)
            for what, found in rows.items():
                errors = table(found)
                shown = "  ".join(f"{m} {100 * errors[m]['median']:5.1f} %" for m in METRICS)
                print(f"{host}  {minutes:4.2f} min  {what:24}{shown}", flush=True)


def first_minutes(cells: Sequence[Cell], minutes: float) -> list[Cell]:
    """Return the first cells of a start that take `minutes` together, in the order in which they ran."""
    kept, seconds = [], 0.0
    for cell in cells:
        seconds += cell.record.measured.duration_s or 0.0
        if seconds > 60 * minutes:
            break
        kept.append(cell)
    return kept


def adapted(theta: dict[str, float], host: str, cells: Sequence[Cell], transfer: dict) -> dict[str, float]:
    """Return the coefficients with the host's two factors fitted to some cells, its priors kept."""
    if not cells:
        return theta
    priors = {f"host@{host}": (1.0, HOST_SPEED_PRIOR_REL), f"power@{host}": (1.0, HOST_POWER_PRIOR_REL)}
    return solve(cells, theta, priors, lambda cell, trial: values_for(cell, trial, transfer), max_steps=12).theta


if __name__ == "__main__":
    main()
