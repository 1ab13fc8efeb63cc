"""Steady state of many deployments at once, in closed form: the sweep that comes before simulation.

A replica that runs n sequences takes one step a token. A share of the steps also carries a prompt. From the mean step
time follow throughput (n over output tokens times step time), the load at which it saturates and the usual latencies;
the percentiles are rules of thumb (a queue's tail) and finalists are simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from advisor.laws.roofline import larger_of
from advisor.predict.footprint import kv_cache_tokens
from advisor.predict.release import at_release
from advisor.predict.shapes import shapes_of
from advisor.predict.step import Gemm, StepCost, step_cost
from advisor.predict.traffic import mean_lengths
from advisor.predict.transfer import transferred
from advisor.schema import ClosedLoad, CoefficientSet, Deployment, EngineFacts, Gpu, Model, Workload

Floats = NDArray[np.float64]
N_ITERATIONS = 20
"""Bisections of the logarithm of the running sequences over six decades: 1e-5 of the value."""

BLOCK = 8192
"""Deployments that are solved together: more of them do not fit into a core's cache."""

TAIL = 4.6
"""ln 100: the 99th percentile of an exponential wait over its mean."""


def _kinds(columns: Sequence[tuple[Gemm, ...]], name: str, index: NDArray[np.int64]) -> Floats:
    """Return a field of matrices, kinds x 1 x plans: the middle axis is that of steps with and without a prompt."""
    return np.array([[getattr(gemm, name) for gemm in gemms] for gemms in columns], dtype=float).T[:, None, index]


def stacked(costs: Sequence[StepCost], index: NDArray[np.int64]) -> StepCost:
    """Return one `StepCost` whose numbers are arrays: element i is `costs[index[i]]`."""
    values: dict[str, object] = {}
    for field in fields(StepCost):
        column = [getattr(cost, field.name) for cost in costs]
        if field.name == "gemms":
            flops, moved, tiles = (_kinds(column, part.name, index) for part in fields(Gemm)[:3])
            values["gemms"] = (Gemm(flops, moved, tiles, is_stacked=True),)
        elif len(set(column)) == 1:
            values[field.name] = column[0]
        else:
            values[field.name] = np.array(column)[index]
    return StepCost(**values)  # type: ignore[arg-type]


def sweep(
    model: Model,
    gpu: Gpu,
    deployments: Sequence[Deployment],
    workload: Workload,
    coefficients: CoefficientSet,
    facts: EngineFacts | None = None,
) -> dict[str, Floats]:
    """Return the steady state of every deployment, one array element each.

    Keys: ttft_p50_s ttft_p99_s tpot_p50_s tpot_p99_s e2e_p50_s requests_per_s output_tokens_per_s
    saturation_requests_per_s n_running mfu_frac mbu_frac is_saturated (1 or 0), all replicas together.
    Deployments of one engine shape (tp, pp, formats) share their cost, so that 100,000 settings are a few arrays.
    """
    values = transferred(coefficients, gpu)
    shapes = shapes_of(model)
    keys = [
        (d.tp, d.pp, d.weight_dtype, d.kv_dtype, d.enforce_eager, d.max_num_seqs, d.ep, d.engine_version)
        for d in deployments
    ]
    first: dict[tuple[object, ...], Deployment] = {}
    for key, deployment in zip(keys, deployments, strict=True):
        first.setdefault(key, deployment)
    costs = [step_cost(shapes, gpu, d, at_release(values, d, gpu), d.pp - 1) for d in first.values()]
    number = dict(zip(first, range(len(first)), strict=True))
    index = np.array([number[key] for key in keys], dtype=np.int64)
    cache = kv_cache_tokens(model, gpu, deployments, facts)
    settings = [(d.pp, d.dp, d.max_num_seqs, d.max_num_batched_tokens, d.prefix_caching) for d in deployments]
    columns = np.array(settings, dtype=float).T.copy()
    blocks = [slice(i, i + BLOCK) for i in range(0, len(deployments), BLOCK)]
    parts = [
        _solved(stacked(costs, index[block]), cache[block], columns[:, block], workload, values, gpu)
        for block in blocks
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _solved(
    cost: StepCost, cache: Floats, columns: Floats, workload: Workload, values: Mapping[str, float], gpu: Gpu
) -> dict[str, Floats]:
    """Return the values of `sweep` for some deployments.

    cache, columns : tokens that the KV cache holds; stages, replicas, sequences, batched tokens, 1 for prefix caching
    """
    pp, dp, seqs, budget, has_cache = columns
    client_s = values["submit_s"] + values["http_s"] + values["wake_s"] + values["return_s"]
    send_s = values["send_s"]
    prompt, output = mean_lengths(workload.lengths)
    hit = workload.prefix
    shared = min(hit.shared_prefix_tokens, prompt)
    to_compute = np.maximum(prompt - has_cache * (shared + (prompt - shared) * hit.conversation_hit_frac), 1.0)
    held = prompt + 0.5 * output
    n_most = np.maximum(
        np.minimum(seqs, (cache - has_cache * shared) / np.maximum(held - has_cache * shared, 1.0)), 1e-9
    )

    def mean_step(n: Floats) -> tuple[Floats, Floats, Floats]:
        """Return mean step time, pure decode step time and the time that one request's prompt adds to its step [s]."""
        group = n / pp
        context = group * held - np.maximum(group - 1.0, 0.0) * has_cache * shared * (1.0 - values["shared_kv_frac"])
        chunk = np.minimum(to_compute, np.maximum(budget - group, 1.0))
        pairs = chunk * (0.5 * (chunk + 1.0) + 0.5 * (to_compute - chunk))
        # row 0: a step of decodes alone; row 1: one that also carries a chunk of a prompt
        prefill, sampled = np.stack([0.0 * chunk, chunk]), np.stack([group, group + 1.0])
        alone_s, with_prompt_s = cost.seconds(prefill, np.stack([0.0 * pairs, pairs]), group, context, sampled)
        alone_host_s, with_prompt_host_s = cost.host_s(prefill, group, sampled)
        decode = larger_of(alone_s, alone_host_s) * pp + (pp > 1) * pp * send_s
        ratio = cost.power_ratio(with_prompt_s, chunk + group, pairs, context, sampled[1])
        mixed = np.maximum(with_prompt_s * cost.stretch(ratio), with_prompt_host_s)
        extra = np.maximum(mixed - decode / pp, 0.0) * (to_compute / chunk)
        # each token of a running sequence brings 1/output of a prompt
        return decode + n / output * extra, decode, mixed * (to_compute / chunk)

    step_full, _, _ = mean_step(n_most)
    most = n_most / (output * step_full)
    low, high = 1e-6 * n_most, n_most.copy()
    if isinstance(workload.load, ClosedLoad):
        per_replica = workload.load.concurrency / dp
        target = np.minimum(per_replica, n_most)
    else:
        target = np.zeros(len(dp))
    offered = 0.0 if isinstance(workload.load, ClosedLoad) else workload.load.arrivals_per_s
    for _ in range(N_ITERATIONS):
        n = np.sqrt(low * high)
        step, _, mixed = mean_step(n)
        rate = n / (output * step)
        if isinstance(workload.load, ClosedLoad):
            waiting = rate * (2.0 * step + mixed + client_s)
            is_over = n + waiting > target
        else:
            is_over = rate > offered / dp
        high = np.where(is_over, n, high)
        low = np.where(is_over, low, n)
    n = np.sqrt(low * high)
    step, _, mixed = mean_step(n)
    rate = n / (output * step)
    if isinstance(workload.load, ClosedLoad):
        saturated = np.zeros(len(dp))
        queue = np.maximum(workload.load.concurrency / dp - n_most, 0.0) / rate
        ttft = 2.0 * step + mixed + client_s + queue
        ttft_tail = ttft + TAIL * 0.5 * mixed
        requests = rate * dp
    else:
        load = offered / dp / most
        saturated = (load >= 1.0).astype(float)
        wait = 0.5 * np.minimum(load, 0.999) / (1.0 - np.minimum(load, 0.999)) * mixed
        ttft = 1.5 * step + mixed + client_s + 0.7 * wait
        ttft_tail = 1.5 * step + mixed * (1.0 + np.minimum(load, 1.0)) + client_s + TAIL * wait
        requests = np.minimum(np.full(len(dp), offered), most * dp)
        ttft = np.where(saturated > 0, np.inf, ttft)
        ttft_tail = np.where(saturated > 0, np.inf, ttft_tail)
    tpot = step
    matrix, attention = cost.flops(1.0, 0.5 * prompt, 1.0)
    per_request = matrix * (to_compute + output) + attention * to_compute
    peak = gpu.peak_flops_per_s.get("bf16") or gpu.peak_flops_per_s["fp16"]
    streamed = cost.weight_bytes + cost.head_bytes + cost.expert_bytes * (cost.n_experts > 0)
    read = streamed / step * pp + n / pp * held * cost.kv_bytes_per_context_token / step * pp
    ones = np.ones(len(dp))
    return {
        "ttft_p50_s": ttft * ones,
        "ttft_p99_s": ttft_tail * ones,
        "tpot_p50_s": tpot * ones,
        "tpot_p99_s": tpot * 1.3 * ones,
        "e2e_p50_s": ttft + (output - 1.0) * tpot,
        "requests_per_s": requests * ones,
        "output_tokens_per_s": requests * output,
        "saturation_requests_per_s": most * dp,
        "n_running": n * dp,
        "mfu_frac": requests / dp * per_request / peak,
        "mbu_frac": np.minimum(read / gpu.memory_bandwidth_bytes_per_s, 1.0) * ones,
        "is_saturated": saturated * ones,
    }
