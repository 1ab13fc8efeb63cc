"""What a deployment draws: activity of its GPUs, board power with its parts, power limits.

The caller that has a simulation (or the closed form) does three things::

    activity = activity_of(stages, work, duration_s, deployment.weight_dtype, n_replicas=dp)
    interval, breakdown = board_power(activity, gpu, catalog.coefficients("power"), n_gpus)
    watts = power_parts(activity, gpu, catalog.coefficients("power"))["total"]      # arrays in, arrays out

`coefficients` is the set of data/fitted/power.json. A name is looked up for the card, then for its architecture, then
in general (`bf16_j_per_flop__a100-sxm-80gb`, `bf16_j_per_flop__ampere`, `bf16_j_per_flop`). Energies per operation and
per byte are close across 4 to 7 nm cards with HBM, which is how a card that nobody measured gets its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.errors import DomainError
from advisor.laws.power import (
    board_power_w,
    compute_power_w,
    link_power_w,
    memory_power_w,
    node_power_w,
    power_limited_run,
)
from advisor.predict.engine_state import Work
from advisor.predict.gemm import FOUR_BIT
from advisor.predict.step import StepCost
from advisor.schema import Breakdown, CoefficientSet, Gpu, Interval, Part

Real = Any  # float or NDArray[np.float64], as in advisor.predict.step


EXPERT = "expert_"
"""Before the kind of operations of routed experts: their kernels also compute on padding, gather and scatter."""


@dataclass(frozen=True)
class Activity:
    """What one GPU does a second, averaged over wall time and over the GPUs of a plan; numbers or arrays.

    flops_per_s      : useful operations by kind: bf16 (fp16 too), fp8 (int8 too), int4 (4-bit weights), attention; of
                       routed experts under `EXPERT` and the kind
    bytes_per_s      : read from and written to device memory
    cache_bytes_per_s : the part of it that decoding reads from the KV cache
    link_bytes_per_s : sent to other GPUs
    busy_frac        : share of the time in which the GPU runs a step, 1 where the caller does not know
    """

    flops_per_s: Mapping[str, Real] = field(default_factory=dict)
    bytes_per_s: Real = 0.0
    cache_bytes_per_s: Real = 0.0
    link_bytes_per_s: Real = 0.0
    busy_frac: Real = 1.0


def kind_of(weight_dtype: str) -> str:
    """Return the kind of arithmetic that a weight format runs in, a key of `Activity.flops_per_s`."""
    if weight_dtype in FOUR_BIT:
        return "int4"
    return "fp8" if weight_dtype in ("fp8", "int8") else "bf16"


def activity_of(
    stages: Sequence[StepCost], work: Work, duration_s: Real, weight_dtype: str, *, n_replicas: int = 1
) -> Activity:
    """Return the mean activity of a GPU while `work` was done in `duration_s`.

    stages       : one `StepCost` a pipeline stage; a stage holds the share of one GPU of its tensor-parallel group
    work         : totals of all replicas (`Simulation.total_work`, or the closed form's rates with duration 1); its
                   `terms`, where it has them, say how long the GPU ran
    weight_dtype : of the deployment; the LM head is bf16 whatever the format of the other weights
    n_replicas   : data-parallel replicas that shared the work
    """
    kind = kind_of(weight_dtype)
    share = 1.0 / (len(stages) * n_replicas * duration_s)
    flops: dict[str, Real] = {"bf16": 0.0, "attention": 0.0}
    flops.setdefault(kind, 0.0)
    moved: Real = 0.0
    cached: Real = 0.0
    sent: Real = 0.0
    for stage in stages:
        pairs, context = stage.seen(work.tokens, work.pairs, work.sampled, work.context_tokens)
        flops[kind] = flops[kind] + work.tokens * stage.flops_per_token * share
        if stage.n_experts:
            of_experts = work.tokens * stage.expert_flops_per_token * share
            flops[EXPERT + kind] = flops.get(EXPERT + kind, 0.0) + of_experts
        flops["bf16"] = flops["bf16"] + work.sampled * stage.head_flops_per_seq * share
        flops["attention"] = flops["attention"] + pairs * stage.flops_per_pair * share
        weights = work.n_steps * (stage.weight_bytes + stage.head_bytes)
        weights = weights + stage.expert_reads(work.n_steps, work.tokens, work.expert_reads) * stage.expert_bytes
        read = context * stage.kv_bytes_per_context_token
        rest = work.tokens * (stage.elementwise_bytes_per_token + stage.kv_bytes_per_context_token)
        moved = moved + (weights + read + rest) * share
        cached = cached + read * share
        sent = sent + work.tokens * stage.all_reduce_bytes_per_token * stage.n_all_reduces * share
    gpu_s = sum(work.terms)
    # a pipeline stage that waits for another spins in a receive kernel: any running stage makes all of them busy
    busy = np.minimum(1.0, gpu_s * share * len(stages)) if gpu_s > 0.0 else 1.0
    return Activity(flops, moved, cached, sent, busy)


Coefficients = CoefficientSet | Mapping[str, float]


def values_of(coefficients: Coefficients) -> Mapping[str, float]:
    """Return names and values; the fit calls the functions below with plain numbers."""
    if isinstance(coefficients, CoefficientSet):
        return {name: c.value for name, c in coefficients.coefficients.items()}
    return coefficients


def power_coefficient(coefficients: Coefficients, name: str, gpu: Gpu) -> float:
    """Return a coefficient for a card: its own, its architecture's, or the general one."""
    values = values_of(coefficients)
    for key in (f"{name}__{gpu.name}", f"{name}__{gpu.family}"):
        if key in values:
            return values[key]
    return values[name]


def _runs(gpu: Gpu, kind: str) -> bool:
    # 8-bit formats run in bf16 on cards without them; 4-bit weights are always computed in bf16, after unpacking
    return kind != "fp8" or bool({"fp8", "int8"} & set(gpu.peak_flops_per_s))


def demand_parts(activity: Activity, gpu: Gpu, coefficients: Coefficients) -> dict[str, Real]:
    """Return what compute, memory, link and the clock itself would draw at the nominal clock [W per GPU]."""
    values = values_of(coefficients)
    compute: Real = 0.0
    for key, rate in activity.flops_per_s.items():
        kind = key.removeprefix(EXPERT)
        name = f"{'bf16' if kind == 'attention' or not _runs(gpu, kind) else kind}_j_per_flop"
        factor = values.get("expert_energy_factor", 1.0) if key != kind else 1.0
        compute = compute + compute_power_w(rate, factor * power_coefficient(values, name, gpu))
    bandwidth = gpu.memory_bandwidth_bytes_per_s
    full_w = power_coefficient(values, "memory_j_per_byte", gpu) * bandwidth
    used = np.minimum(activity.bytes_per_s / bandwidth, 1.0)
    cached = np.minimum(activity.cache_bytes_per_s, bandwidth)
    # between steps memory rests: what is concave in the bandwidth is linear in the time
    busy = np.clip(activity.busy_frac, np.maximum(used, 1e-6), 1.0)
    memory = busy * memory_power_w(used / busy, full_w, power_coefficient(values, "memory_exponent", gpu))
    awake_w = power_coefficient(values, "awake_frac", gpu) * (gpu.board_power_w - gpu.idle_power_w)
    return {
        "awake": awake_w * np.asarray(activity.bytes_per_s > 0.0, dtype=np.float64),
        "compute": compute,
        # decode attention computes on every byte it loads, mostly on padding: one query row fills a tile of 16 to 64
        "memory": memory + cached * power_coefficient(values, "cache_j_per_byte", gpu),
        "link": link_power_w(activity.link_bytes_per_s, power_coefficient(values, "link_j_per_byte", gpu)),
    }


def power_parts(
    activity: Activity, gpu: Gpu, coefficients: Coefficients, *, limit_w: float | None = None
) -> dict[str, Real]:
    """Return idle, awake, compute, memory, link and total board power of one GPU [W]; the first five sum to the last.

    limit_w : power limit, the board's own by default; near it all dynamic parts shrink by the same factor

    Raises DomainError for a limit at or below the idle power or above the board's.
    """
    limit = _limit(gpu, limit_w)
    values = values_of(coefficients)
    demand = demand_parts(activity, gpu, values)
    whole = demand["awake"] + demand["compute"] + demand["memory"] + demand["link"]
    total = board_power_w(whole, gpu.idle_power_w, limit, power_coefficient(values, "cap_sharpness", gpu))
    kept = (total - gpu.idle_power_w) / np.maximum(whole, 1e-12)
    parts: dict[str, Real] = {"idle": gpu.idle_power_w + 0.0 * total}
    parts |= {name: value * kept for name, value in demand.items()}
    parts["total"] = parts["idle"] + parts["awake"] + parts["compute"] + parts["memory"] + parts["link"]
    return parts


def board_power(
    activity: Activity, gpu: Gpu, coefficients: CoefficientSet, n_gpus: int = 1, *, limit_w: float | None = None
) -> tuple[Interval, Breakdown]:
    """Return the board power of `n_gpus` equally loaded GPUs with its 90 % interval, and its parts [W].

    The interval is the spread of the law on engine starts (or public tables) that were not in its fit, kept between
    idle power and the limit. Raises DomainError for a limit that the board cannot have.
    """
    parts = {k: float(v) * n_gpus for k, v in power_parts(activity, gpu, coefficients, limit_w=limit_w).items()}
    error = power_coefficient(coefficients, "error_frac", gpu)
    total = parts.pop("total")
    floor, ceiling = gpu.idle_power_w * n_gpus, _limit(gpu, limit_w) * n_gpus
    interval = Interval(
        value=total,
        low=min(total, max(floor, total * (1.0 - error))),
        high=max(total, min(ceiling, total * (1.0 + error))),
    )
    why = {
        "idle": "boards with a driver and no work",
        "awake": "clocks at their top while there is work, also between kernels",
        "compute": "matrix and attention arithmetic",
        "memory": "weights, KV cache and activations to and from device memory",
        "link": "messages between GPUs",
    }
    listed = tuple(Part(name=name, value=value, why=why[name]) for name, value in parts.items())
    return interval, Breakdown(name="board power", unit="W", total=total, parts=listed)


@dataclass(frozen=True)
class LimitCurve:
    """A card under a series of power limits; arrays of equal length, ascending limits."""

    limit_w: NDArray[np.float64]
    clock_frac: NDArray[np.float64]
    speed_frac: NDArray[np.float64]
    power_w: NDArray[np.float64]
    energy_frac: NDArray[np.float64]
    best_limit_w: float


def power_limit_curve(
    activity: Activity,
    gpu: Gpu,
    coefficients: CoefficientSet,
    *,
    compute_frac: float,
    limits_w: Sequence[float] | None = None,
    slowest_speed_frac: float = 0.0,
    other_w: float = 0.0,
) -> LimitCurve:
    """Return speed, power and energy per token of a saturated card under lower power limits.

    activity           : at the default limit, while the GPU is busy
    compute_frac       : share of the step time that scales with the clock (linear, prefill attention: `TERMS`)
    limits_w           : default: 25 limits from 40 % of the board's to all of it
    slowest_speed_frac : the best limit must leave at least this speed, relative to the default limit
    other_w            : power beside the board, per GPU, that runs on while the card is slower (`node_power_w`)

    `speed_frac` and `energy_frac` (J per token) are relative to the default limit; `best_limit_w` has the smallest
    energy per token. The fitted clock exponent comes from clocks between 0.72 and 1 of the nominal one; limits that ask
    for less are an extrapolation. Raises DomainError for shares outside [0, 1] and for limits the board cannot have.
    """
    if not 0.0 <= compute_frac <= 1.0 or not 0.0 <= slowest_speed_frac <= 1.0:
        raise DomainError("compute_frac and slowest_speed_frac are shares and must lie between 0 and 1")
    wanted = sorted(limits_w) if limits_w is not None else np.linspace(0.4, 1.0, 25) * gpu.board_power_w
    limits = np.asarray([_limit(gpu, float(w)) for w in wanted], dtype=np.float64)
    parts = demand_parts(activity, gpu, coefficients)
    exponent = power_coefficient(coefficients, "clock_exponent", gpu)
    compute_w, memory_w = float(parts["compute"]), float(parts["memory"] + parts["link"])
    clock, speed, power = power_limited_run(
        np.append(limits, gpu.board_power_w),
        idle_w=gpu.idle_power_w + float(parts["awake"]),
        compute_w=compute_w,
        memory_w=memory_w,
        memory_exponent=power_coefficient(coefficients, "memory_exponent", gpu),
        memory_core_frac=memory_core_frac(coefficients, gpu),
        compute_frac=compute_frac,
        clock_exponent=exponent,
    )
    energy = (power + other_w) / speed
    speed_frac, energy_frac = speed[:-1] / speed[-1], energy[:-1] / energy[-1]
    allowed = np.where(speed_frac >= slowest_speed_frac - 1e-9, energy_frac, np.inf)
    best = float(limits[int(np.argmin(allowed))]) if np.isfinite(allowed).any() else gpu.board_power_w
    return LimitCurve(limits, clock[:-1], speed_frac, power[:-1], energy_frac, best)


DRAM_J_PER_BYTE = 8 * 3.92e-12
"""Energy of a byte in HBM2 itself, 3.92 pJ/bit (O'Connor et al. 2017, doi:10.1145/3123939.3124545); the rest of what a
byte costs is spent in caches and fabric on the cores' supply, and falls with their clock."""


def memory_core_frac(coefficients: Coefficients, gpu: Gpu) -> float:
    """Return the share of the memory power that is drawn outside the DRAM."""
    whole = power_coefficient(coefficients, "memory_j_per_byte", gpu)
    return max(0.0, 1.0 - DRAM_J_PER_BYTE / whole)


def node_power(board: Interval, n_gpus: int, coefficients: CoefficientSet) -> Interval:
    """Return the power at the plugs of the nodes that hold `n_gpus` GPUs [W], with its 90 % interval."""
    rest = coefficients.coefficients["node_other_w_per_gpu"]
    return Interval(
        value=float(node_power_w(board.value, n_gpus, rest.value)),
        low=float(node_power_w(board.low, n_gpus, rest.low)),
        high=float(node_power_w(board.high, n_gpus, rest.high)),
    )


def prefill_energy_frac(stages: Sequence[StepCost], work: Work, prompt_tokens: float, parts: Breakdown) -> float:
    """Return the share of the energy that prompts caused; decoding caused the rest.

    Compute power is split by operations, memory power by bytes (a step's weights belong to the prompt when it carries
    one), idle power like the dynamic rest. An attribution, not a measurement: both run in the same steps.
    """
    decode = work.tokens - prompt_tokens
    compute_prefill = compute_all = bytes_prefill = bytes_all = 0.0
    for stage in stages:
        per_token = stage.flops_per_token + stage.expert_flops_per_token
        pairs = work.pairs * stage.flops_per_pair
        compute_prefill += prompt_tokens * per_token + pairs
        compute_all += work.tokens * per_token + pairs + work.sampled * stage.head_flops_per_seq
        weights = stage.weight_bytes + stage.head_bytes + stage.expert_bytes
        written = stage.kv_bytes_per_context_token + stage.elementwise_bytes_per_token
        bytes_prefill += work.prefill_steps * weights + prompt_tokens * written
        read = work.context_tokens * stage.kv_bytes_per_context_token
        bytes_all += work.n_steps * weights + (prompt_tokens + max(decode, 0.0)) * written + read
    watts = {part.name: part.value for part in parts.parts}
    dynamic = watts["compute"] + watts["memory"]
    if dynamic <= 0.0:
        return 0.0
    compute_share = compute_prefill / compute_all if compute_all else 0.0
    memory_share = bytes_prefill / bytes_all if bytes_all else 0.0
    return float(min(1.0, (watts["compute"] * compute_share + watts["memory"] * memory_share) / dynamic))


def _limit(gpu: Gpu, limit_w: float | None) -> float:
    limit = gpu.board_power_w if limit_w is None else limit_w
    if not gpu.idle_power_w < limit <= gpu.board_power_w:
        raise DomainError(
            f"power limit {limit:.0f} W must lie above the idle power ({gpu.idle_power_w:.0f} W) and at most at the "
            f"board's limit ({gpu.board_power_w:.0f} W) of {gpu.name}"
        )
    return limit
