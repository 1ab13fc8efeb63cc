"""Parameter counts against matrices of those shapes and the counts that model cards print."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.params import attention_params, mla_params, mlp_params

DIM = st.integers(1, 64)


@given(DIM, DIM, DIM, DIM, st.booleans(), st.booleans())
def test_attention_is_its_four_matrices(d: int, h: int, kv: int, d_head: int, qkv_bias: bool, out_bias: bool) -> None:
    shapes = [(d, h * d_head), (d, kv * d_head), (d, kv * d_head), (h * d_head, d)]
    biases = [n for (_, n) in shapes[:3]] if qkv_bias else []
    biases += [d] if out_bias else []
    matrix, bias = attention_params(d, h, kv, d_head, has_qkv_bias=qkv_bias, has_output_bias=out_bias)
    assert matrix == sum(np.zeros(s, dtype=np.int8).size for s in shapes)
    assert bias == sum(biases)


@given(DIM, DIM, st.booleans(), st.booleans())
def test_mlp_is_its_matrices(d: int, d_ff: int, gated: bool, biased: bool) -> None:
    shapes = [(d, d_ff)] * (2 if gated else 1) + [(d_ff, d)]
    matrix, bias = mlp_params(d, d_ff, is_gated=gated, has_bias=biased)
    assert matrix == sum(a * b for a, b in shapes)
    assert bias == (sum(b for _, b in shapes) if biased else 0)


def test_published_counts() -> None:
    # Llama 3.1 8B, model card: 8.03B parameters (32 layers, own head, 2 norms a layer and one at the end)
    layer = attention_params(4096, 32, 8, 128)[0] + mlp_params(4096, 14336, is_gated=True)[0] + 2 * 4096
    assert 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    # GPT-2 (124M): 12 layers, biases everywhere, learned positions, tied head, norms with bias: 124,439,808
    attention = attention_params(768, 12, 12, 64, has_qkv_bias=True, has_output_bias=True)
    mlp = mlp_params(768, 3072, is_gated=False, has_bias=True)
    layer = sum(attention) + sum(mlp) + 4 * 768
    assert 12 * layer + 2 * 768 + (50257 + 1024) * 768 == 124_439_808


def test_deepseek_v3_total_is_671_billion() -> None:
    # arXiv:2412.19437: 671B in all, 37B active; 61 layers, the first 3 dense (18432), 256 experts of 2048 + 1 shared
    dims = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    attention, _ = mla_params(7168, 128, v_head_dim=128, **dims)
    expert = mlp_params(7168, 2048, is_gated=True)[0]
    dense = mlp_params(7168, 18432, is_gated=True)[0]
    tables = 2 * 129280 * 7168
    assert 61 * attention + 3 * dense + 58 * 257 * expert + tables == pytest.approx(671e9, rel=0.002)
    assert 61 * attention + 3 * dense + 58 * 9 * expert + tables / 2 == pytest.approx(37e9, rel=0.02)


def test_full_rank_queries_when_there_is_no_bottleneck() -> None:
    dims = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    matrix, norms = mla_params(2048, 16, q_lora_rank=0, **dims)  # DeepSeek-V2-Lite
    assert matrix == 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    assert norms == 512


@given(DIM, DIM, DIM)
def test_grouped_queries_never_have_more(d: int, h: int, d_head: int) -> None:
    assert attention_params(d, h, 1, d_head)[0] <= attention_params(d, h, h, d_head)[0]
