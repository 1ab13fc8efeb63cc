"""The `quantization_config` of a config.json as a `Quantization`."""

from __future__ import annotations

from collections.abc import Mapping

from advisor.catalog.hf_fields import Fields
from advisor.errors import BadData, printable
from advisor.schema import Quantization

_ACCEPTED = "fp8, fbgemm_fp8, awq, gptq, mxfp4, compressed-tensors, bitsandbytes, modelopt"


def quantization_of(fields: Fields) -> Quantization | None:
    """Return how the checkpoint's weights are quantised, None for an unquantised one.

    Errors: BadData for a method that is not known, since a wrong guess would be a wrong size.
    """
    section = fields.section("quantization_config") or fields.section("compression_config")
    if section is None:
        return None
    method = section.text("quant_method").lower().replace("_", "-")
    if method in ("fp8", "fbgemm-fp8"):
        block = section.integers("weight_block_size", limit=2)
        group = block[0] if block else 0
        if not 0 <= group <= 10**6:
            raise BadData(section.where, "'weight_block_size' must hold whole numbers from 1 to 1000000")
        return Quantization(method="fp8", weight_bits=8, group_size=group)
    if method in ("awq", "gptq"):
        bits = section.integer("bits", "w_bit", low=1, high=16, default=4)
        group = section.integer("group_size", "q_group_size", low=-1, high=10**6, default=128)
        return Quantization(method="awq" if method == "awq" else "gptq", weight_bits=bits, group_size=max(group, 0))
    if method == "mxfp4":
        return Quantization(method="mxfp4", weight_bits=4, group_size=32)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    if method == "bitsandbytes":
        bits = 4 if section.boolean("load_in_4bit", False) else 8
        return Quantization(method="bitsandbytes", weight_bits=bits, group_size=64 if bits == 4 else 0)
    if method == "modelopt" or (not method and section.has("quant_algo")):
        algorithm = section.text("quant_algo").upper()
        if algorithm == "NVFP4":
            return Quantization(method="compressed-tensors", weight_bits=4, group_size=16)
        if algorithm == "FP8":
            return Quantization(method="fp8", weight_bits=8, group_size=0)
        raise BadData(section.where, f"'quant_algo' must be FP8 or NVFP4 for modelopt, got '{printable(algorithm)}'")
    raise BadData(section.where, f"'quant_method' must be one of {_ACCEPTED}, got '{printable(method)}'")


def _compressed_tensors(section: Fields) -> Quantization:
    groups = section.raw("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = Fields(first, section.where).section("weights") if isinstance(first, Mapping) else None
    if weights is None:
        raise BadData(section.where, "'config_groups' of compressed-tensors must hold an object with 'weights'")
    bits = weights.integer("num_bits", low=1, high=16)
    group = weights.integer("group_size", low=-1, high=10**6, default=0)
    return Quantization(method="compressed-tensors", weight_bits=bits, group_size=max(group, 0))
