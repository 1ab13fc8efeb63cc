"""Key-value cache sizes against arrays of that shape, published figures, a block table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.kv import (
    KvGroups,
    blocks_for,
    held_blocks,
    kv_elements_per_token_layer,
    kv_groups,
    kv_heads_per_rank,
    mla_elements_per_token_layer,
    n_kv_blocks,
    window_blocks,
)


@given(st.integers(1, 128), st.sampled_from([64, 80, 128, 256]))
def test_elements_of_a_cache_array(n_heads: int, d_head: int) -> None:
    assert kv_elements_per_token_layer(n_heads, d_head) == np.zeros((2, n_heads, d_head), dtype=np.int8).size


def test_published_cache_sizes() -> None:
    # Kwon et al. 2023, arXiv:2309.06180, section 3: 800 KB a token for OPT-13B (2 x 5120 x 40 x 2 bytes)
    assert kv_elements_per_token_layer(40, 128) * 40 * 2 == 2 * 5120 * 40 * 2 == 800 * 1024
    # DeepSeek-V2, arXiv:2405.04434, table 1: latent attention caches 9/2 d_h a token and layer (d_h = 128)
    assert mla_elements_per_token_layer(512, 64) == 9 / 2 * 128
    # DeepSeek-V3: 70 KB a token of 61 layers in bf16 (arXiv:2505.09343, table 1: 70.272 KB)
    assert mla_elements_per_token_layer(512, 64) * 61 * 2 == pytest.approx(70.272e3)
    # the same table: Qwen-2.5 72B 327.680 KB, Llama-3.1 405B 516.096 KB, grouped queries of 8 heads x 128
    assert kv_elements_per_token_layer(8, 128) * 80 * 2 == 327_680
    assert kv_elements_per_token_layer(8, 128) * 126 * 2 == 516_096


@given(st.integers(1, 128), st.integers(0, 8))
def test_ranks_hold_every_head_and_no_rank_none(n_heads: int, log_tp: int) -> None:
    tp = 2**log_tp
    held = int(kv_heads_per_rank(n_heads, tp))
    assert held >= 1
    if n_heads % tp == 0:
        assert held * tp == n_heads


def test_heads_are_copied_when_ranks_outnumber_them() -> None:
    assert [int(kv_heads_per_rank(8, tp)) for tp in (1, 2, 4, 8, 16, 32)] == [8, 4, 2, 1, 1, 1]
    assert int(kv_heads_per_rank(1, 8)) == 1


@given(st.integers(0, 10_000), st.integers(1, 256))
def test_blocks_are_what_a_table_grows_to(n_tokens: int, block_tokens: int) -> None:
    table = 0
    for position in range(min(n_tokens, 600)):
        table += position % block_tokens == 0
    if n_tokens <= 600:
        assert int(blocks_for(n_tokens, block_tokens)) == table
    waste = int(blocks_for(n_tokens, block_tokens)) * block_tokens - n_tokens
    assert 0 <= waste < block_tokens


@given(st.floats(-1e12, 1e12), st.floats(1, 1e8))
def test_blocks_never_exceed_the_pool_and_waste_less_than_one(pool: float, block: float) -> None:
    n = int(n_kv_blocks(pool, block))
    assert n >= 0
    if pool > 0:
        assert n * block <= pool * (1 + 1e-12)
        assert (n + 1) * block > pool * (1 - 1e-12)
    else:
        assert n == 0


def test_arrays_and_an_empty_sequence() -> None:
    assert blocks_for([0, 1, 15, 16, 17], 16).tolist() == [0, 1, 1, 1, 2]
    assert n_kv_blocks([0.0, -5.0, 32.0], 16.0).tolist() == [0, 0, 2]


def test_layers_are_grouped_as_printed_starts_say() -> None:
    # blocks times layers a block = pool / page, in starts gemma-2-9b, gemma-3-12b, gemma-3-4b, gpt-oss-20b
    assert kv_groups(21, 21) == KvGroups(21, 1, 1)
    assert kv_groups(8, 40) == KvGroups(8, 1, 5)
    assert kv_groups(5, 29) == KvGroups(5, 1, 6)
    assert kv_groups(12, 12) == KvGroups(12, 1, 1)
    assert kv_groups(13, 12) == KvGroups(13, 1, 1), "vLLM's own example: one layer more is padded, not split off"
    assert kv_groups(32, 0) == KvGroups(32, 1, 0)
    assert kv_groups(0, 32) == KvGroups(32, 0, 1)


@given(st.integers(0, 100), st.integers(0, 100))
def test_groups_hold_every_layer_with_little_padding(n_full: int, n_sliding: int) -> None:
    if n_full + n_sliding == 0:
        return
    groups = kv_groups(n_full, n_sliding)
    assert groups.n_full * groups.n_layers >= n_full
    assert groups.n_sliding * groups.n_layers >= n_sliding
    assert (groups.n_full - 1) * groups.n_layers < n_full or not n_full
    assert groups.n_tables * groups.n_layers < 2 * (n_full + n_sliding) + 1


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 5000))
def test_a_window_lies_in_that_many_blocks_wherever_it_begins(window: int, block: int, begin: int) -> None:
    touched = (begin + window - 1) // block - begin // block + 1
    assert touched <= window_blocks(window, block) <= touched + 1


@given(st.integers(0, 4000), st.integers(1, 32), st.integers(0, 9), st.integers(1, 9), st.integers(1, 600))
def test_held_blocks_are_those_of_every_table_that_the_window_has_not_passed(
    n_tokens: int, block: int, n_full: int, n_sliding: int, window: int
) -> None:
    groups = KvGroups(1, n_full, n_sliding)
    held = held_blocks(n_tokens, block, groups, window)
    every = int(blocks_for(n_tokens, block))
    # the blocks with one of the last `window` tokens, wherever those lie, and at most one that is given back late
    seen = every - max(0, n_tokens - window) // block
    assert n_full * every + n_sliding * min(seen, every) <= held <= n_full * every + n_sliding * min(seen + 1, every)
    assert held_blocks(n_tokens, block, KvGroups(1, 1, 0), 0) == every
