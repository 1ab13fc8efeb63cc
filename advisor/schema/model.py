"""A language model as its config.json describes it; no arithmetic."""

from typing import Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Name, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Source

MAX_DIM = 10**7


class Mla(Noun):
    """Multi-head latent attention (DeepSeek-V2/V3): the compressed KV vector is what is cached."""

    q_lora_rank: NonNegativeInt = Field(description="rank of the query compression, 0 = none")
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt


class Moe(Noun):
    """Mixture of experts: which layers have one and how large it is."""

    n_experts: PositiveInt = Field(le=65536, description="routed experts a layer")
    n_experts_per_token: PositiveInt = Field(description="routed experts that one token uses")
    d_ff_expert: PositiveInt = Field(le=MAX_DIM, description="intermediate size of one routed expert")
    n_shared_experts: NonNegativeInt = Field(default=0, description="experts that every token uses")
    d_ff_shared: NonNegativeInt = Field(default=0, description="intermediate size of all shared experts together")
    n_dense_layers: NonNegativeInt = Field(default=0, description="layers with a dense MLP instead of experts")
    has_expert_bias: bool = Field(default=False, description="experts and router carry biases (gpt-oss)")
    n_router_extra_params: NonNegativeInt = Field(
        default=0, description="other parameters a layer: correction bias (DeepSeek-V3), shared-expert gate (Qwen2-MoE)"
    )


class Quantization(Noun):
    """Quantisation stored in the checkpoint (config.json's quantization_config)."""

    method: Literal["fp8", "awq", "gptq", "mxfp4", "compressed-tensors", "bitsandbytes"]
    weight_bits: PositiveFloat = Field(le=16, description="bits of one quantised weight")
    group_size: NonNegativeInt = Field(default=0, description="weights that share a scale, 0 = per tensor or channel")


class Model(Noun):
    """The architecture of a decoder-only transformer.

    All sizes are counts of elements. `d_` is a dimension, `n_` a count.
    """

    name: Name
    family: Name = Field(description="config.json model_type")
    architecture: str = Field(default="", description="config.json architectures[0], what the engine loads")
    hf_id: str = Field(default="", max_length=200, description="hub id that a launch command should name")
    folder: str = Field(
        default="", max_length=4096, description="absolute path of the user's own checkpoint, where config.json lies"
    )
    n_layers: PositiveInt = Field(le=2000)
    d_model: PositiveInt = Field(le=MAX_DIM)
    n_heads: PositiveInt = Field(le=65536)
    n_kv_heads: PositiveInt = Field(le=65536)
    d_head: PositiveInt = Field(le=65536)
    d_ff: PositiveInt = Field(le=MAX_DIM, description="intermediate size of the dense MLP")
    vocab_size: PositiveInt = Field(le=10**8)
    max_context_tokens: PositiveInt = Field(le=10**9)
    is_gated_mlp: bool = Field(default=True, description="three matrices (SwiGLU, GeGLU) instead of two")
    has_tied_embeddings: bool = False
    has_attention_bias: bool = Field(default=False, description="biases on q, k, v")
    has_output_bias: bool = Field(default=False, description="bias on the attention output projection")
    has_mlp_bias: bool = False
    has_qk_norm: bool = Field(default=False, description="norm on each head's q and k (Qwen3, Gemma 3)")
    has_norm_bias: bool = Field(default=False, description="LayerNorm with bias instead of RMSNorm")
    n_norms_per_layer: PositiveInt = Field(default=2, le=16, description="d_model-sized norms a layer")
    has_embedding_norm: bool = Field(default=False, description="norm after the embedding (BLOOM)")
    rope_scaling: str = Field(
        default="", max_length=40, description="config.json rope_scaling type (llama3, yarn, linear), empty = unscaled"
    )
    n_learned_positions: NonNegativeInt = Field(default=0, description="learned position embeddings (GPT, OPT)")
    is_parallel_attention: bool = Field(default=False, description="attention and MLP side by side (Falcon)")
    sliding_window_tokens: NonNegativeInt = Field(default=0, description="window of the local layers, 0 = none")
    n_sliding_layers: NonNegativeInt = Field(default=0, description="layers that only see the window")
    has_attention_sinks: bool = Field(default=False, description="one learned sink logit a head (gpt-oss)")
    mla: Mla | None = None
    moe: Moe | None = None
    quantization: Quantization | None = None
    native_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    published_n_params: NonNegativeInt = Field(default=0, description="the publisher's own count, 0 = unknown")
    n_extra_params: NonNegativeInt = Field(default=0, description="parameters outside the text decoder (vision tower)")
    is_gated: bool = Field(default=False, description="the hub asks for an accepted licence")
    sources: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.n_sliding_layers > self.n_layers:
            raise ValueError(f"n_sliding_layers {self.n_sliding_layers} exceeds n_layers {self.n_layers}")
        if self.moe and self.moe.n_experts_per_token > self.moe.n_experts:
            raise ValueError("n_experts_per_token exceeds n_experts")
        if self.moe and self.moe.n_dense_layers > self.n_layers:
            raise ValueError("n_dense_layers exceeds n_layers")
        return self
