"""`make bench`: how long the main calls take. Prints times and, for the whole process, a ratio; asserts nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import advisor
from benchmarks import cases

QUESTION = {"model": "70b", "gpus": "8xA100"}
ADVISOR = [str(Path(sys.executable).with_name("advisor")), "recommend", "--model", "70b", "--gpus", "8xA100"]
BARE = [sys.executable, "-c", "import numpy, pydantic"]


def timed_s(call: Callable[[], object], n_runs: int) -> float:
    """The median of several runs: what a user waits for on this machine, its other load included."""
    times = []
    for _ in range(n_runs):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times)


def process_s(command: list[str], n_runs: int) -> float:
    return timed_s(lambda: subprocess.run(command, check=True, capture_output=True), n_runs)


def show(what: str, seconds: float, remark: str = "") -> None:
    print(f"{what:<58} {seconds * 1e3:>9.1f} ms  {remark}", flush=True)


def main() -> None:
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}"
    print(f"advisor {advisor.__version__}, {versions}")
    process_s(BARE, 1)  # the first start after an install compiles and fills the page cache
    process_s(ADVISOR, 1)
    bare, whole = process_s(BARE, 9), process_s(ADVISOR, 9)
    show("a bare python -c 'import numpy, pydantic'", bare)
    show("advisor recommend --model 70b --gpus 8xA100, process", whole, f"{whole / bare:.1f} times the bare one")

    request = advisor.Request(**QUESTION)
    advisor.recommend(request)
    show("advisor.recommend(...), warm", timed_s(lambda: advisor.recommend(request), 9))
    many = advisor.Request(**QUESTION, n_finalists=10)
    show("advisor.recommend(...), 10 plans simulated", timed_s(lambda: advisor.recommend(many), 5))

    n, sweep = cases.sweep(100_000)
    seconds = timed_s(sweep, 3)
    show(f"closed form of {n:,} deployments", seconds, f"{n / seconds:,.0f} a second")
    n, replay = cases.scheduler(10_000)
    seconds = timed_s(replay, 3)
    show(f"replay of {n:,} requests through the scheduler", seconds, f"{n / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
