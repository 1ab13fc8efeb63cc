"""One cell answered: a row of plain values, the same whatever process computes it."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import advisor
from advisor.catalog import load_catalog
from advisor.errors import AdvisorError, BadData, printable
from advisor.recommend.answer import plans_of
from advisor.recommend.ask import Question, ask, fit_context, parse_slo
from advisor.recommend.one import deployment_of, predict_one
from advisor.recommend.search import search
from advisor.schema import Deployment, Plan, Request, Slo
from advisor.schema.study import Study, StudyWorkload
from advisor.study.grid import Cell
from advisor.study.read import NO_SLO
from advisor.study.trace import digest, read_trace

Row = dict[str, Any]

DIGITS = 6
"""Significant digits of a result; the models are good to two or three."""

DEFECTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError)
"""What a defect of ours raises; one such cell must not end a study of a million, and must not pass unseen either."""

PLAN_FIELDS = (
    *("backend", "gpu", "tp", "pp", "dp", "ep", "weight_dtype", "kv_dtype", "max_model_len", "max_num_seqs"),
    *("max_num_batched_tokens", "gpu_memory_utilization", "static_batch", "offload"),
)
BASIS_FOLDERS = ("fitted", "engines", "hardware", "models", "prices", "workloads")


@lru_cache(maxsize=4)
def basis(root: Path) -> str:
    """Return what results rest on, as a short digest: the release and the catalogue's files under `root`."""
    whole = hashlib.blake2b(advisor.__version__.encode(), digest_size=6)
    for path in sorted(p for folder in BASIS_FOLDERS for p in (root / folder).rglob("*") if p.is_file()):
        whole.update(f"\n{path.relative_to(root).as_posix()}\n".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _slo(text: str) -> tuple[Slo, bool]:
    is_none = text.strip().lower() == NO_SLO
    return (Slo() if is_none else parse_slo(text)), is_none


@lru_cache(maxsize=64)
def _asked(model: str, gpus: str, traffic: StudyWorkload, engine_version: str) -> Question:
    """Return the question of a cell without targets, objective and seed: what neighbouring cells share."""
    catalog = load_catalog()
    fields: dict[str, Any] = {"model": model, "gpus": gpus, "engine_version": engine_version}
    if traffic.trace:
        question = ask(Request(**fields, workload="chat"), catalog)
        path = Path(traffic.trace)
        if digest(path) != traffic.trace_sha256:
            raise BadData(printable(path, 200), "has changed since the study was read")
        own = read_trace(path, traffic.trace_name, traffic.label)
        workload, length, fault, notes = fit_context(own, question.model, question.request)
        return replace(question, workload=workload, max_model_len=length, context_fault=fault, notes=tuple(notes))
    fields |= {"workload": traffic.preset} | {
        name: value
        for name in ("prompt_tokens", "output_tokens", "length_sigma")
        if (value := getattr(traffic, name)) is not None
    }
    fields |= {"rate": traffic.rate[0]} if traffic.rate else {}
    fields |= {"concurrency": traffic.concurrency[0]} if traffic.concurrency else {}
    return ask(Request(**fields), catalog)


def _question(study: Study, cell: Cell) -> Question:
    question = _asked(cell.model, cell.gpus, cell.workload, study.engine_version)
    slo, is_none = _slo(cell.slo)
    own = {"slo": slo, "is_best_effort": is_none, "objective": cell.objective, "seed": cell.seed}
    shared = {"backends": study.backends, "n_finalists": study.n_finalists, "max_plans": 1}
    return replace(question, request=question.request.model_copy(update=own | shared))


def _recommended(question: Question) -> tuple[Plan | None, str]:
    """Return the best plan, or None and the reason of the first rejection."""
    found = search(question)
    plans, _ = plans_of(question, found)
    if plans:
        return plans[0], ""
    rejected = found.rejections.all()
    first = rejected[0] if rejected else None
    return None, f"{first.reason}; nearest that fits: {first.nearest or 'none'}" if first else "no deployment is legal"


def _key(study: Study, cell: Cell) -> tuple[Any, ...]:
    return (cell.model, cell.gpus, cell.workload, cell.slo, cell.objective)


class Cells:
    """Answers the cells of one study; keeps what neighbouring cells share."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._chosen: tuple[tuple[Any, ...], Deployment | None, str] | None = None

    def row(self, cell: Cell) -> Row:
        """Return the result of a cell; an impossible or faulty one is a row with its reason."""
        study = self.study
        row: Row = {
            "id": cell.id,
            "basis": basis(load_catalog().root),
            "mode": study.mode,
            "model": cell.model,
            "gpus": cell.gpus,
            "workload": cell.workload.label,
            "slo": cell.slo,
            "objective": cell.objective,
            "seed": cell.seed,
        }
        try:
            question = _question(study, cell)
            plan, reason = self._simulated(question, cell) if study.mode == "simulate" else _recommended(question)
        except AdvisorError as error:
            return row | {"status": "error", "reason": f"{type(error).__name__}: {printable(error, 400)}"}
        except DEFECTS as error:
            text = f"defect, please report: {type(error).__name__}: {printable(error, 400)}"
            return row | {"status": "error", "reason": text}
        if plan is None:
            return row | {"status": "infeasible", "reason": printable(reason, 400)}
        return row | {"status": "ok", "reason": ""} | _flat(plan)

    def _simulated(self, question: Question, cell: Cell) -> tuple[Plan | None, str]:
        if question.context_fault is not None:
            return None, f"{question.context_fault[0]}; nearest that fits: {question.context_fault[1]}"
        deployment, reason = self._deployment(question, cell)
        if deployment is None:
            return None, reason
        pools = tuple(p for p in question.pools if p.cluster.gpu.name == deployment.gpu)
        return predict_one(replace(question, pools=pools), deployment), ""

    def _deployment(self, question: Question, cell: Cell) -> tuple[Deployment | None, str]:
        """Return the given deployment, else the recommended one: found with seed 0, so that all seeds replay one."""
        if self.study.deployment is not None:
            return deployment_of(question, self.study.deployment.model_dump(exclude_none=True)), ""
        key = _key(self.study, cell)
        if self._chosen is None or self._chosen[0] != key:
            first = replace(question, request=question.request.model_copy(update={"seed": 0}))
            plan, reason = _recommended(first)
            self._chosen = (key, plan.deployment if plan else None, reason)
        return self._chosen[1:]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _flat(plan: Plan) -> Row:
    deployment = plan.deployment.model_dump(mode="json", include=set(PLAN_FIELDS))
    prediction = plan.prediction
    return {
        "plan": {name: deployment[name] for name in PLAN_FIELDS} | {"n_gpus": plan.deployment.n_gpus},
        "meets_slo": plan.meets_slo,
        "is_saturated": prediction.is_saturated,
        "method": prediction.method,
        "usd_per_h": _rounded(plan.usd_per_h),
        "score": _rounded(plan.score),
        "quantities": {
            name: [_rounded(q.value), _rounded(q.low), _rounded(q.high)]
            for name, q in sorted(prediction.quantities.items())
        },
    }


_KEPT: dict[str, Cells] = {}


def run_batch(study: Study, cells: Sequence[Cell]) -> tuple[list[Row], float]:
    """Return the rows of some cells and the seconds that they took; what a worker process executes."""
    start = perf_counter()
    key = study.model_dump_json(exclude={"models", "gpus", "workloads", "slos", "seeds"})
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = Cells(study)
    rows = [_KEPT[key].row(cell) for cell in cells]
    return rows, perf_counter() - start


def worker_batch(study: Study, cells: Sequence[Cell]) -> tuple[list[Row], float]:
    """Return `run_batch` in a process of its own, which leaves Ctrl-C to the process that writes the results."""
    # cluster workers may run tasks in threads, where no handler can be set
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return run_batch(study, cells)
