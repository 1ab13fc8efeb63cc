"""What would flip the winner: the target, price, rate or prompt length at which another plan wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from advisor.predict.deepspeed_paths import path_of
from advisor.recommend.ask import Question
from advisor.recommend.explain import plan_text
from advisor.recommend.rank import SATURATED, Floats, badness, order, score, target_value, usd_per_h, values_of
from advisor.recommend.search import Found, steady_values
from advisor.schema import ClosedLoad, FixedLengths, Lengths, LognormalLengths, Plan, Target, Workload
from advisor.units import format_rate, format_s, format_usd

SPAN = 32.0
"""Rates and lengths are searched up to this factor above and below the request's own."""
GRID = 24
STEPS = 4
COMMON = ("ttft_p99", "tpot_p99")


def _key(plan: Plan) -> tuple[object, ...]:
    d = plan.deployment
    return (d.gpu, d.backend, d.tp, d.pp, d.dp, d.ep, d.weight_dtype)


def target_flips(question: Question, plans: Sequence[Plan]) -> list[str]:
    """Return the targets that would unseat the winner, tighter ones and ones that let a cheaper plan in.

    Left out: plans that were not simulated, whose percentiles are rules of thumb, and software without maintenance."""
    best = plans[0]
    known = [p for p in plans[1:] if p.prediction.method != "steady" and _is_kept(p.backend)]
    sentences = []
    if best.meets_slo:
        given = {t.name: t for t in question.slo.targets}
        names = [*given, *(n for n in COMMON if n not in given)]
        for name in names[:3]:
            metric, statistic = name.split("_")
            quantity = f"{name}_s"
            mine = best.prediction.quantities.get(quantity)
            limit = given[name].max_s if name in given else math.inf
            if mine is None:
                continue
            able = [p for p in known if p.meets_slo and quantity in p.prediction.quantities]
            faster = [p for p in able if p.prediction[quantity] < 0.98 * mine.value]
            if faster and mine.value < limit:
                text = f"a {metric.upper()} {statistic.upper()} target below {format_s(mine.value)}"
                theirs = format_s(faster[0].prediction[quantity])
                sentences.append(
                    f"{text}: then {plan_text(faster[0], with_gpu=len(question.pools) > 1)} wins ({theirs})"
                )
    for plan in known:
        missed = [t for t in question.slo.targets if _value(plan, t) > t.max_s]
        if len(missed) == 1 and not plan.prediction.is_saturated and plan.score < 0.98 * best.score and best.meets_slo:
            t = missed[0]
            name = f"{t.metric.upper()} {t.statistic.upper()}"
            text = f"{name} relaxed from {format_s(t.max_s)} to {format_s(_value(plan, t))}"
            sentences.append(f"{text}: then {plan_text(plan, with_gpu=len(question.pools) > 1)} wins")
            break
    return sentences


def _is_kept(backend: str) -> bool:
    return backend == "vllm" or path_of(backend).is_maintained


def _value(plan: Plan, target: Target) -> float:
    return float(target_value(values_of(plan.prediction), target))


def price_flips(question: Question, plans: Sequence[Plan]) -> list[str]:
    """Return the price of another card at which its best plan would be the cheapest; linear in the price."""
    best = plans[0]
    if question.request.objective != "cost" or not best.usd_per_h or not best.meets_slo:
        return []
    sentences = []
    seen = {best.deployment.gpu}
    rents = {p.cluster.gpu.name: p.usd_per_gpu_h for p in question.pools}
    for plan in plans[1:]:
        gpu = plan.deployment.gpu
        rent = rents.get(gpu)
        if gpu in seen or not plan.meets_slo or rent is None:
            continue
        seen.add(gpu)
        power_usd = plan.usd_per_h - rent * plan.deployment.n_gpus
        even = (plan.usd_per_h * best.score / plan.score - power_usd) / plan.deployment.n_gpus
        if even > 0:
            text = f"{gpu} at {format_usd(even)} per GPU hour instead of {format_usd(rent)}"
            sentences.append(f"{text}: then {plan_text(plan)} is as cheap")
    return sentences


class _Rivals:
    """The shown vLLM plans as rows of the closed form, corrected as in the search, under other loads and lengths."""

    def __init__(self, question: Question, plans: Sequence[Plan], found: Found) -> None:
        self.question = question
        self.found = found
        table = found.table
        shown = {_key(p): p for p in plans if p.backend == "vllm"}
        self.plans: list[Plan] = []
        self.rows: list[int] = []
        for i, d in enumerate(table.deployments):
            plan = shown.get((d.gpu, d.backend, d.tp, d.pp, d.dp, d.ep, d.weight_dtype))
            if plan is not None and plan.deployment == d:
                self.plans.append(plan)
                self.rows.append(i)
        self.pools = [table.pools[i] for i in self.rows]
        self.factors = table.factors[:, self.rows] if table.factors.shape[1] else np.ones((3, len(self.rows)))
        self.mine = next((k for k, p in enumerate(self.plans) if p is plans[0]), -1)

    def winners(self, factors: Floats, workload: Workload) -> list[int]:
        """Return which plan wins at each factor on the load of `workload`.

        A load f times as high on n replicas is the same load on n/f replicas, so all factors are one call of the sweep;
        rates and power of the rows are scaled back.
        """
        request, n_factors, n_rows = self.question.request, len(factors), len(self.rows)
        columns: dict[str, Floats] = {}
        hourly = np.zeros((n_rows, n_factors))
        n_gpus = np.array([self.found.table.deployments[i].n_gpus for i in self.rows], dtype=float)
        for pool in {p.name: p for p in self.pools}.values():
            mine = [k for k, p in enumerate(self.pools) if p.name == pool.name]
            deployments = [self.found.table.deployments[self.rows[k]] for k in mine]
            scaled = [d.model_copy(update={"dp": d.dp / f}) for d in deployments for f in factors.tolist()]
            values = steady_values(self.question, pool, scaled, workload)
            for name, array in values.items():
                column = np.asarray(array, dtype=float).reshape(len(mine), n_factors)
                if name.endswith("_per_s") or name == "board_power_w":
                    column = column * factors
                columns.setdefault(name, np.zeros((n_rows, n_factors)))[mine] = column
            rent = pool.usd_per_gpu_h if self.found.has_prices and pool.usd_per_gpu_h is not None else 1.0
            hourly[mine] = usd_per_h(n_gpus[mine][:, None], columns["board_power_w"][mine], rent, request)
        load = workload.load
        found = []
        for k, factor in enumerate(factors.tolist()):
            at = {name: column[:, k] for name, column in columns.items()}
            offered = None if isinstance(load, ClosedLoad) else load.arrivals_per_s * factor
            scores = np.asarray(score(request.objective, at, hourly[:, k], is_open=offered is not None))
            bad = np.asarray(badness(at, self.question.slo, at["is_saturated"].astype(bool), offered))
            by = self.factors
            bad = np.where(bad >= SATURATED, bad, bad * by[1])
            found.append(int(order(scores * by[0], bad, at["e2e_p50_s"] * by[2], n_gpus)[0]))
        return found

    def load_crossing(self, *, up: bool) -> tuple[float, int] | None:
        """Return the factor on the load nearest to 1 at which another plan wins, and which; None within the span."""
        sign = 1.0 if up else -1.0
        steps = np.exp(sign * np.linspace(0.0, np.log(SPAN), GRID + 1)[1:])
        workload = self.question.workload
        for refine in (False, True):
            winners = self.winners(steps, workload)
            at = next((k for k, w in enumerate(winners) if w != self.mine), None)
            if at is None:
                return None
            if refine:
                return float(steps[at]), winners[at]
            before = steps[at - 1] if at else 1.0
            steps = np.exp(np.linspace(np.log(before), np.log(steps[at]), GRID + 1)[1:])
        return None

    def prompt_crossing(self, with_prompt: Callable[[float], Workload], most: float) -> tuple[float, int] | None:
        """Return the smallest factor on the prompt length, up to `most`, at which another plan wins, and which."""
        one = np.ones(1)

        def winner(factor: float) -> int:
            return self.winners(one, with_prompt(factor))[0]

        good, bad, other = 1.0, 0.0, self.mine
        while bad < most and other == self.mine:
            bad = min(most, 2.0 * good)
            other = winner(bad)
            good = good if other != self.mine else bad
        if other == self.mine:
            return None
        for _ in range(STEPS):
            middle = float(np.sqrt(good * bad))
            row = winner(middle)
            good, bad, other = (middle, bad, other) if row == self.mine else (good, middle, row)
        return bad, other


def _longer(question: Question, factor: float) -> Workload:
    lengths = question.workload.lengths
    changed: Lengths = lengths
    if isinstance(lengths, FixedLengths):
        changed = lengths.model_copy(update={"prompt_tokens": max(1, round(lengths.prompt_tokens * factor))})
    elif isinstance(lengths, LognormalLengths):
        changed = lengths.model_copy(update={"prompt_tokens_mean": lengths.prompt_tokens_mean * factor})
    return question.workload.model_copy(update={"lengths": changed})


def load_flips(question: Question, plans: Sequence[Plan], found: Found) -> list[str]:
    """Return the rate (or clients) and prompt length at which another shown plan wins, by the closed form.

    Where the simulation, not the closed form, decided who wins now, a crossing of the closed form would mislead: none.
    """
    load, lengths = question.workload.load, question.workload.lengths
    rivals = _Rivals(question, plans, found)
    if rivals.mine < 0 or len(rivals.rows) < 2 or not plans[0].meets_slo:
        return []
    if rivals.winners(np.ones(1), question.workload)[0] != rivals.mine:
        return []
    sentences = []
    for up in (True, False) if load.kind != "trace" else ():
        if flip := rivals.load_crossing(up=up):
            factor, row = flip
            what = (
                f"{max(1, round(load.concurrency * factor))} clients"
                if isinstance(load, ClosedLoad)
                else format_rate(load.arrivals_per_s * factor, "requests")
            )
            winner = plan_text(rivals.plans[row], with_gpu=len(question.pools) > 1)
            sentences.append(f"{'above' if up else 'below'} about {what}: then {winner} wins (closed form)")
    if not isinstance(lengths, FixedLengths | LognormalLengths):
        return sentences
    mean = lengths.prompt_tokens if isinstance(lengths, FixedLengths) else lengths.prompt_tokens_mean
    most = min(8.0, question.max_model_len / mean)
    if most > 1 and (flip := rivals.prompt_crossing(lambda factor: _longer(question, factor), most)):
        factor, row = flip
        winner = plan_text(rivals.plans[row], with_gpu=len(question.pools) > 1)
        sentences.append(f"prompts above about {mean * factor:,.0f} tokens: then {winner} wins (closed form)")
    return sentences


def flips(question: Question, plans: Sequence[Plan], found: Found) -> tuple[str, ...]:
    """Return what would make another plan win, each with the number at which it does."""
    if len(plans) < 2:
        return ()
    sentences = target_flips(question, plans) + price_flips(question, plans)
    if plans[0].backend == "vllm" and question.vllm is not None:
        sentences += load_flips(question, plans, found)
    starts_with_name = {p.cluster.gpu.name for p in question.pools}
    return tuple(
        f"{s}." if s.split()[0] in starts_with_name else f"{s[0].upper()}{s[1:]}." for s in dict.fromkeys(sentences)
    )
