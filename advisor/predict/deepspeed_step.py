"""Time of one forward pass on each of DeepSpeed's inference paths, from shapes, datasheets and fitted coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from advisor.laws.offload import nvme_bytes_per_s_per_gpu, overlapped_s, partly_hidden_s, weight_stream_s
from advisor.predict.shapes import BYTES_PER_WEIGHT, Shapes
from advisor.schema import Backend, Cluster, CoefficientSet, Deployment, Gpu

KV_BYTES = 2.0
"""DeepSpeed's paths keep keys and values in the model's 16-bit type."""

EAGER_KV_PASSES = 3.0
"""Times that eager decoding moves the cache: DynamicCache concatenates (read and write), then attention reads."""

TRANSFER_WIDENING = 1.35
"""Factor on both ends of an interval where a coefficient is used on a GPU that its runs did not use."""

PREFIX: dict[Backend, str] = {
    "deepspeed-zero-inference": "eager",
    "deepspeed-autotp": "eager",
    "deepspeed-kernel-injection": "inject",
    "deepspeed-fastgen": "fastgen",
}


INJECT_PASSES_D, INJECT_PASSES_FF, INJECT_PASSES_SCORES = 23, 3, 4
"""Times that an injected layer's small kernels read or write a value a token and width, of the MLP, and of the score
matrix, counted in DeepSpeed 0.19.8, csrc/transformer/inference/csrc/pt_binding.cpp: norm 2, bias_add_transform_0213 6,
rotary 4, transform4d_0213 2, residual norm 5, residual add 4; gated activation 3; attention_unfused writes the scores,
softmax reads and writes them, the second product reads them."""

KERNEL_FIGURES = {
    "gemm": ("fastgen_gemm_eff", "inject_gemm_eff", "eager_gemm_eff"),
    "stream": ("fastgen_weight_eff", "inject_weight_eff", "eager_weight_eff"),
    "kv": ("fastgen_kv_eff", "inject_kv_eff", "eager_kv_eff"),
}
"""Which coefficients follow each kernel figure of data/fitted/transfer.toml, as for vLLM."""


def on_card(values: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Return coefficient values on a card whose kernels reach `factors` times the fitted card's shares; at most 1."""
    found = dict(values)
    for figure, names in KERNEL_FIGURES.items():
        for name in names:
            if figure in factors and name in found:
                found[name] = min(1.0, found[name] * factors[figure])
    return found


def half_peak_flops_per_s(gpu: Gpu) -> float:
    """Return the dense 16-bit peak of `gpu` (bf16 where it has it, else fp16, as on a V100)."""
    peaks = gpu.peak_flops_per_s
    return float(peaks["bf16"] if "bf16" in peaks else peaks["fp16"])


@dataclass(frozen=True)
class Rates:
    """One consistent set of coefficient values: the central one, or all fast, or all slow."""

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def rates_of(coefficients: CoefficientSet, gpu: str) -> tuple[Rates, Rates, Rates]:
    """Return (central, fast, slow) coefficient values for `gpu`; intervals widen on another GPU than the fit's.

    Fast takes the low end of every time and the high end of every efficiency: the corners together are wider than
    a 90 % interval where several terms matter, and equal to it where one dominates.
    """
    widening = 1.0 if gpu == coefficients.gpu else TRANSFER_WIDENING
    central, fast, slow = {}, {}, {}
    for name, c in coefficients.coefficients.items():
        low, high = max(c.bounds[0], c.low / widening), min(c.bounds[1], c.high * widening)
        is_time = c.unit.startswith("s")
        central[name] = c.value
        fast[name], slow[name] = (low, high) if is_time else (high, low)
    factors = coefficients.transfer.get(gpu, {})
    return Rates(on_card(central, factors)), Rates(on_card(fast, factors)), Rates(on_card(slow, factors))


def weight_bytes_of(shapes: Shapes, weight_dtype: str) -> float:
    """Return the bytes of all weights: 16-bit, or int4 with embedding, LM head and vectors left in 16 bits."""
    matrices = quantised_params(shapes) if weight_dtype == "int4" else shapes.n_params
    return matrices * BYTES_PER_WEIGHT[weight_dtype] + (shapes.n_params - matrices) * 2.0


def quantised_params(shapes: Shapes) -> int:
    """Return the parameters that weight_quantization packs: the linear layers of attention, MLP and experts."""
    return shapes.matrix_params + shapes.all_expert_params


def kv_bytes_per_token(shapes: Shapes, tp: int) -> float:
    """Return cache bytes of one token on one GPU; heads are split over `tp`, latent vectors are not."""
    split = 1 if shapes.is_mla else min(tp, shapes.n_kv_heads)
    return shapes.kv_elements_per_token_layer * shapes.n_layers * KV_BYTES / split


def injected_passes_bytes(shapes: Shapes, n_tokens: float, prompt_tokens: float) -> float:
    """Return the bytes that the small kernels of all injected layers move in a prompt pass: nothing is fused there.

    n_tokens      : of all prompts together
    prompt_tokens : of one prompt; the score matrix of each head holds `n_tokens * prompt_tokens` values in all
    """
    width = INJECT_PASSES_D * shapes.d_model + INJECT_PASSES_FF * shapes.d_ff
    scores = INJECT_PASSES_SCORES * shapes.n_heads * prompt_tokens
    return shapes.n_layers * n_tokens * (width + scores) * KV_BYTES


@dataclass(frozen=True)
class StepParts:
    """What one pass spends its time on [s]: parts that overlap (`host_s`, `device_s`, `stream_s`) and `link_s`."""

    host_s: float
    compute_s: float
    memory_s: float
    stream_s: float
    link_s: float
    total_s: float


@dataclass(frozen=True)
class StepLaw:
    """The pass-time law of one deployment with one set of rates."""

    shapes: Shapes
    cluster: Cluster
    deployment: Deployment
    rates: Rates
    is_transferred: bool = False
    mean_prompt_tokens: float = 0.0
    n_experts_touched: float = 0.0
    """Experts that one pass reads; 0 = as many as independent routing of its tokens touches."""
    is_bare: bool = False
    """FastGen's engine without MII's loop around it, as our step records time it."""

    def with_experts(self, n_touched: float) -> StepLaw:
        """Return the law for traffic whose tokens all go to the same `n_touched` experts."""
        return replace(self, n_experts_touched=n_touched)

    def host_s(self, is_decode: bool) -> float:
        """Return the time in which the host launches all layers of one pass."""
        layers = self.shapes.n_layers
        if self.deployment.backend == "deepspeed-zero-inference":
            hooks = self.rates["zero_hook_s_per_layer"]
            hooks += self.rates["zero_gather_s_per_layer"] if self.deployment.dp > 1 else 0.0
            # a prompt pass is over with its last kernel, a decode pass when the next can start
            return hooks * layers + (self.rates["zero_pass_s"] if is_decode else 0.0)
        prefix = PREFIX[self.deployment.backend]
        if prefix == "eager":
            name = "eager_decode_launch_s_per_layer" if is_decode else "eager_prefill_launch_s_per_layer"
            return self.rates[name] * layers
        return self.rates[f"{prefix}_launch_s_per_layer"] * layers

    def stream_s(self) -> float:
        """Return the time in which the weights of one pass reach the GPU (zero where they stay there)."""
        d, c = self.deployment, self.cluster
        if d.backend != "deepspeed-zero-inference" or (d.offload == "none" and d.dp == 1):
            return 0.0
        host = self.host_rate()
        in_node = min(d.dp, c.gpus_per_node)
        gather = self.rates["zero_gather_eff"] * (
            c.gpu.link_bytes_per_s if d.dp <= c.gpus_per_node else c.internode_bytes_per_s_per_gpu
        )
        weights = weight_bytes_of(self.shapes, d.weight_dtype)
        if d.offload == "none":
            host = float("inf")
        elif d.offload == "nvme":
            drives = self.rates["nvme_eff"] * c.nvme_bytes_per_s
            host = float(nvme_bytes_per_s_per_gpu(drives, in_node, host, self.rates["nvme_serial_frac"]))
        return float(weight_stream_s(weights, d.dp, host, gather))

    def host_rate(self) -> float:
        """Return the bytes/s that one GPU gets from host memory."""
        share = self.rates["host_stream_eff_elsewhere" if self.is_transferred else "zero_stream_eff"]
        return share * self.cluster.gpu.host_link_bytes_per_s

    def parts(
        self, prefill_tokens: float, n_decodes: float, context_tokens: float, prefill_context: float
    ) -> StepParts:
        """Return the time of one pass of `prefill_tokens` prompt tokens and `n_decodes` decodes.

        `context_tokens` is the sum of the decodes' contexts, `prefill_context` the mean context of a prompt token.
        """
        s, d, gpu = self.shapes, self.deployment, self.cluster.gpu
        prefix = PREFIX[d.backend]
        tp = d.tp
        peak = half_peak_flops_per_s(gpu)
        tokens = prefill_tokens + n_decodes
        matrix = s.n_active_params - s.head_params
        matrix_flops = 2 * matrix * tokens + 2 * s.head_params * max(1.0, n_decodes)
        attention_flops = 4 * s.n_heads * s.d_head * s.n_layers * prefill_tokens * prefill_context
        compute = (matrix_flops + attention_flops) / tp / (peak * self.rates[f"{prefix}_gemm_eff"])
        bandwidth = gpu.memory_bandwidth_bytes_per_s
        weights = weight_bytes_of(s, d.weight_dtype) / tp
        if s.all_expert_params:
            independent = s.n_experts * (1 - (1 - s.n_experts_per_token / s.n_experts) ** max(tokens, 1.0))
            touched = self.n_experts_touched or independent
            idle = s.all_expert_params * (1 - touched / s.n_experts)
            weights -= idle * BYTES_PER_WEIGHT[d.weight_dtype] / tp
        if d.weight_dtype == "int4":
            # unpacked to 16 bits before every product: written once, read once
            weights += quantised_params(s) * 2 * 2.0
        memory = weights / (bandwidth * self.rates[f"{prefix}_weight_eff"])
        passes = EAGER_KV_PASSES if prefix == "eager" else 1.0
        kv_token = kv_bytes_per_token(s, tp)
        if prefix == "fastgen":
            # each query head reads the cache of its group, some of it out of the second-level cache
            kv_token *= 1.0 if s.is_mla else (s.n_heads / s.n_kv_heads) ** self.rates["fastgen_group_exponent"]
        kv = passes * kv_token * context_tokens / (bandwidth * self.rates[f"{prefix}_kv_eff"])
        link = 0.0
        if tp > 1:
            ring = 2 * (tp - 1) / tp * tokens * s.d_model * KV_BYTES / gpu.link_bytes_per_s
            link = 2 * s.n_layers * (self.rates["allreduce_s"] + ring / self.rates["allreduce_eff"])
        host, stream = self.host_s(prefill_tokens == 0), self.stream_s()
        if d.kv_offload == "cpu":
            # the cache of the sequences that decode comes over the same link as the weights, and goes back beside it
            stream += kv_token * context_tokens / self.host_rate()
        if prefix == "fastgen":
            host += self.rates["fastgen_host_s_per_seq"] * n_decodes
            host += 0.0 if self.is_bare else self.rates["fastgen_mii_s"]
        if prefix == "inject":
            passes_bytes = injected_passes_bytes(s, prefill_tokens, 2 * prefill_context) / tp
            kv += passes_bytes / (bandwidth * self.rates["inject_weight_eff"])
        if prefix in ("fastgen", "inject"):
            # fused kernels, launched back to back without CUDA graphs: the gaps add to the kernels' own time
            total = host + float(overlapped_s(compute, memory)) + kv + link
        else:
            serial = self.rates["zero_serial_frac"] if stream else 0.0
            launched = float(partly_hidden_s(host, stream, serial))
            total = float(overlapped_s(launched, float(overlapped_s(compute, memory)) + kv)) + link
        return StepParts(host, compute, memory + kv, stream, link, total)

    def prefill_s(self, batch: int, prompt_tokens: float) -> float:
        """Return the time of one padded prompt pass over a static batch."""
        return self.parts(batch * prompt_tokens, 0, 0, prompt_tokens / 2).total_s

    def decode_s(self, batch: int, context_tokens: float) -> float:
        """Return the time of one decode pass of a static batch at `context_tokens` a sequence."""
        return self.parts(0, batch, batch * context_tokens, 0).total_s

    def mixed_s(self, prefill_tokens: float, n_decodes: float, context_tokens: float) -> float:
        """Return the time of one SplitFuse pass; a prompt chunk sees on average half of its prompt."""
        return self.parts(prefill_tokens, n_decodes, context_tokens, self.mean_prompt_tokens / 2).total_s
