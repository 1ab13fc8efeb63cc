"""From one day's plan to a month: rent at every provider, electricity, emissions, hardware of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.laws.cost import emissions_kgco2e, facility_energy_kwh, per_month
from advisor.predict.bill import Ownership
from advisor.predict.spend import node_power, power_coefficient
from advisor.recommend.ask import ask
from advisor.recommend.day import DayPlan
from advisor.recommend.power import Terms
from advisor.schema import CoefficientSet, Gpu, Interval, Price, Request
from advisor.schema.mixed import HOURS, MixedPlan
from advisor.schema.month import CloudBill, Month
from advisor.units import HOUR_S


def month(
    request: Request,
    plan: MixedPlan,
    *,
    gpu: Gpu,
    power: CoefficientSet,
    prices: Sequence[Price],
    terms: Terms | None = None,
) -> Month:
    """Return the month of a day that repeats.

    plan   : the way of dividing the budget that is taken, one of a day's answer
    prices : published prices; each provider's cheapest of each kind counts, the cheapest first
    terms  : own hardware

    Energy is that of the GPUs given, idle ones at their idle power; its interval is the power law's error. Raises
    DomainError for a plan without hours.
    """
    if not plan.hours:
        raise DomainError("a plan without hours has no month")
    terms = terms or Terms()
    n_gpus = plan.n_gpus
    used = sum(h.serving_gpus + sum(h.job_gpus.values()) for h in plan.hours) * HOURS / len(plan.hours)
    board_w = tuple(h.energy_j / HOUR_S for h in plan.hours)
    mean_w = sum(board_w) / len(board_w)
    error = power_coefficient(power, "error_frac", gpu)
    most = plan.n_gpus * gpu.board_power_w
    boards = Interval(value=mean_w, low=mean_w * (1 - error), high=max(mean_w, min(mean_w * (1 + error), most)))
    nodes = node_power(boards, plan.n_gpus, power)
    facility = _monthly(nodes, request.pue)
    paid = request.electricity_usd_per_kwh
    carbon = request.grid_kgco2e_per_kwh
    electricity = _times(facility, paid) if paid > 0 else None
    own = None
    if terms.capex_usd_per_gpu is not None:
        own = float(per_month(Ownership(terms.capex_usd_per_gpu * n_gpus, terms.years).usd_per_h()))
        own += electricity.value if electricity else 0.0
    return Month(
        n_gpus=n_gpus,
        gpu_hours_per_day=used,
        board_power_w=board_w,
        board_kwh=_monthly(boards, 1.0),
        node_kwh=_monthly(nodes, 1.0),
        facility_kwh=facility,
        electricity_usd=electricity,
        kgco2e=_times(facility, float(emissions_kgco2e(1.0, carbon))) if carbon is not None else None,
        own_usd=own,
        bills=bills(prices, gpu.name, n_gpus, used),
    )


def bills(prices: Sequence[Price], gpu: str, n_gpus: int, gpu_hours_per_day: float) -> tuple[CloudBill, ...]:
    """Return a month's rent at each provider's cheapest price of each kind, the cheapest first."""
    cheapest: dict[tuple[str, str], Price] = {}
    for price in prices:
        key = (price.provider, price.kind)
        if price.gpu == gpu and (key not in cheapest or price.usd_per_gpu_h < cheapest[key].usd_per_gpu_h):
            cheapest[key] = price
    return tuple(
        CloudBill(
            provider=p.provider,
            kind=p.kind,
            region=p.region,
            date=p.date,
            usd_per_gpu_h=p.usd_per_gpu_h,
            usd_per_month=float(per_month(p.usd_per_gpu_h * n_gpus)),
            usd_per_month_following=float(per_month(p.usd_per_gpu_h * gpu_hours_per_day / HOURS)),
        )
        for p in sorted(cheapest.values(), key=lambda p: (p.usd_per_gpu_h, p.provider))
    )


def month_of(request: Request, day: DayPlan, terms: Terms | None = None, mode: str = "") -> Month:
    """Return the month of a day's best plan (or of the one of `mode`), with the catalogue's prices."""
    catalog = load_catalog()
    pool = ask(request, catalog).pools[0]
    plan = next((p for p in day.answer.plans if p.mode == mode), day.answer.plan(day.answer.best))
    power = catalog.coefficients("power")
    return month(request, plan, gpu=pool.cluster.gpu, power=power, prices=catalog.prices(), terms=terms)


def _monthly(power: Interval, pue: float) -> Interval:
    """Return the energy of a month [kWh] of a mean power [W]."""

    def kwh(watts: float) -> float:
        return float(per_month(facility_energy_kwh(watts, 1.0, pue)))

    return Interval(value=kwh(power.value), low=kwh(power.low), high=kwh(power.high))


def _times(interval: Interval, factor: float) -> Interval:
    return Interval(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)
