"""What a fit compares: the measured numbers of a cell, how far off counts as one, and the replay that predicts them."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from advisor.errors import BadData
from advisor.fit import records
from advisor.fit.parameters import BY_NAME
from advisor.fit.records import FIRST_WAKES, Cell, has_one_route
from advisor.predict.replica import client_of, engine_limits
from advisor.predict.shapes import shapes_of
from advisor.predict.simulate import Simulation, simulate
from advisor.predict.step import step_cost
from advisor.predict.traffic import Traffic
from advisor.predict.transfer import on_host, scaled
from advisor.schema import EngineFacts, PrefixSharing

REFERENCE_GPU = "h100-sxm-80gb"

WEIGHTS = {
    "tpot_s.p50": 0.02,
    "tpot_s.p90": 0.04,
    "requests_per_s": 0.02,
    "ttft_s.p50": 0.06,
    "ttft_s.mean": 0.06,
    "ttft_s.p99": 0.12,
}
"""Relative error of each metric that counts as one; about the noise between two equal cells."""

FEW_REQUESTS = 8


@dataclass(frozen=True)
class Target:
    """One measured number of a cell and how far off counts as one."""

    metric: str
    value: float
    width: float


def measured(cell: Cell) -> dict[str, float]:
    """Return the measured metrics of a cell by their names in the record, zeros left out."""
    m = cell.record.measured
    found: dict[str, float] = {}
    for name, stats in (("ttft_s", m.ttft_s), ("tpot_s", m.tpot_s)):
        if stats is not None:
            for statistic in ("mean", "p50", "p90", "p99"):
                found[f"{name}.{statistic}"] = getattr(stats, statistic)
    found["requests_per_s"] = m.requests_per_s or 0.0
    return {name: value for name, value in found.items() if value > 0}


def targets(cell: Cell) -> list[Target]:
    """Return what the fit aims at in a cell; few requests and random arrivals count less.

    Clients that begin at once are served in groups, one a step. Their median is the first tokens of this group or of
    the next one, by chance (32 prompts as 1 + 15 + 16 or as 2 + 15 + 15: 862 or 635 ms), so the mean speaks for them.
    """
    found = measured(cell)
    load = cell.workload.load
    if load.kind == "closed" and load.concurrency > 1:
        found.pop("ttft_s.p50", None)
    few = (cell.record.measured.n_requests or 0) < FEW_REQUESTS
    is_short = "tpot_s.p50" not in found
    wanted = []
    for metric, width in WEIGHTS.items():
        if metric not in found:
            continue
        factor = 1.0
        if few and metric == "requests_per_s":
            factor = 3.0 if is_short else 1.0
        elif few and metric != "tpot_s.p50":
            factor = 2.0
        if cell.is_drawn:  # other requests than those that were sent
            factor *= 2.0
        wanted.append(Target(metric, found[metric], width * factor))
    return wanted


def is_http(cell: Cell) -> bool:
    """Return whether a cell was measured through an HTTP server; the others were by a client in its process."""
    return records.is_http(cell.record)


def run_cell(cell: Cell, values: Mapping[str, float], facts: EngineFacts | None = None) -> list[Simulation]:
    """Return one simulation a draw of the cell's traffic, with the cache that the engine really had.

    The host's paces begin at another turn in each draw, and a closed loop's engine wakes earlier or later.
    """
    record, deployment = cell.record, cell.deployment
    startup = record.startup
    blocks = (startup.n_kv_blocks if startup else None) or 10**6
    shapes = shapes_of(cell.model)
    stages = [step_cost(shapes, cell.gpu, deployment, values, k) for k in range(deployment.pp)]
    if has_one_route(record, cell.model):
        stages = [replace(stage, has_one_route=True) for stage in stages]
    prefix = cell.workload.prefix if deployment.prefix_caching else PrefixSharing()
    send_s = values["send_s"] if deployment.pp > 1 else 0.0
    client = client_of(values, is_http=is_http(cell))
    found = []
    for k, traffic in enumerate(cell.traffics):
        begin, mine = k / len(cell.traffics), client
        limits = engine_limits(cell.model, deployment, blocks, values, facts, prefix, begin)
        limits = replace(limits, cold_heads=cell.cold_heads, cold_rows=cell.cold_rows)
        if len(cell.traffics) > 1 and not cell.is_drawn:
            mine = replace(client, wake_s=client.wake_s * FIRST_WAKES[k])
        found.append(simulate(stages, limits, traffic, mine, dp=deployment.dp, send_s=send_s))
    return found


def predicted(simulations: Sequence[Simulation]) -> dict[str, float]:
    """Return the metrics of some draws, averaged; names as in the record."""
    found: dict[str, float] = {}
    for metric in ("ttft", "tpot"):
        for statistic in ("mean", "p50", "p90", "p99"):
            values = [s.latency(metric, statistic) for s in simulations]
            if all(math.isfinite(v) for v in values):
                found[f"{metric}_s.{statistic}"] = float(np.mean(values))
    found["requests_per_s"] = float(np.mean([s.requests_per_s for s in simulations]))
    return found


def values_for(cell: Cell, theta: Mapping[str, float], transfer: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the coefficient values of a cell: GPU factors, then its host's speed and energy factors."""
    factors = transfer.get(cell.gpu.name, {}) if cell.gpu.name != REFERENCE_GPU else {}
    values = scaled({name: theta[name] for name in BY_NAME}, factors)
    return on_node(values, theta.get(f"host@{cell.host}", 1.0), theta.get(f"power@{cell.host}", 1.0))


def on_node(values: Mapping[str, float], speed: float, power: float) -> dict[str, float]:
    """Return coefficient values with the CPU times of a host and the energy an operation of its cards scaled."""
    return {**on_host(values, speed), "joules_per_flop": values["joules_per_flop"] * power}


def cell_residuals(cell: Cell, values: Mapping[str, float]) -> list[float]:
    """Return ln(predicted / measured) of what the fit aims at in a cell, each over the error that counts as one."""
    found = predicted(run_cell(cell, values))
    return [math.log(found.get(t.metric, t.value) / t.value) / t.width for t in targets(cell)]


def exact_traffic(cell: Cell, rows: Mapping[tuple[str, str], list[list[float]]]) -> Cell:
    """Return the cell with the very requests that its client sent, where they were kept; the fit uses them."""
    cell_id = str((cell.record.model_extra or {}).get("cell_id", ""))
    found = rows.get((cell.run_id, cell_id))
    if found is None or cell.workload.load.kind == "closed":
        return cell
    table = np.array(sorted(r[:8] for r in found), dtype=float)
    n = len(table)
    cached = np.nan_to_num(table[:, 7]) if table.shape[1] > 7 else np.zeros(n)
    traffic = Traffic(
        prompt_tokens=table[:, 4].astype(np.int64),
        output_tokens=table[:, 6].astype(np.int64),
        cached_tokens=cached.astype(np.int64),
        shared_prefix_tokens=cell.traffics[0].shared_prefix_tokens,
        arrival_s=table[:, 0] - table[0, 0],
        concurrency=0,
    )
    return replace(cell, traffics=(traffic,))


def read_rows(path: Path) -> dict[tuple[str, str], list[list[float]]]:
    """Return the requests of each cell from a rows file (gzipped JSON lines), by run and cell id."""
    rows: dict[tuple[str, str], list[list[float]]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                entry: dict[str, Any] = json.loads(line)
                rows[entry["run_id"], entry["cell_id"]] = entry["rows"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadData(str(path), f"not a file of request rows ({type(error).__name__})") from None
    return rows
