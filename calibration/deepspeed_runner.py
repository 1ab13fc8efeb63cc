"""Runs the cells of a DeepSpeed job: starts the ranks, samples all GPUs' power, writes a run record a cell at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration import models
from calibration.cuda_build import build_env, build_ops, drop_stale_locks, extensions_folder
from calibration.errors import EngineDied, EngineMissing, JobError, OutFileBusy
from calibration.gpus import Gpus, PowerMeter
from calibration.jobs import Job, full_run_id
from calibration.output import Output, cell_name, die_with_parent, prepare_env
from calibration.records import cells_done

# kind -> (module, function, does each cell need its own processes)
WORK = {
    "deepspeed-zero-train": ("calibration.deepspeed_train", "zero_train", True),
    "deepspeed-pipe-train": ("calibration.deepspeed_train", "pipe_train", False),
    "deepspeed-inference": ("calibration.deepspeed_infer", "inference", False),
    "deepspeed-zero-inference": ("calibration.deepspeed_zero_infer", "zero_inference", False),
    "deepspeed-fastgen": ("calibration.deepspeed_fastgen", "fastgen", False),
    "micro": ("calibration.micro", "micro", False),
}
REQUIRED = {
    "deepspeed-zero-train": ("zero_stage", "micro_batch_size", "sequence_length"),
    "deepspeed-pipe-train": ("n_microbatches",),
    "deepspeed-inference": ("batch_size", "prompt_tokens", "output_tokens"),
    "deepspeed-zero-inference": ("batch_size", "prompt_tokens", "output_tokens"),
    "deepspeed-fastgen": (),
    "micro": ("what",),
}
FAILED_RANK_GRACE_S = 8.0
WEIGHT_BITS = (4, 8, 16)


def ops_needed(job: Job) -> tuple[str, ...]:
    """Return the DeepSpeed ops that a job's ranks would otherwise build in their first pass, within their time."""
    is_packed = job.kind == "deepspeed-zero-inference" and job.options.get("weight_quantization", 16) < 16
    return ("QuantizerBuilder",) if is_packed else ()


def engine_env(n_ranks: int) -> dict[str, str]:
    """Return the environment in which ranks run and ops are built: yours, with what is missing."""
    env = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // n_ranks)))  # CPU Adam needs its threads
    env.setdefault("MAX_JOBS", str(cores))
    env["TORCH_EXTENSIONS_DIR"] = extensions_folder()
    return env if env.get("DS_ACCELERATOR") == "cpu" else env | build_env()


def _check_zero_inference(job: Job) -> None:
    bits = job.options.get("weight_quantization", 16)
    if "weight_bits" in job.options:
        raise JobError(f"job '{job.run_id}': weight_bits is what records say; the option is weight_quantization")
    if bits not in WEIGHT_BITS:
        raise JobError(f"job '{job.run_id}': weight_quantization must be 4, 8 or 16 (none), not {bits!r}")
    if bits < 16 and job.options.get("weight_dtype", "fp16") != "fp16":
        raise JobError(f"job '{job.run_id}': weight_quantization packs fp16 weights only")
    for name, where in (("options", job.options), *(("a cell", c) for c in job.cells if isinstance(c, dict))):
        if not isinstance(where.get("kv_offload", False), bool):
            raise JobError(f"job '{job.run_id}': kv_offload of {name} must be true or false")


def check_cells(job: Job) -> list[dict[str, Any]]:
    """Return the cells of a job with their names. Raises JobError for one that lacks a field."""
    cells = job.cells
    if job.kind == "micro" and not cells:
        from calibration.micro import default_cells

        cells = default_cells(job.gpus_needed)
    if not cells:
        raise JobError(f"job '{job.run_id}': it has no cells")
    if job.kind == "deepspeed-zero-inference":
        _check_zero_inference(job)
    named: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for cell in cells:
        if not isinstance(cell, dict):
            raise JobError(f"job '{job.run_id}': a cell of kind {job.kind} must be an object")
        for field in REQUIRED[job.kind]:
            if field not in cell:
                raise JobError(f"job '{job.run_id}': a cell of kind {job.kind} needs '{field}'")
        if job.kind == "deepspeed-zero-train" and cell["zero_stage"] not in (0, 1, 2, 3):
            raise JobError(f"job '{job.run_id}': zero_stage must be 0, 1, 2 or 3, not {cell['zero_stage']!r}")
        if job.kind == "deepspeed-pipe-train" and job.options.get("zero_stage", 1) > 1:
            raise JobError(f"job '{job.run_id}': DeepSpeed's pipeline allows zero_stage 0 and 1 only")
        name = cell_name(cell)
        seen[name] = seen.get(name, -1) + 1
        named.append({"cell_id": f"{name}-{seen[name]}" if seen[name] else name, "cell": cell})
    return named


@dataclass
class Host:
    """What the records say of the host, and its power meter."""

    fields: dict[str, Any]
    meter: PowerMeter | None
    n_gpus: int

    @classmethod
    def measure(cls, n_gpus: int) -> Host:
        """Look at the GPUs before the job starts; a CPU-only test host gives no power."""
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return cls({"gpu": "cpu", "interconnect": "none", "power_limit_w_per_gpu": None}, None, n_gpus)
        gpus = Gpus(n_gpus)
        gpus.wait_free()
        fields = gpus.describe()
        idle = PowerMeter.over(gpus)
        fields["idle_power_w"] = idle and idle["mean"]
        meter = PowerMeter(gpus)
        meter.start()
        return cls(fields, meter, n_gpus)

    def power(self, window: list[float]) -> dict[str, Any]:
        """Return the `measured` fields of power in a window; the energy is the mean power times the window."""
        found = self.meter.window(*window) if self.meter else None
        return {"board_power_w": found, "energy_j": found["mean"] * (window[1] - window[0])} if found else {}


class Ranks:
    """The processes of one case."""

    def __init__(self, job: Job, cells: list[dict[str, Any]], folder: Path) -> None:
        module, function, _ = WORK[job.kind]
        self.answers = folder / "answers.jsonl"
        self.answers.write_text("")
        _, config = models.resolve(job.model)
        options = {"tp": job.tp, **job.options, "hf_config": config}
        task = {"case": options, "cells": cells}
        n = job.gpus_needed
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = engine_env(n) | {
            "CALIBRATION_TASK": json.dumps(task),
            "CALIBRATION_ANSWERS": str(self.answers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "LOCAL_SIZE": str(n),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        drop_stale_locks(env["TORCH_EXTENSIONS_DIR"])
        code = (
            f"from calibration.deepspeed_rank import rank_main; from {module} import {function}; rank_main({function})"
        )
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )
            for r in range(n)
        ]
        self.offset = 0
        self.failed_at = 0.0

    def new_answers(self) -> list[dict[str, Any]]:
        """Return the complete answers since the last call."""
        with open(self.answers, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def is_over(self) -> bool:
        """Say whether all ranks ended; when one failed the others get a few seconds."""
        codes = [p.poll() for p in self.processes]
        if all(c is not None for c in codes):
            return True
        if any(c not in (None, 0) for c in codes):
            self.failed_at = self.failed_at or time.monotonic()
            return time.monotonic() - self.failed_at > FAILED_RANK_GRACE_S
        return False

    def end(self) -> list[int | None]:
        """Kill what still runs and return the exit codes."""
        for p in self.processes:
            if p.poll() is None:
                p.send_signal(signal.SIGKILL)
        return [p.wait() for p in self.processes]

    def why(self) -> str:
        """Return what the first failed rank said."""
        for r in range(len(self.processes)):
            path = Path(f"{self.answers}.rank{r}")
            if path.exists():
                return str(json.loads(path.read_text())["error"])
        return f"a rank ended with {[p.returncode for p in self.processes]}"


class Run:
    """The cells of one job."""

    def __init__(self, job: Job, output: Output, known: list[str], deadline: float | None) -> None:
        self.job, self.output = job, output
        self.end = min(deadline or float("inf"), time.time() + job.budget_s)
        self.named = check_cells(job)
        done = cells_done([str(output.records.path), *known], job.run_id)
        self.n_bad = 0
        self.left = [i for i, c in enumerate(self.named) if c["cell_id"] not in done]

    def groups(self) -> list[list[int]]:
        """Return the cells that share a start."""
        return [[i] for i in self.left] if WORK[self.job.kind][2] else [self.left]

    def run(self, host: Host) -> int:
        """Run all groups; return how many cells gave no record."""
        for group in self.groups():
            left_s = self.end - time.time()
            if left_s < 5:
                self.output.error(self.job.run_id, f"skipped: {left_s:.0f} s left", kind="skipped", cells=group)
                self.output.say(f"{self.job.run_id}: {len(group)} cell(s) skipped, {max(left_s, 0):.0f} s left")
                self.n_bad += len(group)
                continue
            self._group(host, group)
        return self.n_bad

    def _group(self, host: Host, group: list[int]) -> None:
        cells = [{**self.named[i]["cell"], "index": i} for i in group]
        guard = min(self.end, time.time() + float(self.job.options.get("guard_s", 1e9)))
        waiting = set(group)
        with tempfile.TemporaryDirectory(prefix="calibration-ranks-") as folder:
            ranks = Ranks(self.job, cells, Path(folder))
            try:
                while not ranks.is_over() and time.time() < guard:
                    self._take(host, ranks, waiting)
                    time.sleep(0.05)
                timed_out = not ranks.is_over() and time.time() >= guard
            finally:
                codes = ranks.end()
            self._take(host, ranks, waiting)
            if any(codes):
                why = "stopped: its time is over" if timed_out else ranks.why()
            else:
                why = "its rank ended without an answer"
            for i in sorted(waiting):
                self._fail(i, why)

    def _take(self, host: Host, ranks: Ranks, waiting: set[int]) -> None:
        for answer in ranks.new_answers():
            i = answer["cell"]
            waiting.discard(i)
            if "error" in answer:
                self._fail(i, answer["error"])
                continue
            record = self._record(host, answer, i)
            self.output.record(record)
            self.output.say(f"{record['run_id']} {i + 1}/{len(self.named)}: {summary(record)}")

    def _fail(self, i: int, why: str) -> None:
        self.n_bad += 1
        self.output.error(self.job.run_id, why, kind="error", cell=self.named[i]["cell"])
        self.output.say(f"{self.job.run_id} {i + 1}/{len(self.named)} {json.dumps(self.named[i]['cell'])}: {why[:200]}")

    def _record(self, host: Host, answer: dict[str, Any], i: int) -> dict[str, Any]:
        job, fields, made = self.job, host.fields, dict(answer["fields"])
        name, config = ("none", {}) if job.kind == "micro" else models.resolve(job.model)
        engine = "transformers" if job.options.get("mode") == "eager" else job.kind
        version = made.pop("deepspeed", None) or made.get("torch_version", "unknown")
        if engine == "transformers":
            version = made.get("transformers_version", version)
        family = {"micro": "torch", "transformers": "transformers"}.get(engine, "deepspeed")
        keep = ("gpu", "interconnect", "idle_power_w", "power_limit_w_per_gpu")
        record = {
            "schema": 1,
            "run_id": full_run_id(job, family, version, fields["gpu"]),
            "engine": engine,
            "engine_version": version,
            "gpu": fields["gpu"],
            "n_gpus": job.gpus_needed,
            **{k: fields[k] for k in keep[1:] if fields.get(k) is not None},
            "model": name,
            "hf_config": config,
            "random_weights": True,
            "tp": 1,
            "pp": 1,
            "dp": 1,
            "weight_dtype": "bf16",
            "kv_dtype": "bf16",
            **made,
            "host": {k: v for k, v in fields.items() if k not in keep},
            "cell_id": self.named[i]["cell_id"],
            "cell": self.named[i]["cell"],
            "command": {k: v for k, v in job.as_json().items() if k in ("kind", "options", "env")},
            "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "measured": answer["measured"] | host.power(answer["window"]),
        }
        if "startup" in record:
            record["startup"] = {k: v for k, v in record["startup"].items() if v is not None}
        return record


def summary(record: dict[str, Any]) -> str:
    """Return one line about a DeepSpeed or micro record."""
    m = record["measured"]
    what = ", ".join(f"{k} {v}" for k, v in record["cell"].items() if not isinstance(v, dict | list))
    parts = [f"{k.removesuffix('_s')} {1e3 * m[k]:.2f} ms" for k in ("step_s", "prefill_s", "decode_step_s") if k in m]
    if "model_flops_per_s_per_gpu" in m:
        parts.append(f"{m['model_flops_per_s_per_gpu'] / 1e12:.0f} TFLOP/s a GPU")
    if "bubble_frac" in m:
        parts.append(f"bubble {m['bubble_frac']:.3f}")
    for k in ("bytes_per_s", "flops_per_s", "bus_bytes_per_s"):
        if k in m:
            parts.append(f"{m[k]:.3g} {k}")
    if "peak_allocated_bytes" in m:
        parts.append(f"peak {m['peak_allocated_bytes'] / 1e9:.1f} GB")
    if m.get("board_power_w"):
        parts.append(f"{m['board_power_w']['mean']:.0f} W")
    return f"{what}: {', '.join(parts)}"


def _importable(kind: str) -> None:
    import importlib.util

    for name in ("torch",) if kind == "micro" else ("torch", "deepspeed"):
        if importlib.util.find_spec(name) is None:
            raise EngineMissing(
                f"{name} is not installed here; see docs/calibration.md for the wheels a bare host needs"
            )


def run_job(
    job: Job,
    out: str,
    *,
    rows: str | None = None,
    errors: str | None = None,
    log: str | None = None,
    known: list[str] | None = None,
    shared: bool = False,
    deadline: float | None = None,
) -> int:
    """Run a DeepSpeed or micro job and return the exit status; arguments as for vllm_runner.run_job."""
    try:
        output = Output(out, None, errors, log or f"{out}.{job.run_id}.log", shared=shared)
    except OutFileBusy as err:
        print(f"error: {err}", flush=True)
        return err.status
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the ranks are ended

    def work() -> int:
        run = Run(job, output, known or [], deadline)
        if not run.left:
            output.say(f"{job.run_id}: all {len(run.named)} cells are already in '{out}'")
            return 0
        output.capture()
        prepare_env()
        _importable(job.kind)
        if ops := ops_needed(job):
            output.say(f"{job.run_id}: building {', '.join(ops)} unless it is there (1 to 3 minutes)")
            build_ops(ops, engine_env(1), limit_s=max(1.0, run.end - time.time()))
        host = Host.measure(job.gpus_needed)
        bad = run.run(host)
        if host.meter:
            host.meter.stop()
        return EngineDied.status if bad == len(run.left) else 0

    return output.attempt(job.run_id, work)
