"""Requests through a static batch, and the seeded sample that every DeepSpeed path replays.

Percentiles of a batch queue have no useful closed form, so a short sample of the workload is served one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advisor.predict.traffic import arrival_times
from advisor.schema import ClosedLoad, TraceLoad, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_SAMPLE = 400
MAX_SAMPLE = 3000
WARMUP_FRAC = 0.1


@dataclass(frozen=True)
class Served:
    """Latencies of the served requests [s], one entry a request, and the time that serving them took."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    n_output_tokens: int
    n_prompt_tokens: int
    duration_s: float
    mean_batch: float
    n_requests: int
    busy_frac: float


def sample_size(workload: Workload, batch: int) -> int:
    """Return how many requests to replay: enough for a P99 and for ten batches, never more than 3000."""
    wanted = max(MIN_SAMPLE, 10 * batch)
    load = workload.load
    if isinstance(load, ClosedLoad):
        wanted = max(wanted, 6 * load.concurrency)
    return int(min(wanted, MAX_SAMPLE))


def sample_arrivals(workload: Workload, n: int, share: float, rng: np.random.Generator) -> Floats:
    """Return `n` arrival times [s] of one replica that receives `share` of an open load."""
    load = workload.load
    if isinstance(load, ClosedLoad):
        return np.zeros(n)
    if isinstance(load, TraceLoad):
        times = np.asarray(load.arrival_s) - load.arrival_s[0]
        period = times[-1] + 1 / load.arrivals_per_s
        stride = max(1, round(1 / share))
        index = np.arange(n) * stride
        return np.asarray(times[index % len(times)] + index // len(times) * period)
    thinned = {"arrivals_per_s": load.arrivals_per_s * share, "n_requests": n, "duration_s": None}
    return arrival_times(load.model_copy(update=thinned), rng)


def serve_static(
    prompts: Ints,
    outputs: Ints,
    *,
    arrivals: Floats | None,
    clients: int,
    batch: int,
    prefill_s: Callable[[int, float], float],
    decode_s: Callable[[int, float], float],
) -> Served:
    """Serve requests in static batches: whoever waits (at most `batch`) goes together, and all wait for the longest.

    Prompts are padded to the longest of the batch. TTFT = wait + prefill; a request's answer returns when the batch
    ends, so E2E is the same for all that started together. With `arrivals` None, `clients` clients send their next
    request when their last one returns.
    """
    n = len(prompts)
    ready = np.zeros(n) if arrivals is None else arrivals
    ttft, tpot, e2e = np.empty(n), np.empty(n), np.empty(n)
    started = 0
    clock = busy = 0.0
    sizes = []
    known = min(clients, n) if arrivals is None else n
    while started < n:
        clock = max(clock, float(ready[started]))
        last = min(known, started + batch)
        while last > started + 1 and ready[last - 1] > clock:
            last -= 1
        group = slice(started, last)
        size = last - started
        prompt, output = int(prompts[group].max()), int(outputs[group].max())
        first = prefill_s(size, prompt)
        step = decode_s(size, prompt + output / 2) if output > 1 else 0.0
        end = clock + first + step * (output - 1)
        ttft[group] = clock + first - ready[group]
        tpot[group] = step
        e2e[group] = end - ready[group]
        if arrivals is None:
            freed = min(n, known + size)
            ready[known:freed] = end
            known = freed
        busy += end - clock
        clock = end
        started = last
        sizes.append(size)
    skip = int(n * WARMUP_FRAC) if arrivals is not None or clients > batch else 0
    return Served(
        ttft_s=ttft[skip:],
        tpot_s=tpot[skip:],
        e2e_s=e2e[skip:],
        n_output_tokens=int(outputs.sum()),
        n_prompt_tokens=int(prompts.sum()),
        duration_s=clock,
        mean_batch=float(np.mean(sizes)),
        n_requests=n,
        busy_frac=busy / clock if clock else 0.0,
    )
