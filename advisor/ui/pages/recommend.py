"""Recommend: the best plan for a scenario, what it is up against, and what to run."""

from __future__ import annotations

from functools import partial

import streamlit as st

from advisor.errors import AdvisorError
from advisor.recommend.form import settled
from advisor.schema import Note, Plan, Recommendation, Rejected, Request
from advisor.ui import accuracy, call, charts, charts_plans, inputs, parts, state
from advisor.ui.artefacts import artefacts
from advisor.ui.command import predict_words, recommend_words, shell
from advisor.ui.text import BACKENDS, HELP, clause, label, plain, sentence, show

HEADLINE = (
    "usd_per_million_output_tokens",
    "ttft_p99_s",
    "tpot_p99_s",
    "output_tokens_per_s",
    "board_power_w",
    "saturation_requests_per_s",
)
MAX_REASONS = 12
NONE_KEEPS = "No plan keeps every target; this one comes nearest."
COSTS = ("usd_per_million_output_tokens", "usd_per_h", "energy_j_per_output_token", "board_power_w")
THIRDS, ENGINE = ("energy_j_per_output_token", "board_power_w", "output_tokens_per_s"), "engine"
ZERO_INFERENCE, ON_GPU, IN_HOST = "deepspeed-zero-inference", "on the GPU", "in host memory"
LATENCIES = ("tpot_p99_s", "ttft_p99_s", "e2e_p99_s", "tpot_p50_s", "ttft_p50_s", "e2e_p50_s")


def render() -> None:
    """Show the page."""
    st.title("What to run on the GPUs you have")
    inputs.examples()
    request = inputs.scenario()
    answer, missing = call.recommend(request)
    commands = [shell(recommend_words(request))]
    if answer.best is None:
        _nothing_fits(answer)
    else:
        _best(answer, answer.best, request)
        _cloud(answer, request)
        if words := _ranked(answer, missing, request):
            commands.append(shell(words))
    _rejected(answer.rejected)
    parts.downloads(
        {
            "Answer (JSON)": ("recommendation.json", "application/json", partial(call.answer_json, request)),
            "Plans (CSV)": ("plans.csv", "text/csv", partial(parts.plans_csv, answer.plans)),
        },
        "recommend",
    )
    parts.glossary(
        *("ttft", "tpot", "e2e", "slo", "pareto", "tp", "pp", "dp", "kv", *parts.OFF_GPU_TERMS, "method", "interval"),
        *parts.OF_A_STEP,
    )
    parts.equal_command("\n".join(commands))


def _nothing_fits(answer: Recommendation) -> None:
    st.error(f"No plan runs {plain(answer.model)} on {plain(answer.gpus)}. The reasons are below, with what would fit.")
    parts.notes(answer.notes)


MISSED = {
    False: ":orange-badge[:material/warning: misses a target]",
    True: ":orange-badge[:material/warning: overload]",
}
"""Marks of a plan that does not keep the targets, by whether more arrives than it serves."""


def title_of(plan: Plan) -> str:
    """Return a plan's engine and shape as one line of Markdown, with a mark where it does not keep the targets."""
    mark = "" if plan.meets_slo else f" {MISSED[plan.prediction.is_saturated]}"
    return f"**{plain(charts.plan_name(plan))}**{mark}"


def _best(answer: Recommendation, best: Plan, request: Request) -> None:
    version = f" (release {best.deployment.engine_version})" if best.backend == "vllm" else ""
    st.markdown(
        f"Best plan for **{plain(answer.model)}** on **{plain(answer.gpus)}**: {title_of(best)}{plain(version)}"
    )
    parts.serving_headline(best.prediction, HEADLINE)
    parts.command(best.command, "best")
    targets = ", ".join(f"{label(f'{t.name}_s')} at most {show('s', t.max_s)}" for t in call.targets(request).targets)
    assumed = "" if request.slo.targets else " (assumed, as none is set)"
    st.caption(f"Latency targets: {targets or 'none'}{assumed}.")
    missed = () if best.meets_slo else (Note(level="warning", text=NONE_KEEPS),)
    named = (Note(text=answer.model_note),) if answer.model_note else ()
    parts.notes((*missed, *answer.notes, *best.notes, *best.prediction.notes, *named))


def _cloud(answer: Recommendation, request: Request) -> None:
    st.subheader("Cost against latency, and energy")
    known = {name for p in answer.plans for name in settled(p.prediction)}
    costs, latencies = [n for n in COSTS if n in known], [n for n in LATENCIES if n in known]
    if not latencies:
        return
    left, middle, right = st.columns(3)
    with left:
        x = state.named("x", "Across", costs, label, help="Of the horizontal axis.")
    with middle:
        y = state.named("y", "Up", latencies, label, help="Of the vertical axis.")
    with right:
        thirds = [n for n in THIRDS if n in known] + [ENGINE]
        text = "A third axis; low is blue, high is orange."
        third = state.named("third", "Colour", thirds, lambda n: "Engine" if n == ENGINE else label(n), help=text)
    parts.chart(
        charts_plans.pareto(answer.plans, x, y, call.targets(request), "" if third == ENGINE else third),
        "pareto",
        f"Plans by {label(x)} and {label(y)}; shape tells the engine, colour {third.replace('_', ' ')}",
    )
    st.caption(
        "The shape tells the engine; grey: the colour's quantity is not known. Large marks are on the Pareto front: no"
        " other plan beats them in cost, median latency and energy at once. Open marks miss a target, whiskers are 90 %"
        " intervals, dashed lines are the targets of the sliders."
    )


def _ranked(answer: Recommendation, missing: str, request: Request) -> list[str]:
    """Show all plans and one of them in full; return the command of that one where the search's is not its."""
    st.subheader("Ranked plans")
    rows, formats = parts.plan_rows(answer.plans)
    parts.table(rows, formats, "ranked", parts.PLANS_PX)
    parts.reasons(answer.why, answer.flips, missing, "Why this plan")
    accuracy.beside(answer.accuracy)
    ranks = [str(p.rank) for p in answer.plans]
    st.subheader("A plan taken apart")
    chosen = state.choice("plan", "Plan, by its rank in the table", ranks, default=ranks[0], help="1 is the best.")
    plan = next(p for p in answer.plans if str(p.rank) == chosen)
    words: list[str] = []
    told = (*plan.notes, *plan.prediction.notes)
    if plan.backend == ZERO_INFERENCE:
        plan, words = _cache_moved(plan, request)
    st.markdown(title_of(plan))
    if words:
        parts.serving_headline(plan.prediction, HEADLINE)
    parts.taken_apart(plan)
    if words:
        parts.notes(n for n in (*plan.notes, *plan.prediction.notes) if n not in told)
    if plan.reasons:
        st.markdown("\n".join(f"- {sentence(r)}" for r in plan.reasons))
    artefacts(plan, answer.request)
    return words


def _cache_moved(plan: Plan, request: Request) -> tuple[Plan, list[str]]:
    """Return a ZeRO-Inference plan, and [], or the same with its KV cache where the user wants it, and its command."""
    place = state.segments("cache", "KV cache", (ON_GPU, IN_HOST), default=ON_GPU, help=HELP["kv_offload"])
    if place == ON_GPU:
        return plan, []
    # the batch is left out: the largest that fits with the cache moved is taken
    kept = {name: getattr(plan.deployment, name) for name in ("backend", "tp", "dp", "weight_dtype", "offload")}
    chosen = kept | {"kv_offload": "cpu"}
    try:
        return call.predict(request, chosen), predict_words(request, chosen)
    except AdvisorError as error:
        st.error(call.said(error))
        return plan, []


def _rejected(rejected: tuple[Rejected, ...]) -> None:
    lines = []
    for r in rejected[:MAX_REASONS]:
        where = plain(f"{BACKENDS.get(r.backend, r.backend)} · {charts.layout(r.deployment)}")
        others = f" and {r.count - 1:,} more" if r.count > 1 else ""
        nearest = f" What would fit: {clause(r.nearest)}." if r.nearest else ""
        lines.append(f"**{where}**{others}: {clause(r.reason)}.{nearest}")
    if len(rejected) > MAX_REASONS:
        lines.append(f"{len(rejected) - MAX_REASONS} further reasons are in the JSON file.")
    parts.listed("Why not the others", lines)
