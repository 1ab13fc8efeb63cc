"""The result file as one Parquet table, a column for each value."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from advisor.errors import DomainError, printable
from advisor.study.store import lines_of

ROWS_AT_ONCE = 20_000
BOUNDS = ("", ".low", ".high")


def is_parquet(path: Path) -> bool:
    """Return whether a result is asked for as Parquet; DomainError when it is and pyarrow is not installed."""
    if path.suffix.lower() != ".parquet":
        return False
    if importlib.util.find_spec("pyarrow") is None:
        shown = printable(path.with_suffix(".jsonl"), 200)
        raise DomainError(f"a .parquet file needs the package pyarrow; install it, or give --out {shown}")
    return True


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with a column for each value: 'plan.tp', 'ttft_p99_s' and its bounds '.low' and '.high'."""
    plain = {k: v for k, v in row.items() if k not in ("plan", "quantities")}
    plain |= {f"plan.{k}": v for k, v in row.get("plan", {}).items()}
    for name, interval in row.get("quantities", {}).items():
        plain |= {name + bound: value for bound, value in zip(BOUNDS, interval, strict=True)}
    return plain


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (flat(json.loads(line)) for line in lines_of(path))


def _kind(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "bool_"
    if isinstance(value, str):
        return "string"
    is_count = isinstance(value, int) and (name == "seed" or name.startswith("plan."))
    return "int64" if is_count and name != "plan.gpu_memory_utilization" else "float64"


def write_parquet(source: Path, target: Path) -> int:
    """Write a JSONL result file as Parquet and return its number of rows; memory is bounded by ROWS_AT_ONCE.

    The columns are those of any row; a row that lacks one has a null there. The file appears whole or not at all.
    """
    # importlib: pyarrow has no types, and the type checker must pass where it is not installed too
    pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")

    kinds: dict[str, str] = {}
    for row in _rows(source):
        for name, value in row.items():
            kinds.setdefault(name, _kind(name, value))
    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in kinds.items()])
    partial = target.with_name(target.name + ".part")
    n_rows = 0
    with pq.ParquetWriter(partial, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in _rows(source):
            batch.append(row)
            if len(batch) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                n_rows, batch = n_rows + len(batch), []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    partial.replace(target)
    return n_rows + len(batch)
