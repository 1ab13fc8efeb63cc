"""What differs from layer to layer in a config.json: experts and sliding windows."""

from __future__ import annotations

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
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_CORRECTED_ROUTERS = frozenset(("deepseek_v3", "ernie4_5_moe", "glm4_moe", "kimi_k2"))
"""Families whose router has a bias an expert that balances the load without an auxiliary loss."""
_SLIDING_TYPES = ("sliding_attention", "chunked_attention")


def moe_of(fields: Fields, family: str, n_layers: int) -> Moe | None:
    """Return the mixture of experts, None for a dense model."""
    if not fields.has(*EXPERT_COUNTS):
        return None
    n_experts = fields.integer(*EXPERT_COUNTS, low=0, high=65536)
    if n_experts == 0:
        return None
    d_ff_expert = fields.integer("moe_intermediate_size", "intermediate_size", low=1, high=MAX_DIM)
    n_shared = fields.integer(*_SHARED_EXPERTS, low=0, high=1024, default=0)
    d_ff_shared = n_shared * d_ff_expert
    n_router_extra = 0
    if fields.has("shared_expert_intermediate_size"):
        d_ff_shared = fields.integer("shared_expert_intermediate_size", low=0, high=MAX_DIM)
        n_shared = 1 if d_ff_shared else 0
        # Qwen2-MoE: a vector of d_model gates the shared expert
        n_router_extra = fields.integer("hidden_size", low=1, high=MAX_DIM) if family == "qwen2_moe" else 0
    elif family == "llama4_text":
        n_shared, d_ff_shared = 1, d_ff_expert
    if family in _CORRECTED_ROUTERS or fields.raw("topk_method") == "noaux_tc":
        n_router_extra = n_experts
    if family == "ernie4_5_moe" and n_shared and fields.boolean("use_bias", False):
        n_router_extra += 2 * d_ff_shared + fields.integer("hidden_size", low=1, high=MAX_DIM)
    return Moe(
        n_experts=n_experts,
        n_experts_per_token=fields.integer(*_EXPERTS_PER_TOKEN, low=1, high=65536),
        d_ff_expert=d_ff_expert,
        n_shared_experts=n_shared,
        d_ff_shared=min(d_ff_shared, MAX_DIM),
        n_dense_layers=_n_dense_layers(fields, family, n_layers),
        has_expert_bias=family == "gpt_oss",
        n_router_extra_params=n_router_extra,
    )


def _n_dense_layers(fields: Fields, family: str, n_layers: int) -> int:
    """Count the layers whose MLP has no experts, by the rule of the family's code."""
    dense = {layer for layer in fields.integers("mlp_only_layers") if 0 <= layer < n_layers}
    first = fields.integer("first_k_dense_replace", low=0, high=n_layers, default=0)
    frequency = fields.raw("moe_layer_freq")
    if isinstance(frequency, list):
        # one flag a layer, as MiniMax and MiMo write it
        flags = fields.integers("moe_layer_freq")
        return sum(1 for flag in flags[:n_layers] if not flag)
    every = fields.integer("moe_layer_freq", low=1, high=2000, default=1)
    step = fields.integer("decoder_sparse_step", low=1, high=2000, default=1)
    if family == "ernie4_5_moe":
        first = fields.integer("moe_layer_start_index", low=0, high=2000, default=1)
        step = fields.integer("moe_layer_interval", low=1, high=2000, default=1)
        last = fields.integer("moe_layer_end_index", low=-1, high=2000, default=-1)
        dense |= set(range(last + 1, n_layers)) if last >= 0 else set()
    if family == "llama4_text":
        step = fields.integer("interleave_moe_layer_step", low=1, high=2000, default=1)
    dense |= {
        layer for layer in range(n_layers) if layer < first or (layer >= first and layer % every) or (layer + 1) % step
    }
    return len(dense)


def sliding_of(fields: Fields, family_name: str, family: Family, n_layers: int) -> tuple[int, int]:
    """Return (window in tokens, layers that only see the window); (0, 0) when every layer sees all."""
    layer_types = fields.texts("layer_types")
    is_chunked = not fields.has("sliding_window") and fields.has("attention_chunk_size")
    default = family.sliding_window if fields.is_absent("sliding_window") else 0
    name = "attention_chunk_size" if is_chunked else "sliding_window"
    window = fields.integer(name, low=0, high=10**9, default=default)
    # Qwen files carry a window that is off unless this switch says otherwise
    is_on = fields.boolean("use_sliding_window", not family_name.startswith("qwen"))
    if window == 0 or not is_on:
        return 0, 0
    if layer_types:
        if len(layer_types) != n_layers:
            raise BadData(fields.where, f"'layer_types' must name all {n_layers} layers, got {len(layer_types)}")
        n_sliding = sum(1 for t in layer_types if t in _SLIDING_TYPES)
        return (window, n_sliding) if n_sliding else (0, 0)
    if fields.has("use_sliding_window"):
        # Qwen: the first max_window_layers layers keep full attention
        n_full = fields.integer("max_window_layers", low=0, high=10**6, default=n_layers)
        n_sliding = max(0, n_layers - n_full)
        return (window, n_sliding) if n_sliding else (0, 0)
    period = fields.integer("sliding_window_pattern", low=1, high=2000, default=family.sliding_period or 1)
    if is_chunked and period == 1:
        period = fields.integer("no_rope_layer_interval", low=1, high=2000, default=4)
    if period == 1:
        return window, n_layers
    return window, n_layers - n_layers // period
