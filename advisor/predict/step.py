"""One engine step of a serving engine, as a sum of physical terms.

A step carries prefill chunks and one token of each decoding sequence. `StepCost` holds what one pipeline stage has to
do for it (operations, bytes, messages) and how fast the GPU does it (fitted efficiencies times datasheet peaks).
Every method works on scalars and on arrays: the simulator calls it with numbers, the sweep with one element a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from advisor.laws.collective import all_reduce_bus_bytes
from advisor.laws.decode_attention import begin_s, tiles_s
from advisor.laws.expert import expected_experts, expert_rate, expert_rows
from advisor.laws.roofline import larger_of, smooth_max
from advisor.predict.cache_reads import cache_reads
from advisor.predict.clock import Clock, clock_of
from advisor.predict.gemm import FOUR_BIT, Gemm, gemms_of, kernel_rows, kernels_of
from advisor.predict.shapes import BYTES_PER_WEIGHT, Shapes, stage_layers
from advisor.schema import Deployment, Gpu

Real = Any  # float or NDArray[np.float64]; numpy's own stubs cannot say "the same as the argument"

TERMS = (
    "linear",
    "experts",
    "lm_head",
    "prefill_attention",
    "decode_attention",
    "elementwise",
    "all_reduce",
    "overhead",
)
"""Names of the terms of one step, in the order in which `StepCost.terms` returns them."""

DEFAULT_SMS = 132
"""Streaming multiprocessors of an H100/H200 SXM, for cards whose number the catalogue does not give."""

FP8_INPUT_BYTES = 2.0
"""Further bytes moved for each input element of an fp8 matrix, quantised token by token: an 8B's kernels of norms and
activation take 22 and 29 ns a token and layer longer than in bf16 (h100 8b-q, 8b-fp8-q; h200 8b-p, 8b-fp8-p)."""

FP8_EXPERT_LAYER_S, FP8_EXPERT_BYTES, FP8_EXPERT_LAUNCHES = 3.4e-5, 20.0, 1.9
"""What experts quantised while they load add to an expert layer, whose inputs get one scale for all tokens: time, bytes
moved for each input of a token's down matrices, host time over that of other experts. From the kernels and the prompts
of one start beside the same model in bf16 on the same host: 94 us a layer, 20 of them without a kernel, against 77; 285
against 147 us of 3,000 tokens; 1.68 against 1.17 ms to launch (h200 qwen3-30b-a3b-fp8, -t, -u)."""

INT4_ENERGY_FRAC = 0.8
"""Energy of an operation with 4-bit weights over one with 16-bit ones, as far as the clock shows it: with it 8,000
tokens are told as right as 1,024, without it 8 to 10 % too slow beside them (h200 14b-awq-p, h100 qwen2.5-32b-awq)."""

N_EXPERT_GEMMS = 2
"""Matrix kernels of an expert layer: all experts' up (and gate) in one, all experts' down in the other."""

EXPERT_BLOCK_ROWS = 64
"""Rows of a block of an expert's tokens. vLLM's fused kernels take 16 to 128, more for more tokens; where blocks are
small, weights take longer than rows. Kernels of 3,000 tokens on one H200 are told 3 to 14 % too short with it and the
coefficients fitted with it (7 to 20 % before), those of Mixtral's larger experts 15 % too long as before."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Work and rates of one pipeline stage on one GPU of the tensor-parallel group; SI units."""

    n_layers: int
    gemms: tuple[Gemm, ...]
    flops_per_token: Real
    weight_bytes: Real
    expert_flops_per_token: Real
    expert_bytes: Real
    n_experts: int
    n_experts_per_token: int
    head_flops_per_seq: Real
    head_bytes: Real
    flops_per_pair: Real
    kv_bytes_per_context_token: Real
    elementwise_bytes_per_token: Real
    all_reduce_bytes_per_token: Real
    n_all_reduces: int
    gemm_flops_per_s: Real
    stream_bytes_per_s: Real
    head_flops_per_s: Real
    head_bytes_per_s: Real
    expert_flops_per_s: Real
    expert_bytes_per_s: Real
    attention_flops_per_s: Real
    kv_bytes_per_s: Real
    elementwise_bytes_per_s: Real
    link_bytes_per_s: Real
    all_reduce_latency_s: Real
    all_reduce_switch_bytes: Real
    all_reduce_large_latency_s: Real
    fixed_s: Real
    seq_s: Real
    wave_s: Real
    seq_waves: Real
    most_waves: Real
    sharpness: float
    pair_ramp_tokens: float
    n_sms: float
    wave_frac: float
    kernels: Real
    joules_per_flop: Real
    joules_per_byte: Real
    dynamic_power_w: Real
    clock_exponent: float
    throttle_s: float
    host_step_s: Real
    host_graph_s: Real
    host_eager_s: Real
    host_seq_s: Real
    host_busy_factor: Real
    graph_tokens: int
    window_tokens: float = 0.0
    window_frac: float = 0.0
    has_one_route: bool = False
    """whether all tokens go to the same experts, as in some models with random weights"""

    def terms(
        self, n_prefill: Real, n_pairs: Real, n_decode: Real, n_context: Real, n_sampled: Real
    ) -> tuple[Real, ...]:
        """Return the GPU time of each term of one step [s], in the order of `TERMS`.

        n_prefill : prompt tokens computed in this step
        n_pairs   : (query, key) pairs of their causal attention
        n_decode  : decode tokens, padded to the CUDA graph's batch size
        n_context : cached tokens that the decodes read, summed over sequences
        n_sampled : sequences that get a token in this step
        """
        linear, experts, elementwise, all_reduce = self.token_terms(n_prefill + n_decode)
        head, overhead, tiles = self.sampled_terms(n_sampled)
        prefill_attention, context = self.attention_terms(n_prefill, n_pairs, n_decode, n_context)
        return linear, experts, head, prefill_attention, context + tiles, elementwise, all_reduce, overhead

    def token_terms(self, n_tokens: Real) -> tuple[Real, Real, Real, Real]:
        """Return the terms that follow from the number of tokens alone [s]: linear, experts, elementwise, all-reduce.

        The event loop computes them once a number (`clock.Clock`): what else decides a term belongs into another group.
        """
        linear = 0.0 * n_tokens
        for gemm in self.gemms:
            rows = kernel_rows(n_tokens, self.kernels, gemm.n_column_tiles, self.n_sms, self.wave_frac)
            seconds = smooth_max(
                rows * (gemm.flops_per_token / self.gemm_flops_per_s),
                (gemm.weight_bytes + n_tokens * gemm.token_bytes) / self.stream_bytes_per_s,
                self.sharpness,
            )
            linear = linear + (seconds.sum(axis=0) if gemm.is_stacked else seconds)
        experts = 0.0 * n_tokens
        if self.n_experts:
            touched = self.touched_frac(n_tokens)
            rows = expert_rows(n_tokens, touched * self.n_experts, self.n_experts_per_token, EXPERT_BLOCK_ROWS)
            row_flops = self.expert_flops_per_token / self.n_experts_per_token
            experts = smooth_max(
                rows * (row_flops / self.expert_flops_per_s),
                touched * (self.expert_bytes / self.expert_bytes_per_s),
                self.sharpness,
            )
        message = n_tokens * self.all_reduce_bytes_per_token
        is_large = message >= self.all_reduce_switch_bytes
        latency = self.all_reduce_latency_s + is_large * (self.all_reduce_large_latency_s - self.all_reduce_latency_s)
        elementwise = n_tokens * (self.elementwise_bytes_per_token / self.elementwise_bytes_per_s)
        return linear, experts, elementwise, self.n_all_reduces * (latency + message / self.link_bytes_per_s)

    def sampled_terms(self, n_sampled: Real) -> tuple[Real, Real, Real]:
        """Return what follows from the number of sampled sequences alone [s]: vocabulary head, overhead, tiles.

        The tiles are decode attention's work beyond its reads (`laws.decode_attention`).
        """
        head = smooth_max(
            n_sampled * (self.head_flops_per_seq / self.head_flops_per_s),
            self.head_bytes / self.head_bytes_per_s,
            self.sharpness,
        )
        tiles = tiles_s(self.wave_s, n_sampled * self.seq_waves, self.most_waves)
        return head, self.fixed_s + n_sampled * self.seq_s, tiles

    def attention_terms(self, n_prefill: Real, n_pairs: Real, n_decode: Real, n_context: Real) -> tuple[Real, Real]:
        """Return the attention of prompts and of decodes [s]; arguments as of `terms`."""
        if self.window_frac:
            n_pairs, n_context = self.seen(n_prefill, n_pairs, n_decode, n_context)
        pairs = n_pairs + self.pair_ramp_tokens * n_prefill
        return (
            pairs * (self.flops_per_pair / self.attention_flops_per_s),
            n_context * (self.kv_bytes_per_context_token / self.kv_bytes_per_s),
        )

    def touched_frac(self, n_tokens: Real) -> Real:
        """Return the share of a layer's experts that a step of `n_tokens` touches."""
        if self.has_one_route:
            return self.n_experts_per_token / self.n_experts + 0.0 * n_tokens
        return expected_experts(n_tokens, self.n_experts, self.n_experts_per_token) / self.n_experts

    def expert_reads(self, n_steps: Real, n_tokens: Real, counted: Real = 0.0) -> Real:
        """Return how often steps read all experts of a layer: `counted` by a replay, else of `n_steps` equal steps.

        The share that a step touches grows less than its tokens: the mean step would touch more than steps do.
        """
        if not self.n_experts:
            return 0.0
        return counted or n_steps * self.touched_frac(n_tokens / np.maximum(n_steps, 1e-12))

    def seen(self, n_prefill: Real, n_pairs: Real, n_decode: Real, n_context: Real) -> tuple[Real, Real]:
        """Return pairs and context tokens averaged over layers: sliding-window layers look back a window at most."""
        if not self.window_frac:
            return n_pairs, n_context
        window, frac = self.window_tokens, self.window_frac
        pairs = n_pairs - larger_of(n_pairs - n_prefill * window, 0.0 * n_pairs) * frac
        context = n_context - larger_of(n_context - n_decode * window, 0.0 * n_context) * frac
        return pairs, context

    def power_ratio(self, seconds: Real, n_tokens: Real, n_pairs: Real, n_context: Real, n_sampled: Real) -> Real:
        """Return the power of a step at full clock over what the board's limit leaves above idle.

        Above 1 the board lowers its clock; not at once but as its average over some hundredths of a second demands.
        """
        energy_j = self.token_j(n_tokens) + self.request_j(n_pairs, n_context, n_sampled)
        return energy_j / (seconds * self.dynamic_power_w)

    def token_j(self, n_tokens: Real) -> Real:
        """Return the energy of a step that follows from the number of tokens alone [J]: matrices and their weights."""
        flops = n_tokens * (self.flops_per_token + self.expert_flops_per_token)
        n_bytes = self.weight_bytes + self.head_bytes
        if self.n_experts:
            n_bytes = n_bytes + self.touched_frac(n_tokens) * self.expert_bytes
        return flops * self.joules_per_flop + n_bytes * self.joules_per_byte

    def request_j(self, n_pairs: Real, n_context: Real, n_sampled: Real) -> Real:
        """Return the rest of the energy of a step [J]: attention, KV cache, vocabulary head."""
        flops = n_sampled * self.head_flops_per_seq + n_pairs * self.flops_per_pair
        return flops * self.joules_per_flop + n_context * self.kv_bytes_per_context_token * self.joules_per_byte

    def stretch(self, power_ratio: Real) -> Real:
        """Return by how much a power demand stretches time, >= 1: voltage falls with the clock, so a root of it."""
        return larger_of(power_ratio, 1.0 + 0.0 * power_ratio) ** self.clock_exponent

    def clock(self) -> Clock:
        """Return the same law for an event loop, which asks for single steps again and again."""
        return clock_of(self)

    def seconds(self, n_prefill: Real, n_pairs: Real, n_decode: Real, n_context: Real, n_sampled: Real) -> Real:
        """Return the GPU time of one step at full clock [s]: the sum of `terms`."""
        return sum(self.terms(n_prefill, n_pairs, n_decode, n_context, n_sampled))

    def host_s(self, n_prefill: Real, n_decode: Real, n_sampled: Real) -> Real:
        """Return the time that the host needs to launch the step [s].

        Decode steps replay one full CUDA graph; steps with prompt tokens launch each layer apart: a graph a layer up to
        the largest captured size, every kernel by itself above it.
        """
        is_shared = (n_prefill > 0) * (n_decode > 0)
        layers = self.layer_launch_s(n_prefill + n_decode, n_prefill > 0)
        return (
            self.host_step_s + layers * (1.0 + is_shared * (self.host_busy_factor - 1.0)) + n_sampled * self.host_seq_s
        )

    def layer_launch_s(self, n_tokens: Real, is_mixed: Real) -> Real:
        """Return the host time of the layers' kernels when nobody else is served [s]; `is_mixed`: there are prompts."""
        is_large = n_tokens > self.graph_tokens
        return is_mixed * self.host_graph_s + (is_large * 1.0) * (self.host_eager_s - is_mixed * self.host_graph_s)

    def flops(self, n_tokens: Real, n_pairs: Real, n_sampled: Real) -> tuple[Real, Real]:
        """Return the useful operations of matrices and of attention, for activity and MFU."""
        matrix = n_tokens * (self.flops_per_token + self.expert_flops_per_token) + n_sampled * self.head_flops_per_seq
        return matrix, n_pairs * self.flops_per_pair


def default_graph_tokens(max_num_seqs: int) -> int:
    """Return the tokens of vLLM's largest CUDA graph where the architecture does not say them."""
    return min(2 * max_num_seqs, 512)


def largest_graph(deployment: Deployment, shapes: Shapes) -> int:
    """Return the tokens of the largest CUDA graph, 0 without any (vLLM's default sizes)."""
    if deployment.enforce_eager:
        return 0
    return shapes.fixed_graph_tokens or default_graph_tokens(deployment.max_num_seqs)


def step_cost(
    shapes: Shapes, gpu: Gpu, deployment: Deployment, coefficients: Mapping[str, float], stage: int = 0
) -> StepCost:
    """Return the cost of one step on stage `stage` of `deployment`.

    `coefficients` maps names to values (see data/fitted/vllm.json), already transferred to `gpu`.
    """
    c = coefficients
    tp, pp = deployment.tp, deployment.pp
    dtype = deployment.weight_dtype
    n_layers = stage_layers(shapes.n_layers, pp)[stage]
    share = n_layers / shapes.n_layers
    is_last = stage == pp - 1
    peaks = gpu.peak_flops_per_s
    half_peak = peaks.get("bf16") or peaks["fp16"]
    bandwidth = gpu.memory_bandwidth_bytes_per_s
    if dtype in ("fp8", "int8") and ({"fp8", "int8"} & set(peaks)):
        peak, kind = peaks.get("fp8") or peaks["int8"], "fp8"
    elif dtype in FOUR_BIT:
        peak, kind = half_peak, "int4"
    else:
        peak, kind = half_peak, "bf16"
    is_on_load = dtype == "fp8" and shapes.native_weight_dtype != "fp8"
    is_quantised = is_on_load and "fp8" in peaks and shapes.n_moe_layers > 0
    weight_byte = BYTES_PER_WEIGHT[dtype]
    n_sms = float(gpu.n_sms or DEFAULT_SMS)
    cache = cache_reads(shapes, gpu, deployment, c, n_layers, n_sms)
    d_attention = shapes.n_heads * (shapes.d_head + shapes.d_attention_value) / tp
    passes = 4 * shapes.d_model + 3 * shapes.d_ff / tp + d_attention
    # the outputs of a token's experts are read and their sum is written
    passes += (shapes.n_experts_per_token + 1) * shapes.d_model * shapes.n_moe_layers / shapes.n_layers
    elementwise_bytes = 2.0 * passes
    inputs = 2 * shapes.d_model + (shapes.n_heads * shapes.d_attention_value + shapes.d_ff) / tp
    if kind == "fp8":
        elementwise_bytes += FP8_INPUT_BYTES * inputs
        elementwise_bytes += FP8_EXPERT_BYTES * (shapes.d_ff / tp) * is_quantised
    bus_bytes = float(all_reduce_bus_bytes(2.0 * shapes.d_model, tp)) if tp > 1 else 0.0
    elementwise_sm = n_sms * c["elementwise_sm_bytes_per_s"]
    joules_per_flop = c["joules_per_flop"] * (half_peak / peak if kind == "fp8" else 1.0) ** c["fp8_energy_exponent"]
    joules_per_flop *= INT4_ENERGY_FRAC if kind == "int4" else 1.0
    stream_bytes_per_s = bandwidth * c[f"stream_eff_{'bf16' if kind == 'int4' else kind}"]
    if kind == "int4":
        stream_bytes_per_s = min(stream_bytes_per_s, n_sms * c["int4_sm_bytes_per_s"])
    gemms = gemms_of(shapes, tp, n_layers, weight_byte)
    layer_s = c["layer_s"] + begin_s(c["attention_s"], shapes.d_head)
    layer_s += len(gemms) * c["gemm_s"] + shapes.n_further_norms * c["norm_s"]
    layer_s += {"fp8": c["fp8_input_s"] * inputs, "int4": c["int4_layer_s"], "bf16": 0.0}[kind]
    moe_layers = shapes.n_moe_layers * share
    columns = shapes.expert_params / (1.5 * shapes.d_model) / tp  # gate and up are two of three equal matrices
    large_s = c["host_eager_layer_s" if deployment.enforce_eager else "host_large_layer_s"]
    moe_layer_s = c["moe_layer_s"] + (N_EXPERT_GEMMS + 1) * c["gemm_s"] + FP8_EXPERT_LAYER_S * is_quantised
    layer_s += moe_layer_s * shapes.n_moe_layers / shapes.n_layers
    launch_s = large_s * n_layers
    moe_launch_s = c["host_mxfp4_layer_s" if dtype == "mxfp4" else "host_moe_layer_s"]
    launch_s += moe_launch_s * (FP8_EXPERT_LAUNCHES if is_quantised else 1.0) * moe_layers
    launch_s += c["host_shared_layer_s"] * moe_layers * shapes.has_shared_experts
    layer_s += c["mla_layer_s"] * shapes.is_mla
    launch_s += c["host_mla_layer_s"] * n_layers * shapes.is_mla
    return StepCost(
        n_layers=n_layers,
        gemms=gemms,
        flops_per_token=2.0 * shapes.matrix_params * share / tp,
        weight_bytes=shapes.matrix_params * weight_byte * share / tp + shapes.router_params * 2.0 * share,
        expert_flops_per_token=2.0 * shapes.expert_params * shapes.n_experts_per_token * moe_layers / tp,
        expert_bytes=shapes.all_expert_params * weight_byte * share / tp,
        n_experts=shapes.n_experts,
        n_experts_per_token=shapes.n_experts_per_token,
        head_flops_per_seq=2.0 * shapes.head_params / tp if is_last else 0.0,
        head_bytes=2.0 * shapes.head_params / tp if is_last else 0.0,
        flops_per_pair=2.0 * d_attention * n_layers,
        kv_bytes_per_context_token=cache.bytes_per_token,
        elementwise_bytes_per_token=elementwise_bytes * n_layers,
        all_reduce_bytes_per_token=bus_bytes,
        n_all_reduces=2 * n_layers if tp > 1 else 0,
        gemm_flops_per_s=peak * c[f"gemm_eff_{kind}"],
        stream_bytes_per_s=stream_bytes_per_s,
        head_flops_per_s=half_peak * c["gemm_eff_bf16"],
        head_bytes_per_s=bandwidth * c["stream_eff_bf16"],
        expert_flops_per_s=peak * c[f"gemm_eff_{kind}"] * c["moe_gemm_factor"] * expert_rate(columns),
        expert_bytes_per_s=stream_bytes_per_s * c["moe_stream_factor"],
        attention_flops_per_s=half_peak * c["attention_eff"],
        kv_bytes_per_s=cache.bytes_per_s,
        elementwise_bytes_per_s=1.0 / (1.0 / (bandwidth * c["elementwise_eff"]) + 1.0 / elementwise_sm),
        link_bytes_per_s=gpu.link_bytes_per_s * c["link_eff"],
        all_reduce_latency_s=c["all_reduce_s"],
        all_reduce_switch_bytes=bus_bytes * (c["all_reduce_switch_bytes"] / (2.0 * shapes.d_model)),
        all_reduce_large_latency_s=c["all_reduce_large_s"],
        fixed_s=c["step_s"] / pp + n_layers * layer_s + is_last * c["gemm_s"],
        seq_s=(c["seq_s"] if is_last else 0.0) + cache.seq_s,
        wave_s=cache.wave_s,
        seq_waves=cache.seq_waves,
        most_waves=cache.most_waves,
        sharpness=c["sharpness_int4"] if kind == "int4" else c["sharpness"],
        throttle_s=c["throttle_s"],
        pair_ramp_tokens=c["pair_ramp_tokens"],
        n_sms=n_sms,
        wave_frac=c["wave_frac"],
        kernels=kernels_of(dtype, gpu.compute_capability),
        joules_per_flop=joules_per_flop,
        joules_per_byte=c["joules_per_byte"],
        dynamic_power_w=gpu.board_power_w - gpu.idle_power_w,
        clock_exponent=c["clock_exponent"],
        host_step_s=c["host_step_s"],
        host_graph_s=c["host_graph_layer_s"] * n_layers,
        host_eager_s=launch_s * (c["host_tp_factor"] if tp > 1 else 1.0),
        host_seq_s=c["host_seq_s"] + (shapes.kv_groups.n_tables - 1) * c["host_table_s"],
        host_busy_factor=c["host_busy_factor"],
        graph_tokens=largest_graph(deployment, shapes),
        window_tokens=float(shapes.sliding_window_tokens),
        window_frac=shapes.n_sliding_layers / shapes.n_layers,
    )
