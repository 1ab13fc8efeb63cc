"""Append-only files of JSON lines that survive a kill, a full disk and a second writer."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError, OutFileBusy

Record = dict[str, Any]
LOCK_WAIT_S = 20.0


def percentile(values: Sequence[float], q: float) -> float:
    """Return the linearly interpolated percentile `q` [%] of unsorted values (the rule numpy uses by default)."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles of some values, or None when there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return {"mean": sum(ordered) / len(ordered)} | {f"p{q}": percentile(ordered, q) for q in (50, 90, 95, 99)}


def finite(value: Any) -> Any:
    """Return `value` with every NaN or infinite float replaced by None: JSON has no such number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def read_lines(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the complete JSON objects of a file of lines; a torn last line is passed over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except FileNotFoundError:
        return


def _lock(fd: int, path: str, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise OutFileBusy(
                    f"another run is writing '{path}'; wait for it to end, or give this run another file"
                ) from None
            time.sleep(0.02)


@contextlib.contextmanager
def hold_folder(path: Path) -> Iterator[None]:
    """Hold a folder for one run; a second run gets OutFileBusy at once."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _lock(fd, str(path), 0)
        yield
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    """Append `data` wholly or not at all."""
    size = os.fstat(fd).st_size
    done = 0
    try:
        while done < len(data):
            done += os.write(fd, data[done:])
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        raise


def _drop_torn_line(fd: int) -> None:
    """Cut off a last line without its newline: what a killed writer or a full disk may have left."""
    size = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    keep = size
    while keep:
        start = max(0, keep - 65536)
        cut = os.pread(fd, keep - start, start).rfind(b"\n")
        if cut >= 0:
            os.ftruncate(fd, start + cut + 1)
            return
        keep = start
    os.ftruncate(fd, 0)


class Appender:
    """A file of JSON lines to which whole records are appended and synced.

    `shared` lets several runs append to one file, a lock a line; otherwise the file is held for the life of the
    appender. What cannot be written (full disk) goes to a spill file in the temporary folder and is written again
    with the next record, so that no record is lost or half-written.
    """

    def __init__(self, path: str | os.PathLike[str], *, shared: bool = False, is_gzip: bool = False) -> None:
        self.path = Path(path)
        self.shared, self.is_gzip = shared, is_gzip
        self.pending: list[Record] = []
        self.spill = Path(tempfile.gettempdir()) / f"calibration-spill-{os.getpid()}-{self.path.name}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as err:
            raise CalibrationError(f"cannot write '{self.path}': {err.strerror}") from None
        _lock(self.fd, str(self.path), LOCK_WAIT_S if shared else 0)
        if not is_gzip:
            _drop_torn_line(self.fd)
        if shared:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def append(self, record: Record) -> str | None:
        """Append one record and everything still pending; return a warning line when it had to be spilled."""
        self.pending.append(finite(record))
        text = "".join(json.dumps(r, separators=(", ", ": ")) + "\n" for r in self.pending).encode()
        try:
            if self.shared:
                _lock(self.fd, str(self.path), LOCK_WAIT_S)
            try:
                if not self.is_gzip:
                    _drop_torn_line(self.fd)
                _write_all(self.fd, gzip.compress(text) if self.is_gzip else text)
            finally:
                if self.shared:
                    fcntl.flock(self.fd, fcntl.LOCK_UN)
        except (OSError, OutFileBusy) as err:
            return self._spill(text, err)
        self.pending.clear()
        self.spill.unlink(missing_ok=True)
        return None

    def _spill(self, text: bytes, err: Exception) -> str:
        why = getattr(err, "strerror", None) or str(err)
        try:
            self.spill.write_bytes(text)
        except OSError:
            return (
                f"cannot write '{self.path}' ({why}) nor '{self.spill}'; {len(self.pending)} record(s) kept in memory"
            )
        return f"cannot write '{self.path}' ({why}); {len(self.pending)} record(s) kept in '{self.spill}' until it can"

    def close(self) -> list[Record]:
        """Close the file; return the records that never reached it (they are in the spill file, too, if it could)."""
        with contextlib.suppress(OSError):
            os.close(self.fd)
        return self.pending


def matches(record: Record, run_id: str) -> bool:
    """Say whether a record belongs to a run, named in full or by the last part of its name."""
    name = str(record.get("run_id", ""))
    return name == run_id or name.endswith(f"__{run_id}")


def cells_done(paths: Iterable[str | os.PathLike[str]], run_id: str) -> dict[str, Record]:
    """Return the records of a run that are already in some files, by `cell_id`."""
    return {
        str(r["cell_id"]): r
        for p in paths
        for r in read_lines(p)
        if matches(r, run_id) and r.get("cell_id") is not None
    }
