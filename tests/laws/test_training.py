"""Training work and activations against papers and measured peaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.training import (
    checkpoint_bytes,
    forward_flops,
    layer_activation_bytes,
    loss_bytes,
    mfu_frac,
    step_flops,
    tensor_parallel_bytes,
)

GIB = 2**30
TOKENS, D, F, V, LAYERS = 8192, 2048, 5504, 32000, 24


def test_activations_are_what_the_forward_pass_left_on_an_h100() -> None:
    # run zero2-1.3b: 18.178 GiB after forward, of it loss_bytes(...)[0]
    layers = LAYERS * layer_activation_bytes(TOKENS, D, D, D, F)
    assert (layers + loss_bytes(TOKENS, V, D)[0]) / GIB == pytest.approx(18.178, rel=0.01)


def test_the_loss_peak_is_the_measured_one() -> None:
    # run zero2-1.3b: backward peak 37.736 GiB over 17.605 before the step
    layers = LAYERS * layer_activation_bytes(TOKENS, D, D, D, F)
    assert (layers + loss_bytes(TOKENS, V, D)[1]) / GIB == pytest.approx(37.736 - 17.605, rel=0.01)


def test_checkpointing_keeps_one_input_a_layer() -> None:
    assert LAYERS * checkpoint_bytes(TOKENS, D) / GIB == pytest.approx(0.75)


@given(t=st.integers(1, 10**6), tp=st.sampled_from([1, 2, 4, 8]))
def test_tensor_parallelism_splits_the_inside_of_a_layer_only(t: int, tp: int) -> None:
    whole, part = (layer_activation_bytes(t, 4096, 4096, 1024, 14336, tp=n) for n in (1, tp))
    assert 16.0 * 4096 * t <= part <= whole
    assert part == pytest.approx(16.0 * 4096 * t + (whole - 16.0 * 4096 * t) / tp)


def test_megatron_s_flops_for_gpt_3() -> None:
    # Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s/6h + V/16lh) per iteration with recomputation, full attention
    b, s, n_layers, h, vocab = 1536, 2048, 96, 12288, 51200
    paper = 96 * b * s * n_layers * h**2 * (1 + s / (6 * h) + vocab / (16 * n_layers * h))
    matrices = 12 * n_layers * h**2
    body = step_flops(forward_flops(b * s, matrices, b * s * s, h, n_layers), is_checkpointed=True)
    head = step_flops(forward_flops(b * s, vocab * h, 0, h, n_layers))  # the head is not recomputed
    assert float(body + head) == pytest.approx(paper, rel=1e-6)


def test_palm_s_model_flops_utilisation() -> None:
    # Chowdhery et al. 2022, table 3: 540B, 238.3k tokens/s on 6144 TPU v4 (275 TFLOP/s), 45.7 % without attention
    assert float(mfu_frac(6 * 540.35e9 * 238.3e3, 1.0, 275e12, 6144)) == pytest.approx(0.457, abs=0.002)


def test_frozen_weights_save_at_most_a_third_of_a_step() -> None:
    assert float(step_flops(1.0, frozen_frac=1.0)) == 2.0


def test_recomputing_adds_half_of_the_tensor_parallel_traffic() -> None:
    plain, again = (tensor_parallel_bytes(2048, 8192, 80, 8, is_checkpointed=c) for c in (False, True))
    assert again / plain == 1.5
    assert tensor_parallel_bytes(2048, 8192, 80, 1) == 0
