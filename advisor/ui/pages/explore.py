"""Explore: one vLLM deployment under more and more load, under the roofline, and what its scheduler does over time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import streamlit as st

from advisor.recommend.look import Look
from advisor.schema import Plan, Request
from advisor.schema.roofline import OperatingPoint, Roofline
from advisor.ui import call, charts, charts_plans, inputs, parts, state
from advisor.ui.command import predict_words, shell, simulate_words
from advisor.ui.text import HELP, plain, show

AUTO = "auto"
HEADLINE = (
    "ttft_p99_s",
    "tpot_p99_s",
    "saturation_requests_per_s",
    "kv_occupancy_frac",
    "mfu_frac",
    "mbu_frac",
    "board_power_w",
    "output_tokens_per_s",
    "kv_cache_tokens",
)
RECOMMENDED = ("tp", "pp", "dp", "weight_dtype", "kv_dtype", "max_num_seqs", "max_num_batched_tokens")
"""Settings that come from the best plan where the user leaves all degrees on auto."""
BATCHES = tuple(2**n for n in range(11))
STEPS = tuple(2**n for n in range(9, 16))


def render() -> None:
    """Show the page."""
    st.title("One deployment under load")
    request = inputs.scenario(has_sliders=True)
    chosen = _deployment()
    if not {"tp", "pp", "dp"} & set(chosen):
        chosen = _recommended(request, chosen) | chosen
    plan = call.predict(request, chosen)
    st.markdown(f"**{plain(charts.plan_name(plan))}**")
    parts.serving_headline(plan.prediction, HEADLINE)
    parts.notes((*plan.notes, *plan.prediction.notes))
    found = call.look(request, chosen)
    _roofline(found.roofline, plan)
    points = _load(request, chosen, plan)
    _timeline(found, plan)
    st.subheader("Every number taken apart")
    parts.taken_apart(plan)
    rows = [{"requests_per_s_offered": rate} | _flat(p) for rate, p in points]
    parts.downloads(
        {
            "Prediction (JSON)": ("prediction.json", "application/json", plan.model_dump_json(indent=1)),
            "Roofline and timeline (JSON)": ("look.json", "application/json", found.model_dump_json(indent=1)),
            "Load curve (CSV)": ("load.csv", "text/csv", parts.to_csv(rows)),
        },
        "explore",
    )
    parts.glossary(
        *("ttft", "tpot", "saturation", "kv", "prefill", "decode", "roofline", "intensity", "mfu", "mbu"),
        *("tp", "pp", "dp", "interval", *parts.OF_A_STEP),
    )
    both = (predict_words(request, chosen), simulate_words(request, chosen))
    about = "The first line gives the numbers, the second the timeline and the roofline."
    parts.equal_command("\n".join(shell(words) for words in both), about)


def _deployment() -> dict[str, Any]:
    """Return the settings of the deployment that are not left to the engine."""
    with st.sidebar:
        st.markdown("**Deployment**")
        found: dict[str, Any] = {}
        degrees = (AUTO, "1", "2", "4", "8", "16")
        every = f"{HELP['tp']} All of TP, PP and DP on auto = as recommended."
        picked = {"tp": state.stop("at_tp", "TP [GPUs]", degrees, default=AUTO, help=every)}
        for column, key in zip(st.columns(2), ("pp", "dp"), strict=True):
            with column:
                unit = "stages" if key == "pp" else "replicas"
                title = f"{key.upper()} [{unit}]"
                picked[key] = state.choice(f"at_{key}", title, degrees, default=AUTO, help=HELP[key])
        found |= {key: int(value) for key, value in picked.items() if value != AUTO}
        formats = (AUTO, *inputs.WEIGHTS)
        text = "Precision of the weights; auto = as published, or as recommended."
        if (weights := state.stop("at_weights", "Weights", formats, default=AUTO, help=text)) != AUTO:
            found["weight_dtype"] = weights
        caches = (AUTO, "bf16", "fp8")
        if (cache := state.segments("at_kv", "KV cache", caches, default=AUTO, help=HELP["kv"])) != AUTO:
            found["kv_dtype"] = cache
        numbers = (
            ("max_num_seqs", "Batch: running requests at most", BATCHES),
            ("max_num_batched_tokens", "Tokens a step at most", STEPS),
        )
        for key, title, stops in numbers:
            text = f"vLLM's {key.replace('_', '-')}; auto = as recommended, or the engine's own."
            value = state.maybe_stop(f"at_{key}", title, stops, hint=AUTO, help=text)
            if value is not None:
                found[key] = value
    return found


def _recommended(request: Request, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the best vLLM plan, nothing where there is none: then the engine's apply."""
    best = call.plans(request).best_by_backend.get("vllm")
    if best is None:
        return {}
    left_out = {"kv_dtype"} if "weight_dtype" in chosen else set()
    return {key: getattr(best.deployment, key) for key in RECOMMENDED if key not in left_out}


def _flat(plan: Plan) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, q in plan.prediction.quantities.items():
        found |= {name: q.value, f"{name}_low": q.low, f"{name}_high": q.high}
    return found


def limit_of(point: OperatingPoint, found: Roofline) -> str:
    """Return what limits a step, in words."""
    if point.is_host_bound:
        return "the host that launches it"
    return "memory bandwidth" if point.flops_per_byte < found.ridge_flops_per_byte else "arithmetic"


def _roofline(found: Roofline, plan: Plan) -> None:
    st.subheader("Under the roofline of the card", help=HELP["roofline"])
    name = call.card_limit(plan.deployment.gpu)[0].split(":")[0]
    text = "Operations a second against operations per byte: prefill, decode and the whole run under the card's roof"
    parts.chart(charts_plans.roofline(found, name), "roofline", text)
    rows = [
        {
            "phase": p.name,
            "step": p.what,
            "limited by": "waiting too" if p.name == "whole run" else limit_of(p, found),
            "FLOP/byte": p.flops_per_byte,
            "one GPU": p.flops_per_s,
            "of peak": p.flops_per_s / found.peak_flops_per_s,
            "of bandwidth": p.flops_per_s / p.flops_per_byte / found.memory_bandwidth_bytes_per_s,
        }
        for p in found.points
    ]
    formats: dict[str, Callable[[Any], str]] = {
        "FLOP/byte": "{:.3g}".format,
        "one GPU": partial(show, "flops_per_s"),
        "of peak": "{:.0%}".format,
        "of bandwidth": "{:.0%}".format,
    }
    parts.table(rows, formats, "phases")
    st.caption(
        f"Left of {found.ridge_flops_per_byte:.0f} operations a byte the card waits for its memory, right of it for its"
        " arithmetic. The small marks are shorter or longer prompts (16 tokens to the step's budget) and smaller or"
        " larger batches (one sequence to the most that run together), each at full clock."
    )


def _load(request: Request, chosen: dict[str, Any], plan: Plan) -> list[tuple[float, Plan]]:
    st.subheader("Latency against load")
    most = plan.prediction["saturation_requests_per_s"]
    points = call.load_curve(request, chosen, most)
    values = [(rate, p.prediction.quantities) for rate, p in points]
    offered = call.offered_rate(request)
    now = offered if offered is not None and offered < most else None
    for names in (("ttft_p99_s", "ttft_p50_s"), ("tpot_p99_s", "tpot_p50_s")):
        metric = names[0].split("_", 1)[0].upper()
        parts.chart(
            charts.curves(values, names, "offered_requests_per_s", call.targets(request), now),
            names[0],
            f"{metric} against the load",
        )
    st.caption(
        "Each mark is a simulation with Poisson arrivals; bands are 90 % intervals. The right end is 97 % of what this"
        f" deployment completes at most, {show('saturation_requests_per_s', most)}."
    )
    return points


def _timeline(found: Look, plan: Plan) -> None:
    st.subheader("What the scheduler does over time")
    times = [at for at, _, _, _ in found.samples]
    lines = {"running": [r for _, r, _, _ in found.samples], "waiting": [w for _, _, w, _ in found.samples]}
    parts.chart(charts.over_time(times, lines, "requests"), "queue", "Requests that run and that wait, over time")
    blocks = {"in use": [b for _, _, _, b in found.samples], "available": [found.n_kv_blocks] * len(times)}
    title = f"KV cache [blocks of {found.kv_block_tokens} tokens]"
    parts.chart(charts.over_time(times, blocks, title), "blocks", "KV blocks in use over time")
    if plan.deployment.dp > 1:
        st.caption(f"One of the {plan.deployment.dp} replicas, with its share of the load.")
