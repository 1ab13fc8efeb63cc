"""Results on disk: one JSON object a line, appended and flushed, so that a killed run loses only cells in progress."""

from __future__ import annotations

import json
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from advisor.errors import BadData, DomainError, printable

_HEAD = re.compile(rb'\{"id": "([0-9a-f]{16})", "basis": "([0-9a-f]{12})", .*\}\n', re.DOTALL)
"""Every row starts with its id and its basis, so that ten million rows are recognised without parsing them."""


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a result file, the last one even when it is torn."""
    with path.open("rb") as handle:
        yield from handle


class Done:
    """The ids that a result file holds: 8 bytes each, whatever the rows weigh."""

    def __init__(self, ids: array[int]) -> None:
        self._ids = array("Q", sorted(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, cell_id: str) -> bool:
        wanted = int(cell_id, 16)
        place = bisect_left(self._ids, wanted)
        return place < len(self._ids) and self._ids[place] == wanted


class Store:
    """A result file that one process appends to; opening it finds what is there and drops a torn last line.

    Raises DomainError when another process writes the file, BadData when it holds something else or rests on another
    release or fit.
    """

    def __init__(self, path: Path, basis: str, *, is_resumed: bool = True) -> None:
        self.path = path
        self.basis = basis
        shown = printable(path, 200)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: BinaryIO = path.open("ab", buffering=0)
        except OSError as error:
            raise BadData(shown, f"cannot be written ({error.strerror or type(error).__name__})") from None
        try:
            _lock(self._handle, shown)
            self.done = Done(self._read(basis, shown))
            if len(self.done) and not is_resumed:
                raise DomainError(f"{shown} holds {len(self.done):,} results; remove it, name another file, or resume")
        except BaseException:
            self._handle.close()
            raise

    def _read(self, basis: str, shown: str) -> array[int]:
        ids: array[int] = array("Q")
        whole_bytes = 0
        for number, line in enumerate(lines_of(self.path), start=1):
            if not line.endswith(b"\n"):
                # a kill between write and newline: the cell is computed again
                os.truncate(self.path, whole_bytes)
                break
            match = _HEAD.fullmatch(line)
            if match is None:
                raise BadData(shown, f"line {number} is no result of a study; name another file or remove the line")
            if match[2].decode() != basis:
                raise BadData(
                    shown,
                    f"line {number} rests on other data or another release (basis {match[2].decode()}, now {basis});"
                    " name another file, for the two must not be mixed",
                )
            ids.append(int(match[1], 16))
            whole_bytes += len(line)
        return ids

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as whole lines in one call, and return when they are on the disk.

        Raises BadData for a row of a worker that has another release or other data than this process.
        """
        for row in rows:
            if row["basis"] != self.basis:
                text = f"a worker has other data or another release (basis {row['basis']}, here {self.basis})"
                raise BadData(printable(self.path, 200), f"{text}; install the same on every machine, then go on")
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        while data:
            data = data[self._handle.write(data) or 0 :]
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file, which lets another process write it."""
        self._handle.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(handle: BinaryIO, shown: str) -> None:
    """Take the file for this process until it is closed; where the system has no such locks, do nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DomainError(f"{shown} is being written by another run; wait for it or name another file") from None
    except OSError:
        # network file systems may refuse locks; each shard has its own file there
        return
