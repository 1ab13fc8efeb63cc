"""Command emit: the files that start a plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from advisor.catalog import load_catalog
from advisor.cli.parse import UsageError, request_fields
from advisor.cli.plan_file import read_plan, refuse_more
from advisor.cli.serve import chosen
from advisor.cli.text import out
from advisor.emit import emit as emit_text
from advisor.emit import file_name
from advisor.errors import DomainError
from advisor.recommend.answer import plans_of
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.one import deployment_of, predict_one
from advisor.recommend.search import search
from advisor.schema import Plan, Request


def plan_of(args: argparse.Namespace) -> tuple[Question, Plan, Pool]:
    """Return the plan of --plan, else the one that the options fix, else the best when they fix nothing."""
    if args.plan:
        refuse_more(args)
        return read_plan(Path(args.plan), args.rank)
    if args.rank is not None:
        raise UsageError("--rank picks a plan of a file: give --plan FILE")
    question = ask(Request.model_validate(request_fields(args)), load_catalog())
    fixed = chosen(args)
    if set(fixed) - {"backend"}:
        return question, predict_one(question, deployment_of(question, fixed)), question.pools[0]
    found = search(question)
    _, by_backend = plans_of(question, found)
    plan = by_backend.get(args.backend)
    if plan is None:
        why = next((r.reason for r in found.rejections.all() if r.backend == args.backend), "nothing fits")
        raise DomainError(f"no plan of {args.backend}: {why}")
    pool = next(o.pool for o in found.options if o.deployment == plan.deployment)
    return question, plan, pool


def emit(args: argparse.Namespace) -> int:
    """Print or write one artefact of a plan."""
    question, plan, pool = plan_of(args)
    text = emit_text(
        args.artefact,
        plan,
        question.model,
        pool.cluster,
        question.workload,
        question.slo,
        facts=question.facts if plan.backend == "vllm" else None,
    )
    if not args.out:
        sys.stdout.write(text)
        return 0
    target = Path(args.out)
    target = target / file_name(args.artefact, plan.deployment) if target.is_dir() else target
    target.write_text(text, encoding="utf-8")
    out(f"wrote {target}")
    return 0
