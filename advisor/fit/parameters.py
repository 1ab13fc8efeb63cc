"""The coefficients of the vLLM law: what each is, its physical bounds, where the fit starts, what stays fixed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """One coefficient. `prior_rel` pulls it towards `start` with that relative width; None = data alone decide."""

    name: str
    start: float
    low: float
    high: float
    unit: str
    meaning: str
    is_fitted: bool = True
    prior_rel: float | None = None


_P = Parameter
PARAMETERS: tuple[Parameter, ...] = (
    _P("gemm_eff_bf16", 0.81, 0.3, 1.0, "1", "share of the dense bf16 peak that large matrices reach at full clock"),
    _P("gemm_eff_fp8", 0.65, 0.2, 1.0, "1", "share of the dense fp8 peak, dynamic activation scaling included"),
    _P("gemm_eff_int4", 0.80, 0.1, 1.0, "1", "share of the bf16 peak with 4-bit weights (dequantised on the fly)"),
    _P("stream_eff_bf16", 0.84, 0.5, 1.0, "1", "share of the memory bandwidth when bf16 weights are streamed"),
    _P("stream_eff_fp8", 0.78, 0.4, 1.0, "1", "share of the memory bandwidth when fp8 weights are streamed"),
    _P("int4_sm_bytes_per_s", 1.9e10, 5e9, 4e10, "bytes/s", "4-bit weights that a multiprocessor gets through"),
    _P("moe_gemm_factor", 0.65, 0.2, 1.2, "1", "expert matrices' compute efficiency over that of dense ones"),
    _P("moe_stream_factor", 1.0, 0.5, 1.3, "1", "expert matrices' streaming efficiency over dense ones", prior_rel=0.1),
    _P("attention_eff", 0.65, 0.2, 0.9, "1", "share of the bf16 peak that causal attention reaches", prior_rel=0.15),
    _P("kv_eff", 0.9, 0.3, 0.95, "1", "share of the memory bandwidth when decodes read the paged cache"),
    _P("decode_wave_s", 3e-6, 3e-7, 3e-5, "s", "decode attention's time a layer and wave of tiles beyond its reads"),
    _P(
        "shared_kv_frac",
        0.4,
        0.02,
        1.0,
        "1",
        "share of its cache reads that a prefix in many decodes costs",
        prior_rel=0.5,
    ),
    _P(
        "decode_tile_eff",
        0.45,
        0.1,
        1.0,
        "1",
        "share of the bf16 peak of decode attention, rows without a query counted",
        prior_rel=0.5,
    ),
    _P(
        "decode_fp8_eff",
        0.42,
        0.1,
        1.0,
        "1",
        "share of the fp8 peak of decode attention with an fp8 cache, rows without a query counted",
        prior_rel=0.1,
    ),
    _P("elementwise_eff", 0.95, 0.1, 1.0, "1", "share of the bandwidth of norms, rotary embedding, activation"),
    _P("elementwise_sm_bytes_per_s", 4.4e10, 5e9, 1e12, "bytes/s", "what a multiprocessor gets through of the same"),
    _P("link_eff", 0.70, 0.1, 1.0, "1", "share of one link direction that all-reduces reach", prior_rel=0.1),
    _P("all_reduce_s", 4.3e-6, 1e-6, 4e-5, "s", "latency of one all-reduce by vLLM's own kernel"),
    _P("all_reduce_large_s", 2e-5, 2e-6, 1e-4, "s", "latency of one by NCCL", prior_rel=0.5),
    _P("all_reduce_switch_bytes", 8388608.0, 1e5, 1e16, "bytes", "message from which NCCL takes over", is_fitted=False),
    _P("gemm_s", 3.8e-6, 5e-7, 2e-5, "s", "time to begin and end a matrix kernel"),
    _P("attention_s", 9e-6, 1e-6, 4e-5, "s", "the same for a layer's attention"),
    _P("layer_s", 1.2e-5, 1e-6, 1e-4, "s", "time of a layer's norms, activation and cache write for one token, gaps"),
    _P("norm_s", 2e-6, 1e-7, 2e-5, "s", "time of each norm of a layer beyond two"),
    _P("fp8_input_s", 3.2e-10, 1e-11, 1e-8, "s", "further time of a layer for quantising an element of its inputs"),
    _P("int4_layer_s", 1.5e-5, 1e-7, 1e-4, "s", "further time of a layer of 4-bit matrices of any size"),
    _P("mla_layer_s", 1e-5, 1e-7, 1e-4, "s", "further time of a layer of latent attention"),
    _P("moe_layer_s", 2.2e-5, 1e-6, 3e-4, "s", "further time of a layer for routing", prior_rel=0.5),
    _P("step_s", 1e-4, 1e-6, 3e-3, "s", "time of a step outside the layers"),
    _P("seq_s", 4.5e-7, 1e-8, 1e-4, "s", "GPU time a sampled sequence"),
    _P("sharpness", 4.0, 1.5, 20.0, "1", "exponent that joins arithmetic and bandwidth of a matrix", prior_rel=0.5),
    _P("sharpness_int4", 2.5, 1.0, 12.0, "1", "the same for 4-bit kernels", prior_rel=0.5),
    _P("pair_ramp_tokens", 250.0, 10, 4000, "tokens", "keys that a prompt's query pays for before the first"),
    _P("wave_frac", 0.38, 1e-3, 1.0, "1", "how much of an fp8 kernel's last wave of tiles shows", prior_rel=0.5),
    _P("joules_per_flop", 1.2e-12, 3e-13, 2e-12, "J", "energy of a bf16 operation at full clock", prior_rel=0.3),
    _P(
        "fp8_energy_exponent", 1.0, 0.3, 2.0, "1", "how energy an operation follows its peak's inverse", is_fitted=False
    ),
    _P("joules_per_byte", 1.5e-10, 2e-11, 3e-10, "J", "energy of a byte of device memory", prior_rel=0.3),
    _P(
        "clock_exponent",
        0.5,
        0.2,
        1.0,
        "1",
        "slow-down over excess power: clock falls, voltage with it",
        is_fitted=False,
    ),
    _P("throttle_s", 0.21, 0.02, 2.0, "s", "time over which the board averages power before it lowers the clock"),
    _P("host_step_s", 2.1e-3, 1e-4, 8e-3, "s", "host time to schedule and launch a decode step"),
    _P(
        "host_graph_layer_s", 2.2e-4, 2e-5, 6e-4, "s", "host time a layer of a step with prompts, CUDA graphs by pieces"
    ),
    _P(
        "host_large_layer_s",
        8e-4,
        1e-4,
        3e-3,
        "s",
        "host time a layer of a step larger than any CUDA graph, compiled code",
    ),
    _P("host_eager_layer_s", 5.5e-4, 1e-4, 2e-3, "s", "host time a layer without CUDA graphs and compiled code"),
    _P("host_moe_layer_s", 9e-4, 1e-5, 3e-3, "s", "further host time of an expert layer in such a step"),
    _P("host_shared_layer_s", 8e-4, 1e-5, 3e-3, "s", "further host time of shared experts' layer in such a step"),
    _P("host_mxfp4_layer_s", 1.5e-3, 1e-5, 5e-3, "s", "host time of an MXFP4 expert layer, for host_moe_layer_s"),
    _P("host_mla_layer_s", 8e-4, 1e-5, 3e-3, "s", "further host time of a layer of latent attention in such a step"),
    _P("host_tp_factor", 1.16, 0.5, 4.0, "1", "the same with tensor parallelism, over one GPU"),
    _P(
        "host_busy_factor",
        1.15,
        1.0,
        2.0,
        "1",
        "host time of a layer while others are served, over alone",
        prior_rel=0.2,
    ),
    # timed launches: 1.28, 1.48, 1.56 times; share 0.31, 0.35, 0.62 (runs h200 1b-launches, 8b-launches, 8b-launches-b)
    _P("slow_launch_factor", 1.5, 1.0, 3.0, "1", "a launch while its core's other thread works, over alone", False),
    _P("slow_launch_frac", 0.4, 0.0, 1.0, "1", "share of the time in which that is so", False),
    _P("slow_launch_s", 0.3, 0.01, 10.0, "s", "how long a host's pace lasts", False),
    _P("graph_wait_frac", 0.5, 0.01, 1.0, "1", "share of a running decode graph that a prompt step's launch waits for"),
    _P("host_seq_s", 1.8e-5, 1e-7, 1e-4, "s", "host time a running sequence and step"),
    _P("host_table_s", 6e-6, 1e-7, 1e-4, "s", "the same for each further block table of a sequence", prior_rel=0.5),
    _P("submit_s", 1.3e-3, 1e-4, 2e-2, "s", "client to engine core"),
    _P("return_s", 1.3e-3, 1e-4, 2e-2, "s", "engine core to client", is_fitted=False),
    _P("http_s", 1e-3, 1e-5, 2e-2, "s", "an API server's time a request, one after the other"),
    _P("http_token_s", 2.7e-6, 1e-8, 5e-5, "s", "the same for each token of the prompt"),
    _P("http_out_s", 6e-5, 1e-6, 1e-3, "s", "the same for each token that it sends"),
    # between the requests of the first bursts of closed loops (data/runs/rows), medians of the bursts' medians: 0.18 ms
    # for prompts of 128 tokens (83 bursts), 0.23 of 512 (135), 0.20 of 1,024 (245), 0.24 of 4,096 (68)
    _P(
        "serial_s", 1.9e-4, 1e-5, 2e-3, "s", "client's time between two requests that it sends at once", is_fitted=False
    ),
    _P("serial_token_s", 2.5e-8, 0.0, 1e-6, "s", "the same for each token of the prompt", is_fitted=False),
    # second steps of bursts of 256 prompts of 128 tokens of a 1B: 63 (the budget) in six of seven starts, 56 in one; an
    # undisturbed launch of the first step leaves time for 35 (data/runs/rows)
    _P("intake_s", 9e-5, 0.0, 1e-3, "s", "engine core's time to take in a request while it launches a step", False),
    _P("wake_s", 3.2e-4, 1e-5, 1e-2, "s", "from a first request to the first schedule of an engine that was idle"),
    _P("send_s", 4.3e-4, 1e-6, 2e-3, "s", "hand-over between pipeline stages"),
)
BY_NAME = {p.name: p for p in PARAMETERS}

FALLBACKS: dict[str, float | str] = {
    "gemm_eff_fp8": 0.55,
    "gemm_eff_int4": "gemm_eff_bf16",
    "stream_eff_fp8": "stream_eff_bf16",
    "int4_sm_bytes_per_s": 1.9e10,
    "norm_s": 1e-6,
    "decode_fp8_eff": 0.42,
    "fp8_input_s": 1e-10,
    "wave_frac": 0.4,
    "int4_layer_s": 1e-6,
    "sharpness_int4": "sharpness",
    "moe_gemm_factor": 1.0,
    "moe_stream_factor": 1.0,
    "host_moe_layer_s": 1e-5,
    "host_shared_layer_s": 1e-5,
    "host_mxfp4_layer_s": "host_moe_layer_s",
    "host_mla_layer_s": 1e-5,
    "mla_layer_s": 1e-7,
    "moe_layer_s": 2.2e-5,
    "host_table_s": 1e-7,
    "host_eager_layer_s": "host_large_layer_s",
    "shared_kv_frac": 1.0,
    "decode_tile_eff": 0.45,
    "link_eff": 0.7,
    "all_reduce_s": 1.0e-5,
    "host_tp_factor": 1.0,
    "send_s": 5e-5,
    "http_s": 1e-3,
    "http_token_s": 2e-6,
}
"""What a coefficient is where no run tells: another one, nothing special (1), or a kernel figure of the H100 in the
aiconfigurator database (fp8 GEMM 0.55 of peak, attention of an fp8 cache, all-reduce, link)."""

HOST_BOUNDS = (0.4, 2.5)
"""Bounds of a host's factors."""


def bounds_of(name: str) -> tuple[float, float]:
    """Return the bounds of a coefficient, or of a host's factor ('host@NAME', 'power@NAME')."""
    parameter = BY_NAME.get(name)
    return (parameter.low, parameter.high) if parameter else HOST_BOUNDS


HOST_SPEED_PRIOR_REL = 0.3
HOST_POWER_PRIOR_REL = 0.1
"""Widths of the two nuisance factors of each host but the reference: CPU time and energy an operation."""
