"""Least squares over simulated cells: run records in, coefficients with intervals out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advisor.errors import DomainError
from advisor.fit.objective import REFERENCE_GPU, predicted, run_cell, targets, values_for
from advisor.fit.parameters import (
    BY_NAME,
    FALLBACKS,
    HOST_POWER_PRIOR_REL,
    HOST_SPEED_PRIOR_REL,
    PARAMETERS,
)
from advisor.fit.records import Cell
from advisor.schema import Coefficient, CoefficientSet, FitReport

Floats = NDArray[np.float64]
LAW_VERSION = 1
STEP = 5e-3
"""Relative step of the finite differences: large enough to average over the scheduler's jumps."""

UNTOLD = 1e-3
"""Jacobian column length below which the data say nothing about a coefficient."""

MAX_WIDTH = 1.0
"""Half-width (natural log) of a coefficient's interval at most, also of one that the data say nothing about."""

Z90 = 1.645


_CELLS: list[Cell] = []
_TRANSFER: Mapping[str, Mapping[str, float]] = {}


def _start_worker(cells: list[Cell], transfer: Mapping[str, Mapping[str, float]]) -> None:
    global _CELLS, _TRANSFER
    _CELLS, _TRANSFER = cells, transfer


def _residuals(job: tuple[Sequence[int], Mapping[str, float]]) -> Floats:
    indices, theta = job
    out = []
    for i in indices:
        cell = _CELLS[i]
        found = predicted(run_cell(cell, values_for(cell, theta, _TRANSFER)))
        out += [math.log(found.get(t.metric, t.value) / t.value) / t.width for t in targets(cell)]
    return np.asarray(out)


@contextmanager
def workers(cells: list[Cell], transfer: Mapping[str, Mapping[str, float]], n: int = 2) -> Iterator[Executor]:
    """Give a pool of processes that hold the cells."""
    with ProcessPoolExecutor(n, initializer=_start_worker, initargs=(cells, transfer)) as pool:
        yield pool


@dataclass(frozen=True)
class Estimate:
    """A fit's result: all values, the fitted names, the Jacobian at the end and the residuals."""

    theta: dict[str, float]
    names: tuple[str, ...]
    jacobian: Floats
    residuals: Floats
    owners: tuple[int, ...] = ()
    """Cell of each residual in order; the residuals after them are the priors'."""

    def without(self, left_out: set[int]) -> dict[str, float]:
        """Return the coefficients of a fit that never saw the cells `left_out`.

        One Gauss-Newton step from the full fit on the remaining rows (robust weights kept), within the bounds; what no
        remaining row tells takes its value of `FALLBACKS`, so that nothing of the left-out cells stays.
        """
        kept = np.array([i not in left_out for i in self.owners] + [True] * (len(self.residuals) - len(self.owners)))
        told = np.array([True] * len(self.names))
        data = self.jacobian[: len(self.owners)][kept[: len(self.owners)]]
        whole = np.abs(self.jacobian[: len(self.owners)]).sum(axis=0)
        told &= np.abs(data).sum(axis=0) > 1e-3 * np.maximum(whole, 1e-12)
        weights = (1.0 + self.residuals**2) ** -0.25
        rows = (self.jacobian * weights[:, None])[kept][:, told]
        aims = -(self.residuals * weights)[kept]
        step = np.linalg.lstsq(rows, aims, rcond=1e-8)[0]
        theta = dict(self.theta)
        for name, move in zip(np.array(self.names)[told], step, strict=True):
            low, high = (BY_NAME[name].low, BY_NAME[name].high) if name in BY_NAME else (0.4, 2.5)
            theta[name] = float(np.clip(theta[name] * math.exp(float(np.clip(move, -1.0, 1.0))), low, high))
        for name in np.array(self.names)[~told]:
            fallback = FALLBACKS.get(name, 1.0)
            theta[name] = theta[fallback] if isinstance(fallback, str) else fallback
        return theta

    def relative_widths(self) -> dict[str, float]:
        """Return the half-width of each coefficient's 90 % interval as a share of it (Jacobian, robust scale)."""
        scale = 1.4826 * float(np.median(np.abs(self.residuals)))
        covariance = np.linalg.pinv(self.jacobian.T @ self.jacobian) * max(scale, 1.0) ** 2
        deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        is_told = np.linalg.norm(self.jacobian, axis=0) > UNTOLD
        widths = np.where(is_told, Z90 * deviations, MAX_WIDTH)
        return dict(zip(self.names, widths.tolist(), strict=True))

    def untold(self) -> list[str]:
        """Return the coefficients that no measured number depends on smoothly."""
        return [n for n, c in zip(self.names, self.jacobian.T, strict=True) if float(np.linalg.norm(c)) <= UNTOLD]

    @property
    def condition_number(self) -> float:
        """Return the condition number of the Jacobian with columns of length one."""
        norms = np.linalg.norm(self.jacobian, axis=0)
        told = self.jacobian[:, norms > UNTOLD]
        return float(np.linalg.cond(told / np.linalg.norm(told, axis=0)))


def fitted_names(cells: Sequence[Cell], reference_host: str) -> list[str]:
    """Return what these cells can determine: coefficients of a format or a parallelism need a cell that has it."""
    dtypes = {c.deployment.weight_dtype for c in cells}
    needs = {
        "fp8": bool(dtypes & {"fp8", "int8"}),
        "int4": any(d.endswith(("int4", "fp4")) for d in dtypes),
        "moe": any(c.model.moe for c in cells),
        "kv_fp8": any(c.deployment.kv_dtype == "fp8" for c in cells),
        "group": any(c.deployment.tp > 1 for c in cells),
        "pp": any(c.deployment.pp > 1 for c in cells),
    }
    of = {
        "gemm_eff_fp8": "fp8", "stream_eff_fp8": "fp8", "fp8_layer_s": "fp8", "gemm_eff_int4": "int4",
        "stream_eff_int4": "int4", "sharpness_int4": "int4", "moe_gemm_factor": "moe", "moe_stream_factor": "moe",
        "kv_fp8_factor": "kv_fp8", "link_eff": "group", "all_reduce_s": "group", "host_tp_factor": "group",
        "send_s": "pp", "core_s": "group",
    }  # fmt: skip
    names = [p.name for p in PARAMETERS if p.is_fitted and needs.get(of.get(p.name, ""), True)]
    hosts = sorted({c.host for c in cells} - {reference_host, ""})
    return names + [f"{kind}@{host}" for host in hosts for kind in ("host", "power")]


def estimate(
    cells: Sequence[Cell],
    *,
    reference_host: str = "",
    transfer: Mapping[str, Mapping[str, float]] | None = None,
    start: Mapping[str, float] | None = None,
    max_steps: int = 12,
    n_workers: int = 2,
    progress: Callable[[int, float], None] | None = None,
) -> Estimate:
    """Return coefficients that make the simulated cells agree with the measured ones.

    Robust (soft L1) least squares on logarithms of ratios within physical bounds; `progress` hears the evaluation and
    its cost. Raises DomainError when the cells cannot determine what is asked of them.
    """
    from scipy.optimize import least_squares

    cells = list(cells)
    names = fitted_names(cells, reference_host)
    n_targets = sum(len(targets(c)) for c in cells)
    if n_targets < 2 * len(names):
        raise DomainError(
            f"{len(cells)} cells give {n_targets} numbers for {len(names)} coefficients; "
            f"measure at least {2 * len(names)} numbers (about {math.ceil(len(names) / 2.5)} cells)"
        )
    base = {p.name: p.start for p in PARAMETERS} | {n: 1.0 for n in names if "@" in n} | dict(start or {})
    bounds = [(BY_NAME[n].low, BY_NAME[n].high) if n in BY_NAME else (0.4, 2.5) for n in names]
    low, high = np.log(np.array(bounds)).T
    x0 = np.clip(np.log([base[n] for n in names]), low + 1e-6, high - 1e-6)
    priors = [(i, math.log(centre), rel) for i, n in enumerate(names) if (centre := _centre(n)) and (rel := _prior(n))]

    def theta_of(x: Floats) -> dict[str, float]:
        return base | {n: float(v) for n, v in zip(names, np.exp(x), strict=True)}

    def with_priors(x: Floats, residuals: Floats) -> Floats:
        return np.append(residuals, [(x[i] - centre) / rel for i, centre, rel in priors])

    indices = range(len(cells))
    halves = [list(indices)[k::n_workers] for k in range(n_workers)]
    order = [i for half in halves for i in half]
    n_calls = 0
    with workers(cells, transfer or {}, n_workers) as pool:

        def residuals(x: Floats) -> Floats:
            nonlocal n_calls
            theta = theta_of(x)
            out = with_priors(x, np.concatenate(list(pool.map(_residuals, [(half, theta) for half in halves]))))
            n_calls += 1
            if progress:
                progress(n_calls, float(0.5 * (out**2).sum()))
            return out

        def jacobian(x: Floats) -> Floats:
            at = residuals(x)
            steps = [STEP if x[j] + STEP < high[j] else -STEP for j in range(len(x))]
            moved = [x + np.eye(len(x))[j] * steps[j] for j in range(len(x))]
            jobs = [(order, theta_of(y)) for y in moved]
            outs = pool.map(_residuals, jobs)
            columns = [(with_priors(y, o) - at) / s for y, o, s in zip(moved, outs, steps, strict=True)]
            return np.array(columns).T

        solution = least_squares(
            residuals, x0, jac=jacobian, bounds=(low, high), loss="soft_l1", max_nfev=max_steps, x_scale=0.1
        )
        final = residuals(solution.x)
        slope = jacobian(solution.x)
    owners = tuple(i for i in order for _ in targets(cells[i]))
    return Estimate(theta_of(solution.x), tuple(names), slope, final, owners)


def _centre(name: str) -> float:
    return BY_NAME[name].start if name in BY_NAME else 1.0


def _prior(name: str) -> float | None:
    if name in BY_NAME:
        return BY_NAME[name].prior_rel
    return HOST_SPEED_PRIOR_REL if name.startswith("host@") else HOST_POWER_PRIOR_REL


def as_coefficients(
    fit: Estimate, cells: Sequence[Cell], transfer: Mapping[str, Mapping[str, float]], error_q90: Mapping[str, float]
) -> CoefficientSet:
    """Return the coefficient set of a fit, with intervals, bounds and the runs that it rests on."""
    widths = fit.relative_widths()
    runs = tuple(sorted({c.run_id for c in cells}))
    coefficients: dict[str, Coefficient] = {}
    for name, value in fit.theta.items():
        parameter = BY_NAME.get(name)
        width = min(widths.get(name, 0.0), MAX_WIDTH)
        bounds = (parameter.low, parameter.high) if parameter else (0.4, 2.5)
        is_fitted = name in fit.names
        coefficients[name] = Coefficient(
            value=value,
            low=value * math.exp(-width),
            high=value * math.exp(width),
            unit=parameter.unit if parameter else "1",
            bounds=bounds,
            meaning=parameter.meaning if parameter else "factor of a host against the reference host",
            source=f"fit over {len(runs)} engine starts" if is_fitted else _fixed_source(name),
            is_at_bound=is_fitted and not bounds[0] * 1.001 < value < bounds[1] * 0.999,
        )
    errors = fit.residuals[: sum(len(targets(c)) for c in cells)]
    report = FitReport(
        run_ids=runs,
        n_cells=len(cells),
        n_coefficients=len(fit.names),
        condition_number=fit.condition_number,
        median_abs_error={"residual_in_widths": float(np.median(np.abs(errors)))},
        notes=tuple(f"{name}: the runs do not determine it beyond its start value" for name in fit.untold()),
    )
    return CoefficientSet(
        name="vllm",
        version=LAW_VERSION,
        engine="vllm",
        engine_versions=tuple(sorted({c.record.engine_version for c in cells})),
        gpu=REFERENCE_GPU,
        coefficients=coefficients,
        transfer={gpu: dict(factors) for gpu, factors in transfer.items()},
        error_q90=dict(error_q90),
        report=report,
    )


_FIXED = {
    "pair_ramp_tokens": "H100 prefill attention of 0.21 of peak at 512 tokens, 0.62 at 16384 (aiconfigurator database)",
    "return_s": "only its sum with submit_s shows in our runs: shared equally",
    "clock_exponent": "dynamic power as clock times voltage squared near the top of the range",
    "all_reduce_switch_bytes": "not reached separately in our runs: one regime",
}


def _fixed_source(name: str) -> str:
    return _FIXED.get(name, "kept at its start value: no run determines it")
