"""What a training job keeps on one GPU: model states, activations, buffers, at each moment of a step."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.errors import DomainError
from advisor.laws.bubble import in_flight_microbatches, stage_layers
from advisor.laws.training import checkpoint_bytes, layer_activation_bytes, lora_params, loss_bytes
from advisor.laws.zero import PERSISTENT_PARAMS, ZeroState, zero_state
from advisor.predict.deepspeed_step import Rates
from advisor.predict.shapes import Shapes, shapes_of
from advisor.schema import Breakdown, Cluster, Model, Part
from advisor.schema.training import TrainJob


@dataclass(frozen=True)
class Sizes:
    """A job's per-GPU sizes: the fullest pipeline stage after the tensor split, its trainable share, tokens."""

    shapes: Shapes
    layers: tuple[int, ...]
    stage_params: tuple[float, ...]
    n_params: float
    n_trainable: float
    largest_module: float
    persistent: float
    n_tokens: int
    is_gated: bool


def _adapted(shapes: Shapes, job: TrainJob) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a layer's matrices that get adapters."""
    d, q = shapes.d_model, shapes.n_heads * shapes.d_head
    kv = shapes.n_kv_heads * shapes.d_head
    matrices = [(d, q), (d, kv), (d, kv), (q, d)]
    if job.lora_targets == "all-linear":
        matrices += [(d, shapes.d_ff), (d, shapes.d_ff), (shapes.d_ff, d)]
    return matrices


def _persistent(shapes: Shapes, job: TrainJob) -> float:
    """Return the parameters of tensors that stage 3 never shards for good: norms, biases, small adapters."""
    adapters = [job.lora_rank * side for pair in _adapted(shapes, job) for side in pair] if job.lora_rank else []
    kept = sum(n for n in adapters if n <= PERSISTENT_PARAMS) * shapes.n_layers
    return (shapes.other_params if shapes.d_model <= PERSISTENT_PARAMS else 0) + kept


def sizes_of(model: Model, job: TrainJob) -> Sizes:
    """Return the per-GPU sizes of a job's fullest stage."""
    shapes = shapes_of(model)
    layers = job.stage_layers or tuple(stage_layers(shapes.n_layers, job.pp))
    ends = shapes.embedding_params + shapes.position_params + (shapes.head_params if shapes.has_own_head else 0)
    per_layer = (shapes.n_params - ends) / shapes.n_layers
    whole = []
    for stage, n in enumerate(layers):
        edge = 0.0
        if stage == 0:
            edge += shapes.embedding_params + shapes.position_params
        if stage == job.pp - 1:
            edge += shapes.head_params if shapes.has_own_head or job.pp > 1 else 0
        whole.append((per_layer * n + edge) / job.tp)
    fullest = max(whole)
    extra = lora_params(shapes.n_layers, _adapted(shapes, job), job.lora_rank) / job.pp if job.lora_rank else 0.0
    trained = extra or fullest
    largest = max(shapes.embedding_params, per_layer) / job.tp
    tokens = job.micro_batch_size * job.sequence_length
    stages = tuple(n + extra for n in whole)
    kept = _persistent(shapes, job) / job.pp
    return Sizes(shapes, layers, stages, fullest + extra, trained, largest, kept, tokens, model.is_gated_mlp)


def state_of(job: TrainJob, sizes: Sizes, stage: int | None = None) -> ZeroState:
    """Return the model-state bytes of one GPU of a pipeline stage, by default of the one with most parameters.

    Raises DomainError for what DeepSpeed refuses or ignores.
    """
    params = sizes.n_params if stage is None else sizes.stage_params[stage]
    return zero_state(
        params,
        job.dp,
        job.zero_stage,
        n_trainable=sizes.n_trainable if job.lora_rank else params,
        offload_optimizer=job.offload_optimizer != "none",
        offload_param=job.offload_param != "none",
        bucket_params=job.bucket_params,
        has_overlap=job.has_overlap,
        largest_module_params=sizes.largest_module,
        n_accumulation=job.gradient_accumulation_steps,
        hpz_ranks=job.hpz_ranks,
        is_optimizer_on_nvme=job.offload_optimizer == "nvme",
        is_param_on_nvme=job.offload_param == "nvme",
        persistent_params=sizes.persistent,
    )


def check_job(model: Model, cluster: Cluster, job: TrainJob) -> None:
    """Raise DomainError for a job that DeepSpeed refuses, naming the rule and the nearest legal number."""
    if job.pp > 1 and job.zero_stage > 1:
        raise DomainError(f"ZeRO stage {job.zero_stage} refuses pipeline parallelism; use stage 1 with pp {job.pp}")
    if job.pp > model.n_layers:
        raise DomainError(f"pp {job.pp} exceeds the model's {model.n_layers} layers; use at most {model.n_layers}")
    if job.stage_layers and sum(job.stage_layers) != model.n_layers:
        raise DomainError(
            f"stage_layers sum to {sum(job.stage_layers)}, the model has {model.n_layers} layers; use"
            f" {','.join(str(n) for n in stage_layers(model.n_layers, job.pp))}"
        )
    if job.n_chunks > 1 and job.stack != "megatron":
        raise DomainError(
            f"DeepSpeed's pipeline has no interleaved schedule, got n_chunks {job.n_chunks}; use n_chunks 1, or stack"
            " megatron"
        )
    if job.n_chunks > 1 and job.pp == 1:
        raise DomainError(f"n_chunks {job.n_chunks} interleaves pipeline stages, pp is 1; use pp 2 or more")
    if job.n_chunks > 1 and model.n_layers % (job.pp * job.n_chunks):
        legal = [v for v in range(1, job.n_chunks) if model.n_layers % (job.pp * v) == 0]
        raise DomainError(
            f"{model.n_layers} layers do not divide into {job.pp} stages of {job.n_chunks} chunks; use n_chunks"
            f" {legal[-1] if legal else 1}"
        )
    if job.n_chunks > 1 and job.gradient_accumulation_steps % job.pp:
        raise DomainError(
            f"interleaving needs microbatches in multiples of pp {job.pp}, got {job.gradient_accumulation_steps}; use"
            f" {-(-job.gradient_accumulation_steps // job.pp) * job.pp}"
        )
    zeropp = job.hpz_ranks or job.has_quantized_weights or job.has_quantized_gradients
    if zeropp and job.zero_stage != 3:
        raise DomainError(f"ZeRO++ (hpZ, qwZ, qgZ) works with stage 3, got stage {job.zero_stage}; use zero_stage 3")
    if job.hpz_ranks and job.dp % job.hpz_ranks:
        legal = [k for k in range(1, job.dp + 1) if job.dp % k == 0]
        raise DomainError(
            f"hpz_ranks {job.hpz_ranks} does not divide dp {job.dp}; use {max(k for k in legal if k <= job.hpz_ranks)}"
        )
    if model.n_heads % job.tp or model.d_ff % job.tp:
        legal = [t for t in range(1, job.tp + 1) if model.n_heads % t == 0 and model.d_ff % t == 0]
        raise DomainError(
            f"tp {job.tp} does not divide {model.n_heads} heads and d_ff {model.d_ff}; use tp {legal[-1]}"
        )
    if job.n_gpus > cluster.n_gpus:
        raise DomainError(f"tp x pp x dp is {job.n_gpus} GPUs, the cluster has {cluster.n_gpus}")
    if "nvme" in (job.offload_param, job.offload_optimizer) and cluster.nvme_bytes_per_s <= 0:
        raise DomainError("offload to nvme without NVMe drives (nvme_bytes_per_s is 0); use cpu")
    if job.dtype not in cluster.gpu.peak_flops_per_s:
        other = {"bf16": "fp16", "fp16": "bf16"}[job.dtype]
        raise DomainError(f"{cluster.gpu.label} has no {job.dtype} arithmetic; use dtype {other}")
    if job.lora_rank > model.d_model:
        raise DomainError(
            f"lora_rank {job.lora_rank:,} exceeds the model's width; use at most {model.d_model:,}, such as 16"
        )
    if job.offload_optimizer == "nvme" and job.zero_stage != 3:
        raise DomainError(f"NVMe offload needs stage 3, got stage {job.zero_stage}; use zero_stage 3")


def activation_parts(job: TrainJob, sizes: Sizes, stage: int = 0) -> dict[str, float]:
    """Return activation bytes of a stage: kept layers, one layer at work, the loss after forward, its peak."""
    s = sizes.shapes
    q, kv = s.n_heads * s.d_head, s.n_kv_heads * s.d_head
    layer = layer_activation_bytes(sizes.n_tokens, s.d_model, q, kv, s.d_ff, is_gated=sizes.is_gated, tp=job.tp)
    kept_layer = checkpoint_bytes(sizes.n_tokens, s.d_model) if job.is_checkpointed else layer
    m = job.gradient_accumulation_steps
    flights = in_flight_microbatches(stage, job.pp, m, job.n_chunks) if job.pp > 1 else 1
    after = peak = 0.0
    if stage == job.pp - 1:
        after, peak = loss_bytes(sizes.n_tokens, s.vocab_size // job.tp, s.d_model)
    return {"kept": kept_layer * sizes.layers[stage] * flights, "layer": layer, "loss_kept": after, "loss_peak": peak}


def stage_peaks(job: TrainJob, sizes: Sizes, stage: int) -> dict[str, float]:
    """Return allocated bytes of one GPU of a stage at the moments that DeepSpeed's records name.

    Forward and backward peaks happen at the loss, unless gradients, bucket and one layer's backward pass (its
    activations and as much again for their gradients) exceed it at the end of the backward pass.
    """
    state, act = state_of(job, sizes, stage), activation_parts(job, sizes, stage)
    logits = act["loss_kept"] * 10 / 4
    at_loss = state.forward_bytes + act["kept"] + act["loss_peak"]
    at_end = state.forward_bytes + state.gradient_bytes + state.backward_bucket_bytes + 2 * act["layer"]
    if job.gradient_accumulation_steps > 1 or job.pp > 1:
        at_loss += state.accumulated_bytes
    return {
        "before": state.between_steps_bytes,
        "fwd_peak": state.forward_bytes + act["kept"] + min(logits, act["loss_peak"]),
        "bwd_peak": max(at_loss, at_end),
        "bwd_end": state.backward_end_bytes,
        "step_peak": state.step_peak_bytes,
    }


def fullest_stage(job: TrainJob, sizes: Sizes) -> int:
    """Return the pipeline stage whose GPUs need most: the first holds most microbatches, the last the loss."""
    return max(range(job.pp), key=lambda stage: max(stage_peaks(job, sizes, stage).values()))


def phase_peaks(job: TrainJob, sizes: Sizes) -> dict[str, float]:
    """Return `stage_peaks` of the stage that needs most."""
    return stage_peaks(job, sizes, fullest_stage(job, sizes))


def outside_bytes(job: TrainJob, rates: Rates) -> float:
    """Return what the driver, the libraries and, with several ranks, NCCL take of a GPU outside torch's allocator."""
    return rates["train_context_bytes"] + (rates["train_nccl_bytes"] if job.n_gpus > 1 else 0.0)


def memory_of(job: TrainJob, sizes: Sizes, rates: Rates, device_bytes: float) -> Breakdown:
    """Return the bytes of one GPU at the step's peak, by purpose; the parts sum to the device memory in use.

    The allocator keeps freed blocks as far as the device has room, and gives them back before it fails.
    """
    stage = fullest_stage(job, sizes)
    state, act, peaks = state_of(job, sizes, stage), activation_parts(job, sizes, stage), stage_peaks(job, sizes, stage)
    moment = max(("fwd_peak", "bwd_peak", "step_peak"), key=lambda k: peaks[k])
    parts = [
        Part(name="weights", value=state.weights_bytes, why="16-bit parameters on this GPU"),
        Part(name="optimizer_states", value=state.optimizer_bytes, why="fp32 master copy and two Adam moments"),
        Part(name="kept_buffers", value=state.kept_bucket_bytes, why="bucket and gradient partition that stay"),
    ]
    known = state.between_steps_bytes
    if moment == "step_peak":
        parts.append(Part(name="gradients", value=state.gradient_bytes, why="all of them before the step"))
        parts.append(Part(name="step_copies", value=state.step_extra_bytes, why="flat and fp32 copies of gradients"))
    else:
        parts.append(Part(name="live_parameters", value=state.live_bytes, why="gathered by ZeRO-3 for layers at work"))
        rest = peaks[moment] - known - state.live_bytes
        kept = min(act["kept"], rest)
        parts.append(Part(name="activations", value=kept, why="kept for the backward pass"))
        parts.append(Part(name="loss_and_gradients", value=rest - kept, why="logits in fp32, gradients, buckets"))
    outside = outside_bytes(job, rates)
    room = max(0.0, device_bytes - peaks[moment] - outside)
    slack = min(rates["allocator_slack_frac"] * peaks[moment], room)
    parts.append(Part(name="allocator_slack", value=slack, why="reserved by the caching allocator beyond the peak"))
    parts.append(Part(name="context", value=outside, why="CUDA context, NCCL and libraries"))
    return Breakdown(name="memory_bytes_per_gpu", unit="bytes", total=sum(p.value for p in parts), parts=tuple(parts))
