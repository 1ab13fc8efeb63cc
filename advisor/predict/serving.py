"""Prediction of one vLLM deployment under one workload: every quantity with an interval, every number taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from advisor.predict.breakdown import queue_grows, run_breakdowns, served_per_s
from advisor.predict.draw_error import draw_errors
from advisor.predict.footprint import Footprint
from advisor.predict.front import front_of, server_s, server_text
from advisor.predict.host_pace import host_gains, host_text
from advisor.predict.release import at_release, release_rel, release_text
from advisor.predict.replica import Replica, replica_of
from advisor.predict.simulate import STATISTICS, Simulation, simulate
from advisor.predict.spend import activity_of, board_power
from advisor.predict.steady import sweep
from advisor.predict.traffic import draw, mean_lengths
from advisor.predict.transfer import joined_rel, transfer_rel, transferred
from advisor.predict.widths import Widths, bounded, scaled, widened
from advisor.schema import (
    ClosedLoad,
    Cluster,
    CoefficientSet,
    Deployment,
    EngineFacts,
    Interval,
    Model,
    Note,
    Prediction,
    Slo,
    TraceLoad,
    Workload,
)

MIN_REQUESTS = 200
MAX_REQUESTS = 1200
MIN_SPAN_S = 60.0
SPAN_E2ES = 8.0
WARM_E2ES = 2.0
CLOSED_ROUNDS = 5
"""An open loop is replayed for a minute or 8 request times, at least 200 requests, of which the first 2 request times
are warm-up; a closed loop for 5 rounds, all counted, as its clients start together in reality too."""

MAX_E2E_S = 600.0
"""Longest request time that the length of a replay follows."""


@dataclass(frozen=True)
class Run:
    """A simulated replay with what it was made from."""

    replica: Replica
    simulation: Simulation
    workload: Workload
    values: Mapping[str, float]


def sized(workload: Workload, e2e_s: float) -> Workload:
    """Return the workload with as many requests as it takes to reach a steady state when one takes `e2e_s`."""
    load = workload.load
    if isinstance(load, TraceLoad):
        return workload
    if isinstance(load, ClosedLoad):
        if load.n_requests is not None:
            return workload
        n = int(min(max(CLOSED_ROUNDS * load.concurrency, MIN_REQUESTS), max(4000, 2 * load.concurrency)))
        return workload.model_copy(update={"load": load.model_copy(update={"n_requests": n})})
    if load.n_requests is not None or load.duration_s is not None:
        return workload
    span_s = max(MIN_SPAN_S, SPAN_E2ES * e2e_s)
    n = int(min(max(span_s * load.arrivals_per_s, MIN_REQUESTS), MAX_REQUESTS))
    return workload.model_copy(update={"load": load.model_copy(update={"n_requests": n})})


def replay(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    *,
    seed: int = 0,
    facts: EngineFacts | None = None,
    n_samples: int = 0,
    progress: Callable[[float], None] | None = None,
    e2e_s: float = 0.0,
) -> Run:
    """Return a simulated replay of `workload` on `deployment`. Raises DomainError when the plan does not fit."""
    values = at_release(transferred(coefficients, cluster.gpu), deployment, cluster.gpu)
    replica = replica_of(model, cluster.gpu, deployment, values, facts, workload.prefix)
    workload = sized(workload, e2e_s)
    simulation = replay_replica(replica, deployment, workload, seed, n_samples=n_samples, progress=progress)
    return Run(replica, simulation, workload, values)


def replay_replica(
    replica: Replica,
    deployment: Deployment,
    workload: Workload,
    seed: int,
    *,
    n_samples: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Return what `deployment`, of such replicas, does with the requests that `seed` draws from a workload."""
    traffic = draw(
        workload,
        seed,
        prefix_caching=deployment.prefix_caching,
        block_tokens=deployment.kv_block_tokens,
        is_even=True,
    )
    return simulate(
        list(replica.stages),
        replica.limits,
        traffic,
        replica.client,
        dp=deployment.dp,
        send_s=replica.send_s,
        n_samples=n_samples,
        progress=progress,
    )


@dataclass(frozen=True)
class Forecast:
    """A prediction without targets, and of a simulated one the counted requests, their rate, and widths."""

    prediction: Prediction
    counted: Simulation | None = None
    requests_per_s: float = 0.0
    widths: Widths | None = None

    def against(self, slo: Slo | None) -> Prediction:
        """Return the prediction with the share of requests that meet all targets, and the rate of those."""
        if slo is None or not slo.targets or self.counted is None or self.widths is None:
            return self.prediction
        met, interval = float(self.counted.attainment(slo).mean()), self.widths.interval
        quantities: dict[str, Interval] = {}
        for name, quantity in self.prediction.quantities.items():
            quantities[name] = quantity
            if name == "total_tokens_per_s":
                quantities["slo_attainment_frac"] = bounded(interval(met, "requests_per_s"), 1.0)
                quantities["goodput_requests_per_s"] = interval(self.requests_per_s * met, "requests_per_s")
        return self.prediction.model_copy(update={"quantities": quantities})


def forecast_vllm(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    *,
    method: str = "simulated",
    seed: int = 0,
    facts: EngineFacts | None = None,
    power: CoefficientSet | None = None,
    progress: Callable[[float], None] | None = None,
    steady: Mapping[str, float] | None = None,
) -> Forecast:
    """Return what `deployment` will do under `workload`, whatever the targets.

    method : 'simulated' replays the scheduler; 'steady' is the closed form
    steady : the closed form of just this, from a caller that has it: a row of `sweep`
    power  : coefficients of data/fitted/power.json; without them no watts are predicted
    Raises DomainError when the plan does not fit, with the reason.
    """
    if steady is None:
        rows = sweep(model, cluster.gpu, [deployment], workload, coefficients, facts)
        steady = {name: float(column[0]) for name, column in rows.items()}
    if method == "steady":
        return Forecast(_steady(model, cluster, deployment, workload, coefficients, facts, steady))
    e2e_s = min(steady["e2e_p50_s"], MAX_E2E_S) if math.isfinite(steady["e2e_p50_s"]) else 0.0
    run = replay(
        model, cluster, deployment, workload, coefficients, seed=seed, facts=facts, progress=progress, e2e_s=e2e_s
    )
    rel = joined_rel(transfer_rel(coefficients, cluster.gpu), release_rel(deployment, cluster.gpu))
    values = transferred(coefficients, cluster.gpu)
    gains = host_gains(model, cluster.gpu, deployment, run.workload, values, facts)
    q = Widths(coefficients.error_q90, rel, deployment.enforce_eager, gains)
    whole, memory = run.simulation, run.replica.memory
    is_saturated = steady["is_saturated"] > 0
    most = steady["saturation_requests_per_s"]
    if not isinstance(workload.load, ClosedLoad) and (is_saturated or queue_grows(whole)):
        # pipelines with uneven batches idle more than the closed form knows
        offered = workload.load.arrivals_per_s if not is_saturated else math.inf
        is_saturated, most = True, min(most, served_per_s(whole), offered)
    sim, rate = counted(whole, run.workload, e2e_s, is_saturated)
    found: dict[str, Interval] = {}
    drawn = draw_errors(sim, workload)
    for metric in ("ttft", "tpot", "e2e", "itl"):
        for statistic, value in zip(STATISTICS, sim.latencies(metric, STATISTICS), strict=True):
            if math.isfinite(value):
                name = f"{metric}_{statistic}"
                found[f"{name}_s"] = q.interval(value, name, drawn.get(name, 0.0))
    lengths = float(sim.prompt_tokens.mean()), float(sim.output_tokens.mean())
    busy = rate / deployment.dp * server_s(front_of(values), *lengths)
    found["requests_per_s"] = q.interval(rate, "requests_per_s")
    found["output_tokens_per_s"] = q.interval(rate * float(sim.output_tokens.mean()), "requests_per_s")
    total = rate * float(sim.output_tokens.mean() + sim.prompt_tokens.mean())
    found["total_tokens_per_s"] = q.interval(total, "requests_per_s")
    found["saturation_requests_per_s"] = q.interval(most, "requests_per_s")
    work = whole.total_work
    occupancy = work.context_tokens / max(work.n_steps, 1.0) / max(memory.kv_cache_tokens, 1)
    found["kv_occupancy_frac"] = bounded(q.interval(occupancy, "requests_per_s"), 1.0)
    found["n_preemptions"] = Interval(value=float(work.n_preemptions), low=0.0, high=float(work.n_preemptions) * 2 + 1)
    breakdowns = [memory.breakdown()]
    breakdowns += run_breakdowns(whole, sim, run.replica, run.workload)
    found |= _memory(memory, q)
    span_s = busy_span_s(whole, run.workload, is_saturated)
    if power is not None:
        stages, formats = run.replica.stages, deployment.weight_dtype
        activity = activity_of(stages, work, span_s, formats, n_replicas=deployment.dp)
        watts, parts = board_power(activity, cluster.gpu, power, deployment.n_gpus)
        watts = widened(
            watts, rel, cluster.gpu.idle_power_w * deployment.n_gpus, cluster.gpu.board_power_w * deployment.n_gpus
        )
        found["board_power_w"] = watts
        breakdowns.append(parts)
        tokens_per_s = found["output_tokens_per_s"].value
        found["energy_j_per_output_token"] = scaled(watts, 1.0 / tokens_per_s)
        found["energy_j_per_request"] = scaled(watts, 1.0 / rate)
    found |= _activity(run, span_s, cluster, deployment, q)
    prediction = Prediction(
        quantities=found,
        breakdowns=tuple(breakdowns),
        is_saturated=is_saturated,
        method="simulated",
        notes=tuple(_notes(cluster, deployment, coefficients, is_saturated, gains, busy)),
    )
    return Forecast(prediction, sim, rate, q)


def predict_vllm(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    *,
    method: str = "simulated",
    slo: Slo | None = None,
    seed: int = 0,
    facts: EngineFacts | None = None,
    power: CoefficientSet | None = None,
    progress: Callable[[float], None] | None = None,
) -> Prediction:
    """Return what `deployment` will do under `workload` and how much of it meets `slo`; the rest as `forecast_vllm`."""
    forecast = forecast_vllm(
        model,
        cluster,
        deployment,
        workload,
        coefficients,
        method=method,
        seed=seed,
        facts=facts,
        power=power,
        progress=progress,
    )
    return forecast.against(slo)


def counted(sim: Simulation, workload: Workload, e2e_s: float, is_saturated: bool) -> tuple[Simulation, float]:
    """Return the requests that count, and the rate at which they are served [requests/s].

    An open loop that is not saturated serves what arrives; its replay ends with a drain that no steady state has. A
    recorded trace is its own whole: every request counts, from the first arrival to the last answer.
    """
    if isinstance(workload.load, ClosedLoad | TraceLoad):
        return sim, sim.requests_per_s
    span_s = float(sim.submitted_s.max() - sim.submitted_s.min())
    rest = sim.since(float(sim.submitted_s.min()) + min(WARM_E2ES * e2e_s, 0.4 * span_s))
    if is_saturated or span_s <= 0:
        return rest, min(served_per_s(sim), (len(sim.submitted_s) - 1) / max(span_s, 1e-9))
    return rest, (len(sim.submitted_s) - 1) / span_s


def busy_span_s(sim: Simulation, workload: Workload, is_saturated: bool) -> float:
    """Return the time over which the replay's work is spread [s]: that in which its requests arrive, in the long run.

    The drain after the last arrival of an open loop that is not saturated is part of no steady state.
    """
    n = len(sim.submitted_s)
    if isinstance(workload.load, ClosedLoad | TraceLoad) or is_saturated or n < 2:
        return sim.duration_s
    return float(sim.submitted_s.max() - sim.submitted_s.min()) * n / (n - 1)


def _memory(memory: Footprint, q: Widths) -> dict[str, Interval]:
    width = max(q.error_q90.get("kv_blocks", 0.02), 0.002)
    used, tokens = memory.used_bytes, float(memory.kv_cache_tokens)
    return {
        "memory_bytes_per_gpu": Interval(
            value=used, low=used * (1 - width), high=min(used * (1 + width), memory.device_bytes)
        ),
        "kv_cache_tokens": Interval(value=tokens, low=tokens * math.exp(-width), high=tokens * math.exp(width)),
    }


def _activity(run: Run, span_s: float, cluster: Cluster, deployment: Deployment, q: Widths) -> dict[str, Interval]:
    work = run.simulation.total_work
    share = 1.0 / (deployment.pp * deployment.dp * span_s)
    flops = moved = 0.0
    for stage in run.replica.stages:
        pairs, context = stage.seen(work.tokens, work.pairs, work.sampled, work.context_tokens)
        matrix, attention = stage.flops(work.tokens, pairs, work.sampled)
        flops += float(matrix + attention) * share
        moved += (
            float(work.n_steps * (stage.weight_bytes + stage.head_bytes) + context * stage.kv_bytes_per_context_token)
            * share
        )
        moved += float(stage.expert_reads(work.n_steps, work.tokens, work.expert_reads) * stage.expert_bytes) * share
    peaks = cluster.gpu.peak_flops_per_s
    peak = peaks.get("bf16") or peaks["fp16"]
    if deployment.weight_dtype in ("fp8", "int8"):
        peak = peaks.get("fp8") or peaks.get("int8") or peak
    mbu = moved / cluster.gpu.memory_bandwidth_bytes_per_s
    return {
        "mfu_frac": bounded(q.interval(flops / peak, "requests_per_s"), 1.0),
        "mbu_frac": bounded(q.interval(mbu, "requests_per_s"), 1.0),
    }


def _notes(
    cluster: Cluster,
    deployment: Deployment,
    coefficients: CoefficientSet,
    is_saturated: bool,
    gains: Mapping[str, float],
    busy: float,
) -> list[Note]:
    notes = []
    rel = transfer_rel(coefficients, cluster.gpu)
    if is_saturated:
        notes.append(
            Note(level="warning", text="the offered load exceeds what this plan can serve: queues grow without end")
        )
    if text := host_text(gains):
        notes.append(Note(text=text))
    if text := server_text(busy):
        notes.append(Note(level="warning", text=text))
    if rel > 0:
        notes.append(
            Note(
                text=f"no engine run on {cluster.gpu.name} is in the fit: efficiencies are carried over from "
                f"{coefficients.gpu} by datasheet and kernel figures (+-{100 * rel:.0f} % more)"
            )
        )
    if deployment.engine_version not in coefficients.engine_versions:
        known = ", ".join(coefficients.engine_versions)
        text = release_text(deployment, cluster.gpu, known)
        text = (
            text or f"vLLM {deployment.engine_version} was not measured: the coefficients of {known} are taken to hold"
        )
        notes.append(Note(level="warning", text=text))
    if cluster.n_nodes > 1 and deployment.tp * deployment.pp > cluster.gpus_per_node:
        notes.append(Note(level="warning", text="a replica spans nodes: its network has not been measured"))
    return notes


def _steady(
    model: Model,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    coefficients: CoefficientSet,
    facts: EngineFacts | None,
    steady: Mapping[str, float],
) -> Prediction:
    rel = joined_rel(transfer_rel(coefficients, cluster.gpu), release_rel(deployment, cluster.gpu))
    values = transferred(coefficients, cluster.gpu)
    gains = host_gains(model, cluster.gpu, deployment, workload, values, facts)
    wide = {k: 2.0 * v for k, v in coefficients.error_q90.items()}
    q = Widths(wide, rel, deployment.enforce_eager, gains)
    memory = replica_of(model, cluster.gpu, deployment, values, facts, workload.prefix).memory
    found = _memory(memory, q)
    for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s"):
        if math.isfinite(steady[name]):
            found[name] = q.interval(steady[name], name.removesuffix("_s"))
    for name in ("requests_per_s", "output_tokens_per_s", "saturation_requests_per_s"):
        found[name] = q.interval(steady[name], "requests_per_s")
    is_saturated = steady["is_saturated"] > 0
    busy = steady["requests_per_s"] / deployment.dp * server_s(front_of(values), *mean_lengths(workload.lengths))
    return Prediction(
        quantities=found,
        breakdowns=(memory.breakdown(),),
        is_saturated=is_saturated,
        method="steady",
        notes=tuple(_notes(cluster, deployment, coefficients, is_saturated, gains, busy)),
    )
