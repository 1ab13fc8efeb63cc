"""Energy, emissions and money of a prediction: joules per token, kilograms, dollars per million tokens, break-even."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from advisor.errors import DomainError
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
from advisor.laws.power import nodes_in
from advisor.predict.spend import node_power
from advisor.schema import CoefficientSet, Gpu, Interval


@dataclass(frozen=True)
class Tariff:
    """What electricity is and costs: USD and kg CO2e a kWh, facility over IT energy, and whether whole nodes count."""

    usd_per_kwh: float = 0.0
    kgco2e_per_kwh: float | None = None
    pue: float = 1.0
    is_node: bool = False

    def __post_init__(self) -> None:
        """Refuse what no tariff can be."""
        if self.pue < 1.0 or self.usd_per_kwh < 0.0 or (self.kgco2e_per_kwh or 0.0) < 0.0:
            raise DomainError("a tariff needs a PUE of at least 1 and no negative price or carbon intensity")


@dataclass(frozen=True)
class Ownership:
    """Own hardware: price of all of it, years of use, share of the price that is left then, interest a year."""

    capex_usd: float
    years: float
    residual_frac: float = 0.0
    interest_frac_per_year: float = 0.0
    running_usd_per_h: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be bought."""
        if self.capex_usd <= 0.0 or self.years <= 0.0 or not 0.0 <= self.residual_frac <= 1.0:
            raise DomainError("own hardware needs a price and years above 0 and a residual share between 0 and 1")
        if self.interest_frac_per_year < 0.0 or self.running_usd_per_h < 0.0:
            raise DomainError("interest and running cost of own hardware must not be negative")

    def usd_per_h(self) -> float:
        """Return what the hardware costs an hour, used or not, electricity left out [USD/h]."""
        annuity = own_hardware_usd_per_h(
            self.capex_usd,
            self.years,
            residual_frac=self.residual_frac,
            interest_frac_per_year=self.interest_frac_per_year,
        )
        return float(annuity) + self.running_usd_per_h


@dataclass(frozen=True)
class HostedPrice:
    """Price of a hosted API, USD a million tokens."""

    usd_per_million_in: float
    usd_per_million_out: float

    def __post_init__(self) -> None:
        """Refuse a price below zero or no price at all."""
        if min(self.usd_per_million_in, self.usd_per_million_out) < 0.0:
            raise DomainError("prices of a hosted API must not be negative")
        if self.usd_per_million_in + self.usd_per_million_out == 0.0:
            raise DomainError("a hosted API that costs nothing is never beaten; give its price a million tokens")


def energy(
    board: Interval,
    *,
    n_gpus: int,
    requests_per_s: float,
    output_tokens_per_s: float,
    coefficients: CoefficientSet,
    tariff: Tariff | None = None,
    prefill_frac: float | None = None,
) -> dict[str, Interval]:
    """Return energy and emissions at the served rate, each with the interval of the power.

    board        : power of all boards [W], from `board_power`
    tariff       : with `is_node`, energy is taken at the plugs of the nodes; PUE applies to money and emissions only
    prefill_frac : share that prompts cause, from `prefill_energy_frac`; adds the two energies apart

    Keys: power_w energy_j_per_output_token energy_j_per_request energy_wh_per_1000_requests
    facility_kwh_per_month electricity_usd_per_h kgco2e_per_h kgco2e_per_1000_requests kgco2e_per_month
    kgco2e_per_million_output_tokens prefill_energy_j_per_request decode_energy_j_per_output_token.
    Raises DomainError when nothing is served.
    """
    rates = tariff or Tariff()
    if requests_per_s <= 0.0 or output_tokens_per_s <= 0.0:
        raise DomainError("energy per request needs a rate above 0; an idle deployment has only its power")
    power = node_power(board, n_gpus, coefficients) if rates.is_node else board
    per_request = _mapped(power, lambda w: energy_j_per(w, requests_per_s))
    monthly = _mapped(power, lambda w: per_month(facility_energy_kwh(w, 1.0, rates.pue)))
    out = {
        "power_w": power,
        "energy_j_per_output_token": _mapped(power, lambda w: energy_j_per(w, output_tokens_per_s)),
        "energy_j_per_request": per_request,
        "energy_wh_per_1000_requests": _mapped(per_request, wh_per_1000),
        "facility_kwh_per_month": monthly,
        "electricity_usd_per_h": _mapped(power, lambda w: electricity_usd_per_h(w, rates.usd_per_kwh, rates.pue)),
    }
    carbon = rates.kgco2e_per_kwh
    if carbon is not None:
        kwh = _mapped(out["energy_wh_per_1000_requests"], lambda wh: wh / 1e3 * rates.pue)
        out["kgco2e_per_1000_requests"] = _mapped(kwh, lambda e: emissions_kgco2e(e, carbon))
        out["kgco2e_per_month"] = _mapped(monthly, lambda e: emissions_kgco2e(e, carbon))
        hourly = _mapped(power, lambda w: facility_energy_kwh(w, 1.0, rates.pue))
        out["kgco2e_per_h"] = _mapped(hourly, lambda e: emissions_kgco2e(e, carbon))
        # Wh a thousand tokens are kWh a million
        each = _mapped(out["energy_j_per_output_token"], lambda j: wh_per_1000(j) * rates.pue)
        out["kgco2e_per_million_output_tokens"] = _mapped(each, lambda e: emissions_kgco2e(e, carbon))
    if prefill_frac is not None:
        rest = 1.0 - prefill_frac
        out["prefill_energy_j_per_request"] = _mapped(per_request, lambda j: j * prefill_frac)
        out["decode_energy_j_per_output_token"] = _mapped(out["energy_j_per_output_token"], lambda j: j * rest)
    return out


def money(
    quantities: Mapping[str, Interval],
    usd_per_h: float,
    *,
    input_tokens_per_s: float,
    utilization_frac: float = 1.0,
    prefill_frac: float = 0.5,
    electricity: Interval | None = None,
    hosted: HostedPrice | None = None,
    own: Ownership | None = None,
) -> dict[str, Interval]:
    """Return the bill at the load that is really served, with the intervals of the rates and of the power.

    quantities         : of a prediction; `requests_per_s` and `output_tokens_per_s` are used
    usd_per_h          : rent of all GPUs [USD/h]; with `own`, what renting instead would cost
    input_tokens_per_s : prompt tokens a second at that load
    utilization_frac   : share of the paid hours in which the load is on, (0, 1]
    prefill_frac       : share of the bill that prompts cause; splits it into input and output tokens
    electricity        : [USD/h], added to rent or own hardware; leave it out where the rent includes it
    hosted             : an API price to compare with
    own                : own hardware instead of rent

    Keys: usd_per_h usd_per_month usd_per_year usd_per_1000_requests usd_per_million_tokens
    usd_per_million_input_tokens usd_per_million_output_tokens; with `hosted`: hosted_usd_per_month
    break_even_load_frac break_even_requests_per_s; with `own` and a rent above 0: pay_back_years.
    Raises DomainError for a rate of 0 and for shares outside their range.
    """
    if not 0.0 < utilization_frac <= 1.0 or not 0.0 <= prefill_frac <= 1.0:
        raise DomainError("utilization_frac must lie in (0, 1] and prefill_frac in [0, 1]")
    requests, output = quantities["requests_per_s"], quantities["output_tokens_per_s"]
    if requests.value <= 0.0 or output.value <= 0.0 or input_tokens_per_s <= 0.0:
        raise DomainError("cost per token needs a rate above 0; an idle deployment costs its hourly price")
    fixed = own.usd_per_h() if own is not None else usd_per_h
    bill = _mapped(electricity or Interval(value=0.0, low=0.0, high=0.0), lambda e: fixed + e)
    ratio = input_tokens_per_s / output.value

    def per_unit(rate: Interval, unit: Callable[[float, float], float]) -> Interval:
        # the smallest bill over the largest rate is the lower end; a rate that may be 0 is cut at a hundredth
        low = unit(bill.low, max(rate.high, rate.value))
        high = unit(bill.high, max(rate.low, 0.01 * rate.value))
        value = unit(bill.value, rate.value)
        return Interval(value=value, low=min(low, value), high=max(high, value))

    u = utilization_frac
    out = {
        "usd_per_h": bill,
        "usd_per_month": _mapped(bill, per_month),
        "usd_per_year": _mapped(bill, per_year),
        "usd_per_1000_requests": per_unit(requests, lambda c, r: float(usd_per_million(c, r, u)) / 1e3),
        "usd_per_million_tokens": per_unit(output, lambda c, r: float(usd_per_million(c, r * (1.0 + ratio), u))),
        "usd_per_million_input_tokens": per_unit(
            output, lambda c, r: float(split_usd_per_million(c / u, r * ratio, r, prefill_frac)[0])
        ),
        "usd_per_million_output_tokens": per_unit(
            output, lambda c, r: float(split_usd_per_million(c / u, r * ratio, r, prefill_frac)[1])
        ),
    }
    if hosted is not None:
        api = u * hosted_usd_per_h(
            input_tokens_per_s, output.value, hosted.usd_per_million_in, hosted.usd_per_million_out
        )
        share = _mapped(bill, lambda c: break_even_load_frac(c, api))
        out["hosted_usd_per_month"] = _mapped(Interval(value=api, low=api, high=api), per_month)
        out["break_even_load_frac"] = share
        out["break_even_requests_per_s"] = _mapped(share, lambda s: s * requests.value)
    if own is not None and usd_per_h > 0.0:
        running = electricity.value if electricity else 0.0
        years = float(pay_back_years(own.capex_usd, running + own.running_usd_per_h, usd_per_h))
        if years != float("inf"):
            out["pay_back_years"] = Interval(value=years, low=years, high=years)
    return out


def rack_nodes(rack_w: float, gpu: Gpu, coefficients: CoefficientSet, *, gpus_per_node: int, pue: float = 1.0) -> int:
    """Return how many nodes a power budget feeds with every board at its limit; 0 when not one fits.

    rack_w : power of the rack, or with `pue` of the facility [W]

    The reserve is the upper end of a node's other power, because a breaker does not average.
    """
    if rack_w <= 0.0 or gpus_per_node < 1 or pue < 1.0:
        raise DomainError("a power budget and GPUs per node must be above 0, the PUE at least 1")
    worst = gpus_per_node * (gpu.board_power_w + coefficients.coefficients["node_other_w_per_gpu"].high)
    return int(nodes_in(rack_w / pue, worst))


def _mapped(interval: Interval, change: Callable[[float], float]) -> Interval:
    return Interval(
        value=float(change(interval.value)), low=float(change(interval.low)), high=float(change(interval.high))
    )
