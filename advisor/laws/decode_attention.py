"""Decode attention on Hopper GPUs: rows of the matrix units that hold nobody.

Reference: Shah et al., "FlashAttention-3" (arXiv:2407.08608); the tiles are those of its code, hopper/tile_size.h.
"""

from __future__ import annotations

WIDE_HEAD = 96
"""Head sizes up to this have tiles of 192 rows, larger ones of 128 (hopper/tile_size.h)."""
TILE_KEYS = 128
"""Keys of a tile; a sequence pays about one tile more than its keys fill: half a tile of rounding, and what begins and
ends a tile's work (runs phi-3-mini, phi-3-mini-b: 256 sequences of 192 keys against 64 of 1,152)."""


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
