"""The whole fit of our own records: estimate, leave each engine start out, write coefficients and accuracy."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from advisor.catalog import Catalog
from advisor.errors import BadData
from advisor.fit.estimate import Estimate, as_coefficients, estimate
from advisor.fit.kernels import KernelStep, read_kernels
from advisor.fit.objective import exact_traffic, is_http, read_rows, values_for
from advisor.fit.records import Cell, cells_of, read_records
from advisor.fit.repeats import noise_floor
from advisor.fit.validate import EAGER, METRICS, Row, by_pace, by_regime, predict_cell, rows_of, summed_up, table
from advisor.predict.host_pace import host_gains, spread_factor
from advisor.predict.transfer import in_process
from advisor.schema import CoefficientSet, EngineFacts

Transfer = Mapping[str, Mapping[str, float]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """The cells, open loops with the very requests that were sent where they were kept; those drawn anew; kernels."""

    cells: list[Cell]
    drawn: list[Cell]
    kernels: list[KernelStep] = field(default_factory=list)

    def of(self, *, run_id: str | None = None, host: str | None = None) -> set[int]:
        """Return the places of a start's or a host's cells and kernels among all, as `Estimate.without` counts them."""
        items = [*self.cells, *(step.cell for step in self.kernels)]
        return {i for i, cell in enumerate(items) if run_id in (None, cell.run_id) and host in (None, cell.host)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder of run records."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadData(str(path), f"not a readable manifest ({type(error).__name__})") from None


def read_transfer(path: Path) -> dict[str, dict[str, float]]:
    """Return the factors of other GPUs from a TOML file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return {gpu: {k: float(v) for k, v in factors.items()} for gpu, factors in raw.items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise BadData(str(path), f"not a table of factors by GPU ({type(error).__name__})") from None


def load_data(folder: Path, catalog: Catalog, extra: Sequence[str | Path] = ()) -> Data:
    """Return the vLLM cells of a folder with its manifest, and of further files (each a host of its own)."""
    manifest = read_manifest(folder / "manifest.toml")
    found: list[Cell] = []
    drawn: list[Cell] = []
    kernels: list[KernelStep] = []
    for name, entry in manifest.items():
        if not isinstance(entry, dict):
            continue
        left_out = entry.get("left_out", {})
        cells = [
            cell
            for cell in cells_of(read_records(folder / name), catalog, str(entry.get("host", name)))
            if f"{cell.run_id.rpartition('__')[2]}/{(cell.record.model_extra or {}).get('cell_id')}" not in left_out
        ]
        rows = read_rows(folder / str(entry["rows"])) if "rows" in entry else {}
        exact = [exact_traffic(cell, rows) for cell in cells]
        drawn += [cell for cell, sent in zip(cells, exact, strict=True) if sent is not cell]
        found += exact
        kernels += read_kernels(folder / str(entry["kernels"]), cells) if "kernels" in entry else []
    for source in extra:
        found += cells_of(read_records(source), catalog, f"file-{Path(source).stem}")
    return Data(found, drawn, kernels)


def cross_validate(
    data: Data, catalog: Catalog, full: Estimate, transfer: Transfer, say: Say
) -> tuple[list[Row], list[Row]]:
    """Return the errors of every engine start under coefficients that never saw it, and those of drawn open loops.

    A left-out start is predicted as a stranger's would be: its host's nuisance factors are 1. Open loops are replayed
    with the requests that were sent, and once more, for the second list, with others of the same distribution.
    """
    power = catalog.coefficients("power")
    facts = EngineFacts.from_table(catalog.engine("vllm"), "0.26.0")
    rows: list[Row] = []
    drawn: list[Row] = []
    runs = sorted({c.run_id for c in data.cells})
    for number, run in enumerate(runs, 1):
        theta = _as_a_stranger(data, full, run)

        def predict(cell: Cell, theta: Mapping[str, float] = theta) -> Mapping[str, float]:
            return predict_cell(cell, values_for(cell, theta, transfer), power, facts)

        def gains(cell: Cell, theta: Mapping[str, float] = theta) -> Mapping[str, float]:
            values = values_for(cell, theta, transfer)
            values = values if is_http(cell) else in_process(values)
            return host_gains(cell.model, cell.gpu, cell.deployment, cell.workload, values, facts)

        found = rows_of([c for c in data.cells if c.run_id == run], predict, facts, gains=gains)
        rows += found
        drawn += rows_of([c for c in data.drawn if c.run_id == run], predict, facts)
        errors = table(found)
        shown = ", ".join(f"{m} {100 * errors[m]['median']:.1f} %" for m in METRICS if m in errors)
        say(f"left out {number}/{len(runs)} {run}: {shown}")
    return rows, drawn


def on_known_hosts(data: Data, catalog: Catalog, full: Estimate, transfer: Transfer) -> list[Row]:
    """Return the errors of left-out starts when other starts of their hosts are in the fit, with these hosts' factors.

    What somebody gets who has measured one start on a host and asks for another one there (`advisor.fit.adapt`).
    """
    facts = EngineFacts.from_table(catalog.engine("vllm"), "0.26.0")
    starts = {(c.host, c.run_id) for c in data.cells if c.host}
    rows: list[Row] = []
    for host, run in sorted(starts):
        if sum(other == host for other, _ in starts) < 2:
            continue
        theta = full.without(data.of(run_id=run))

        def predict(cell: Cell, theta: Mapping[str, float] = theta) -> Mapping[str, float]:
            return predict_cell(cell, values_for(cell, theta, transfer), None, facts)

        rows += rows_of([c for c in data.cells if c.run_id == run], predict, facts)
    return rows


def _known_hosts(
    data: Data, catalog: Catalog, full: Estimate, transfer: Transfer, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the errors on known hosts, and those of the same starts on hosts of which nothing is known."""
    known = on_known_hosts(data, catalog, full, transfer)
    runs = {row.run_id for row in known}
    return {"known": table(known), "unknown": table(r for r in rows if r.run_id in runs), "n_starts": len(runs)}


def _as_a_stranger(data: Data, full: Estimate, run: str) -> dict[str, float]:
    """Return the coefficients of a fit that never saw an engine start, without any host's factors."""
    return {name: value for name, value in full.without(data.of(run_id=run)).items() if "@" not in name}


def kernel_errors(data: Data, full: Estimate, transfer: Transfer) -> dict[str, dict[str, float]]:
    """Return the relative errors of the kernels' figures by 'figure, decode' or 'figure, prompt', starts left out."""
    found: dict[str, list[float]] = {}
    for run in sorted({step.run_id for step in data.kernels}):
        theta = _as_a_stranger(data, full, run)
        for step in (step for step in data.kernels if step.run_id == run):
            predicted = step.predicted(values_for(step.cell, theta, transfer))
            for figure, seconds in step.figures.items():
                found.setdefault(f"{figure}, {step.what}", []).append(predicted[figure] / seconds - 1.0)
    return {name: summed_up(errors) for name, errors in sorted(found.items())}


def is_eager(row: Row) -> bool:
    """Return whether a row is of an engine without CUDA graphs, whose every step waits for its launches."""
    return row.regime["mode"] == EAGER


def _width_key(row: Row) -> str:
    return f"{row.metric}@eager" if is_eager(row) else row.metric


def error_quantiles(rows: Sequence[Row], quantile: float = 0.9) -> dict[str, float]:
    """Return the quantile of |ln(predicted / measured)| by metric: half-widths of conformal intervals.

    Each error is first divided by what its cell hangs on its host (`host_pace.spread_factor`): the widths are those of
    figures that no host changes.

    Engines without CUDA graphs have keys of their own with the suffix '@eager': the host sets the pace of all they do,
    and one start of them differs from the next by more than that factor says.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(_width_key(row), []).append(_score(row))
    return {metric: float(np.quantile(errors, quantile)) for metric, errors in sorted(found.items())}


def _score(row: Row) -> float:
    return abs(math.log(row.predicted / row.measured)) / spread_factor(row.host_gain)


def coverage(rows: Sequence[Row]) -> dict[str, float]:
    """Return how often the interval covers the truth when its width comes from the *other* engine starts."""
    out = {}
    for metric in METRICS:
        mine = [r for r in rows if r.metric == metric]
        hits = []
        for run in {r.run_id for r in mine}:
            others = [r for r in mine if r.run_id != run]
            if others:
                widths = error_quantiles(others)
                for r in (r for r in mine if r.run_id == run):
                    width = widths.get(_width_key(r), widths[metric])
                    hits.append(_score(r) <= width)
        if hits:
            out[metric] = float(np.mean(hits))
    return out


def cell_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the left-out cells, compact: where each belongs, and [measured, predicted] of every metric."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        where = {"run_id": row.run_id, "cell": row.cell, "load": row.load, "lengths": row.lengths}
        cell = cells.setdefault((row.run_id, row.cell), where | {"regime": row.regime, "values": {}})
        cell["values"][row.metric] = [float(f"{row.measured:.6g}"), float(f"{row.predicted:.6g}")]
    return list(cells.values())


def fit_all(
    folder: Path,
    transfer_path: Path,
    catalog: Catalog,
    *,
    extra: Sequence[str | Path] = (),
    max_steps: int = 12,
    n_workers: int = 2,
    start: Mapping[str, float] | None = None,
    say: Say = print,
) -> tuple[CoefficientSet, dict[str, Any]]:
    """Return the coefficient set and the accuracy report of all records of a folder."""
    data = load_data(folder, catalog, extra)
    transfer = read_transfer(transfer_path)
    full = estimate(
        data.cells,
        kernels=data.kernels,
        transfer=transfer,
        start=start,
        max_steps=max_steps,
        n_workers=n_workers,
        progress=lambda n, cost: say(f"evaluation {n}: cost {cost:.1f}"),
    )
    rows, drawn = cross_validate(data, catalog, full, transfer, say)
    say("the same starts once more, with the factors of their hosts")
    known = _known_hosts(data, catalog, full, transfer, rows)
    quantiles, paced = error_quantiles(rows), by_pace(rows)
    coefficients = as_coefficients(full, data.cells, transfer, quantiles)
    accuracy = {
        "schema_version": "1",
        "law_version": coefficients.version,
        "held_out": "each engine start predicted by coefficients fitted without it",
        "overall": table(rows),
        "by_run": {run: table(r for r in rows if r.run_id == run) for run in sorted({r.run_id for r in rows})},
        "by_regime": by_regime(rows),
        "error_q90": quantiles,
        "coverage_of_90_percent_intervals": coverage(rows),
        "by_pace": {pace: table(found) for pace, found in paced.items()},
        "coverage_by_pace": {pace: coverage(found) for pace, found in paced.items()},
        "open_loops_drawn_anew": table(drawn),
        "noise_floor": noise_floor(data.cells),
        "known_hosts": known,
        "kernels": kernel_errors(data, full, transfer),
        "cells": cell_table(rows),
    }
    return coefficients, accuracy


SINGLE = ("by_run", "cells")
"""Parts of an accuracy report that no recommendation reads: nine tenths of it."""


def write_accuracy(folder: Path, accuracy: Mapping[str, Any]) -> None:
    """Write an accuracy report as two files: what every answer quotes, and single starts and cells."""
    write_json(folder / "accuracy.json", {k: v for k, v in accuracy.items() if k not in SINGLE})
    write_json(folder / "accuracy_cells.json", {k: v for k, v in accuracy.items() if k in SINGLE})


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    fresh.replace(path)
