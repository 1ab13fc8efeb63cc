"""Errors of the DeepSpeed predictions on our own run records.

``python -m benchmarks.deepspeed_records [FILE.jsonl ...]``; without files, all of data/runs/deepspeed-*.jsonl. Prints
every number predicted and measured, and the median and worst error of each kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from advisor.catalog import load_catalog
from advisor.fit.deepspeed import job_of, model_of
from advisor.laws.bubble import pipeline_s
from advisor.predict.deepspeed_step import StepLaw, rates_of
from advisor.predict.shapes import shapes_of
from advisor.predict.train import predict_train
from advisor.schema import Backend, Cluster, CoefficientSet, Deployment

Raw = dict[str, Any]
RUNS = Path(__file__).resolve().parents[1] / "data" / "runs"
BACKENDS: dict[str, Backend] = {
    "eager": "deepspeed-autotp",
    "autotp": "deepspeed-autotp",
    "kernel-injection": "deepspeed-kernel-injection",
}


class Row(NamedTuple):
    """One number of one cell."""

    kind: str
    cell: str
    ours: float
    seen: float

    @property
    def error(self) -> float:
        """Return predicted over measured, less one."""
        return self.ours / self.seen - 1


def _step_law(record: Raw, backend: Backend, coefficients: CoefficientSet) -> StepLaw:
    catalog = load_catalog()
    rates = rates_of(coefficients, record["gpu"])[0]
    cluster = Cluster(gpu=catalog.gpu(record["gpu"]), gpus_per_node=max(1, record["n_gpus"]))
    offload = "cpu" if record.get("offload", "none") != "none" else "none"
    deployment = Deployment(
        backend=backend,
        model=record["model"],
        gpu=record["gpu"],
        tp=record["tp"],
        dp=record["dp"],
        weight_dtype=record["weight_dtype"],
        offload=offload,
        kv_offload=record.get("kv_offload", "none"),
    )
    return StepLaw(shapes_of(model_of(record)), cluster, deployment, rates, is_bare=True)


def _is_untraced(record: Raw) -> bool:
    """Return whether a run's first prompt pass is one in which ZeRO-3 still records its trace, without prefetching.

    DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py, reset_step and _fetch_sub_module_impl: the first
    pass has no trace, the second records one. Runs without warm passes of their own timed the second.
    """
    return bool(record["engine"] == "deepspeed-zero-inference" and not record.get("n_warm_passes"))


def rows_of(record: Raw, *, is_first: bool = False, coefficients: CoefficientSet | None = None) -> Iterator[Row]:
    """Yield every number of a record that a law predicts, with the shipped coefficients unless others are given.

    is_first : the record is its engine's first cell
    """
    m, name = record["measured"], record["run_id"].split("__")[-1]
    catalog = load_catalog()
    fitted = coefficients or catalog.coefficients("deepspeed")
    if record["engine"] == "deepspeed-zero-train":
        cluster = Cluster(gpu=catalog.gpu(record["gpu"]), gpus_per_node=8)
        p = predict_train(model_of(record), cluster, job_of(record), fitted)
        cell = f"{name} stage {record['zero_stage']} on {record['n_gpus']}"
        yield Row("training step", cell, p["step_s"], m["step_s"])
        yield Row("training peak memory", cell, p["allocated_bytes_per_gpu"], m["peak_allocated_bytes"])
        yield Row("training power", cell, p["board_power_w"], m["board_power_w"]["mean"])
    elif record["engine"] == "deepspeed-pipe-train":
        n = record["n_microbatches"]
        cell = f"{name} {n} microbatches"
        times = [(s["forward_s"] + s["backward_s"]) / n for s in m["stages"]]
        whole = pipeline_s(times, n) + m["optimizer_s"] + m["reduce_s"]
        yield Row("pipeline step from its stages", cell, whole, m["step_s"])
    elif record.get("load", {}).get("kind") == "batch":
        backend: Backend = "deepspeed-zero-inference" if "zero" in record["engine"] else BACKENDS[record["mode"]]
        law, batch, lengths = _step_law(record, backend, fitted), record["load"]["batch_size"], record["lengths"]
        prompt, output = lengths["prompt_tokens"], lengths["output_tokens"]
        cell = f"{name} {batch} x {prompt}" + (" cache on host" if record.get("kv_offload") == "cpu" else "")
        yield Row(f"decode pass, {backend}", cell, law.decode_s(batch, prompt + output / 2), m["decode_step_s"])
        kind = f"prompt pass, {backend}" + (" (recording its trace)" if is_first and _is_untraced(record) else "")
        yield Row(kind, cell, law.prefill_s(batch, prompt), m["prefill_s"])
    elif record["engine"] == "deepspeed-fastgen":
        load = record["load"]
        law, n, new = _step_law(record, "deepspeed-fastgen", fitted), load["n_seqs"], load["n_prompt_tokens"]
        # a prompt above 2,048 tokens goes in as several; each chunk of one prompt sees half of it
        seen = law.parts(new, n, n * load["context_tokens"], min(new, 2048) / 2).total_s
        yield Row("FastGen step", f"{name} {n} x {load['context_tokens']} + {new}", seen, m["step_s"])


def read(paths: Iterable[Path]) -> list[Raw]:
    """Return the records of some files, in their order."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


def show(rows: Sequence[Row]) -> None:
    """Print every row, and the median and worst error of each kind."""
    for row in rows:
        print(f"{row.kind:<42} {row.cell:<44} {row.ours:12.5g} {row.seen:12.5g} {row.error:+7.1%}")
    print()
    for kind in dict.fromkeys(row.kind for row in rows):
        errors = np.abs([row.error for row in rows if row.kind == kind])
        print(f"{kind:<42} {len(errors):3d} cells, median {np.median(errors):.1%}, worst {errors.max():.1%}")


def main(files: Sequence[str]) -> None:
    """Print every row and the median and worst error of each kind."""
    paths = [Path(f) for f in files] or sorted(RUNS.glob("deepspeed-*.jsonl"))
    records = read(paths)
    ids = [record["run_id"] for record in records]
    rows = [
        row for i, record in enumerate(records) for row in rows_of(record, is_first=record["run_id"] not in ids[:i])
    ]
    show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
