"""How much of what the law gets wrong on left-out starts any function of model, plan and load could still explain.

The errors of left-out starts (data/fitted/accuracy_cells.json) against those of the most alike cells of *other* starts,
or of starts on other hosts: the median of the nearest ones' errors is taken off. What remains is not in the
configuration: it changes from one start to the next. Prints a table; asserts nothing.

    python -m benchmarks.what_is_left
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from advisor.catalog import load_catalog
from advisor.fit.objective import is_http
from advisor.fit.records import Cell
from advisor.fit.run import load_data
from advisor.fit.validate import summed_up
from advisor.predict.shapes import shapes_of

Floats = NDArray[np.float64]
METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s")
NEIGHBOURS = (3, 7, 15, 30)
LARGEST = 0.7
"""Errors (natural log) are cut here, so that no pause of seconds speaks for its neighbours."""


def features(cell: Cell) -> list[float]:
    """Return what is known of a cell before it runs: model, plan, load; numbers as logarithms, kinds as 0 or 3."""
    shapes, plan, load, traffic = shapes_of(cell.model), cell.deployment, cell.workload.load, cell.traffics[0]
    clients = getattr(load, "concurrency", 0)
    numbers = (
        shapes.d_model, shapes.n_layers, shapes.d_ff, shapes.n_kv_heads, shapes.matrix_params / plan.tp,
        shapes.n_experts + 1, plan.tp, plan.pp, plan.dp, clients + 1, len(traffic.prompt_tokens),
        float(traffic.prompt_tokens.mean()), float(traffic.output_tokens.mean()), plan.max_num_batched_tokens,
    )  # fmt: skip
    kinds = (
        cell.gpu.name.startswith("h200"), plan.enforce_eager, is_http(cell), plan.weight_dtype == "fp8",
        plan.weight_dtype.endswith("int4"), plan.kv_dtype == "fp8", plan.prefix_caching, clients == 0,
    )  # fmt: skip
    return [math.log2(n) for n in numbers] + [3.0 * kind for kind in kinds]


def left_after(errors: Floats, where: Floats, groups: Sequence[str], k: int) -> Floats:
    """Return the errors less the median of the `k` most alike cells' that are of another group."""
    tree = cKDTree(where)
    names = np.array(groups)
    out = errors.copy()
    _, order = tree.query(where, k=min(len(where), 20 * k))
    for i, near in enumerate(order):
        others = near[names[near] != names[i]][:k]
        if len(others):
            out[i] -= float(np.median(errors[others]))
    return out


def shown(errors: Floats) -> str:
    """Return median and 90th percentile of the relative error, in per cent."""
    found = summed_up(np.expm1(errors).tolist())
    return f"{100 * found['median']:5.1f} /{100 * found['p90']:5.1f}"


def main() -> None:
    """Print what is left after the nearest cells of other starts, and of other hosts, have been asked."""
    catalog = load_catalog()
    number: dict[str, int] = {}
    cells: dict[tuple[str, int], Cell] = {}
    for cell in load_data(catalog.root / "runs", catalog).cells:
        place = number[cell.run_id] = number.get(cell.run_id, -1) + 1
        cells[cell.run_id, place] = cell
    path = catalog.root / "fitted" / "accuracy_cells.json"
    rows: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    print("median / P90 in per cent".ljust(28), "the law".rjust(13), *(f"{k} others".rjust(13) for k in NEIGHBOURS))
    for metric in METRICS:
        mine = [row for row in rows if metric in row["values"]]
        found = [cells[row["run_id"], row["cell"]] for row in mine]
        pairs = np.array([row["values"][metric] for row in mine])
        errors = np.clip(np.log(pairs[:, 1] / pairs[:, 0]), -LARGEST, LARGEST)
        where = np.array([features(cell) for cell in found])
        for what, groups in (("starts", [c.run_id for c in found]), ("hosts", [c.host for c in found])):
            left = (shown(left_after(errors, where, groups, k)).rjust(13) for k in NEIGHBOURS)
            print(f"{metric}, other {what}".ljust(28), shown(errors).rjust(13), *left)


if __name__ == "__main__":
    main()
