"""Sizes of a model as an engine sees them: parameters by component, bytes by format, cache elements a token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from advisor.laws.kv import KvGroups, kv_elements_per_token_layer, kv_groups, mla_elements_per_token_layer
from advisor.laws.params import attention_params, mla_params, mlp_params
from advisor.schema import Model

VOCAB_PAD = 64
"""vLLM pads the vocabulary to a multiple of this (0.26.0, layers/vocab_parallel_embedding.py)."""

BYTES_PER_WEIGHT: dict[str, float] = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    # 4 bits + scales and zero points of each group of 128 as vLLM keeps them after repacking: 4.6 bytes a group, from
    # the start-up figure of run vllm-0.26.0 8b-awq (the checkpoint itself has 2.5: a 16-bit scale, a 4-bit zero)
    "awq-int4": 0.5 + 4.6 / 128,
    "gptq-int4": 0.5 + (2 + 0.5) / 128,
    # 4 bits + one 8-bit scale for each block of 32 (OCP Microscaling v1.0)
    "mxfp4": 0.5 + 1 / 32,
    # 4 bits + a 16-bit scale and minimum for each group of 64 (DeepSpeed's weight_quantization, ZeRO-Inference only)
    "int4": 0.5 + 4 / 64,
}
"""Bytes of one quantised matrix element, scales included."""

FIXED_GRAPH_TOKENS = {"GptOssForCausalLM": 1024}
"""Largest CUDA graph of architectures that set it themselves (vLLM 0.26.0, model_executor/models/config.py:366-376)."""
EMBEDS_ON_EVERY_STAGE = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Arctic", "Bloom", "ChatGLM", "Cohere", "Cohere2Moe", "Dbrx", "Falcon", "Gemma", "Gemma2"),
        *("Gemma3", "GPTJ", "GPTNeoX", "GptOss", "GraniteMoe", "GraniteMoeShared", "HYV3", "InternLM2"),
        *("MPT", "MiniCPM", "Mixtral", "OPT", "Olmo3", "Olmoe", "Orion", "Phi", "PhiMoE", "Qwen2Moe"),
        *("Qwen3Moe", "Stablelm"),
    )
)
"""Architectures whose class builds the embedding table on each pipeline stage, not on the first alone (vLLM 0.26.0,
model_executor/models; run h200 qwen3-30b-a3b-pp2: 0.62 GB more on the last stage)."""
BYTES_PER_KV: dict[str, float] = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0}


@dataclass(frozen=True)
class Shapes:
    """Element counts of one model; everything is for the whole model, before any parallel split.

    `matrix_params` are the linear layers that every token passes through (attention, dense MLP, shared experts,
    router excluded); `expert_params` is one routed expert of one layer.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_attention_value: int
    vocab_size: int
    embedding_params: int
    head_params: int
    has_own_head: bool
    position_params: int
    attention_matrix_params: int
    mlp_matrix_params: int
    down_frac: float
    router_params: int
    other_params: int
    expert_params: int
    n_moe_layers: int
    n_experts: int
    n_experts_per_token: int
    kv_elements_per_token_layer: int
    is_mla: bool
    n_full_layers: int
    n_sliding_layers: int
    sliding_window_tokens: int
    rotary_bytes: int
    native_weight_dtype: str
    has_shared_experts: bool
    embeds_on_every_stage: bool
    fixed_graph_tokens: int
    """Tokens of vLLM's largest CUDA graph where the architecture says them, else 0."""
    n_further_norms: int
    """Norms a layer beyond one before attention and one before the MLP: of their outputs, of q and of k."""

    @property
    def matrix_params(self) -> int:
        """Return the parameters of all matrices that each token uses, LM head and router left out."""
        return self.attention_matrix_params + self.mlp_matrix_params

    @property
    def all_expert_params(self) -> int:
        """Return the parameters of every routed expert of every layer."""
        return self.expert_params * self.n_experts * self.n_moe_layers

    @property
    def has_gate(self) -> bool:
        """Return whether the MLP has a gate beside its way up: three matrices, not two."""
        return self.down_frac < 0.5

    @property
    def kv_groups(self) -> KvGroups:
        """Return how an engine shares its KV pool among the layers."""
        return kv_groups(self.n_full_layers, self.n_sliding_layers)

    @property
    def n_params(self) -> int:
        """Return the exact parameter count (tied embeddings counted once)."""
        return (
            self.embedding_params
            + (self.head_params if self.has_own_head else 0)
            + self.position_params
            + self.matrix_params
            + self.router_params
            + self.all_expert_params
            + self.other_params
        )

    @property
    def n_active_params(self) -> int:
        """Return the parameters that one token uses, the embedding look-up left out, the LM head counted."""
        experts = self.expert_params * self.n_experts_per_token * self.n_moe_layers
        return self.matrix_params + experts + self.router_params + self.head_params + self.other_params

    def padded_vocab(self, tp: int = 1) -> int:
        """Return the vocabulary rounded up so that every tensor-parallel rank holds whole rows."""
        unit = VOCAB_PAD if VOCAB_PAD % tp == 0 else VOCAB_PAD * tp
        return -(-self.vocab_size // unit) * unit


def stage_layers(n_layers: int, pp: int) -> list[int]:
    """Return how vLLM spreads layers over stages: evenly, the rest from the last but one stage backwards.

    Reference: vLLM 0.26.0, distributed/utils.py ``get_pp_indices``.

    >>> stage_layers(10, 4)
    [2, 3, 3, 2]
    """
    layers = [n_layers // pp] * pp
    for i in range(2, n_layers % pp + 2):
        layers[-i] += 1
    return layers


def weight_dtype_of(model: Model) -> str:
    """Return the weight format that the checkpoint itself carries."""
    if model.quantization is None:
        return "fp16" if model.native_dtype == "fp16" else "bf16"
    method = model.quantization.method
    if method in ("awq", "gptq"):
        return f"{method}-int4" if model.quantization.weight_bits <= 4 else "int8"
    if method == "mxfp4":
        return "mxfp4"
    if method == "fp8":
        return "fp8"
    return (
        "awq-int4"
        if model.quantization.weight_bits <= 4
        else ("fp8" if model.quantization.weight_bits <= 8 else "bf16")
    )


@lru_cache(maxsize=512)
def shapes_of(model: Model) -> Shapes:
    """Return the sizes of `model`, from its configuration alone."""
    n_moe_layers = model.n_layers - model.moe.n_dense_layers if model.moe else 0
    n_dense_layers = model.n_layers - n_moe_layers
    other = 0
    if model.mla is not None:
        matrix, norms = mla_params(
            model.d_model,
            model.n_heads,
            q_lora_rank=model.mla.q_lora_rank,
            kv_lora_rank=model.mla.kv_lora_rank,
            qk_nope_head_dim=model.mla.qk_nope_head_dim,
            qk_rope_head_dim=model.mla.qk_rope_head_dim,
            v_head_dim=model.mla.v_head_dim,
        )
        other += norms * model.n_layers
        kv_elements = mla_elements_per_token_layer(model.mla.kv_lora_rank, model.mla.qk_rope_head_dim)
        d_head = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        d_value = model.mla.v_head_dim
    else:
        matrix, bias = attention_params(
            model.d_model,
            model.n_heads,
            model.n_kv_heads,
            model.d_head,
            has_qkv_bias=model.has_attention_bias,
            has_output_bias=model.has_output_bias,
        )
        other += bias * model.n_layers
        kv_elements = kv_elements_per_token_layer(model.n_kv_heads, model.d_head)
        d_head = d_value = model.d_head
    attention = matrix * model.n_layers
    dense, dense_bias = mlp_params(model.d_model, model.d_ff, is_gated=model.is_gated_mlp, has_bias=model.has_mlp_bias)
    mlp = dense * n_dense_layers
    other += dense_bias * n_dense_layers
    router = expert = n_experts = top_k = 0
    if model.moe:
        n_experts, top_k = model.moe.n_experts, model.moe.n_experts_per_token
        router = model.d_model * n_experts * n_moe_layers
        expert, expert_bias = mlp_params(
            model.d_model, model.moe.d_ff_expert, is_gated=True, has_bias=model.moe.has_expert_bias
        )
        other += (expert_bias * n_experts + (n_experts if model.moe.has_expert_bias else 0)) * n_moe_layers
        if model.moe.d_ff_shared:
            mlp += mlp_params(model.d_model, model.moe.d_ff_shared, is_gated=True)[0] * n_moe_layers
        other += model.moe.n_router_extra_params * n_moe_layers
    norm_width = model.d_model * (2 if model.has_norm_bias else 1)
    other += norm_width * (model.n_norms_per_layer * model.n_layers + 1)
    other += norm_width if model.has_embedding_norm else 0
    other += 2 * model.d_head * model.n_layers if model.has_qk_norm else 0
    other += model.n_heads * model.n_layers if model.has_attention_sinks else 0
    other += model.n_extra_params
    # Gemma 3 turns local and global layers by bases of their own: two tables
    n_rotary = 2 if model.architecture.startswith("Gemma3") and model.n_sliding_layers else 1
    return Shapes(
        n_layers=model.n_layers,
        d_model=model.d_model,
        d_ff=model.moe.d_ff_expert * top_k + model.moe.d_ff_shared if model.moe else model.d_ff,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        d_head=d_head,
        d_attention_value=d_value,
        vocab_size=model.vocab_size,
        embedding_params=model.vocab_size * model.d_model,
        head_params=model.vocab_size * model.d_model,
        has_own_head=not model.has_tied_embeddings,
        position_params=model.n_learned_positions * model.d_model,
        attention_matrix_params=attention,
        mlp_matrix_params=mlp,
        down_frac=1 / 3 if model.is_gated_mlp else 1 / 2,
        router_params=router,
        other_params=other,
        expert_params=expert,
        n_moe_layers=n_moe_layers,
        n_experts=n_experts,
        n_experts_per_token=top_k,
        kv_elements_per_token_layer=kv_elements,
        is_mla=model.mla is not None,
        n_full_layers=model.n_layers - (model.n_sliding_layers if model.sliding_window_tokens else 0),
        n_sliding_layers=model.n_sliding_layers if model.sliding_window_tokens else 0,
        sliding_window_tokens=model.sliding_window_tokens,
        rotary_bytes=0 if model.n_learned_positions else model.max_context_tokens * model.d_head * 2 * n_rotary,
        native_weight_dtype=weight_dtype_of(model),
        has_shared_experts=model.moe is not None and model.moe.d_ff_shared > 0,
        embeds_on_every_stage=model.architecture in EMBEDS_ON_EVERY_STAGE,
        fixed_graph_tokens=FIXED_GRAPH_TOKENS.get(model.architecture, 0),
        n_further_norms=max(0, model.n_norms_per_layer - 2) + 2 * model.has_qk_norm,
    )
