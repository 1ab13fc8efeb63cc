"""Decode attention: what begins and ends a tile's work, and on Hopper GPUs rows of the matrix units that hold nobody.

Reference: Shah et al., "FlashAttention-3" (arXiv:2407.08608); the tiles are those of its code, hopper/tile_size.h.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", float, NDArray[np.float64])

WIDE_HEAD = 96
"""Head sizes up to this have tiles of 192 rows, larger ones of 128 (hopper/tile_size.h)."""
TILE_KEYS = 128
"""Keys of a tile; a sequence pays for half a tile more than its keys fill."""
FP8_TILE_FACTOR = 1.6
"""A wave with an fp8 cache over one without, in engine runs (41 cells of eight starts with an fp8 cache: TPOT is 0.9 %
low on average with it and 1.9 % without; kernels of the aiconfigurator database give 1.07: the engine also quantises
queries and new entries)."""


SMALL_HEAD, SMALL_HEAD_FRAC = 64, 0.65
"""Attention of heads of up to so many elements takes this share of the time that others take to begin and end: 7.5 to
7.7 us a layer of one decode against 11.2 to 12.6 (h100 1b-q, h200 1b-p, granite-3.1-2b, granite-3.1-3b-a800m; 14 models
with heads of 80 and more)."""


def begin_s(attention_s: float, d_head: int) -> float:
    """Return the time [s] that a layer's attention takes to begin and end, from that of heads of 128 elements.

    >>> begin_s(1.0, 128), begin_s(1.0, 64)
    (1.0, 0.65)
    """
    return attention_s * (SMALL_HEAD_FRAC if d_head <= SMALL_HEAD else 1.0)


MOST_APART, CROWDED_EXPONENT = 16.0, 0.6
"""Waves of tiles up to which each takes its time, and the power with which the time grows beyond them. With a power of
1 steps of 31 to 62 waves were told 8 to 24 % long (13b-mha-b, olmo-2-7b, smollm2-1.7b, opt-6.7b): many tiles on a
processor overlap. Up to 16 waves 368 recorded decodes need no other power (1.06 fits them best); tiles of padded rows,
whose arithmetic is what takes long, do not overlap (phi-2, phi-3-mini)."""
NEVER = 1e9
"""More waves than there are, for tiles that do not overlap."""


def tiles_s(wave_s: float, n_waves: Real, most: float) -> Real:
    """Return the time [s] of decode attention beyond its reads, for `n_waves` waves of tiles, one a sequence and head.

    wave_s : time of one wave, a tile on each streaming multiprocessor; part of a wave counts as that part
    most   : waves beyond which they overlap

    Kernels of engines on an H200 take 3.2 us a wave and layer beyond reads at 0.95 of the bandwidth: 8 KV heads and 150
    keys, 6.5 us more for 32 sequences than for 16, 11 for 64 than for 32, 21 for 128 than for 64 (8b-p). Kernels of an
    H100 alone (aiconfigurator database, vLLM 0.24, 8 KV heads, up to 64 keys): 12, 26 and 55 us more for 64, 128 and
    256 sequences than for one.

    >>> round(float(tiles_s(3.2e-6, 8.0, MOST_APART)) * 1e6, 1), round(float(tiles_s(1.0, 62.0, MOST_APART)), 1)
    (25.6, 36.1)
    """
    crowded = np.maximum(n_waves, most) / most
    apart: Real = np.minimum(n_waves, most) + most * (crowded**CROWDED_EXPONENT - 1.0)
    return wave_s * apart


def padded_flops_per_key(d_head: int, n_heads: int, n_kv_heads: int) -> float:
    """Return the operations that a decode spends on one key of one layer, rows without a query counted.

    The query heads of a KV head share a tile of 192 or 128 rows; all its rows are multiplied with the key and the
    value, 4 operations an element.

    >>> padded_flops_per_key(96, 32, 32) / padded_flops_per_key(128, 32, 8)
    4.5
    """
    rows = 192 if d_head <= WIDE_HEAD else 128
    tiles = -(-n_heads // n_kv_heads // rows)
    return 4.0 * rows * max(1, tiles) * d_head * n_kv_heads
