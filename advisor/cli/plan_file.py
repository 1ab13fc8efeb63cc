"""A plan from a file: what `recommend --json` or `predict --json` wrote, made a question and a plan again."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.catalog.files import read_json
from advisor.cli.parse import UsageError, request_fields
from advisor.cli.serve import chosen
from advisor.errors import BadData, printable
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.form import plan_from_json
from advisor.schema import Plan, Request, first_error


def _entry(form: dict[str, Any], rank: int | None, where: str) -> Any:
    """Return the plan of a rank, or the best one, of an answer's JSON; a prediction's JSON is one plan."""
    if "plans" not in form:
        if rank is not None:
            raise BadData(where, "holds one plan: leave out --rank")
        return form
    plans = [p for p in form["plans"] if isinstance(p, dict)] if isinstance(form["plans"], list) else []
    ranks = [p.get("rank") for p in plans]
    if not plans:
        raise BadData(where, "holds no plan: nothing fitted the request")
    if rank is None:
        return plans[0]
    if rank not in ranks:
        raise BadData(where, f"holds no plan of rank {rank}; there are {', '.join(str(r) for r in ranks)}")
    return plans[ranks.index(rank)]


def read_plan(path: Path, rank: int | None = None) -> tuple[Question, Plan, Pool]:
    """Return question, plan and pool of a file that `recommend --json` or `predict --json` wrote.

    Raises BadData, in one sentence, for a file that is neither.
    """
    where = printable(path, 120)
    form = read_json(path)
    if not isinstance(form.get("request"), dict) or ("plans" not in form and "deployment" not in form):
        raise BadData(where, "is no plan; write one with `advisor recommend --json` or `advisor predict --json`")
    try:
        request = Request.model_validate(form["request"])
        plan = plan_from_json(_entry(form, rank, where))
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    question = ask(request, load_catalog())
    d = plan.deployment
    pools = [p for p in question.pools if p.cluster.gpu.name == d.gpu and p.cluster.n_gpus >= d.n_gpus]
    if not pools:
        raise BadData(where, f"its plan runs on {d.n_gpus} x {d.gpu}, which its request '{request.gpus}' does not hold")
    return replace(question, pools=(pools[0],)), plan, pools[0]


def refuse_more(args: argparse.Namespace, kept: tuple[str, ...] = ()) -> None:
    """Raise UsageError when options beside --plan would say something else than the file."""
    given = {*request_fields(args), *chosen(args)} - {"backend", *kept}
    if args.backend != "vllm":
        given.add("backend")
    if given:
        names = ", ".join(sorted(given)).replace("_", "-")
        raise UsageError(f"the plan file fixes model, GPUs, deployment and traffic: leave out {names}")
