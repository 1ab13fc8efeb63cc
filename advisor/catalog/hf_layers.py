"""What differs from layer to layer in a config.json: experts and sliding windows."""

from __future__ import annotations

import re

from advisor.catalog.hf_families import Family
from advisor.catalog.hf_fields import Fields
from advisor.errors import BadData
from advisor.schema import Moe
from advisor.schema.model import MAX_DIM

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a config.json under which families keep the number of experts."""
_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
)
"""Keys for the experts that one token uses."""
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_EXPERT_SIZES = ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size")
_SHARED_SIZES = ("shared_expert_intermediate_size", "shared_intermediate_size")
_SLIDING_TYPES = ("sliding_attention", "chunked_attention")


def moe_of(fields: Fields, name: str, family: Family, n_layers: int) -> Moe | None:
    """Return the mixture of experts, None for a dense model."""
    if not fields.has(*EXPERT_COUNTS):
        return None
    n_experts = fields.integer(*EXPERT_COUNTS, low=0, high=65536)
    if n_experts == 0:
        return None
    d_ff_expert = fields.integer(*_EXPERT_SIZES, low=1, high=MAX_DIM)
    n_shared = fields.integer(*_SHARED_EXPERTS, low=0, high=1024, default=family.n_shared_experts)
    d_ff_shared = n_shared * d_ff_expert
    n_router_extra = 0
    if fields.has(*_SHARED_SIZES):
        d_ff_shared = fields.integer(*_SHARED_SIZES, low=0, high=MAX_DIM)
        n_shared = 1 if d_ff_shared else 0
        # Qwen2-MoE: a vector of d_model gates the shared expert
        n_router_extra = fields.integer("hidden_size", low=1, high=MAX_DIM) if name == "qwen2_moe" else 0
    elif name == "llama4_text":
        n_shared, d_ff_shared = 1, d_ff_expert
    if family.has_corrected_router or fields.raw("topk_method") == "noaux_tc":
        n_router_extra = n_experts
    if name in ("ernie4_5_moe", "hy_v3") and n_shared and fields.boolean(family.mlp_bias_field, False):
        n_router_extra += 2 * d_ff_shared + fields.integer("hidden_size", low=1, high=MAX_DIM)
    if name == "axk1":
        # a norm after the experts, which the dense layers lack
        n_router_extra += fields.integer("hidden_size", low=1, high=MAX_DIM)
    return Moe(
        n_experts=n_experts,
        n_experts_per_token=fields.integer(*_EXPERTS_PER_TOKEN, low=1, high=65536),
        d_ff_expert=d_ff_expert,
        n_shared_experts=n_shared,
        d_ff_shared=min(d_ff_shared, MAX_DIM),
        n_dense_layers=_n_dense_layers(fields, name, family, n_layers),
        has_expert_bias=name == "gpt_oss",
        n_router_extra_params=n_router_extra,
    )


def _n_dense_layers(fields: Fields, name: str, family: Family, n_layers: int) -> int:
    """Count the layers whose MLP has no experts, by the rule of the family's code."""
    if types := fields.texts("mlp_layer_types"):
        if len(types) != n_layers:
            raise BadData(fields.where, f"'mlp_layer_types' must name all {n_layers} layers, got {len(types)}")
        return types.count("dense")
    dense = {layer for layer in fields.integers("mlp_only_layers") if 0 <= layer < n_layers}
    names = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
    first = fields.integer(*names, low=0, high=n_layers, default=min(family.n_dense_layers, n_layers))
    frequency = fields.raw("moe_layer_freq")
    if isinstance(frequency, list):
        # one flag a layer, as MiniMax and MiMo write it
        flags = fields.integers("moe_layer_freq")
        return sum(1 for flag in flags[:n_layers] if not flag)
    every = fields.integer("moe_layer_freq", low=1, high=2000, default=1)
    step = fields.integer("decoder_sparse_step", low=1, high=2000, default=1)
    if name == "ernie4_5_moe":
        step = fields.integer("moe_layer_interval", low=1, high=2000, default=1)
        last = fields.integer("moe_layer_end_index", low=-1, high=2000, default=-1)
        dense |= set(range(last + 1, n_layers)) if last >= 0 else set()
    if name == "llama4_text":
        step = fields.integer("interleave_moe_layer_step", low=1, high=2000, default=1)
    dense |= {
        layer for layer in range(n_layers) if layer < first or (layer >= first and layer % every) or (layer + 1) % step
    }
    return len(dense)


def sliding_of(fields: Fields, name: str, family: Family, n_layers: int) -> tuple[int, int]:
    """Return (window in tokens, layers that only see the window); (0, 0) when every layer sees all."""
    is_chunked = not fields.has("sliding_window") and fields.has("attention_chunk_size")
    default = family.sliding_window if fields.is_absent("sliding_window") else 0
    key = "attention_chunk_size" if is_chunked else "sliding_window"
    window = fields.integer(key, low=0, high=10**9, default=default)
    # Qwen and SmolLM files carry a window that is off unless this switch says otherwise
    is_on = fields.boolean("use_sliding_window", not name.startswith(("qwen", "smollm")))
    if window == 0 or not is_on:
        return 0, 0
    n_sliding = _n_sliding(fields, name, family, n_layers, is_chunked=is_chunked)
    return (window, n_sliding) if n_sliding else (0, 0)


def _n_sliding(fields: Fields, name: str, family: Family, n_layers: int, *, is_chunked: bool) -> int:
    """Count the layers that slide, given that the window is on."""
    if layer_types := fields.texts("layer_types"):
        if len(layer_types) != n_layers:
            raise BadData(fields.where, f"'layer_types' must name all {n_layers} layers, got {len(layer_types)}")
        return sum(1 for t in layer_types if t in _SLIDING_TYPES)
    if name == "smollm3":
        # the layers without rotary positions slide
        flags = fields.integers("no_rope_layers")[:n_layers]
        every = fields.integer("no_rope_layer_interval", low=1, high=2000, default=4)
        return flags.count(0) if flags else n_layers // every
    if fields.has("use_sliding_window") or name == "dots1":
        # Qwen: the first max_window_layers layers keep full attention
        return max(0, n_layers - fields.integer("max_window_layers", low=0, high=10**6, default=n_layers))
    period = _period(fields, family)
    if is_chunked and period == 1:
        period = fields.integer("no_rope_layer_interval", low=1, high=2000, default=4)
    if period == 1:
        return n_layers
    if name == "cohere2_moe":
        # the dense layers in front have a period of their own
        first = fields.integer("first_k_dense_replace", low=0, high=n_layers, default=0)
        every = fields.integer("prefix_dense_sliding_window_pattern", low=1, high=2000, default=1)
        return n_layers - first // every - (n_layers - first) // period
    n_global = n_layers // period if family.is_first_of_period_sliding else -(-n_layers // period)
    return n_layers - n_global


def _period(fields: Fields, family: Family) -> int:
    """Return in how many layers one is global; 1 = all slide."""
    pattern = fields.raw("sliding_window_pattern")
    if isinstance(pattern, str) and re.fullmatch("L{1,1999}G", pattern):
        # EXAONE 4 draws it: LLLG
        return len(pattern)
    names = ("sliding_window_pattern", "global_attn_every_n_layers")
    return fields.integer(*names, low=1, high=2000, default=family.sliding_period or 1)
