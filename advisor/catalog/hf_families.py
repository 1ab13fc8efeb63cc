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
    output_bias_field: str = ""
    """config field of the output bias, where it has a switch of its own"""
    has_mlp_bias: bool = False
    mlp_bias_field: str = ""
    has_norm_bias: bool = False
    n_norms_per_layer: int = 2
    has_qk_norm: bool = False
    qk_norm_field: str = ""
    is_qk_norm_over_all_heads: bool = False
    """OLMo and Cohere: one weight for each element of q and k, not one vector of head size that all heads share"""
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
    """whether the global layer is the last of its period, not the first"""
    has_attention_sinks: bool = False
    has_attention_gate: bool = False
    """a matrix as large as q's that gates the attention's output"""
    n_dense_layers: int = 0
    """first layers without experts when no field counts them"""
    n_shared_experts: int = 0
    """default when no field counts them"""
    has_corrected_router: bool = False
    """a bias an expert that balances the load without an auxiliary loss"""
    n_activation_params: int = 0
    """learned numbers of one layer's activation function"""


_SWITCHED = Family(qkv_bias_field="attention_bias", bias_field_covers_output=True)
"""One switch for the biases of q, k, v and of the output, off unless a file sets it."""
_LLAMA = replace(_SWITCHED, mlp_bias_field="mlp_bias")
_QK_NORM = replace(_SWITCHED, has_qk_norm=True)
_QWEN3 = replace(_QK_NORM, d_head=128)
_GEMMA = replace(_SWITCHED, has_tied_embeddings=True, d_head=256)
_DEEPSEEK = replace(_SWITCHED, has_corrected_router=True)
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
_OLMO2 = replace(_QK_NORM, is_qk_norm_over_all_heads=True)
_ERNIE = Family(
    has_tied_embeddings=True, qkv_bias_field="use_bias", bias_field_covers_output=True, mlp_bias_field="use_bias"
)
_GLM_MOE = Family(
    qkv_bias_field="attention_bias",
    qk_norm_field="use_qk_norm",
    n_dense_layers=1,
    n_shared_experts=1,
    has_corrected_router=True,
)
_EXAONE4 = Family(has_qk_norm=True, sliding_window=4096, sliding_period=4)
_HUNYUAN = replace(_QK_NORM, qk_norm_field="use_qk_norm")
_GRANITE_SWA = replace(
    _LLAMA,
    sliding_window=128,
    sliding_period=4,
    is_first_of_period_sliding=False,
    has_attention_sinks=True,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "mixtral": Family(n_kv_heads=8),
    "qwen2": Family(has_qkv_bias=True),
    "qwen2_moe": Family(has_qkv_bias=True, qkv_bias_field="qkv_bias"),
    "qwen3": _QWEN3,
    "qwen3_moe": _QK_NORM,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, n_norms_per_layer=4, sliding_window=4096, sliding_period=2),
    "gemma3_text": replace(
        _GEMMA,
        n_norms_per_layer=4,
        has_qk_norm=True,
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
    "deepseek_v2": _SWITCHED,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "axk1": replace(_DEEPSEEK, n_dense_layers=1, n_shared_experts=1),
    "aria_text": replace(_LLAMA, n_shared_experts=2),
    "gpt_oss": Family(
        has_qkv_bias=True,
        has_output_bias=True,
        qkv_bias_field="attention_bias",
        bias_field_covers_output=True,
        d_head=64,
        n_kv_heads=8,
        sliding_window=128,
        sliding_period=2,
        has_attention_sinks=True,
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, sliding_window=4096, sliding_period=4),
    "olmoe": _OLMO2,
    "ernie4_5": replace(_ERNIE, d_head=128),
    "ernie4_5_moe": replace(
        _ERNIE, head_bias_field="use_bias", n_dense_layers=1, n_shared_experts=2, has_corrected_router=True
    ),
    "flex_olmo": _OLMO2,
    # its norms hold no weights: hf_config says so in a note
    "olmo": _SWITCHED,
    "granite": _LLAMA,
    "granite_swa": replace(_GRANITE_SWA, has_tied_embeddings=True),
    "granitemoe": _SWITCHED,
    "granitemoeshared": _SWITCHED,
    "granitemoe_swa": replace(_GRANITE_SWA, mlp_bias_field=""),
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
    "glm": Family(has_qkv_bias=True, qkv_bias_field="attention_bias", d_head=128, n_kv_heads=2),
    "glm4_moe": _GLM_MOE,
    "glm4v_moe_text": replace(_GLM_MOE, has_qkv_bias=True),
    "glm4_moe_lite": replace(_DEEPSEEK, n_dense_layers=1, n_shared_experts=1),
    "llama4_text": Family(qkv_bias_field="attention_bias", bias_field_covers_output=True, n_kv_heads=8, d_head=128),
    "smollm3": replace(_LLAMA, has_tied_embeddings=True, n_kv_heads=4),
    "seed_oss": Family(
        has_qkv_bias=True,
        qkv_bias_field="attention_bias",
        output_bias_field="attention_out_bias",
        mlp_bias_field="mlp_bias",
        d_head=128,
    ),
    "exaone": Family(),
    "exaone4": _EXAONE4,
    "exaone_moe": replace(_EXAONE4, n_dense_layers=1, n_shared_experts=1, has_corrected_router=True),
    "minimax_m2": Family(has_qk_norm=True, is_qk_norm_over_all_heads=True, d_head=128, has_corrected_router=True),
    "dots1": replace(_QK_NORM, sliding_window=4096, has_corrected_router=True),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": replace(_HUNYUAN, n_shared_experts=1),
    "hy_v3": replace(
        _QWEN3, mlp_bias_field="mlp_bias", n_dense_layers=1, n_shared_experts=1, has_corrected_router=True
    ),
    "arcee": replace(_LLAMA, is_gated_mlp=False),
    "afmoe": replace(
        _QWEN3,
        n_norms_per_layer=4,
        sliding_window=1024,
        sliding_period=4,
        has_attention_gate=True,
        n_dense_layers=1,
        n_shared_experts=2,
        has_corrected_router=True,
    ),
    "apertus": replace(_QK_NORM, is_gated_mlp=False, n_activation_params=2),
    "ministral3": Family(n_kv_heads=8, d_head=128),
    "mistral4": replace(_SWITCHED, n_shared_experts=1),
    "nemotron": replace(_LLAMA, is_gated_mlp=False, has_norm_bias=True),
    "jais2": replace(
        _LLAMA, is_gated_mlp=False, has_norm_bias=True, has_qkv_bias=True, has_output_bias=True, has_mlp_bias=True
    ),
    "dbrx": Family(),
    "mpt": Family(is_gated_mlp=False, has_tied_embeddings=True, d_ff_per_d_model=4),
    "solar_open": Family(qkv_bias_field="attention_bias", d_head=128, n_shared_experts=1, has_corrected_router=True),
    "cohere2_moe": replace(_COHERE, d_head=128, sliding_window=4096, sliding_period=4),
    "hyperclovax": replace(_LLAMA, n_norms_per_layer=4),
    "mellum": _QWEN3,
    "cwm": Family(
        d_head=128,
        mlp_bias_field="mlp_bias",
        sliding_window=8192,
        sliding_period=4,
        is_first_of_period_sliding=False,
    ),
    "helium": Family(qkv_bias_field="attention_bias", mlp_bias_field="mlp_bias", d_head=128),
    "internlm3": replace(_LLAMA, d_head=128),
    "iquestcoder": replace(_LLAMA, d_head=128),
    "vaultgemma": replace(_GEMMA, sliding_window=4096, sliding_period=2),
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
    "codegen": "gptj",
    "deepseek_v32": "deepseek_v3",
    "gemma3": "gemma3_text",
    "glm4v_text": "glm4",
    "glm_moe_dsa": "deepseek_v3",
    "llama4": "llama4_text",
    "mimo": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""Text parts of multimodal models, and variants, that are read like another family."""
