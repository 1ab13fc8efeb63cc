"""What each `model_type` means where its config.json is silent: biases, norms, tied embeddings, default sizes.

Read from the model code of transformers 5.23.0 and vLLM 0.26.0; tests compare the parameter counts that follow with
those of transformers' own modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """The architecture facts of one `model_type` that its config.json leaves to the code."""

    is_gated_mlp: bool = True
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qkv_bias_field: str = ""
    """config field that switches the q, k, v biases (and the output bias if `bias_field_covers_output`)"""
    bias_field_covers_output: bool = False
    has_mlp_bias: bool = False
    mlp_bias_field: str = ""
    has_norm_bias: bool = False
    n_norms_per_layer: int = 2
    has_qk_norm: bool = False
    qk_norm_field: str = ""
    is_qk_norm_over_all_heads: bool = False
    """OLMo-2 and Cohere: one weight for each element of q and k, not one vector of head size that all heads share"""
    has_embedding_norm: bool = False
    position_offset: int = -1
    """learned positions = max_context_tokens + offset; -1 = none"""
    is_parallel: bool = False
    d_head: int = 0
    n_kv_heads: int = 0
    d_ff_per_d_model: int = 0
    """default of the intermediate size as a multiple of d_model, 0 = must be given"""
    has_head_bias: bool = False
    head_bias_field: str = ""
    sliding_window: int = 0
    """default when the key is missing (null means none)"""
    sliding_period: int = 0
    """one layer in this many is global, the others slide; 0 = all layers slide"""
    is_first_of_period_sliding: bool = True


_LLAMA = Family(qkv_bias_field="attention_bias", bias_field_covers_output=True, mlp_bias_field="mlp_bias")
_QWEN3 = Family(qkv_bias_field="attention_bias", bias_field_covers_output=True, has_qk_norm=True, d_head=128)
_DEEPSEEK = Family(qkv_bias_field="attention_bias", bias_field_covers_output=True)
_MISTRAL = Family(n_kv_heads=8, sliding_window=4096)
_GPT = Family(
    is_gated_mlp=False,
    has_tied_embeddings=True,
    has_qkv_bias=True,
    has_output_bias=True,
    has_mlp_bias=True,
    has_norm_bias=True,
    d_ff_per_d_model=4,
)
_COHERE = Family(
    has_tied_embeddings=True,
    qkv_bias_field="attention_bias",
    bias_field_covers_output=True,
    n_norms_per_layer=1,
    is_parallel=True,
)
_OLMO2 = Family(
    qkv_bias_field="attention_bias", bias_field_covers_output=True, has_qk_norm=True, is_qk_norm_over_all_heads=True
)
_ERNIE = Family(
    has_tied_embeddings=True, qkv_bias_field="use_bias", bias_field_covers_output=True, mlp_bias_field="use_bias"
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "mixtral": Family(n_kv_heads=8),
    "qwen2": Family(has_qkv_bias=True),
    "qwen2_moe": Family(has_qkv_bias=True, qkv_bias_field="qkv_bias"),
    "qwen3": _QWEN3,
    "qwen3_moe": Family(qkv_bias_field="attention_bias", bias_field_covers_output=True, has_qk_norm=True),
    "gemma": Family(
        has_tied_embeddings=True, qkv_bias_field="attention_bias", bias_field_covers_output=True, d_head=256
    ),
    "gemma2": Family(
        has_tied_embeddings=True,
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        n_norms_per_layer=4,
        d_head=256,
        sliding_window=4096,
        sliding_period=2,
    ),
    "gemma3_text": Family(
        has_tied_embeddings=True,
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        n_norms_per_layer=4,
        has_qk_norm=True,
        d_head=256,
        n_kv_heads=4,
        sliding_window=4096,
        sliding_period=6,
    ),
    "phi": Family(
        is_gated_mlp=False,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        has_norm_bias=True,
        n_norms_per_layer=1,
        is_parallel=True,
        has_head_bias=True,
    ),
    "phi3": Family(),
    "phimoe": Family(
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        has_norm_bias=True,
        head_bias_field="lm_head_bias",
    ),
    "falcon": Family(
        is_gated_mlp=False,
        has_tied_embeddings=True,
        qkv_bias_field="bias",
        bias_field_covers_output=True,
        mlp_bias_field="bias",
        has_norm_bias=True,
        d_ff_per_d_model=4,
    ),
    "bloom": Family(
        is_gated_mlp=False,
        has_tied_embeddings=True,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        has_norm_bias=True,
        d_ff_per_d_model=4,
        has_embedding_norm=True,
    ),
    "opt": Family(
        is_gated_mlp=False,
        has_tied_embeddings=True,
        has_qkv_bias=True,
        has_output_bias=True,
        qkv_bias_field="enable_bias",
        bias_field_covers_output=True,
        has_mlp_bias=True,
        mlp_bias_field="enable_bias",
        has_norm_bias=True,
        position_offset=2,
    ),
    "gpt2": replace(_GPT, position_offset=0),
    "gpt_bigcode": replace(_GPT, position_offset=0),
    "gpt_neox": Family(
        is_gated_mlp=False,
        has_qkv_bias=True,
        has_output_bias=True,
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        has_mlp_bias=True,
        has_norm_bias=True,
    ),
    "gptj": Family(
        is_gated_mlp=False,
        has_mlp_bias=True,
        has_norm_bias=True,
        n_norms_per_layer=1,
        is_parallel=True,
        d_ff_per_d_model=4,
        has_head_bias=True,
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "gpt_oss": Family(
        has_qkv_bias=True,
        has_output_bias=True,
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        d_head=64,
        n_kv_heads=8,
        sliding_window=128,
        sliding_period=2,
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, sliding_window=4096, sliding_period=4),
    "olmoe": _OLMO2,
    "ernie4_5": replace(_ERNIE, d_head=128),
    "ernie4_5_moe": replace(_ERNIE, head_bias_field="use_bias"),
    "granite": _LLAMA,
    "granitemoe": Family(qkv_bias_field="attention_bias", bias_field_covers_output=True),
    "cohere": replace(_COHERE, qk_norm_field="use_qk_norm", is_qk_norm_over_all_heads=True),
    "cohere2": replace(_COHERE, sliding_window=4096, sliding_period=4),
    "stablelm": Family(
        qkv_bias_field="use_qkv_bias",
        has_norm_bias=True,
        qk_norm_field="qk_layernorm",
        is_qk_norm_over_all_heads=True,
    ),
    "internlm2": Family(qkv_bias_field="bias", bias_field_covers_output=True),
    "starcoder2": Family(
        is_gated_mlp=False,
        has_tied_embeddings=True,
        has_qkv_bias=True,
        has_output_bias=True,
        qkv_bias_field="use_bias",
        bias_field_covers_output=True,
        has_mlp_bias=True,
        mlp_bias_field="use_bias",
        has_norm_bias=True,
        n_kv_heads=2,
    ),
    "glm4": Family(has_qkv_bias=True, qkv_bias_field="attention_bias", n_norms_per_layer=4, d_head=128, n_kv_heads=2),
    "glm4_moe": Family(qkv_bias_field="attention_bias", qk_norm_field="use_qk_norm"),
    "llama4_text": Family(qkv_bias_field="attention_bias", bias_field_covers_output=True, n_kv_heads=8, d_head=128),
}

UNKNOWN = Family(
    qkv_bias_field="attention_bias",
    bias_field_covers_output=True,
    mlp_bias_field="mlp_bias",
    qk_norm_field="use_qk_norm",
)
"""How a family that is not listed is read: like Llama, with the switches that its config.json names."""

ALIASES = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "deepseek_v32": "deepseek_v3",
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""Text parts of multimodal models, and variants, that are read like another family."""

NOT_DECODERS = frozenset(
    (
        *("albert", "bart", "bert", "blip_2", "clip", "deberta", "deberta_v2", "distilbert", "electra", "marian"),
        *("mbart", "mt5", "pegasus", "roberta", "siglip", "t5", "vit", "wav2vec2", "whisper", "xlm_roberta"),
    )
)
"""Encoders and encoder-decoders, which the laws of this package do not describe."""

NO_KV_CACHE = frozenset(
    (
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2"),
        *("nemotron_h", "kimi_linear", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("bailing_hybrid", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "minimax", "olmo_hybrid"),
    )
)
"""State-space and hybrid models: their state does not grow by a KV entry a token in every layer."""
STATE_FIELDS = (
    *("full_attention_interval", "linear_num_key_heads", "linear_attn_config", "attn_layer_period", "ssm_cfg"),
    *("mamba_d_state", "mamba_expand", "ssm_state_size", "conv_L_cache"),
)
"""Fields by which such a model is known that bears another name."""
