"""Step time, throughput and traffic of DeepSpeed training: ZeRO, offload, checkpointing, LoRA, 3D parallelism."""

from __future__ import annotations

import math

from advisor.errors import DomainError
from advisor.laws.bubble import pipeline_s
from advisor.laws.offload import nvme_bytes_per_s_per_gpu, overlapped_s
from advisor.laws.schedule import Pass, one_forward_one_backward
from advisor.laws.training import (
    forward_flops,
    layer_activation_bytes,
    mfu_frac,
    stage_send_bytes,
    step_flops,
    tensor_parallel_bytes,
)
from advisor.laws.zero import Traffic, ZeroState, sent_bytes
from advisor.predict.deepspeed_step import Rates, half_peak_flops_per_s, rates_of
from advisor.predict.train_memory import Sizes, check_job, memory_of, outside_bytes, phase_peaks, sizes_of, state_of
from advisor.predict.train_notes import notes_of
from advisor.predict.train_power import board_power_w
from advisor.schema import Breakdown, Cluster, CoefficientSet, Interval, Model, Part
from advisor.schema.training import TrainJob, TrainPrediction
from advisor.units import format_bytes

LOGIT_PASSES_BYTES = 10.0
"""Bytes a token and vocabulary entry that the loss writes: 16-bit and fp32 logits, and a temporary."""


MOST_OF_PEAK = 0.88
"""Share of the dense peak that the best matrix shapes reach on an A100: 271 of 312 TFLOP/s (stas00/ml-engineering)."""

STEP_COEFFICIENTS = (
    *(
        f"train_{stack}_{name}"
        for stack in ("transformers", "fused", "megatron")
        for name in ("gemm_eff", "attention_eff", "passes")
    ),
    "train_fused_gemm_eff_ampere",
    "train_fused_attention_eff_ampere",
    "train_fused_passes_ampere",
    "train_link_eff",
    "train_network_eff",
    "train_hook_s_per_layer",
    "adam_bytes_per_param",
    "cpu_adam_params_per_s",
    "grad_offload_eff",
    "host_stream_eff",
    "nvme_eff",
    "nvme_serial_frac",
)
"""Coefficients that a step's time depends on."""

STACK_RATES = ("gemm_eff", "attention_eff", "passes")


def _stack_rate(rates: Rates, stack: str, family: str, name: str) -> float:
    """Return a compute coefficient of a model code, the one fitted on this GPU family where there is one.

    Where there is none, an efficiency is scaled by what fused training code reaches on both families (published runs).
    """
    own, known = f"train_{stack}_{name}_{family}", f"train_fused_{name}_{family}"
    if own in rates.values:
        return rates[own]
    value = rates[f"train_{stack}_{name}"]
    if stack == "transformers" and name != "passes" and known in rates.values:
        return min(MOST_OF_PEAK, value * rates[known] / rates[f"train_fused_{name}"])
    return value


def link_rate(cluster: Cluster, n_ranks: int, ranks_per_node: int, rates: Rates) -> float:
    """Return the rate of a collective over `n_ranks`: the node's links, or the network that its ranks share."""
    inside = cluster.gpu.link_bytes_per_s * rates["train_link_eff"]
    if n_ranks <= ranks_per_node:
        return inside
    network = cluster.internode_bytes_per_s_per_gpu * max(1, ranks_per_node) * rates["train_network_eff"]
    return min(inside, network)


def traffic_of(cluster: Cluster, job: TrainJob, sizes: Sizes) -> Traffic:
    """Return what one GPU sends for data parallelism in one step; quantised gradients act between nodes only."""
    return sent_bytes(
        sizes.n_params,
        job.dp,
        job.zero_stage,
        n_accumulation=job.gradient_accumulation_steps,
        n_trainable=sizes.n_trainable,
        has_quantized_weights=job.has_quantized_weights,
        has_quantized_gradients=job.has_quantized_gradients and cluster.n_nodes > 1,
        hpz_ranks=job.hpz_ranks,
    )


def stage_passes_s(
    model: Model, cluster: Cluster, job: TrainJob, sizes: Sizes, rates: Rates
) -> list[tuple[float, float]]:
    """Return (forward, backward) time of one microbatch in each pipeline stage [s]; one stage without a pipeline."""
    s, gpu = sizes.shapes, cluster.gpu
    peak, bandwidth = half_peak_flops_per_s(gpu), gpu.memory_bandwidth_bytes_per_s
    pairs = sizes.n_tokens * job.sequence_length / 2
    q, kv = s.n_heads * s.d_head, s.n_kv_heads * s.d_head
    gemm, attention, passes = (_stack_rate(rates, job.stack, gpu.family, name) for name in STACK_RATES)
    per_layer = (s.n_active_params - s.head_params) / s.n_layers

    def forward(n_layers: float, has_loss: bool) -> float:
        params = per_layer * n_layers + (s.head_params if has_loss else 0)
        matrix = float(forward_flops(sizes.n_tokens, params, 0, q, 0))
        scores = float(forward_flops(0, 0, pairs, q, n_layers))
        layer = layer_activation_bytes(sizes.n_tokens, s.d_model, q, kv, s.d_ff, is_gated=sizes.is_gated, tp=job.tp)
        moved = n_layers * layer
        if has_loss and job.stack == "transformers":
            moved += LOGIT_PASSES_BYTES * sizes.n_tokens * s.vocab_size / job.tp
        return (matrix / gemm + scores / attention) / peak / job.tp + passes * moved / bandwidth

    tp_rate = gpu.link_bytes_per_s if job.tp <= cluster.gpus_per_node else cluster.internode_bytes_per_s_per_gpu
    hand_over = 0.0
    if job.pp > 1:
        # stages are neighbours where a node holds all of them; each chunk hands over once
        rate = link_rate(cluster, job.pp * job.tp, cluster.gpus_per_node, rates)
        hand_over = job.n_chunks * stage_send_bytes(sizes.n_tokens, s.d_model, job.tp) / rate
    found = []
    for stage, n in enumerate(sizes.layers):
        one = forward(n, stage == job.pp - 1)
        again = forward(n, False) if job.is_checkpointed else 0.0
        sent = tensor_parallel_bytes(sizes.n_tokens, s.d_model, n, job.tp, is_checkpointed=job.is_checkpointed)
        link = sent / (tp_rate * rates["train_link_eff"]) if job.tp > 1 else 0.0
        frozen = 1 - sizes.n_trainable / sizes.n_params if job.lora_rank else 0.0
        # two all-reduces a layer in each pass, two more where the backward pass computes the layer again
        ahead = link / (3 if job.is_checkpointed else 2)
        found.append((one + ahead + hand_over, one * (2 - frozen) + again + link - ahead + hand_over))
    return found


def step_parts(model: Model, cluster: Cluster, job: TrainJob, sizes: Sizes, rates: Rates) -> dict[str, float]:
    """Return what one optimizer step spends its time on [s]: the parts sum to the step."""
    s = sizes.shapes
    hooks = 0.0
    if job.zero_stage == 3 and job.stack == "transformers":
        hooks = rates["train_hook_s_per_layer"] * s.n_layers
    stage_s = [forward + backward for forward, backward in stage_passes_s(model, cluster, job, sizes, rates)]
    m = job.gradient_accumulation_steps
    compute = pipeline_s(stage_s, m, job.n_chunks) if job.pp > 1 else stage_s[0] * m
    busy = max(stage_s) * m
    parts = {"forward_backward": busy, "pipeline_bubble": compute - busy}
    sent = traffic_of(cluster, job, sizes)
    in_node = max(1, min(job.dp, cluster.gpus_per_node // job.tp))
    traffic = 0.0
    if job.dp > 1:
        traffic = (sent.gathered_bytes + sent.reduced_bytes) / link_rate(cluster, job.dp, in_node, rates)
        traffic += sent.group_bytes / link_rate(cluster, job.hpz_ranks, in_node, rates)
    overlap = job.zero_stage == 3 if job.has_overlap is None else job.has_overlap
    hidden = {"communication": traffic, "host_hooks": hooks * 2 * m, **_host_traffic(cluster, job, sizes, rates)}
    if overlap and job.pp == 1:
        # side streams and the host run beside the kernels: what sticks out is booked on the longest of them
        longest = max(hidden, key=lambda name: hidden[name])
        out = float(overlapped_s(compute, *hidden.values())) - compute
        parts |= {name: out if name == longest else 0.0 for name in hidden}
    else:
        parts |= hidden
    return parts | {"optimizer": _optimizer_s(cluster, job, sizes, rates)}


def _host_traffic(cluster: Cluster, job: TrainJob, sizes: Sizes, rates: Rates) -> dict[str, float]:
    """Return the time of offloaded parameters coming to the GPU and of gradients leaving it [s a step]."""
    gpu, m, parts = cluster.gpu, job.gradient_accumulation_steps, {}
    if job.offload_param != "none":
        host = rates["host_stream_eff"] * gpu.host_link_bytes_per_s
        if job.offload_param == "nvme":
            drives, sharing = cluster.nvme_bytes_per_s * rates["nvme_eff"], min(job.dp, cluster.gpus_per_node)
            host = float(nvme_bytes_per_s_per_gpu(drives, sharing, host, rates["nvme_serial_frac"]))
        parts["host_stream"] = 2 * 2 * sizes.n_params * m / host / job.dp
    if job.offload_optimizer != "none":
        shard = sizes.n_trainable / job.dp
        parts["gradient_offload"] = 2 * shard / (rates["grad_offload_eff"] * gpu.host_link_bytes_per_s) * m
    return parts


def _optimizer_s(cluster: Cluster, job: TrainJob, sizes: Sizes, rates: Rates) -> float:
    """Return the time of the update: on the GPU bound by its memory, on the host by its CPUs (and drives)."""
    gpu = cluster.gpu
    shard = sizes.n_trainable / (job.dp if job.zero_stage else 1)
    if job.offload_optimizer == "none":
        return rates["adam_bytes_per_param"] * shard / gpu.memory_bandwidth_bytes_per_s
    ranks = min(job.n_gpus, cluster.gpus_per_node)
    back = 2 * shard / (rates["host_stream_eff"] * gpu.host_link_bytes_per_s)
    update = shard * ranks / rates["cpu_adam_params_per_s"]
    drives = 0.0
    if job.offload_optimizer == "nvme":
        drives = 2 * 16 * shard * ranks / (cluster.nvme_bytes_per_s * rates["nvme_eff"])
    return float(overlapped_s(update, drives)) + back


def predict_schedule(model: Model, cluster: Cluster, job: TrainJob, coefficients: CoefficientSet) -> tuple[Pass, ...]:
    """Return when each stage computes which microbatch in the pipeline part of one step, optimizer left out.

    Raises DomainError for a job that DeepSpeed refuses, and for interleaved chunks, which are not replayed.
    """
    check_job(model, cluster, job)
    if job.n_chunks > 1:
        raise DomainError(f"only the 1F1B schedule is drawn, not {job.n_chunks} chunks a stage; use n_chunks 1")
    passes = stage_passes_s(model, cluster, job, sizes_of(model, job), rates_of(coefficients, cluster.gpu.name)[0])
    forward, backward = [f for f, _ in passes], [b for _, b in passes]
    return one_forward_one_backward(forward, backward, job.gradient_accumulation_steps)


def _step_interval(
    model: Model, cluster: Cluster, job: TrainJob, sizes: Sizes, ends: tuple[Rates, Rates, Rates]
) -> Interval:
    """Return the step time with its 90 % interval: what each coefficient alone does to it, joined as independent.

    ends : coefficients central, at their fast and at their slow end. The law's error on held-out rows is joined too.
    """
    rates, *others = ends
    value = sum(step_parts(model, cluster, job, sizes, rates).values())
    squares = []
    for end in others:
        total = math.log1p(rates["train_error_frac"]) ** 2
        for name in STEP_COEFFICIENTS:
            if end[name] != rates[name]:
                moved = Rates({**rates.values, name: end[name]})
                total += math.log(sum(step_parts(model, cluster, job, sizes, moved).values()) / value) ** 2
        squares.append(total)
    return Interval(
        value=value, low=value * math.exp(-math.sqrt(squares[0])), high=value * math.exp(math.sqrt(squares[1]))
    )


def predict_train(model: Model, cluster: Cluster, job: TrainJob, coefficients: CoefficientSet) -> TrainPrediction:
    """Return step time, throughput, MFU, memory and traffic of a job, each number with a 90 % interval.

    Raises DomainError for what DeepSpeed refuses (stage 2 or 3 with a pipeline, offload_param below stage 3, degrees
    that do not divide) and for a job that does not fit, with the nearest number that would.
    """
    check_job(model, cluster, job)
    sizes = sizes_of(model, job)
    rates, fast, slow = rates_of(coefficients, cluster.gpu.name)
    memory = memory_of(job, sizes, rates, cluster.gpu.device_memory_bytes)
    peaks = phase_peaks(job, sizes)
    allocated = max(peaks.values())
    state = state_of(job, sizes)
    step = step_parts(model, cluster, job, sizes, rates)
    step_s = _step_interval(model, cluster, job, sizes, (rates, fast, slow))
    s = sizes.shapes
    tokens = job.train_batch_size * job.sequence_length
    forward = float(
        forward_flops(tokens, s.n_active_params, tokens * job.sequence_length / 2, s.n_heads * s.d_head, s.n_layers)
    )
    frozen = 1 - sizes.n_trainable / sizes.n_params if job.lora_rank else 0.0
    useful = float(step_flops(forward, frozen_frac=frozen))
    peak = half_peak_flops_per_s(cluster.gpu)

    def inverse(amount: float) -> Interval:
        return Interval(value=amount / step_s.value, low=amount / step_s.high, high=amount / step_s.low)

    mfu = float(mfu_frac(useful, 1.0, peak, job.n_gpus))
    sent = traffic_of(cluster, job, sizes).total_bytes

    def near(value: float, share: float) -> Interval:
        return Interval(value=value, low=value * (1 - share), high=value * (1 + share))

    slack = [memory_of(job, sizes, r, cluster.gpu.device_memory_bytes).total for r in (fast, slow)]
    host = state.host_bytes * min(job.n_gpus, cluster.gpus_per_node)
    quantities = {
        "step_s": step_s,
        "tokens_per_s": inverse(tokens),
        "tokens_per_s_per_gpu": inverse(tokens / job.n_gpus),
        "flops_per_s_per_gpu": inverse(useful / job.n_gpus),
        "mfu_frac": inverse(mfu),
        "bubble_frac": near(step["pipeline_bubble"] / (step["forward_backward"] + step["pipeline_bubble"]), 0.05),
        "allocated_bytes_per_gpu": near(allocated, rates["train_memory_error_frac"]),
        "memory_bytes_per_gpu": Interval(
            value=memory.total, low=min(memory.total, *slack), high=max(memory.total, *slack)
        ),
        "host_bytes_per_node": near(host, 0.15),
        "sent_bytes_per_gpu": near(sent, 0.0),
    }
    if state.drive_bytes:
        quantities["drive_bytes_per_node"] = near(state.drive_bytes * min(job.n_gpus, cluster.gpus_per_node), 0.0)
    power = [board_power_w(cluster.gpu, job, step, r) for r in (rates, fast, slow)]
    quantities["board_power_w"] = Interval(value=power[0], low=min(power), high=max(power))
    quantities["energy_j_per_token"] = Interval(
        value=power[0] * step_s.value / tokens,
        low=min(power) * step_s.low / tokens,
        high=max(power) * step_s.high / tokens,
    )
    if job.total_tokens:
        n_steps = job.total_tokens / tokens
        quantities["duration_s"] = Interval(
            value=n_steps * step_s.value, low=n_steps * step_s.low, high=n_steps * step_s.high
        )
    parts = tuple(Part(name=k, value=v) for k, v in step.items())
    breakdown = Breakdown(name="step_s", unit="s", total=step_s.value, parts=parts)
    return TrainPrediction(
        quantities=quantities, breakdowns=(memory, breakdown), notes=tuple(notes_of(cluster, job, sizes, coefficients))
    )


def refusal(model: Model, cluster: Cluster, job: TrainJob) -> str:
    """Return the rule that a job breaks, whatever the memory, and what would be taken; empty when it breaks none."""
    try:
        check_job(model, cluster, job)
        state_of(job, sizes_of(model, job))
    except DomainError as error:
        return str(error)
    return ""


def _short_of_room(cluster: Cluster, job: TrainJob, state: ZeroState) -> tuple[str, str] | None:
    """Return (reason, what would fit) where what is offloaded finds no room on the host or on its drives."""
    host_room, drive_room = cluster.host_memory_bytes_per_gpu, cluster.nvme_bytes
    drives = state.drive_bytes * min(job.n_gpus, cluster.gpus_per_node)
    if state.host_bytes > host_room:
        ranks = -(-int(state.host_bytes * job.dp) // int(host_room)) if host_room >= 1 else 0
        more = (
            [f"{ranks:,} data-parallel ranks"] if ranks and "cpu" in (job.offload_optimizer, job.offload_param) else []
        )
        return (
            f"offload needs {format_bytes(state.host_bytes)} of host memory a GPU, {format_bytes(host_room)} is there",
            " or ".join([*more, f"{format_bytes(state.host_bytes)} of host memory a GPU"]),
        )
    if drives > drive_room:
        return (
            f"offload needs {format_bytes(drives)} on a node's NVMe drives, {format_bytes(drive_room)} is there",
            f"{format_bytes(drives)} of drives a node",
        )
    return None


def feasible_train(
    model: Model, cluster: Cluster, job: TrainJob, coefficients: CoefficientSet
) -> tuple[str, str] | None:
    """Return (reason, nearest number that would fit) when a job cannot run, None when it can."""
    rule = refusal(model, cluster, job)
    if rule:
        reason, _, nearest = rule.partition("; ")
        return reason, nearest
    sizes = sizes_of(model, job)
    rates = rates_of(coefficients, cluster.gpu.name)[0]
    short = _short_of_room(cluster, job, state_of(job, sizes))
    if short:
        return short
    need = max(phase_peaks(job, sizes).values()) + outside_bytes(job, rates)
    room = cluster.gpu.device_memory_bytes
    if need <= room:
        return None
    reason = f"the step's peak needs {format_bytes(need)} a GPU, {format_bytes(room)} is there"
    for change, label in _remedies(job):
        smaller = job.model_copy(update=change)
        if refusal(model, cluster, smaller):
            continue
        sizes = sizes_of(model, smaller)
        fits = max(phase_peaks(smaller, sizes).values()) + outside_bytes(smaller, rates) <= room
        if fits and _short_of_room(cluster, smaller, state_of(smaller, sizes)) is None:
            return reason, label
    return reason, "more GPUs" if job.lora_rank else "more GPUs, or LoRA"


def _remedies(job: TrainJob) -> list[tuple[dict[str, object], str]]:
    """Return single changes that lower memory, the cheapest first."""
    changes: list[tuple[dict[str, object], str]] = []
    if not job.is_checkpointed:
        changes.append(({"is_checkpointed": True}, "activation checkpointing"))
    changes += [
        ({"micro_batch_size": b, "is_checkpointed": True}, f"micro_batch_size {b} with activation checkpointing")
        for b in (8, 4, 2, 1)
        if b < job.micro_batch_size
    ]
    small: dict[str, object] = {"micro_batch_size": 1, "is_checkpointed": True}
    if job.pp == 1:
        changes += [
            (small | {"zero_stage": stage}, f"ZeRO stage {stage} (micro_batch_size 1, checkpointing)")
            for stage in range(job.zero_stage + 1, 4)
        ]
        changes.append((small | {"zero_stage": 3, "offload_optimizer": "cpu"}, "stage 3 with offload_optimizer cpu"))
        changes.append(
            (
                small | {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
                "stage 3 with offload_optimizer and offload_param cpu",
            )
        )
    return changes
