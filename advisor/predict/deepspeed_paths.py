"""DeepSpeed's four inference paths as they stand: what each runs, what breaks, what fits."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from advisor.errors import UnknownName
from advisor.laws.offload import gathered_params
from advisor.predict.deepspeed_step import Rates, kv_bytes_per_token, quantised_params, weight_bytes_of
from advisor.predict.quantile import quantile
from advisor.predict.shapes import Shapes, shapes_of
from advisor.predict.traffic import draw_lengths
from advisor.schema import Backend, Breakdown, Cluster, Deployment, Model, Note, Part, Workload
from advisor.units import GB, format_bytes

ENGINE_VERSION = "0.19.8"
DEEPSPEED_BACKENDS: tuple[Backend, ...] = (
    "deepspeed-zero-inference",
    "deepspeed-autotp",
    "deepspeed-kernel-injection",
    "deepspeed-fastgen",
)
SPLITFUSE_TOKENS = 768
"""max_ragged_batch_size of DSStateManagerConfig (inference/v2/ragged/manager_configs.py)."""
FASTGEN_MAX_SEQS = 512
FASTGEN_RESERVE_BYTES = 1e9
"""memory_config {"mode": "reserve", "size": 1e9}: what FastGen leaves free after it took the rest for the cache."""
NVME_BUFFER_BYTES = 5 * 1e8 * 2
"""offload_param: buffer_count 5 of buffer_size 1e8 pinned 16-bit elements (zero/offload_config.py)."""
LAYERS_ON_GPU = 2
"""Layers whose cache is on the GPU where the rest waits in host memory: the one at work and the next, prefetched
(transformers 5.17, Cache strategies, offloading)."""
STATIC_BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Path:
    """What one inference path supports in DeepSpeed 0.19.8, and its state of maintenance."""

    families: frozenset[str]
    """model_type values that run; empty = whatever transformers runs, minus `refused_families`"""
    refused_families: frozenset[str]
    is_maintained: bool
    can_split: bool
    notes: tuple[Note, ...]
    has_server: bool = False
    has_continuous_batching: bool = False


def _note(text: str, level: str = "warning") -> Note:
    return Note(level="info" if level == "info" else "warning", text=text)


_AUTOTP_REFUSED = frozenset({"deberta", "flaubert", "fsmt", "gpt2", "led", "longformer", "xlm", "xlnet"})
PATHS: dict[Backend, Path] = {
    "deepspeed-zero-inference": Path(
        families=frozenset(),
        refused_families=frozenset(),
        is_maintained=True,
        can_split=False,
        notes=(
            _note(
                "ZeRO-Inference: every pass moves all weights to the GPU, so one token takes seconds on large models;"
                " use it only where the model does not fit in GPU memory and latency does not matter"
            ),
            _note("static batch through transformers' generate(): no continuous batching, no server", "info"),
        ),
    ),
    "deepspeed-autotp": Path(
        families=frozenset(),
        refused_families=_AUTOTP_REFUSED,
        is_maintained=True,
        can_split=True,
        notes=(
            _note(
                "init_inference without kernel injection runs the plain transformers model: no paging, no continuous"
                " batching, no server; decode is bound by the host (75-115 ms a step for a 7B, measured)"
            ),
            _note("one job is one tensor-parallel group (ranks 0..tp-1): replicas are separate jobs", "info"),
        ),
    ),
    "deepspeed-kernel-injection": Path(
        families=frozenset({"llama", "opt", "bloom", "gptj", "gpt_neo", "gpt_neox", "gpt2", "internlm"}),
        refused_families=frozenset(),
        is_maintained=False,
        can_split=True,
        notes=(
            _note(
                "kernel injection fails on transformers 5 as normally used ('tuple' object has no attribute 'size');"
                " measured with return_tuple=False, use_cache=False; pin transformers 4 or use that workaround"
            ),
            _note("fp16 only in our test; wrong results with left padding (DeepSpeed issue 3960): give equal prompts"),
        ),
    ),
    "deepspeed-fastgen": Path(
        families=frozenset(
            {"opt", "llama", "mistral", "mixtral", "falcon", "phi", "phi3", "qwen", "qwen2", "qwen2_moe", "exaone4"}
        ),
        refused_families=frozenset(),
        has_server=True,
        has_continuous_batching=True,
        is_maintained=False,
        can_split=True,
        notes=(
            _note(
                "FastGen/MII: last release 0.3.3, kernels of October 2023 (sm_80 to sm_90). Its engine runs on"
                " DeepSpeed 0.19.8 with transformers 5 (our H100 steps) when called as MII does; put() with its default"
                " do_checks=True fails in can_schedule: treat it as unmaintained"
            ),
            _note(
                "no CUDA graphs, no prefix cache, no quantised cache; steps measured on our H100, MII's loop and tensor"
                " parallelism from published runs"
            ),
        ),
    ),
}
FASTGEN_HEAD_SIZES = (64, 80, 96, 128)
FASTGEN_GQA_RATIOS = (1, 2, 4, 5, 6, 7, 8, 16, 29, 35, 36, 71)


def path_of(backend: str) -> Path:
    """Return the path's support table, or raise UnknownName for a backend that is not DeepSpeed's."""
    for name, path in PATHS.items():
        if name == backend:
            return path
    raise UnknownName("DeepSpeed backend", backend, DEEPSPEED_BACKENDS)


def peak_lengths(workload: Workload, max_model_len: int) -> tuple[int, int]:
    """Return the 99 % quantiles of prompt and output tokens, what a padded static batch must hold."""
    prompts, outputs = draw_lengths(workload.lengths, 2000, np.random.default_rng(0))
    prompt = min(int(quantile(np.sort(prompts), 0.99)), max_model_len)
    return prompt, min(int(quantile(np.sort(outputs), 0.99)), max(1, max_model_len - prompt))


def memory_breakdown(
    shapes: Shapes, cluster: Cluster, deployment: Deployment, rates: Rates, peak_tokens: tuple[int, int]
) -> Breakdown:
    """Return the bytes of one GPU by purpose at the peak of a pass."""
    d, tp = deployment, deployment.tp
    prompt, output = peak_tokens
    batch = max(1, d.static_batch)
    matrices = weight_bytes_of(shapes, d.weight_dtype)
    token = kv_bytes_per_token(shapes, tp)
    kv = batch * (prompt + output) * token
    activation = rates["eager_activation_bytes_per_token_dim"] * shapes.d_model * batch * prompt
    if d.kv_offload == "cpu":
        # without a cache that outweighs it, the MLP of a prompt pass is the peak: gate, up and product, four widths
        activation = max(activation, 2.0 * batch * prompt * (3 * shapes.d_ff + 4 * shapes.d_model))
    context = Part(name="context", value=rates["context_bytes"], why="CUDA context and libraries outside torch")
    replicated = shapes.embedding_params * 2
    split = Part(
        name="weights",
        value=(matrices - replicated) / tp + replicated,
        why="linear layers split by tensor parallelism, the embedding on every rank",
    )
    parts: list[Part]
    if d.backend == "deepspeed-fastgen":
        taken = split.value + context.value + FASTGEN_RESERVE_BYTES
        pool = max(0.0, cluster.gpu.device_memory_bytes - taken)
        work = 12 * SPLITFUSE_TOKENS * shapes.d_model * 2 / tp
        parts = [
            split,
            Part(name="kv_cache", value=pool, why="all free memory but 1 GB (memory_config reserve)"),
            Part(name="activations", value=min(work, FASTGEN_RESERVE_BYTES), why="one ragged batch of 768 tokens"),
            context,
        ]
    elif d.backend == "deepspeed-kernel-injection":
        parts = [
            Part(name="weights", value=split.value * rates["inject_weight_frac"], why="with the injected copies"),
            Part(name="kv_cache", value=kv, why="contiguous workspace at max_out_tokens"),
            Part(name="workspace", value=kv * (rates["inject_workspace_frac"] - 1), why="kernels' temporary space"),
            Part(name="activations", value=activation, why="one padded prompt pass"),
            context,
        ]
    else:
        weights: list[Part] = [split]
        if d.backend == "deepspeed-zero-inference":
            layer = (shapes.matrix_params + shapes.expert_params) // shapes.n_layers
            largest = max(shapes.head_params, layer)
            # ZeRO-3 counts elements of 16 bits, packed weights too
            live = 2.0 * float(gathered_params(matrices / 2, largest)) if d.offload != "none" or d.dp > 1 else 0.0
            if d.dp > 1:
                live += 2.0 * largest  # a gather's flat buffer, beside the parameters that it is copied to
            if d.weight_dtype == "int4":
                live += 2.0 * layer  # matrices at work, unpacked
            if d.kv_offload == "cpu":
                kv *= LAYERS_ON_GPU / shapes.n_layers
            kept = matrices / d.dp if d.offload == "none" else 0.0
            place = {"none": "", "cpu": "in host memory: ", "nvme": "on NVMe drives: "}[d.offload]
            weights = [
                Part(name="weights", value=kept, why=f"{place}this rank's share of the weights"),
                Part(name="live_parameters", value=live, why="gathered for the layers at work (ZeRO-3 defaults)"),
            ]
        layers = "" if d.kv_offload == "none" else f" of {LAYERS_ON_GPU} layers, the others' is in host memory"
        parts = [
            *weights,
            Part(name="kv_cache", value=kv, why=f"contiguous, padded to the longest prompt of the batch{layers}"),
            Part(name="kv_copies", value=kv * rates["eager_kv_copy_frac"], why="each step concatenates the cache anew"),
            Part(name="activations", value=activation, why="one padded prompt pass"),
            context,
        ]
    return Breakdown(name="memory_bytes_per_gpu", unit="bytes", total=sum(p.value for p in parts), parts=tuple(parts))


def host_bytes_per_gpu(
    shapes: Shapes, cluster: Cluster, deployment: Deployment, rates: Rates, peak_tokens: tuple[int, int]
) -> float:
    """Return host memory that one GPU's process needs for offloaded weights and an offloaded cache.

    Weights are packed after they have come as 16 bits, and torch keeps pinned memory that it once had: both are there.
    """
    d, cache = deployment, 0.0
    if d.kv_offload == "cpu":
        # keys and values of a layer are two pinned tensors (one of latent vectors), rounded up to a power of two
        n_tensors = 1 if shapes.is_mla else 2
        whole = max(1, d.static_batch) * sum(peak_tokens) * kv_bytes_per_token(shapes, d.tp)
        cache = n_tensors * shapes.n_layers * 2.0 ** np.ceil(np.log2(whole / n_tensors / shapes.n_layers))
    if d.offload == "cpu":
        weights = weight_bytes_of(shapes, d.weight_dtype)
        if d.weight_dtype == "int4":
            weights += 2.0 * quantised_params(shapes)
        return cache + weights * rates["host_pinned_frac"] / d.dp
    return cache + (NVME_BUFFER_BYTES if d.offload == "nvme" else 0.0)


def _unsupported(model: Model, cluster: Cluster, d: Deployment) -> tuple[str, str] | None:
    path = path_of(d.backend)
    if path.families and model.family not in path.families:
        known = ", ".join(sorted(path.families))
        return f"{d.backend} has no policy for model type '{model.family}'", f"it runs {known}"
    if model.family in path.refused_families:
        return f"AutoTP refuses model type '{model.family}'", "use tp 1 or another model"
    if model.mla is not None and d.backend in ("deepspeed-kernel-injection", "deepspeed-fastgen"):
        return f"{d.backend} has no latent attention", "deepspeed-autotp or vllm"
    if d.weight_dtype not in ("bf16", "fp16") and (d.weight_dtype, d.backend) != ("int4", "deepspeed-zero-inference"):
        return f"{d.backend} does not load {d.weight_dtype} checkpoints", "bf16 or fp16"
    if d.kv_offload != "none" and d.backend != "deepspeed-zero-inference":
        return f"{d.backend} keeps its cache on the GPU", "kv_offload none, or deepspeed-zero-inference"
    if d.weight_dtype == "bf16" and "bf16" not in cluster.gpu.peak_flops_per_s:
        return f"{cluster.gpu.label} has no bf16", "fp16"
    if model.quantization is not None:
        return f"{d.backend} does not load {model.quantization.method} checkpoints", "the 16-bit checkpoint"
    if d.kv_dtype == "fp8":
        return f"{d.backend} keeps its cache in 16 bits", "kv_dtype bf16"
    if d.pp != 1:
        return f"{d.backend} has no pipeline parallelism", "pp 1"
    if d.backend == "deepspeed-kernel-injection":
        if model.n_kv_heads != model.n_heads:
            return "kernel injection has no grouped-query attention", f"n_kv_heads {model.n_heads} (multi-head models)"
        if cluster.gpu.vendor != "nvidia":
            return "kernel injection is CUDA only", "an NVIDIA GPU"
    if d.backend == "deepspeed-fastgen":
        if model.rope_scaling:
            return f"FastGen refuses scaled RoPE ('{model.rope_scaling}')", "a model without rope_scaling"
        if model.d_head not in FASTGEN_HEAD_SIZES:
            return f"FastGen has no kernel for head size {model.d_head}", f"one of {FASTGEN_HEAD_SIZES}"
        if model.n_heads // model.n_kv_heads not in FASTGEN_GQA_RATIOS:
            ratio = model.n_heads // model.n_kv_heads
            return f"FastGen has no rotary kernel for {ratio} query heads a KV head", f"one of {FASTGEN_GQA_RATIOS}"
        major = float(cluster.gpu.compute_capability or 0)
        if cluster.gpu.vendor != "nvidia" or major < 8.0:
            return (
                f"FastGen's kernels are built for sm_80 to sm_90, not {cluster.gpu.label}",
                "A100, A10, L4, L40S, H100",
            )
    return None


def _split_fault(model: Model, cluster: Cluster, d: Deployment) -> tuple[str, str] | None:
    if d.tp > 1 and not path_of(d.backend).can_split:
        return f"{d.backend} does not split a layer", "tp 1; its ranks (dp) share the weights"
    if model.n_kv_heads % d.tp or model.n_heads % d.tp:
        legal = [t for t in range(1, model.n_kv_heads + 1) if model.n_kv_heads % t == 0 and t <= cluster.gpus_per_node]
        return f"tp {d.tp} does not divide {model.n_kv_heads} KV heads", f"tp {legal[-1]}"
    if d.tp > cluster.gpus_per_node:
        return f"tp {d.tp} spans nodes of {cluster.gpus_per_node} GPUs", f"tp {cluster.gpus_per_node}"
    if d.n_gpus > cluster.n_gpus:
        return f"{d.n_gpus} GPUs asked, {cluster.n_gpus} there", f"dp {max(1, cluster.n_gpus // d.tp)}"
    return None


def _short_of_room(
    shapes: Shapes, cluster: Cluster, d: Deployment, rates: Rates, peak_tokens: tuple[int, int]
) -> tuple[str, str] | None:
    """Return (reason, what would fit) where offloaded weights or cache find no room on the host or on its drives."""
    host, room = host_bytes_per_gpu(shapes, cluster, d, rates, peak_tokens), cluster.host_memory_bytes_per_gpu
    if host > room and d.kv_offload == "cpu" and d.static_batch > 1:

        def needed(batch: int) -> float:
            asked = d.model_copy(update={"static_batch": batch})
            return host_bytes_per_gpu(shapes, cluster, asked, rates, peak_tokens)

        # the need grows with the batch in steps, so the largest that fits is where it first exceeds the room
        fits = bisect_right(range(1, d.static_batch), room, key=needed)
        if fits >= 1:
            return (
                f"weights and cache of a batch of {d.static_batch} need {format_bytes(host)} of host memory a GPU,"
                f" {format_bytes(room)} is there",
                f"static batch {fits}",
            )
    if host > room:
        reason = f"offload needs {format_bytes(host)} of host memory a GPU, {format_bytes(room)} is there"
        ways = [f"{format_bytes(host)} of host memory a GPU"]
        if d.offload == "cpu":
            ways += [f"{int(np.ceil(host * d.dp / room))} GPUs"] if room >= GB else []
            ways.append("offload nvme")
        return reason, " or ".join(ways)
    if d.offload != "nvme":
        return None
    if cluster.nvme_bytes_per_s <= 0:
        return "offload nvme without NVMe drives (nvme_bytes_per_s is 0)", "offload cpu"
    weights = weight_bytes_of(shapes, d.weight_dtype)
    if weights > cluster.nvme_bytes:
        return (
            f"the weights take {format_bytes(weights)} of a node's NVMe drives, {format_bytes(cluster.nvme_bytes)} is"
            " there",
            f"{format_bytes(weights)} of drives a node",
        )
    return None


def feasible_with(
    model: Model, cluster: Cluster, deployment: Deployment, rates: Rates, peak_tokens: tuple[int, int]
) -> tuple[str, str] | None:
    """Return why a deployment cannot run and the nearest number that would, or None when it can."""
    fault = _unsupported(model, cluster, deployment) or _split_fault(model, cluster, deployment)
    if fault:
        return fault
    d, shapes, gpu = deployment, shapes_of(model), cluster.gpu
    if sum(peak_tokens) > model.max_context_tokens:
        return (
            f"{sum(peak_tokens)} tokens exceed the model's context of {model.max_context_tokens}",
            f"prompts and outputs of {model.max_context_tokens} together",
        )
    short = _short_of_room(shapes, cluster, d, rates, peak_tokens)
    if short:
        return short
    breakdown = memory_breakdown(shapes, cluster, d, rates, peak_tokens)
    if d.backend == "deepspeed-fastgen":
        pool = next(p.value for p in breakdown.parts if p.name == "kv_cache")
        need = sum(peak_tokens) * kv_bytes_per_token(shapes, d.tp)
        if pool >= need:
            return None
        fixed = sum(p.value for p in breakdown.parts if p.name != "kv_cache") + need
    else:
        if breakdown.total <= gpu.device_memory_bytes:
            return None
        per_seq = sum(p.value for p in breakdown.parts if p.name.startswith(("kv", "activ", "worksp"))) / max(
            1, d.static_batch
        )
        fixed = breakdown.total - per_seq * max(1, d.static_batch)
        room = int((gpu.device_memory_bytes - fixed) / per_seq)
        if room >= 1:
            return (
                f"a static batch of {d.static_batch} needs {format_bytes(breakdown.total)} a GPU,"
                f" {format_bytes(gpu.device_memory_bytes)} is there",
                f"static batch {room}",
            )
    need_text = (
        f"needs {format_bytes(max(fixed, breakdown.total))} a GPU, {format_bytes(gpu.device_memory_bytes)} is there"
    )
    if path_of(d.backend).can_split:
        for tp in range(d.tp + 1, cluster.gpus_per_node + 1):
            if model.n_kv_heads % tp == 0:
                larger = d.model_copy(update={"tp": tp, "dp": 1, "static_batch": min(1, d.static_batch)})
                if memory_breakdown(shapes, cluster, larger, rates, peak_tokens).total <= gpu.device_memory_bytes:
                    return need_text, f"tp {tp}"
        return need_text, "deepspeed-zero-inference with offload cpu"
    return need_text, "offload cpu" if d.offload == "none" else f"{format_bytes(fixed + GB)} of GPU memory"
