"""What would flip the winner: the target or price at which another plan wins; rate and prompt length in flips_load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

from advisor.predict.deepspeed_paths import path_of
from advisor.recommend.ask import Question
from advisor.recommend.explain import plan_text
from advisor.recommend.flips_load import load_flips
from advisor.recommend.flips_memory import memory_flips
from advisor.recommend.rank import target_value, values_of
from advisor.recommend.search import Found
from advisor.schema import Plan, Target
from advisor.units import format_s, format_usd

COMMON = ("ttft_p99", "tpot_p99")


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
                theirs = faster[0].prediction.quantities[quantity]
                doubt = "; the intervals overlap" if theirs.high > mine.low else ""
                winner = plan_text(faster[0], with_gpu=len(question.pools) > 1)
                sentences.append(f"{text}: then {winner} wins ({format_s(theirs.value)}{doubt})")
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


def flips(question: Question, plans: Sequence[Plan], found: Found) -> tuple[str, ...]:
    """Return what would make another plan win, each with the number at which it does."""
    if len(plans) < 2:
        return ()
    sentences = target_flips(question, plans) + price_flips(question, plans)
    if plans[0].backend == "vllm" and question.vllm is not None:
        memory = lru_cache(maxsize=1)(partial(memory_flips, question, plans[0]))
        sentences += [*load_flips(question, plans, found, memory), *memory()]
    starts_with_name = {p.cluster.gpu.name for p in question.pools}
    return tuple(
        f"{s}." if s.split()[0] in starts_with_name else f"{s[0].upper()}{s[1:]}." for s in dict.fromkeys(sentences)
    )
