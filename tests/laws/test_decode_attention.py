"""Rows of decode attention's tiles that hold nobody."""

from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.decode_attention import padded_flops_per_key


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
