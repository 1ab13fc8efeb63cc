"""Power, energy, emissions and money of one deployment, at the load that it serves, and what a power limit changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.laws.cost import electricity_usd_per_h
from advisor.laws.power import node_power_w
from advisor.predict.bill import HostedPrice, Ownership, Tariff, energy, money, rack_nodes
from advisor.predict.limits import clock_bound_frac, limited_runs
from advisor.predict.serving import MAX_E2E_S, Run, counted, replay
from advisor.predict.simulate import STATISTICS
from advisor.predict.spend import node_power, prefill_energy_frac
from advisor.predict.steady import sweep
from advisor.predict.traffic import mean_lengths
from advisor.recommend.ask import Question, ask
from advisor.recommend.one import check_vllm, deployment_of, predict_one
from advisor.recommend.plan import load_share
from advisor.schema import Breakdown, CoefficientSet, Deployment, Interval, Note, Plan, Request
from advisor.schema.power import LimitRow, PowerReport, RackFit

N_LIMITS = 13
LOWEST_LIMIT_FRAC = 0.4
"""Limits of the curve: steps of 5 % from 40 % of the board's; below, most boards refuse the setting."""
TRUSTED_CLOCK_FRAC = 0.76
"""Lowest clock of the runs that the clock exponent was fitted on (docs/power.md); no limit below it is recommended."""
LOWEST_CLOCK_FRAC = 0.4
"""About the floor of the voltage, where the law ends: lower limits are left out."""
SMALL_BOARD_W = 360.0
"""Boards below draw less than the rest of an 8 x H100 node does per GPU: that rest is surely too much for them."""
EQUAL_FRAC = 0.01
"""Energies that differ by less count as equal; then the higher limit is named, as it costs no speed."""


@dataclass(frozen=True)
class Terms:
    """What the user pays and compares with; all of it optional."""

    capex_usd_per_gpu: float | None = None
    years: float = 4.0
    utilization_frac: float = 1.0
    hosted: HostedPrice | None = None
    rack_w: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no bill can have."""
        if self.capex_usd_per_gpu is not None and self.capex_usd_per_gpu <= 0.0:
            raise DomainError("the price of a GPU of your own must be above 0 USD")
        if not 0.0 < self.years <= 50.0:
            raise DomainError("years of use must lie above 0 and at most 50")
        if not 0.0 < self.utilization_frac <= 1.0:
            raise DomainError("utilisation is the share of paid hours with this load: above 0 and at most 1")
        if self.rack_w is not None and self.rack_w <= 0.0:
            raise DomainError("the power of a rack must be above 0")


def power_report(question: Question, deployment: Deployment, terms: Terms | None = None) -> PowerReport:
    """Return power with its parts, energy, emissions, money, power limits and racks of one deployment.

    Energy of the boards and of whole nodes; the limits replay the same traffic (vLLM only). Raises DomainError for a
    deployment that cannot run, and when no watts can be predicted.
    """
    terms = terms or Terms()
    power = question.power
    plan = predict_one(question, deployment)
    q = plan.prediction.quantities
    if power is None or "board_power_w" not in q:
        raise DomainError("there are no fitted coefficients for power; run `advisor fit` on run records first")
    parts = next((b for b in plan.prediction.breakdowns if b.name == "board power"), None)
    run, prefill = None, None
    if deployment.backend == "vllm" and parts is not None:
        run = _run(question, deployment)
        prefill = _prefill_frac(run, parts)
    request = question.request
    tariffs = [
        Tariff(request.electricity_usd_per_kwh, request.grid_kgco2e_per_kwh, request.pue, is_node=is_node)
        for is_node in (False, True)
    ]
    boards, nodes = (
        energy(
            q["board_power_w"],
            n_gpus=deployment.n_gpus,
            requests_per_s=q["requests_per_s"].value,
            output_tokens_per_s=q["output_tokens_per_s"].value,
            coefficients=power,
            tariff=tariff,
            prefill_frac=prefill,
        )
        for tariff in tariffs
    )
    rows = _rows(question, deployment, plan, run, power) if run is not None else ()
    best = _best(rows)
    report = PowerReport(
        model=question.model.name,
        plan=plan,
        board_power=parts,
        energy=boards,
        node_energy=nodes,
        money=_money(
            question, deployment, plan, terms, _electricity(question, deployment, nodes, power, terms), prefill
        ),
        limits=rows,
        best_energy_limit_w=best[0],
        best_node_energy_limit_w=best[1],
        best_slo_limit_w=best[2],
        notes=_notes(question, rows, run, terms),
    )
    return report.model_copy(update={"rack": _rack(question, deployment, plan, power, terms, best[2])})


def power(
    request: Request,
    chosen: Mapping[str, Any] | None = None,
    terms: Terms | None = None,
    catalog: Catalog | None = None,
) -> PowerReport:
    """Return the report of one deployment of a request; `chosen` are fields of a Deployment, the engine's otherwise."""
    question = ask(request, catalog if catalog is not None else load_catalog())
    return power_report(question, deployment_of(question, chosen or {}), terms)


def _run(question: Question, deployment: Deployment) -> Run:
    """Return the replay that the plan's numbers came from."""
    vllm, cluster = check_vllm(question, deployment), question.pools[0].cluster
    steady = sweep(question.model, cluster.gpu, [deployment], question.workload, vllm, question.facts)
    e2e_s = float(steady["e2e_p50_s"][0])
    return replay(
        question.model,
        cluster,
        deployment,
        question.workload,
        vllm,
        seed=question.request.seed,
        facts=question.facts,
        e2e_s=min(e2e_s, MAX_E2E_S) if math.isfinite(e2e_s) else 0.0,
    )


def _prefill_frac(run: Run, parts: Breakdown) -> float:
    work = run.simulation.total_work
    decoded = max(work.sampled - len(run.simulation.ttft_s), 0.0)
    return prefill_energy_frac(run.replica.stages, work, max(work.tokens - decoded, 0.0), parts)


def _rows(
    question: Question, deployment: Deployment, plan: Plan, run: Run, power: CoefficientSet
) -> tuple[LimitRow, ...]:
    gpu, n = question.pools[0].cluster.gpu, deployment.n_gpus
    q = plan.prediction.quantities
    is_saturated = plan.prediction.is_saturated
    lowest = max(LOWEST_LIMIT_FRAC, 1.05 * gpu.idle_power_w / gpu.board_power_w)
    limits = np.linspace(lowest, 1.0, N_LIMITS) * gpu.board_power_w
    rest = power.coefficients["node_other_w_per_gpu"].value
    runs = limited_runs(
        run,
        gpu,
        deployment,
        power,
        board_power_w=q["board_power_w"].value / n,
        is_saturated=is_saturated,
        limits_w=[float(round(w)) for w in limits],
        seed=question.request.seed,
    )
    share = load_share(question, plan.prediction)
    e2e_s = q["e2e_p50_s"].value if "e2e_p50_s" in q else 0.0
    rows = []
    for r in (r for r in runs if r.clock_frac >= LOWEST_CLOCK_FRAC):
        # an open load keeps its rate as long as slower boards carry it; clients in a closed loop slow down
        kept = 1.0 if question.is_open and not is_saturated else r.speed_frac
        is_over = is_saturated or (question.is_open and share >= r.speed_frac)
        kept = min(kept, r.speed_frac / share) if is_over and share > 0 and not is_saturated else kept
        tokens = q["output_tokens_per_s"].value * kept
        sim, _ = counted(r.simulation, run.workload, e2e_s, is_over)
        latency = {
            f"{metric}_{statistic}_s": value / r.speed_frac
            for metric in ("ttft", "tpot", "itl", "e2e")
            for statistic in STATISTICS
            if not is_over and math.isfinite(value := sim.latency(metric, statistic))
        }
        targets = [(f"{t.metric}_{t.statistic}_s", t.max_s) for t in question.slo.targets]
        rows.append(
            LimitRow(
                limit_w=r.limit_w,
                clock_frac=r.clock_frac,
                speed_frac=r.speed_frac,
                board_power_w=r.board_power_w * n,
                requests_per_s=q["requests_per_s"].value * kept,
                output_tokens_per_s=tokens,
                energy_j_per_output_token=r.board_power_w * n / tokens,
                node_energy_j_per_output_token=float(node_power_w(r.board_power_w * n, n, rest)) / tokens,
                latency_s=latency,
                is_saturated=is_over,
                meets_slo=not is_over and all(latency.get(name, 0.0) <= most for name, most in targets),
            )
        )
    return tuple(rows)


def _best(rows: tuple[LimitRow, ...]) -> tuple[float | None, float | None, float | None]:
    """Return the limits with the fewest joules per token: of boards, of nodes, of nodes within load and targets."""

    def least(among: list[LimitRow], name: str) -> float | None:
        if not among:
            return None
        lowest = min(getattr(r, name) for r in among)
        return max(r.limit_w for r in among if getattr(r, name) <= lowest * (1.0 + EQUAL_FRAC))

    node = "node_energy_j_per_output_token"
    trusted = [r for r in rows if r.clock_frac >= TRUSTED_CLOCK_FRAC or r is rows[-1]]
    keeping = [r for r in trusted if r.meets_slo]
    return least(trusted, "energy_j_per_output_token"), least(trusted, node), least(keeping, node)


def _electricity(
    question: Question, deployment: Deployment, nodes: Mapping[str, Interval], power: CoefficientSet, terms: Terms
) -> Interval:
    """Return what whole nodes use an hour, on average over hours with this load and hours that idle [USD/h]."""
    loaded, share = nodes["electricity_usd_per_h"], terms.utilization_frac
    request, n = question.request, deployment.n_gpus
    idle_w = question.pools[0].cluster.gpu.idle_power_w * n
    idle = node_power(Interval(value=idle_w, low=idle_w, high=idle_w), n, power)

    def mean(on_usd: float, off_w: float) -> float:
        off = float(electricity_usd_per_h(off_w, request.electricity_usd_per_kwh, request.pue))
        return share * on_usd + (1.0 - share) * off

    return Interval(
        value=mean(loaded.value, idle.value), low=mean(loaded.low, idle.low), high=mean(loaded.high, idle.high)
    )


def _money(
    question: Question,
    deployment: Deployment,
    plan: Plan,
    terms: Terms,
    electricity: Interval,
    prefill: float | None,
) -> dict[str, Interval]:
    pool, request, q = question.pools[0], question.request, plan.prediction.quantities
    rent = (pool.usd_per_gpu_h or 0.0) * deployment.n_gpus
    own = None
    if terms.capex_usd_per_gpu is not None:
        own = Ownership(terms.capex_usd_per_gpu * deployment.n_gpus, terms.years)
    elif pool.usd_per_gpu_h is None:
        return {}
    prompt, _ = mean_lengths(question.workload.lengths)
    pays = request.electricity_usd_per_kwh > 0

    def bill(share: float) -> dict[str, Interval]:
        return money(
            q,
            rent,
            input_tokens_per_s=q["requests_per_s"].value * prompt,
            utilization_frac=terms.utilization_frac,
            prefill_frac=share,
            electricity=electricity if pays else None,
            hosted=terms.hosted,
            own=own,
        )

    # usd_per_million_output_tokens is the whole bill over the output tokens everywhere, so the split has another name
    found = bill(0.0)
    del found["usd_per_million_input_tokens"]
    names = ("usd_per_million_input_tokens", "usd_per_million_output_tokens")
    split = bill(prefill) if prefill is not None else {}
    return found | {f"split_{name}": split[name] for name in names if name in split}


def _rack(
    question: Question,
    deployment: Deployment,
    plan: Plan,
    power: CoefficientSet,
    terms: Terms,
    best_limit_w: float | None,
) -> RackFit | None:
    if terms.rack_w is None:
        return None
    cluster = question.pools[0].cluster
    per_node, gpu = cluster.gpus_per_node, cluster.gpu
    nodes = rack_nodes(terms.rack_w, gpu, power, gpus_per_node=per_node)
    # a deployment that fits in a node does not span two of them
    n = deployment.n_gpus
    copies = nodes * (per_node // n) if n <= per_node else nodes * per_node // n
    at_best = None
    if best_limit_w is not None and best_limit_w < gpu.board_power_w:
        limited = gpu.model_copy(update={"board_power_w": best_limit_w})
        at_best = rack_nodes(terms.rack_w, limited, power, gpus_per_node=per_node)
    return RackFit(
        rack_w=terms.rack_w,
        gpus_per_node=per_node,
        node_reserve_w=per_node * (gpu.board_power_w + power.coefficients["node_other_w_per_gpu"].high),
        n_nodes=nodes,
        n_deployments=copies,
        output_tokens_per_s=copies * plan.prediction["output_tokens_per_s"],
        best_limit_w=best_limit_w if at_best is not None else None,
        n_nodes_at_best_limit=at_best,
    )


def _notes(question: Question, rows: tuple[LimitRow, ...], run: Run | None, terms: Terms) -> tuple[Note, ...]:
    notes = []
    gpu = question.pools[0].cluster.gpu
    if question.pools[0].usd_per_gpu_h is None and terms.capex_usd_per_gpu is None:
        notes.append(Note(level="warning", text="no bill without a price: give --price or --capex-per-gpu"))
    if terms.capex_usd_per_gpu is not None and question.request.electricity_usd_per_kwh == 0:
        text = "own hardware without its electricity: give --electricity-price USD per kWh (and --pue)"
        notes.append(Note(level="warning", text=text))
    if run is None:
        text = "only the sum of a DeepSpeed plan's power is predicted: no parts, no split by phase, no power limits"
        notes.append(Note(text=text))
    elif rows:
        share = clock_bound_frac(run.replica.stages, run.simulation)
        text = f"power limits: {share:.0%} of the step time follows the clock, the rest waits for memory or host"
        notes.append(Note(text=text))
    if rows and gpu.family != "hopper":
        text = f"power limits: how {gpu.family} trades clock for power was not measured, Hopper's exponent is taken"
        notes.append(Note(level="warning", text=text))
    far = [r.limit_w for r in rows if r.clock_frac < TRUSTED_CLOCK_FRAC]
    if far:
        text = (
            f"limits of {max(far):.0f} W and below ask for clocks that were not measured: extrapolated, not recommended"
        )
        notes.append(Note(text=text))
    text = "the rest of a node (360 W a GPU, 200 to 575) was measured on 8 x H100 nodes; a small server differs"
    is_small = gpu.board_power_w < SMALL_BOARD_W
    notes.append(Note(level="warning" if is_small else "info", text=text))
    return tuple(notes)
