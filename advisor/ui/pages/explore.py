"""Explore: one vLLM deployment under more and more load, and what its scheduler does over time."""

from __future__ import annotations

from typing import Any

import streamlit as st

from advisor.schema import Plan, Request
from advisor.ui import call, charts, inputs, parts, state
from advisor.ui.command import predict_words, shell
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


def render() -> None:
    """Show the page."""
    st.title("One deployment under load")
    request = inputs.scenario()
    chosen = _deployment()
    if not {"tp", "pp", "dp"} & set(chosen):
        chosen = _recommended(request) | chosen
    plan = call.predict(request, chosen)
    st.markdown(f"**{plain(charts.plan_name(plan))}**")
    parts.headline(plan.prediction.quantities, HEADLINE)
    parts.notes((*plan.notes, *plan.prediction.notes))
    points = _load(request, chosen)
    _timeline(request, chosen, plan)
    st.subheader("Every number taken apart")
    parts.taken_apart(plan)
    rows = [{"requests_per_s_offered": rate} | _flat(p) for rate, p in points]
    parts.downloads(
        {
            "Prediction (JSON)": ("prediction.json", "application/json", plan.model_dump_json(indent=1)),
            "Load curve (CSV)": ("load.csv", "text/csv", parts.to_csv(rows)),
        },
        "explore",
    )
    parts.equal_command(shell(predict_words(request, chosen)))
    parts.glossary("ttft", "tpot", "saturation", "kv", "mfu", "mbu", "tp", "pp", "dp", "interval")


def _deployment() -> dict[str, Any]:
    """Return the settings of the deployment that are not left to the engine."""
    with st.sidebar:
        st.markdown("**Deployment**")
        degrees = (AUTO, "1", "2", "4", "8", "16")
        found: dict[str, Any] = {}
        for column, key in zip(st.columns(3), ("tp", "pp", "dp"), strict=True):
            with column:
                picked = state.choice(
                    f"at_{key}", key.upper(), degrees, default=AUTO, help=f"{HELP[key]} All auto = as recommended."
                )
            if picked != AUTO:
                found[key] = int(picked)
        formats = (AUTO, *inputs.WEIGHTS)
        if (picked := state.choice("at_weights", "Weights", formats, default=AUTO)) != AUTO:
            found["weight_dtype"] = picked
        for key, title in (("max_num_seqs", "Running requests"), ("max_num_batched_tokens", "Tokens a step")):
            value = state.maybe_whole(
                f"at_{key}",
                f"{title} at most",
                high=10**6,
                hint="engine's own",
                help=f"vLLM's {key.replace('_', '-')}.",
            )
            if value is not None:
                found[key] = value
    return found


def _recommended(request: Request) -> dict[str, Any]:
    """Return the parallel degrees of the best vLLM plan, nothing where there is none: then the engine's apply."""
    best = call.recommend(request).best_by_backend.get("vllm")
    return {key: getattr(best.deployment, key) for key in ("tp", "pp", "dp")} if best else {}


def _flat(plan: Plan) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, q in plan.prediction.quantities.items():
        found |= {name: q.value, f"{name}_low": q.low, f"{name}_high": q.high}
    return found


def _load(request: Request, chosen: dict[str, Any]) -> list[tuple[float, Plan]]:
    st.subheader("Latency against load")
    most, points = call.load_curve(request, chosen)
    values = [(rate, p.prediction.quantities) for rate, p in points]
    for names in (("ttft_p99_s", "ttft_p50_s"), ("tpot_p99_s", "tpot_p50_s")):
        metric = names[0].split("_", 1)[0].upper()
        parts.chart(
            charts.curves(values, names, "offered_requests_per_s", call.targets(request)),
            names[0],
            f"{metric} against the load",
        )
    st.caption(
        "Each mark is a simulation with Poisson arrivals; bands are 90 % intervals. The right end is 97 % of what this"
        f" deployment completes at most, {show('saturation_requests_per_s', most)}."
    )
    return points


def _timeline(request: Request, chosen: dict[str, Any], plan: Plan) -> None:
    st.subheader("What the scheduler does over time")
    found = call.timeline(request, chosen)
    times = [at for at, _, _, _ in found.samples]
    lines = {"running": [r for _, r, _, _ in found.samples], "waiting": [w for _, _, w, _ in found.samples]}
    parts.chart(charts.over_time(times, lines, "requests"), "queue", "Requests that run and that wait, over time")
    blocks = {"in use": [b for _, _, _, b in found.samples], "there are": [found.n_kv_blocks] * len(times)}
    parts.chart(charts.over_time(times, blocks, "KV blocks"), "blocks", "KV blocks in use over time")
    if plan.deployment.dp > 1:
        st.caption(f"One of the {plan.deployment.dp} replicas, with its share of the load.")
