"""Weights that do not stay on the GPU: the time of a streamed pass and the host bytes that it needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

OVERLAP_SHARPNESS = 6.0
"""Exponent of the smooth maximum of overlapped times: two equal times give 12 % more than one of them."""

LIVE_PARAMS = 1.05e9
"""Parameters that ZeRO-3 keeps gathered: max_reuse_distance 1e9 + prefetch bucket 5e7 (DeepSpeed 0.19.8 defaults)."""


def overlapped_s(*times_s: ArrayLike) -> NDArray[np.float64]:
    """Return the time of activities that run side by side: ``(sum t^k)^(1/k)``, k = 6, a maximum with a soft corner.

    Zero or more non-negative times [s], any broadcastable shapes; never below the largest of them.

    >>> round(float(overlapped_s(3.0, 4.0)), 2)
    4.11
    """
    if all(isinstance(t, float) for t in times_s):  # a replay asks for one step at a time
        numbers: list[float] = [float(t) for t in times_s]  # type: ignore[arg-type]
        most = max(numbers) or 1.0
        return np.asarray(most * sum((t / most) ** OVERLAP_SHARPNESS for t in numbers) ** (1 / OVERLAP_SHARPNESS))
    arrays = np.broadcast_arrays(*(np.asarray(t, dtype=float) for t in times_s))
    largest = np.maximum.reduce(arrays)
    safe = np.where(largest > 0, largest, 1.0)
    total = np.asarray(sum((a / safe) ** OVERLAP_SHARPNESS for a in arrays))
    return np.asarray(largest * total ** (1 / OVERLAP_SHARPNESS))


def partly_hidden_s(one_s: ArrayLike, other_s: ArrayLike, serial_frac: ArrayLike) -> NDArray[np.float64]:
    """Return the time of two activities side by side of which a part of the shorter shows: ``max + serial_frac min``.

    ZeRO-3's host launches a fetch when it comes to a layer and waits for some of them, so hooks and link take turns in
    part; serial_frac : 0 = the shorter hides behind the longer, 1 = one after the other. Non-negative times [s], any
    broadcastable shapes.

    Reference: our records, deepspeed-0.19.8_h100-4.jsonl; DeepSpeed 0.19.8, partitioned_param_coordinator.py.

    >>> float(partly_hidden_s(0.2, 0.1, 0.5))
    0.25
    """
    one, other = np.asarray(one_s, dtype=float), np.asarray(other_s, dtype=float)
    return np.asarray(np.maximum(one, other) + np.asarray(serial_frac, dtype=float) * np.minimum(one, other))


def weight_stream_s(
    weight_bytes: ArrayLike, n_ranks: ArrayLike, host_bytes_per_s: ArrayLike, gather_bytes_per_s: ArrayLike
) -> NDArray[np.float64]:
    """Return the time to bring every weight to every GPU once: ``W/(N h) + W (N-1)/(N g)``.

    Each of N ranks reads its 1/N share W/N from the host (rate h a GPU) and gets the rest by an all-gather over the
    GPUs' links (rate g a GPU). W in bytes, h and g in bytes/s, N >= 1.

    Notes: reading and gathering are counted one after the other; a public table of 1, 2 and 4 V100 GPUs shows that sum.
    Reference: Aminabadi et al. 2022, arXiv:2207.00032, section 6; DeepSpeed, ZeRO-Inference post of 2022-09-10.

    >>> round(float(weight_stream_s(350e9, 1, 10.9e9, 100e9)), 1)  # OPT-175B fp16 on one V100: measured 32 s
    32.1
    """
    weights = np.asarray(weight_bytes, dtype=float)
    n = np.asarray(n_ranks, dtype=float)
    read = weights / n / np.asarray(host_bytes_per_s, dtype=float)
    gather = weights * (n - 1) / n / np.asarray(gather_bytes_per_s, dtype=float)
    return np.asarray(read + gather)


def nvme_bytes_per_s_per_gpu(
    nvme_bytes_per_s: ArrayLike, gpus_per_node: ArrayLike, host_bytes_per_s: ArrayLike, serial_frac: ArrayLike
) -> NDArray[np.float64]:
    """Return the rate at which one GPU is fed from the node's drives [bytes/s].

    A byte takes ``max(n / nvme, 1 / host) + serial_frac min(n / nvme, 1 / host)`` seconds: n GPUs share the drives, the
    bytes pass through pinned buffers of host memory, and a part of the copy to the GPU waits for the buffers that the
    drives fill. serial_frac : 0 = reading and copying overlap fully, 1 = one after the other.

    Notes: public tables (1, 2 and 4 V100 on 8 drives; one A6000 on two) show that part, not a pure minimum of rates.
    Reference: DeepSpeed, ZeRO-Inference post of 2022-09-10; buffer_count 5 of DeepSpeed 0.19.8, zero/offload_config.py.

    >>> float(nvme_bytes_per_s_per_gpu(24e9, 4, 10e9, 0.0))
    6000000000.0
    >>> round(float(nvme_bytes_per_s_per_gpu(24e9, 1, 10e9, 0.5)) / 1e9, 2)
    8.28
    """
    read = np.asarray(gpus_per_node, dtype=float) / np.asarray(nvme_bytes_per_s, dtype=float)
    copy = 1.0 / np.asarray(host_bytes_per_s, dtype=float)
    return np.asarray(1.0 / (np.maximum(read, copy) + np.asarray(serial_frac, dtype=float) * np.minimum(read, copy)))


def gathered_params(n_params: ArrayLike, largest_module_params: ArrayLike) -> NDArray[np.float64]:
    """Return the parameters that are whole on a GPU while ZeRO-3 runs: ``min(P, 1.05e9 + largest module)``.

    Notes: with default settings; a model below about 1e9 parameters is never released between its uses.
    Reference: DeepSpeed 0.19.8, zero/config.py (stage3_max_reuse_distance, stage3_prefetch_bucket_size).

    >>> round(float(gathered_params(6_738_415_616, 45e6)) * 2 / 2**30, 2)  # measured 2.10 GiB on a 7B model
    2.04
    """
    most = LIVE_PARAMS + np.asarray(largest_module_params, dtype=float)
    return np.asarray(np.minimum(np.asarray(n_params, dtype=float), most))
