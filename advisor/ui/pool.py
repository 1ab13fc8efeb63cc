"""Worker processes for the calls that take long: one session's question does not hold up the clicks of the others.

Without `start` (tests, a notebook) everything runs in the caller's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from threading import Lock
from typing import TypeVar
from zlib import crc32

from advisor.errors import AdvisorError, DomainError

T = TypeVar("T")
MAX_WORKERS = 4
NICE = 5
"""Workers give way to the server, which draws the pages of those who only click."""
WORKERS = "ADVISOR_APP_WORKERS"
"""Environment variable with the number of workers; 0 = none, everything in the server's own process."""

_lock = Lock()
_workers: list[ProcessPoolExecutor] = []
_busy: list[int] = []
_warm: list[Future[None]] = []
Answer = tuple[T | None, str | None]
"""What a call returned, or the sentence of its AdvisorError."""


def start() -> None:
    """Start the workers, once; they load the catalogue while the first page is answered without them."""
    with _lock:
        if not _workers:
            n = _n_workers()
            # not forked: a copy of a process with threads may hold locks that nobody will release
            _workers[:] = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(n)]
            _busy[:] = [0] * n
            _warm[:] = [worker.submit(_load) for worker in _workers]


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


def submit(near: str, call: Callable[..., T], *args: object) -> Future[Answer[T]]:
    """Return the future of `call(*args)`; without workers it is done when this returns.

    near : calls with the same text go to the same worker while it is free: it has kept what they share
    """
    with _lock:
        workers = list(_workers) if _workers and all(f.done() for f in _warm) else []
        at = _place(near)
        if workers:
            _busy[at] += 1
    if not workers:
        return _here(call, *args)
    try:
        future = workers[at].submit(_answer, call, args)
    except BrokenProcessPool:
        _forget(workers)
        return _here(call, *args)
    future.add_done_callback(lambda _: _leave(workers, at))
    return future


def _here(call: Callable[..., T], *args: object) -> Future[Answer[T]]:
    future: Future[Answer[T]] = Future()
    try:
        future.set_result(_answer(call, args))
    except Exception as error:  # noqa: BLE001 whoever asks for the result gets it
        future.set_exception(error)
    return future


def _place(near: str) -> int:
    """Return which worker to take: that of `near`, unless another one has less to do."""
    first = crc32(near.encode()) % max(1, len(_busy))
    return min(range(len(_busy)), key=lambda i: (_busy[i], i != first), default=0)


def _leave(workers: list[ProcessPoolExecutor], at: int) -> None:
    with _lock:
        if workers == _workers:
            _busy[at] -= 1


def run(call: Callable[..., T], *args: object, near: str = "") -> T:
    """Return `call(*args)`, from a worker where there is one; raises AdvisorError with the call's own sentence."""
    if not is_running():
        return call(*args)
    return result(submit(near, call, *args), call, *args)


def result(future: Future[Answer[T]], call: Callable[..., T], *args: object, timeout_s: float | None = None) -> T:
    """Return what `submit` gave a future for; raises AdvisorError as `run` does, TimeoutError after `timeout_s`."""
    try:
        found, fault = future.result(timeout_s)
    except BrokenProcessPool:  # a worker was killed: the next call starts new ones
        _forget(list(_workers))
        return call(*args)
    if fault is not None:
        raise DomainError(fault)
    return found  # type: ignore[return-value]


def is_running() -> bool:
    """Return whether there are workers that take calls."""
    return bool(_workers) and all(f.done() for f in _warm)


def run_all(call: Callable[..., T], each: Sequence[tuple[object, ...]]) -> list[T]:
    """Return `call(*args)` for each `args`, as many at once as there are workers."""
    if not is_running():
        return [call(*args) for args in each]
    futures = [submit("", call, *args) for args in each]
    return [result(future, call, *args) for future, args in zip(futures, each, strict=True)]


def _answer(call: Callable[..., T], args: tuple[object, ...]) -> tuple[T | None, str | None]:
    try:
        return call(*args), None
    except AdvisorError as error:  # its sentence crosses the process border, the object might not
        return None, str(error)


def _load() -> None:
    if hasattr(os, "nice"):
        os.nice(NICE)
    import advisor.recommend.answer  # noqa: F401 the modules of the first question
    from advisor.catalog import load_catalog

    catalog = load_catalog()
    for name in ("vllm", "deepspeed", "power"):
        catalog.coefficients(name)


def _forget(broken: list[ProcessPoolExecutor]) -> None:
    with _lock:
        if broken != _workers:
            return
        _workers.clear()
        _busy.clear()
        _warm.clear()
    for worker in broken:
        worker.shutdown(wait=False, cancel_futures=True)
    start()
