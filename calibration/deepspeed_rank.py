"""What one rank of a DeepSpeed job needs: its case, marks in time, memory figures, and the file it answers in.

The parent (deepspeed_runner) starts the ranks, samples the power of all GPUs, and turns answers into run records.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def use_cuda() -> bool:
    """Say whether this run is on GPUs (tests run on the CPU with DS_ACCELERATOR=cpu)."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> Any:
    """Return this rank's torch device."""
    import torch

    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda() else torch.device("cpu")


def sync() -> None:
    """Wait for the device."""
    import torch

    if use_cuda():
        torch.cuda.synchronize()


class Mark:
    """A point in time on the device's stream (the wall clock on a CPU)."""

    def __init__(self) -> None:
        import torch

        self.is_event = use_cuda()
        self.at: Any = time.perf_counter()
        if self.is_event:
            self.at = torch.cuda.Event(enable_timing=True)
            self.at.record()

    def seconds_to(self, later: Mark) -> float:
        """Return the seconds from this mark to a later one; both must have happened."""
        return float(self.at.elapsed_time(later.at) / 1e3 if self.is_event else later.at - self.at)


def median(values: list[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def p90(values: list[float]) -> float:
    """Return the 90th percentile (nearest rank)."""
    return sorted(values)[min(len(values) - 1, int(0.9 * len(values)))]


def reset_peak() -> None:
    """Start a new measurement of peak memory."""
    import torch

    if use_cuda():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, int]:
    """Return allocated, reserved, their peaks and what the whole device holds [bytes]; host memory of this process."""
    import torch

    found = {}
    if use_cuda():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found = {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": total - free,
            "device_memory_bytes": total,
        }
    with open("/proc/self/statm") as file:
        found["host_rss_bytes"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def gathered(value: Any) -> list[Any]:
    """Return the value of every rank, in order, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def peak_fields() -> dict[str, Any]:
    """Return the `measured` fields of memory: this rank's, and the peaks of each rank when there are several."""
    mine = memory()
    ranks = gathered(mine)
    mine.pop("device_memory_bytes", None)
    out: dict[str, Any] = dict(mine)
    if len(ranks) > 1:
        for name in ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "host_rss_bytes"):
            if name in mine:
                out[f"{name.removesuffix('_bytes')}_per_rank_bytes"] = [r[name] for r in ranks]
                out[name] = max(r[name] for r in ranks)
    return out


class Out:
    """The file in which rank 0 answers; the other ranks write nothing."""

    def __init__(self) -> None:
        self.is_first = os.environ.get("RANK", "0") == "0"
        self.path = os.environ["CALIBRATION_ANSWERS"]

    def write(self, answer: Answer) -> None:
        """Append one answer and see it on the disk."""
        if not self.is_first:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(answer) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cell(self, index: int, window: tuple[float, float], fields: Answer, measured: Answer) -> None:
        """Answer one cell; `window` is the timed stretch in `time.perf_counter()`, which all processes share."""
        self.write({"cell": index, "window": list(window), "fields": fields, "measured": measured})

    def failed(self, index: int, err: BaseException) -> None:
        """Answer one cell that failed."""
        text = f"{type(err).__name__}: {err}"
        self.write({"cell": index, "error": text[:800], "is_oom": "out of memory" in text.lower()})


def rank_main(work: Callable[[dict[str, Any], list[dict[str, Any]], Out], None]) -> None:
    """Run `work(case, cells, out)` on this rank and leave, whatever NCCL's threads think."""
    task = json.loads(os.environ["CALIBRATION_TASK"])
    out, status = Out(), 0
    try:
        import torch

        if use_cuda():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.manual_seed(1234)
        work(task["case"], task["cells"], out)
    except BaseException as err:
        traceback.print_exc()
        text = f"{type(err).__name__}: {err}"
        with open(f"{out.path}.rank{os.environ.get('RANK', '0')}", "w") as file:
            json.dump({"error": text[:800], "is_oom": "out of memory" in text.lower()}, file)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def versions() -> dict[str, str]:
    """Return the versions that a record names."""
    import deepspeed
    import torch

    found = {"torch_version": torch.__version__, "deepspeed": deepspeed.__version__}
    try:
        import transformers

        found["transformers_version"] = transformers.__version__
    except ImportError:
        pass
    return found


def load_hf(config: dict[str, Any]) -> None:
    """Import all that building a model imports: inside zero.Init, which patches torch, some imports fail."""
    import torch

    with torch.device("meta"):
        hf_model(config, torch.bfloat16)


def hf_model(config: dict[str, Any], dtype: Any, **more: Any) -> Any:
    """Return a transformers model with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    fields = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}
    made = transformers.AutoConfig.for_model(config["model_type"], **fields, **more)
    try:
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")
    except TypeError:  # transformers 4
        return transformers.AutoModelForCausalLM.from_config(made, torch_dtype=dtype, attn_implementation="sdpa")
