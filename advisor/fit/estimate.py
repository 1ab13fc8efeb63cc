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
from advisor.fit.kernels import KernelStep
from advisor.fit.minimise import minimise
from advisor.fit.objective import REFERENCE_GPU, cell_residuals, is_http, targets, values_for
from advisor.fit.parameters import (
    BY_NAME,
    FALLBACKS,
    HOST_POWER_PRIOR_REL,
    HOST_SPEED_PRIOR_REL,
    PARAMETERS,
    bounds_of,
)
from advisor.fit.records import Cell
from advisor.predict.shapes import shapes_of
from advisor.predict.transfer import HOST_TIMES
from advisor.schema import Coefficient, CoefficientSet, FitReport

Floats = NDArray[np.float64]
LAW_VERSION = 1
STEP = 2e-2
"""Relative step of the finite differences: large enough to average over the scheduler's jumps."""

UNTOLD = 1e-3
"""Jacobian column length below which the data say nothing about a coefficient."""

MOST_ELASTIC = 3.0
"""Largest relative change of a metric over that of a coefficient that is taken for a slope. Requests that change groups
make leaps of 10 and more, which would hide every other number's slope in the steps of the fit."""

MAX_WIDTH = 1.0
"""Half-width (natural log) of a coefficient's interval at most, also of one that the data say nothing about."""

Z90 = 1.645


_CELLS: list[Cell | KernelStep] = []
_TRANSFER: Mapping[str, Mapping[str, float]] = {}


def _start_worker(cells: list[Cell | KernelStep], transfer: Mapping[str, Mapping[str, float]]) -> None:
    global _CELLS, _TRANSFER
    _CELLS, _TRANSFER = cells, transfer


def _residuals(job: tuple[Sequence[int], Mapping[str, float]]) -> Floats:
    indices, theta = job
    return np.asarray([r for i in indices for r in _residuals_of(_CELLS[i], theta)])


def _residuals_of(item: Cell | KernelStep, theta: Mapping[str, float]) -> list[float]:
    if isinstance(item, KernelStep):
        return item.residuals(values_for(item.cell, theta, _TRANSFER))
    return cell_residuals(item, values_for(item, theta, _TRANSFER))


def _cell(item: Cell | KernelStep) -> Cell:
    return item.cell if isinstance(item, KernelStep) else item


def _widths(item: Cell | KernelStep) -> list[float]:
    return item.widths if isinstance(item, KernelStep) else [target.width for target in targets(item)]


@contextmanager
def workers(
    cells: list[Cell | KernelStep], transfer: Mapping[str, Mapping[str, float]], n: int = 2
) -> Iterator[Executor]:
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
        kept = self.kept(left_out)
        told = np.array([True] * len(self.names))
        data = self.jacobian[: len(self.owners)][kept[: len(self.owners)]]
        whole = np.abs(self.jacobian[: len(self.owners)]).sum(axis=0)
        told &= np.abs(data).sum(axis=0) > 1e-3 * np.maximum(whole, 1e-12)
        theta = self.moved(kept, told, rcond=1e-8)
        for name in np.array(self.names)[~told]:
            fallback = FALLBACKS.get(name, 1.0)
            theta[name] = theta[fallback] if isinstance(fallback, str) else fallback
        return of_typical_host(theta)

    def moved(self, kept: NDArray[np.bool_], told: NDArray[np.bool_], rcond: float) -> dict[str, float]:
        """Return the coefficients after one Gauss-Newton step on some residuals, within the bounds.

        kept : residuals that count, robust weights as in the fit; told : coefficients that move
        """
        weights = (1.0 + self.residuals**2) ** -0.25
        rows = (self.jacobian * weights[:, None])[kept][:, told]
        step = np.linalg.lstsq(rows, -(self.residuals * weights)[kept], rcond=rcond)[0]
        theta = dict(self.theta)
        for name, move in zip(np.array(self.names)[told].tolist(), np.clip(step, -1.0, 1.0), strict=True):
            theta[name] = float(np.clip(theta[name] * math.exp(float(move)), *bounds_of(name)))
        return theta

    def kept(self, left_out: set[int]) -> NDArray[np.bool_]:
        """Return which residuals stay without some cells: those of the others, and the priors'."""
        return np.array([i not in left_out for i in self.owners] + [True] * (len(self.residuals) - len(self.owners)))

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


KINDS: dict[str, Callable[[Cell], bool]] = {
    "fp8": lambda c: c.deployment.weight_dtype in ("fp8", "int8"),
    "int4": lambda c: c.deployment.weight_dtype.endswith(("int4", "fp4")),
    "moe": lambda c: c.model.moe is not None,
    "kv_fp8": lambda c: c.deployment.kv_dtype == "fp8",
    "group": lambda c: c.deployment.tp > 1,
    "pp": lambda c: c.deployment.pp > 1,
    "prefix": lambda c: c.workload.prefix.shared_prefix_tokens > 0,
    "http": is_http,
    "eager": lambda c: c.deployment.enforce_eager,
    "mla": lambda c: c.model.mla is not None,
    "norms": lambda c: shapes_of(c.model).n_further_norms > 0,
    "shared": lambda c: shapes_of(c.model).has_shared_experts,
    "mxfp4": lambda c: c.deployment.weight_dtype == "mxfp4",
    "tables": lambda c: shapes_of(c.model).kv_groups.n_tables > 1,
}
OF_KIND = {
    "gemm_eff_fp8": "fp8", "stream_eff_fp8": "fp8", "fp8_input_s": "fp8", "wave_frac": "fp8", "gemm_eff_int4": "int4",
    "int4_layer_s": "int4", "int4_sm_bytes_per_s": "int4", "sharpness_int4": "int4", "moe_gemm_factor": "moe",
    "moe_stream_factor": "moe", "moe_layer_s": "moe", "host_moe_layer_s": "moe", "decode_fp8_eff": "kv_fp8",
    "norm_s": "norms",
    "link_eff": "group", "all_reduce_s": "group", "all_reduce_large_s": "group", "host_tp_factor": "group",
    "send_s": "pp",
    "shared_kv_frac": "prefix", "http_s": "http", "http_token_s": "http",
    "http_out_s": "http", "host_eager_layer_s": "eager",
    "mla_layer_s": "mla", "host_mla_layer_s": "mla", "host_shared_layer_s": "shared",
    "host_mxfp4_layer_s": "mxfp4", "host_table_s": "tables",
}  # fmt: skip
"""Coefficients that only some cells depend on."""


def of_typical_host(theta: Mapping[str, float]) -> dict[str, float]:
    """Return the same law with the hosts' factors around 1: what they have in common belongs to the coefficients.

    A host under a name with a '+' is a known one in other circumstances, and says nothing of what is typical.
    """
    out = dict(theta)
    for kind, scaled in (("host@", HOST_TIMES), ("power@", ("joules_per_flop",))):
        factors = [name for name in theta if name.startswith(kind)]
        if factors:
            logs = [math.log(theta[name]) for name in factors if "+" not in name]
            mean = math.exp(sum(logs) / max(len(logs), 1))
            out |= {name: theta[name] / mean for name in factors}
            out |= {name: theta[name] * mean for name in scaled}
    return out


def depends(name: str, cell: Cell) -> bool:
    """Return whether a cell's replay can depend on a coefficient or a host's factor."""
    if "@" in name:
        return cell.host == name.partition("@")[2]
    return name not in OF_KIND or KINDS[OF_KIND[name]](cell)


def tellers(name: str, cells: Sequence[Cell]) -> list[int]:
    """Return the cells that a coefficient is fitted to, by their numbers.

    What an engine does is told by engines in their client's process, where there are any: through a server, which
    requests come together is chance, and a small change of any coefficient regroups them.
    """
    mine = [i for i, cell in enumerate(cells) if depends(name, cell)]
    if "@" in name or OF_KIND.get(name) == "http":
        return mine
    return [i for i in mine if not is_http(cells[i])] or mine


def fitted_names(cells: Sequence[Cell]) -> list[str]:
    """Return what these cells can determine: coefficients of a format or a parallelism need a cell that has it."""
    names = [p.name for p in PARAMETERS if p.is_fitted and any(depends(p.name, c) for c in cells)]
    hosts = sorted({c.host for c in cells} - {""})
    return names + [f"{kind}@{host}" for host in hosts for kind in ("host", "power")]


def estimate(
    cells: Sequence[Cell],
    *,
    kernels: Sequence[KernelStep] = (),
    transfer: Mapping[str, Mapping[str, float]] | None = None,
    start: Mapping[str, float] | None = None,
    max_steps: int = 12,
    n_workers: int = 2,
    progress: Callable[[int, float], None] | None = None,
) -> Estimate:
    """Return coefficients that make the simulated cells agree with the measured ones.

    Robust (soft L1) least squares on logarithms of ratios within physical bounds; `progress` hears each step and its
    cost. `kernels` are recorded steps, each a residual a figure, after those of the cells. Raises DomainError when the
    cells cannot determine what is asked of them.
    """
    cells = list(cells)
    names = fitted_names(cells)
    n_targets = sum(len(targets(c)) for c in cells)
    if n_targets < 2 * len(names):
        raise DomainError(
            f"{len(cells)} cells give {n_targets} numbers for {len(names)} coefficients; "
            f"measure at least {2 * len(names)} numbers (about {math.ceil(len(names) / 2.5)} cells)"
        )
    base = {p.name: p.start for p in PARAMETERS} | {n: 1.0 for n in names if "@" in n}
    # what is not fitted keeps its source's value, whatever an earlier fit scaled it to
    base |= {n: v for n, v in (start or {}).items() if n in names}
    low, high = np.log([bounds_of(n) for n in names]).T
    x0 = np.clip(np.log([base[n] for n in names]), low + 1e-6, high - 1e-6)
    priors = [(i, math.log(centre), rel) for i, n in enumerate(names) if (centre := _centre(n)) and (rel := _prior(n))]

    items: list[Cell | KernelStep] = [*cells, *kernels]
    owners_of = [_cell(item) for item in items]
    mine = {n: tellers(n, owners_of) for n in names}

    def theta_of(x: Floats) -> dict[str, float]:
        return base | {n: float(v) for n, v in zip(names, np.exp(x), strict=True)}

    def with_priors(x: Floats, residuals: Floats) -> Floats:
        return np.append(residuals, [(x[i] - centre) / rel for i, centre, rel in priors])

    order = list(range(len(items)))
    widths = [_widths(item) for item in items]
    counts = [len(found) for found in widths]
    steepest = MOST_ELASTIC / np.concatenate(widths)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    rows_of = {n: np.concatenate([np.arange(first[i], first[i + 1]) for i in chosen]) for n, chosen in mine.items()}
    with workers(items, transfer or {}, n_workers) as pool:

        def residuals(points: Sequence[Floats]) -> list[Floats]:
            shares = [order[k::n_workers] for k in range(n_workers)]
            jobs = [(share, theta_of(x)) for x in points for share in shares]
            parts = list(pool.map(_residuals, jobs))
            outs = []
            for number, x in enumerate(points):
                out = np.empty(first[-1])
                for share, part in zip(shares, parts[number * n_workers :], strict=False):
                    out[np.concatenate([np.arange(first[i], first[i + 1]) for i in share])] = part
                outs.append(with_priors(x, out))
            return outs

        def jacobian(x: Floats, at: Floats) -> Floats:
            steps = [STEP if x[j] + STEP < high[j] else -STEP for j in range(len(x))]
            moved = [x + np.eye(len(x))[j] * steps[j] for j in range(len(x))]
            outs = pool.map(_residuals, [(mine[n], theta_of(y)) for n, y in zip(names, moved, strict=True)])
            columns = []
            for n, y, s, out in zip(names, moved, steps, outs, strict=True):
                whole = at[: first[-1]].copy()
                whole[rows_of[n]] = out
                slope = (with_priors(y, whole) - at) / s
                columns.append(np.append(np.clip(slope[: first[-1]], -steepest, steepest), slope[first[-1] :]))
            return np.array(columns).T

        x, final = minimise(residuals, jacobian, x0, low, high, max_steps=max_steps, progress=progress)
        slope = jacobian(x, final)
    owners = tuple(i for i in order for _ in range(counts[i]))
    return Estimate(of_typical_host(theta_of(x)), tuple(names), slope, final, owners)


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
        bounds = bounds_of(name)
        is_fitted = name in fit.names
        coefficients[name] = Coefficient(
            value=value,
            low=value * math.exp(-width),
            high=value * math.exp(width),
            unit=parameter.unit if parameter else "1",
            bounds=bounds,
            meaning=parameter.meaning if parameter else "factor of a host against the typical one",
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


_BURSTS = "requests of the first bursts of closed loops (data/runs/rows)"
_LAUNCHES = "timed launches of h200 1b-launches, 8b-launches and 8b-launches-b"
_FIXED = {
    "serial_s": _BURSTS,
    "serial_token_s": _BURSTS,
    "intake_s": "second steps of bursts of 256 prompts of 128 tokens (data/runs/rows)",
    "slow_launch_factor": _LAUNCHES,
    "slow_launch_frac": _LAUNCHES,
    "slow_launch_s": _LAUNCHES,
    "return_s": "only its sum with submit_s shows in our runs: shared equally",
    "clock_exponent": "dynamic power as clock times voltage squared near the top of the range",
    "all_reduce_switch_bytes": "vLLM's own kernel takes messages below 8 MiB; kernels recorded at 8 MiB are NCCL's",
}


def _fixed_source(name: str) -> str:
    return _FIXED.get(name, "kept at its start value: no run determines it")
