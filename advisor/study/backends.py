"""Where batches run: this process, processes of this machine, a Ray cluster, a Dask cluster."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

from advisor.errors import AdvisorError, DomainError, UnknownName, printable
from advisor.schema.study import Study
from advisor.study.cell import Row, run_batch, worker_batch
from advisor.study.grid import Cell

Backend = Literal["processes", "ray", "dask"]
BACKENDS: tuple[str, ...] = get_args(Backend)
NEEDS = {"processes": ("joblib",), "ray": ("ray",), "dask": ("joblib", "dask", "distributed")}
INSTALL = {
    "processes": "pip install 'advisor[study]', or give --workers 1",
    "ray": "pip install ray",
    "dask": "pip install joblib 'dask[distributed]'",
}
AHEAD = 2
"""Batches that wait for each worker: enough to hide the way to it, few enough to lose little when a run is killed."""

CONNECT_S = 10.0
_HOST_PORT = re.compile(r"(?:[a-z]+://)?(\[[0-9a-fA-F:]+\]|[^:/\[\]]+):(\d{1,5})/?")
DIED = "a worker died, perhaps for lack of memory; all finished cells are kept: give the same command to go on"
Result = tuple[list[Row], float]


class ClusterError(AdvisorError):
    """A cluster cannot be reached, or a worker died."""


def check_backend(backend: str, n_workers: int | None) -> None:
    """Raise an AdvisorError for a backend that is unknown or whose package is absent, and for senseless counts."""
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS, f"Backends: {', '.join(BACKENDS)}.")
    if n_workers is not None and not 1 <= n_workers <= 100_000:
        raise DomainError(f"workers must be 1 to 100,000, got {n_workers}")
    if backend == "processes" and n_workers in (None, 1):
        return
    absent = [name for name in NEEDS[backend] if importlib.util.find_spec(name) is None]
    if absent:
        raise DomainError(f"backend {backend} needs {' and '.join(absent)}: {INSTALL[backend]}")


def workers_of(backend: str, n_workers: int | None) -> int:
    """Return the number of workers: what is given, else the cores of this machine, 0 = all of a cluster."""
    if n_workers is not None:
        return n_workers
    if backend != "processes":
        return 0
    if importlib.util.find_spec("joblib") is None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_reachable(kind: str, address: str | None) -> None:
    """Raise ClusterError when nothing listens at HOST:PORT; Ray's own client would try for many minutes."""
    match = _HOST_PORT.fullmatch(address or "")
    if match is None:
        return
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no {kind} cluster at {printable(address)}: {printable(error, 200)}") from None


def _on_ray(
    study: Study, batches: Iterable[list[Cell]], n_workers: int, address: str | None
) -> Generator[Result, None, None]:
    """Yield results from Ray, which joblib's own Ray backend could only hand over all at once at the end."""
    import ray

    # RAY_ADDRESS names a cluster as well as --address does; only a cluster of our own can be given a size
    where = address or os.environ.get("RAY_ADDRESS")
    is_local = not where
    _check_reachable("Ray", where)
    size = {"num_cpus": n_workers} if is_local and n_workers else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **size)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at {printable(where)}: {printable(error, 200)}") from None
    try:
        task, shared = ray.remote(worker_batch), ray.put(study)
        most = n_workers if n_workers and not is_local else AHEAD * int(ray.cluster_resources().get("CPU", 1))
        running: list[Any] = []
        for batch in batches:
            running.append(task.remote(shared, batch))
            if len(running) >= most:
                ready, running = ray.wait(running)
                yield ray.get(ready[0])
        while running:
            ready, running = ray.wait(running)
            yield ray.get(ready[0])
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{DIED} ({type(error).__name__})") from None
    finally:
        ray.shutdown()


@contextmanager
def _dask(address: str | None, n_workers: int) -> Iterator[None]:
    from distributed import Client, LocalCluster

    cluster = None
    _check_reachable("Dask", address)
    try:
        if address is None:
            # one thread a process: the simulator is Python and holds the interpreter's lock
            cluster = LocalCluster(n_workers=n_workers or None, threads_per_worker=1, dashboard_address=None)
        client = Client(cluster if cluster is not None else address, timeout="20s")
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask cluster at {printable(address)}: {printable(error, 200)}") from None
    try:
        yield
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


def results(
    study: Study, batches: Iterable[list[Cell]], *, backend: str, n_workers: int, address: str | None
) -> Generator[Result, None, None]:
    """Yield the result of each batch as it is ready, in any order; `batches` is drawn from a few ahead.

    n_workers : 1 on `processes` runs here without joblib; 0 on a cluster means all of it
    Raises ClusterError for a cluster that cannot be reached and for a worker that died.
    """
    if backend == "processes" and n_workers == 1:
        for batch in batches:
            yield run_batch(study, batch)
        return
    if backend == "ray":
        yield from _on_ray(study, batches, n_workers, address)
        return
    from joblib import Parallel, delayed, parallel_config

    place = _dask(address, n_workers) if backend == "dask" else nullcontext()
    options: dict[str, Any] = {"backend": "dask" if backend == "dask" else "loky"}
    with place, parallel_config(**options, n_jobs=n_workers or -1):
        pool = Parallel(batch_size=1, pre_dispatch=f"{AHEAD} * n_jobs", return_as="generator_unordered")
        found = pool(delayed(worker_batch)(study, batch) for batch in batches)
        try:
            yield from found
        except BrokenProcessPool as error:
            raise ClusterError(f"{DIED} ({type(error).__name__})") from None
        finally:
            with warnings.catch_warnings():
                # joblib says that tasks were cancelled, which is what a stop is
                warnings.simplefilter("ignore")
                found.close()
