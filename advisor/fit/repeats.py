"""How much two starts of one engine differ: the floor under the error of any prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from advisor.fit.meter import has_power
from advisor.fit.objective import is_http, measured
from advisor.fit.records import Cell

METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s", "board_power_w.mean")


def _key(cell: Cell) -> tuple[object, ...]:
    """Return what two cells share when the same was asked of two starts: model, plan, lengths, clients."""
    config = json.dumps(cell.record.hf_config, sort_keys=True)
    return config, cell.deployment.model_copy(update={"max_model_len": 0}), cell.workload.lengths, cell.workload.load


def _figures(cell: Cell) -> dict[str, float]:
    found = measured(cell)
    power = cell.record.measured.board_power_w
    if power is not None and has_power(cell.record):
        found["board_power_w.mean"] = power.mean
    return found


def noise_floor(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return how far two starts of one engine are apart in the same closed cell: median and P90 of |ln ratio|, n pairs.

    metrics  : of two hosts, what a user would see who measures on one and deploys on another; with `runs` and `pairs`
    one_host : of two starts on the same host, in the same way
    Random loads are left out, as their requests differ from draw to draw.
    """
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if cell.workload.load.kind == "closed" and not is_http(cell):
            groups.setdefault(_key(cell), []).append(cell)
    pairs = [(a, b) for group in groups.values() for a, b in combinations(group, 2) if a.run_id != b.run_id]
    two, one = [(a, b) for a, b in pairs if a.host != b.host], [(a, b) for a, b in pairs if a.host == b.host]
    return {**_apart(two), "one_host": _apart(one)}


def _apart(pairs: Sequence[tuple[Cell, Cell]]) -> dict[str, Any]:
    apart: dict[str, list[float]] = {}
    for a, b in pairs:
        mine, theirs = _figures(a), _figures(b)
        for metric in METRICS:
            if metric in mine and metric in theirs:
                apart.setdefault(metric, []).append(abs(math.log(mine[metric] / theirs[metric])))
    table = {
        metric: {"median": float(np.median(d)), "p90": float(np.quantile(d, 0.9)), "n": len(d)}
        for metric, d in ((m, apart[m]) for m in METRICS if m in apart)
    }
    return {"metrics": table, "runs": sorted({c.run_id for pair in pairs for c in pair}), "pairs": len(pairs)}
