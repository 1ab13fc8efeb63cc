"""Which config.json files are refused, and the sentence that says why."""

from __future__ import annotations

from advisor.catalog.hf_fields import Fields
from advisor.errors import BadData, printable

_NOT_DECODERS = frozenset(
    (
        *("albert", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blip-2"),
        *("blenderbot-small", "blip_2", "camembert", "clip", "data2vec-text", "deberta", "deberta-v2", "deberta_v2"),
        *("distilbert", "electra", "ernie", "marian", "mbart", "megatron-bert", "modernbert", "mt5", "mvp"),
        *("pegasus", "plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("siglip", "t5", "trocr", "vit", "wav2vec2", "whisper", "xlm-roberta", "xlm-roberta-xl", "xlm_roberta"),
        *("xmod",),
    )
)
"""Encoders and encoder-decoders, which the laws of this package do not describe."""

_NO_KV_CACHE = frozenset(
    (
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2"),
        *("nemotron_h", "kimi_linear", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("bailing_hybrid", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "minimax", "olmo_hybrid"),
    )
)
"""State-space and hybrid models: their state does not grow by a KV entry a token in every layer."""
_STATE_FIELDS = (
    *("full_attention_interval", "linear_num_key_heads", "linear_attn_config", "attn_layer_period", "ssm_cfg"),
    *("mamba_d_state", "mamba_expand", "ssm_state_size", "conv_L_cache"),
)
"""Fields by which such a model is known that bears another name."""

_SHARED_KV = "layers that reuse the keys and values of other layers"
_GEMMA4 = "global layers with another head size than the sliding ones"
_OTHER_HEADS = "sliding layers with another number of heads than the full ones"
_MIXED_LAYERS = {
    "deepseek_v4": "attention over keys and values that it compresses along the sequence",
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "longcat_flash": "two attention blocks a layer",
    "mimo_v2": _OTHER_HEADS,
    "mimo_v2_flash": _OTHER_HEADS,
    "nemotron-nas": "layers of different sizes",
    "step3p5": _OTHER_HEADS,
}
"""Attention-only families whose layers one set of sizes does not describe."""


def refuse_unsupported(name: str, fields: Fields) -> None:
    """Raise BadData, with the reason, when this package has no laws for the architecture."""
    shown = f"model_type '{printable(name)}'"
    if name in _NOT_DECODERS or fields.boolean("is_encoder_decoder", False):
        raise BadData(fields.where, f"{shown} is not a decoder-only transformer")
    has_state = fields.has(*_STATE_FIELDS) or any("linear" in t or "mamba" in t for t in fields.texts("layer_types"))
    if name in _NO_KV_CACHE or has_state:
        raise BadData(fields.where, f"{shown} has state-space or linear-attention layers; only attention is supported")
    if reason := _MIXED_LAYERS.get(name) or _mixed_by_fields(fields):
        raise BadData(fields.where, f"{shown} has {reason}; one attention shape for all layers is supported")


def _mixed_by_fields(fields: Fields) -> str:
    """Return what sets some layers' attention apart in a file of any name, empty when nothing does."""
    if fields.integer("num_kv_shared_layers", low=0, high=2000, default=0) or fields.boolean("use_cla", False):
        return _SHARED_KV
    if fields.has("block_configs"):
        return "layers of different sizes"
    if len(set(fields.integers("num_attention_heads_per_layer"))) > 1:
        return _OTHER_HEADS
    return ""
