"""`make bench`: how long the main calls take. Prints times and, for the whole process, a ratio; asserts nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

import advisor
from advisor.recommend import kept
from benchmarks import cases

ADVISOR = [str(Path(sys.executable).with_name("advisor")), "recommend", "--model", "70b", "--gpus", "8xA100"]
BARE = [sys.executable, "-c", "import numpy, pydantic"]


@dataclass(frozen=True)
class Time:
    """The best of several runs: what the call needs, rather than what else this machine did meanwhile."""

    wall_s: float
    cpu_s: float


def timed(call: Callable[[], object], n_runs: int) -> Time:
    walls, cpus = [], []
    for _ in range(n_runs):
        wall, before = perf_counter(), os.times()
        call()
        walls.append(perf_counter() - wall)
        # user and system time, of this process and of the ones it waited for
        cpus.append(sum(os.times()[:4]) - sum(before[:4]))
    return Time(min(walls), min(cpus))


def processes(*commands: list[str], n_runs: int) -> list[Time]:
    """The commands in turn, so that what else the machine does meets all; modules compiled, as installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(command: list[str]) -> Time:
        return timed(lambda: subprocess.run(command, check=True, capture_output=True, env=env), 1)

    for command in commands:
        run(command)  # the first start after an install compiles and fills the page cache
    rounds = [[run(command) for command in commands] for _ in range(n_runs)]
    return [Time(min(t.wall_s for t in times), min(t.cpu_s for t in times)) for times in zip(*rounds, strict=True)]


def show(what: str, time: Time, remark: str = "") -> None:
    print(f"{what:<56} {time.wall_s * 1e3:>8.0f} ms wall {time.cpu_s * 1e3:>8.0f} ms CPU  {remark}", flush=True)


def fresh(request: advisor.Request) -> None:
    """A question as if it were the first one."""
    kept.forget()
    advisor.recommend(request)


def main() -> None:
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}"
    print(f"advisor {advisor.__version__}, {versions}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    bare, whole, closed = processes(BARE, ADVISOR, [*ADVISOR, "--finalists", "0"], n_runs=9)
    show("a bare python -c 'import numpy, pydantic'", bare)
    ratio = f"{whole.wall_s / bare.wall_s:.1f} times the bare one (CPU: {whole.cpu_s / bare.cpu_s:.1f} times)"
    show("advisor recommend --model 70b --gpus 8xA100, process", whole, f"{ratio}; wanted: 4")
    show("the same with --finalists 0", closed, f"{closed.wall_s / bare.wall_s:.1f} times the bare one")

    request = advisor.Request(model="70b", gpus="8xA100")
    kept.forget()
    first = timed(lambda: advisor.recommend(request), 1)
    show("advisor.recommend(...), first in its process", first, "imports, tables and catalogue included")
    again = timed(lambda: advisor.recommend(request), 9)
    show("the same again", again, f"{first.cpu_s / again.cpu_s:.0f} times less CPU; wanted: 100 ms")
    for what, changes in cases.CHANGES.items():
        others = [request.model_copy(update=change) for change in changes]
        times = sorted((timed(partial(advisor.recommend, other), 1) for other in others), key=lambda t: t.cpu_s)
        remark = f"median of {len(times)}, at most {times[-1].cpu_s * 1e3:.0f} ms CPU"
        show(
            f"then {what}", times[len(times) // 2], remark + ("; wanted: 100 ms" if what not in cases.REPLAYED else "")
        )
    many = request.model_copy(update={"n_finalists": 10})
    show("10 finalists, nothing kept", timed(lambda: fresh(many), 5), "wanted: 3000 ms")
    none = request.model_copy(update={"n_finalists": 0})
    show("closed form only, nothing kept", timed(lambda: fresh(none), 5))

    n, call = cases.sweep(100_000)
    time = timed(call, 3)
    show(f"closed form of {n:,} deployments", time, f"{n / time.wall_s:,.0f} a second; wanted: 1000 ms")
    n, call = cases.scheduler(10_000)
    time = timed(call, 3)
    show(f"trace of {n:,} requests through the scheduler", time, f"{n / time.wall_s:,.0f} a second; wanted: 2000 ms")


if __name__ == "__main__":
    main()
