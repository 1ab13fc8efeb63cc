"""What DeepSpeed 0.19.8 does with a ds_config: which keys it refuses and which it silently ignores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from advisor.errors import nearest, printable

SOURCE = "DeepSpeed 0.19.8, runtime/config.py, runtime/zero/config.py, runtime/engine.py, runtime/pipe/engine.py"

TOP_LEVEL = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "prescale_gradients",
        "gradient_predivide_factor",
        "bf16",
        "bfloat16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "activation_checkpointing",
        "pipeline",
        "tensor_parallel",
        "expert_parallel",
        "sequence_parallel_size",
        "compile",
        "aio",
        "checkpoint",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "comms_logger",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "data_efficiency",
        "hybrid_engine",
        "weight_quantization",
        "autotuning",
        "timers",
        "dataloader_drop_last",
        "dump_state",
        "disable_python_gc",
        "gradient_allreduce_op",
        "managed_gradient_accumulation",
        "vocabulary_size",
        "disable_allgather",
        "use_data_before_expert_parallelism",
    ]
)
REMOVED = {
    "nebula": "use torch checkpoints",
    "compression_training": "remove it",
    "amp": "use bf16, fp16 or torch_autocast",
    "quantize_training": "remove it",
    "sparse_gradients": "remove it",
    "eigenvalue": "remove it",
    "sparse_attention": "remove it",
    "elasticity": "set the batch sizes directly",
    "graph_harvesting": "remove it",
    "curriculum_learning": "use data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": "remove it",
}
REMOVED_ZERO = {
    "mics_shard_size": "remove it (MiCS is gone)",
    "mics_hierarchical_params_gather": "remove it (MiCS is gone)",
    "zeropp_loco_param": "remove it",
}
REMOVED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb")
ZERO = frozenset(
    [
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "offload_param",
        "offload_optimizer",
        "zenflow",
        "sub_group_size",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "leaf_module",
        "enable_sanity_checks",
        "compute_grad_norm",
        "save_muon_momentum_buffer_in_memory",
        "parameter_alignment",
    ]
)
OFFLOAD = {
    "offload_param": frozenset(["device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"]),
    "offload_optimizer": frozenset(
        [
            "device",
            "nvme_path",
            "buffer_count",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "ratio",
            "cpuadam_cores_perc",
            "super_offload",
        ]
    ),
}
TENSOR_PARALLEL = frozenset(
    [
        "dtype",
        "autotp_size",
        "preset_model",
        "tp_overlap_comm",
        "partition_config",
        "injection_policy_tuple",
        "keep_module_on_host",
        "replace_with_kernel_inject",
        "vocab_parallel_lm_head",
        "vocab_parallel_ce_backend",
        "tensor_parallel",
    ]
)


@dataclass(frozen=True)
class Fault:
    """One line of a ds_config that does not do what it seems to: DeepSpeed `raises` on it or `ignores` it."""

    key: str
    effect: Literal["raises", "ignored"]
    why: str
    fix: str

    def __str__(self) -> str:
        """Return the fault as one sentence."""
        return (
            f"'{printable(self.key)}' is {'refused' if self.effect == 'raises' else 'ignored'}: {self.why}; {self.fix}"
        )


def _nearest(key: str, known: frozenset[str], fallback: str = "remove it") -> str:
    close = nearest(key[:80], known, 1)
    return f"did you mean '{close[0]}'?" if close else fallback


def _zero_faults(zero: Mapping[str, Any]) -> list[Fault]:
    faults = []
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        faults.append(
            Fault("zero_optimization.stage", "raises", f"stage {printable(stage)} does not exist", "use 0, 1, 2 or 3")
        )
        stage = 0
    for key in zero:
        if key in REMOVED_ZERO:
            faults.append(Fault(f"zero_optimization.{key}", "raises", "removed from DeepSpeed", REMOVED_ZERO[key]))
        elif key not in ZERO:
            faults.append(Fault(f"zero_optimization.{key}", "raises", "unknown key", _nearest(key, ZERO)))
    for block, known in OFFLOAD.items():
        inner = zero.get(block)
        if not isinstance(inner, Mapping):
            continue
        faults += [
            Fault(f"zero_optimization.{block}.{key}", "raises", "unknown key", _nearest(key, known))
            for key in inner
            if key not in known
        ]
        if inner.get("device") not in (None, "none") and stage < (3 if block == "offload_param" else 1):
            lowest = "3" if block == "offload_param" else "1, 2 or 3"
            faults.append(
                Fault(
                    f"zero_optimization.{block}", "ignored", f"it works with stage {lowest} only", f"set stage {lowest}"
                )
            )
    return faults


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch_faults(config: Mapping[str, Any], ranks: int) -> list[Fault]:
    """Return what DeepSpeed says of the batch sizes: it derives what is missing, rounding down, then wants the product.

    Reference: DeepSpeed 0.19.8, runtime/config.py, _set_batch_related_parameters and _batch_assertion.
    """
    given = {key: config[key] for key in BATCH_KEYS if config.get(key) not in (None, "auto")}
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return [Fault(key, "raises", f"{printable(value)} is not a whole number above 0", "use 1 or more")]
    train, micro, steps = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        either = "train_batch_size or train_micro_batch_size_per_gpu must be there"
        return [Fault("train_batch_size", "raises", either, "give train_micro_batch_size_per_gpu")]
    if train is None:
        return []
    # one factor of the batch is whole in any case: what is given, else one sequence a rank and one micro-step
    unit = ranks * (steps or 1 if micro is None else micro)
    if micro is None:
        steps = steps or 1
        micro = train // ranks // steps
    elif steps is None:
        steps = train // micro // ranks
    if micro and micro * steps * ranks == train:
        return []
    fix = f"use {micro * steps * ranks}"
    if len(given) < len(BATCH_KEYS):
        fix = f"use {max(1, train // unit) * unit}, a multiple of {unit}"
    return [Fault("train_batch_size", "raises", f"{train} is not micro x accumulation x {ranks} ranks", fix)]


def check_ds_config(config: Mapping[str, Any], *, world_size: int | None = None, tp: int = 1) -> list[Fault]:
    """Return every line of a training ds_config that DeepSpeed 0.19.8 would refuse or silently ignore, with the fix.

    Unknown top-level keys are ignored without a message; unknown keys inside the typed blocks raise. `world_size`
    also checks ``train_batch_size = micro * accumulation * world / tp``.
    """
    faults = []
    for key in config:
        if key in REMOVED:
            faults.append(Fault(key, "raises", "removed from DeepSpeed", REMOVED[key]))
        elif key == "pipeline_parallelism":
            why = "not a key; the number of stages is an argument of PipelineModule"
            faults.append(Fault(key, "ignored", why, "write PipelineModule(layers, num_stages=...) in the code"))
        elif key not in TOP_LEVEL:
            faults.append(Fault(key, "ignored", "unknown top-level key", _nearest(key, TOP_LEVEL)))
    zero = config.get("zero_optimization", {})
    stage = 0
    if isinstance(zero, Mapping):
        faults += _zero_faults(zero)
        stage = zero.get("stage", 0) if zero.get("stage", 0) in (0, 1, 2, 3) else 0
    asks_pipeline = "pipeline_parallelism" in config or (
        isinstance(config.get("pipeline"), Mapping) and bool(config["pipeline"])
    )
    if asks_pipeline and stage >= 2:
        faults.append(
            Fault(
                "zero_optimization.stage",
                "raises",
                f"the pipeline engine asserts that ZeRO-{stage} is off",
                "use stage 0 or 1 with a pipeline, or stage 3 without one",
            )
        )
    tensor = config.get("tensor_parallel")
    if isinstance(tensor, Mapping):
        for key in tensor:
            if key not in TENSOR_PARALLEL:
                fix = "use 'autotp_size'" if key == "tp_size" else _nearest(key, TENSOR_PARALLEL)
                faults.append(Fault(f"tensor_parallel.{key}", "raises", "unknown key in training", fix))

    def is_on(name: str) -> bool:
        block = config.get(name)
        return isinstance(block, Mapping) and bool(block.get("enabled"))

    if is_on("bf16") and is_on("fp16"):
        faults.append(Fault("fp16", "raises", "fp16 and bf16 cannot both be enabled", "keep one"))
    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping) and str(optimizer.get("type", "")).lower() in REMOVED_OPTIMIZERS:
        faults.append(Fault("optimizer.type", "raises", "1-bit optimizers were removed", "use AdamW"))
    if world_size is not None:
        faults += _batch_faults(config, max(1, world_size // tp))
    return faults
