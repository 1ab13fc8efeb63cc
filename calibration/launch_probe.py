"""How long a worker takes to launch each step, and how fast its CPU is meanwhile."""

from __future__ import annotations

import json
import resource
import time
from typing import Any, TextIO

from calibration.cpu import loop_s
from calibration.vllm_probe import MemoryProbe, held

EXTENSION = "calibration.launch_probe.LaunchProbe"
COLUMNS = [
    "at_s",
    "launch_s",
    "launch_cpu_s",
    "sample_s",
    "n_tokens",
    "n_sequences",
    "n_new",
    "loop_s",
    "n_switches",
    "n_preemptions",
]
"""Columns of a line: when the launch began (Unix time), how long `execute_model` took and what of it was CPU time of
its thread, how long `sample_tokens` took, tokens and sequences of the step and new requests in it, time of a fixed loop
of Python just before, and how often the thread gave the CPU away or lost it during the launch."""
EVERY = 200


class LaunchProbe(MemoryProbe):
    """Worker extension that also writes a line a launch, from the call of `calibration_time_launches` on."""

    def calibration_time_launches(self, path: str) -> None:
        """Time every launch of this worker's model runner and append it to a file of JSON lines.

        Lines are written `EVERY` at a time: what is left when the engine is stopped is lost.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        execute, sample = runner.execute_model, runner.sample_tokens
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the engine lives
        row: list[float] = []
        lines: list[str] = []

        def timed_execute(scheduled: Any, *args: Any, **more: Any) -> Any:
            loop = loop_s()
            before = resource.getrusage(resource.RUSAGE_THREAD)
            at_s, cpu_s, begin_s = time.time(), time.thread_time(), time.perf_counter()
            out = execute(scheduled, *args, **more)
            launch_s, cpu_s = time.perf_counter() - begin_s, time.thread_time() - cpu_s
            after = resource.getrusage(resource.RUSAGE_THREAD)
            row[:] = [
                round(at_s, 6),
                round(launch_s, 6),
                round(cpu_s, 6),
                0.0,
                *held(scheduled),
                round(loop, 7),
                after.ru_nvcsw - before.ru_nvcsw,
                after.ru_nivcsw - before.ru_nivcsw,
            ]
            return out

        def timed_sample(*args: Any, **more: Any) -> Any:
            begin_s = time.perf_counter()
            out = sample(*args, **more)
            if row:
                row[3] = round(time.perf_counter() - begin_s, 6)
                lines.append(json.dumps(row))
                row.clear()
            if len(lines) >= EVERY:
                _write(file, lines)
            return out

        runner.execute_model, runner.sample_tokens = timed_execute, timed_sample


def _write(file: TextIO, lines: list[str]) -> None:
    file.write("\n".join(lines) + "\n")
    file.flush()
    lines.clear()
