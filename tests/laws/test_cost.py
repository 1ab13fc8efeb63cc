"""Energy, emissions and money against hand calculations, published figures and invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.cost import (
    break_even_load_frac,
    electricity_usd_per_h,
    emissions_kgco2e,
    energy_j_per,
    facility_energy_kwh,
    hosted_usd_per_h,
    own_hardware_usd_per_h,
    pay_back_years,
    per_month,
    per_year,
    split_usd_per_million,
    usd_per_million,
    wh_per_1000,
)

POSITIVE = st.floats(1e-3, 1e6)


def test_one_kilowatt_for_an_hour_is_a_kilowatt_hour() -> None:
    assert facility_energy_kwh(1000.0, 1.0, 1.0) == pytest.approx(1.0)
    assert facility_energy_kwh(1000.0, 8760.0, 1.56) == pytest.approx(13_665.6)


def test_published_energy_of_a_request_round_trip() -> None:
    # ML.ENERGY v3, Qwen3-14B on a B200, 8 at once: 319.8 W at 234.06 tokens/s is 1.366 J a token (table: 1.3663)
    assert energy_j_per(319.7883, 234.0605) == pytest.approx(1.3663, rel=1e-4)
    # and 9599.7 J a request of 7026.24 tokens, 2.67 Wh
    assert 7026.2424 * energy_j_per(319.7883, 234.0605) == pytest.approx(9599.7, rel=1e-4)
    assert wh_per_1000(9599.6981) == pytest.approx(2666.6, rel=1e-4)


def test_training_emissions_of_gpt_3_from_its_published_energy() -> None:
    # Patterson et al. 2021, table 4: 1287 MWh (PUE included) at 0.429 kg/kWh are 552.1 t
    assert emissions_kgco2e(1_287_000.0, 0.429) / 1e3 == pytest.approx(552.1, rel=1e-3)


def test_electricity_of_a_node() -> None:
    assert electricity_usd_per_h(8480.0, 0.10, 1.2) == pytest.approx(1.0176)


def test_annuity_against_a_mortgage_table() -> None:
    # 100 000 USD over 3 years at 10 % a year: the capital recovery factor is 0.402115
    assert own_hardware_usd_per_h(1e5, 3, interest_frac_per_year=0.10) * 8760 == pytest.approx(40_211.5, rel=1e-5)


@given(POSITIVE, st.floats(0.5, 10), st.floats(0, 1))
def test_a_vanishing_interest_is_the_straight_line(capex: float, years: float, residual: float) -> None:
    straight = own_hardware_usd_per_h(capex, years, residual_frac=residual)
    nearly = own_hardware_usd_per_h(capex, years, residual_frac=residual, interest_frac_per_year=1e-7)
    # interest never costs more a year than its share of the price
    assert nearly == pytest.approx(straight, rel=1e-4, abs=1.01e-7 * capex / 8760)


@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0, 1))
def test_input_and_output_tokens_pay_the_whole_bill(bill: float, n_in: float, n_out: float, share: float) -> None:
    per_in, per_out = split_usd_per_million(bill, n_in, n_out, share)
    paid = 3600 * (n_in * per_in + n_out * per_out) / 1e6
    assert paid == pytest.approx(bill, rel=1e-9)


@given(POSITIVE, POSITIVE, st.floats(0.01, 1))
def test_idle_hours_make_tokens_dearer(bill: float, rate: float, used: float) -> None:
    assert usd_per_million(bill, rate, used) == pytest.approx(usd_per_million(bill, rate) / used)


def test_break_even_by_hand() -> None:
    # 8 GPUs at 2.69 USD against 0.60/0.60 USD a million tokens: 21.52 USD/h buy 9963 tokens/s
    api = hosted_usd_per_h(8000.0, 4000.0, 0.60, 0.60)
    assert api == pytest.approx(25.92)
    share = break_even_load_frac(8 * 2.69, api)
    assert share == pytest.approx(0.8302, rel=1e-4)
    assert share * 12_000 == pytest.approx(9963, rel=1e-4)


def test_pay_back_and_views() -> None:
    assert pay_back_years(250_000.0, 2.0, 8 * 2.69) == pytest.approx(250_000 / 8760 / 19.52)
    assert pay_back_years(250_000.0, 30.0, 21.52) == math.inf
    assert pay_back_years(np.array([8760.0]), np.array([0.0]), np.array([1.0])).tolist() == [1.0]
    assert per_year(1.0) == 12 * per_month(1.0)


def test_laws_broadcast() -> None:
    watts = np.array([1000.0, 2000.0])
    assert energy_j_per(watts, 10.0).tolist() == [100.0, 200.0]
    assert facility_energy_kwh(watts, 1.0, 1.5).tolist() == [1.5, 3.0]
