"""Coefficients on other GPUs: bounds, identity on the measured one, scaling by the given factors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.predict.transfer import SCALED_BY, UNKNOWN_REL, joined_rel, transfer_rel, transferred

CATALOG = load_catalog()
SET = CATALOG.coefficients("vllm")
GPUS = [gpu.name for gpu in CATALOG.gpus()]


def test_the_measured_gpu_keeps_its_values() -> None:
    gpu = CATALOG.gpu(SET.gpu)
    assert transferred(SET, gpu) == {name: c.value for name, c in SET.coefficients.items()}
    assert transfer_rel(SET, gpu) == 0


@pytest.mark.parametrize("name", GPUS)
def test_efficiencies_stay_shares_and_nothing_is_lost(name: str) -> None:
    gpu = CATALOG.gpu(name)
    values = transferred(SET, gpu)
    assert set(values) == set(SET.coefficients)
    assert all(value > 0 for value in values.values())
    for key in values:
        if key.endswith(("_eff", "_bf16", "_fp8", "_int4")) and "sharpness" not in key:
            assert 0 < values[key] <= 1, key
    assert 0 <= transfer_rel(SET, gpu) <= 1


@given(st.floats(0.1, 3.0))
def test_each_factor_scales_its_coefficients_and_no_other(factor: float) -> None:
    gpu = CATALOG.gpu("a100-sxm-80gb")
    for key, names in SCALED_BY.items():
        plain = transferred(SET.model_copy(update={"transfer": {gpu.name: {}}}), gpu)
        scaled = transferred(SET.model_copy(update={"transfer": {gpu.name: {key: factor}}}), gpu)
        for name, value in scaled.items():
            wanted = plain[name] * factor if name in names else plain[name]
            capped = name.endswith(("_eff", "_bf16", "_fp8", "_int4")) and name in names
            assert value == pytest.approx(min(wanted, 1.0) if capped else wanted, rel=1e-12), (key, name)


def test_a_gpu_without_figures_uses_the_default_and_says_so() -> None:
    gpu = CATALOG.gpu("h200-sxm-141gb")
    nothing = SET.model_copy(update={"transfer": {}})
    assert transfer_rel(nothing, gpu) == UNKNOWN_REL
    default = SET.model_copy(update={"transfer": {"default": {"gemm": 0.5, "rel": 0.4}}})
    assert transferred(default, gpu)["gemm_eff_bf16"] == pytest.approx(0.5 * SET.value("gemm_eff_bf16"))
    assert transfer_rel(default, gpu) == 0.4


def test_energies_carry_over_but_for_a_measured_factor() -> None:
    gpu = CATALOG.gpu("h200-sxm-141gb")
    values = transferred(SET.model_copy(update={"transfer": {gpu.name: {"joules": 0.9}}}), gpu)
    assert values["joules_per_flop"] == pytest.approx(0.9 * SET.value("joules_per_flop"))
    assert values["joules_per_byte"] == SET.value("joules_per_byte")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_joined_shares_lie_between_the_largest_and_the_sum(shares: list[float]) -> None:
    joined = joined_rel(*shares)
    assert max(shares) - 1e-11 <= joined <= sum(shares) + 1e-11


def test_joined_shares_by_hand() -> None:
    assert joined_rel(0.06, 0.08) == pytest.approx(0.1)
    assert joined_rel(0.0) == 0
