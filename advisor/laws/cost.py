"""Energy, emissions and money of serving: from watts, prices and rates to joules, kilograms and dollars."""

from __future__ import annotations

from typing import Any

from advisor.units import HOUR_S, J_PER_KWH, MILLION, MONTH_HOURS, YEAR_HOURS

Real = Any  # float or NDArray[np.float64]; a law returns what it was given

J_PER_WH = J_PER_KWH / 1e3


def energy_j_per(power_w: Real, rate_per_s: Real) -> Real:
    """Return the energy of one unit of work at a steady rate [J]: ``P / r``.

    power_w    : mean power while the rate is served, idle power included [W]
    rate_per_s : r > 0, units a second: output tokens, requests

    Reference: definition; Patterson 2021, arXiv:2104.10350, equation in section 2.

    >>> energy_j_per(5600.0, 2800.0)
    2.0
    """
    return power_w / rate_per_s


def wh_per_1000(joules_each: Real) -> Real:
    """Return the energy of a thousand units of work [Wh]: ``1000 e / 3600``.

    >>> round(wh_per_1000(1224.0), 6)  # 0.34 Wh a request
    340.0
    """
    return 1000.0 * joules_each / J_PER_WH


def facility_energy_kwh(power_w: Real, hours: Real, pue: float) -> Real:
    """Return the energy that a data centre buys for a load [kWh]: ``P h PUE / 1000``.

    power_w : power of the IT equipment [W]
    hours   : time [h]
    pue     : power usage effectiveness >= 1, facility over IT energy; 1.56 on average in the Uptime Institute's
              survey of 2024, 1.1 in the best large halls

    Reference: ISO/IEC 30134-2:2016.

    >>> facility_energy_kwh(1000.0, 24.0, 1.5)
    36.0
    """
    return power_w * hours * pue * HOUR_S / J_PER_KWH


def emissions_kgco2e(energy_kwh: Real, kgco2e_per_kwh: float) -> Real:
    """Return the emissions of generating the electricity [kg CO2e]: ``E g``; hardware's own footprint is not in it.

    Reference: Patterson 2021, arXiv:2104.10350 (energy x PUE x carbon intensity).

    >>> round(emissions_kgco2e(1000.0, 0.3844), 6)
    384.4
    """
    return energy_kwh * kgco2e_per_kwh


def electricity_usd_per_h(power_w: Real, usd_per_kwh: float, pue: float) -> Real:
    """Return what the electricity of a load costs [USD/h].

    >>> round(electricity_usd_per_h(10_000.0, 0.12, 1.25), 6)
    1.5
    """
    return facility_energy_kwh(power_w, 1.0, pue) * usd_per_kwh


def own_hardware_usd_per_h(
    capex_usd: Real, years: float, *, residual_frac: float = 0.0, interest_frac_per_year: float = 0.0
) -> Real:
    """Return what owning hardware costs an hour, used or not [USD/h]: the annuity of its price over its life.

    ``(C - R / (1 + i)^n) * i / (1 - (1 + i)^-n) / 8760``, for i = 0 ``(C - R) / (n 8760)``.

    capex_usd              : C, price of all nodes with network and installation [USD]
    years                  : n > 0, years until it is replaced [a]
    residual_frac          : R / C in [0, 1], share of the price that selling it brings
    interest_frac_per_year : i >= 0, cost of capital

    Reference: any text on engineering economics, capital recovery factor.

    >>> round(own_hardware_usd_per_h(262_800.0, 3.0), 6)
    10.0
    """
    if interest_frac_per_year == 0.0:
        return capex_usd * (1.0 - residual_frac) / (years * YEAR_HOURS)
    growth = (1.0 + interest_frac_per_year) ** years
    recovery = interest_frac_per_year * growth / (growth - 1.0)
    return capex_usd * (1.0 - residual_frac / growth) * recovery / YEAR_HOURS


def usd_per_million(usd_per_h: Real, rate_per_s: Real, utilization_frac: Real = 1.0) -> Real:
    """Return the cost of a million tokens (or requests) at the *actual* load [USD]: ``10^6 c / (3600 r u)``.

    usd_per_h        : what the deployment costs an hour, busy or not [USD/h]
    rate_per_s       : r > 0, rate while the load is on [1/s]
    utilization_frac : u in (0, 1], share of the paid hours in which the load is on

    >>> round(usd_per_million(3.6, 1000.0), 6)
    1.0
    >>> round(usd_per_million(3.6, 1000.0, 0.25), 6)
    4.0
    """
    return usd_per_h * MILLION / (HOUR_S * rate_per_s * utilization_frac)


def split_usd_per_million(
    usd_per_h: Real, input_per_s: Real, output_per_s: Real, prefill_frac: Real
) -> tuple[Real, Real]:
    """Return the cost of a million input and of a million output tokens [USD]; they add up to the whole bill.

    prefill_frac : share of the bill that prompts cause, in [0, 1]: of GPU time or of energy, as the caller chooses

    >>> split_usd_per_million(36.0, 5000.0, 1000.0, 0.5)
    (1.0, 5.0)
    """
    per_input = usd_per_million(usd_per_h * prefill_frac, input_per_s)
    per_output = usd_per_million(usd_per_h * (1.0 - prefill_frac), output_per_s)
    return per_input, per_output


def hosted_usd_per_h(
    input_per_s: Real, output_per_s: Real, usd_per_million_in: float, usd_per_million_out: float
) -> Real:
    """Return what the same tokens cost at a hosted API [USD/h].

    >>> round(hosted_usd_per_h(1000.0, 200.0, 0.5, 1.5), 6)
    2.88
    """
    return HOUR_S * (input_per_s * usd_per_million_in + output_per_s * usd_per_million_out) / MILLION


def break_even_load_frac(usd_per_h: Real, hosted_usd_per_h_at_load: Real) -> Real:
    """Return the share of the present load from which the deployment is cheaper than the API: ``c / h``.

    usd_per_h                : fixed cost of the deployment [USD/h]
    hosted_usd_per_h_at_load : what the present load costs at the API, > 0 [USD/h]

    Above 1 the API is cheaper at the present load. Valid as long as the deployment serves the load; the cost of the
    deployment is taken as fixed (electricity at part load is a small part of it).

    >>> break_even_load_frac(10.0, 40.0)
    0.25
    """
    return usd_per_h / hosted_usd_per_h_at_load


def pay_back_years(capex_usd: Real, own_running_usd_per_h: Real, rented_usd_per_h: Real) -> Real:
    """Return after how many years buying costs less than renting [a]: ``C / (8760 (rent - running))``; inf if never.

    >>> round(pay_back_years(87_600.0, 2.0, 12.0), 6)
    1.0
    """
    saved = rented_usd_per_h - own_running_usd_per_h
    if not hasattr(saved, "shape"):
        return capex_usd / (YEAR_HOURS * saved) if saved > 0 else float("inf")
    positive = saved * (saved > 0) + 1e-300
    return capex_usd / (YEAR_HOURS * positive)


def per_month(usd_per_h: Real) -> Real:
    """Return a monthly bill [USD]: 730 hours, a twelfth of 8760.

    >>> per_month(2.0)
    1460.0
    """
    return usd_per_h * MONTH_HOURS


def per_year(usd_per_h: Real) -> Real:
    """Return a yearly bill [USD]: 8760 hours.

    >>> per_year(2.0)
    17520.0
    """
    return usd_per_h * YEAR_HOURS
