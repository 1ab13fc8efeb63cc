"""Jobs: one engine start and the cells to run on it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibration import models
from calibration.cells import Cell, parse_cell
from calibration.errors import JobError
from calibration.kernel_probe import is_wanted

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,150}")
KINDS = (
    "vllm",
    "deepspeed-zero-train",
    "deepspeed-pipe-train",
    "deepspeed-inference",
    "deepspeed-zero-inference",
    "deepspeed-fastgen",
    "micro",
)


@dataclass(frozen=True)
class Job:
    """One engine start. `run_id` is complete when it holds '__', else engine version and GPU are put before it."""

    run_id: str
    kind: str = "vllm"
    model: Any = "llama-3.1-8b"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    dtype: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int = 4096
    max_num_batched_tokens: int | None = 8192
    max_num_seqs: int | None = 256
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    prefix_caching: bool = False
    load_format: str = "dummy"
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    worker_probe: bool = True
    seed: int = 1
    warmup: bool = True
    cells: list[Any] = field(default_factory=list)
    budget_s: float = 300.0
    limit_s: float = 480.0
    n_gpus: int = 0
    cpus: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def gpus_needed(self) -> int:
        """GPUs that the engine uses."""
        return self.n_gpus or self.tp * self.pp * self.dp

    @property
    def times_launches(self) -> bool:
        """Whether the worker also times each launch (`options: {"time_launches": true}`)."""
        return self.kind == "vllm" and bool(self.options.get("time_launches"))

    @property
    def kernels(self) -> dict[str, list[Any]]:
        """Steps whose kernels the worker records: `options: {"kernels": {"decode": [1, 64], "prompt": [2048]}}`."""
        return dict(self.options.get("kernels") or {}) if self.kind == "vllm" else {}

    def parsed_cells(self) -> list[Cell]:
        """Return the checked cells; equal ones are numbered, so that each has its own name."""
        seen: dict[str, int] = {}
        cells = []
        for spec in self.cells:
            cell = parse_cell(spec, self.max_model_len)
            key = cell.cell_id()
            n = seen[key] = seen.get(key, -1) + 1
            cells.append(Cell(**{**asdict(cell), "repeat": cell.repeat + n}) if n else cell)
        return cells

    def as_json(self) -> dict[str, Any]:
        """Return the job as it would be written in a jobs file."""
        return asdict(self)


def parse_job(raw: Any) -> Job:
    """Return a checked job. Raises JobError that names the field and the rule."""
    if not isinstance(raw, dict):
        raise JobError("a job must be a JSON object")
    known = set(Job.__dataclass_fields__)
    if unknown := sorted(set(raw) - known):
        raise JobError(f"job has no field '{unknown[0]}'; allowed: {', '.join(sorted(known))}")
    if not isinstance(raw.get("run_id"), str) or not RUN_ID.fullmatch(raw["run_id"]):
        raise JobError("a job needs a run_id of letters, digits, '.', '_', '+' and '-' (at most 150)")
    job = Job(**raw)

    def need(ok: bool, rule: str) -> None:
        if not ok:
            raise JobError(f"job '{job.run_id}': {rule}")

    need(job.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, not '{job.kind}'")
    for name in ("tp", "pp", "dp", "max_model_len"):
        value = getattr(job, name)
        need(isinstance(value, int) and value >= 1, f"{name} must be a positive whole number")
    need(0 < job.gpu_memory_utilization <= 1, "gpu_memory_utilization must be above 0 and at most 1")
    need(all(isinstance(c, int) and c >= 0 for c in job.cpus), "cpus must be a list of hardware threads such as [0, 2]")
    for option in ("api_server_count", "client_processes"):
        n = job.options.get(option, 1)
        need(type(n) is int and n > 0, f"the option {option} must be a positive whole number")
    keeps = job.options.get("keep_alive", False)
    need(type(keeps) is bool, "the option keep_alive must be true or false")
    need(job.budget_s > 0 and job.limit_s > 0, "budget_s and limit_s must be positive")
    if job.kind == "vllm":
        need(bool(job.cells), "it has no cells")
        need(is_wanted(job.options.get("kernels") or {}), KERNELS_RULE)
        need(not (job.times_launches and job.kernels), "time_launches and kernels cannot go together")
        models.resolve(job.model)
        job.parsed_cells()
    else:
        from calibration.deepspeed_runner import check_cells

        models.resolve(job.model)
        check_cells(job)
    return job


KERNELS_RULE = (
    'the option kernels must be such as {"decode": [1, 64], "prompt": [2048], "burst": [[64, 1024]], '
    '"mixed": [[32, 512]]}, positive whole numbers'
)


def read_jobs(path: str) -> list[Job]:
    """Return the jobs of a file: a list of them, one of them, or {"jobs": [...]}."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise JobError(f"cannot read '{path}': {err.strerror}") from None
    except ValueError as err:
        raise JobError(f"'{path}' is not JSON: {err}") from None
    if isinstance(raw, dict):
        raw = raw.get("jobs", [raw])
    if not isinstance(raw, list) or not raw:
        raise JobError(f"'{path}' holds no jobs")
    jobs = [parse_job(r) for r in raw]
    names = [j.run_id for j in jobs]
    if twice := [n for n in names if names.count(n) > 1]:
        raise JobError(f"two jobs have the run_id '{twice[0]}'")
    return jobs


def weight_dtype(job: Job, config: dict[str, Any]) -> str:
    """Return the record's `weight_dtype`."""
    stored = config.get("quantization_config") or {}
    method = str(stored.get("quant_method") or job.quantization or "")
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin"):
        return f"{method.split('_')[0]}-int{stored.get('bits', 4)}"
    return method or {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(job.dtype, job.dtype)


def kv_dtype(job: Job) -> str:
    """Return the record's `kv_dtype`."""
    if job.kv_cache_dtype.startswith("fp8"):
        return "fp8"
    return {"bfloat16": "bf16", "float16": "fp16"}.get(job.dtype, job.dtype)


def full_run_id(job: Job, engine: str, version: str, gpu: str) -> str:
    """Return the record's `run_id`: the job's own when it is complete, else with engine, version and GPU before it."""
    return job.run_id if "__" in job.run_id else f"{engine}-{version}__{gpu}__{job.run_id}"


def start_fields(job: Job, engine: str, version: str, gpu: str) -> dict[str, Any]:
    """Return what every record of a vLLM-like start takes from its job."""
    name, config = models.resolve(job.model)
    return {
        "schema": 1,
        "run_id": full_run_id(job, engine, version, gpu),
        "engine": engine,
        "engine_version": version,
        "gpu": gpu,
        "n_gpus": job.gpus_needed,
        "model": name,
        "hf_config": config,
        "random_weights": job.load_format == "dummy",
        "tp": job.tp,
        "pp": job.pp,
        "dp": job.dp,
        "weight_dtype": weight_dtype(job, config),
        "kv_dtype": kv_dtype(job),
        "gpu_memory_utilization": job.gpu_memory_utilization,
        "enforce_eager": job.enforce_eager,
    }
