"""A quick refit: the shipped coefficients, moved as far as a few new cells of one host demand.

A full fit replays every record that there is (`run.fit_all`, minutes). This one replays only the new cells and lets the
shipped fit stand for the old ones: each coefficient is pulled towards its value there, with the width of its interval
there. It leaves out how the old cells tie coefficients to each other, so it is an approximation of the full fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError, printable
from advisor.fit.estimate import Z90, Estimate, fitted_names
from advisor.fit.objective import cell_residuals, on_node, targets
from advisor.fit.parameters import BY_NAME, HOST_POWER_PRIOR_REL, HOST_SPEED_PRIOR_REL, bounds_of
from advisor.fit.records import Cell, cells_of
from advisor.fit.validate import Row, validate
from advisor.predict.transfer import HOST_TIMES, SCALED_BY, transfer_rel, transferred
from advisor.schema import CoefficientSet, FitReport, Gpu, RunRecord

Floats = NDArray[np.float64]
Scope = Literal["host", "all"]
HOST, SPEED, POWER = "new", "host@new", "power@new"
"""The host of the new cells, its speed factor (CPU times) and its energy factor (joules an operation)."""
OF_CARD = frozenset(name for names in SCALED_BY.values() for name in names) - frozenset(HOST_TIMES)
"""Coefficients that a card has of its own, its hosts' left out: they have a factor."""
STEP = 5e-3
FIT_SHARE = 0.75
"""Share of the time that the fit takes, for the progress; the rest judges it."""
LOWEST_WIDTH = 2e-3
"""Narrowest prior, as a share: below it a law is not true."""
MAX_STEPS: dict[Scope, int] = {"host": 8, "all": 3}
"""Steps of the fit at most. All coefficients start where the two factors alone ended, so few are needed."""
Values = Callable[[Cell, Mapping[str, float]], Mapping[str, float]]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Change:
    """One coefficient before and after: values and 90 % intervals."""

    name: str
    unit: str
    meaning: str
    before: float
    before_low: float
    before_high: float
    after: float
    after_low: float
    after_high: float


@dataclass(frozen=True)
class Refit:
    """A quick refit with what it changed and how it does on cells that it did not see."""

    coefficients: CoefficientSet
    changes: tuple[Change, ...]
    before: list[Row]
    after: list[Row]
    left_out: list[Row]
    groups: int
    """Parts of the new cells that were left out one after the other: engine starts, or two halves of a single one."""
    n_cells: int


def solve(
    cells: Sequence[Cell],
    start: Mapping[str, float],
    priors: Mapping[str, tuple[float, float]],
    values: Values,
    *,
    max_steps: int,
    progress: Callable[[int], None] | None = None,
) -> Estimate:
    """Return the coefficients named in `priors` fitted to some cells, the others as in `start`.

    priors : name to (centre, relative width) that pulls it there
    values : coefficient values that replay a cell, from all coefficients

    Robust (soft L1) least squares on logarithms within bounds; `progress` hears how many evaluations are done.
    """
    from scipy.optimize import least_squares

    names = tuple(priors)
    bounds = np.log([bounds_of(n) for n in names]).T
    centres = np.log([centre for centre, _ in priors.values()])
    widths = np.array([max(rel, LOWEST_WIDTH) for _, rel in priors.values()])
    x0 = np.clip(np.log([start[n] for n in names]), bounds[0] + 1e-6, bounds[1] - 1e-6)
    n_calls = 0

    def theta_of(x: Floats) -> dict[str, float]:
        return dict(start) | {n: float(v) for n, v in zip(names, np.exp(x), strict=True)}

    def residuals(x: Floats) -> Floats:
        nonlocal n_calls
        theta = theta_of(x)
        out = [r for cell in cells for r in cell_residuals(cell, values(cell, theta))]
        n_calls += 1
        if progress:
            progress(n_calls)
        return np.append(out, (x - centres) / widths)

    def jacobian(x: Floats) -> Floats:
        at = residuals(x)
        columns = []
        for j in range(len(names)):
            step = STEP if x[j] + STEP < bounds[1][j] else -STEP
            columns.append((residuals(x + step * np.eye(len(names))[j]) - at) / step)
        return np.array(columns).T

    found = least_squares(
        residuals, x0, jac=jacobian, bounds=(bounds[0], bounds[1]), loss="soft_l1", max_nfev=max_steps, x_scale=0.1
    )
    owners = tuple(i for i, cell in enumerate(cells) for _ in targets(cell))
    return Estimate(theta_of(found.x), names, found.jac, found.fun, owners)


def refit(
    records: Sequence[RunRecord], catalog: Catalog, scope: Scope = "host", progress: Progress | None = None
) -> Refit:
    """Return the shipped coefficients adapted to run records of one host and one GPU type.

    scope    : 'host' fits two factors, how fast the host's CPU is and what its cards' arithmetic draws; 'all' every
               coefficient that the cells can tell of, too
    progress : hears the share done and what is being done

    Raises DomainError for records without vLLM cells, of several GPU types, or with too few numbers.
    """
    say = progress or (lambda share, text: None)
    shipped = catalog.coefficients("vllm")
    cells = cells_of(records, catalog, HOST)
    if not cells:
        raise DomainError("none of the records is a vLLM cell with load and lengths; nothing to fit")
    gpus = {c.gpu.name: c.gpu for c in cells}
    if len(gpus) > 1:
        raise DomainError(f"a quick refit takes records of one GPU type, got {', '.join(sorted(gpus))}")
    gpu = next(iter(gpus.values()))
    priors = _priors(cells, shipped, gpu, scope)
    n_numbers = sum(len(targets(c)) for c in cells)
    if n_numbers < 4:
        raise DomainError(f"{len(cells)} cells give {n_numbers} numbers; a quick refit needs at least 4")
    start = {name: c.value for name, c in shipped.coefficients.items()} | {SPEED: 1.0, POWER: 1.0}
    # two factors first: what one host does differently must not be put on the card's coefficients
    stages = [_priors(cells, shipped, gpu, "host"), *([priors] if scope == "all" else [])]
    n_calls = sum((len(p) + 2) * MAX_STEPS["host" if len(p) == 2 else "all"] for p in stages)
    done = 0

    def values(cell: Cell, theta: Mapping[str, float]) -> Mapping[str, float]:
        return _values(cell.gpu, theta, shipped)

    def evaluated(n: int) -> None:
        say(min(1.0, (done + n) / n_calls) * FIT_SHARE, "replaying your cells")

    for stage in stages:
        most = MAX_STEPS["host" if len(stage) == 2 else "all"]
        found = solve(cells, start, stage, values, max_steps=most, progress=evaluated)
        start, done = found.theta, done + (len(stage) + 2) * most
    say(FIT_SHARE, "predicting your cells before and after")
    adapted = as_set(found, found.theta, shipped, records)
    serving = [r for r in records if r.engine == "vllm" and r.load is not None and r.lengths is not None]
    before, after = validate(serving, catalog, shipped), validate(serving, catalog, adapted)
    left_out: list[Row] = []
    groups = _groups(cells)
    for number, group in enumerate(groups, 1):
        say(FIT_SHARE + (1 - FIT_SHARE) * number / (len(groups) + 1), "predicting cells that the refit did not see")
        one = as_set(found, without(found, group), shipped, records)
        left_out += validate([cells[i].record for i in sorted(group)], catalog, one)
    say(1.0, "done")
    return Refit(
        adapted,
        tuple(_changes(found, shipped, gpu, priors)),
        before,
        after,
        left_out,
        len(groups),
        len(cells),
    )


def refit_shipped(records: Sequence[RunRecord], scope: Scope, progress: Progress) -> Refit:
    """Return a quick refit of the catalogue's own coefficients; what a process of the app's long jobs runs."""
    return refit(records, load_catalog(), scope, progress)


def without(fit: Estimate, left_out: set[int]) -> dict[str, float]:
    """Return the coefficients of a quick refit that did not see the cells `left_out`: one Gauss-Newton step from it.

    The priors stay, so that what no other cell tells goes back towards the shipped value.
    """
    return fit.moved(fit.kept(left_out), np.ones(len(fit.names), dtype=bool), rcond=1e-10)


def as_set(
    fit: Estimate, theta: Mapping[str, float], shipped: CoefficientSet, records: Sequence[RunRecord]
) -> CoefficientSet:
    """Return the shipped coefficient set moved to `theta`, the new host's two factors folded in.

    Factors of other cards and the widths of predictions stay as shipped.
    """
    widths = fit.relative_widths()
    coefficients = {}
    for name, c in shipped.coefficients.items():
        if "@" in name:
            continue  # factors of the hosts of our runs
        factor = theta[name] / c.value if name in fit.names else 1.0
        factor *= theta[SPEED] if name in HOST_TIMES else theta[POWER] if name == "joules_per_flop" else 1.0
        width = min(widths[name], 1.0) if name in widths else None
        value = c.value * factor
        coefficients[name] = c.model_copy(
            update={
                "value": value,
                "low": value * math.exp(-width) if width is not None else c.low * factor,
                "high": value * math.exp(width) if width is not None else c.high * factor,
                "source": c.source if factor == 1.0 else f"quick refit; before: {c.source}",
            }
        )
    old = shipped.report
    n_cells = len(set(fit.owners))
    note = f"quick refit on {n_cells} cells: {len(fit.names)} coefficients, the shipped fit as prior"
    report = FitReport(
        run_ids=tuple(sorted({*(r.run_id for r in records), *(old.run_ids if old else ())})),
        n_cells=n_cells + (old.n_cells if old else 0),
        n_coefficients=len(fit.names),
        condition_number=fit.condition_number,
        notes=(note, *(old.notes if old else ())),
    )
    return shipped.model_copy(update={"coefficients": coefficients, "report": report})


def _values(gpu: Gpu, theta: Mapping[str, float], shipped: CoefficientSet) -> dict[str, float]:
    """Return the values that replay a cell on `gpu`: as transferred, moved as the fit moved them, times the host's."""
    base = transferred(shipped, gpu)
    values = {name: base[name] * theta[name] / shipped.coefficients[name].value for name in BY_NAME}
    values |= {name: min(values[name], 1.0) for name in OF_CARD if "_eff" in name}
    return on_node(values, theta[SPEED], theta[POWER])


def _priors(cells: Sequence[Cell], shipped: CoefficientSet, gpu: Gpu, scope: Scope) -> dict[str, tuple[float, float]]:
    """Return centre and relative width of each coefficient to fit; a card that was not measured has wider ones."""
    found = {SPEED: (1.0, HOST_SPEED_PRIOR_REL), POWER: (1.0, HOST_POWER_PRIOR_REL)}
    if scope == "host":
        return found
    card = transfer_rel(shipped, gpu) / Z90
    for name in fitted_names(cells):
        c = shipped.coefficients.get(name)
        if c is None or name not in BY_NAME or c.value <= 0 or c.low <= 0:
            continue
        width = math.log(c.high / c.low) / 2 / Z90
        found[name] = (c.value, math.hypot(width, card) if name in OF_CARD else width)
    return found


def _groups(cells: Sequence[Cell]) -> list[set[int]]:
    """Return the parts of the cells to leave out in turn: engine starts, or the two halves of a single one."""
    runs = sorted({c.run_id for c in cells})
    if len(runs) > 1:
        return [{i for i, c in enumerate(cells) if c.run_id == run} for run in runs]
    return [set(range(k, len(cells), 2)) for k in range(2)] if len(cells) > 1 else []


def _changes(
    fit: Estimate, shipped: CoefficientSet, gpu: Gpu, priors: Mapping[str, tuple[float, float]]
) -> list[Change]:
    widths, base = fit.relative_widths(), transferred(shipped, gpu)
    titles = {
        SPEED: "time of your host's CPU over the typical one",
        POWER: "energy an operation of your cards over the typical ones",
    }
    found = []
    for name, (centre, rel) in priors.items():
        c = shipped.coefficients.get(name)
        at = base[name] if c is not None else centre
        after = at * fit.theta[name] / centre
        width, before = min(widths[name], 1.0), Z90 * rel
        found.append(
            Change(
                name=printable(name.removesuffix("@new")),
                unit=c.unit if c is not None else "1",
                meaning=titles.get(name, c.meaning if c is not None else ""),
                before=at,
                before_low=at * math.exp(-before),
                before_high=at * math.exp(before),
                after=after,
                after_low=after * math.exp(-width),
                after_high=after * math.exp(width),
            )
        )
    return found
