"""What decodes pay for the cached tokens that they attend to: bytes, rate, a sequence's own share, tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from advisor.laws.decode_attention import FP8_TILE_FACTOR, MOST_APART, NEVER, TILE_KEYS, padded_flops_per_key
from advisor.laws.kv import kv_heads_per_rank
from advisor.predict.shapes import BYTES_PER_KV, Shapes
from advisor.schema import Deployment, Gpu

PADDED_HEADS = range(65, 97)
"""Head sizes whose padded rows are seen to bind (runs phi-3-mini, phi-2: 96 and 80); those of 64 and 128 stream."""
FP8_ELSEWHERE = 0.6
"""Share of a 16-bit cache's rate that fp8 caches reach where no tile law is known (H100 runs 8b-kvfp8, -b: 0.62)."""

CONTEXT_BYTES_PER_S = 3.35e12
"""Bandwidth of the card (H100 SXM) on which an old release's time of a cached token was fitted. It follows the memory:
the batches of five models on an A100 40 GB, none in that fit, then come out 4.7 % off (median) instead of 5.1."""


class CacheReads(NamedTuple):
    """Reading the cache on one rank of a stage.

    bytes_per_token : bytes of one cached token in the stage's layers
    bytes_per_s     : rate at which decodes get through them
    seq_s           : further time of each decoding sequence [s]
    wave_s          : time of a wave of its tiles beyond reads [s]: 3.2 us a layer in engines on an H200 (8b-p, 13b-p)
    seq_waves       : waves that a sequence's tiles are: one a KV head, over all streaming multiprocessors
    most_waves      : beyond so many they overlap (`laws.decode_attention.tiles_s`)
    """

    bytes_per_token: float
    bytes_per_s: float
    seq_s: float
    wave_s: float
    seq_waves: float
    most_waves: float


def cache_reads(
    shapes: Shapes, gpu: Gpu, deployment: Deployment, c: Mapping[str, float], n_layers: int, n_sms: float
) -> CacheReads:
    """Return what decodes of a stage of `n_layers` pay.

    The cache streams at a share of the bandwidth, unless the rows that decode attention pads on a Hopper GPU take
    longer: small heads, most of all with a KV head each (Phi-3 mini), and fp8 caches, of which a row holds twice the
    keys of its bytes. Then a sequence also pays for half a tile more.
    """
    tp = deployment.tp
    rank_heads = shapes.n_kv_heads if shapes.is_mla else int(kv_heads_per_rank(shapes.n_kv_heads, tp))
    share = 1.0 if shapes.is_mla else rank_heads / shapes.n_kv_heads
    n_bytes = shapes.kv_elements_per_token_layer * share * BYTES_PER_KV[deployment.kv_dtype] * n_layers
    is_fp8 = deployment.kv_dtype == "fp8"
    is_tiled = not shapes.is_mla and gpu.compute_capability[:2] == "9."
    rate = gpu.memory_bandwidth_bytes_per_s * c["kv_eff"] * (FP8_ELSEWHERE if is_fp8 and not is_tiled else 1.0)
    if extra_s := n_layers * c.get("context_s", 0.0):  # a release with another decode attention (predict/release.py)
        extra_s *= CONTEXT_BYTES_PER_S / gpu.memory_bandwidth_bytes_per_s
        return CacheReads(n_bytes, n_bytes / (n_bytes / rate + extra_s), 0.0, 0.0, 0.0, NEVER)
    n_tiles = 1 if shapes.is_mla else rank_heads
    waves = (n_layers * c["decode_wave_s"] * (FP8_TILE_FACTOR if is_fp8 else 1.0), n_tiles / n_sms)
    peaks = gpu.peak_flops_per_s
    if not is_tiled or not (is_fp8 or shapes.d_head in PADDED_HEADS):
        return CacheReads(n_bytes, rate, 0.0, *waves, MOST_APART)
    n_heads = max(1, shapes.n_heads // tp)
    flops = padded_flops_per_key(shapes.d_head, n_heads, rank_heads) * n_layers
    eff = peaks["fp8"] * c["decode_fp8_eff"] if is_fp8 else peaks["bf16"] * c["decode_tile_eff"]
    key_s = flops / eff
    if key_s * rate <= n_bytes:
        return CacheReads(n_bytes, rate, 0.0, *waves, MOST_APART)
    return CacheReads(n_bytes, n_bytes / key_s, 0.5 * TILE_KEYS * key_s, *waves, NEVER)
