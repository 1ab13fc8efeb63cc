"""Command verify: a live endpoint beside its plan's prediction, as a table and a chart."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from advisor.catalog import load_catalog
from advisor.catalog.files import read_json
from advisor.cli.artefacts import plan_of
from advisor.cli.parse import UsageError
from advisor.cli.text import bullet, format_interval, format_quantity, out, print_json, table
from advisor.errors import AdvisorError, DomainError
from advisor.recommend.ask import Question
from advisor.recommend.explain import plan_text, workload_text
from advisor.recommend.one import predict_one
from advisor.schema import SCHEMA_VERSION, Prediction, Workload
from advisor.units import format_change
from advisor.verify import Progress, Row, VerifyReport, write_records
from advisor.verify import verify as verify_endpoint
from advisor.verify.endpoint import KEY_VARIABLE

LINE_EVERY_S = 5.0
CHART_WIDTH = 41
CHART_SPAN = 2.0
"""The chart shows measured over predicted from 1/2 to 2 on a logarithmic scale; what lies beyond sits at its edge."""


def _config(question: Question) -> dict[str, Any]:
    """Return the model's config.json, which a run record carries so that it can be fitted anywhere."""
    path = Path(question.request.model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read_json(path)
    own = load_catalog().root / "models" / f"{question.model.name}.json"
    return dict(read_json(own)["config"]) if own.is_file() else {}


class Ticker:
    """Progress on stderr: one line that changes on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.shown_at = -math.inf
        self.cell = ""

    def __call__(self, p: Progress) -> None:
        """Show how far a cell is."""
        is_last = bool(p.n_expected) and p.n_done >= p.n_expected
        if not self.is_terminal and p.cell == self.cell and monotonic() - self.shown_at < LINE_EVERY_S and not is_last:
            return
        of = f" of about {p.n_expected}" if p.n_expected else ""
        text = f"{p.cell} cell: {p.n_done}{of} requests, {p.elapsed_s:.0f} s"
        if self.is_terminal:
            sys.stderr.write(f"\r{text:<70}")
        elif is_last and p.cell == self.cell and self.shown_at == math.inf:
            return
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        self.cell, self.shown_at = p.cell, math.inf if is_last else monotonic()

    def close(self) -> None:
        """End the changing line."""
        if self.is_terminal and self.cell:
            sys.stderr.write("\n")


def chart_line(row: Row) -> str:
    """Return the interval as brackets around the prediction, and the measured value as x, over one axis."""

    def at(value: float) -> int:
        share = 0.5 + 0.5 * math.log(max(value, 1e-300) / row.predicted.value) / math.log(CHART_SPAN)
        return round(min(max(share, 0.0), 1.0) * (CHART_WIDTH - 1))

    low, high = at(row.predicted.low), at(row.predicted.high)
    cells = ["-" if low < i < high else "." for i in range(CHART_WIDTH)]
    cells[low], cells[high], cells[(CHART_WIDTH - 1) // 2] = "[", "]", "|"
    cells[at(row.measured)] = "x"
    return "".join(cells)


def _shown(rows: Sequence[Row], verbose: bool) -> list[Row]:
    return [r for r in rows if verbose or not r.name.endswith(("_p90_s", "_p95_s"))]


def report_lines(report: VerifyReport, *, verbose: bool) -> list[str]:
    """Return the report: table, chart, verdict, notes."""
    rows = _shown(report.rows, verbose)
    lines = []
    for cell in report.cells:
        failed = f", {cell.n_failed} failed" if cell.n_failed else ""
        n, took_s = cell.measured.n_requests or 0, cell.measured.duration_s or 0.0
        lines += bullet(f"{cell.name} cell: {n} requests in {took_s:.0f} s{failed}")
    lines.append("")
    head = ("cell", "quantity", "predicted for what was sent", "measured", "error", "inside")
    body = [
        (
            r.cell,
            r.name,
            format_interval(r.name, r.predicted),
            format_quantity(r.name, r.measured),
            format_change(r.error_frac, 1),
            "yes" if r.is_inside else "no",
        )
        for r in rows
    ]
    lines += table(head, body, left=2)
    if rows:
        width = max(len(f"{r.cell} {r.name}") for r in rows)
        scale = "predicted"
        lines += ["", f"{'':<{width}}  {f'1/{CHART_SPAN:g}':<{(CHART_WIDTH - len(scale)) // 2}}{scale}"]
        lines[-1] = f"{lines[-1]:<{width + 2 + CHART_WIDTH - 2}}x{CHART_SPAN:g}"
        lines += [f"{f'{r.cell} {r.name}':<{width}}  {chart_line(r)}" for r in rows]
        lines.append(f"{'':<{width}}  [ ] 90 % interval, x measured")
    lines += ["", *bullet(report.verdict)]
    lines += [line for n in report.notes for line in bullet(f"{n.level}: {n.text}")]
    return lines


def _address(args: argparse.Namespace) -> str:
    if bool(args.url) == bool(args.endpoint):
        raise UsageError("give the endpoint once, such as advisor verify --endpoint http://localhost:8000 --plan FILE")
    return str(args.url or args.endpoint)


def _write(report: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise AdvisorError(f"cannot write {path}: {error.strerror}") from None


def verify(args: argparse.Namespace) -> int:
    """Load a live endpoint and print what it did beside what was predicted."""
    address = _address(args)
    if args.light < 0:
        raise DomainError(f"--light {args.light} is no number of requests; give 0 or more")
    question, plan, _ = plan_of(args)
    if not args.json:
        out(f"{question.model.name}: {plan_text(plan, with_gpu=True)}; {workload_text(question)}")

    def predict(workload: Workload) -> Prediction:
        return predict_one(replace(question, workload=workload), plan.deployment).prediction

    vllm = question.vllm if plan.backend == "vllm" else None

    def vary(name: str, factor: float, workload: Workload) -> Prediction:
        assert vllm is not None
        one = vllm.coefficients[name]
        changed = vllm.coefficients | {name: one.model_copy(update={"value": factor * one.value})}
        other = replace(question, workload=workload, vllm=vllm.model_copy(update={"coefficients": changed}))
        return predict_one(other, plan.deployment).prediction

    ticker = Ticker()
    try:
        report = verify_endpoint(
            address,
            plan,
            model=question.model,
            workload=question.workload,
            hf_config=_config(question),
            served_model=args.served_model,
            key=args.key or os.environ.get(KEY_VARIABLE, ""),
            predict=predict,
            vary=vary if vllm is not None else None,
            coefficients=vllm.coefficients if vllm is not None else None,
            n_requests=args.requests,
            duration_s=args.duration,
            n_light=args.light,
            timeout_s=args.timeout,
            seed=question.request.seed,
            listen=ticker,
        )
    finally:
        ticker.close()
    if args.record:
        write_records(report, Path(args.record))
    form = {"schema_version": SCHEMA_VERSION} | report.model_dump(mode="json")
    if args.report:
        _write(form, Path(args.report))
    if args.json:
        print_json(form)
        return 0
    out(f"{report.endpoint}: {report.model}, {report.engine_version or 'release unknown'}")
    out("\n".join(report_lines(report, verbose=args.verbose)))
    return 0
