"""From a request to a recommendation: the one call that command line and app make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.contest import Table
from advisor.recommend.explain import accuracy, layout_text, notes, why
from advisor.recommend.feasible import Rejections, what_would_fit
from advisor.recommend.flips import flips
from advisor.recommend.forecast import forecast
from advisor.recommend.plan import Option, latency_s, make_plan
from advisor.recommend.rank import pareto
from advisor.recommend.search import Found, search, tabulate
from advisor.recommend.space import MOST_GPUS, doublings
from advisor.schema import Deployment, Plan, Recommendation, Rejected, Request

MAX_TRIED = 3
"""Larger plans that are replayed for each doubling of a pool where no plan of the pool meets the targets."""

LIMITS = ("costs", "draws", "the budget")
"""How the reasons begin that money and power give, not memory."""


def _on_front(options: list[Option], found: Found) -> list[bool]:
    """Return which unsaturated options no other one beats in cost, median latency and energy together."""
    able = [o for o in options if not o.prediction.is_saturated and "board_power_w" in o.prediction.quantities]
    rows = []
    for o in able:
        p, n = o.prediction, o.deployment.n_gpus
        tokens = max(p["output_tokens_per_s"], 1e-12)
        rent = o.pool.usd_per_gpu_h if found.has_prices and o.pool.usd_per_gpu_h is not None else 1.0
        rows.append((n * rent / tokens, latency_s(p), p["board_power_w"] / tokens))
    front = pareto(np.array(rows)).tolist() if rows else []
    best = {id(o) for o, on in zip(able, front, strict=True) if on}
    return [id(o) in best for o in options]


def plans_of(question: Question, found: Found) -> tuple[list[Plan], dict[str, Plan]]:
    """Return the plans to show, best first, and the best of each backend; the latter are always among the former."""
    front = _on_front(found.options, found)
    shown: list[Plan] = []
    by_backend: dict[str, Plan] = {}
    for rank, (option, is_pareto) in enumerate(zip(found.options, front, strict=True), start=1):
        is_new = option.deployment.backend not in by_backend
        if not is_new and len(shown) >= question.request.max_plans:
            continue
        plan = make_plan(question, option, rank=rank, has_prices=found.has_prices, is_pareto=is_pareto)
        shown.append(plan)
        if is_new:
            by_backend[plan.backend] = plan
    return shown, by_backend


def _what_vllm_needs(question: Question, rejected: Sequence[Rejected], catalog: Catalog) -> list[str]:
    """Return why no vLLM plan is left: the limit that excludes all, or what would hold the model."""
    limits = [r for r in rejected if r.backend == "vllm" and r.reason.startswith(LIMITS)]
    if limits:
        return [f"No vLLM plan is within the limits: {r.reason}. Nearest that fits: {r.nearest}." for r in limits]
    return what_would_fit(question, catalog.gpus())


def _confirmed(question: Question, pool: Pool, table: Table, more_than: int) -> Deployment | None:
    """Return the smallest deployment of a pool that meets the targets in its replay; the closed form proposes."""
    rows = zip(table.deployments, table.badness.tolist(), strict=True)
    proposed: dict[int, tuple[float, Deployment]] = {}
    for d, badness in rows:
        if badness <= 1 and d.n_gpus > more_than and badness < proposed.get(d.n_gpus, (np.inf, d))[0]:
            proposed[d.n_gpus] = badness, d
    for _, (_, d) in sorted(proposed.items())[:MAX_TRIED]:
        option = forecast(question, pool, d, question.workload)
        has_price = pool.usd_per_gpu_h is not None
        if make_plan(question, option, rank=1, has_prices=has_price, is_pareto=False).meets_slo:
            return d
    return None


def _what_would_meet(question: Question, found: Found) -> list[str]:
    """Return how many cards of each pool would meet the targets.

    Every doubling of the pool is searched, up to `MOST_GPUS`; the closed form proposes, the smallest proposals are
    replayed. Where no replay meets them, a plan that the closed form, as wrong as it was on what was simulated, holds
    able.
    """
    factor = median(set(found.table.factors[1].tolist())) if found.table.factors.size else 1.0
    goal = "would meet all targets" if question.slo.targets else "would carry the load with headroom"
    sentences = []
    for pool in question.pools:
        tried = pool.cluster.n_gpus
        for cluster in doublings(pool.cluster, MOST_GPUS):
            grown = replace(pool, cluster=cluster)
            larger = replace(question, pools=(grown,))
            table = tabulate(larger, Rejections(), has_prices=found.has_prices)
            fewest, how = _confirmed(larger, grown, table, tried), "simulated"
            if fewest is None:
                able = zip(table.deployments, table.badness.tolist(), strict=True)
                good = [d for d, b in able if b * factor <= 1]
                fewest = min(good, key=lambda d: d.n_gpus, default=None)
                how = "closed form, corrected by what was simulated"
            if fewest is not None:
                sentences.append(f"{layout_text(fewest)} of {cluster.gpu.name} {goal} ({how}).")
                break
            tried = cluster.n_gpus
    return sentences


def recommend(request: Request, catalog: Catalog | None = None, *, is_brief: bool = False) -> Recommendation:
    """Return ranked plans for a request, with reasons, rejections and what would flip the winner.

    is_brief : without what would flip the winner and without what larger pools or other cards would do; the rest is the
               same, after half of the time or less

    Raises AdvisorError for names and numbers that mean nothing; a model that fits nowhere is an answer without `best`.
    """
    if request.task in ("train", "mixed"):
        raise DomainError(
            f"task '{request.task}' is not a serving question: use `advisor {request.task}`; serve and batch are"
        )
    catalog = catalog if catalog is not None else load_catalog()
    question = ask(request, catalog)
    found = search(question)
    plans, by_backend = plans_of(question, found)
    best = plans[0] if plans else None
    remarks = [*notes(question, found, best)]
    rejected = found.rejections.all()
    reasons = [*why(question, plans, by_backend, rejected)]
    if not is_brief:
        if "vllm" not in by_backend and (not request.backends or "vllm" in request.backends):
            reasons += _what_vllm_needs(question, rejected, catalog)
        elif best is not None and best.backend == "vllm" and not best.meets_slo:
            reasons += _what_would_meet(question, found)
    return Recommendation(
        request=request.model_dump(mode="json", exclude_none=True),
        model=question.model.name,
        model_note=" ".join(n.text for n in question.model_notes),
        gpus=",".join(p.name for p in question.pools),
        best=best,
        best_by_backend=by_backend,
        plans=tuple(plans),
        rejected=rejected,
        why=tuple(reasons),
        flips=() if is_brief else flips(question, plans, found),
        accuracy=accuracy(question, best, catalog.accuracy()),
        notes=tuple(remarks),
    )
