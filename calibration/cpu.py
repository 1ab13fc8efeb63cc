"""What a record says of its host's CPU: which one, how many hardware threads, and how fast a loop of Python runs."""

from __future__ import annotations

import os
import time
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


def describe(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Return the CPU, its threads, those this process may use if not all, and percentiles of `loop_s` (10, 50, 90).

    What is unknown is left out.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    first = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in reversed(lines))}
    taken = sorted(loop_s() for _ in range(N_LOOPS))
    found: dict[str, Any] = {"cpu": first.get("model name"), "n_cpu_threads": os.cpu_count()}
    if first.get("siblings", "").isdigit() and first.get("cpu cores", "").isdigit():
        found["cpu_threads_per_core"] = int(first["siblings"]) / max(1, int(first["cpu cores"]))
    allowed = sorted(os.sched_getaffinity(0))
    found["cpus_allowed"] = allowed if len(allowed) < (os.cpu_count() or 0) else None
    found["cpu_loop_us"] = [round(1e6 * taken[len(taken) * k // 10], 2) for k in (1, 5, 9)]
    return {k: v for k, v in found.items() if v is not None}
