"""Power laws against limits, hand derivations and published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.power import (
    board_power_w,
    clock_speed_frac,
    compute_power_w,
    link_power_w,
    memory_power_w,
    node_power_w,
    nodes_in,
    power_limited_clock_frac,
    power_limited_run,
)

DEMAND = st.floats(0, 1e5)
SHARPNESS = st.floats(1, 30)
UNLIMITED = {
    "idle_w": 70.0,
    "compute_w": 500.0,
    "memory_w": 300.0,
    "memory_exponent": 0.7,
    "memory_core_frac": 0.75,
    "compute_frac": 0.6,
    "clock_exponent": 1.7,
}


@given(DEMAND, SHARPNESS)
def test_board_power_lies_between_idle_and_the_limit(demand: float, sharpness: float) -> None:
    power = float(board_power_w(demand, 73.0, 700.0, sharpness))
    assert 73.0 <= power <= min(700.0, 73.0 + demand) + 1e-6


@given(DEMAND, DEMAND, SHARPNESS)
def test_more_demand_never_draws_less(one: float, other: float, sharpness: float) -> None:
    low, high = sorted((one, other))
    assert board_power_w(low, 73.0, 700.0, sharpness) <= board_power_w(high, 73.0, 700.0, sharpness) + 1e-9


def test_a_demand_of_exactly_the_range_falls_short_by_the_root_of_two() -> None:
    # D = R: P = idle + R * 2^(-1/k)
    assert float(board_power_w(600.0, 100.0, 700.0, 4.0)) == pytest.approx(100 + 600 * 2**-0.25)


@pytest.mark.filterwarnings("error")
def test_huge_and_zero_demands_neither_overflow_nor_divide_by_zero() -> None:
    power = board_power_w(np.array([0.0, 1e-300, 1e12]), 73.0, 700.0, 30.0)
    assert power.tolist() == pytest.approx([73.0, 73.0, 700.0])


def test_unit_energies_are_linear_and_memory_power_is_a_power_law() -> None:
    assert compute_power_w(np.array([0.0, 1e14, 2e14]), 1e-12).tolist() == [0.0, 100.0, 200.0]
    assert float(memory_power_w(1.0, 480.0, 0.7)) == 480.0
    assert float(memory_power_w(0.5, 480.0, 1.0)) == 240.0
    assert float(memory_power_w(0.0, 480.0, 0.7)) == 0.0


def test_published_link_power_of_a_serdes() -> None:
    # NVIDIA's comparison: a 3.6 Tb/s link takes 19.8 W at 5.5 pJ/bit and 4.68 W at 1.3 pJ/bit
    assert link_power_w(3.6e12 / 8, 8 * 5.5e-12) == pytest.approx(19.8)
    assert link_power_w(3.6e12 / 8, 8 * 1.3e-12) == pytest.approx(4.68)


@given(st.floats(1, 5000), st.floats(0, 5000), st.floats(1, 3))
def test_the_limited_clock_draws_what_is_available(demand: float, available: float, exponent: float) -> None:
    phi = float(power_limited_clock_frac(demand, available, exponent))
    assert 0.0 <= phi <= 1.0
    assert demand * phi**exponent == pytest.approx(min(demand, available), rel=1e-9, abs=1e-9)


def test_nothing_left_for_the_cores_stops_the_clock() -> None:
    assert float(power_limited_clock_frac(500.0, -20.0, 1.7)) == 0.0


@given(st.floats(0.15, 1), st.floats(0, 1))
def test_speed_lies_between_the_clock_and_one(phi: float, share: float) -> None:
    assert phi - 1e-12 <= clock_speed_frac(phi, share) <= 1 + 1e-12
    assert clock_speed_frac(phi, 1.0) == pytest.approx(phi)
    assert clock_speed_frac(phi, 0.0) == 1.0


def test_a_limited_run_draws_its_limit_and_an_unlimited_one_its_demand() -> None:
    limits = np.array([300.0, 500.0, 700.0, 1000.0])
    clock, speed, power = power_limited_run(limits, **UNLIMITED)
    assert power[:3].tolist() == pytest.approx([300.0, 500.0, 700.0], rel=1e-6)
    assert power[3] == pytest.approx(870.0)
    assert clock[3] == speed[3] == 1.0
    assert np.all(np.diff(clock) > 0)
    assert np.all(np.diff(speed) > 0)


def test_the_solved_clock_satisfies_the_equation_by_hand() -> None:
    clock, speed, _ = power_limited_run(np.array([500.0]), **UNLIMITED)
    phi = float(clock[0])
    s = 1 / (0.6 / phi + 0.4)
    assert float(speed[0]) == pytest.approx(s)
    assert 70 + 500 * phi**0.7 * s + 300 * s**0.7 * (0.25 + 0.75 * phi**0.7) == pytest.approx(500.0, rel=1e-6)


def test_an_impossible_limit_runs_at_the_lowest_clock_instead_of_failing() -> None:
    clock, _, power = power_limited_run(np.array([1.0]), **UNLIMITED)
    assert clock[0] == pytest.approx(0.15)
    assert power[0] > 70.0


def test_node_power_published_for_8_h100() -> None:
    # Latif et al. 2025: at most 8.48 kW at the plugs with GPUs near full use, rated 10.2 kW
    assert node_power_w(8 * 700.0, 8, 360.0) == pytest.approx(8480.0)
    assert node_power_w(8 * 700.0, 8, 575.0) == pytest.approx(10_200.0)


@pytest.mark.parametrize(("budget", "nodes"), [(10.1e3, 0), (10.2e3, 1), (40e3, 3), (132e3, 12)])
def test_racks_hold_whole_nodes(budget: float, nodes: int) -> None:
    assert int(nodes_in(budget, 10.2e3)) == nodes == math.floor(budget / 10.2e3)
