"""What a record says of its host's CPU: which one, its threads, and how fast it loops and wakes another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
LOOP = range(2000)
N_LOOPS = 2000


def loop_s() -> float:
    """Return the time of a fixed loop of Python [s]; it tells a core of its own from one that is shared."""
    begin_s = time.perf_counter()
    for _ in LOOP:
        pass
    return time.perf_counter() - begin_s


ECHO = "import os\nwhile b := os.read(0, 1):\n    os.write(1, b)"
N_ECHOES = 1000


def echo_s(n: int = N_ECHOES) -> list[float]:
    """Return the times of a byte to another process and back, which sleeps until it comes [s]."""
    with subprocess.Popen(
        [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        taken = []
        for _ in range(n + 10):
            begin_s = time.perf_counter()
            echo.stdin.write(b"x")
            if not echo.stdout.read(1):
                raise OSError("the other process has ended")
            taken.append(time.perf_counter() - begin_s)
        echo.stdin.close()
    return taken[10:]


def percentiles_us(taken: Sequence[float]) -> list[float]:
    """Return the 10th, 50th and 90th percentile of some times [us]."""
    ordered = sorted(taken)
    return [round(1e6 * ordered[len(ordered) * k // 10], 2) for k in (1, 5, 9)]


def describe(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Return the CPU, its threads, those this process may use if not all, and percentiles (10, 50, 90) of its times.

    `cpu_loop_us` : of `loop_s`; `cpu_echo_us` : of `echo_s`

    What is unknown is left out.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    first = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in reversed(lines))}
    found: dict[str, Any] = {"cpu": first.get("model name"), "n_cpu_threads": os.cpu_count()}
    if first.get("siblings", "").isdigit() and first.get("cpu cores", "").isdigit():
        found["cpu_threads_per_core"] = int(first["siblings"]) / max(1, int(first["cpu cores"]))
    allowed = sorted(os.sched_getaffinity(0))
    found["cpus_allowed"] = allowed if len(allowed) < (os.cpu_count() or 0) else None
    found["cpu_loop_us"] = percentiles_us([loop_s() for _ in range(N_LOOPS)])
    with contextlib.suppress(OSError):
        found["cpu_echo_us"] = percentiles_us(echo_s())
    return {k: v for k, v in found.items() if v is not None}
