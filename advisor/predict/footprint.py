"""Memory of one GPU of a vLLM deployment: what start-up takes and how many KV blocks are left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.laws.kv import blocks_for, kv_heads_per_rank, n_kv_blocks
from advisor.laws.memory import expert_peak_bytes, forward_peak_bytes, graph_bytes, head_peak_bytes
from advisor.laws.roofline import larger_of
from advisor.predict.shapes import BYTES_PER_KV, BYTES_PER_WEIGHT, Shapes, shapes_of, stage_layers
from advisor.schema import Breakdown, Deployment, EngineFacts, Gpu, Model, Part
from advisor.units import MIB, format_bytes

Real = Any  # float or array, as in `advisor.predict.step`

NON_TORCH_BYTES = 241e6
"""CUDA context growth during profiling, one GPU: start-up of runs vllm-0.26.0 1b, 8b, 14b, 32b (0.236-0.241 GB)."""

NON_TORCH_GROUP_BYTES = 70e6
"""The same with tensor or pipeline parallelism, where NCCL starts before the profile: 70b-tp4, 32b-tp2, 14b-pp2."""

GRAPH_BYTES_PER_LAYER_SIZE = 0.42e6
"""CUDA graph memory a layer and captured size: mean of our starts (0.36 to 0.49 MB)."""

ESTIMATED_BYTES_PER_LAYER_SIZE = 0.23e6
"""What the engine itself estimates before it sizes the cache, where it counts graphs: 0.39 and 0.42 GB for 32 layers
(mixtral-tp2, mixtral-bf16), 0.53 and 0.57 GB for 48 (30b-a3b-bf16, 30b-a3b-tp2), 51 sizes."""

LATENT_GRAPH_FACTOR, LATENT_ESTIMATE_FACTOR = 1.5, 2.3
"""Graphs of latent attention over others' (deepseek-v2-lite 0.96 GB, moonlight-16b-a3b 0.81, where 0.58 are said), and
what vLLM takes off the cache for them (moonlight-16b-a3b on two hosts 0.74 GB for 0.32)."""
MXFP4_GRAPH_FACTOR = 2.0
"""How much more it estimates for MXFP4 experts: 0.57 GB for 24 layers (gpt-oss-20b, twice)."""

MXFP4_TILE = 256
"""Rows and columns to which Hopper's layout of MXFP4 experts is padded: weights of gpt-oss-20b take 13.99 GB, 12.84
without padding, 13.92 with it."""

ROUND_BYTES = 2 * MIB
SMALL_TENSOR_BYTES = 10 * MIB

DEFAULT_GRAPHS = 51
"""Captured sizes of a start with 256 sequences, where the engine's facts are not given."""

MOST_CAPTURED = 1024
"""No release captures larger batches by default, so a larger token budget changes nothing."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest GPU of a replica, and the cache that one replica can hold."""

    weights_bytes: float
    activation_bytes: float
    non_torch_bytes: float
    graph_bytes: float
    counted_graph_bytes: float
    kv_block_bytes: float
    n_kv_blocks: int
    kv_cache_tokens: int
    budget_bytes: float
    device_bytes: float
    is_ok: bool
    reason: str = ""
    nearest: str = ""

    @property
    def kv_pool_bytes(self) -> float:
        """Return the bytes of all KV blocks."""
        return self.n_kv_blocks * self.kv_block_bytes

    @property
    def used_bytes(self) -> float:
        """Return what the engine occupies in all, CUDA graphs included."""
        return self.weights_bytes + self.activation_bytes + self.non_torch_bytes + self.graph_bytes + self.kv_pool_bytes

    def breakdown(self) -> Breakdown:
        """Return the parts of `device_bytes`, the free rest among them."""
        parts = (
            Part(name="weights", value=self.weights_bytes, why="exact parameter count, split over ranks"),
            Part(name="activations", value=self.activation_bytes, why="peak of a full batch"),
            Part(name="CUDA context", value=self.non_torch_bytes, why="measured at start-up"),
            Part(name="CUDA graphs", value=self.graph_bytes, why="captured batch sizes, outside the budget"),
            Part(name="KV cache", value=self.kv_pool_bytes, why=f"{self.n_kv_blocks} blocks"),
            Part(name="free", value=self.device_bytes - self.used_bytes, why="not given to the engine"),
        )
        return Breakdown(name="memory per GPU", unit="bytes", total=self.device_bytes, parts=parts)


def expert_ranks(deployment: Deployment) -> int:
    """Return over how many ranks the experts are spread."""
    return max(deployment.tp, min(deployment.ep, deployment.tp * deployment.dp))


def weights_bytes_per_gpu(model: Model, deployment: Deployment) -> float:
    """Return the weights on the fullest rank [bytes]: matrices in the plan's format, the rest in 16 bit."""
    s = shapes_of(model)
    tp, pp = deployment.tp, deployment.pp
    per_weight = BYTES_PER_WEIGHT[deployment.weight_dtype]
    layers = stage_layers(s.n_layers, pp)
    kv_copies = tp * int(kv_heads_per_rank(s.n_kv_heads, tp)) / s.n_kv_heads if not s.is_mla else 1.0
    kv_frac = 0.0 if s.is_mla else 2 * s.n_kv_heads / (2 * s.n_kv_heads + 2 * s.n_heads)
    attention = s.attention_matrix_params * (1.0 + kv_frac * (kv_copies - 1.0)) / tp
    experts = s.all_expert_params / expert_ranks(deployment)
    if deployment.weight_dtype == "mxfp4":
        experts *= mxfp4_padding(s)
    mlp, qkv_frac = s.mlp_matrix_params / tp, 1.0 - s.n_heads / (2 * s.n_heads + 2 * s.n_kv_heads)
    n_dense = s.n_layers - s.n_moe_layers or s.n_layers
    is_packed = deployment.weight_dtype in ("awq-int4", "gptq-int4")  # kernels lay them out anew in other sizes
    matrices = sum(
        params * per_weight if is_packed else allocated_bytes(params * per_weight, n)
        for params, n in (
            (attention * qkv_frac, s.n_layers),
            (attention * (1.0 - qkv_frac), s.n_layers),
            (mlp * (1.0 - s.down_frac), n_dense),
            (mlp * s.down_frac, n_dense),
            (experts * (1.0 - s.down_frac), s.n_moe_layers),
            (experts * s.down_frac, s.n_moe_layers),
        )
    )
    matrices += (s.router_params + s.other_params) * 2.0
    table = 2.0 * s.padded_vocab(tp) * s.d_model / tp
    rest = s.rotary_bytes + 2.0 * s.position_params
    everywhere = table if s.embeds_on_every_stage else 0.0
    head = table if s.has_own_head or (pp > 1 and not everywhere) else 0.0
    stages = [matrices * n / s.n_layers + everywhere for n in layers]
    stages[0] += table - everywhere + 2.0 * s.position_params
    stages[-1] += head
    return max(stages) + rest - 2.0 * s.position_params


def allocated_bytes(n_bytes: float, n_tensors: int) -> float:
    """Return the memory of `n_tensors` equal tensors: PyTorch's allocator gives out large ones in whole 2 MiB.

    Reference: PyTorch 2.11, c10/core/AllocatorConfig.h (kRoundLarge, for more than 10 MiB); start-ups of qwen3-4b,
    phi-4-14b and gemma-3-12b, whose weights take 0.05 to 0.24 GB more than their parameters.
    """
    if not n_tensors or n_bytes / n_tensors <= SMALL_TENSOR_BYTES:
        return n_bytes
    return math.ceil(n_bytes / n_tensors / ROUND_BYTES - 1e-6) * ROUND_BYTES * n_tensors


def mxfp4_padding(shapes: Shapes) -> float:
    """Return by how much kernels for MXFP4 experts pad their weights, >= 1: rows and columns to whole `MXFP4_TILE`."""
    if not shapes.n_experts:
        return 1.0
    d_model = shapes.d_model
    d_expert = shapes.expert_params // (3 * d_model)
    gate_up, down = (-(-width // MXFP4_TILE) * MXFP4_TILE for width in (2 * d_expert, d_expert))
    return (gate_up + down) * (-(-d_model // MXFP4_TILE) * MXFP4_TILE) / (3.0 * d_expert * d_model)


def block_bytes_per_gpu(model: Model, deployment: Deployment) -> float:
    """Return the bytes of one KV block on the rank with the most layers of a group; windows do not shrink a block."""
    s = shapes_of(model)
    elements: float = s.kv_elements_per_token_layer
    if not s.is_mla:
        elements = elements / s.n_kv_heads * int(kv_heads_per_rank(s.n_kv_heads, deployment.tp))
    n_layers = max(stage_layers(s.kv_groups.n_layers, deployment.pp))
    return elements * BYTES_PER_KV[deployment.kv_dtype] * n_layers * deployment.kv_block_tokens


def blocks_of_longest(model: Model, deployment: Deployment) -> int:
    """Return the KV blocks that a start-up sets aside for one sequence of the longest context: it must have as many.

    A table of sliding layers holds its window and what may be in flight. Reference: vLLM 0.26.0,
    v1/kv_cache_interface.py ``SlidingWindowSpec.max_admission_blocks_per_request``.
    """
    s, size, longest = shapes_of(model), deployment.kv_block_tokens, deployment.max_model_len
    groups, n_in_flight = s.kv_groups, 2 if deployment.pp == 1 else deployment.pp + 1
    sliding = min(s.sliding_window_tokens - 1 + n_in_flight * deployment.max_num_batched_tokens, longest)
    per_sliding = int(blocks_for(sliding, size)) + 1 if groups.n_sliding else 0
    return groups.n_full * int(blocks_for(longest, size)) + groups.n_sliding * per_sliding


def cache_tokens(model: Model, deployment: Deployment, n_blocks: int) -> int:
    """Return the tokens that an engine with so many blocks says it can cache.

    With sliding windows that is the longest context times how many of it fit (vLLM's "GPU KV cache size").
    """
    if not shapes_of(model).kv_groups.n_sliding:
        return n_blocks * deployment.kv_block_tokens
    return int(n_blocks / blocks_of_longest(model, deployment) * deployment.max_model_len)


def activation_bytes(shapes: Shapes, tp: int, n_tokens: Real, *, is_eager: bool = False) -> Real:
    """Return the activation peak of a full batch of `n_tokens` on one rank [bytes]; numbers or arrays."""
    d_model = shapes.d_model
    peak = forward_peak_bytes(n_tokens, d_model, shapes.d_ff / tp, is_gated=shapes.has_gate)
    if shapes.n_experts:
        d_expert = shapes.expert_params / (3 * d_model * tp)
        peak = larger_of(peak, expert_peak_bytes(n_tokens, d_model, d_expert, shapes.n_experts_per_token))
    if shapes.is_mla:
        # a query of each head and its form in latent space: 0.20 GB of 16 heads and 8,192 tokens, where the peak of
        # DeepSeek-V2-Lite is 0.18 and that of Moonlight 0.22 GB higher than without it
        elements = shapes.d_head + shapes.kv_elements_per_token_layer
        peak = peak + n_tokens * (2.0 * shapes.n_heads / tp * elements)
    if is_eager:
        return peak
    return larger_of(peak, head_peak_bytes(n_tokens, d_model, 2.0 * shapes.padded_vocab(tp) * d_model / tp))


def non_torch_bytes(deployment: Deployment) -> float:
    """Return what the CUDA context grows by while the engine profiles itself [bytes]."""
    return NON_TORCH_BYTES if deployment.tp * deployment.pp == 1 else NON_TORCH_GROUP_BYTES


def captured_bytes(model: Model, deployment: Deployment, facts: EngineFacts | None) -> tuple[float, float]:
    """Return the memory of CUDA graphs and the part of it that the engine takes off the KV pool [bytes]."""
    if deployment.enforce_eager:
        return 0.0, 0.0
    n_graphs = DEFAULT_GRAPHS
    if facts is not None:
        n_graphs = len(facts.graph_capture_sizes(deployment.max_num_seqs, deployment.max_num_batched_tokens))
    n_layers = float(max(stage_layers(model.n_layers, deployment.pp)))
    graphs = float(graph_bytes(n_layers, n_graphs, GRAPH_BYTES_PER_LAYER_SIZE))
    is_counted = facts is not None and facts.subtracts_graph_memory(
        architecture=model.architecture, is_moe=model.moe is not None, is_quantized=deployment.weight_dtype != "bf16"
    )
    estimate = graph_bytes(n_layers, n_graphs, ESTIMATED_BYTES_PER_LAYER_SIZE)
    if deployment.weight_dtype == "mxfp4":
        estimate *= MXFP4_GRAPH_FACTOR
    if model.mla is not None:
        graphs, estimate = graphs * LATENT_GRAPH_FACTOR, estimate * LATENT_ESTIMATE_FACTOR
    return graphs, estimate if is_counted else 0.0


def kv_cache_tokens(
    model: Model,
    gpu: Gpu,
    deployments: Sequence[Deployment],
    facts: EngineFacts | None = None,
    held_tokens: float = 0.0,
) -> NDArray[np.float64]:
    """Return the tokens that one replica's KV blocks hold for many deployments at once; what repeats is done once.

    held_tokens : of a sequence; beyond a window its tables of windowed layers hold no more. 0 = none has passed one
    """
    fixed: dict[tuple[object, ...], int] = {}
    counted: dict[tuple[object, ...], int] = {}
    per_plan: list[tuple[float, float, float]] = []
    graphs: list[float] = []
    where, which = [], []
    for d in deployments:
        key = (d.tp, d.pp, d.weight_dtype, d.kv_dtype, d.tp if d.ep == 1 else expert_ranks(d), d.kv_block_tokens)
        at = fixed.setdefault(key, len(fixed))
        if at == len(per_plan):
            per_plan.append((weights_bytes_per_gpu(model, d), block_bytes_per_gpu(model, d), non_torch_bytes(d)))
        where.append(at)
        shape = (d.pp, d.weight_dtype, d.enforce_eager, d.max_num_seqs, min(d.max_num_batched_tokens, MOST_CAPTURED))
        at = counted.setdefault(shape, len(counted))
        if at == len(graphs):
            graphs.append(captured_bytes(model, d, facts)[1])
        which.append(at)
    weights, block, non_torch = np.array(per_plan)[where].T
    settings = [(d.gpu_memory_utilization, d.max_num_batched_tokens, d.tp, d.kv_block_tokens) for d in deployments]
    utilization, tokens, tp, block_tokens = np.array(settings).T
    activation = np.empty(len(deployments))
    eager = np.array([d.enforce_eager for d in deployments])
    for ranks, is_eager in {(d.tp, d.enforce_eager) for d in deployments}:
        mine = (tp == ranks) & (eager == is_eager)
        activation[mine] = activation_bytes(shapes_of(model), ranks, tokens[mine], is_eager=is_eager)
    pool = utilization * gpu.device_memory_bytes - weights - activation - non_torch - np.array(graphs)[which]
    shapes = shapes_of(model)
    groups, window = shapes.kv_groups, float(shapes.sliding_window_tokens)
    tables = groups.n_full + groups.n_sliding * min(1.0, window / held_tokens if held_tokens else 1.0)
    return np.asarray(n_kv_blocks(pool, block) * block_tokens / max(tables, 1e-9), dtype=np.float64)


def footprint(model: Model, gpu: Gpu, deployment: Deployment, facts: EngineFacts | None = None) -> Footprint:
    """Return the memory of one GPU; never raises for a plan that does not fit: `is_ok`, `reason`, `nearest` say so."""
    s = shapes_of(model)
    tp, pp = deployment.tp, deployment.pp
    weights = weights_bytes_per_gpu(model, deployment)
    tokens = float(deployment.max_num_batched_tokens)
    activation = float(activation_bytes(s, tp, tokens, is_eager=deployment.enforce_eager))
    non_torch = non_torch_bytes(deployment)
    graphs, counted = captured_bytes(model, deployment, facts)
    budget = deployment.gpu_memory_utilization * gpu.device_memory_bytes
    pool = budget - weights - activation - non_torch - counted
    block = block_bytes_per_gpu(model, deployment)
    blocks = deployment.n_kv_blocks or int(n_kv_blocks(pool, block))
    longest = deployment.max_model_len
    needed = blocks_of_longest(model, deployment)
    capacity = cache_tokens(model, deployment, max(0, blocks))
    reason = nearest = ""
    if pool <= 0:
        reason = (
            f"weights {format_bytes(weights)} + activations {format_bytes(activation)} exceed the "
            f"{format_bytes(budget)} that vLLM may use on one {gpu.label}"
        )
        share = (weights + activation + non_torch) / budget
        nearest = f"{max(tp * pp + 1, int(tp * pp * share * 1.1) + 1)} GPUs a replica, or weights in fewer bits"
    elif blocks < needed:
        reason = f"the KV cache holds {capacity} tokens, less than one sequence of {longest}"
        nearest = f"--max-model-len {max(capacity // 16 * 16, 0)}"
    elif weights + activation + non_torch + graphs + blocks * block > gpu.device_memory_bytes:
        reason = "CUDA graphs do not fit beside the memory budget"
        nearest = f"--gpu-memory-utilization {1 - graphs / gpu.device_memory_bytes:.2f}"
    return Footprint(
        weights_bytes=weights,
        activation_bytes=activation,
        non_torch_bytes=non_torch,
        graph_bytes=graphs,
        counted_graph_bytes=counted,
        kv_block_bytes=block,
        n_kv_blocks=max(0, blocks),
        kv_cache_tokens=capacity,
        budget_bytes=budget,
        device_bytes=gpu.device_memory_bytes,
        is_ok=not reason,
        reason=reason,
        nearest=nearest,
    )
