"""One vLLM engine start in this process: runs cells on it and writes a run record as soon as each one ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration import models, vllm_probe
from calibration.cells import Cell, requests
from calibration.errors import CalibrationError, EngineDied, EngineMissing, EngineStartFailed, JobError, OutFileBusy
from calibration.gpus import Gpus, PowerMeter
from calibration.jobs import Job
from calibration.load import ROW_COLUMNS, Send, run_cell, warm_prefixes
from calibration.output import Output, prepare_env
from calibration.records import cells_done, matches, read_lines

WARMUP = Cell(kind="closed", prompt_tokens=256, output_tokens=16, concurrency=8, n_requests=16, guard_s=180)
SHUTDOWN_LIMIT_S = 15.0
START_MARGIN_S = 2.0
IDLE_S = 0.7
RECORDED_ENV = (
    "VLLM_USE",
    "VLLM_ATT",
    "VLLM_ALL",
    "VLLM_MEM",
    "VLLM_ENABLE",
    "VLLM_DIS",
    "NCCL_",
    "TORCH_SYMM",
    "NVSHMEM_",
)


def import_vllm() -> Any:
    """Return the vllm module. Raises EngineMissing with what to do."""
    try:
        import vllm
    except ImportError as err:
        raise EngineMissing(
            f"vLLM cannot be imported here ({err}); install it or unpack the bundle ('bundle --help')"
        ) from None
    return vllm


def engine_args(job: Job, model_dir: str) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's AsyncEngineArgs for a job."""
    args: dict[str, Any] = {
        "model": model_dir,
        "load_format": job.load_format,
        "skip_tokenizer_init": True,
        "dtype": job.dtype,
        "tensor_parallel_size": job.tp,
        "pipeline_parallel_size": job.pp,
        "gpu_memory_utilization": job.gpu_memory_utilization,
        "max_model_len": job.max_model_len,
        "disable_log_stats": True,
        "enable_prefix_caching": job.prefix_caching,
        "enforce_eager": job.enforce_eager,
        "seed": 0,
    }
    if job.dp > 1:
        args["data_parallel_size"] = job.dp
    if job.max_num_batched_tokens:
        args["max_num_batched_tokens"] = job.max_num_batched_tokens
    if job.max_num_seqs:
        args["max_num_seqs"] = job.max_num_seqs
    if job.quantization:
        args["quantization"] = job.quantization
    if job.kv_cache_dtype != "auto":
        args["kv_cache_dtype"] = job.kv_cache_dtype
    if job.worker_probe:
        args["worker_extension_cls"] = vllm_probe.EXTENSION
    return args | job.engine_args


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


def make_send(engine: Any) -> Send:
    """Return the function that streams one request through an AsyncLLM."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def send(request_id: str, prompt: list[int], n_tokens: int) -> AsyncIterator[tuple[int, int | None]]:
        params = SamplingParams(
            max_tokens=n_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for out in engine.generate({"prompt_token_ids": prompt}, params, request_id):
            n_new = len(out.outputs[0].token_ids) if out.outputs else 0
            yield n_new, getattr(out, "num_cached_tokens", None)

    return send


async def start_up(engine: Any, gpus: Gpus, log: str, startup_s: float) -> dict[str, Any]:
    """Return the record's `startup`: exact figures of the workers where they answer, the log's otherwise."""
    found: dict[str, Any] = vllm_probe.from_log(log)
    try:
        answers = await asyncio.wait_for(engine.collective_rpc("calibration_memory"), 20)
        found |= vllm_probe.from_workers(answers)
        found["source"] = "workers"
    except Exception as err:
        found["source"] = f"log ({type(err).__name__})"
    cache = engine.vllm_config.cache_config
    found["n_kv_blocks"] = cache.num_gpu_blocks
    found["kv_block_tokens"] = cache.block_size
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    found["kv_cache_tokens"] = tokens or found.get("kv_cache_tokens") or cache.num_gpu_blocks * cache.block_size
    used = gpus.used_bytes()
    if all(u is not None for u in used):
        found["device_used_bytes"] = used
    return found | {"startup_s": startup_s}


def common_fields(job: Job, engine: Any, host: dict[str, Any], version: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return what every record of this start shares."""
    import torch

    name, config = models.resolve(job.model)
    vllm_config = engine.vllm_config
    scheduler = vllm_config.scheduler_config
    run_id = job.run_id if "__" in job.run_id else f"vllm-{version}__{host['gpu']}__{job.run_id}"
    return {
        "schema": 1,
        "run_id": run_id,
        "engine": "vllm",
        "engine_version": version,
        "torch_version": torch.__version__,
        "gpu": host["gpu"],
        "n_gpus": job.gpus_needed,
        "interconnect": host["interconnect"],
        "idle_power_w": host.get("idle_power_w"),
        "power_limit_w_per_gpu": host["power_limit_w_per_gpu"],
        "model": name,
        "hf_config": config,
        "random_weights": job.load_format == "dummy",
        "tp": job.tp,
        "pp": job.pp,
        "dp": job.dp,
        "weight_dtype": weight_dtype(job, config),
        "kv_dtype": kv_dtype(job),
        "max_model_len": vllm_config.model_config.max_model_len,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "gpu_memory_utilization": job.gpu_memory_utilization,
        "prefix_caching": bool(vllm_config.cache_config.enable_prefix_caching),
        "enforce_eager": job.enforce_eager,
        "scheduler": {
            "async_scheduling": getattr(scheduler, "async_scheduling", None),
            "max_concurrent_batches": _property(vllm_config, "max_concurrent_batches"),
            "use_v2_model_runner": _property(vllm_config, "use_v2_model_runner"),
        },
        "host": {
            k: v for k, v in host.items() if k not in ("gpu", "interconnect", "idle_power_w", "power_limit_w_per_gpu")
        },
        "command": {k: v for k, v in args.items() if k != "model"},
        "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED_ENV)},
    }


def _property(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some releases compute it and may refuse to
        return None


class Run:
    """The cells of one engine start, in order, within the time that there is."""

    def __init__(self, job: Job, output: Output, known: list[str], deadline: float | None) -> None:
        self.job, self.output, self.deadline = job, output, deadline
        self.known = [str(output.records.path), *known]
        self.cells = job.parsed_cells()
        self.done = cells_done(self.known, job.run_id)
        self.peak: dict[tuple[int, int], float] = {}
        for path in self.known:
            for record in read_lines(path):
                if matches(record, job.run_id):
                    self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        lengths, load = record.get("lengths") or {}, record.get("load") or {}
        if load.get("kind") == "closed" and "cell" in record:
            key = record["cell"]["prompt_tokens"], record["cell"]["output_tokens"]
            rate = float((record.get("measured") or {}).get("requests_per_s") or 0)
            if lengths.get("kind") == "fixed" or key not in self.peak:
                self.peak[key] = max(self.peak.get(key, 0.0), rate)

    @property
    def left(self) -> list[tuple[int, Cell]]:
        """The cells that no file holds yet, with their places."""
        return [(i, c) for i, c in enumerate(self.cells) if c.cell_id() not in self.done]

    def rate_per_s(self, cell: Cell) -> float:
        """Return the arrival rate of a cell: its own, or a share of the best closed rate at the same lengths."""
        if cell.kind == "closed" or cell.arrivals_per_s:
            return cell.arrivals_per_s
        best = self.peak.get((cell.prompt_tokens, cell.output_tokens))
        if not best:
            raise JobError("rate_frac needs an earlier closed cell with the same prompt_tokens and output_tokens")
        return cell.rate_frac * best

    def seconds_left(self, budget_end: float) -> float:
        """Seconds until the budget or the deadline ends, whichever is first."""
        ends = [budget_end] if self.deadline is None else [budget_end, self.deadline]
        return min(ends) - time.time()

    async def run(self, send: Send, engine: Any, common: dict[str, Any], vocab: int, meter: PowerMeter) -> None:
        """Run every cell that is left; an error in one is written down and the rest goes on."""
        say, run_id = self.output.say, common["run_id"]
        budget_end = time.time() + self.job.budget_s
        if self.job.warmup:
            asks = requests(WARMUP, 0, 999, vocab)
            size = min(WARMUP.prompt_tokens, self.job.max_model_len - WARMUP.output_tokens)
            asks = [type(a)(0.0, a.prompt[:size], a.n_output) for a in asks]
            await asyncio.wait_for(run_cell(send, "warmup", WARMUP, asks, None), WARMUP.guard_s)
        for place, cell in self.left:
            where = f"{run_id} {place + 1}/{len(self.cells)} {cell.label}"
            left_s = self.seconds_left(budget_end)
            if left_s < max(START_MARGIN_S, cell.expected_s, cell.duration_s):
                self.output.error(run_id, f"skipped: {left_s:.0f} s left", cell=asdict(cell), kind="skipped")
                say(f"{where}: skipped, {max(left_s, 0):.0f} s left")
                continue
            guard_s = min(cell.guard_s, left_s)
            try:
                rate = self.rate_per_s(cell)
                seed = self.job.seed * 1000 + place + 1
                asks = requests(cell, rate, seed, vocab, self.job.max_model_len)
                started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
                if cell.shared_prefix_tokens and cell.prefix_warm:
                    await asyncio.wait_for(warm_prefixes(send, f"w{place}", cell, seed, vocab), guard_s)
                outcome = await asyncio.wait_for(run_cell(send, f"r{place}", cell, asks, meter), guard_s)
            except (TimeoutError, Exception) as err:
                text = f"exceeded {guard_s:.0f} s" if isinstance(err, TimeoutError) else _first(err)
                self.output.error(run_id, text, cell=asdict(cell), kind="error")
                say(f"{where}: {text[:200]}")
                if getattr(engine, "errored", False):
                    why = vllm_probe.last_error(self.output.log_text())
                    raise EngineDied(f"the engine of {run_id} died in cell {place + 1}: {why or text}") from None
                await asyncio.sleep(1.0)  # cancelled requests must leave the engine before the next cell
                continue
            record = (
                common | self._cell_fields(cell, rate, seed, len(asks), started_at) | {"measured": outcome.measured}
            )
            self.output.record(record, ROW_COLUMNS, outcome.rows)
            self._remember(record)
            say(f"{where}: {_summary(outcome.measured)}")

    def _cell_fields(self, cell: Cell, rate: float, seed: int, n: int, started_at: str) -> dict[str, Any]:
        if cell.kind == "closed":
            load: dict[str, Any] = {"kind": "closed", "concurrency": cell.concurrency, "n_requests": n}
        else:
            load = {"kind": "poisson", "arrivals_per_s": rate, "duration_s": cell.duration_s}
        spec = {k: v for k, v in asdict(cell).items() if k not in ("guard_s", "expected_s")}
        return {
            "load": load,
            "lengths": cell.lengths,
            "cell_id": cell.cell_id(),
            "cell": spec,
            "seed": seed,
            "started_at": started_at,
        }


def _first(err: BaseException) -> str:
    """Return the first leaf of an exception group as one line."""
    while isinstance(err, BaseExceptionGroup):
        err = err.exceptions[0]
    return f"{type(err).__name__}: {err}"


def _memory(startup: dict[str, Any]) -> str:
    names = ("weights_bytes", "peak_activation_bytes", "non_torch_bytes", "cuda_graph_bytes", "kv_cache_bytes")
    parts = [f"{n.removesuffix('_bytes')} {startup[n] / 1e9:.2f} GB" for n in names if n in startup]
    blocks = f"{startup['n_kv_blocks']} blocks of {startup['kv_block_tokens']} tokens"
    return f"{', '.join(parts)}, {blocks}, figures from {startup['source']}"


def _summary(m: dict[str, Any]) -> str:
    tpot = f", TPOT p50 {1e3 * m['tpot_s']['p50']:.2f} ms" if "tpot_s" in m else ""
    power = f", {m['board_power_w']['mean']:.0f} W" if "board_power_w" in m else ""
    hits = f", {m['cached_prompt_frac']:.0%} cached" if m.get("cached_prompt_frac") else ""
    return (
        f"{m['n_requests']} requests in {m['duration_s']:.1f} s, {m['requests_per_s']:.2f}/s, "
        f"{m['output_tokens_per_s']:.0f} tok/s, "
        f"TTFT p50 {1e3 * m['ttft_s']['p50']:.0f} p99 {1e3 * m['ttft_s']['p99']:.0f} ms"
        f"{tpot}{power}{hits}"
    )


async def _session(job: Job, run: Run, output: Output, gpus: Gpus, host: dict[str, Any]) -> None:
    vllm = import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    _, config = models.resolve(job.model)
    idle = PowerMeter.over(gpus, IDLE_S)  # ends before the engine forks: no lock of NVML may be held then
    host["idle_power_w"] = idle and idle["mean"]
    host["idle_sm_clock_mhz"] = idle and idle.get("sm_clock_mhz")
    with tempfile.TemporaryDirectory(prefix="calibration-model-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        model = folder if job.load_format == "dummy" or not isinstance(job.model, str) else job.model
        args = engine_args(job, model)
        begin = time.perf_counter()
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        except Exception as err:
            traceback.print_exc()  # into the log
            why = vllm_probe.last_error(output.log_text()) or _first(err)
            raise EngineStartFailed(f"the engine of {job.run_id} did not start: {why}") from None
        startup_s = time.perf_counter() - begin
        meter = PowerMeter(gpus)
        meter.start()
        try:
            common = common_fields(job, engine, host, vllm.__version__, args)
            common["startup"] = await start_up(engine, gpus, output.log_text(), startup_s)
            output.say(f"{common['run_id']} started in {startup_s:.0f} s: {_memory(common['startup'])}")
            await run.run(make_send(engine), engine, common, config["vocab_size"], meter)
        finally:
            meter.stop()
            # every record is on disk by now: an engine that does not end must not hold the GPU minutes
            guard = threading.Timer(SHUTDOWN_LIMIT_S, os._exit, (0 if sys.exc_info()[0] is None else 3,))
            guard.daemon = True
            guard.start()
            engine.shutdown()
            guard.cancel()


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
    """Run a job and return the exit status: 0, or the `status` of the error that ended it.

    `deadline` is a `time.time()`; `known` are further files that may already hold cells of this run.
    """
    try:
        output = Output(out, rows, errors, log or f"{out}.{job.run_id}.log", shared=shared)
    except OutFileBusy as err:
        print(f"error: {err}", flush=True)
        return err.status
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the engine is shut down
    try:
        run = Run(job, output, known or [], deadline)
        if not run.left:
            output.say(f"{job.run_id}: all {len(run.cells)} cells are already in '{out}'")
            return 0
        output.capture()
        prepare_env()
        import_vllm()
        gpus = Gpus(job.gpus_needed)
        is_free = gpus.wait_free()
        host = gpus.describe()
        if not is_free:
            output.say(f"warning: {job.run_id}: other processes hold memory of its GPUs: {host['before_used_bytes']}")
        asyncio.run(_session(job, run, output, gpus, host))
    except KeyboardInterrupt:
        output.say(f"{job.run_id}: stopped; the records so far are in '{out}'")
        status = 130
    except CalibrationError as err:
        output.error(job.run_id, str(err), kind=type(err).__name__)
        output.say(f"error: {err}")
        status = err.status
    except Exception as err:
        traceback.print_exc()  # into the log
        output.error(job.run_id, _first(err), kind="crash")
        output.say(f"error: {job.run_id}: {_first(err)}")
        status = EngineDied.status
    finally:
        output.close()
    return status
