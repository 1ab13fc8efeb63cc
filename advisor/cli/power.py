"""Command power: watts, joules, kilograms and dollars of one deployment, its power limits, racks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from advisor.catalog import load_catalog
from advisor.cli.parse import UsageError, request_fields
from advisor.cli.serve import chosen
from advisor.cli.show_plan import backend_text, notes_lines
from advisor.cli.text import breakdown_lines, bullet, format_interval, out, print_json, table, wrapped
from advisor.predict.bill import HostedPrice
from advisor.recommend.ask import Question, ask
from advisor.recommend.explain import layout_text, workload_text
from advisor.recommend.form import plan_json
from advisor.recommend.one import deployment_of
from advisor.recommend.power import Terms, power_report
from advisor.schema import SCHEMA_VERSION, Interval, Request
from advisor.schema.power import LimitRow, PowerReport, RackFit
from advisor.units import format_count, format_frac, format_j, format_s, format_usd, format_w

ENERGY = {
    "power_w": "power",
    "energy_j_per_output_token": "per output token",
    "energy_j_per_request": "per request",
    "energy_wh_per_1000_requests": "per 1000 requests",
    "prefill_energy_j_per_request": "prefill, per request",
    "decode_energy_j_per_output_token": "decode, per output token",
    "facility_kwh_per_month": "facility, a month of it",
    "electricity_usd_per_h": "electricity, an hour",
    "kgco2e_per_1000_requests": "emissions, 1000 requests",
    "kgco2e_per_million_output_tokens": "emissions, 1M output tokens",
    "kgco2e_per_month": "emissions, a month of it",
}
MONEY = {
    "usd_per_h": "an hour",
    "usd_per_month": "a month",
    "usd_per_year": "a year",
    "usd_per_1000_requests": "1000 requests",
    "usd_per_million_tokens": "1M tokens, input and output",
    "usd_per_million_output_tokens": "1M output tokens, bearing the whole bill",
    "split_usd_per_million_input_tokens": "1M input tokens, bill split by energy",
    "split_usd_per_million_output_tokens": "1M output tokens, bill split by energy",
    "hosted_usd_per_month": "the same tokens at the hosted API, a month",
}


def power(args: argparse.Namespace) -> int:
    """Print what a deployment draws, costs and emits, and what a lower power limit would change."""
    terms = _terms(args)
    question = ask(Request.model_validate(request_fields(args)), load_catalog())
    report = power_report(question, deployment_of(question, chosen(args)), terms)
    if args.json:
        form = report.model_dump(mode="json", exclude={"plan"}) | {"plan": plan_json(report.plan)}
        print_json({"schema_version": SCHEMA_VERSION} | form)
    else:
        out("\n".join(_lines(question, report, terms, verbose=args.verbose)))
    return 0


def _terms(args: argparse.Namespace) -> Terms:
    prices = (args.hosted_in, args.hosted_out)
    if any(p is not None for p in prices) and None in prices:
        raise UsageError("a hosted API has two prices: give both --hosted-in and --hosted-out (USD per million tokens)")
    if args.years is not None and args.capex_per_gpu is None:
        raise UsageError("--years is the life of hardware of your own: give --capex-per-gpu too")
    hosted = HostedPrice(*prices) if None not in prices else None
    given = {
        "capex_usd_per_gpu": args.capex_per_gpu,
        "years": args.years,
        "utilization_frac": args.utilisation,
        "hosted": hosted,
        "rack_w": args.rack_kw * 1e3 if args.rack_kw is not None else None,
    }
    return Terms(**{name: value for name, value in given.items() if value is not None})


def _quantity(name: str, interval: Interval) -> str:
    """Return a quantity of energy, emissions or money with its interval, in the unit that its name says."""
    words = name.split("_")
    values = (interval.value, interval.low, interval.high)
    if "usd" in words:
        shown = [format_usd(v) for v in values]
    elif "kgco2e" in words:
        shown = [_amount(v * 1e3, "g") if interval.value < 1.0 else _amount(v, "kg") for v in values]
    elif "wh" in words or "kwh" in words:
        shown = [_amount(v, "kWh" if "kwh" in words else "Wh") for v in values]
    else:
        return format_interval(name, interval)
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} [{shown[1]} - {shown[2]}]"


def _amount(value: float, unit: str) -> str:
    return f"{format_count(value) if value < 1e3 else f'{value:,.0f}'} {unit}"


def _energy_lines(question: Question, report: PowerReport) -> list[str]:
    skipped = {"electricity_usd_per_h"} if question.request.electricity_usd_per_kwh == 0 else set()
    rows = [
        (f"  {text}", _quantity(name, report.energy[name]), _quantity(name, report.node_energy[name]))
        for name, text in ENERGY.items()
        if name in report.energy and name not in skipped
    ]
    pue = question.request.pue
    facility = f"; facility, electricity and emissions with PUE {pue:g}" if pue > 1 else ""
    lines = ["", f"Energy at this load, value [90 % interval]{facility}"]
    return lines + table(("", "boards", "whole nodes"), rows)


def _money_lines(report: PowerReport, terms: Terms, question: Question) -> list[str]:
    found = report.money
    if not found:
        return []
    pool = question.pools[0]
    if terms.capex_usd_per_gpu is not None:
        whose = f"own hardware, {format_usd(terms.capex_usd_per_gpu)} a GPU over {terms.years:g} years"
    else:
        whose = f"rent, {format_usd(pool.usd_per_gpu_h or 0.0)} per GPU hour, {pool.price_text}"
    if question.request.electricity_usd_per_kwh > 0:
        whose += f", and electricity at {format_usd(question.request.electricity_usd_per_kwh)}/kWh"
    share = f", this load on in {terms.utilization_frac:.0%} of the hours" if terms.utilization_frac < 1 else ""
    lines = ["", f"Money: {whose}{share}"]
    rows = [(f"  {text}", _quantity(name, found[name])) for name, text in MONEY.items() if name in found]
    lines += table(("", "USD"), rows)[1:]
    lines += _hosted_lines(found, report.plan.prediction.quantities.get("saturation_requests_per_s"))
    if "pay_back_years" in found:
        years = found["pay_back_years"].value
        lines += bullet(
            f"Against renting at {format_usd(pool.usd_per_gpu_h or 0.0)} per GPU hour it pays back after"
            f" {years:.2g} years."
        )
    return lines


def _hosted_lines(found: Mapping[str, Interval], capacity: Interval | None) -> list[str]:
    if "break_even_load_frac" not in found:
        return []
    share, rate = found["break_even_load_frac"].value, found["break_even_requests_per_s"].value
    if share <= 1:
        text = f"Cheaper than the hosted API: break-even at {format_frac(share)} of this load"
    else:
        text = f"The hosted API is cheaper: break-even at {format_count(share)} times this load"
    text += f", {format_count(rate)} requests/s while it is on"
    if capacity is not None and rate > capacity.value:
        text += f", more than the {format_count(capacity.value)} that this deployment can serve: never on these GPUs"
    return bullet(f"{text}.")


def _limit_rows(rows: tuple[LimitRow, ...]) -> list[LimitRow]:
    """Return the rows to show: of the limits that the boards do not feel, the lowest and the board's own."""
    felt = [r for r in rows if r.clock_frac < 1.0]
    rest = [r for r in rows if r.clock_frac >= 1.0]
    return [*felt, *(rest if len(rest) < 3 else [rest[0], rest[-1]])][::-1]


def _limit_lines(question: Question, report: PowerReport) -> list[str]:
    if not report.limits:
        return []
    marks = {
        "J": report.best_energy_limit_w,
        "N": report.best_node_energy_limit_w,
        "*": report.best_slo_limit_w,
    }

    def latency(row: LimitRow, name: str) -> str:
        return format_s(row.latency_s[name]) if name in row.latency_s else "-"

    shown = [
        (
            f"{r.limit_w:.0f} W {''.join(m for m, w in marks.items() if w == r.limit_w)}".rstrip(),
            format_frac(r.clock_frac),
            format_frac(r.speed_frac),
            format_w(r.board_power_w),
            f"{format_count(r.output_tokens_per_s)}",
            format_j(r.energy_j_per_output_token),
            format_j(r.node_energy_j_per_output_token),
            latency(r, "ttft_p99_s"),
            latency(r, "tpot_p99_s"),
            "overload" if r.is_saturated else ("yes" if r.meets_slo else "no"),
        )
        for r in _limit_rows(report.limits)
    ]
    head = (
        "limit a board",
        "clock",
        "speed",
        "boards",
        "tok/s",
        "J/token",
        "with node",
        "TTFT P99",
        "TPOT P99",
        "meets",
    )
    targets = ", ".join(f"{t.name} <= {format_s(t.max_s)}" for t in question.slo.targets)
    title = f"Power limits under the same traffic; targets: {targets or 'none, only the load'}"
    key = "J, N: fewest J/token of boards, of nodes (measured clocks); *: of nodes, within load and targets"
    return ["", *wrapped(title, indent=""), *table(head, shown), *wrapped(key, indent=""), *_advice(question, report)]


def _advice(question: Question, report: PowerReport) -> list[str]:
    own = report.limits[-1]
    best = next((r for r in report.limits if r.limit_w == report.best_slo_limit_w), None)
    if best is None:
        why = (
            "the load is more than it can serve"
            if own.is_saturated
            else "the targets are missed at the boards' own limit"
        )
        return bullet(f"No limit to recommend: {why}.")
    if best.clock_frac >= 1.0 or best is own:
        drawn = own.board_power_w / report.plan.deployment.n_gpus
        return bullet(
            f"No lower limit at a measured clock saves energy of whole nodes: a board draws {format_w(drawn)}."
        )
    boards = 1.0 - best.energy_j_per_output_token / own.energy_j_per_output_token
    nodes = 1.0 - best.node_energy_j_per_output_token / own.node_energy_j_per_output_token
    set_to = "rocm-smi --setpoweroverdrive" if question.pools[0].cluster.gpu.vendor == "amd" else "nvidia-smi -pl"
    return bullet(
        f"{set_to} {best.limit_w:.0f} saves {boards:.0%} of the boards' energy per token ({nodes:.0%} with the"
        f" node) and slows steps to {format_frac(best.speed_frac)}; load and targets hold."
    )


def _rack_lines(rack: RackFit) -> list[str]:
    text = (
        f"A rack of {format_w(rack.rack_w)} feeds {rack.n_nodes:,} nodes of {rack.gpus_per_node}"
        f" {'GPUs' if rack.gpus_per_node > 1 else 'GPU'} (each reserved"
        f" {format_w(rack.node_reserve_w)}: boards at their limit and the rest of the node)"
    )
    if rack.n_deployments:
        text += f", {rack.n_deployments:,} such deployments, {format_count(rack.output_tokens_per_s)} tokens/s together"
    elif rack.n_nodes:
        text += ", too few for one such deployment"
    lines = bullet(f"{text}.")
    if rack.n_nodes_at_best_limit is not None and rack.best_limit_w is not None:
        lines += bullet(f"With boards limited to {rack.best_limit_w:.0f} W it feeds {rack.n_nodes_at_best_limit:,}.")
    return ["", "Rack", *lines]


def _lines(question: Question, report: PowerReport, terms: Terms, *, verbose: bool) -> list[str]:
    plan = report.plan
    head = f"{backend_text(plan.backend)}, {layout_text(plan.deployment)}"
    lines = [f"{question.model.name} on {question.pools[0].name}: {head}"]
    served = plan.prediction["requests_per_s"]
    text = workload_text(question)
    if plan.prediction.is_saturated:
        text += f"; saturated: {format_count(served)} requests/s are served, and all numbers are per served request"
    lines += [*wrapped(text, indent=""), ""]
    lines.append(
        f"Boards: {format_interval('board_power_w', plan.prediction.quantities['board_power_w'])}, 90 % interval"
    )
    if report.board_power is not None:
        lines += breakdown_lines(report.board_power)[1:]
    lines += _energy_lines(question, report)
    lines += _money_lines(report, terms, question)
    lines += _limit_lines(question, report)
    if report.rack is not None:
        lines += _rack_lines(report.rack)
    remarks = [*question.model_notes, *question.notes, *report.notes]
    if verbose:
        remarks += [*plan.notes, *plan.prediction.notes]
    return [*lines, "", "Notes", *notes_lines(remarks, verbose=verbose)]
