"""Sizes that a config.json keeps in nested objects or repeats for each layer, brought to the top level."""

from __future__ import annotations

from typing import Any

from advisor.catalog.hf_fields import Fields
from advisor.errors import BadData, printable

_NESTED: dict[str, dict[str, tuple[str, ...]]] = {
    "dbrx": {"attn_config": ("kv_n_heads",), "ffn_config": ("ffn_hidden_size", "moe_num_experts", "moe_top_k")},
    "mpt": {"attn_config": ("kv_n_heads",)},
}
"""Family: nested object: the sizes in it that describe the layers."""
_A_LAYER: dict[str, tuple[str, ...]] = {"hunyuan_v1_moe": ("moe_topk", "moe_intermediate_size", "num_shared_expert")}
"""Family: sizes that its files may give as one number for each layer."""


def with_flat_sizes(name: str, fields: Fields) -> Fields:
    """Return the fields with such sizes as plain numbers; BadData when they differ from layer to layer."""
    values: dict[str, Any] = {}
    for section, keys in _NESTED.get(name, {}).items():
        nested = fields.section(section)
        values.update({key: nested.raw(key) for key in keys if nested is not None})
    for key in _A_LAYER.get(name, ()):
        if isinstance(fields.raw(key), list):
            numbers = set(fields.integers(key))
            if len(numbers) != 1:
                raise BadData(
                    fields.where, f"'{printable(key)}' must be the same in all layers, got {len(numbers)} different"
                )
            values[key] = numbers.pop()
    return fields.updated(values) if values else fields
