"""From a request to a recommendation: the one call that command line and app make."""

from __future__ import annotations

import numpy as np

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.recommend.ask import Question, ask
from advisor.recommend.explain import accuracy, notes, why
from advisor.recommend.feasible import what_would_fit
from advisor.recommend.flips import flips
from advisor.recommend.plan import Option, latency_s, make_plan
from advisor.recommend.rank import pareto
from advisor.recommend.search import Found, search
from advisor.schema import Plan, Recommendation, Request

PARETO = ("cost", "e2e_p50_s", "energy")


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


def recommend(request: Request, catalog: Catalog | None = None) -> Recommendation:
    """Return ranked plans for a request, with reasons, rejections and what would flip the winner.

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
    if "vllm" not in by_backend and (not request.backends or "vllm" in request.backends):
        reasons += what_would_fit(question, catalog.gpus())
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
        flips=flips(question, plans, found),
        accuracy=accuracy(question, best, catalog.accuracy()),
        notes=tuple(remarks),
    )
