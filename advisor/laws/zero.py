"""Memory and traffic of ZeRO data parallelism: what each stage shards, its peaks, what it sends.

Stage 1 shards the optimizer states, stage 2 also the gradients, stage 3 also the parameters; stage 0 shards nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from advisor.errors import DomainError

HALF_BYTES = 2.0
MASTER_BYTES = 4.0
MOMENT_BYTES = 8.0
SUB_GROUP_PARAMS = 1e9
"""sub_group_size: elements of the partition that stage 3 updates at a time (zero/config.py)."""
PERSISTENT_PARAMS = 1e5
"""stage3_param_persistence_threshold: parameters of at most so many elements are gathered once and stay."""
DRIVE_STATE_BYTES = 16.0
"""Bytes a parameter that an optimizer on NVMe keeps there: master copy, two moments, the fp32 gradient of a step."""
SWAP_BUFFERS = 4.0
"""offload_optimizer.buffer_count: pinned fp32 buffers on the host, each as large as the largest sub-group."""
PARAM_BUFFER_BYTES = 5 * 1e8 * HALF_BYTES
"""offload_param on NVMe: buffer_count 5 of buffer_size 1e8 elements, pinned on the host."""
MAX_IN_CPU_PARAMS = 1e9
"""offload_param.max_in_cpu: elements that stay on the host although the rest is on NVMe."""
LIVE_PARAMS = 1.05e9
"""stage3_max_reuse_distance 1e9 + stage3_prefetch_bucket_size 5e7, elements."""


@dataclass(frozen=True)
class ZeroState:
    """Bytes of model state on one GPU at four moments of a step, activations left out, on the host and on drives.

    accumulated_bytes : of the gradients, those of earlier micro-steps that a later forward pass finds there.
    """

    weights_bytes: float
    optimizer_bytes: float
    gradient_bytes: float
    kept_bucket_bytes: float
    live_bytes: float
    backward_bucket_bytes: float
    step_extra_bytes: float
    host_bytes: float
    accumulated_bytes: float = 0.0
    drive_bytes: float = 0.0

    @property
    def between_steps_bytes(self) -> float:
        """Return what stays on the GPU between two steps."""
        return self.weights_bytes + self.optimizer_bytes + self.kept_bucket_bytes

    @property
    def forward_bytes(self) -> float:
        """Return the state during the forward pass (stage 3: with gathered parameters)."""
        return self.between_steps_bytes + self.live_bytes

    @property
    def backward_end_bytes(self) -> float:
        """Return the state after the backward pass: all gradients are there, the bucket of stages 1 and 2 is freed."""
        return self.between_steps_bytes + self.gradient_bytes

    @property
    def step_peak_bytes(self) -> float:
        """Return the peak inside optimizer.step(), with its flattened and fp32 copies of the gradients."""
        return self.backward_end_bytes + self.step_extra_bytes


def _check(stage: int, n_ranks: int, n_params: float) -> None:
    if stage not in (0, 1, 2, 3):
        raise DomainError(f"zero_stage {stage} does not exist; use 0 (off), 1, 2 or 3")
    if n_ranks < 1 or n_params <= 0:
        raise DomainError(f"ZeRO needs at least 1 rank and 1 parameter, got {n_ranks} and {n_params:g}")


def zero_state(
    n_params: float,
    n_ranks: int,
    stage: int,
    *,
    n_trainable: float | None = None,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    bucket_params: float = 5e8,
    has_overlap: bool | None = None,
    largest_module_params: float = 0.0,
    n_accumulation: int = 1,
    hpz_ranks: int = 0,
    is_optimizer_on_nvme: bool = False,
    is_param_on_nvme: bool = False,
    persistent_params: float = 0.0,
) -> ZeroState:
    """Return the bytes of model state of one GPU, 16-bit training with Adam, gradients accumulated in 16 bits.

    Between steps, P parameters on N ranks: stage 0 ``14 P`` (2 weights + 4 master + 8 moments), stages 1 and 2
    ``2 P + 12 P / N``, stage 3 ``14 P / N`` + a kept gradient partition ``2 P / N`` + one bucket.
    Gradients: ``2 P`` (stages 0, 1), ``2 P / N`` (2; twice that with accumulation). In the step: stage 0 ``+ 8 P``
    (a list and a flat copy in fp32), stages 1 and 2 a flat copy and an fp32 copy of the partition ``+ 6 P / N``
    (``2 P + 20 P / N`` in all for stage 2), stage 3 ``+ 6 min(P / N, 1e9)``.

    n_params : P > 0; n_ranks : N >= 1 data-parallel ranks; stage : 0..3; n_trainable : parameters with gradients,
    default all (LoRA: few); bucket_params : reduce_bucket_size; has_overlap : overlap_comm, default only in stage 3
    (stages 1 and 2: two buckets); largest_module_params : largest module gathered at once; n_accumulation : micro-steps
    a step; hpz_ranks : k > 0 keeps a second copy of the weights sharded over k ranks (ZeRO++ hpZ);
    persistent_params : in stage 3, those of tensors below the threshold, which stay gathered on every rank;
    is_..._on_nvme : what is offloaded rests on drives; the host holds buffers and (optimizer) ``2 P / N`` gradients.

    Returns bytes. Raises DomainError for a stage outside 0..3 and for offloads that DeepSpeed ignores or refuses.

    Notes: the allocator's slack, the CUDA context and the moments' late allocation (first step) are not in here; with
    P below 1e9, stage 3 never releases a gathered parameter. Measured peaks of four stages on one H100: within 1 %.
    Reference: Rajbhandari et al. 2020, arXiv:1910.02054, section 5 (16 bytes a parameter); DeepSpeed 0.19.8,
    runtime/zero/stage_1_and_2.py, stage3.py, offload_config.py, fp16/fused_optimizer.py, swap_tensor/.

    >>> round(zero_state(1_345_423_360, 1, 2).step_peak_bytes / 2**30, 2)  # measured 27.63 GiB
    27.57
    """
    _check(stage, n_ranks, n_params)
    if offload_param and stage != 3:
        raise DomainError(
            f"offload_param works with stage 3 only, stage {stage} accepts it and offloads nothing; use zero_stage 3"
        )
    if offload_optimizer and stage == 0:
        raise DomainError(
            "offload_optimizer needs stage 1, 2 or 3, stage 0 keeps everything on the GPU; use zero_stage 2"
        )
    if hpz_ranks and stage != 3:
        raise DomainError(f"hpZ (zero_hpz_partition_size) is a stage 3 option, got stage {stage}")
    trainable = n_params if n_trainable is None else n_trainable
    bucket = HALF_BYTES * min(bucket_params, max(trainable, 1.0))
    shard = 1.0 / n_ranks
    states = (MASTER_BYTES + MOMENT_BYTES) * trainable
    overlap = stage == 3 if has_overlap is None else has_overlap
    if stage == 0:
        grads = HALF_BYTES * trainable
        return ZeroState(HALF_BYTES * n_params, states, grads, 0.0, 0.0, 0.0, 8.0 * trainable, 0.0, grads)
    if stage in (1, 2):
        earlier = (1.0 if stage == 1 else shard) * HALF_BYTES * trainable
        # stage 2 adds each micro-step's partition to the sum of those before it: two of them at its end
        held = earlier * (2.0 if stage == 2 and n_accumulation > 1 else 1.0)
        buckets = bucket * (2.0 if overlap else 1.0)
        if offload_optimizer:
            host = (18.0 + (2.0 if n_accumulation > 1 else 0.0)) * trainable * shard
            staging = HALF_BYTES * largest_module_params
            return ZeroState(HALF_BYTES * n_params, 0.0, 0.0, staging, 0.0, buckets, 0.0, host)
        copies = 6.0 * trainable * shard
        # stage 1 frees the full gradients as it takes its partition of them
        taken = HALF_BYTES * trainable * (1 - shard) if stage == 1 else 0.0
        extra = max(0.0, copies - taken)
        return ZeroState(HALF_BYTES * n_params, states * shard, held, 0.0, 0.0, buckets, extra, 0.0, earlier)
    live_params = min(n_params, LIVE_PARAMS + largest_module_params)
    live = HALF_BYTES * live_params if n_ranks > 1 or offload_param else 0.0
    secondary = HALF_BYTES * n_params / hpz_ranks if hpz_ranks else 0.0
    partition = trainable * shard
    resident = HALF_BYTES * persistent_params * (1.0 if offload_param else 1.0 - shard)
    weights = (0.0 if offload_param else HALF_BYTES * n_params * shard) + secondary + resident
    gradient_partition = 0.0 if offload_optimizer else HALF_BYTES * partition
    kept = bucket + gradient_partition
    host = drive = 0.0
    if offload_optimizer and is_optimizer_on_nvme:
        host += HALF_BYTES * partition + SWAP_BUFFERS * MASTER_BYTES * min(partition, SUB_GROUP_PARAMS)
        drive += DRIVE_STATE_BYTES * partition
    elif offload_optimizer:
        host += 18.0 * partition
    if offload_param and is_param_on_nvme:
        host += PARAM_BUFFER_BYTES + HALF_BYTES * min(n_params * shard, MAX_IN_CPU_PARAMS)
        drive += HALF_BYTES * n_params * shard
    elif offload_param:
        host += HALF_BYTES * n_params * shard
    extra = 0.0 if offload_optimizer else 6.0 * min(partition, SUB_GROUP_PARAMS)
    copy = bucket if n_ranks > 1 else 0.0
    optimizer = 0.0 if offload_optimizer else states * shard
    return ZeroState(weights, optimizer, 0.0, kept, live, copy, extra, host, 0.0, drive)


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends in one optimizer step [bytes]: weights gathered and gradients reduced over all ranks, and
    weights gathered within a group of hpZ only."""

    gathered_bytes: float
    reduced_bytes: float
    group_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Return all of it."""
        return self.gathered_bytes + self.reduced_bytes + self.group_bytes


def sent_bytes(
    n_params: float,
    n_ranks: int,
    stage: int,
    *,
    n_accumulation: int = 1,
    n_trainable: float | None = None,
    has_quantized_weights: bool = False,
    has_quantized_gradients: bool = False,
    hpz_ranks: int = 0,
) -> Traffic:
    """Return what one GPU sends in one optimizer step.

    Gathered and reduced, times ``2 bytes (N - 1) / N``: stage 0 ``0, 2 P``, stage 1 ``P, 2 P``, stage 2 ``P, 2 P g``,
    stage 3 ``2 P g, P g``, with g micro-steps. Stages 1 and 2 all-reduce where the paper reduce-scatters, so they
    send 1.5 times plain data parallelism; stage 2 reduces in every micro-step.
    ZeRO++: qwZ sends weights as int8 (half of every gather), qgZ gradients as int4 (a quarter; between nodes only).
    hpZ over k ranks keeps a second copy of the weights from the first forward pass of a step to its update, so that
    one gather a step crosses all ranks and the other ``2 g - 1`` stay in the group, ``(k - 1) / k`` each.

    Notes: the scales of the quantised blocks and the quantisation's own time are left out.
    Reference: DeepSpeed 0.19.8, stage_1_and_2.py (allreduce_bucket), engine.py (is_gradient_accumulation_boundary),
    partition_parameters.py (_all_gather_dtype, _partition_param_sec), stage3.py (invalidate_secondary_tensor);
    Rajbhandari et al. 2020, arXiv:1910.02054, section 7 (2 P, 2 P, 3 P); Wang et al. 2023, arXiv:2306.10209.

    >>> sent_bytes(1e9, 8, 2).total_bytes / sent_bytes(1e9, 8, 0).total_bytes
    1.5
    """
    _check(stage, n_ranks, n_params)
    trainable = n_params if n_trainable is None else n_trainable
    unit = HALF_BYTES * (n_ranks - 1) / n_ranks
    if stage == 0:
        return Traffic(0.0, 2 * trainable * unit)
    if stage == 1:
        return Traffic(trainable * unit, 2 * trainable * unit)
    if stage == 2:
        return Traffic(trainable * unit, 2 * trainable * unit * n_accumulation)
    gather = n_params * (0.5 if has_quantized_weights else 1.0)
    reduced = trainable * unit * n_accumulation * (0.25 if has_quantized_gradients else 1.0)
    n_gathers = 2 * n_accumulation
    if not hpz_ranks:
        return Traffic(gather * unit * n_gathers, reduced)
    group = HALF_BYTES * (hpz_ranks - 1) / hpz_ranks
    return Traffic(gather * unit, reduced, gather * group * (n_gathers - 1))


def estimator_bytes(
    n_params: float, n_ranks: int, stage: int, *, largest_layer_params: float = 0.0, offload: str = "none"
) -> float:
    """Return what DeepSpeed's own estimator says one GPU needs: model states only, and for stages 2 and 3 only.

    Stage 2: ``2 P + 18 P / N``, with optimizer offload ``2 P``. Stage 3: ``4 L + 18 P / N``, with optimizer offload
    ``4 L + 2 P / N``, with both ``4 L``; L = parameters of the largest layer.

    Notes: it knows no activations, buckets, gathered parameters, step copies or CUDA context: a report on GitHub
    (deepspeedai/DeepSpeed#4527) has 0.49 GB estimated against 14.7 to 21.3 GB seen. `zero_state` plus activations is
    what to plan with. For stage 2 its documentation still shows an older formula (t5-3b on 8 GPUs: 15.93 GB against
    11.28 in the code).
    Reference: DeepSpeed 0.19.8, stage_1_and_2.py:4017 and stage3.py:4016.

    >>> round(estimator_bytes(2.851e9, 8, 3, largest_layer_params=32e6) / 2**30, 2)  # its documentation, t5-3b: 6.09
    6.09
    """
    _check(stage, n_ranks, n_params)
    if stage < 2:
        raise DomainError(f"DeepSpeed has no estimator for stage {stage}, only for 2 and 3")
    if stage == 2:
        return 2 * n_params + (18 * n_params / n_ranks if offload == "none" else 0.0)
    layer = 4 * largest_layer_params
    if offload == "none":
        return layer + 18 * n_params / n_ranks
    return layer + (2 * n_params / n_ranks if offload == "optimizer" else 0.0)
