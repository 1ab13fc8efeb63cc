"""Figures of a vLLM engine at start: memory, exact from its workers or rounded from its log, and launch times."""

from __future__ import annotations

import re
import time
from typing import Any

from calibration.cpu import percentiles_us

GIB = 2**30
EXTENSION = "calibration.vllm_probe.MemoryProbe"
N_ROUNDS, N_LAUNCHES = 300, 20


class MemoryProbe:
    """Worker extension (vLLM's `worker_extension_cls`): a call that returns what the worker measured at start."""

    def calibration_memory(self) -> dict[str, Any]:
        """Return the worker's own start-up figures [bytes]; names that this vLLM lacks are left out."""
        snapshot = getattr(self, "init_snapshot", None)
        runner = getattr(self, "model_runner", None)
        found = {
            "weights_bytes": getattr(runner, "model_memory_usage", None),
            "peak_activation_bytes": getattr(self, "peak_activation_memory", None),
            "non_torch_bytes": getattr(self, "non_torch_memory", None),
            "cuda_graph_estimate_bytes": getattr(self, "cudagraph_memory_estimate", None),
            "kv_cache_bytes": getattr(self, "available_kv_cache_memory_bytes", None),
            "requested_bytes": getattr(self, "requested_memory", None),
            "device_memory_bytes": getattr(snapshot, "total_memory", None),
            "device_free_bytes": getattr(snapshot, "free_memory", None),
            "rank": getattr(self, "rank", None),
        }
        return {k: int(v) for k, v in found.items() if v is not None}

    def calibration_launch(self) -> list[float]:
        """Return percentiles (10, 50, 90) of the time to launch a small kernel from Python, without waiting [us]."""
        import torch

        x = torch.zeros(256, device="cuda")
        taken = []
        for _ in range(N_ROUNDS):
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            for _ in range(N_LAUNCHES):
                x.add_(1.0)
            taken.append((time.perf_counter() - begin_s) / N_LAUNCHES)
        return percentiles_us(taken)

    def calibration_spread_routing(self, n_experts: int) -> int:
        """Make random weights choose different experts for different tokens; return how many tensors were changed.

        vLLM's random weights and biases are uniform within 0.001. A router's bias, and what the biases of experts add
        to every token alike, outweigh such logits: all tokens would go to the same experts. Biases become nought and
        the routers' weights (their rows are the experts) 1,000 times larger.
        """
        import torch

        n_changed = 0
        with torch.no_grad():
            for name, tensor in self.get_model().named_parameters():  # type: ignore[attr-defined]
                if name.endswith("bias"):
                    tensor.zero_()
                elif tensor.ndim == 2 and tensor.shape[0] == n_experts and tensor.is_floating_point():
                    tensor.mul_(1000.0)
                else:
                    continue
                n_changed += 1
        return n_changed


def held(scheduled: Any) -> list[int]:
    """Return what a step holds that vLLM's scheduler hands to a worker: tokens, sequences, of these new ones."""
    return [
        getattr(scheduled, "total_num_scheduled_tokens", 0),
        len(getattr(scheduled, "num_scheduled_tokens", ())),
        len(getattr(scheduled, "scheduled_new_reqs", ())),
    ]


_NUMBER = r"([0-9][0-9,]*\.?[0-9]*)"
# what vLLM 0.11 to 0.26 print at start; each group is the figure, in GiB for the *_bytes names
_LINES: dict[str, tuple[str, ...]] = {
    "weights_bytes": (
        rf"Actual usage is {_NUMBER} GiB for weight",
        rf"Model loading took {_NUMBER} GiB",
        rf"weights memory: {_NUMBER}GiB",
    ),
    "peak_activation_bytes": (
        rf"{_NUMBER} GiB for peak activation",
        rf"torch peak memory increase: {_NUMBER}GiB",
    ),
    "non_torch_bytes": (
        rf"{_NUMBER} GiB for non-torch memory",
        rf"non-torch forward increase memory: {_NUMBER}GiB",
    ),
    "cuda_graph_bytes": (
        rf"CUDA graph pool memory: {_NUMBER} GiB \(actual\)",
        rf"{_NUMBER} GiB for CUDAGraph memory",
        rf"Graph capturing finished in [0-9.]+ secs, took {_NUMBER} GiB",
    ),
    "cuda_graph_estimate_bytes": (
        rf"{_NUMBER} GiB \(estimated\)",
        rf"Estimated CUDA graph memory: {_NUMBER} GiB",
    ),
    "kv_cache_bytes": (rf"Available KV cache memory: {_NUMBER} GiB",),
    "device_memory_bytes": (rf"Free memory on device \([0-9.]+/{_NUMBER} GiB\)",),
    "kv_cache_tokens": (rf"GPU KV cache size: {_NUMBER} tokens",),
    "compile_s": (
        rf"torch\.compile (?:and initial profiling/warmup run together )?took {_NUMBER} s",
        rf"torch\.compile takes {_NUMBER} s",
    ),
    "weights_load_s": (rf"Model loading took [0-9.]+ GiB (?:memory )?and {_NUMBER} seconds",),
}


def from_log(text: str) -> dict[str, float]:
    """Return the start-up figures that an engine's log holds, by their names in the run record."""
    found: dict[str, float] = {}
    for name, patterns in _LINES.items():
        for pattern in patterns:
            if match := re.search(pattern, text):
                value = float(match.group(1).replace(",", ""))
                found[name] = round(value * GIB) if name.endswith("_bytes") else value
                break
    if "kv_cache_tokens" in found:
        found["kv_cache_tokens"] = int(found["kv_cache_tokens"])
    return found


def from_workers(answers: Any) -> dict[str, Any]:
    """Return the figures of the worker with the least room for KV, which sets the pool, and `ranks` when several."""
    ranks = [a for a in answers or [] if isinstance(a, dict) and a]
    if not ranks:
        return {}
    tightest = min(ranks, key=lambda r: r.get("kv_cache_bytes", 0))
    out = {k: v for k, v in tightest.items() if k != "rank"}
    return out | ({"ranks": ranks} if len(ranks) > 1 else {})


def last_error(text: str, limit: int = 400) -> str:
    """Return the line of a log that says best why the engine stopped, or an empty text."""
    wanted = re.compile(r"(\w*(?:Error|Exception|OutOfMemory)\w*: .+)|(CUDA out of memory.+)|(Segmentation fault.*)")
    dull = (
        "Engine core initialization failed",
        "EngineDeadError",
        "CancelledError",
        "WorkerProc initialization failed",
    )
    lines = [m.group(0).strip() for m in wanted.finditer(text)]
    telling = [line for line in lines if not any(d in line for d in dull)] or lines
    memory = [line for line in telling if "out of memory" in line.lower()]
    return (memory or telling or [""])[-1][:limit]
