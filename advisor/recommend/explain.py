"""Why the winner wins, in sentences with numbers; what the answer rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advisor.predict.deepspeed_paths import path_of
from advisor.predict.shapes import shapes_of
from advisor.predict.traffic import mean_lengths
from advisor.recommend.ask import Question
from advisor.recommend.duel import duel
from advisor.recommend.plan import latency_s
from advisor.recommend.search import Found
from advisor.schema import ClosedLoad, Deployment, FixedLengths, Note, Plan, Prediction, Rejected
from advisor.units import (
    format_change,
    format_count,
    format_frac,
    format_j,
    format_rate,
    format_s,
    format_usd,
    format_w,
    plural,
)

DEEPSPEED_LABELS = {
    "deepspeed-zero-inference": "ZeRO-Inference",
    "deepspeed-autotp": "AutoTP",
    "deepspeed-kernel-injection": "kernel injection",
    "deepspeed-fastgen": "FastGen",
}


def layout_text(d: Deployment) -> str:
    """Return a deployment in a few words, such as '4 GPUs (TP 2 x 2 replicas)'."""
    parts = [f"TP {d.tp}"] if d.tp > 1 else []
    parts += [f"PP {d.pp}"] if d.pp > 1 else []
    parts += [f"EP {d.ep}"] if d.ep > 1 else []
    if d.dp > 1:
        parts.append(f"{d.dp} ranks" if d.backend == "deepspeed-zero-inference" else f"{d.dp} replicas")
    if d.static_batch:
        parts.append(f"batch {d.static_batch}")
    if d.offload != "none":
        parts.append(f"weights on {d.offload}")
    if d.kv_offload != "none":
        parts.append(f"cache on {d.kv_offload}")
    if d.weight_dtype == "int4":
        parts.append("4-bit")
    gpus = plural(d.n_gpus, "GPU")
    return f"{gpus} ({', '.join(parts)})" if parts else gpus


def layout_short(d: Deployment) -> str:
    """Return a deployment in one word or two, such as 'TP4 DP2 b16'."""
    parts = [f"{name}{n}" for name, n in (("TP", d.tp), ("PP", d.pp), ("EP", d.ep), ("DP", d.dp)) if n > 1]
    parts += [f"b{d.static_batch}"] if d.static_batch else []
    parts += [d.offload] if d.offload != "none" else []
    parts += [f"kv-{d.kv_offload}"] if d.kv_offload != "none" else []
    parts += ["int4"] if d.weight_dtype == "int4" else []
    return " ".join(parts)


def plan_text(plan: Plan, *, with_gpu: bool = False) -> str:
    """Return backend and layout of a plan in a few words."""
    name = "vLLM" if plan.backend == "vllm" else f"DeepSpeed {DEEPSPEED_LABELS[plan.backend]}"
    card = f" on {plan.deployment.gpu}" if with_gpu else ""
    return f"{name}, {layout_text(plan.deployment)}{card}"


def workload_text(question: Question) -> str:
    """Return the workload in one sentence part: lengths and load."""
    prompt, output = mean_lengths(question.workload.lengths)
    spread = "" if isinstance(question.workload.lengths, FixedLengths) else " on average"
    load = question.workload.load
    who = (
        f"{load.concurrency} clients in a closed loop"
        if isinstance(load, ClosedLoad)
        else format_rate(load.arrivals_per_s, "requests")
    )
    return f"{prompt:,.0f} prompt + {output:,.0f} output tokens{spread}, {who}"


def _cost(question: Question, plan: Plan) -> str:
    tokens = plan.prediction.quantities.get("usd_per_million_output_tokens")
    if tokens is None or not plan.usd_per_h:
        return "no price known"
    return f"{format_usd(plan.usd_per_h)}/h, {format_usd(tokens.value)} per million output tokens"


def _headline(question: Question, best: Plan) -> str:
    p = best.prediction
    serves = format_rate(p["output_tokens_per_s"], "output tokens")
    text = f"{plan_text(best, with_gpu=len(question.pools) > 1)}: {_cost(question, best)}; {serves}"
    if not p.is_saturated:
        text += f", TTFT P99 {format_s(p['ttft_p99_s'])}, TPOT P99 {format_s(p['tpot_p99_s'])}"
    if "board_power_w" in p.quantities:
        text += f", {format_w(p['board_power_w'])}"
    return text + "."


def _capacity(question: Question, best: Plan) -> list[str]:
    q, load = best.prediction.quantities, question.workload.load
    capacity = q.get("saturation_requests_per_s", q["requests_per_s"] if best.prediction.is_saturated else None)
    if capacity is None or isinstance(load, ClosedLoad):
        return []
    share = load.arrivals_per_s / capacity.value
    if best.prediction.is_saturated:
        gpus = best.deployment.n_gpus * share
        return [
            f"No plan here carries {format_rate(load.arrivals_per_s, 'requests')}: this one saturates at"
            f" {format_rate(capacity.value, 'requests')}; the load takes about {math.ceil(gpus):,} GPUs run like this."
        ]
    return [f"The load is {format_frac(share)} of what it can serve ({format_rate(capacity.value, 'requests')})."]


def _versus(question: Question, best: Plan, other: Plan) -> str:
    """Return how the best plan differs from another: the objective first, then what the other is better at."""
    a, b = best.prediction, other.prediction
    name = plan_text(other, with_gpu=len(question.pools) > 1)
    if b.is_saturated:
        return f"{name} saturates at {format_rate(_served(b), 'requests')}."
    if not other.meets_slo and any(r.startswith("misses") for r in other.reasons):
        return f"{name} {', '.join(r for r in other.reasons if r.startswith('misses'))}."
    objective = question.request.objective
    shown: dict[str, tuple[str, Callable[[Plan], float], Callable[[float], str]]] = {
        "cost": ("cost per token", lambda plan: plan.score, format_usd if best.usd_per_h else format_count),
        "latency": ("median end-to-end latency", lambda plan: latency_s(plan.prediction), format_s),
        "energy": ("energy per output token", lambda plan: plan.score, format_j),
        "throughput": ("capacity", lambda plan: -plan.score, format_count),
    }
    label, value, text = shown[objective]
    x, y = value(best), value(other)
    if abs(y / x - 1) < 0.005:
        slower = f"median end-to-end {format_s(b['e2e_p50_s'])} against {format_s(a['e2e_p50_s'])}"
        return f"{name} has the same {label}, but {slower}."
    comparison = (
        f"{name} has {format_change(y / x - 1)} {label}"
        if 0.1 < y / x < 10
        else f"{name} has {y / x:,.2g} times the {label}"
    )
    gains = []
    if objective != "latency" and b["e2e_p50_s"] < 0.98 * a["e2e_p50_s"]:
        gains.append(f"median end-to-end {format_s(b['e2e_p50_s'])} against {format_s(a['e2e_p50_s'])}")
    if objective != "cost" and 0 < other.usd_per_h < 0.98 * best.usd_per_h:
        gains.append(f"{format_usd(other.usd_per_h)}/h against {format_usd(best.usd_per_h)}/h")
    better = f"; it is better at: {', '.join(gains)}" if gains else ""
    return f"{comparison} ({text(y)} against {text(x)}){better}."


def _served(prediction: Prediction) -> float:
    """Return the most requests a second that a saturated plan completes."""
    capacity = prediction.quantities.get("saturation_requests_per_s", prediction.quantities["requests_per_s"])
    return capacity.value


def _backends(question: Question, best: Plan, by_backend: dict[str, Plan]) -> list[str]:
    others = {b: p for b, p in by_backend.items() if b.startswith("deepspeed") != best.backend.startswith("deepspeed")}
    if not others:
        return []
    rival = min(others.values(), key=lambda p: p.rank)
    a, b = best.prediction, rival.prediction
    is_kept = rival.backend == "vllm" or path_of(rival.backend).is_maintained
    name = plan_text(rival) + ("" if is_kept else " (software without maintenance)")
    text = f"vLLM or DeepSpeed: the best of the other side is {name}; {duel(a, b).text('it')}"
    if "tpot_p50_s" in a.quantities and "tpot_p50_s" in b.quantities:
        text += f", TPOT P50 {format_s(b['tpot_p50_s'])} against {format_s(a['tpot_p50_s'])}"
    if rival.prediction.is_saturated and not a.is_saturated:
        text += f", and it saturates at {format_rate(_served(b), 'requests')}"
    return [text + "."]


def _unmaintained(best: Plan, by_backend: dict[str, Plan]) -> list[str]:
    """Return what is said of a faster path that ranks behind because nobody maintains it."""
    served = best.prediction["requests_per_s"]
    faster = [
        p
        for p in by_backend.values()
        if p.backend not in ("vllm", best.backend)
        and not path_of(p.backend).is_maintained
        and not p.prediction.is_saturated
        and p.prediction["requests_per_s"] > 1.05 * served
    ]
    return [
        f"{plan_text(p)} is predicted at {p.prediction['requests_per_s'] / served:.2f} times its requests/s, but ranks"
        " behind: nobody maintains that software."
        for p in faster
    ]


def why(
    question: Question, plans: Sequence[Plan], by_backend: dict[str, Plan], rejected: Sequence[Rejected]
) -> tuple[str, ...]:
    """Return why the first plan is first, against the runner-up and against the other backend."""
    if not plans:
        return ()
    best = plans[0]
    sentences = [_headline(question, best), *_capacity(question, best)]
    if best.backend != "vllm" and "vllm" not in by_backend:
        for r in [r for r in rejected if r.backend == "vllm" and not r.reason.startswith(("costs", "draws"))][:1]:
            nearest = f" Nearest that fits: {r.nearest}." if r.nearest else ""
            sentences.append(f"vLLM cannot run it here: {r.reason}.{nearest}")
    if not best.meets_slo and not best.prediction.is_saturated:
        sentences.append("No plan meets every target; this one comes closest: " + "; ".join(best.reasons) + ".")
    rivals = [p for p in plans[1:] if p.backend == best.backend]
    if rivals:
        sentences.append("Runner-up: " + _versus(question, best, rivals[0]))
    return tuple(sentences + _backends(question, best, by_backend) + _unmaintained(best, by_backend))


def accuracy(question: Question, best: Plan | None, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the errors on measured runs that were left out of the fit: overall and in the answer's own regimes.

    A regime without runs has no errors: `unmeasured` names it.
    """
    if best is None or best.backend != "vllm" or not report:
        return {}
    d, load = best.deployment, question.workload.load
    clients = load.concurrency if isinstance(load, ClosedLoad) else 0
    closed = "1 client" if clients == 1 else "2-16 clients" if clients <= 16 else "over 16 clients"
    pipeline = f" PP{d.pp}" if d.pp > 1 else ""
    wanted = {
        "gpu": d.gpu,
        "load": f"closed, {closed}" if clients else "open loop",
        "parallelism": f"TP{d.tp}{pipeline}",
        "weights": d.weight_dtype,
    }
    groups = report.get("by_regime", {})
    found = {f"{key}: {name}": groups[key][name] for key, name in wanted.items() if name in groups.get(key, {})}
    unmeasured = [f"{key}: {name}" for key, name in wanted.items() if name not in groups.get(key, {})]
    return {"overall": report.get("overall", {}), "regimes": found, "unmeasured": unmeasured}


def notes(question: Question, found: Found, best: Plan | None) -> tuple[Note, ...]:
    """Return what the answer rests on: assumptions of the request, range of the calibration, what was computed."""
    result = [*question.notes]
    request = question.request
    n = len(found.table.deployments)
    if n:
        result.append(
            Note(
                text=f"{n:,} vLLM deployments compared by the closed form, {found.n_simulated} simulated;"
                f" workload: {workload_text(question)}"
            )
        )
    if question.vllm is None and not request.backends:
        result.append(Note(level="warning", text="no fitted coefficients for vLLM: only DeepSpeed is compared"))
    if not request.weight_dtypes and question.model.quantization is None:
        own = shapes_of(question.model).native_weight_dtype
        result.append(Note(text=f"weights as published ({own}); --weight-dtype fp8,awq-int4 widens the search"))
    if question.slo.targets and not request.slo.targets:
        text = ", ".join(f"{t.name} <= {format_s(t.max_s)}" for t in question.slo.targets)
        result.append(Note(text=f"no targets given: {text} as in MLPerf's server scenario; see --slo, --slo none"))
    if question.is_open and not request.rate and "workload" not in request.model_fields_set:
        result.append(
            Note(text=f"no load given: the preset '{question.workload.name}' is used; see --rate, --concurrency")
        )
    return tuple(result)
