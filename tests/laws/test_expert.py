"""Expected experts of a batch and their blocks of rows against enumeration, chance, and published figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.expert import expected_experts, expert_rate, expert_rows


@pytest.mark.parametrize(("n_experts", "k", "n_tokens"), [(4, 1, 3), (4, 2, 2), (5, 2, 3), (3, 3, 4), (6, 2, 2)])
def test_every_choice_enumerated(n_experts: int, k: int, n_tokens: int) -> None:
    choices = list(itertools.combinations(range(n_experts), k))
    touched = [len(set().union(*picks)) for picks in itertools.product(choices, repeat=n_tokens)]
    assert expected_experts(float(n_tokens), n_experts, k) == pytest.approx(np.mean(touched), rel=1e-12)


def test_drawn_batches_of_mixtral_and_deepseek() -> None:
    rng = np.random.default_rng(1)
    for n_experts, k, n_tokens in ((8, 2, 4), (256, 8, 64)):
        drawn = [
            len({int(e) for _ in range(n_tokens) for e in rng.choice(n_experts, k, replace=False)}) for _ in range(200)
        ]
        spread = np.std(drawn) / np.sqrt(len(drawn))
        assert expected_experts(float(n_tokens), n_experts, k) == pytest.approx(np.mean(drawn), abs=5 * spread)


def test_published_coverage() -> None:
    # Feller I, IV.2 (occupancy): 7 accidents in 7 days leave (6/7)^7 = 0.340 of the days empty
    assert 1 - expected_experts(7.0, 7, 1) / 7 == pytest.approx(0.340, abs=5e-4)
    # Mixtral 8x7B (arXiv:2401.04088, section 2): one token uses exactly 2 of 8 experts
    assert expected_experts(1.0, 8, 2) == pytest.approx(2.0)


@given(st.integers(1, 512), st.integers(1, 16), st.integers(0, 10_000))
def test_bounds_and_monotone_in_tokens(n_experts: int, k: int, n_tokens: int) -> None:
    k = min(k, n_experts)
    here, more = expected_experts(float(n_tokens), n_experts, k), expected_experts(n_tokens + 1.0, n_experts, k)
    assert 0 <= here <= min(n_experts, n_tokens * k) * (1 + 1e-9) + 1e-9
    assert here <= more <= n_experts


def test_edges() -> None:
    assert expected_experts(0.0, 8, 2) == 0
    assert expected_experts(1.0, 8, 8) == 8
    assert expected_experts(1e6, 128, 4) == pytest.approx(128)
    np.testing.assert_allclose(expected_experts(np.array([0.0, 1.0]), 8, 2), [0.0, 2.0], atol=1e-12)


def test_rows_of_drawn_batches_in_blocks() -> None:
    rng = np.random.default_rng(2)
    for n_experts, k, n_tokens, block in ((8, 2, 3000, 64), (64, 6, 3000, 64), (128, 8, 3000, 64), (64, 8, 1000, 16)):
        drawn = [
            np.ceil(np.bincount(rng.integers(n_experts, size=n_tokens * k), minlength=n_experts) / block).sum() * block
            for _ in range(50)
        ]
        found = expert_rows(float(n_tokens), float(n_experts), k, block)
        assert found == pytest.approx(np.mean(drawn), rel=0.04)  # how full last blocks are is not quite even


def test_rows_of_a_published_example() -> None:
    # vLLM 0.26.0, moe_align_block_size: 4 tokens of 3 experts each, 4 experts used, blocks of 4: each expert's 3 rows
    # become 4, so 16; half a block each on average says 12 + 4 * 2 = 20, an upper bound
    assert 16 <= expert_rows(4.0, 4.0, 3, 4) == 20


@given(st.integers(1, 256), st.integers(1, 16), st.integers(0, 10_000), st.sampled_from([16, 32, 64, 128]))
def test_rows_grow_with_tokens_and_blocks(n_experts: int, k: int, n_tokens: int, block: int) -> None:
    rows = expert_rows(float(n_tokens), float(n_experts), k, block)
    assert rows >= n_tokens * k
    assert rows < expert_rows(n_tokens + 1.0, float(n_experts), k, block)
    assert rows < expert_rows(float(n_tokens), float(n_experts), k, 2 * block)


def test_rows_at_the_edges() -> None:
    assert expert_rows(0.0, 0.0, 8, 64) == 0
    assert expert_rows(5.0, 5.0, 1, 0) == 5
    np.testing.assert_allclose(expert_rows(np.array([0.0, 10.0]), np.array([0.0, 8.0]), 2, 64), [0.0, 276.0])


def test_wide_experts_compute_faster_as_their_kernels_do() -> None:
    """Recorded over told with one rate for all (8,000 tokens): 1.075 of 768 columns, 0.855 of 14,336. Then by hand."""
    assert expert_rate(768) / expert_rate(14336) == pytest.approx(0.855 / 1.075, abs=0.04)
    assert expert_rate(2048 * np.e) == pytest.approx(np.exp(0.09))


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_wider_experts_are_never_slower(one: int, other: int) -> None:
    narrow, wide = sorted((one, other))
    assert expert_rate(narrow) <= expert_rate(wide)


def test_a_model_without_experts_has_no_rate_of_its_own() -> None:
    assert expert_rate(0.0) == 1.0
