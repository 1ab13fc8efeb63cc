"""Errors of the DeepSpeed laws on records that the fit did not see: each run in turn is left out and predicted.

``python -m benchmarks.deepspeed_left_out`` fits training, eager, injected and ZeRO-Inference coefficients anew without
a run (kernel injection has one run: without a cell) and predicts it. A run that alone measures a coefficient cannot be
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from advisor.catalog import load_catalog
from advisor.fit.deepspeed import eager_coefficients, inject_coefficients, model_of
from advisor.fit.deepspeed_ranks import rank_coefficients
from advisor.fit.deepspeed_training import training_coefficients
from advisor.fit.deepspeed_zero import zero_pass_coefficients
from advisor.schema import CoefficientSet
from benchmarks.deepspeed_records import RUNS, Row, read, rows_of, show

Raw = dict[str, Any]
Fit = Callable[[Sequence[Raw]], dict[str, Any]]


def _training(records: Sequence[Raw]) -> dict[str, Any]:
    runs = [r for r in records if r["engine"] != "micro"]
    return dict(training_coefficients(runs, model_of)) | rank_coefficients(records)


def _zero_pass(records: Sequence[Raw]) -> dict[str, Any]:
    catalog = load_catalog()
    gather = catalog.coefficients("deepspeed").coefficients["zero_gather_eff"].value
    return dict(zero_pass_coefficients(records, model_of, catalog.gpu("h100-sxm-80gb"), gather))


def _groups(records: Sequence[Raw]) -> Iterator[tuple[str, list[Raw], Fit]]:
    """Yield (what is left out, its records, the fit of the rest)."""
    for run in dict.fromkeys(r["run_id"] for r in records):
        some = [r for r in records if r["run_id"] == run]
        if some[0]["engine"] == "deepspeed-zero-train":
            yield run.split("__")[-1], some, _training
        elif some[0].get("mode") in ("eager", "autotp") and some[0]["tp"] == 1:
            yield run.split("__")[-1], some, eager_coefficients
        elif some[0].get("n_warm_passes") and some[0]["dp"] == 1:
            yield run.split("__")[-1], some, _zero_pass
        elif some[0].get("mode") == "kernel-injection":
            for r in some:
                yield f"a cell of {run.split('__')[-1]}", [r], inject_coefficients


def left_out(records: Sequence[Raw]) -> tuple[list[Row], list[str]]:
    """Return every number of every run, predicted without it, and the runs that cannot be left out."""
    shipped = load_catalog().coefficients("deepspeed")
    rows: list[Row] = []
    alone: list[str] = []
    for name, some, fit in _groups(records):
        rest = [r for r in records if not any(r is s for s in some)]
        try:
            fitted = fit(rest)
        except (StopIteration, ValueError, IndexError):
            alone.append(name)
            continue
        coefficients: CoefficientSet = shipped.model_copy(update={"coefficients": dict(shipped.coefficients) | fitted})
        # power has a fit of its own
        rows += [row for r in some for row in rows_of(r, coefficients=coefficients) if "power" not in row.kind]
    return rows, alone


def main() -> None:
    """Print every row, and the median and worst error of each kind."""
    paths = sorted([*RUNS.glob("deepspeed-*.jsonl"), *RUNS.glob("micro-*.jsonl")])
    records = read(paths)
    rows, alone = left_out(records)
    show(rows)
    if alone:
        print(f"cannot be left out, they alone measure a coefficient: {', '.join(alone)}")


if __name__ == "__main__":
    main()
