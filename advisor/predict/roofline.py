"""Where prefill and decode lie under a card's roofline: operations per byte against operations a second.

Operations are those that MFU counts: matrices and prompt attention; what decode attention computes on the bytes it
loads is left out. Steps run at full clock: a board at its power limit is slower, which the whole run shows.

Reference: Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Sequence

from advisor.laws.roofline import causal_pairs
from advisor.predict.breakdown import queue_grows
from advisor.predict.engine_state import Work
from advisor.predict.replica import Replica
from advisor.predict.serving import busy_span_s
from advisor.predict.simulate import Simulation
from advisor.predict.spend import activity_of, kind_of
from advisor.predict.step import StepCost
from advisor.predict.traffic import mean_lengths
from advisor.schema import Deployment, Gpu, Workload
from advisor.schema.roofline import OperatingPoint, Roofline
from advisor.units import format_count

SHORTEST_PROMPT_TOKENS = 16


def roofline(
    replica: Replica, simulation: Simulation, gpu: Gpu, deployment: Deployment, workload: Workload
) -> Roofline:
    """Return the ceilings of the card and the operating points of one deployment under one load.

    Prefill: one mean prompt, or as much of it as a step may carry, alone. Decode: the mean batch of the replay at its
    mean context, without prompts. The whole run: everything the replay did, over all its time, waiting included.
    """
    limits, dtype = replica.limits, deployment.weight_dtype
    prompt, _ = mean_lengths(workload.lengths)
    budget = float(limits.max_num_batched_tokens)
    work = simulation.total_work
    n_steps = max(work.n_steps, 1.0)
    batch = max(1.0, (work.sampled - len(simulation.ttft_s)) / n_steps)
    context = work.context_tokens / n_steps / batch

    def step(name: str, what: str, one: Work, n_prefill: float, n_decode: float) -> OperatingPoint:
        gpu_s = host_s = 0.0
        for stage in replica.stages:
            gpu_s += float(stage.seconds(n_prefill, one.pairs, n_decode, one.context_tokens, one.sampled))
            host_s += float(stage.host_s(n_prefill, n_decode, one.sampled))
        seconds = max(gpu_s, host_s) / len(replica.stages)
        return _point(name, what, replica.stages, one, seconds, dtype, is_host_bound=host_s > gpu_s)

    def prefill(n_tokens: float) -> OperatingPoint:
        one = Work(n_steps=1.0, tokens=n_tokens, pairs=causal_pairs(n_tokens, 0.0), sampled=1.0)
        return step("prefill", f"a prompt of {format_count(n_tokens)} tokens alone", one, n_tokens, 0.0)

    def decode(n_seqs: float) -> OperatingPoint:
        one = Work(n_steps=1.0, tokens=n_seqs, context_tokens=context * n_seqs, sampled=n_seqs)
        what = f"{format_count(n_seqs)} sequences of {format_count(context)} tokens each"
        whole, sizes = int(n_seqs), limits.graph_sizes
        padded = float(sizes[whole]) if n_seqs == whole and whole < len(sizes) else n_seqs
        return step("decode", what, one, 0.0, padded)

    everything = _point(
        "whole run",
        "all steps of the replay, waiting included",
        replica.stages,
        work,
        busy_span_s(simulation, workload, queue_grows(simulation)),
        dtype,
        n_replicas=len(simulation.work),
    )
    cached = limits.cache_tokens
    most = max(1.0, min(float(deployment.max_num_seqs), cached / max(context, 1.0)))
    peaks, first = gpu.peak_flops_per_s, replica.stages[0]
    peak = peaks.get("bf16") or peaks["fp16"]
    if kind_of(dtype) == "fp8":
        peak = peaks.get("fp8") or peaks.get("int8") or peak
    return Roofline(
        gpu=gpu.name,
        peak_flops_per_s=peak,
        memory_bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s,
        reached_flops_per_s=float(first.gemm_flops_per_s),
        reached_bytes_per_s=float(first.stream_bytes_per_s),
        points=(prefill(min(prompt, budget)), decode(batch), everything),
        prefill=tuple(prefill(n) for n in _doublings(SHORTEST_PROMPT_TOKENS, budget)),
        decode=tuple(decode(n) for n in _doublings(1, float(int(most)))),
    )


def _doublings(first: int, last: float) -> list[float]:
    """Return `first` and its doublings below `last`, then `last`."""
    found, n = [], float(first)
    while n < last:
        found.append(n)
        n *= 2
    return [*found, max(float(first), last)]


def _point(
    name: str,
    what: str,
    stages: Sequence[StepCost],
    work: Work,
    seconds: float,
    weight_dtype: str,
    *,
    is_host_bound: bool = False,
    n_replicas: int = 1,
) -> OperatingPoint:
    done = activity_of(stages, work, seconds, weight_dtype, n_replicas=n_replicas)
    rate = float(sum(done.flops_per_s.values()))
    return OperatingPoint(
        name=name,
        what=what,
        n_tokens=work.tokens,
        seconds=seconds,
        flops_per_byte=rate / float(done.bytes_per_s),
        flops_per_s=rate,
        is_host_bound=is_host_bound,
    )
