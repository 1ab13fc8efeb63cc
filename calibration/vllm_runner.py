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
from pathlib import Path
from typing import Any

from calibration import kernel_probe, launch_probe, models, vllm_probe
from calibration.errors import EngineMissing, EngineStartFailed, OutFileBusy, first_error
from calibration.gpus import Gpus, PowerMeter
from calibration.jobs import Job, start_fields
from calibration.kernel_probe import record_kernels
from calibration.load import Send
from calibration.output import Output, prepare_env
from calibration.session import Run, n_experts_of

SHUTDOWN_LIMIT_S = 15.0
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
        probe = launch_probe if job.times_launches else kernel_probe if job.kernels else vllm_probe
        args["worker_extension_cls"] = probe.EXTENSION
    return args | job.engine_args


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


async def start_up(engine: Any, gpus: Gpus, log: str, startup_s: float, n_replicas: int = 1) -> dict[str, Any]:
    """Return the record's `startup`: exact figures of the workers where they answer, the log's otherwise."""
    found: dict[str, Any] = vllm_probe.from_log(log)
    try:
        answers = await asyncio.wait_for(engine.collective_rpc("calibration_memory"), 20)
        found |= vllm_probe.from_workers(answers)
        found["source"] = "workers"
    except Exception as err:
        found["source"] = f"log ({type(err).__name__})"
    cache = engine.vllm_config.cache_config
    found["n_kv_blocks"] = cache.num_gpu_blocks // n_replicas  # vLLM says the sum
    found["kv_block_tokens"] = cache.block_size
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    found["kv_cache_tokens"] = tokens or found.get("kv_cache_tokens") or found["n_kv_blocks"] * cache.block_size
    used = gpus.used_bytes()
    if all(u is not None for u in used):
        found["device_used_bytes"] = used
    return found | {"startup_s": startup_s}


async def launch_times(engine: Any) -> dict[str, Any]:
    """Return the record's `launch_us` of the first worker, or nothing where it does not answer."""
    try:
        answers = await asyncio.wait_for(engine.collective_rpc("calibration_launch"), 20)
    except Exception:
        return {}
    return {"launch_us": answers[0]} if answers and answers[0] else {}


async def spread_routing(engine: Any, job: Job, config: dict[str, Any]) -> dict[str, Any]:
    """Return what random weights of a model with experts were changed to (`calibration_spread_routing`), else nothing.

    Weights that were read from disk stay as they are.
    """
    n_experts = n_experts_of(config)
    if job.load_format != "dummy" or not n_experts or not job.worker_probe:
        return {}
    try:
        answers = await asyncio.wait_for(engine.collective_rpc("calibration_spread_routing", args=(n_experts,)), 60)
    except Exception as err:
        return {"n_tensors_changed_to_spread_routing": f"none: {first_error(err)}"}
    return {"n_tensors_changed_to_spread_routing": answers[0]}


def common_fields(job: Job, engine: Any, host: dict[str, Any], version: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return what every record of this start shares."""
    import torch

    vllm_config = engine.vllm_config
    scheduler = vllm_config.scheduler_config
    return {
        **start_fields(job, "vllm", version, host["gpu"]),
        "torch_version": torch.__version__,
        "interconnect": host["interconnect"],
        "idle_power_w": host.get("idle_power_w"),
        "power_limit_w_per_gpu": host["power_limit_w_per_gpu"],
        "max_model_len": vllm_config.model_config.max_model_len,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "prefix_caching": bool(vllm_config.cache_config.enable_prefix_caching),
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


def _memory(startup: dict[str, Any]) -> str:
    names = ("weights_bytes", "peak_activation_bytes", "non_torch_bytes", "cuda_graph_bytes", "kv_cache_bytes")
    parts = [f"{n.removesuffix('_bytes')} {startup[n] / 1e9:.2f} GB" for n in names if n in startup]
    blocks = f"{startup['n_kv_blocks']} blocks of {startup['kv_block_tokens']} tokens"
    return f"{', '.join(parts)}, {blocks}, figures from {startup['source']}"


async def _session(job: Job, run: Run, output: Output, gpus: Gpus, host: dict[str, Any]) -> None:
    vllm = import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    _, config = models.resolve(job.model)
    idle = PowerMeter.over(gpus)  # ends before the engine forks: no lock of NVML may be held then
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
            why = vllm_probe.last_error(output.log_text()) or first_error(err)
            raise EngineStartFailed(f"the engine of {job.run_id} did not start: {why}") from None
        startup_s = time.perf_counter() - begin
        meter = PowerMeter(gpus)
        meter.start()
        try:
            common = common_fields(job, engine, host, vllm.__version__, args)
            common["startup"] = await start_up(engine, gpus, output.log_text(), startup_s, job.dp)
            common["host"] |= await launch_times(engine)
            common["command"] |= await spread_routing(engine, job, config)
            output.say(f"{common['run_id']} started in {startup_s:.0f} s: {_memory(common['startup'])}")
            if job.times_launches:
                name = f"{common['run_id']}-launches.jsonl"
                await engine.collective_rpc(
                    "calibration_time_launches", args=(str(Path(output.out).resolve().parent / name),)
                )
            send = make_send(engine)
            await run.run(send, engine, common, config["vocab_size"], meter)
            if job.kernels:
                path = Path(output.out).resolve().parent / f"{common['run_id']}-kernels.jsonl.gz"
                found = await record_kernels(engine, send, job.kernels, config["vocab_size"], path, common["run_id"])
                for line in found:
                    output.say(f"{common['run_id']} {line}")
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the engine is shut down

    def work() -> int:
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
        return 0

    return output.attempt(job.run_id, work)
