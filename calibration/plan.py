"""Chooses the cells that tell most about the coefficients within the minutes that there are.

Greedy D-optimality: each step takes the cell (or the engine start with its first cells) whose results shrink the
volume of the coefficients' uncertainty most per GPU second. In the linear model ln(observable) = J ln(coefficient) the
information of a cell is J' J / noise^2, and for the present covariance P it adds ln det(I + J P J' / noise^2) nats
(Fedorov, Theory of Optimal Experiments, 1972, ch. 2 and 3). These gains are submodular, so the greedy choice is within
1 - 1/e of the best set of the same size (Nemhauser, Wolsey and Fisher, Math. Programming 14, 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.cells import Cell, default_requests
from calibration.errors import JobError
from calibration.models import resolve

Floats = NDArray[np.float64]
LOOKAHEAD_CELLS = 6  # cells that speak for an engine start that is not open yet
PROMPTS = (64, 256, 1024, 4096, 16384)
OUTPUTS = (16, 128, 256)
CONCURRENCIES = (1, 4, 16, 64, 128, 256)
MAX_CELL_S = 40.0
LEAST_GAIN_NATS = 0.05  # a cell that shrinks the uncertainty by less than 5 % is not worth its seconds
UNTOLD = 0.9  # a coefficient of which more than this of the uncertainty stays is not told


class Design(Protocol):
    """What the plan must know of the law that will be fitted."""

    names: Sequence[str]
    prior_sd: Floats  # standard deviation of ln(coefficient) before the runs

    def rows(self, start: dict[str, Any], cell: Cell) -> tuple[Floats, Floats]:
        """Return d ln(observable) / d ln(coefficient), one row an observable, and each observable's noise."""

    def seconds(self, start: dict[str, Any], cell: Cell) -> float:
        """Return how long a cell is expected to take [s]."""

    def start_s(self, start: dict[str, Any]) -> float:
        """Return how long an engine start is expected to take [s]."""


@dataclass
class Step:
    """One chosen cell."""

    start: int
    cell: Cell
    seconds: float
    gain_nats: float


@dataclass
class Plan:
    """Engine starts with their cells, the time that they take, and what is then known."""

    starts: list[dict[str, Any]]
    steps: list[Step]
    wall_s: float
    gpu_s: float
    names: Sequence[str]
    sd_before: Floats
    sd_after: Floats
    ends: dict[int, float] = field(default_factory=dict)

    @property
    def opened(self) -> list[int]:
        """The engine starts in the order in which they were chosen."""
        return list(dict.fromkeys(s.start for s in self.steps))

    def jobs(self) -> list[dict[str, Any]]:
        """Return the plan as a jobs file for `run-many`: closed cells first, in growing concurrency."""
        out = []
        for i in self.opened:
            mine = sorted((s for s in self.steps if s.start == i), key=lambda s: (s.cell.kind, s.cell.concurrency))
            cells = [_as_dict(s.cell) | {"expected_s": round(s.seconds, 1)} for s in mine]
            spent = sum(s.seconds for s in mine)
            limits = {"budget_s": round(2 * spent + 60), "limit_s": round(2 * spent + 360)}
            out.append({**self.starts[i], **limits, "cells": cells})
        return out


def _as_dict(cell: Cell) -> dict[str, Any]:
    keep = ("kind", "prompt_tokens", "output_tokens", "concurrency", "n_requests", "rate_frac", "duration_s", "sigma")
    return {k: getattr(cell, k) for k in keep if getattr(cell, k) or k in ("kind",)}


def candidates(max_model_len: int, max_num_seqs: int) -> list[Cell]:
    """Return the closed cells that a start can run."""
    return [
        Cell("closed", prompt, output, concurrency=c, n_requests=default_requests(c))
        for prompt in PROMPTS
        for output in OUTPUTS
        for c in CONCURRENCIES
        if prompt + output <= max_model_len and c <= max_num_seqs
    ]


def starts_for(
    models: Sequence[str], n_gpus: int, tp: str, quantization: str, max_model_len: int
) -> list[dict[str, Any]]:
    """Return the engine starts to choose from: every model at every degree and precision that fits on the GPUs.

    tp, quantization : lists with commas; without `tp`, the powers of two up to `n_gpus`
    """
    try:
        degrees = [int(t) for t in tp.split(",")] if tp else [2**i for i in range(10) if 2**i <= n_gpus]
    except ValueError:
        raise JobError(f"tp '{tp}' is not a list of whole numbers with commas") from None
    kinds = [q.strip() for q in quantization.split(",")]
    if unknown := [q for q in kinds if q not in ("none", "fp8")]:
        raise JobError(f"quantization '{unknown[0]}' is not none or fp8; AWQ models have names of their own")
    return [
        {
            "run_id": f"{model}-{'bf16' if kind == 'none' else kind}-tp{degree}",
            "model": model,
            "tp": degree,
            "quantization": None if kind == "none" else kind,
            "max_model_len": min(max_model_len, int(resolve(model)[1].get("max_position_embeddings", max_model_len))),
            "max_num_seqs": 256,
        }
        for model in models
        for degree in degrees
        for kind in kinds
    ]


class Knowledge:
    """The covariance of ln(coefficient) as cells are added."""

    def __init__(self, prior_sd: Floats) -> None:
        self.covariance: Floats = np.diag(np.asarray(prior_sd, dtype=float) ** 2)

    def gain(self, rows: Floats, noise: Floats) -> float:
        """Return what a cell would add [nats]."""
        scaled = rows / np.asarray(noise)[:, None]
        return float(np.linalg.slogdet(np.eye(len(scaled)) + scaled @ self.covariance @ scaled.T)[1])

    def add(self, rows: Floats, noise: Floats) -> None:
        """Add a cell's information."""
        scaled = rows / np.asarray(noise)[:, None]
        spread = self.covariance @ scaled.T
        self.covariance = self.covariance - spread @ np.linalg.solve(np.eye(len(scaled)) + scaled @ spread, spread.T)

    def copy(self) -> Knowledge:
        """Return a copy that can be changed on its own."""
        other = Knowledge(np.zeros(0))
        other.covariance = self.covariance.copy()
        return other

    @property
    def sd(self) -> Floats:
        """Standard deviation of each ln(coefficient)."""
        return np.sqrt(np.clip(np.diag(self.covariance), 0, None))


def make_plan(
    design: Design,
    starts: list[dict[str, Any]],
    n_gpus: int,
    minutes: float,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Return the plan for `n_gpus` GPUs side by side and `minutes` of wall time.

    starts : jobs without cells (run_id, model, tp, pp, ...) from which to choose
    Raises JobError when not one start fits.
    """
    if not starts:
        raise JobError("there is no engine start to choose from")
    limit = 60.0 * minutes
    needs = [int(s.get("tp", 1)) * int(s.get("pp", 1)) for s in starts]
    refused: list[str] = []
    options: list[dict[Cell, tuple[Floats, Floats, float]]] = []
    for start, need in zip(starts, needs, strict=True):
        found: dict[Cell, tuple[Floats, Floats, float]] = {}
        options.append(found)
        if need > n_gpus:
            refused.append(f"{start['run_id']} needs {need} GPUs, more than {n_gpus} GPU(s)")
            progress(f"left out: {refused[-1]}")
            continue
        try:
            for cell in candidates(int(start.get("max_model_len", 4096)), int(start.get("max_num_seqs") or 256)):
                seconds = design.seconds(start, cell)
                if seconds <= min(MAX_CELL_S, limit):
                    found[cell] = (*design.rows(start, cell), seconds)
        except JobError as err:  # it does not fit on its GPUs, say
            found.clear()
            refused.append(str(err))
            progress(f"left out: {err}")
            continue
        progress(f"{start['run_id']}: {len(found)} cells to choose from")
    known = Knowledge(design.prior_sd)
    before = known.sd
    lanes = [0.0] * n_gpus  # when each GPU is free again
    held: dict[int, list[int]] = {}
    steps: list[Step] = []
    begun = [design.start_s(s) for s in starts]
    while True:
        best: tuple[float, int, Cell] | None = None
        for i, found in enumerate(options):
            choice = (
                _next_cell(known, found, needs[i], limit - lanes[held[i][0]])
                if i in held
                else _next_start(known, found, needs[i], begun[i], limit, lanes)
            )
            if choice and (best is None or choice[0] > best[0]):
                best = (choice[0], i, choice[1])
        if best is None or known.gain(*options[best[1]][best[2]][:2]) < LEAST_GAIN_NATS:
            break
        _, i, cell = best
        rows, noise, seconds = options[i].pop(cell)
        if i not in held:
            held[i] = sorted(range(n_gpus), key=lambda g: lanes[g])[: needs[i]]
            opening = max(lanes[g] for g in held[i]) + begun[i]
            for g in held[i]:
                lanes[g] = opening
            # a start that another one followed on its GPUs is over: it takes no more cells
            for j in [j for j in held if j != i and set(held[j]) & set(held[i])]:
                options[j] = {}
        steps.append(Step(i, cell, seconds, known.gain(rows, noise)))
        known.add(rows, noise)
        for g in held[i]:
            lanes[g] += seconds
    if len(refused) == len(starts):
        raise JobError(refused[0])
    if not steps:
        raise JobError(
            f"{minutes:g} minutes on {n_gpus} GPU(s) are too short: a start takes {min(begun):.0f} s before its cells"
        )
    used = sum(begun[i] * needs[i] for i in held) + sum(s.seconds * needs[s.start] for s in steps)
    return Plan(starts, steps, max(lanes), used, list(design.names), before, known.sd)


def _next_cell(
    known: Knowledge, found: dict[Cell, tuple[Floats, Floats, float]], need: int, left_s: float
) -> tuple[float, Cell] | None:
    """Return the best (gain per GPU second, cell) of an open start."""
    rated = [(known.gain(r, n) / (s * need), c) for c, (r, n, s) in found.items() if s <= left_s]
    return max(rated, key=lambda x: x[0], default=None)


def _next_start(
    known: Knowledge,
    found: dict[Cell, tuple[Floats, Floats, float]],
    need: int,
    begun_s: float,
    limit: float,
    lanes: list[float],
) -> tuple[float, Cell] | None:
    """Return (gain per GPU second, first cell) of a start that is not open, judged by its best few cells together."""
    if need > len(lanes):
        return None
    left = limit - sorted(lanes)[need - 1] - begun_s
    trial, rest, first = known.copy(), dict(found), None
    gain, spent = 0.0, begun_s
    for _ in range(LOOKAHEAD_CELLS):
        choice = _next_cell(trial, rest, need, left)
        if choice is None:
            break
        cell = choice[1]
        rows, noise, seconds = rest.pop(cell)
        first = first or cell
        gain += trial.gain(rows, noise)
        trial.add(rows, noise)
        spent, left = spent + seconds, left - seconds
    return (gain / (spent * need), first) if first else None


def table(plan: Plan) -> str:
    """Return the plan as text: starts, cells with expected time and gain, coefficients before and after."""
    lines = [f"{len(plan.opened)} engine start(s), {len(plan.steps)} cells, about {plan.wall_s / 60:.1f} min"]
    lines[0] += f" and {plan.gpu_s / 60:.1f} GPU minutes"
    for i in plan.opened:
        start = plan.starts[i]
        what = ", ".join(
            f"{k} {v}" for k, v in start.items() if k not in ("run_id", "cells") and v not in (None, False)
        )
        lines.append(f"  {start['run_id']}: {what}")
        lines += [
            f"    {s.cell.label:28s} {s.seconds:6.1f} s   {s.gain_nats:5.2f} nats" for s in plan.steps if s.start == i
        ]
    lines.append("  coefficient: relative uncertainty (one standard deviation) before -> after the runs")
    known = sorted(zip(plan.names, plan.sd_before, plan.sd_after, strict=True), key=lambda k: k[2] / k[1])
    lines += [f"    {name:24s} {a:7.1%} -> {b:7.1%}" for name, a, b in known if b < UNTOLD * a]
    if untold := [name for name, a, b in known if b >= UNTOLD * a]:
        lines.append(f"  not told by these runs: {', '.join(untold)}")
    return "\n".join(lines)
