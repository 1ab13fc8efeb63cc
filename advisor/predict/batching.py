"""Requests through DeepSpeed's two ways of batching: a static batch, and FastGen's Dynamic SplitFuse.

Both replay a short, seeded sample of the workload, because percentiles of a batch queue have no useful closed form.
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
MAX_STEPS = 60_000


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


def serve_splitfuse(
    prompts: Ints,
    outputs: Ints,
    *,
    arrivals: Floats | None,
    clients: int,
    budget_tokens: int,
    max_seqs: int,
    kv_tokens: float,
    step_s: Callable[[float, float, float], float],
) -> Served:
    """Serve requests by Dynamic SplitFuse: each step takes one token of every decode, then prompt chunks to the budget.

    `step_s(prefill_tokens, n_decodes, context_tokens)` is the time of one step; `context_tokens` is summed over the
    decodes. A prompt is admitted when the cache has room for it; when the cache is full the newest sequence is thrown
    out and later recomputed. Steady stretches without prefill or arrival are taken in one jump.

    Reference: DeepSpeed-MII 0.3.3, batching/ragged_batching.py; DeepSpeed-FastGen, arXiv:2401.08671.
    """
    n = len(prompts)
    ready = np.zeros(n) if arrivals is None else arrivals
    known = min(clients, n) if arrivals is None else n
    first, done = np.full(n, np.nan), np.full(n, np.nan)
    left = outputs.astype(np.int64).copy()
    cached = np.zeros(n, dtype=np.int64)
    waiting_again: list[int] = []
    prefilling: list[list[int]] = []
    decoding: list[int] = []
    clock = busy = batches = 0.0
    started, held = 0, 0

    for _ in range(MAX_STEPS):
        if not (prefilling or decoding or waiting_again):
            if started >= n:
                break
            clock = max(clock, float(ready[started]))
        while len(decoding) + len(prefilling) < max_seqs:
            again = bool(waiting_again)
            if not again and not (started < known and ready[started] <= clock):
                break
            request = waiting_again[0] if again else started
            need = int(prompts[request] + outputs[request] - left[request])
            if held + need > kv_tokens and (decoding or prefilling):
                break
            if again:
                waiting_again.pop(0)
            else:
                started += 1
            held += need
            cached[request] = need
            prefilling.append([request, need])
        while len(decoding) > 1 and held + len(decoding) > kv_tokens:
            victim = decoding.pop()
            held -= int(cached[victim])
            waiting_again.insert(0, victim)
        n_decodes = len(decoding)
        context = float(cached[decoding].sum())
        room, fed, ended = max(1, budget_tokens - n_decodes), 0, []
        while prefilling and fed < room:
            chunk = min(prefilling[0][1], room - fed)
            prefilling[0][1] -= chunk
            fed += chunk
            if prefilling[0][1] == 0:
                ended.append(prefilling.pop(0)[0])
        jump = 1
        duration = step_s(fed, n_decodes, context)
        if not fed and n_decodes:
            jump = min(int(left[decoding].min()), max(1, int((kv_tokens - held) // n_decodes)))
            if started < known and ready[started] > clock:
                jump = max(1, min(jump, int((ready[started] - clock) / duration) + 1))
            duration = step_s(0, n_decodes, context + n_decodes * jump / 2) * jump
        clock += duration
        busy += duration
        batches += duration * (n_decodes + len(ended) + len(prefilling))
        left[decoding] -= jump
        cached[decoding] += jump
        held += n_decodes * jump
        for request in ended:
            if np.isnan(first[request]):
                first[request] = clock
            left[request] -= 1
        over = [r for r in (*decoding, *ended) if left[r] <= 0]
        decoding = [r for r in (*decoding, *ended) if left[r] > 0]
        for request in over:
            done[request] = clock
            held -= int(cached[request])
            if arrivals is None and known < n:
                ready[known] = clock
                known += 1
    served = np.flatnonzero(np.isfinite(done))
    ordered = served[int(len(served) * WARMUP_FRAC) :]
    gaps = np.maximum(outputs[ordered] - 1, 1)
    return Served(
        ttft_s=first[ordered] - ready[ordered],
        tpot_s=(done[ordered] - first[ordered]) / gaps,
        e2e_s=done[ordered] - ready[ordered],
        n_output_tokens=int(outputs[served].sum()),
        n_prompt_tokens=int(prompts[served].sum()),
        duration_s=clock,
        mean_batch=batches / busy if busy else 0.0,
        n_requests=len(served),
        busy_frac=busy / clock if clock else 0.0,
    )
