"""The search: closed form for every deployment, simulation for the finalists, one ranking over all backends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

from advisor.errors import AdvisorError
from advisor.predict.deepspeed_paths import DEEPSPEED_BACKENDS, path_of
from advisor.predict.serving import Forecast
from advisor.predict.spend import Activity, power_parts
from advisor.predict.steady import sweep
from advisor.recommend.ask import Pool, Question
from advisor.recommend.feasible import Fits, Rejections, fitting
from advisor.recommend.forecast import forecast, replays
from advisor.recommend.plan import Option, latency_s, offered_per_s, option_badness, option_score
from advisor.recommend.rank import SATURATED, Floats, badness, first_of_each, order, score, usd_per_h
from advisor.recommend.static import offers
from advisor.schema import Deployment, Rejected, Workload
from advisor.units import format_usd, format_w

POWER_ERROR = 1.3
"""The closed form's estimate of power is up to a quarter off the replay's: within this factor above the cap a plan
is simulated before it is rejected."""
CLOSED_ERROR = 1.05
"""How much worse, in the closed form, another setting of the leader may be to be simulated: what is common to both
cancels, so that this is less than the closed form's error."""
NEAR_MISS = 1.6
"""A cheaper plan that misses its targets by up to this factor in the closed form is simulated before it is dropped."""


@dataclass
class Table:
    """All vLLM deployments that run, with their closed-form values as arrays."""

    deployments: list[Deployment] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    values: dict[str, Floats] = field(default_factory=dict)
    badness: Floats = field(default_factory=lambda: np.zeros(0))
    score: Floats = field(default_factory=lambda: np.zeros(0))
    factors: Floats = field(default_factory=lambda: np.ones((3, 0)))
    """what the simulation of finalists said about the closed form: factors on score, badness and median latency"""

    def row(self, i: int) -> dict[str, float]:
        """Return the closed-form values of one row."""
        return {name: float(column[i]) for name, column in self.values.items()}

    def keys(self) -> list[object]:
        """Return for each row what makes it the same plan but for engine settings."""
        return [
            (p.name, d.tp, d.pp, d.dp, d.ep, d.weight_dtype, d.kv_dtype)
            for p, d in zip(self.pools, self.deployments, strict=True)
        ]


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


def _first(rows: Sequence[int], by: Floats, where: NDArray[np.bool_] | None = None) -> list[int]:
    able = [i for i in rows if where is None or where[i]]
    return [min(able, key=lambda i: float(by[i]))] if able else []


def choose_finalists(question: Question, table: Table, ranked: Sequence[int], n: int) -> list[int]:
    """Return up to `n` different rows worth a simulation: the best of each pool and kind, then in rank order."""
    v = table.values
    meets = table.badness <= 1
    tokens = np.maximum(v["output_tokens_per_s"], 1e-12)
    wanted = list(ranked[:2])
    near = [i for i in ranked if 1 < table.badness[i] <= NEAR_MISS]
    if ranked and meets[ranked[0]]:
        wanted += _first([i for i in near if table.score[i] < table.score[ranked[0]]], table.score)
    wanted += _first(ranked, v["e2e_p50_s"], meets)
    wanted += _first(ranked, v["board_power_w"] / tokens, meets)
    wanted += _first(ranked, -tokens, meets)
    names = [table.pools[i].name for i in ranked]
    wanted += [ranked[names.index(name)] for name in dict.fromkeys(names)]
    return list(dict.fromkeys([*wanted, *ranked[: 2 * n]]))[:n]


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


class _Contest:
    """Rows of the table that are simulated, one after the other, until the leader is a simulated one.

    What the simulation finds corrects the closed form of the rows that are not simulated: by the ratio of the two on
    the same layout where there is one, else by the median ratio of its kind (card, weights, pipeline or none).
    """

    def __init__(self, question: Question, table: Table, *, has_prices: bool) -> None:
        self.question = question
        self.table = table
        self.has_prices = has_prices
        n = len(table.deployments)
        latency = table.values["e2e_p50_s"] if n else np.zeros(0)
        self.closed = np.stack([table.score, table.badness, latency]) if n else np.zeros((3, 0))
        self.known = self.closed.copy()
        self.n_gpus = np.array([d.n_gpus for d in table.deployments], dtype=float)
        self.simulated: dict[int, Option] = {}
        self.failed: set[int] = set()
        self.over_cap: list[Option] = []
        self.keys = table.keys()

    def factors(self) -> Floats:
        """Return by what score, badness and latency of each row are multiplied: simulated over closed form."""
        factors = np.ones_like(self.closed)
        rows = [i for i in self.simulated if self.closed[1, i] < SATURATED]
        kinds = [
            (p.name, d.weight_dtype, d.pp > 1) for p, d in zip(self.table.pools, self.table.deployments, strict=True)
        ]
        for k in range(3) if rows else ():
            by_kind: dict[object, list[float]] = {}
            by_key: dict[object, list[float]] = {}
            for i in rows:
                if self.closed[k, i] * self.known[k, i] > 0:
                    ratio = float(np.log(self.known[k, i] / self.closed[k, i]))
                    by_kind.setdefault(kinds[i], []).append(ratio)
                    by_key.setdefault(self.keys[i], []).append(ratio)
            alike = {kind: median(found) for kind, found in by_kind.items()}
            layouts = {key: median(found) for key, found in by_key.items()}
            factors[k] = np.exp(
                [layouts.get(key, alike.get(kind, 0.0)) for key, kind in zip(self.keys, kinds, strict=True)]
            )
        # how overloaded a plan is does not depend on the latencies
        factors[1] = np.where(self.closed[1] >= SATURATED, 1.0, factors[1])
        return factors

    def order(self) -> list[int]:
        """Return all rows, best first, on what is known now."""
        now = self.closed * self.factors()
        for i in self.simulated:
            now[:, i] = self.known[:, i]
        return [i for i in order(now[0], now[1], now[2], self.n_gpus).tolist() if i not in self.failed]

    def ranked(self) -> list[int]:
        """Return the best row of each plan, best first."""
        return first_of_each(self.keys, self.order())

    def predict(self, row: int, method: str, made: Forecast | None = None) -> Option | None:
        """Return a row with its prediction; None when it turns out not to run."""
        q, pool, d = self.question, self.table.pools[row], self.table.deployments[row]
        try:
            return forecast(q, pool, d, q.workload, method=method, steady=self.table.row(row), made=made)
        except AdvisorError:
            self.failed.add(row)
            return None

    def simulate(self, rows: Iterable[int]) -> None:
        """Simulate rows and put what comes out in place of the closed form."""
        table = self.table
        todo = [row for row in dict.fromkeys(rows) if row not in self.simulated and row not in self.failed]
        made = replays(self.question, [(table.pools[row], table.deployments[row], table.row(row)) for row in todo])
        for row, replayed in zip(todo, made, strict=True):
            option = self.predict(row, "simulated", replayed)
            if option is None:
                continue
            cap, power = self.question.request.power_cap_w, option.prediction.quantities.get("board_power_w")
            if cap is not None and power is not None and power.value > cap:
                self.failed.add(row)
                self.over_cap.append(option)
                continue
            self.simulated[row] = option
            self.known[0, row] = option_score(self.question, option, has_prices=self.has_prices)
            self.known[1, row] = option_badness(self.question, option)
            self.known[2, row] = latency_s(option.prediction)


def _contest(question: Question, table: Table, rejections: Rejections, *, has_prices: bool) -> tuple[list[Option], int]:
    contest = _Contest(question, table, has_prices=has_prices)
    n = question.request.n_finalists
    cap = question.request.power_cap_w
    if n:
        contest.simulate(choose_finalists(question, table, contest.ranked(), n))
        for _ in range(n + 2 if cap is None else 4 * n + 2):
            leader = next(iter(contest.ranked()), None)
            if leader is None or leader in contest.simulated:
                break
            contest.simulate([leader])
        contest.simulate(_other_settings(contest, min(1, n - 1)))
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


def _other_settings(contest: _Contest, n: int) -> list[int]:
    """Return rows with the leader's layout and other engine settings, the most promising first.

    A setting that the closed form finds to change nothing (more sequences than ever run) is none, and one that it finds
    worse than the leader by more than `CLOSED_ERROR` is not promising.
    """
    leader = next(iter(contest.ranked()), None)
    if leader is None:
        return []
    values, closed = np.stack([*contest.table.values.values()]), contest.closed
    alike = [i for i in contest.order() if contest.keys[i] == contest.keys[leader] and i not in contest.simulated]
    is_other = np.any(values != values[:, [leader]], axis=0)
    is_near = np.all(closed <= closed[:, [leader]] * CLOSED_ERROR, axis=0)
    promising: list[bool] = (is_other & is_near).tolist()
    return [i for i in alike if promising[i]][:n]


def search(question: Question) -> Found:
    """Return all predicted options from best to worst; vLLM's finalists simulated, DeepSpeed's paths replayed."""
    rejections = Rejections()
    has_prices = all(p.usd_per_gpu_h is not None for p in question.pools)
    allowed = backends_of(question)
    options: list[Option] = []
    table, n_simulated = Table(), 0
    if "vllm" in allowed:
        table = tabulate(question, rejections, has_prices=has_prices)
        if table.deployments:
            options, n_simulated = _contest(question, table, rejections, has_prices=has_prices)
    deepspeed = tuple(b for b in DEEPSPEED_BACKENDS if b in allowed)
    for pool in question.pools if deepspeed else ():
        for offer in offers(question, pool, deepspeed, rejections):
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
