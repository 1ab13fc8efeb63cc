"""Every legal vLLM deployment of a model on a cluster: parallel degrees, formats, engine settings, replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from advisor.emit.vllm import BF16_MIN_CAPABILITY, is_stored_as
from advisor.predict.shapes import weight_dtype_of
from advisor.schema import Cluster, Deployment, EngineFacts, Gpu, KvDtype, Model, WeightDtype
from advisor.schema.engine import version_key

MAX_PP = 16
"""Deepest pipeline that is searched: every stage adds a hand-over to each token, and one model runs in 16 nodes."""
DENSE_DP = 32
"""Up to here every number of replicas is searched, beyond it steps of about 10 %."""
BATCHED_TOKENS = (2048, 4096, 16384)
SEQUENCES = (64, 512, 1024)
"""Engine settings tried beside the release's own defaults."""
_BITS = {"fp8": "fp8", "awq-int4": "awq", "gptq-int4": "gptq", "mxfp4": "mxfp4"}


@dataclass(frozen=True)
class Layout:
    """How one replica spreads over GPUs, and how many such replicas the cluster holds."""

    tp: int
    pp: int
    n_nodes: int
    max_dp: int


def legal_tp(model: Model, cluster: Cluster) -> list[int]:
    """Return the tensor-parallel degrees that divide the heads and stay within a node.

    KV heads are split, or copied when there are fewer than ranks, so one must divide the other (vLLM
    QKVParallelLinear); the MLP's width must divide too.
    """
    degrees = []
    for tp in range(1, min(cluster.gpus_per_node, model.n_heads) + 1):
        kv_fits = model.mla is not None or model.n_kv_heads % tp == 0 or tp % model.n_kv_heads == 0
        width = model.moe.d_ff_expert if model.moe else model.d_ff
        if model.n_heads % tp == 0 and kv_fits and width % tp == 0:
            degrees.append(tp)
    return degrees


def layouts(model: Model, cluster: Cluster) -> Iterator[Layout]:
    """Yield every legal layout of one replica; a tensor-parallel group never leaves its node, stages may.

    Of several nodes each holds as many stages: vLLM's launcher wants as many ranks on every node, and an uneven number
    would tear a tensor-parallel group apart.
    Experts are split like the other matrices: no run of ours tells what whole experts a GPU (EP) cost in messages.
    """
    per_node = cluster.gpus_per_node
    for tp in legal_tp(model, cluster):
        stages_per_node = per_node // tp
        for pp in range(1, min(MAX_PP, model.n_layers, stages_per_node * cluster.n_nodes) + 1):
            n_nodes = math.ceil(pp / stages_per_node)
            if pp % n_nodes:
                continue
            max_dp = cluster.n_nodes * (per_node // (tp * pp)) if n_nodes == 1 else cluster.n_nodes // n_nodes
            yield Layout(tp, pp, n_nodes, max_dp)


MOST_GPUS = 1024
"""Largest cluster that is looked at for what would do where the GPUs at hand do not."""


def doublings(cluster: Cluster, most: int) -> Iterator[Cluster]:
    """Yield clusters of twice, four times ... as many GPUs, up to `most`: nodes are filled before they are added."""
    while cluster.n_gpus * 2 <= most:
        if cluster.n_nodes == 1 and cluster.gpus_per_node * 2 <= cluster.gpu.max_gpus_per_node:
            cluster = cluster.model_copy(update={"gpus_per_node": cluster.gpus_per_node * 2})
        else:
            cluster = cluster.model_copy(update={"n_nodes": cluster.n_nodes * 2})
        yield cluster


def replicas(max_dp: int) -> list[int]:
    """Return the numbers of replicas to try, up to `max_dp`: all small ones, then steps of about a tenth.

    >>> replicas(40)[-3:]
    [32, 36, 40]
    """
    found = list(range(1, min(max_dp, DENSE_DP) + 1))
    while found[-1] < max_dp:
        found.append(min(max_dp, max(found[-1] + 1, math.ceil(found[-1] * 1.1))))
    return found


def weight_dtypes(model: Model, gpu: Gpu, allowed: tuple[WeightDtype, ...]) -> list[WeightDtype]:
    """Return the weight formats to search: the allowed ones, else the checkpoint's own as far as the card computes it.

    A card without bfloat16 runs a bfloat16 checkpoint in float16, as vLLM does with `--dtype half`.
    """
    if allowed:
        return list(dict.fromkeys(allowed))
    own = weight_dtype_of(model)
    if own == "bf16" and not has_bf16(gpu):
        return ["fp16"]
    return [d for d in ("bf16", "fp16", "fp8", "awq-int4", "gptq-int4", "mxfp4", "int8") if d == own]


def has_bf16(gpu: Gpu) -> bool:
    """Return whether the card computes bfloat16 (NVIDIA: compute capability 8.0)."""
    if gpu.vendor == "nvidia" and gpu.compute_capability:
        return version_key(gpu.compute_capability) >= version_key(BF16_MIN_CAPABILITY)
    return "bf16" in gpu.peak_flops_per_s


def kv_dtype_for(weight_dtype: str, model: Model, gpu: Gpu) -> KvDtype:
    """Return the cache format that the engine uses by default: the computing format."""
    is_half = weight_dtype == "fp16" or (weight_dtype != "bf16" and model.native_dtype == "fp16") or not has_bf16(gpu)
    return "fp16" if is_half else "bf16"


def format_fault(
    model: Model, gpu: Gpu, weight_dtype: str, kv_dtype: str, facts: EngineFacts
) -> tuple[str, str] | None:
    """Return (reason, nearest) when a card or checkpoint cannot run in these formats, None when it can."""
    if gpu.vendor == "nvidia" and gpu.compute_capability:
        capability = version_key(gpu.compute_capability)
        if capability < version_key(facts.min_compute_capability):
            return (
                f"vLLM {facts.version} is built for compute capability {facts.min_compute_capability} and newer,"
                f" {gpu.label} has {gpu.compute_capability}",
                "an older release: --engine-version 0.18.1 (CUDA 12.9, compute capability 7.0)"
                if capability >= (7, 0)
                else "a card of the Turing generation or newer",
            )
        least = facts.quantization_min_capability.get(_BITS.get(weight_dtype, ""))
        if least and capability < version_key(least):
            reason = f"{weight_dtype} weights need compute capability {least}, {gpu.label} has {gpu.compute_capability}"
            if model.quantization is not None and weight_dtype == weight_dtype_of(model):
                # the checkpoint has no other format, so only another card helps
                return reason, f"a card of compute capability {least} or newer"
            return reason, f"--weight-dtype {'bf16' if has_bf16(gpu) else 'fp16'}"
    if weight_dtype == "int4":
        return "int4 is the format of DeepSpeed's weight_quantization, vLLM does not read it", "--weight-dtype awq-int4"
    if weight_dtype == "bf16" and not has_bf16(gpu):
        return f"{gpu.label} does not compute bf16", "--weight-dtype fp16"
    if weight_dtype in ("bf16", "fp16") and model.quantization is not None:
        own = weight_dtype_of(model)
        return f"{model.name} is published as {own}; no {weight_dtype} checkpoint is assumed", f"--weight-dtype {own}"
    if weight_dtype in ("fp8", "int8") and weight_dtype not in gpu.peak_flops_per_s:
        alternatives = "an Ada, Hopper, Blackwell or CDNA3 card, or awq-int4"
        return f"{gpu.label} has no {weight_dtype} matrix units and weight-only kernels are not modelled", alternatives
    if weight_dtype == "mxfp4" and not is_stored_as(model, "mxfp4"):
        return f"{model.name} is not published as mxfp4", "--weight-dtype awq-int4 or fp8"
    if kv_dtype == "fp8" and "fp8" not in gpu.peak_flops_per_s:
        return f"{gpu.label} has no fp8 units for an fp8 KV cache", f"--kv-dtype {'bf16' if has_bf16(gpu) else 'fp16'}"
    return None


def engine_settings(gpu: Gpu, facts: EngineFacts, max_model_len: int) -> list[tuple[int, int]]:
    """Return (max_num_seqs, max_num_batched_tokens) to try, the release's own defaults for the card first."""
    card = (gpu.device_memory_bytes, f"{gpu.label} {gpu.name}")
    capability = gpu.compute_capability
    tokens = facts.max_num_batched_tokens_default(*card, compute_capability=capability, max_model_len=max_model_len)
    seqs = facts.max_num_seqs_default(*card, compute_capability=capability, max_num_batched_tokens=tokens)
    found = [(seqs, tokens), *((seqs, t) for t in BATCHED_TOKENS), *((s, tokens) for s in SEQUENCES)]
    return list(dict.fromkeys((s, t) for s, t in found if s <= t))


def base_deployment(model: Model, gpu: Gpu, facts: EngineFacts, *, max_model_len: int) -> Deployment:
    """Return one GPU's deployment with the release's defaults for the card; the search varies it."""
    seqs, tokens = engine_settings(gpu, facts, max_model_len)[0]
    weight = weight_dtypes(model, gpu, ())[0]
    return Deployment(
        backend="vllm",
        engine_version=facts.version,
        model=model.name,
        gpu=gpu.name,
        weight_dtype=weight,
        kv_dtype=kv_dtype_for(weight, model, gpu),
        max_model_len=max_model_len,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        gpu_memory_utilization=facts.gpu_memory_utilization,
        prefix_caching=facts.prefix_caching,
        kv_block_tokens=facts.kv_block_tokens,
    )
