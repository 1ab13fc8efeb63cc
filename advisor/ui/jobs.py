"""Long work in a process of its own: a page starts it, shows how far it is, and finds the result again.

One process works for all sessions, one job after the other, at low priority: the pages stay quick meanwhile.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from advisor.errors import AdvisorError, DomainError

MAX_KEPT = 16
MAX_WAITING = 8
"""Jobs that wait or run at most; more are refused with a sentence."""
T = TypeVar("T")
Work = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """Work that runs or ran; its progress lies in a small file that the worker writes."""

    future: Future[tuple[Any, str | None]]
    note: Path

    def progress(self) -> tuple[float, str]:
        """Return (share done, what is being done)."""
        try:
            share, text = self.note.read_text(encoding="utf-8").split(" ", 1)
            return min(1.0, float(share)), text
        except (OSError, ValueError):
            return 0.0, "waiting for its turn"

    @property
    def is_done(self) -> bool:
        """Return whether there is a result or an error."""
        return self.future.done()

    def result(self) -> Any:
        """Return what the work returned; raises DomainError with its sentence where it refused."""
        found, fault = self.future.result()
        if fault is not None:
            raise DomainError(fault)
        return found


_lock = Lock()
_pool: ProcessPoolExecutor | None = None
_jobs: OrderedDict[str, Job] = OrderedDict()


def find(key: str) -> Job | None:
    """Return the job of a key, None where there is none."""
    return _jobs.get(key)


def start(key: str, work: Work, *args: object) -> Job:
    """Return the job of a key, started where there is none; `work(*args, progress)` runs in the other process.

    Raises DomainError when too many jobs wait.
    """
    with _lock:
        if key in _jobs:
            return _jobs[key]
        if sum(not j.is_done for j in _jobs.values()) >= MAX_WAITING:
            raise DomainError(f"{MAX_WAITING} refits wait already; try again in a few minutes or use the command line")
        while len(_jobs) >= MAX_KEPT:
            old = next(k for k, j in _jobs.items() if j.is_done)
            _jobs.pop(old).note.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix="advisor-", suffix=".progress")
        os.close(handle)
        job = Job(_worker().submit(_run, work, args, name), Path(name))
        _jobs[key] = job
        return job


def run(work: Callable[..., T], *args: object) -> T:
    """Return `work(*args)` from the process of the long jobs, after those that wait."""
    with _lock:
        future = _worker().submit(work, *args)
    return future.result()


def _worker() -> ProcessPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_be_nice)
    return _pool


def _be_nice() -> None:
    if hasattr(os, "nice"):
        os.nice(10)


def _run(work: Work, args: tuple[object, ...], note: str) -> tuple[Any, str | None]:
    def progress(share: float, text: str) -> None:
        # put in place whole: whoever reads meanwhile would find an empty file, and the bar would fall back to nothing
        new = Path(f"{note}.new")
        new.write_text(f"{share:.4f} {text}", encoding="utf-8")
        new.replace(note)

    progress(0.0, "starting")
    try:
        return work(*args, progress), None
    except AdvisorError as error:
        return None, str(error)
