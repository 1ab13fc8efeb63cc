"""Coefficients of a GPU on which no engine ran: the measured GPU's, scaled by what kernels reach on both."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advisor.schema import CoefficientSet, Gpu

HOST_TIMES = (
    "host_step_s",
    "host_graph_layer_s",
    "host_large_layer_s",
    "host_eager_layer_s",
    "host_moe_layer_s",
    "host_shared_layer_s",
    "host_mxfp4_layer_s",
    "host_mla_layer_s",
    "host_seq_s",
    "host_table_s",
    "submit_s",
    "return_s",
    "serial_s",
    "serial_token_s",
    "wake_s",
    "intake_s",
    "http_s",
    "http_token_s",
    "http_out_s",
    "send_s",
)
"""Coefficients that a slower or faster host scales together."""


def on_host(values: Mapping[str, float], times: float) -> dict[str, float]:
    """Return coefficient values for a host whose CPU takes `times` as long.

    >>> on_host({"host_step_s": 0.002, "layer_s": 3e-5}, 0.5)
    {'host_step_s': 0.001, 'layer_s': 3e-05}
    """
    return {**values, **{name: values[name] * times for name in HOST_TIMES if name in values}}


def in_process(values: Mapping[str, float]) -> dict[str, float]:
    """Return coefficient values for a client in the engine's own process, with no API server between.

    >>> in_process({"http_s": 0.001, "wake_s": 3e-4})
    {'http_s': 0.0, 'wake_s': 0.0003}
    """
    return {name: 0.0 if name.startswith("http_") else value for name, value in values.items()}


SCALED_BY: dict[str, tuple[str, ...]] = {
    "gemm": ("gemm_eff_bf16", "gemm_eff_int4"),
    "gemm_fp8": ("gemm_eff_fp8",),
    "stream": ("stream_eff_bf16", "elementwise_eff"),
    "stream_fp8": ("stream_eff_fp8",),
    "kv": ("kv_eff",),
    "decode_wave": ("decode_wave_s",),
    "attention": ("attention_eff",),
    "all_reduce": ("all_reduce_s", "all_reduce_large_s"),
    "link": ("link_eff",),
    "joules": ("joules_per_flop",),
    "host": HOST_TIMES,
}
"""Which coefficients each kernel figure scales."""

UNKNOWN_REL = 0.3
"""Half-width, as a share, of the 90 % interval on a GPU without kernel figures."""


def transferred(coefficients: CoefficientSet, gpu: Gpu) -> dict[str, float]:
    """Return coefficient values for `gpu`; efficiencies stay within (0, 1].

    The factors come with the set (data/fitted/transfer.toml). Energies an operation and a byte are kept: public rows
    give 0.99, 0.97 and 0.84 pJ a bf16 operation on A100, H100 and B200 (docs/power.md), so a card with many operations
    a watt of its limit (an L4) runs into it and one with few (an A100) does not.
    """
    values = {name: c.value for name, c in coefficients.coefficients.items()}
    if gpu.name == coefficients.gpu:
        return values
    return scaled(values, _factors(coefficients, gpu))


def scaled(values: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Return coefficient values of the GPU that was measured turned into those of one with these factors."""
    out = dict(values)
    for key, names in SCALED_BY.items():
        factor = float(factors.get(key, 1.0))
        for name in names:
            if name in out:
                value = out[name] * factor
                out[name] = min(value, 1.0) if name.endswith(("_eff", "_bf16", "_fp8", "_int4")) else value
    return out


def transfer_rel(coefficients: CoefficientSet, gpu: Gpu) -> float:
    """Return the extra relative half-width of an interval on `gpu`, 0 for the GPU that was measured."""
    if gpu.name == coefficients.gpu:
        return 0.0
    return float(_factors(coefficients, gpu).get("rel", UNKNOWN_REL))


def _factors(coefficients: CoefficientSet, gpu: Gpu) -> Mapping[str, float]:
    return coefficients.transfer.get(gpu.name, coefficients.transfer.get("default", {}))


def joined_rel(*shares: float) -> float:
    """Return independent relative half-widths joined: the root of the sum of squares.

    >>> joined_rel(0.03, 0.04)
    0.05
    """
    return round(math.sqrt(sum(s * s for s in shares)), 12)
