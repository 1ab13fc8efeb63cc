"""How a study scales: cells/s with 1 and 2 workers, as batches of one run and as shards of a job array.

    python -m benchmarks.study_scaling [N_CELLS] [ROUNDS]

Beside each ratio stands what the machine itself gives two processes that only count: on a machine that others use,
that is below 2, and no program can scale better.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

STUDY = """
mode = "simulate"
models = ["llama-3.1-8b"]
gpus = ["2xA100", "2xH100"]
slos = ["none"]
seeds = {n_seeds}
n_finalists = 0

[[workloads]]
preset = "chat"
rate = [2, 4]
"""
SPIN = "n = 0\nwhile n < 30_000_000:\n    n += 1"


def together_s(commands: Sequence[Sequence[str]]) -> float:
    """The time until all commands, started together, have ended."""
    start = perf_counter()
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    for process in running:
        if process.wait():
            raise SystemExit(f"failed: {process.args}")
    return perf_counter() - start


def study(path: Path, out: str, *options: str) -> list[str]:
    target = str(path.with_name(out))
    Path(target).unlink(missing_ok=True)
    return [sys.executable, "-m", "advisor", "study", str(path), "--out", target, *options]


def core_cells_per_s(path: Path, n_cells: int, n_workers: int) -> float:
    """Cells per second of processor time, of all processes and their start: other load on the machine hardly counts."""
    before = os.times()
    subprocess.run(study(path, "core.jsonl", "--workers", str(n_workers)), check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return n_cells / used


def main() -> None:
    n_cells = max(4, int(sys.argv[1]) if len(sys.argv) > 1 else 800) // 4 * 4
    n_rounds = max(1, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scaling.toml"
        path.write_text(STUDY.format(n_seeds=n_cells // 4))
        spin = [sys.executable, "-c", SPIN]
        machine, one, two, shards = [], [], [], []
        for _ in range(n_rounds):
            # interleaved, so that a slow minute of the machine hits all of them
            machine.append(2 * together_s([spin]) / together_s([spin, spin]))
            one.append(n_cells / together_s([study(path, "1.jsonl", "--workers", "1")]))
            two.append(n_cells / together_s([study(path, "2.jsonl", "--workers", "2")]))
            parts = [study(path, f"s{i}.jsonl", "--workers", "1", "--shard", f"{i}/2") for i in range(2)]
            shards.append(n_cells / together_s(parts))
        per_core_s, per_core_s_of_two = (core_cells_per_s(path, n_cells, n) for n in (1, 2))
    load = f", load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    print(f"{n_cells} simulations of chat traffic, median of {n_rounds} rounds, start of the processes included{load}")
    print(f"1 worker            {median(one):7.2f} cells/s")
    for name, rates in (("2 workers", two), ("2 shards, 1 worker", shards)):
        ratio = median(b / a for a, b in zip(one, rates, strict=True))
        print(f"{name:<19} {median(rates):7.2f} cells/s, {ratio:.2f} times one worker")
    print(f"two processes that only count: {median(machine):.2f} times one")
    share = per_core_s_of_two / per_core_s
    print(f"one core-second: {per_core_s:.1f} cells with 1 worker, {per_core_s_of_two:.1f} with 2 ({share:.0%})")
    print(
        f"so 10^6 cells need {1e6 / per_core_s / 3600:.1f} core-hours, and idle cores would give {2 * share:.2f} times"
    )


if __name__ == "__main__":
    main()
