"""Rank side of micro-runs: rates of single operations that pin single coefficients. Run by deepspeed_runner only.

`what` of a cell: "gemm" (m, n, k, dtype bf16 or fp8), "copy" (n_bytes, device memory to device memory), "all_reduce"
(n_bytes, over the job's GPUs), "send" (n_bytes, first GPU to second), "host_to_device" and "device_to_host" (n_bytes,
pinned or not), "idle" (seconds).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from calibration import deepspeed_rank as rank
from calibration.deepspeed_rank import Mark, Out

Fields = dict[str, Any]
WINDOW_S = 0.4  # long enough for the power meter to see some 25 samples
WARMUP = 3
WHAT = ("gemm", "copy", "all_reduce", "send", "host_to_device", "device_to_host", "idle")


def default_cells(n_gpus: int) -> list[Fields]:
    """Return the cells that pin a GPU's own rates (and its links, with several GPUs): about 20 s in all."""
    cells: list[Fields] = [{"what": "idle", "seconds": 2.0}]
    for m in (1, 16, 64, 256, 1024, 4096, 8192):
        cells += [
            {"what": "gemm", "m": m, "n": 14336, "k": 4096, "dtype": d}
            for d in ("bf16", "fp8")
            if m >= 16 or d == "bf16"
        ]
    cells += [{"what": "copy", "n_bytes": n} for n in (2**20, 2**24, 2**28, 2**31)]
    for what in ("host_to_device", "device_to_host"):
        cells += [{"what": what, "n_bytes": n, "is_pinned": pinned} for n in (2**24, 2**28) for pinned in (True, False)]
    if n_gpus > 1:
        cells += [{"what": "all_reduce", "n_bytes": 2**e} for e in range(12, 30, 2)]
        cells += [{"what": "send", "n_bytes": 2**e} for e in (12, 16, 20, 24, 28)]
    return cells


def micro(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time the cells one after the other; one that fails costs only itself when there is one rank."""
    import torch

    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        torch.distributed.init_process_group("nccl" if rank.use_cuda() else "gloo")
    for cell in cells:
        try:
            measured, window = _run(cell, world)
        except Exception as err:
            if world > 1:
                raise
            out.failed(cell["index"], err)
            continue
        made = {"tp": world, "load": {"kind": "micro"} | {k: v for k, v in cell.items() if k != "index"}}
        out.cell(cell["index"], window, made | {"torch_version": torch.__version__}, measured)


def _run(cell: Fields, world: int) -> tuple[Fields, tuple[float, float]]:
    what = cell["what"]
    if what not in WHAT:
        raise ValueError(f"what must be one of {', '.join(WHAT)}, not {what!r}")
    if what == "idle":
        begin = time.perf_counter()
        time.sleep(float(cell.get("seconds", 2.0)))
        return {}, (begin, time.perf_counter())
    makers = {"gemm": _gemm, "all_reduce": _all_reduce, "send": _send}
    operation, per_call = makers.get(what, _copy)(cell, world)
    times, window = _time(operation, float(cell.get("window_s", WINDOW_S)))
    each = rank.median(times)
    return {"step_s": each, "step_p90_s": rank.p90(times), "step_min_s": min(times), "n_steps": len(times)} | {
        name: amount / each for name, amount in per_call.items()
    }, window


def _time(operation: Callable[[], None], window_s: float) -> tuple[list[float], tuple[float, float]]:
    """Return the times of single calls over a window; every rank makes the same number of calls."""
    for _ in range(WARMUP):
        operation()
    rank.sync()
    begin = time.perf_counter()
    for _ in range(5):
        operation()
    rank.sync()
    guess = rank.gathered((time.perf_counter() - begin) / 5)[0]
    n = int(min(20_000, max(10, window_s / max(guess, 1e-6))))
    marks, begin = [Mark()], time.perf_counter()
    for _ in range(n):
        operation()
        marks.append(Mark())
    rank.sync()
    end = time.perf_counter()
    return [a.seconds_to(b) for a, b in itertools.pairwise(marks)], (begin, end)


def _gemm(cell: Fields, world: int) -> tuple[Callable[[], None], dict[str, float]]:
    import torch

    m, n, k, dtype, dev = cell["m"], cell["n"], cell["k"], cell.get("dtype", "bf16"), rank.device()
    flops = 2.0 * m * n * k
    a = torch.randn(m, k, device=dev, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=dev, dtype=torch.bfloat16)
    if dtype == "bf16":
        out = torch.empty(m, n, device=dev, dtype=torch.bfloat16)
        moved = 2.0 * (m * k + n * k + m * n)

        def multiply() -> None:
            torch.matmul(a, b.t(), out=out)

        return multiply, {"flops_per_s": flops, "bytes_per_s": moved}
    if dtype != "fp8":
        raise ValueError(f"dtype must be bf16 or fp8, not {dtype!r}")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=dev, dtype=torch.float32)

    def call() -> None:
        torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return call, {"flops_per_s": flops, "bytes_per_s": 1.0 * (m * k + n * k) + 2.0 * m * n}


def _copy(cell: Fields, world: int) -> tuple[Callable[[], None], dict[str, float]]:
    import torch

    n, what, dev = int(cell["n_bytes"]), cell["what"], rank.device()
    on_device = torch.empty(n, dtype=torch.uint8, device=dev)
    if what == "copy":
        other = torch.empty_like(on_device)

        def copy() -> None:
            other.copy_(on_device)

        return copy, {"bytes_per_s": 2.0 * n}  # read and written: both pass the memory bus
    is_pinned = bool(cell.get("is_pinned", True)) and rank.use_cuda()
    host = torch.empty(n, dtype=torch.uint8, pin_memory=is_pinned)
    to, source = (on_device, host) if what == "host_to_device" else (host, on_device)

    def call() -> None:
        to.copy_(source, non_blocking=True)

    return call, {"bytes_per_s": float(n)}


def _all_reduce(cell: Fields, world: int) -> tuple[Callable[[], None], dict[str, float]]:
    import torch
    import torch.distributed as dist

    n = int(cell["n_bytes"])
    data = torch.zeros(n // 2, dtype=torch.bfloat16, device=rank.device())

    def call() -> None:
        dist.all_reduce(data)

    # bus bandwidth: what each link carries, 2 (p - 1) / p of the data (the nccl-tests convention)
    return call, {"bytes_per_s": float(n), "bus_bytes_per_s": 2.0 * (world - 1) / world * n}


def _send(cell: Fields, world: int) -> tuple[Callable[[], None], dict[str, float]]:
    import torch
    import torch.distributed as dist

    n, me = int(cell["n_bytes"]), dist.get_rank()
    data = torch.zeros(n // 2, dtype=torch.bfloat16, device=rank.device())

    def call() -> None:
        if me == 0:
            dist.send(data, 1)
        elif me == 1:
            dist.recv(data, 0)

    return call, {"bytes_per_s": float(n)}
