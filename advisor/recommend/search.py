"""The search: closed form for every deployment, simulation for the finalists, one ranking over all backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from advisor.predict.deepspeed_paths import DEEPSPEED_BACKENDS, path_of
from advisor.predict.spend import Activity, power_parts
from advisor.predict.steady import sweep
from advisor.recommend.ask import Pool, Question
from advisor.recommend.contest import Contest, Meanwhile, Table, choose_finalists, other_settings
from advisor.recommend.feasible import Fits, Rejections, fitting
from advisor.recommend.plan import Option, latency_s, offered_per_s, option_badness, option_score
from advisor.recommend.rank import Floats, badness, order, score, usd_per_h
from advisor.recommend.static import Offer, offers
from advisor.schema import Deployment, Rejected, Workload
from advisor.units import format_usd, format_w

POWER_ERROR = 1.3
"""The closed form's estimate of power is up to a quarter off the replay's: within this factor above the cap a plan
is simulated before it is rejected."""


@dataclass
class Found:
    """What the search found: predicted options from best to worst, and what was rejected."""

    options: list[Option]
    rejections: Rejections
    table: Table
    n_simulated: int
    has_prices: bool


def backends_of(question: Question) -> tuple[str, ...]:
    """Return the backends that the request allows; none named means all."""
    return question.request.backends or ("vllm", *DEEPSPEED_BACKENDS)


def n_gpus_text(n: int) -> str:
    """Return a number of GPUs as words."""
    return "1 GPU" if n == 1 else f"{n:,} GPUs"


def steady_values(
    question: Question, pool: Pool, deployments: Sequence[Deployment], workload: Workload
) -> dict[str, Floats]:
    """Return the closed form of deployments of one pool, with an estimate of the power of all their GPUs [W].

    The estimate takes all arithmetic as that of matrices; it serves to compare plans and is not shown.
    """
    vllm, gpu = question.vllm, pool.cluster.gpu
    assert vllm is not None
    values = sweep(question.model, gpu, deployments, workload, vllm, question.facts)
    n = np.array([d.n_gpus for d in deployments], dtype=float)
    if question.power is None:
        return values | {"board_power_w": n * gpu.board_power_w}
    peak = gpu.peak_flops_per_s.get("bf16") or gpu.peak_flops_per_s["fp16"]
    activity = Activity(
        flops_per_s={"bf16": values["mfu_frac"] * peak},
        bytes_per_s=values["mbu_frac"] * gpu.memory_bandwidth_bytes_per_s,
    )
    return values | {"board_power_w": n * power_parts(activity, gpu, question.power)["total"]}


def _limits(
    question: Question, pool: Pool, fits: Fits, values: dict[str, Floats], rejections: Rejections
) -> NDArray[np.bool_]:
    """Return which rows respect the budget and the power cap, and reject the others."""
    request = question.request
    n = np.array([d.n_gpus for d in fits.deployments], dtype=float)
    power = values["board_power_w"]
    keep = np.ones(len(n), dtype=bool)
    if request.budget_usd_per_h is not None:
        if pool.usd_per_gpu_h is None:
            reason = f"the budget cannot be checked: no price is known for {pool.cluster.gpu.name}"
            rejected = Rejected(
                backend="vllm", deployment=fits.deployments[0], reason=reason, nearest="--price USD per GPU hour"
            )
            rejections.add(pool.name, "budget", 0, rejected.model_copy(update={"count": len(n)}))
            return np.zeros(len(n), dtype=bool)
        hourly = usd_per_h(n, power, pool.usd_per_gpu_h, request)
        over = hourly > request.budget_usd_per_h
        affordable = int(request.budget_usd_per_h / pool.usd_per_gpu_h)
        nearest = n_gpus_text(affordable) if affordable else f"a budget of {format_usd(float(hourly.min()))}/h"
        for i in np.flatnonzero(over).tolist():
            reason = f"costs {format_usd(hourly[i])}/h, the budget is {format_usd(request.budget_usd_per_h)}/h"
            rejected = Rejected(backend="vllm", deployment=fits.deployments[i], reason=reason, nearest=nearest)
            rejections.add(pool.name, "budget", float(hourly[i]), rejected)
        keep &= ~over
    if request.power_cap_w is not None:
        over = power > POWER_ERROR * request.power_cap_w
        fewer = int(request.power_cap_w / float((power / n).min())) if len(n) else 0
        nearest = n_gpus_text(fewer) if fewer else f"a cap of {format_w(float(power.min()))}"
        for i in np.flatnonzero(over).tolist():
            reason = f"draws about {format_w(power[i])}, the cap is {format_w(request.power_cap_w)}"
            rejected = Rejected(backend="vllm", deployment=fits.deployments[i], reason=reason, nearest=nearest)
            rejections.add(pool.name, "power", float(power[i]), rejected)
        keep &= ~over
    return keep


def tabulate(question: Question, rejections: Rejections, *, has_prices: bool) -> Table:
    """Return every vLLM deployment that fits memory, budget and power cap, with closed-form values."""
    table = Table()
    if question.vllm is None:
        return table
    pieces: dict[str, list[Floats]] = {}
    hourly: list[Floats] = []
    for pool in question.pools:
        fits = fitting(question, pool, rejections)
        if not fits.deployments:
            continue
        values = question.kept.get(
            ("steady", pool.name, tuple(fits.deployments), question.workload),
            partial(steady_values, question, pool, fits.deployments, question.workload),
        )
        keep = _limits(question, pool, fits, values, rejections)
        kept = [d for d, k in zip(fits.deployments, keep.tolist(), strict=True) if k]
        table.deployments += kept
        table.pools += [pool] * len(kept)
        for name, array in values.items():
            pieces.setdefault(name, []).append(np.asarray(array)[keep])
        rent = pool.usd_per_gpu_h if has_prices and pool.usd_per_gpu_h is not None else 1.0
        n = np.array([d.n_gpus for d in kept], dtype=float)
        hourly.append(np.asarray(usd_per_h(n, np.asarray(values["board_power_w"])[keep], rent, question.request)))
    if not table.deployments:
        return table
    table.values = {name: np.concatenate(parts) for name, parts in pieces.items()}
    objective = question.request.objective
    table.score = np.asarray(score(objective, table.values, np.concatenate(hourly), is_open=question.is_open))
    saturated = table.values["is_saturated"].astype(bool)
    table.badness = np.asarray(badness(table.values, question.slo, saturated, offered_per_s(question)))
    return table


def _tier(question: Question, option: Option) -> int:
    """Return 0, or 1 for the closed form where plans are simulated, or 2 for unmaintained software."""
    if option.deployment.backend != "vllm":
        return 0 if path_of(option.deployment.backend).is_maintained else 2
    return int(option.prediction.method == "steady" and question.request.n_finalists > 0)


def _rank(question: Question, options: Sequence[Option], *, has_prices: bool) -> list[Option]:
    if not options:
        return []
    scores = np.array([option_score(question, o, has_prices=has_prices) for o in options])
    bad = np.array([option_badness(question, o) for o in options])
    latency = np.array([latency_s(o.prediction) for o in options])
    n = np.array([o.deployment.n_gpus for o in options], dtype=float)
    tier = np.array([_tier(question, o) for o in options], dtype=float)
    ranked = [options[i] for i in order(scores, bad, latency, n, tier).tolist()]
    best: dict[tuple[object, ...], Option] = {}
    for option in ranked:
        best.setdefault(option.key, option)
    return list(best.values())


def _contest(
    question: Question, table: Table, rejections: Rejections, meanwhile: Meanwhile, *, has_prices: bool
) -> tuple[list[Option], int]:
    contest = Contest(question, table, has_prices=has_prices)
    n = question.request.n_finalists
    cap = question.request.power_cap_w
    if n:
        finalists = choose_finalists(question, table, contest.ranked(), n)
        contest.simulate(finalists, other_settings(contest, min(1, n - 1)), meanwhile)
        for _ in range(n + 2 if cap is None else 4 * n + 2):
            leader = next(iter(contest.ranked()), None)
            if leader is None or leader in contest.simulated:
                break
            contest.simulate([leader])
        contest.simulate(other_settings(contest, min(1, n - 1)))
    for over in contest.over_cap:
        _within(question, over, rejections)
    options: list[Option] = []
    rows: list[int] = []
    factors = table.factors = contest.factors()
    shown = {contest.keys[i]: i for i in reversed(contest.order()) if i in contest.simulated}
    for best in contest.ranked():
        row = shown.get(contest.keys[best], best)
        if row in contest.simulated:
            options.append(contest.simulated[row])
            rows.append(row)
        elif cap is not None and table.values["board_power_w"][row] > cap:
            continue
        elif len(options) < question.request.max_plans and not _is_beaten(table, row, rows):
            option = contest.predict(row, "steady")
            if option is not None:
                options.append(replace(option, badness_factor=float(factors[1, row])))
                rows.append(row)
    return options, len(contest.simulated)


def _is_beaten(table: Table, row: int, better: Sequence[int]) -> bool:
    """Return whether a better row on as many GPUs of the same pool is also faster in TTFT and TPOT."""
    v, mine = table.values, table.deployments[row]
    return any(
        table.pools[i] is table.pools[row]
        and table.deployments[i].n_gpus == mine.n_gpus
        and v["ttft_p99_s"][i] <= v["ttft_p99_s"][row]
        and v["tpot_p50_s"][i] <= v["tpot_p50_s"][row]
        for i in better
    )


def search(question: Question) -> Found:
    """Return all predicted options from best to worst; vLLM's finalists simulated, DeepSpeed's paths replayed."""
    rejections = Rejections()
    has_prices = all(p.usd_per_gpu_h is not None for p in question.pools)
    allowed = backends_of(question)
    deepspeed = tuple(b for b in DEEPSPEED_BACKENDS if b in allowed)
    refused = Rejections()

    @lru_cache(maxsize=1)
    def static() -> list[Offer]:
        return [o for pool in question.pools if deepspeed for o in offers(question, pool, deepspeed, refused)]

    options: list[Option] = []
    table, n_simulated = Table(), 0
    if "vllm" in allowed:
        table = tabulate(question, rejections, has_prices=has_prices)
        if table.deployments:
            options, n_simulated = _contest(question, table, rejections, static, has_prices=has_prices)
    found = static()
    rejections.join(refused)
    for offer in found:
        option = Option(offer.pool, offer.deployment, offer.prediction)
        if _within(question, option, rejections):
            options.append(option)
    return Found(_rank(question, options, has_prices=has_prices), rejections, table, n_simulated, has_prices)


def _within(question: Question, option: Option, rejections: Rejections) -> bool:
    """Return whether an option respects budget and power cap; one that does not is rejected."""
    request, d = question.request, option.deployment
    power = option.prediction.quantities.get("board_power_w")
    hourly = option.pool.usd_per_gpu_h and d.n_gpus * option.pool.usd_per_gpu_h
    reason = nearest = ""
    if request.budget_usd_per_h is not None and (hourly is None or hourly > request.budget_usd_per_h):
        shown = f"costs {format_usd(hourly)}/h" if hourly else "has no price"
        reason, nearest = f"{shown}, the budget is {format_usd(request.budget_usd_per_h)}/h", "fewer GPUs"
    if request.power_cap_w is not None and power is not None and power.value > request.power_cap_w:
        reason = f"draws {format_w(power.value)}, the cap is {format_w(request.power_cap_w)}"
        nearest = "fewer GPUs"
    if reason:
        rejected = Rejected(backend=d.backend, deployment=d, reason=reason, nearest=nearest)
        rejections.add(option.pool.name, "limit", 0, rejected)
    return not reason
