"""Bytes of the key-value cache and how paging rounds them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


def kv_elements_per_token_layer(n_kv_heads: int, d_head: int) -> int:
    """Return the cached elements of one token in one layer: ``2 * n_kv_heads * d_head`` (a key and a value a head).

    Linear in tokens, whatever the context length. With latent attention the cache holds one vector instead: use
    `mla_elements_per_token_layer`.

    Reference: Kwon et al. 2023, arXiv:2309.06180, section 3 (13B OPT: 800 KB a token).

    >>> kv_elements_per_token_layer(40, 128) * 40 * 2  # OPT-13B: 40 layers, fp16; the paper says 800 KB (KiB)
    819200
    """
    return 2 * n_kv_heads * d_head


def mla_elements_per_token_layer(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Return the cached elements of one token in one layer of latent attention; not divided by tensor parallelism.

    Reference: DeepSeek-V2, arXiv:2405.04434, table 1 (``d_c + d_h^R``).

    >>> mla_elements_per_token_layer(512, 64)
    576
    """
    return kv_lora_rank + qk_rope_head_dim


def kv_heads_per_rank(n_kv_heads: ArrayLike, tp: ArrayLike) -> NDArray[np.int64]:
    """Return the KV heads that one tensor-parallel rank holds: ``max(1, n_kv_heads / tp)``, replicated below one.

    Reference: vLLM 0.26.0, config/model.py ``get_num_kv_heads``.

    >>> int(kv_heads_per_rank(8, 16))
    1
    """
    return np.maximum(1, np.asarray(n_kv_heads, dtype=np.int64) // np.asarray(tp, dtype=np.int64))


def blocks_for(n_tokens: ArrayLike, block_tokens: int) -> NDArray[np.int64]:
    """Return the blocks that sequences of `n_tokens` hold: ``ceil(n_tokens / block_tokens)``, shape of `n_tokens`.

    Reference: Kwon et al. 2023, arXiv:2309.06180, section 4.2 (waste below one block a sequence).

    >>> blocks_for([1, 16, 17], 16).tolist()
    [1, 1, 2]
    """
    return -(-np.asarray(n_tokens, dtype=np.int64) // block_tokens)


class KvGroups(NamedTuple):
    """How an engine shares one pool among layers that see all and layers that see a window.

    n_layers  : layers that one block serves
    n_full    : block tables of layers that see all
    n_sliding : block tables of layers that see a window: they give blocks back that it has passed
    """

    n_layers: int
    n_full: int
    n_sliding: int

    @property
    def n_tables(self) -> int:
        """Return the block tables of a sequence: it opens as many blocks every `block_tokens` tokens."""
        return self.n_full + self.n_sliding


def kv_groups(n_full_layers: int, n_sliding_layers: int) -> KvGroups:
    """Return how vLLM groups layers: as many a group as the rarer kind has, or the other where it has little more.

    Reference: vLLM 0.26.0, v1/core/kv_cache_utils.py ``_get_kv_cache_groups_uniform_page_size``; the blocks that
    gemma-2-9b, gemma-3-4b, gemma-3-12b and gpt-oss-20b printed (run ids of data/runs, h100-12) follow from it.

    >>> kv_groups(8, 40)  # gemma-3-12b
    KvGroups(n_layers=8, n_full=1, n_sliding=5)
    """
    fewer, more = sorted((n_full_layers, n_sliding_layers))
    if not fewer:
        return KvGroups(more, int(n_full_layers > 0), int(n_sliding_layers > 0))
    size = more if more < 1.5 * fewer else fewer
    return KvGroups(size, -(-n_full_layers // size), -(-n_sliding_layers // size))


def window_blocks(window_tokens: int, block_tokens: int) -> int:
    """Return the blocks in which a window lies at most: its tokens may begin anywhere in a block.

    >>> window_blocks(1024, 16)
    65
    """
    return -(-(window_tokens - 1) // block_tokens) + 1


def held_blocks(n_tokens: int, block_tokens: int, groups: KvGroups, window_tokens: int) -> int:
    """Return the blocks that a sequence of `n_tokens` holds in all its tables, what its windows have passed given back.

    >>> held_blocks(16384, 16, kv_groups(8, 40), 1024)  # 1,024 of the full table, 65 of each of five windows
    1349
    """
    n = -(-n_tokens // block_tokens)
    if not groups.n_sliding:
        return n * groups.n_full
    return groups.n_full * n + groups.n_sliding * min(n, window_blocks(window_tokens, block_tokens))


def n_kv_blocks(pool_bytes: ArrayLike, block_bytes: ArrayLike) -> NDArray[np.int64]:
    """Return how many whole blocks a pool holds: ``floor(pool / block)``, never negative.

    >>> int(n_kv_blocks(58_980_638_392, 16 * 131072))  # Llama-3.1-8B on one H100, run vllm-0.26.0 8b-bf16
    28124
    """
    whole: Ints = np.floor(np.asarray(pool_bytes, dtype=float) / np.asarray(block_bytes, dtype=float)).astype(np.int64)
    return np.maximum(0, whole)
