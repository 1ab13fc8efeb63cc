"""Steady state of many deployments at once, in closed form: the sweep that comes before simulation.

A replica that runs n sequences takes one step a token. A share of the steps also carries a prompt. From the mean step
time follow throughput (n over output tokens times step time), the load at which it saturates and the usual latencies;
the percentiles are rules of thumb (a queue's tail) and finalists are simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from advisor.laws.roofline import larger_of
from advisor.predict.footprint import kv_cache_tokens
from advisor.predict.front import front_of, server_s
from advisor.predict.gemm import Gemm
from advisor.predict.release import at_release
from advisor.predict.shapes import shapes_of
from advisor.predict.step import StepCost, step_cost
from advisor.predict.traffic import mean_lengths
from advisor.predict.transfer import transferred
from advisor.schema import ClosedLoad, CoefficientSet, Deployment, EngineFacts, Gpu, Model, Workload

Floats = NDArray[np.float64]
N_ITERATIONS = 16
"""Bisections of the logarithm of the running sequences over six decades: 1e-4 of the value."""

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
            flops, moved, rows, tiles = (_kinds(column, part.name, index) for part in fields(Gemm)[:4])
            values["gemms"] = (Gemm(flops, moved, rows, tiles, is_stacked=True),)
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
    """Return the steady state of every deployment, one array element each; keys as of `swept`."""
    return swept(model, gpu, deployments, workload, transferred(coefficients, gpu), facts)


def swept(
    model: Model,
    gpu: Gpu,
    deployments: Sequence[Deployment],
    workload: Workload,
    values: Mapping[str, float],
    facts: EngineFacts | None = None,
    *,
    has_releases: bool = True,
) -> dict[str, Floats]:
    """Return the steady state of every deployment from coefficient values for this GPU.

    has_releases : whether older releases have host times of their own (predict/release.py)

    Keys: ttft_p50_s ttft_p99_s tpot_p50_s tpot_p99_s e2e_p50_s requests_per_s output_tokens_per_s
    saturation_requests_per_s n_running mfu_frac mbu_frac is_saturated (1 or 0), all replicas together.
    Deployments of one engine shape (tp, pp, formats) share their cost, so that 100,000 settings are a few arrays.
    """
    shapes = shapes_of(model)
    keys = [
        (d.tp, d.pp, d.weight_dtype, d.kv_dtype, d.enforce_eager, d.max_num_seqs, d.ep, d.engine_version)
        for d in deployments
    ]
    first: dict[tuple[object, ...], Deployment] = {}
    for key, deployment in zip(keys, deployments, strict=True):
        first.setdefault(key, deployment)
    own = [at_release(values, d, gpu) if has_releases else values for d in first.values()]
    costs = [step_cost(shapes, gpu, d, v, d.pp - 1) for d, v in zip(first.values(), own, strict=True)]
    number = dict(zip(first, range(len(first)), strict=True))
    index = np.array([number[key] for key in keys], dtype=np.int64)
    prompt, output = mean_lengths(workload.lengths)
    cache = kv_cache_tokens(model, gpu, deployments, facts, held_tokens=prompt + 0.5 * output)
    settings = [(d.pp, d.dp, d.max_num_seqs, d.max_num_batched_tokens, d.prefix_caching) for d in deployments]
    columns = np.array(settings, dtype=float).T.copy()
    blocks = [slice(i, i + BLOCK) for i in range(0, len(deployments), BLOCK)]
    parts = [_solved(costs, index[block], cache[block], columns[:, block], workload, values, gpu) for block in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Replicas:
    """One replica of each deployment in the steady state: what its steps take with n running sequences."""

    def __init__(
        self, cost: StepCost, cache: Floats, columns: Floats, workload: Workload, values: Mapping[str, float]
    ) -> None:
        self.pp, _, seqs, self.budget, self.has_cache = columns
        self.cost = cost
        self.send_s = values["send_s"]
        prompt, self.output = mean_lengths(workload.lengths)
        self.read_s, self.out_s = server_s(front_of(values), prompt), values["http_out_s"]
        hit = workload.prefix
        shared = min(hit.shared_prefix_tokens, prompt)
        self.cold = shared * (1.0 - values["shared_kv_frac"])
        self.to_compute = np.maximum(
            prompt - self.has_cache * (shared + (prompt - shared) * hit.conversation_hit_frac), 1.0
        )
        self.held = prompt + 0.5 * self.output
        own = np.maximum(self.held - self.has_cache * shared, 1.0)
        self.n_most = np.maximum(np.minimum(seqs, (cache - self.has_cache * shared) / own), 1e-9)

    def mean_step(self, n: Floats) -> tuple[Floats, Floats]:
        """Return the mean step time and the time that one request's prompt adds to its step [s]."""
        cost, to_compute, pp = self.cost, self.to_compute, self.pp
        group = n / pp
        context = group * self.held - np.maximum(group - 1.0, 0.0) * self.has_cache * self.cold
        chunk = np.minimum(to_compute, np.maximum(self.budget - group, 1.0))
        pairs = chunk * (0.5 * (chunk + 1.0) + 0.5 * (to_compute - chunk))
        # row 0: a step of decodes alone; row 1: one that also carries a chunk of a prompt
        prefill, sampled = np.stack([0.0 * chunk, chunk]), np.stack([group, group + 1.0])
        alone_s, with_prompt_s = cost.seconds(prefill, np.stack([0.0 * pairs, pairs]), group, context, sampled)
        alone_host_s, with_prompt_host_s = cost.host_s(prefill, group, sampled)
        decode = larger_of(alone_s, alone_host_s) * pp + (pp > 1) * pp * self.send_s
        ratio = cost.power_ratio(with_prompt_s, chunk + group, pairs, context, sampled[1])
        mixed = np.maximum(with_prompt_s * cost.stretch(ratio), with_prompt_host_s)
        extra = np.maximum(mixed - decode / pp, 0.0) * (to_compute / chunk)
        # each token of a running sequence brings 1/output of a prompt
        made_s = decode + n / self.output * extra
        # an API server that sends fewer tokens than the engine makes sets the pace
        return larger_of(made_s, n * self.out_s), mixed * (to_compute / chunk)


def _solved(
    costs: Sequence[StepCost],
    index: NDArray[np.int64],
    cache: Floats,
    columns: Floats,
    workload: Workload,
    values: Mapping[str, float],
    gpu: Gpu,
) -> dict[str, Floats]:
    """Return the values of `sweep` for some deployments.

    costs, index   : the cost of deployment i is ``costs[index[i]]``
    cache, columns : tokens that the KV cache holds; stages, replicas, sequences, batched tokens, 1 for prefix caching
    """
    pp, dp = columns[:2]
    cost = stacked(costs, index)
    replicas = _Replicas(cost, cache, columns, workload, values)
    client_s = values["submit_s"] + replicas.read_s + values["wake_s"] + values["return_s"]
    prompt, output = mean_lengths(workload.lengths)
    held, to_compute, n_most = replicas.held, replicas.to_compute, replicas.n_most
    load = workload.load
    # past the largest CUDA graph each decode step is launched kernel by kernel, and more sequences may serve less
    # tokens go out before requests are read: a server with too much of both lets requests wait, not tokens
    served = 1.0 / max(server_s(front_of(values), prompt, output), 1e-12)
    n_top, most = n_most, np.minimum(n_most / (output * replicas.mean_step(n_most)[0]), served)
    n_graph = np.minimum(n_most, np.maximum(cost.graph_tokens * pp, 1.0))
    if not isinstance(load, ClosedLoad) and (n_graph < n_most).any():
        most_graph = np.minimum(n_graph / (output * replicas.mean_step(n_graph)[0]), served)
        n_top, most = np.where(most_graph > most, n_graph, n_most), np.maximum(most, most_graph)
    target = np.minimum(load.concurrency / dp, n_most) if isinstance(load, ClosedLoad) else np.zeros(len(dp))
    offered = 0.0 if isinstance(load, ClosedLoad) else load.arrivals_per_s
    # few deployments are solved in fewer rounds: the points of several bisections to come cost as much as one
    n_ahead = next((k for k, size in ((3, 64), (2, 512)) if len(dp) <= size), 1)
    n_points = 2**n_ahead - 1
    many = replicas
    if n_ahead > 1:
        tiled = stacked(costs, np.tile(index, n_points))
        many = _Replicas(tiled, np.tile(cache, n_points), np.tile(columns, n_points), workload, values)
    many_target, many_dp = np.tile(target, n_points), np.tile(dp, n_points)

    def is_over(points: Floats) -> NDArray[np.bool_]:
        """Return which numbers of running sequences are more than the load brings, points x deployments."""
        n = points.ravel()
        step, mixed = many.mean_step(n)
        rate = n / (output * step)
        if isinstance(load, ClosedLoad):
            over = (n + rate * (2.0 * step + mixed + client_s) > many_target) | (rate > served)
        else:
            over = rate > offered / many_dp
        return np.asarray(over).reshape(points.shape)

    n = _bisected(is_over, 1e-6 * n_top, n_top, n_ahead)
    step, mixed = replicas.mean_step(n)
    rate = n / (output * step)
    if isinstance(load, ClosedLoad):
        saturated = np.zeros(len(dp))
        queue = np.maximum(load.concurrency / dp - n_most, 0.0) / rate
        # clients that do not run wait for their first token (Little's law), if only to be read
        ttft = np.maximum(2.0 * step + mixed + client_s, (target - n) / rate) + queue
        ttft_tail = ttft + TAIL * 0.5 * mixed
        requests = rate * dp
    else:
        share = offered / dp / most
        saturated = (share >= 1.0).astype(float)
        wait = 0.5 * np.minimum(share, 0.999) / (1.0 - np.minimum(share, 0.999)) * mixed
        ttft = 1.5 * step + mixed + client_s + 0.7 * wait
        ttft_tail = 1.5 * step + mixed * (1.0 + np.minimum(share, 1.0)) + client_s + TAIL * wait
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


def _bisected(is_over: Callable[[Floats], NDArray[np.bool_]], low: Floats, high: Floats, n_ahead: int) -> Floats:
    """Return the middle of the brackets, in the logarithm, after `N_ITERATIONS` bisections of each element.

    is_over : of points (points x elements, always 2^n_ahead - 1 of them), which lie above the solution
    n_ahead : bisections whose possible points are asked for at once
    """
    n_points = 2**n_ahead - 1
    points = np.empty((n_points + 2, len(low)))
    columns = np.arange(len(low))
    left = N_ITERATIONS
    while left:
        points[0], points[-1] = low, high
        half = 2**n_ahead // 2
        while half:  # first the middle, then the middles of both halves, ...
            points[half :: 2 * half] = np.sqrt(points[: -half : 2 * half] * points[2 * half :: 2 * half])
            half //= 2
        over = is_over(points[1:-1])
        at_low, at_high = np.zeros(len(low), dtype=np.intp), np.full(len(low), n_points + 1)
        for _ in range(min(n_ahead, left)):
            middle = (at_low + at_high) // 2
            above = over[middle - 1, columns]
            at_high, at_low = np.where(above, middle, at_high), np.where(above, at_low, middle)
        low, high = points[at_low, columns], points[at_high, columns]
        left -= min(n_ahead, left)
    return np.asarray(np.sqrt(low * high))
