"""The matrices of a pipeline stage: what they compute and read, and how their output falls into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from advisor.predict.shapes import Shapes

Real = Any  # float or NDArray[np.float64]; numpy's own stubs cannot say "the same as the argument"

TILE_ROWS = 128
TILE_COLUMNS = 256
"""Output tile of the large matrix kernels on tensor-core GPUs (CUTLASS 3 default for Hopper: 128 x 256 x 64)."""

ROW_QUANTUM = 64
"""Rows that a matrix instruction group computes at least (wgmma, m64); other tokens are padding."""

FP8_CLUSTER_ROWS = 256
"""Rows of a cluster of two tiles, which vLLM's fp8 kernels compute together above 128 tokens on Hopper (32b-fp8)."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """One kind of matrix of a stage: work of all its layers (a token's input and output too), tiles of a row of tiles.

    All kinds of many plans can be one object (`is_stacked`): arrays with the kind as first axis, the plan as last.
    """

    flops_per_token: Real
    weight_bytes: Real
    token_bytes: Real
    n_column_tiles: Real
    is_stacked: bool = False


def gemms_of(shapes: Shapes, tp: int, n_layers: int, weight_byte: float) -> tuple[Gemm, ...]:
    """Return the matrices of a stage of so many layers: query-key-value, output, up (and gate), down.

    Column tiles follow the output width on one rank; what the four do not cover (latent attention's extra factors) is
    spread over them, so that work and bytes are exact.
    """
    n_dense = shapes.n_layers - shapes.n_moe_layers or shapes.n_layers
    share, d_model = n_layers / shapes.n_layers, shapes.d_model
    up = shapes.mlp_matrix_params * (1.0 - shapes.down_frac)
    qkv, value = (shapes.n_heads + 2 * shapes.n_kv_heads) * shapes.d_head, shapes.n_heads * shapes.d_attention_value
    qkv_params = shapes.attention_matrix_params * qkv / (qkv + value)
    down = shapes.mlp_matrix_params - up
    parts = [  # parameters, widths of input and output on one rank, layers
        (qkv_params, d_model, qkv / tp, shapes.n_layers),
        (shapes.attention_matrix_params - qkv_params, value / tp, d_model, shapes.n_layers),
        (up, d_model, up / n_dense / d_model / tp, n_dense),
        (down, down / n_dense / d_model / tp, d_model, n_dense),
    ]
    scale = share / tp
    return tuple(
        Gemm(2.0 * n * scale, n * weight_byte * scale, 2.0 * (a + b) * layers * share, max(1, -int(-b // TILE_COLUMNS)))
        for n, a, b, layers in parts
        if n > 0
    )
