"""Latency, throughput and memory of serving with DeepSpeed: ZeRO-Inference, AutoTP, kernel injection, FastGen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from advisor.errors import DomainError
from advisor.predict.batching import (
    Served,
    sample_arrivals,
    sample_size,
    serve_static,
)
from advisor.predict.deepspeed_paths import (
    DEEPSPEED_BACKENDS,
    ENGINE_VERSION,
    FASTGEN_MAX_SEQS,
    SPLITFUSE_TOKENS,
    STATIC_BATCHES,
    feasible_with,
    host_bytes_per_gpu,
    memory_breakdown,
    path_of,
    peak_lengths,
)
from advisor.predict.deepspeed_step import TRANSFER_WIDENING, Rates, StepLaw, kv_bytes_per_token, rates_of
from advisor.predict.quantile import quantile
from advisor.predict.shapes import shapes_of
from advisor.predict.splitfuse import serve_splitfuse
from advisor.predict.traffic import draw_lengths
from advisor.schema import (
    Backend,
    Breakdown,
    ClosedLoad,
    Cluster,
    CoefficientSet,
    Deployment,
    Interval,
    Model,
    Note,
    Part,
    Prediction,
    TraceLoad,
    Workload,
)

STATISTICS = {"mean": None, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
SEED = 0
LONGEST_REPLAY_STEPS = 40_000
"""Engine steps of one replay; very long prompts shorten the sample instead."""
DEEP_QUEUE = 0.25
"""Share of the sample above which waiting clients fill it: then rates come from the drained queue."""
POWER_PREFIX = {
    "deepspeed-zero-inference": "zero",
    "deepspeed-autotp": "eager",
    "deepspeed-kernel-injection": "inject",
    "deepspeed-fastgen": "fastgen",
}
OFFLOADS: tuple[Literal["none", "cpu", "nvme"], ...] = ("none", "cpu", "nvme")


def feasible_deepspeed(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
) -> tuple[str, str] | None:
    """Return (reason, nearest number that would fit) when a deployment cannot run, None when it can."""
    rates = rates_of(coefficients, deployment.gpu)[0]
    return feasible_with(model, cluster, deployment, rates, peak_lengths(workload, deployment.max_model_len))


def deepspeed_deployments(
    model: Model,
    cluster: Cluster,
    *,
    max_model_len: int | None = None,
    backends: tuple[Backend, ...] = DEEPSPEED_BACKENDS,
    batches: tuple[int, ...] = STATIC_BATCHES,
    has_int4: bool = False,
) -> list[Deployment]:
    """Return every way to run `model` with DeepSpeed on all GPUs of `cluster`; `feasible_deepspeed` filters them.

    has_int4 : also ZeRO-Inference with 4-bit weights, which is experimental

    Tensor parallel degrees divide the KV heads and stay in a node; the other GPUs run replicas. ZeRO-Inference
    uses all GPUs as ranks of one job.
    """
    length = max_model_len or min(model.max_context_tokens, 4096)
    has_bf16 = "bf16" in cluster.gpu.peak_flops_per_s
    dtype: Literal["bf16", "fp16"] = "fp16" if model.native_dtype == "fp16" or not has_bf16 else "bf16"
    degrees = [
        t
        for t in range(1, min(cluster.gpus_per_node, model.n_kv_heads) + 1)
        if model.n_kv_heads % t == 0 and cluster.gpus_per_node % t == 0
    ]

    def one(
        backend: Backend, tp: int, dp: int, batch: int, offload: Literal["none", "cpu", "nvme"] = "none"
    ) -> Deployment:
        is_injected = backend == "deepspeed-kernel-injection"
        return Deployment(
            backend=backend,
            engine_version=ENGINE_VERSION,
            model=model.name,
            gpu=cluster.gpu.name,
            tp=tp,
            dp=dp,
            weight_dtype="fp16" if is_injected else dtype,
            kv_dtype="fp16" if is_injected else dtype,
            max_model_len=length,
            max_num_batched_tokens=SPLITFUSE_TOKENS if backend == "deepspeed-fastgen" else max(length * batch, 1),
            max_num_seqs=FASTGEN_MAX_SEQS if backend == "deepspeed-fastgen" else batch,
            static_batch=0 if backend == "deepspeed-fastgen" else batch,
            offload=offload,
            kv_block_tokens=64,
            enforce_eager=True,
        )

    found: list[Deployment] = []
    for backend in backends:
        if not path_of(backend).can_split:
            for offload in OFFLOADS:
                if offload == "none" and cluster.n_gpus == 1:
                    continue
                some = [one(backend, 1, cluster.n_gpus, b, offload) for b in batches]
                found += some
                found += [d.model_copy(update={"weight_dtype": "int4"}) for d in some if has_int4]
            continue
        for tp in degrees:
            replicas = cluster.n_gpus // tp
            sizes = (0,) if backend == "deepspeed-fastgen" else batches
            found += [one(backend, tp, replicas, max(b, 0)) for b in sizes]
    return found


def _replay(
    model: Model, cluster: Cluster, d: Deployment, workload: Workload, rates: Rates, is_transferred: bool
) -> Served:
    """Serve a seeded sample of one replica's share of the workload."""
    load = workload.load
    clients = max(1, -(-load.concurrency // d.dp)) if isinstance(load, ClosedLoad) else 0
    n = sample_size(workload, max(d.static_batch, 16))
    if isinstance(load, ClosedLoad):
        n = max(60, min(n, 6 * clients + 40))
    rng = np.random.default_rng(SEED)
    if d.backend == "deepspeed-fastgen":
        some, _ = draw_lengths(workload.lengths, 100, np.random.default_rng(SEED))
        n = max(10, min(n, int(LONGEST_REPLAY_STEPS / (float(np.mean(some)) / SPLITFUSE_TOKENS + 4))))
    prompts, outputs = draw_lengths(workload.lengths, n, rng)
    arrivals = None if isinstance(load, ClosedLoad) else sample_arrivals(workload, n, 1 / d.dp, rng)
    shapes = shapes_of(model)
    law = StepLaw(shapes, cluster, d, rates, is_transferred, float(np.mean(prompts)))
    if d.backend == "deepspeed-fastgen":
        breakdown = memory_breakdown(shapes, cluster, d, rates, (1, 1))
        pool = next(p.value for p in breakdown.parts if p.name == "kv_cache")
        return serve_splitfuse(
            prompts,
            outputs,
            arrivals=arrivals,
            clients=clients,
            budget_tokens=SPLITFUSE_TOKENS,
            max_seqs=d.max_num_seqs,
            kv_tokens=pool / kv_bytes_per_token(shapes, d.tp),
            step_s=law.mixed_s,
        )
    return serve_static(
        prompts,
        outputs,
        arrivals=arrivals,
        clients=clients,
        batch=max(1, d.static_batch),
        prefill_s=law.prefill_s,
        decode_s=law.decode_s,
    )


def _statistics(served: Served) -> Iterator[tuple[str, float]]:
    metrics = {"ttft": served.ttft_s, "tpot": served.tpot_s, "itl": served.tpot_s, "e2e": served.e2e_s}
    for metric, sample in metrics.items():
        ordered = np.sort(sample)
        for statistic, share in STATISTICS.items():
            value = float(np.mean(sample)) if share is None else quantile(ordered, share)
            yield f"{metric}_{statistic}_s", value


def _is_saturated(served: Served, workload: Workload, share: float) -> bool:
    """Return whether the queue grew through the sample: the last tenth waits much longer than the first fifth."""
    if isinstance(workload.load, ClosedLoad):
        return False
    n = len(served.ttft_s)
    early, late = float(np.mean(served.ttft_s[: n // 5])), float(np.mean(served.ttft_s[-(n // 10) :]))
    span = n / (workload.load.arrivals_per_s * share)
    return late > 2 * early and late - early > 0.02 * span


def _values(served: Served, workload: Workload, dp: int) -> tuple[dict[str, float], bool]:
    """Return every latency statistic and rate of all replicas, and whether the load exceeds what they serve."""
    values = dict(_statistics(served))
    load = workload.load
    saturated = _is_saturated(served, workload, 1 / dp)
    outputs_each = served.n_output_tokens / max(1, served.n_requests)
    prompts_each = served.n_prompt_tokens / max(1, served.n_requests)
    if isinstance(load, ClosedLoad):
        clients = -(-load.concurrency // dp)
        if clients <= DEEP_QUEUE * served.n_requests:
            rate = min(load.concurrency, clients * dp) / values["e2e_mean_s"]
        else:
            # more clients than the sample holds: the drained sample gives the capacity, Little's law the wait
            rate = served.n_requests / served.duration_s * dp
            wait = max(0.0, load.concurrency / rate - values["e2e_mean_s"])
            values |= {k: v + wait for k, v in values.items() if k.startswith(("ttft_", "e2e_"))}
    elif saturated:
        rate = served.n_requests / served.duration_s * dp
    else:
        rate = load.arrivals_per_s
    values |= {
        "requests_per_s": rate,
        "output_tokens_per_s": rate * outputs_each,
        "total_tokens_per_s": rate * (outputs_each + prompts_each),
        "n_running_mean": served.mean_batch * dp,
        "busy_frac": served.busy_frac,
    }
    return values, saturated


def _step_breakdown(law: StepLaw, workload: Workload, batch: float) -> Breakdown:
    """Return one decode pass taken apart; what hides behind the longest activity is not counted again."""
    rng = np.random.default_rng(SEED)
    prompts, outputs = draw_lengths(workload.lengths, 200, rng)
    context = float(np.mean(prompts) + np.mean(outputs) / 2)
    step = law.parts(0, batch, batch * context, 0)
    exposed: list[Part] = []
    if law.deployment.backend == "deepspeed-fastgen":
        kernels = step.total_s - step.link_s - step.host_s
        exposed = [
            Part(
                name="host_launch", value=step.host_s, why="gaps between kernels and per-sequence work, no CUDA graphs"
            ),
            Part(name="kernels", value=kernels, why="weights, attention and matrix work"),
        ]
    else:
        visible = step.total_s - step.link_s
        names = {
            "host_launch": (step.host_s, "the host launches the layers"),
            "weight_stream": (step.stream_s, "weights come from host, drives or the other GPUs"),
            "kernels": (max(step.compute_s, step.memory_s), "matrix work and memory traffic"),
        }
        total = sum(v for v, _ in names.values())
        longest = max(names, key=lambda k: names[k][0])
        for name, (value, why) in names.items():
            hidden = name != longest
            share = (visible - names[longest][0]) * value / max(total - names[longest][0], 1e-12) if hidden else value
            exposed.append(Part(name=name, value=share, why=why + (" (what is not hidden)" if hidden else "")))
    exposed.append(
        Part(name="all_reduce", value=step.link_s, why="two all-reduces a layer" if law.deployment.tp > 1 else "none")
    )
    total_s = sum(p.value for p in exposed)
    return Breakdown(name="decode_step_s", unit="s", total=total_s, parts=tuple(exposed))


def _power(cluster: Cluster, d: Deployment, coefficients: CoefficientSet, busy_frac: float) -> Interval:
    """Return board power of all GPUs: idle plus a measured share of the rest while busy (FastGen: a bound)."""
    share = coefficients.coefficients[f"{POWER_PREFIX[d.backend]}_power_frac"]
    gpu, n = cluster.gpu, d.n_gpus
    span = gpu.board_power_w - gpu.idle_power_w
    widening = 1.0 if gpu.name == coefficients.gpu else TRANSFER_WIDENING

    def board(frac: float) -> float:
        return n * (gpu.idle_power_w + min(1.0, frac) * span * busy_frac)

    return Interval(value=board(share.value), low=board(share.low / widening), high=board(share.high * widening))


def _notes(
    model: Model, d: Deployment, workload: Workload, is_transferred: bool, coefficients: CoefficientSet
) -> list[Note]:
    notes = list(path_of(d.backend).notes)
    if d.backend == "deepspeed-fastgen":
        notes.append(Note(text="percentiles: a replayed sample of 768-token SplitFuse steps"))
    else:
        notes.append(
            Note(
                text="percentiles of a static batch: TTFT is the wait for the running batch plus one padded prompt"
                " pass; all requests of a batch return together when its longest answer ends"
            )
        )
    if is_transferred:
        notes.append(
            Note(
                level="warning",
                text=f"fitted on {coefficients.gpu}; {d.gpu} is scaled by datasheet, intervals are widened",
            )
        )
    if workload.prefix.shared_prefix_tokens or workload.prefix.conversation_hit_frac:
        notes.append(Note(text="DeepSpeed has no prefix cache: shared prefixes are computed again"))
    if isinstance(workload.load, TraceLoad) and d.dp > 1:
        notes.append(Note(text=f"each of {d.dp} replicas replays every {d.dp}th request of the trace"))
    if d.weight_dtype == "int4":
        notes.append(
            Note(
                level="warning",
                text="4-bit weights: DeepSpeed 0.19.8 marks weight_quantization as experimental and wants fp16; it"
                " collects garbage after every layer that it packs, which takes minutes unless gc.freeze() is called",
            )
        )
    if d.kv_offload == "cpu":
        notes.append(
            Note(
                level="warning",
                text="cache in host memory by transformers' offloaded cache: it moves whole in every pass, its pinned"
                " tensors are rounded up to a power of two; measured on one H100 host",
            )
        )
    if model.moe is not None and d.backend == "deepspeed-autotp":
        notes.append(
            Note(level="warning", text="experts run one after the other in transformers: slower than predicted here")
        )
    return notes


def predict_deepspeed(
    model: Model, cluster: Cluster, deployment: Deployment, workload: Workload, coefficients: CoefficientSet
) -> Prediction:
    """Return what a DeepSpeed deployment would do under a workload, each number with a 90 % interval.

    Three replays of the same seeded sample, with the coefficients central, all at their fast end and all at their
    slow end, give value and interval; the law's own error on held-out rows is added. Raises DomainError when the
    deployment cannot run: ask `feasible_deepspeed` first.
    """
    rates, fast, slow = rates_of(coefficients, deployment.gpu)
    peak = peak_lengths(workload, deployment.max_model_len)
    fault = feasible_with(model, cluster, deployment, rates, peak)
    if fault:
        raise DomainError(f"{fault[0]}; nearest that fits: {fault[1]}")
    is_transferred = deployment.gpu != coefficients.gpu
    runs = [
        _values(_replay(model, cluster, deployment, workload, r, is_transferred), workload, deployment.dp)
        for r in (rates, fast, slow)
    ]
    error = rates["model_error_frac"]
    busy = runs[0][0].pop("busy_frac")
    quantities: dict[str, Interval] = {}
    is_offered = not isinstance(workload.load, ClosedLoad)
    for name, value in runs[0][0].items():
        ends = [run[0][name] for run in runs]
        exact = is_offered and name.endswith("_per_s") and not any(run[1] for run in runs)
        margin = 0.0 if exact else error
        quantities[name] = Interval(value=value, low=min(ends) / (1 + margin), high=max(ends) * (1 + margin))
    shapes = shapes_of(model)
    memory = memory_breakdown(shapes, cluster, deployment, rates, peak)
    ends = [memory_breakdown(shapes, cluster, deployment, r, peak).total for r in (fast, slow)]
    quantities["memory_bytes_per_gpu"] = Interval(
        value=memory.total, low=min(memory.total, *ends), high=max(memory.total, *ends)
    )
    cache = next(p.value for p in memory.parts if p.name == "kv_cache")
    if deployment.kv_offload == "cpu":
        cache = max(1, deployment.static_batch) * sum(peak) * kv_bytes_per_token(shapes, deployment.tp)
    tokens = cache / kv_bytes_per_token(shapes, deployment.tp)
    quantities["kv_cache_tokens"] = Interval(value=tokens, low=tokens * 0.97, high=tokens * 1.03)
    host = host_bytes_per_gpu(shapes, cluster, deployment, rates, peak)
    quantities["host_memory_bytes_per_gpu"] = Interval(value=host, low=host * 0.9, high=host * 1.1)
    quantities["board_power_w"] = _power(cluster, deployment, coefficients, busy)
    law = StepLaw(shapes, cluster, deployment, rates, is_transferred)
    batch = max(1.0, quantities["n_running_mean"].value / deployment.dp)
    return Prediction(
        quantities=quantities,
        breakdowns=(memory, _step_breakdown(law, workload, batch)),
        is_saturated=runs[0][1],
        method="replayed",
        notes=tuple(_notes(model, deployment, workload, is_transferred, coefficients)),
    )
