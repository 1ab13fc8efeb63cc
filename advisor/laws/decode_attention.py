"""Decode attention: what begins and ends a tile's work, and on Hopper GPUs rows of the matrix units that hold nobody.

Reference: Shah et al., "FlashAttention-3" (arXiv:2407.08608); the tiles are those of its code, hopper/tile_size.h.
"""

from __future__ import annotations

WIDE_HEAD = 96
"""Head sizes up to this have tiles of 192 rows, larger ones of 128 (hopper/tile_size.h)."""
TILE_KEYS = 128
"""Keys of a tile; a sequence pays for half a tile more than its keys fill."""
WAVE_POWER = 2.0 / 3.0
"""How the time of tiles grows with their number: between one wave after the other (1) and waves that hide behind each
other's reads (0). Kernels of an H100 alone (aiconfigurator database, vLLM 0.24, 8 KV heads of 128 elements) take 12, 26
and 55 us more for 64, 128 and 256 sequences of up to 64 keys than for one, and some 16 to 23 us beyond their reads for
64 sequences of 512 or 1,024 keys; the time of a wave is fitted to engine runs (7.2 us: 18, 28 and 45 us)."""
FP8_TILE_FACTOR = 1.6
"""A wave with an fp8 cache over one without, in engine runs (8b-kvfp8, -b, -c: TPOT is 0.2 % off on average with it and
2.0 % low without; the kernels of that database alone give 1.07: the engine also quantises queries and new entries)."""


def tiles_s(wave_s: float, n_tiles: float, n_sms: float) -> float:
    """Return the time [s] of one layer beyond its reads, for `n_tiles` tiles: one a sequence and KV head.

    `wave_s` is the time of one wave, a tile on each streaming multiprocessor. For n times the tiles it is
    n ** `WAVE_POWER` as much.

    >>> round(tiles_s(7.2e-6, 8 * 132, 132) * 1e6, 1)
    28.8
    """
    return float(wave_s * (n_tiles / n_sms) ** WAVE_POWER)


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
