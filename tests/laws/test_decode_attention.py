"""Decode attention: rows of its tiles that hold nobody, and what begins and ends a tile's work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.decode_attention import MOST_APART, NEVER, begin_s, padded_flops_per_key, tiles_s


def test_oracle_one_tile_a_kv_head() -> None:
    # 32 query heads of 32 KV heads: each KV head computes 192 rows of 96 elements, key and value, multiply and add
    assert padded_flops_per_key(96, 32, 32) == 32 * 192 * 96 * 2 * 2


def test_published_tiles_of_flash_attention_3() -> None:
    # hopper/tile_size.h: 192 rows up to a head size of 96, 128 rows above
    assert padded_flops_per_key(64, 8, 8) / (4 * 64 * 8) == 192
    assert padded_flops_per_key(96, 8, 8) / (4 * 96 * 8) == 192
    assert padded_flops_per_key(128, 8, 8) / (4 * 128 * 8) == 128
    assert padded_flops_per_key(256, 8, 8) / (4 * 256 * 8) == 128


@given(st.sampled_from([64, 80, 96, 128, 256]), st.integers(1, 64), st.integers(1, 64))
def test_never_less_than_the_rows_with_a_query_need(d_head: int, n_kv_heads: int, group: int) -> None:
    n_heads = n_kv_heads * group
    assert padded_flops_per_key(d_head, n_heads, n_kv_heads) >= 4 * n_heads * d_head
    assert padded_flops_per_key(d_head, n_heads, n_kv_heads) >= padded_flops_per_key(d_head, n_kv_heads, n_kv_heads)


def test_edge_more_query_heads_than_a_tile_has_rows() -> None:
    assert padded_flops_per_key(128, 128, 1) * 2 == padded_flops_per_key(128, 129, 1)
    assert padded_flops_per_key(64, 71, 1) == 4 * 192 * 64  # Falcon 7B: one KV head, one tile


def test_oracle_a_full_wave_takes_the_time_of_a_wave_until_many_overlap() -> None:
    assert tiles_s(3e-6, 1.0, MOST_APART) == pytest.approx(3e-6)
    assert tiles_s(3e-6, 8.0, MOST_APART) == pytest.approx(8 * 3e-6)
    assert tiles_s(1.0, 64.0, MOST_APART) == pytest.approx(16 * 4**0.6)
    assert tiles_s(1.0, 64.0, NEVER) == 64


def test_published_decode_kernels_take_so_much_longer_for_more_sequences() -> None:
    # vLLM 0.24 on an H100, 8 KV heads of 128 elements, up to 64 keys: us beyond those of one sequence (11.8)
    for n, beyond in ((64, 12e-6), (128, 26.3e-6), (256, 54.8e-6)):
        more = tiles_s(3.2e-6, n * 8 / 132, MOST_APART) - tiles_s(3.2e-6, 8 / 132, MOST_APART)
        assert more == pytest.approx(beyond, rel=0.1)


@given(st.floats(1e-7, 1e-4), st.floats(0.0, 500.0), st.floats(0.0, 100.0), st.sampled_from([MOST_APART, NEVER]))
def test_more_waves_never_take_less(wave_s: float, n: float, more: float, most: float) -> None:
    assert tiles_s(wave_s, n, most) <= tiles_s(wave_s, n + more, most) * (1 + 1e-6)
    assert tiles_s(wave_s, n, MOST_APART) <= tiles_s(wave_s, n, NEVER) * (1 + 1e-6)


def test_edge_no_tiles_take_no_time() -> None:
    assert tiles_s(7e-6, 0.0, MOST_APART) == 0


def test_small_heads_begin_sooner_as_recorded() -> None:
    # one decode of 150 to 170 tokens, us a layer, reads left out: heads of 64 elements 7.5 to 7.7, of 128 11.2 to 12.6
    assert 7.5 / 12.6 < begin_s(1.0, 64) < 7.7 / 11.2
    assert begin_s(1.0, 32) == begin_s(1.0, 64)
    assert begin_s(1.0, 65) == begin_s(1.0, 256) == 1.0
    assert begin_s(0.0, 64) == 0.0
