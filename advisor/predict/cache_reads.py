"""What decodes pay for the cached tokens that they attend to: bytes, rate, and a sequence's own share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from advisor.laws.decode_attention import TILE_KEYS, padded_flops_per_key
from advisor.laws.kv import kv_heads_per_rank
from advisor.predict.shapes import BYTES_PER_KV, Shapes
from advisor.schema import Deployment, Gpu


class CacheReads(NamedTuple):
    """Reading the cache on one rank of a stage.

    bytes_per_token : bytes of one cached token in the stage's layers
    bytes_per_s     : rate at which decodes get through them
    seq_s           : further time of each decoding sequence [s]
    """

    bytes_per_token: float
    bytes_per_s: float
    seq_s: float


def cache_reads(
    shapes: Shapes, gpu: Gpu, deployment: Deployment, c: Mapping[str, float], n_layers: int, half_peak: float
) -> CacheReads:
    """Return what decodes of a stage of `n_layers` pay; `half_peak` is the GPU's dense 16-bit peak [1/s].

    The cache streams at a share of the bandwidth, unless the rows that decode attention pads on a Hopper GPU take
    longer: small heads, most of all with a KV head each (Phi-3 mini), and on an H200, with its faster memory, heads of
    128 too. Then a sequence also pays for a tile more.
    """
    tp = deployment.tp
    rank_heads = shapes.n_kv_heads if shapes.is_mla else int(kv_heads_per_rank(shapes.n_kv_heads, tp))
    share = 1.0 if shapes.is_mla else rank_heads / shapes.n_kv_heads
    n_bytes = shapes.kv_elements_per_token_layer * share * BYTES_PER_KV[deployment.kv_dtype] * n_layers
    is_fp8 = deployment.kv_dtype == "fp8"
    rate = gpu.memory_bandwidth_bytes_per_s * (c["kv_eff"] * (c["kv_fp8_factor"] if is_fp8 else 1.0))
    if extra_s := n_layers * c.get("context_s", 0.0):  # a release with another decode attention (predict/release.py)
        return CacheReads(n_bytes, n_bytes / (n_bytes / rate + extra_s), 0.0)
    if shapes.is_mla or is_fp8 or gpu.compute_capability[:2] != "9.":
        return CacheReads(n_bytes, rate, 0.0)
    n_heads = max(1, shapes.n_heads // tp)
    flops = padded_flops_per_key(shapes.d_head, n_heads, rank_heads) * n_layers
    key_s = flops / (half_peak * c["decode_tile_eff"])
    if key_s * rate <= n_bytes:
        return CacheReads(n_bytes, rate, 0.0)
    return CacheReads(n_bytes, n_bytes / key_s, TILE_KEYS * key_s)
