"""The matrices of a pipeline stage: what they compute and read, and how their output falls into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from advisor.predict.shapes import Shapes

Real = Any  # float or NDArray[np.float64]; numpy's own stubs cannot say "the same as the argument"

TILE_ROWS = 128
"""Rows of an output tile of the large matrix kernels on tensor-core GPUs."""
TILE_COLUMNS = 128
"""Columns of one of vLLM's fp8 kernels on Hopper, of two tiles side by side also of its 4-bit ones."""

CUBLAS, CUTLASS_FP8, MACHETE, TILED = 0.0, 1.0, 2.0, 3.0
"""Whose matrix kernels run. The library has tiles of many sizes and takes one that fits: 500 to 4,096 rows run at the
same 0.78 to 0.85 of the peak, whatever tiles they would fill (14 dense bf16 starts with recorded kernels, 1B to 34B).
vLLM's own have few: its fp8 kernels of Hopper (csrc/quantization/w8a8/cutlass/c3x) and Machete for 4-bit weights there
(csrc/quantization/machete/generate.py). On other cards we recorded none: tiles show as they do in published times."""

LIBRARY_COLUMNS, TILED_WAVE_FRAC, TILED_FILL_EXPONENT = 256, 0.2, 0.2
"""Columns of a tile of the library's kernels on other cards, how much of the last wave shows there, how the rate goes
with the share of the processors that less than a wave keeps busy. From microsoft/vidur @7d475133 (MIT), matrices of
eight models with TP1 to TP8 from 512 tokens on: 0.17 and 0.23 on an A100, 0.25 and 0.19 on an A40; median error 5.5 %
without and 4.8 % with them, 90th percentile 15.6 and 13.4 % (A100, one rate for all)."""

FOUR_BIT = ("awq-int4", "gptq-int4", "mxfp4")

CLUSTER_ROWS = 256
"""Rows that vLLM's fp8 kernels compute together above 128 tokens (two tiles) and its 4-bit ones above 256 (one)."""

ODD_ROWS_FRAC, MOST_ODD_ROWS = 0.2, 1024
"""What an fp8 kernel takes longer where the last tile is not full, over what whole tiles take, and of how many rows at
most: 304 rows 8 to 30 % longer than 512, 900 rows 17 to 30 % longer than 1,024, a row of 8,000 at most 8 % longer than
one of 4,096 (h100 14b-fp8-s, qwen3-32b-fp8; prompts of 520 tokens in h100 8b-fp8-q)."""
GRAPH_ROWS, MOST_GRAPH_ROWS = 16, 512
"""Steps of up to so many tokens are padded to the next CUDA graph, so that 500 tokens fill four tiles."""

NARROW_COLUMNS, NARROW_EFF = 32, 0.76
"""Column tiles up to which Machete's tiles above 256 rows have half the rows (N <= 4096), and their rate over that of
whole ones: 0.67 to 0.70 against 0.86 to 0.92 of the peak from 1,024 rows on (h100 8b-awq-s)."""

NEAR_FRAC, NEAR_ROWS, NEAR_SHARE = 0.08, 64, 0.125
"""What the library's choice takes longer just above a power of two, and how far that goes: 308, 520, 1,056, 2,112 and
2,176 rows 4 to 10 % (medians over 4 to 13 starts of h100 -q and -r), 600, 732, 1,628 rows nothing. Benchmarks like
prompts of such lengths beside a few decodes."""
LEAST_NEAR = 256


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


def kernels_of(dtype: str, compute_capability: str) -> float:
    """Return whose matrix kernels a format of weights has on a GPU: the library's but for two formats on Hopper.

    MXFP4 is a format of experts, whose models keep other matrices in 16 bits.
    """
    if compute_capability != "9.0":
        return TILED
    if dtype == "mxfp4":
        return CUBLAS
    return CUTLASS_FP8 if dtype in ("fp8", "int8") else MACHETE if dtype in FOUR_BIT else CUBLAS


def _idle(waves: Real, frac: float) -> Real:
    """Return what the empty part of the last wave of tiles adds, over the waves that there are: none below one wave."""
    return frac * (np.ceil(waves) - waves) * (waves >= 1.0) / (waves + 1e-9)


def kernel_rows(n_tokens: Real, kernels: Real, n_column_tiles: Real, n_sms: float, wave_frac: float) -> Real:
    """Return how many rows at the full rate the kernel of a matrix is worth, for steps of `n_tokens`.

    kernels        : whose kernels run (`CUBLAS` and the others), a number a plan
    n_column_tiles : tiles of a row of tiles
    wave_frac      : how much of an fp8 kernel's last, partial wave of tiles shows, 0 to 1

    All arguments but the last two are numbers or arrays that go together.
    """
    is_fp8, is_int4 = kernels == CUTLASS_FP8, kernels == MACHETE
    power = 2.0 ** np.floor(np.log2(np.maximum(n_tokens, 1.0)))
    over = n_tokens - power
    is_near = (power >= LEAST_NEAR) & (over > 0) & (over <= np.maximum(NEAR_ROWS, NEAR_SHARE * power))
    rows = n_tokens * (1.0 + NEAR_FRAC * is_near)
    is_tiled = kernels == TILED
    if np.any(is_tiled):
        waves = np.ceil(n_tokens / TILE_ROWS) * np.ceil(n_column_tiles * TILE_COLUMNS / LIBRARY_COLUMNS) / n_sms
        fill = np.clip(waves, 1e-9, 1.0) ** TILED_FILL_EXPONENT
        rows = np.where(is_tiled, n_tokens * (1.0 + _idle(waves, TILED_WAVE_FRAC)) / fill, rows)
    if np.any(is_fp8):
        is_large = n_tokens > TILE_ROWS
        whole = np.ceil(n_tokens / CLUSTER_ROWS) * CLUSTER_ROWS
        waves = whole / TILE_ROWS * n_column_tiles / n_sms
        graph = np.ceil(n_tokens / GRAPH_ROWS) * GRAPH_ROWS
        is_odd = np.where(n_tokens <= MOST_GRAPH_ROWS, graph, n_tokens) % TILE_ROWS > 0
        odd = ODD_ROWS_FRAC * np.minimum(whole, MOST_ODD_ROWS) * (is_odd & (n_tokens > CLUSTER_ROWS))
        rows = np.where(is_fp8, np.where(is_large, whole * (1.0 + _idle(waves, wave_frac)) + odd, n_tokens), rows)
    if np.any(is_int4):
        small = 2.0 ** np.ceil(np.log2(np.maximum(n_tokens, GRAPH_ROWS)))
        is_narrow = n_column_tiles <= NARROW_COLUMNS
        tile = np.where(is_narrow, TILE_ROWS, CLUSTER_ROWS)
        large = np.ceil(n_tokens / tile) * tile
        # below one wave of tiles processors idle
        busy = np.clip(large / tile * n_column_tiles / n_sms, 1e-9, 1.0) * np.where(is_narrow, NARROW_EFF, 1.0)
        rows = np.where(is_int4, np.where(n_tokens <= CLUSTER_ROWS, small, large / busy), rows)
    return rows


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
