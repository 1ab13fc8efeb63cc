"""Worker processes for the calls that take long: one session's question does not hold up the clicks of the others.

Without `start` (tests, a notebook) everything runs in the caller's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from threading import Lock
from typing import TypeVar

from advisor.errors import AdvisorError, DomainError

T = TypeVar("T")
MAX_WORKERS = 4
WORKERS = "ADVISOR_APP_WORKERS"
"""Environment variable with the number of workers; 0 = none, everything in the server's own process."""

_lock = Lock()
_pool: ProcessPoolExecutor | None = None
_warm: list[Future[None]] = []


def start() -> None:
    """Start the workers, once; they load the catalogue while the first page is answered without them."""
    global _pool
    with _lock:
        if _pool is None:
            n = _n_workers()
            if n == 0:
                return
            # not forked: a copy of a process with threads may hold locks that nobody will release
            _pool = ProcessPoolExecutor(n, mp_context=get_context("spawn"))
            _warm[:] = [_pool.submit(_load) for _ in range(n)]


def _n_workers() -> int:
    """Return how many workers to start: as many as the environment says, else one a core, at most four."""
    asked = os.environ.get(WORKERS, "")
    if asked.isdigit():
        return min(int(asked), 64)
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))


def wait() -> None:
    """Wait until the workers have loaded the catalogue; nothing to wait for without workers."""
    for future in list(_warm):
        future.exception()


def run(call: Callable[..., T], *args: object) -> T:
    """Return `call(*args)`, from a worker where there is one; raises AdvisorError with the call's own sentence."""
    pool = _pool
    if pool is None or not all(f.done() for f in _warm):
        return call(*args)
    try:
        found, fault = pool.submit(_answer, call, args).result()
    except BrokenProcessPool:  # a worker was killed: the next call starts new ones
        _forget(pool)
        return call(*args)
    if fault is not None:
        raise DomainError(fault)
    return found  # type: ignore[return-value]


def run_all(call: Callable[..., T], each: Sequence[tuple[object, ...]]) -> list[T]:
    """Return `call(*args)` for each `args`, as many at once as there are workers."""
    if _pool is None or len(each) < 2:
        return [run(call, *args) for args in each]
    with ThreadPoolExecutor(min(len(each), max(1, _n_workers()))) as waiting:
        return list(waiting.map(lambda args: run(call, *args), each))


def _answer(call: Callable[..., T], args: tuple[object, ...]) -> tuple[T | None, str | None]:
    try:
        return call(*args), None
    except AdvisorError as error:  # its sentence crosses the process border, the object might not
        return None, str(error)


def _load() -> None:
    import advisor.recommend.answer  # noqa: F401 the modules of the first question
    from advisor.catalog import load_catalog

    catalog = load_catalog()
    for name in ("vllm", "deepspeed", "power"):
        catalog.coefficients(name)


def _forget(pool: ProcessPoolExecutor) -> None:
    global _pool
    with _lock:
        if _pool is pool:
            _pool = None
            _warm.clear()
    pool.shutdown(wait=False, cancel_futures=True)
    start()
