"""A simulated replay taken apart: where the GPU time, a token's time and the time to the first token go."""

from __future__ import annotations

import math

import numpy as np

from advisor.predict.front import server_s
from advisor.predict.replica import Replica
from advisor.predict.simulate import Simulation
from advisor.predict.step import TERMS
from advisor.predict.traffic import mean_lengths
from advisor.schema import Breakdown, Part, Workload

MIN_TO_JUDGE = 100
"""Requests below which a trend of first tokens is chance."""


_WHY = {
    "linear": "attention projections and MLP: the larger of arithmetic and weight streaming",
    "experts": "routed experts that the batch touches",
    "lm_head": "vocabulary projection",
    "prefill_attention": "prompt tokens against their context",
    "decode_attention": "reading the KV cache",
    "elementwise": "norms, rotary embedding, activation",
    "all_reduce": "tensor parallelism, two a layer",
    "overhead": "kernel gaps and fixed work of a step",
}


def run_breakdowns(sim: Simulation, counted: Simulation, replica: Replica, workload: Workload) -> list[Breakdown]:
    """Return GPU time of the run, decode step, time per output token and to the first, each summing to its whole.

    The latter two are taken from the counted requests, so that their wholes are the means that the answer shows.
    """
    work = sim.total_work
    seconds = sim.term_seconds()
    gpu_s = sum(seconds.values())
    wall = sim.duration_s * len(sim.work) * replica.limits.pp
    parts = [Part(name=name, value=value, why=_WHY[name]) for name, value in seconds.items() if value > 0]
    idle = wall - gpu_s
    parts.append(Part(name="waiting", value=idle, why="no step running: no requests, host or pipeline bubbles"))
    found = [Breakdown(name="GPU time of the run", unit="s", total=sum(p.value for p in parts), parts=tuple(parts))]
    n_decode = max(1.0, (work.sampled - len(sim.ttft_s)) / max(work.n_steps, 1.0))
    context = work.context_tokens / max(work.n_steps, 1.0)
    totals = np.zeros(len(TERMS))
    for stage in replica.stages:
        totals += np.asarray(stage.terms(0.0, 0.0, n_decode, context, n_decode), dtype=float)
    step = [Part(name=n, value=float(v), why=_WHY[n]) for n, v in zip(TERMS, totals, strict=True) if v > 0]
    host = float(replica.stages[0].host_s(0.0, n_decode, n_decode))
    on_gpu = sum(p.value for p in step)
    if host > on_gpu:
        step.append(Part(name="host", value=host - on_gpu, why="the GPU waits for the launch of the step"))
    whole = sum(p.value for p in step)
    found.append(Breakdown(name="decode step", unit="s", total=whole, parts=tuple(step)))
    return [*found, _token_time(counted, whole), _first_token(counted, replica, workload)]


def _token_time(sim: Simulation, decode_s: float) -> Breakdown:
    mean = sim.latency("tpot", "mean")
    if not math.isfinite(mean):
        mean = 0.0
    pure = min(decode_s, mean)
    parts = (
        Part(name="decode step", value=pure, why="a step of the mean batch without prompts"),
        Part(name="prompts of others", value=mean - pure, why="steps that also compute prompts take longer"),
    )
    return Breakdown(name="time per output token", unit="s", total=mean, parts=parts)


def _first_token(sim: Simulation, replica: Replica, workload: Workload) -> Breakdown:
    client = replica.client
    mean = sim.latency("ttft", "mean")
    prompt, _ = mean_lengths(workload.lengths)
    computed = min(prompt, float(replica.limits.max_num_batched_tokens))
    own = 0.0
    for stage in replica.stages:
        pairs = computed * 0.5 * (computed + 1.0)
        gpu = float(stage.seconds(computed, pairs, 0.0, 0.0, 1.0)) * max(1.0, prompt / computed)
        own += max(gpu, float(stage.host_s(computed, 0.0, 1.0)) / len(replica.stages))
    outside = min(client.submit_s + client.return_s + server_s(client.front_s, prompt, 1.0), mean)
    own = min(own, mean - outside)
    parts = (
        Part(name="own prompt", value=own, why="computing this prompt alone"),
        Part(name="waiting", value=mean - outside - own, why="steps already in flight, queue, prompts of others"),
        Part(name="client and engine hand-over", value=outside, why="the API server reads it and sends its token"),
    )
    return Breakdown(name="time to first token", unit="s", total=mean, parts=parts)


def queue_grows(sim: Simulation) -> bool:
    """Return whether first tokens come later and later, so that no steady state exists at this open load.

    The fourth quarter of the requests waits over twice as long as the second, still more than the third (a ramp that
    levels off does not), and ten times as long as the quickest request; and none of them is spared: after a crowd that
    came by chance some are served at once again, in a queue that grows nobody is.
    """
    n = len(sim.ttft_s)
    if n < MIN_TO_JUDGE:
        return False
    in_order = sim.ttft_s[np.argsort(sim.submitted_s, kind="stable")]
    second, third, fourth = (float(in_order[n * k // 4 : n * (k + 1) // 4].mean()) for k in (1, 2, 3))
    least, least_late = float(in_order.min()), float(in_order[n * 3 // 4 :].min())
    return fourth > max(2.0 * second, 1.25 * third, 10.0 * least) and least_late > 3.0 * least


def served_per_s(sim: Simulation) -> float:
    """Return the rate of completions between the third and the eighth tenth of them: without ramp-up and drain."""
    ends = np.sort(sim.submitted_s + sim.e2e_s)
    n = len(ends)
    first, last = ends[3 * n // 10], ends[8 * n // 10]
    if n < MIN_TO_JUDGE or last <= first:
        return sim.requests_per_s
    return float((8 * n // 10 - 3 * n // 10) / (last - first))
