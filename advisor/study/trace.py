"""A recorded trace as a workload."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from advisor.errors import BadData, UnknownName, printable
from advisor.schema import TraceLengths, TraceLoad, Workload, first_error
from advisor.units import MIB

MAX_TRACE_BYTES = 256 * MIB
MAX_TRACE_ROWS = 2_000_000
"""The most requests that a replay takes."""

COLUMNS = {
    "time": ("time", "t_s", "time_s", "arrival_s", "arrival_time_s", "timestamp", "timestamp_s"),
    "prompt": ("prompt_tokens", "input_tokens", "num_prefill_tokens", "isl", "prompt"),
    "output": ("output_tokens", "generated_tokens", "num_decode_tokens", "osl", "output"),
}
"""Names that public traces give to the three columns; case does not matter."""


def _named(header: list[str], path: str) -> dict[str, int]:
    lowered = [h.strip().lower() for h in header]
    found = {}
    for column, names in COLUMNS.items():
        place = next((lowered.index(n) for n in names if n in lowered), None)
        if place is None:
            shown = ", ".join(printable(h, 30) for h in header[:8])
            raise BadData(path, f"has no column for the {column} (one of {', '.join(names)}); its columns: {shown}")
        found[column] = place
    if "trace" in lowered:
        found["trace"] = lowered.index("trace")
    return found


def _rows(path: Path, shown: str, trace_name: str) -> Iterator[tuple[float, int, int]]:
    seen: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle)
        at = _named(next(reader, []), shown)
        for row in reader:
            if not row:
                continue
            try:
                name = row[at["trace"]] if "trace" in at else ""
                seen.setdefault(name)
                if trace_name and name != trace_name:
                    continue
                yield float(row[at["time"]]), int(row[at["prompt"]]), int(row[at["output"]])
            except (ValueError, IndexError):
                text = printable(",".join(row))
                raise BadData(
                    shown, f"line {reader.line_num} needs seconds and two whole numbers, got '{text}'"
                ) from None
            if len(seen) > 1 and not trace_name:
                raise BadData(
                    shown, f"holds several traces ({', '.join(map(printable, seen))}, ...); set trace_name to one"
                )
    if trace_name and trace_name not in seen:
        raise BadData(shown, str(UnknownName("trace_name", trace_name, seen)))


@lru_cache(maxsize=32)
def digest(path: Path) -> str:
    """Return the SHA-256 of a file of bounded size; BadData when there is none."""
    shown = printable(path, 200)
    try:
        if not path.is_file():
            raise BadData(shown, "no such file")
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise BadData(shown, f"is larger than {MAX_TRACE_BYTES // MIB} MiB, the most that is read")
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise BadData(shown, f"cannot be read ({type(error).__name__})") from None


@lru_cache(maxsize=8)
def read_trace(path: Path, trace_name: str = "", label: str = "trace") -> Workload:
    """Return a trace as a workload: arrival times from its first request [s], lengths in tokens.

    path       : CSV with a header; columns as in COLUMNS, others are ignored; rows may stand in any order
    trace_name : value of the column 'trace' to keep, where a file holds several traces
    Raises BadData with the line for anything else.
    """
    shown = printable(path, 200)
    digest(path)
    rows = []
    try:
        for row in _rows(path, shown, trace_name):
            rows.append(row)
            if len(rows) > MAX_TRACE_ROWS:
                raise BadData(shown, f"has more than {MAX_TRACE_ROWS:,} requests; cut it")
    except UnicodeDecodeError:
        raise BadData(shown, "must be UTF-8 text") from None
    except csv.Error as error:
        raise BadData(shown, f"is no CSV: {printable(error)}") from None
    if not rows:
        raise BadData(shown, "has no requests")
    rows.sort(key=lambda row: row[0])
    times, prompts, outputs = zip(*rows, strict=True)
    try:
        return Workload(
            name=label,
            lengths=TraceLengths(name=label, prompt_tokens=prompts, output_tokens=outputs),
            load=TraceLoad(arrival_s=tuple(t - times[0] for t in times)),
        )
    except ValidationError as error:
        raise BadData(shown, first_error(error)) from None
