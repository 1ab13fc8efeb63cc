"""Estimate data/fitted/power.json: board power from what the GPUs of our runs did, other cards from public tables.

Activity is exact arithmetic on a cell's requests over its *measured* duration; only the number of engine steps (how
often weights are streamed) comes from replaying the cell. So an error of the step law hardly enters the power law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.errors import DomainError
from advisor.fit.meter import MIN_AVERAGED_DURATION_S, has_power
from advisor.predict.engine_state import Work
from advisor.predict.spend import EXPERT, Activity, activity_of, demand_parts, memory_core_frac, power_parts
from advisor.predict.step import StepCost
from advisor.schema import Gpu, RunRecord

Floats = NDArray[np.float64]

BOUNDS: dict[str, tuple[float, float]] = {
    "bf16_j_per_flop": (0.2e-12, 4e-12),
    "fp8_j_per_flop": (0.1e-12, 3e-12),
    "int4_j_per_flop": (0.1e-12, 4e-12),
    "memory_j_per_byte": (20e-12, 500e-12),
    "memory_exponent": (0.3, 1.0),
    "cache_j_per_byte": (2e-12, 500e-12),
    "cap_sharpness": (2.0, 30.0),
    "awake_frac": (0.005, 0.3),
    "expert_energy_factor": (1.0, 5.0),
}
START = {
    "bf16_j_per_flop": 1e-12,
    "fp8_j_per_flop": 0.6e-12,
    "int4_j_per_flop": 0.8e-12,
    "memory_j_per_byte": 130e-12,
    "memory_exponent": 0.65,
    "cache_j_per_byte": 60e-12,
    "cap_sharpness": 10.0,
    "awake_frac": 0.06,
    "expert_energy_factor": 1.5,
}
MEANING = {
    "bf16_j_per_flop": "energy of a bf16/fp16 operation at the nominal clock",
    "fp8_j_per_flop": "energy of an fp8 operation at the nominal clock",
    "int4_j_per_flop": "energy of a bf16 operation on 4-bit weights at the nominal clock, unpacking included",
    "memory_j_per_byte": "energy of a byte from or to device memory at full bandwidth, caches included",
    "memory_exponent": "exponent of the bandwidth share",
    "cache_j_per_byte": "what a byte of KV cache costs on top of that in decode attention",
    "cap_sharpness": "exponent of the rounded corner at the board limit",
    "awake_frac": "what a card with its clocks up and no kernel draws above idle, as a share of limit less idle",
    "expert_energy_factor": "energy of a routed expert's operation over others': its kernels compute on padding too",
}
FIXED = {"link_j_per_byte": 2 * 8 * 5.5e-12}

PUBLIC_ERROR = 0.05
"""Relative error that a published power is taken to have: other meters, windows and software."""


@dataclass(frozen=True)
class PowerCell:
    """One measured mean board power and what the GPU did meanwhile; `share_idle` of the window had no work."""

    run_id: str
    gpu: Gpu
    kind: str
    activity: Activity
    watts: float
    duration_s: float
    idle_share: float = 0.0
    clock_frac: float = 1.0


@dataclass(frozen=True)
class Replay:
    """What a replayed cell did: work of all its replicas, its duration and tokens, the cost of each stage."""

    stages: Sequence[StepCost]
    work: Work
    duration_s: float
    n_tokens: float


def power_cell(record: RunRecord, gpu: Gpu, replay: Replay) -> PowerCell | None:
    """Return the cell of a record, None where its power reading cannot be used (none, or too short)."""
    measured = record.measured
    power, duration_s = measured.board_power_w, measured.duration_s
    if power is None or duration_s is None or not has_power(record):
        return None
    is_instant = bool(getattr(power, "is_instant", False))
    n_gpus = record.n_gpus
    watts = (measured.energy_j / duration_s if measured.energy_j else power.mean) / n_gpus
    idle_w = (record.idle_power_w or gpu.idle_power_w * n_gpus) / n_gpus
    rate = (measured.input_tokens_per_s or 0.0) + (measured.output_tokens_per_s or 0.0)
    scale = rate * duration_s / replay.n_tokens if rate else 1.0
    work = _scaled(replay.work, scale)
    if (record.load or {}).get("kind") == "poisson":
        # arrivals set the batch and so the steps a second; the drawn arrivals span another time than the measured ones
        longer = duration_s / replay.duration_s
        terms = [seconds * longer for seconds in replay.work.terms]
        reads = replay.work.expert_reads * longer
        work = replace(work, n_steps=replay.work.n_steps * longer, expert_reads=reads, terms=terms)
    clock = getattr(power, "sm_clock_mhz_mean", None) or power.sm_clock_mhz
    top = getattr(record, "host", None)
    top_mhz = float(top["max_sm_clock_mhz"]) if isinstance(top, Mapping) and "max_sm_clock_mhz" in top else 1980.0
    return PowerCell(
        run_id=record.run_id,
        gpu=gpu.model_copy(update={"idle_power_w": idle_w}),
        kind=record.weight_dtype,
        activity=activity_of(replay.stages, work, duration_s, record.weight_dtype, n_replicas=record.dp),
        watts=watts,
        duration_s=duration_s,
        clock_frac=float(clock) / top_mhz if clock and is_instant else 0.0,
    )


def published_cell(row: Mapping[str, Any], gpu: Gpu) -> PowerCell:
    """Return a row of data/golden/power_public.json; it counts like a window of 20 s."""
    activity = Activity(dict(row["flops_per_s"]), row["bytes_per_s"], row["cache_bytes_per_s"], row["link_bytes_per_s"])
    name = str(row["source"]).split()[0]
    return PowerCell(name, gpu, name, activity, float(row["watts"]), 20.0, float(row["idle_share"]))


def _scaled(work: Work, factor: float) -> Work:
    return Work(
        n_steps=work.n_steps * factor,
        prefill_steps=work.prefill_steps * factor,
        tokens=work.tokens * factor,
        pairs=work.pairs * factor,
        context_tokens=work.context_tokens * factor,
        sampled=work.sampled * factor,
        busy_s=work.busy_s * factor,
        expert_reads=work.expert_reads * factor,
        terms=[seconds * factor for seconds in work.terms],
    )


def mean_work(works: Sequence[Work]) -> Work:
    """Return the mean of several replays of one cell."""
    return Work(
        n_steps=_mean(w.n_steps for w in works),
        prefill_steps=_mean(w.prefill_steps for w in works),
        tokens=_mean(w.tokens for w in works),
        pairs=_mean(w.pairs for w in works),
        context_tokens=_mean(w.context_tokens for w in works),
        sampled=_mean(w.sampled for w in works),
        busy_s=_mean(w.busy_s for w in works),
        expert_reads=_mean(w.expert_reads for w in works),
        terms=[_mean(seconds) for seconds in zip(*(w.terms for w in works), strict=True)],
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


@dataclass(frozen=True)
class _Group:
    """Cells of one engine start as arrays."""

    run_id: str
    gpu: Gpu
    activity: Activity
    watts: Floats
    idle_share: Floats
    sigma: Floats


def _groups(cells: Sequence[PowerCell], *, is_public: bool = False) -> list[_Group]:
    out = []
    for run_id, gpu_name in sorted({(c.run_id, c.gpu.name) for c in cells}):
        mine = [c for c in cells if c.run_id == run_id and c.gpu.name == gpu_name]
        kinds = sorted({kind for c in mine for kind in c.activity.flops_per_s})

        def column(pick: Callable[[PowerCell], float], rows: Sequence[PowerCell] = mine) -> Floats:
            return np.array([float(pick(c)) for c in rows])

        activity = Activity(
            {kind: np.array([float(c.activity.flops_per_s.get(kind, 0.0)) for c in mine]) for kind in kinds},
            column(lambda c: c.activity.bytes_per_s),
            column(lambda c: c.activity.cache_bytes_per_s),
            column(lambda c: c.activity.link_bytes_per_s),
            column(lambda c: c.activity.busy_frac),
        )
        # the meter starts and stops within a sample of the cell: an edge error that a longer window averages out
        sigma = column(lambda c: PUBLIC_ERROR if is_public else 0.02 + 0.03 / math.sqrt(c.duration_s))
        out.append(
            _Group(run_id, mine[0].gpu, activity, column(lambda c: c.watts), column(lambda c: c.idle_share), sigma)
        )
    return out


def _log_errors(group: _Group, values: Mapping[str, float]) -> Floats:
    total = np.asarray(power_parts(group.activity, group.gpu, values)["total"])
    mean = total * (1.0 - group.idle_share) + group.gpu.idle_power_w * group.idle_share
    return np.asarray(np.log(mean / group.watts), dtype=np.float64)


def relative_errors(cells: Sequence[PowerCell], values: Mapping[str, float]) -> Floats:
    """Return predicted over measured power, less 1, of published cells."""
    groups = _groups(cells, is_public=True)
    return np.expm1(np.concatenate([_log_errors(g, values) for g in groups])) if groups else np.array([])


def _solve(
    groups: Sequence[_Group], names: Sequence[str], start: Mapping[str, float], held: Mapping[str, float]
) -> tuple[dict[str, float], Any]:
    """Least squares in the logarithms of the coefficients, with a loss that bears outliers."""
    low = np.log([BOUNDS[base_name(n)][0] for n in names])
    high = np.log([BOUNDS[base_name(n)][1] for n in names])

    def values_at(x: Floats) -> dict[str, float]:
        return {**held, **{name: float(math.exp(v)) for name, v in zip(names, x, strict=True)}}

    def residuals(x: Floats) -> Floats:
        values = values_at(x)
        return np.concatenate([_log_errors(g, values) / g.sigma for g in groups])

    first = np.clip(np.log([start[n] for n in names]), low + 1e-6, high - 1e-6)
    solution = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", x_scale=0.1)
    return values_at(solution.x), solution


def base_name(name: str) -> str:
    """Return the name of a coefficient without the card or architecture that it is for."""
    return name.split("__")[0]


def _deviations(solution: Any, n: int) -> tuple[Floats, float]:
    """Relative standard deviation of each coefficient, and the condition number of the scaled Jacobian."""
    jacobian = solution.jac
    spread = 2.0 * solution.cost / max(1, n - jacobian.shape[1])
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * max(1.0, spread)
    return np.sqrt(np.diag(covariance)), float(np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0)))


def names_for(cells: Sequence[PowerCell]) -> tuple[list[str], dict[str, float]]:
    """Return the coefficients that these cells determine, and start values; one memory share more a further card."""
    keys = {key for c in cells for key, rate in c.activity.flops_per_s.items() if np.any(rate) and key != "attention"}
    kinds = {key.removeprefix(EXPERT) for key in keys}
    names = [f"{kind}_j_per_flop" for kind in ("bf16", "fp8", "int4") if kind in kinds]
    names += ["memory_j_per_byte", "memory_exponent", "cache_j_per_byte", "cap_sharpness", "awake_frac"]
    names += ["expert_energy_factor"] * any(key.startswith(EXPERT) for key in keys)
    start = dict(START)
    cards = sorted({c.gpu.name for c in cells})
    for card in cards[1:]:
        names.append(f"memory_j_per_byte__{card}")
        start[f"memory_j_per_byte__{card}"] = START["memory_j_per_byte"]
    return names, start


@dataclass(frozen=True)
class PowerFit:
    """Fitted values, their relative deviations, and relative errors of each engine start when it is left out."""

    values: dict[str, float]
    deviations: dict[str, float]
    left_out: dict[str, Floats]
    condition_number: float
    n_cells: int

    def error_frac(self) -> float:
        """Return the half-width that covers 90 % of the cells of left-out starts."""
        return float(np.quantile(np.abs(np.concatenate(list(self.left_out.values()))), 0.9))

    def median_error(self) -> float:
        """Return the median error of the cells of left-out starts."""
        return float(np.median(np.abs(np.concatenate(list(self.left_out.values())))))


def fit_power(cells: Sequence[PowerCell], public: Sequence[PowerCell] = ()) -> PowerFit:
    """Fit the power law to cells of our engine starts and, for long contexts, published ones of the same cards.

    `public` cells take part in every fit and are never scored. A start whose arithmetic no other start has (the only
    int4 one) has no left-out error: nothing would determine its coefficient.
    Raises DomainError when the cells do not determine the coefficients.
    """
    names, start = names_for(cells)
    if len(cells) < 3 * len(names) or len({c.run_id for c in cells}) < 3:
        raise DomainError(
            f"{len(cells)} cells of {len({c.run_id for c in cells})} engine starts do not determine {len(names)} power "
            f"coefficients: at least {3 * len(names)} cells of 3 starts, each longer than {MIN_AVERAGED_DURATION_S} s"
        )
    own, extra = _groups(cells), _groups(public, is_public=True)
    values, solution = _solve([*own, *extra], names, start, FIXED)
    relative, condition = _deviations(solution, len(solution.fun))
    left_out: dict[str, Floats] = {}
    for group in own:
        rest = [c for c in cells if c.run_id != group.run_id]
        if set(names_for(rest)[0]) != set(names):
            continue
        without, _ = _solve([g for g in own if g is not group] + extra, names, values, FIXED)
        left_out[group.run_id] = np.expm1(_log_errors(group, without))
    return PowerFit(values, dict(zip(names, relative, strict=True)), left_out, condition, len(cells))


def fit_family(cells: Sequence[PowerCell], base: Mapping[str, float], family: str, names: Sequence[str]) -> PowerFit:
    """Fit some coefficients of an architecture to published cells; the others stay as `base` has them.

    A name with a card (`memory_j_per_byte__a100-sxm-40gb`) is that card's own.
    The error is of one half of the rows under a fit to the other half.
    """
    keys = [name if "__" in name else f"{name}__{family}" for name in names]
    start = {key: base[base_name(key)] for key in keys}
    values, solution = _solve(_groups(cells, is_public=True), keys, start, base)
    relative, condition = _deviations(solution, len(cells))
    left_out = {}
    for half in (0, 1):
        fitted, _ = _solve(_groups(cells[half::2], is_public=True), keys, values, base)
        groups = _groups(cells[1 - half :: 2], is_public=True)
        left_out[f"{family}-{half}"] = np.expm1(np.concatenate([_log_errors(g, fitted) for g in groups]))
    mine = {key: values[key] for key in keys}
    return PowerFit(mine, dict(zip(keys, relative, strict=True)), left_out, condition, len(cells))


def clock_exponent(cells: Sequence[PowerCell], values: Mapping[str, float]) -> tuple[float, float]:
    """Return n of ``P ~ f^n`` and its standard deviation, from cells whose mean clock was sampled.

    At a clock phi what the cores' supply feeds costs ``phi^(n-1)`` of its energy at the nominal clock; the fit takes
    the measured clock instead of the cap, and holds what the DRAM draws.
    """
    sampled = [c for c in cells if 0.3 < c.clock_frac <= 1.0]
    if len(sampled) < 20:
        raise DomainError(f"{len(sampled)} cells with sampled clocks are too few for the clock exponent; 20 are needed")
    parts = []
    for cell in sampled:
        found = demand_parts(cell.activity, cell.gpu, values)
        core = memory_core_frac(values, cell.gpu)
        memory = float(found["memory"]) + float(found["link"])
        rest = cell.gpu.idle_power_w + float(found["awake"]) + memory * (1.0 - core)
        parts.append((float(found["compute"]) + memory * core, rest, cell.watts, cell.clock_frac))
    core_w, rest_w, watts, phi = np.array(parts).T

    def residuals(x: Floats) -> Floats:
        return np.asarray(np.log((core_w * math.exp(x[1]) * phi ** x[0] + rest_w) / watts) / 0.03, dtype=np.float64)

    solution = least_squares(residuals, [0.8, 0.0], loss="soft_l1")
    relative, _ = _deviations(solution, len(sampled))
    return 1.0 + float(solution.x[0]), float(relative[0])
