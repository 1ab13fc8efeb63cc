"""Predictions against run records: error tables by engine start, by regime, and on starts left out of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.fit.meter import has_power, has_rate
from advisor.fit.objective import is_http, measured, predicted, run_cell
from advisor.fit.records import Cell, cells_of, read_records
from advisor.predict.footprint import footprint
from advisor.predict.host_pace import COLUMNS, HOST_PACED
from advisor.predict.shapes import shapes_of
from advisor.predict.simulate import Simulation
from advisor.predict.spend import activity_of, board_power
from advisor.predict.step import step_cost
from advisor.predict.transfer import transferred
from advisor.schema import CoefficientSet, EngineFacts, RunRecord
from advisor.schema.run_record import Startup

METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s", "board_power_w.mean", "kv_blocks")


@dataclass(frozen=True)
class Row:
    """One metric of one cell: measured, predicted, and where it belongs."""

    run_id: str
    cell: int
    metric: str
    measured: float
    predicted: float
    load: str
    lengths: str
    regime: dict[str, str]
    host_gain: float = 0.0
    """by how much a faster host would change the figure (`predict.host_pace`)"""

    @property
    def error(self) -> float:
        """Return the relative error, signed."""
        return self.predicted / self.measured - 1.0


def predict_cell(
    cell: Cell, values: Mapping[str, float], power: CoefficientSet | None, facts: EngineFacts | None = None
) -> dict[str, float]:
    """Return the predicted metrics of a cell from coefficient values for its GPU, nothing of its measurements used.

    One replay, as in a forecast; of random traffic that was not kept, the mean over its draws.
    """
    simulations = run_cell(cell, values, facts)
    found = predicted(simulations)
    if power is not None:
        found["board_power_w.mean"] = float(np.mean([_power(cell, values, power, s) for s in simulations]))
    return found


def _power(cell: Cell, values: Mapping[str, float], power: CoefficientSet, simulation: Simulation) -> float:
    deployment = cell.deployment
    shapes = shapes_of(cell.model)
    stages = [step_cost(shapes, cell.gpu, deployment, values, k) for k in range(deployment.pp)]
    activity = activity_of(
        stages, simulation.total_work, simulation.duration_s, deployment.weight_dtype, n_replicas=deployment.dp
    )
    return board_power(activity, cell.gpu, power, deployment.n_gpus)[0].value


def regime_of(cell: Cell) -> dict[str, str]:
    """Return the groups by which errors are reported."""
    load, lengths = cell.workload.load, cell.workload.lengths
    d = cell.deployment
    kind = "open loop" if load.kind != "closed" else f"closed, {_bucket(load.concurrency)}"
    return {
        "load": kind,
        "lengths": "distributed"
        if lengths.kind != "fixed"
        else ("prompt only" if lengths.output_tokens == 1 else "fixed"),
        "parallelism": f"TP{d.tp}" + (f" PP{d.pp}" if d.pp > 1 else "") + (f" DP{d.dp}" if d.dp > 1 else ""),
        "weights": d.weight_dtype + ("" if d.kv_dtype == "bf16" else f", {d.kv_dtype} cache"),
        "is_moe": "yes" if cell.model.moe else "no",
        "mode": _mode(cell),
        "model": cell.record.model,
        "gpu": d.gpu,
    }


PLAIN, EAGER = "in process, CUDA graphs", "no CUDA graphs"


def _mode(cell: Cell) -> str:
    if is_http(cell):
        return "HTTP server"
    if cell.deployment.enforce_eager:
        return EAGER
    return "prefix caching" if cell.deployment.prefix_caching else PLAIN


def _bucket(concurrency: int) -> str:
    return "1 client" if concurrency == 1 else ("2-16 clients" if concurrency <= 16 else "over 16 clients")


def rows_of(
    cells: Sequence[Cell],
    predict: Callable[[Cell], Mapping[str, float]],
    facts: EngineFacts | None = None,
    progress: Callable[[int, int], None] | None = None,
    gains: Callable[[Cell], Mapping[str, float]] = lambda _: {},
) -> list[Row]:
    """Return a row for each metric that a cell measured; KV blocks once an engine start.

    gains : how much each metric of a cell hangs on its host, for the rows' `host_gain`

    Board power and throughput count where a cell is long enough (`meter`): a prompt of 50 ms is over too soon.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for number, cell in enumerate(cells):
        record = cell.record
        regime = regime_of(cell)
        load = " ".join(f"{k}={v}" for k, v in (record.load or {}).items())
        lengths = " ".join(f"{k}={v}" for k, v in (record.lengths or {}).items())

        def add(metric: str, value: float, guess: float, where: tuple[str, str] = (load, lengths)) -> None:
            gain = hangs.get(metric, 0.0)  # noqa: B023
            rows.append(Row(record.run_id, number, metric, value, guess, *where, regime, gain))  # noqa: B023

        found, hangs = predict(cell), gains(cell)
        for metric, value in measured(cell).items():
            if metric == "requests_per_s" and not has_rate(record):
                continue
            if metric in found and metric in METRICS:
                add(metric, value, found[metric])
        watts = record.measured.board_power_w
        if watts is not None and has_power(record) and "board_power_w.mean" in found:
            add("board_power_w.mean", watts.mean, found["board_power_w.mean"])
        startup = record.startup
        if startup is not None and startup.n_kv_blocks and record.run_id not in seen:
            seen.add(record.run_id)
            block = cell.deployment.model_copy(update={"kv_block_tokens": startup.kv_block_tokens or 16})
            guess = footprint(cell.model, cell.gpu, block, facts).n_kv_blocks
            add("kv_blocks", float(startup.n_kv_blocks), float(guess))
        if progress:
            progress(number + 1, len(cells))
    return rows


def table(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return median, P90 and bias of the relative error by metric; absolute but for the bias."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if math.isfinite(row.error):
            errors.setdefault(row.metric, []).append(row.error)
    return {metric: summed_up(errors[metric]) for metric in METRICS if metric in errors}


def summed_up(errors: Sequence[float]) -> dict[str, float]:
    """Return median, P90 and bias of some relative errors, and their number; absolute but for the bias."""
    e = np.asarray(errors)
    return {
        "median": float(np.median(np.abs(e))),
        "p90": float(np.percentile(np.abs(e), 90)),
        "bias": float(e.mean()),
        "n": len(e),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the contract of `advisor validate --json`: overall and by engine start."""
    runs = sorted({r.run_id for r in rows})
    return {
        "schema_version": "1",
        "overall": table(rows),
        "runs": {run: table(r for r in rows if r.run_id == run) for run in runs},
    }


def by_pace(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of figures that the GPU paces, and of those that the host's CPU does."""
    return {
        "the GPU": [r for r in rows if r.host_gain < HOST_PACED and r.metric in COLUMNS],
        "the host's CPU": [r for r in rows if r.host_gain >= HOST_PACED],
    }


def by_regime(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Return the error table of every group of every regime."""
    keys = sorted({key for r in rows for key in r.regime})
    return {
        key: {
            group: table(r for r in rows if r.regime.get(key) == group)
            for group in sorted({r.regime[key] for r in rows})
        }
        for key in keys
    }


def validate(
    sources: Sequence[str | Path] | Sequence[RunRecord],
    catalog: Catalog | None = None,
    coefficients: CoefficientSet | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Return predictions against measurements for run records (files or parsed), without refitting anything.

    Models come from each record's `hf_config`, so they need not be in the catalogue. Raises BadData for a broken file
    and DomainError when no record is a vLLM cell.
    """
    catalog = catalog or load_catalog()
    coefficients = coefficients or catalog.coefficients("vllm")
    power = catalog.coefficients("power")
    records: list[RunRecord] = []
    for source in sources:
        records += [source] if isinstance(source, RunRecord) else read_records(source)
    cells = cells_of(records, catalog)
    if not cells:
        raise DomainError("none of the records is a vLLM cell with load and lengths; nothing to validate")
    facts = EngineFacts.from_table(catalog.engine("vllm"), cells[0].record.engine_version)
    values: dict[str, dict[str, float]] = {}

    def predict(cell: Cell) -> Mapping[str, float]:
        if cell.gpu.name not in values:
            values[cell.gpu.name] = transferred(coefficients, cell.gpu)
        return predict_cell(_own_memory(cell, facts), values[cell.gpu.name], power, facts)

    return rows_of(cells, predict, facts, progress)


def _own_memory(cell: Cell, facts: EngineFacts) -> Cell:
    """Replace the record's start-up figures by predicted ones, so that nothing measured enters the prediction."""
    n_blocks = max(1, footprint(cell.model, cell.gpu, cell.deployment, facts).n_kv_blocks)
    longest = max(int((t.prompt_tokens + t.output_tokens).max()) for t in cell.traffics)
    n_blocks = max(n_blocks, -(-longest // cell.deployment.kv_block_tokens) + 1)
    startup = {"n_kv_blocks": n_blocks, "kv_block_tokens": cell.deployment.kv_block_tokens}
    record = cell.record.model_copy(update={"startup": Startup.model_validate(startup)})
    return Cell(record, cell.model, cell.gpu, cell.deployment, cell.workload, cell.traffics, cell.host)


__all__ = ["METRICS", "Row", "by_pace", "by_regime", "predict_cell", "rows_of", "summary", "table", "validate"]
