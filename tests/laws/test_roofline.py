"""Roofline joins and operation counts against loops, published figures and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.roofline import attention_flops, causal_pairs, gemm_flops, larger_of, smooth_max

TIMES = st.floats(0, 1e6)
SHARPNESS = st.floats(1, 50)


@given(TIMES, TIMES, SHARPNESS)
def test_smooth_max_lies_between_maximum_and_sum(a: float, b: float, k: float) -> None:
    joined = smooth_max(a, b, k)
    assert max(a, b) * (1 - 1e-12) <= joined <= (a + b) * (1 + 1e-12)
    assert joined == pytest.approx(smooth_max(b, a, k), rel=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1, 8))
def test_smooth_max_is_the_p_norm(a: float, b: float, k: float) -> None:
    assert smooth_max(a, b, k) == pytest.approx((a**k + b**k) ** (1 / k), rel=1e-9)


@given(TIMES, TIMES, TIMES, SHARPNESS)
def test_smooth_max_never_falls_when_one_limit_grows(a: float, b: float, more: float, k: float) -> None:
    assert smooth_max(a + more, b, k) >= smooth_max(a, b, k) * (1 - 1e-12)


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3), st.floats(1e-6, 1e6), SHARPNESS)
def test_smooth_max_scales_with_the_unit_of_time(a: float, b: float, unit: float, k: float) -> None:
    assert smooth_max(a * unit, b * unit, k) == pytest.approx(unit * smooth_max(a, b, k), rel=1e-9)


def test_smooth_max_at_its_edges() -> None:
    assert smooth_max(0.0, 0.0, 4.0) == 0.0
    assert smooth_max(0.0, 3.0, 4.0) == 3.0
    assert smooth_max(1.0, 2.0, 1.0) == 3.0  # exponent 1 is the sum
    assert smooth_max(1e200, 2e200, 50.0) == pytest.approx(2e200)  # no overflow of a^k
    assert smooth_max(1e-200, 2e-200, 50.0) == pytest.approx(2e-200)  # nor underflow


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=20), SHARPNESS)
def test_arrays_and_scalars_agree(pairs: list[tuple[float, float]], k: float) -> None:
    a, b = np.array(pairs).T
    np.testing.assert_array_equal(larger_of(a, b), [larger_of(x, y) for x, y in pairs])
    np.testing.assert_allclose(smooth_max(a, b, k), [smooth_max(x, y, k) for x, y in pairs], rtol=1e-14)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_larger_of_is_max(a: float, b: float) -> None:
    assert larger_of(a, b) == pytest.approx(max(a, b), rel=1e-12, abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_causal_pairs_are_what_a_loop_counts(n_new: int, n_context: int) -> None:
    assert causal_pairs(float(n_new), float(n_context)) == sum(n_context + k + 1 for k in range(n_new))


@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 399))
def test_a_prompt_in_chunks_has_the_pairs_of_the_whole(n: int, context: int, cut: int) -> None:
    cut = min(cut, n)
    parts = causal_pairs(float(cut), float(context)) + causal_pairs(float(n - cut), float(context + cut))
    assert parts == causal_pairs(float(n), float(context))


def test_published_flops_of_gpt3_and_of_flash_attention() -> None:
    # Brown et al. 2020, arXiv:2005.14165, table D.1: 2 FLOPs a parameter and token forward; GPT-3 175B (174.6e9 active)
    # takes 3.14e23 FLOPs for 300e9 tokens with forward and backward = 3 x forward
    assert 3 * gemm_flops(300e9, 174.6e9) == pytest.approx(3.14e23, rel=0.005)
    # FlashAttention-2, arXiv:2307.08691, section 4.1: 4 s^2 d H, here 2k tokens, head 128, 16 heads (hidden 2048)
    assert attention_flops(2048.0**2, 16, 128, 128) == 4 * 2048**2 * 128 * 16


def test_halving_by_causality_shows_at_length() -> None:
    full = attention_flops(8192.0**2, 32, 128, 128)
    assert attention_flops(causal_pairs(8192.0, 0.0), 32, 128, 128) / full == pytest.approx(0.5, rel=2e-4)


def test_attention_against_explicit_matrix_products() -> None:
    # queries x keys: 2 d multiply-adds a pair; weights x values: 2 d_v
    rng = np.random.default_rng(0)
    n, heads, d_qk, d_v = 6, 3, 5, 4
    q, k, v = rng.normal(size=(heads, n, d_qk)), rng.normal(size=(heads, n, d_qk)), rng.normal(size=(heads, n, d_v))
    operations = 0
    for h in range(heads):
        for i in range(n):
            for j in range(i + 1):
                operations += 2 * len(q[h, i] * k[h, j]) + 2 * len(v[h, j])
    assert attention_flops(causal_pairs(float(n), 0.0), heads, d_qk, d_v) == operations


def test_nothing_costs_nothing() -> None:
    assert causal_pairs(0.0, 1000.0) == 0
    assert gemm_flops(0.0, 7e9) == 0
    assert not math.isnan(smooth_max(0.0, 1e-300, 6.0))
