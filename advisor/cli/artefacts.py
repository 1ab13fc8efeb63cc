"""Commands emit and verify: the files that start a plan, and a live endpoint beside its prediction."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from advisor.catalog import load_catalog
from advisor.catalog.files import read_json
from advisor.cli.parse import request_fields
from advisor.cli.serve import chosen
from advisor.cli.text import bullet, format_interval, format_quantity, out, print_json, table
from advisor.emit import emit as emit_text
from advisor.emit import file_name
from advisor.errors import DomainError
from advisor.recommend.answer import plans_of
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.one import deployment_of, predict_one
from advisor.recommend.search import search
from advisor.schema import SCHEMA_VERSION, Plan, Prediction, Request, Workload


def plan_of(args: argparse.Namespace) -> tuple[Question, Plan, Pool]:
    """Return the plan that the options fix, or the best one when they fix no degree."""
    question = ask(Request.model_validate(request_fields(args)), load_catalog())
    if any(getattr(args, name) is not None for name in ("tp", "pp", "dp", "static_batch", "offload")):
        return question, predict_one(question, deployment_of(question, chosen(args))), question.pools[0]
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


def _config(question: Question, asked: str) -> dict[str, Any]:
    """Return the model's config.json, which a run record carries so that it can be fitted anywhere."""
    path = Path(asked).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read_json(path)
    own = load_catalog().root / "models" / f"{question.model.name}.json"
    return dict(read_json(own)["config"]) if own.is_file() else {}


def verify(args: argparse.Namespace) -> int:
    """Load a live endpoint and print what it did beside what was predicted."""
    from advisor.verify import verify as verify_endpoint
    from advisor.verify import write_records

    question, plan, _ = plan_of(args)

    def predict(workload: Workload) -> Prediction:
        from dataclasses import replace

        return predict_one(replace(question, workload=workload), plan.deployment).prediction

    report = verify_endpoint(
        args.url,
        plan,
        model=question.model,
        workload=question.workload,
        hf_config=_config(question, args.model),
        served_model=args.served_model,
        key=args.key,
        predict=predict,
        timeout_s=args.timeout,
        seed=question.request.seed,
    )
    if args.record:
        write_records(report, Path(args.record))
    if args.json:
        print_json({"schema_version": SCHEMA_VERSION} | report.model_dump(mode="json"))
        return 0
    out(f"{report.endpoint}: {report.model}, {report.engine_version or 'release unknown'}")
    rows = [
        (
            r.cell,
            r.name,
            format_interval(r.name, r.predicted),
            format_quantity(r.name, r.measured),
            f"{r.error_frac:+.1%}",
            "yes" if r.is_inside else "no",
        )
        for r in report.rows
        if args.verbose or not r.name.endswith(("_p90_s", "_p95_s"))
    ]
    out("\n".join(table(("cell", "quantity", "predicted", "measured", "error", "inside"), rows, left=2)))
    out("\n".join(bullet(report.verdict)))
    out("\n".join(line for n in report.notes for line in bullet(f"{n.level}: {n.text}")))
    return 0
