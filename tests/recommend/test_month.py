"""A month of a day's plan, by hand: rent, energy, emissions."""

from __future__ import annotations

from itertools import pairwise

import pytest

from advisor.catalog import load_catalog
from advisor.recommend.day import Day, DayPlan, Offline, plan_day
from advisor.recommend.month import bills, month_of
from advisor.recommend.power import Terms
from advisor.schema import Price, Request

DAY = Day(peak_requests_per_s=20.0, night_frac=0.2, peak_hour=14.0, headroom_frac=0.2)
REQUEST = Request(model="llama-3.1-8b", gpus="4xH100", rate=20.0)


@pytest.fixture(scope="module")
def day() -> DayPlan:
    return plan_day(REQUEST, DAY, Offline())


def price(provider: str, kind: str, usd: float, gpu: str = "h100-sxm-80gb") -> Price:
    return Price.model_validate(
        {"gpu": gpu, "provider": provider, "kind": kind, "usd_per_gpu_h": usd, "date": "2026-11", "source": "test"}
    )


def test_a_day_without_offline_work_is_a_day_of_serving(day: DayPlan) -> None:
    plan = day.answer.plan("share")
    assert plan.meets_all
    assert not day.jobs
    assert all(h.serving_gpus + h.idle_gpus == 4 for h in plan.hours)
    carried = [h.n_replicas * day.need.capacity_requests_per_s for h in plan.hours]
    assert all(can >= rate for can, rate in zip(carried, day.need.requests_per_s, strict=True))


def test_rent_is_price_times_gpus_times_730_hours() -> None:
    prices = [price("b", "on-demand", 3.0), price("a", "spot", 1.0), price("b", "on-demand", 2.0)]
    prices.append(price("a", "on-demand", 0.1, gpu="l4"))
    found = bills(prices, "h100-sxm-80gb", 4, gpu_hours_per_day=48.0)
    assert [(b.provider, b.kind) for b in found] == [("a", "spot"), ("b", "on-demand")]
    assert [b.usd_per_month for b in found] == [4 * 730 * 1.0, 4 * 730 * 2.0]
    # 48 GPU hours a day are two GPUs in the mean
    assert [b.usd_per_month_following for b in found] == [2 * 730 * 1.0, 2 * 730 * 2.0]


def test_energy_and_emissions_follow_the_hours(day: DayPlan) -> None:
    paid = {"electricity_usd_per_kwh": 0.2, "pue": 1.5, "grid_kgco2e_per_kwh": 0.4}
    found = month_of(REQUEST.model_copy(update=paid), day, mode="share")
    plan = day.answer.plan("share")
    kwh = plan.energy_j / 3.6e6 / 24 * 730
    assert found.board_kwh.value == pytest.approx(kwh)
    rest = load_catalog().coefficients("power").value("node_other_w_per_gpu")
    assert found.node_kwh.value == pytest.approx(kwh + 4 * rest * 730 / 1e3)
    assert found.facility_kwh.value == pytest.approx(1.5 * found.node_kwh.value)
    assert found.electricity_usd is not None
    assert found.kgco2e is not None
    assert found.electricity_usd.value == pytest.approx(0.2 * found.facility_kwh.value)
    assert found.kgco2e.value == pytest.approx(0.4 * found.facility_kwh.value)
    for interval in (found.board_kwh, found.node_kwh, found.facility_kwh, found.kgco2e):
        assert interval.low < interval.value < interval.high
    assert sum(found.board_power_w) * 3600 == pytest.approx(plan.energy_j)


def test_what_is_not_asked_is_not_counted(day: DayPlan) -> None:
    found = month_of(REQUEST, day)
    assert found.electricity_usd is None
    assert found.kgco2e is None
    assert found.own_usd is None
    assert found.n_gpus == 4
    assert all(a.usd_per_gpu_h <= b.usd_per_gpu_h for a, b in pairwise(found.bills))


def test_own_hardware_is_its_price_over_its_years(day: DayPlan) -> None:
    found = month_of(REQUEST, day, Terms(capex_usd_per_gpu=40_000.0, years=4.0))
    assert found.own_usd == pytest.approx(4 * 40_000.0 / 48)
