"""Runs the load script of a workload under Locust, in a process of its own, and reports its progress.

Locust patches the interpreter that imports it (gevent), so it never runs inside this one; and what measures here is the
very file that `advisor emit locust` gives away.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from advisor.emit.locust import load_config, load_script
from advisor.errors import AdvisorError
from advisor.schema import ClosedLoad, TraceLoad, Workload
from advisor.verify.endpoint import KEY_VARIABLE, Endpoint
from advisor.verify.measure import Failed, Traced, read_results

POLL_S = 0.25
# A cell may take this many times as long as its arrivals before it is stopped: its queue grows without end.
PATIENCE = 3.0

START_S = 10.0
"""Time that the load driver may take to start, beside its requests: a second, several on a busy machine."""


class Progress(NamedTuple):
    """How far a cell is."""

    cell: str
    n_done: int
    n_expected: int
    elapsed_s: float


Listener = Callable[[Progress], None]


def expected_requests(workload: Workload) -> int:
    """Return how many requests a cell will send, 0 when it is not known."""
    load = workload.load
    if isinstance(load, ClosedLoad):
        return load.n_requests or 0
    if isinstance(load, TraceLoad):
        return len(load.arrival_s)
    return load.n_requests or round(load.arrivals_per_s * (load.duration_s or 60.0))


def _time_limit_s(workload: Workload, timeout_s: float) -> float:
    load = workload.load
    if isinstance(load, ClosedLoad):
        n = load.n_requests or load.concurrency
        return timeout_s * (1 + n / load.concurrency)
    if isinstance(load, TraceLoad):
        return PATIENCE * load.arrival_s[-1] + timeout_s
    return (
        PATIENCE * (load.n_requests / load.arrivals_per_s if load.n_requests else load.duration_s or 60.0) + timeout_s
    )


def drive(
    endpoint: Endpoint,
    workload: Workload,
    *,
    vocab_size: int,
    cell: str = "load",
    key: str = "",
    timeout_s: float = 120,
    seed: int = 0,
    listen: Listener | None = None,
) -> tuple[list[Traced], list[Failed]]:
    """Return the answered and failed requests of one cell.

    Parameters:
        timeout_s: longest silence of one request [s]; it then counts as failed.

    Raises:
        AdvisorError: Locust is not installed, or it ended without having sent anything.
    """
    if importlib.util.find_spec("locust") is None:
        raise AdvisorError("the load test needs Locust: pip install 'advisor[verify]'")
    config = load_config(workload, endpoint.model, vocab_size, seed) | {"timeout_s": timeout_s}
    n_expected = expected_requests(workload)
    with tempfile.TemporaryDirectory(prefix="advisor-verify-") as folder:
        script, results, log = (Path(folder) / name for name in ("locustfile.py", "results.jsonl", "log.txt"))
        script.write_text(load_script(config, f"cell {cell}"), encoding="utf-8")
        environment = os.environ | {"LOAD_RESULTS": str(results), KEY_VARIABLE: key}
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(script),
            "--host",
            endpoint.base_url,
            "--loglevel",
            "ERROR",
        ]
        started = time.monotonic()
        limit_s = START_S + _time_limit_s(workload, timeout_s)
        with log.open("wb") as output:
            # The arguments are this interpreter, files of ours and an address that was parsed; no shell reads them.
            process = subprocess.Popen(  # noqa: S603
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    elapsed_s = time.monotonic() - started
                    if listen is not None:
                        n_done = results.read_bytes().count(b"\n") if results.exists() else 0
                        listen(Progress(cell, n_done, n_expected, elapsed_s))
                    if elapsed_s > limit_s:
                        break
                    time.sleep(POLL_S)
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(10)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
        answered, failed = read_results(results)
        if not answered and not failed:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise AdvisorError(f"the load driver ended without a request: {tail[0][:200]}")
        if listen is not None:
            listen(Progress(cell, len(answered) + len(failed), n_expected, time.monotonic() - started))
        return answered, failed
