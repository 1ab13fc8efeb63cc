"""Independent calculations side by side: on a machine with several cores a first answer waits for half of them only."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
MOST_PROCESSES = 4
"""A fork takes some milliseconds, a replay some tens."""
MOST_JOBS = 256
"""One byte a job; the rest are the caller's."""
TASKS = Path("/proc/self/task")


def n_processes(n_jobs: int) -> int:
    """Return in how many processes so many jobs are worth doing here.

    More than one only where a fork copies everything that runs: on Linux, in a process with one thread (the command
    line's; not a web server's, whose locks a copy would find held for ever by threads that it does not have).
    """
    try:
        n_threads, n_cores = len(list(TASKS.iterdir())), len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        return 1
    return min(n_cores, n_jobs, MOST_PROCESSES) if n_threads == 1 else 1


def side_by_side(jobs: Sequence[Callable[[], T]], meanwhile: Callable[[], object] | None = None) -> dict[int, T]:
    """Return what the jobs return, by their place in the list, all of them done on as many cores as there are.

    meanwhile : what the caller does itself before it joins in, whether or not anything is done beside it

    A job that raises has no result here: whoever needs it makes it again, and sees why. Where one process is all there
    is, nothing is done, for the same reason: the caller's own way is as fast. Results must be picklable.
    """
    n = n_processes(len(jobs))
    if n < 2:
        if meanwhile is not None:
            meanwhile()
        return {}
    # a pipe of job numbers, a byte each: whoever is free takes the next
    todo, filled = os.pipe()
    os.write(filled, bytes(range(min(len(jobs), MOST_JOBS))))
    os.close(filled)
    children: list[tuple[int, int]] = []
    made: dict[int, T] = {}
    try:
        for _ in range(n - 1):
            theirs, mine = os.pipe()
            child = os.fork()
            if not child:
                _work(jobs, todo, mine)
            os.close(mine)
            children.append((child, theirs))
        if meanwhile is not None:
            meanwhile()
        _take(jobs, todo, made)
        for _, theirs in children:
            with open(theirs, "rb", closefd=False) as answer, suppress(EOFError, pickle.UnpicklingError):
                made |= pickle.load(answer)  # noqa: S301 - from this process's own child
    finally:
        os.close(todo)
        for child, theirs in children:
            os.close(theirs)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return made


def _take(jobs: Sequence[Callable[[], T]], todo: int, made: dict[int, T]) -> None:
    while ticket := os.read(todo, 1):
        with suppress(Exception):
            made[ticket[0]] = jobs[ticket[0]]()


def _work(jobs: Sequence[Callable[[], T]], todo: int, mine: int) -> None:
    """Do jobs in a child, send what came out, and end without a word: what is open belongs to the parent."""
    try:
        made: dict[int, T] = {}
        _take(jobs, todo, made)
        with open(mine, "wb") as answer:
            pickle.dump(made, answer, pickle.HIGHEST_PROTOCOL)
    finally:
        os._exit(0)
