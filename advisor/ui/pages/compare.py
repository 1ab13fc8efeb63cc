"""Compare: the best plan of vLLM and the best of DeepSpeed for one scenario, side by side, number by number."""

from __future__ import annotations

import difflib
import json
import shlex
from functools import partial
from typing import Any

import streamlit as st

from advisor.recommend.duel import duel
from advisor.recommend.form import settled
from advisor.schema import Plan, Recommendation, Request
from advisor.ui import call, charts, inputs, parts, state
from advisor.ui.command import compare_words, recommend_words, shell
from advisor.ui.text import BACKENDS, clause, label, part_name, plain, show, show_range

NUMBERS = (
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "requests_per_s",
    "output_tokens_per_s",
    "usd_per_million_output_tokens",
    "usd_per_h",
    "board_power_w",
    "energy_j_per_output_token",
    "memory_bytes_per_gpu",
    "host_memory_bytes_per_gpu",
    "kv_cache_tokens",
)
TITLES = {"usd_per_million_output_tokens": "$ per 1M output"}
ENGINES = {"vllm": "vLLM", "deepspeed": "DeepSpeed"}
"""How the names of backends begin, with whose they are."""
BETTER = ":green-badge[:material/check: better here]"
NO_WINNER = ":gray-badge[:material/drag_handle: ranked first, but the intervals leave no winner]"
MAX_REASONS = 5
HEADLINE = ("usd_per_million_output_tokens", "tpot_p99_s", "ttft_p99_s", "output_tokens_per_s")


def render() -> None:
    """Show the page."""
    st.title("vLLM or DeepSpeed")
    request = inputs.scenario()
    answer, rest = call.recommend(request)
    found = sides(answer)
    if not found:
        st.error(f"Neither engine runs {plain(answer.model)} on {plain(answer.gpus)}.")
    _side_by_side(found, answer, request)
    if found:
        _numbers(found)
        _memory(found)
        parts.reasons(answer.why, answer.flips, rest)
        _diff(answer, found)
    parts.downloads(
        {
            "Answer (JSON)": ("comparison.json", "application/json", partial(call.answer_json, request)),
            "Plans (CSV)": ("comparison.csv", "text/csv", partial(parts.plans_csv, found)),
        },
        "compare",
    )
    is_narrowed = request.backends or request.weight_dtypes
    parts.glossary("ttft", "tpot", "tp", "dp", "kv", *parts.OFF_GPU_TERMS, "interval", *parts.OF_A_STEP)
    parts.equal_command(shell(recommend_words(request) if is_narrowed else compare_words(request)))


def sides(answer: Recommendation) -> list[Plan]:
    """Return the best plan of vLLM and the best of DeepSpeed, where there are such plans, the better one first."""
    ranked = sorted(answer.best_by_backend.values(), key=lambda p: p.rank)
    best = [next((p for p in ranked if p.backend.startswith(name)), None) for name in ("vllm", "deepspeed")]
    return sorted((p for p in best if p is not None), key=lambda p: p.rank)


def _side_by_side(found: list[Plan], answer: Recommendation, request: Request) -> None:
    """Show a card an engine, the better one first; one without a plan says why it has none."""
    names = [next(name for name in ENGINES if p.backend.startswith(name)) for p in found]
    columns = st.columns(len(ENGINES))
    for column, plan in zip(columns, found, strict=False):
        with column, st.container(border=True):
            mark = _mark(plan, found, answer)
            st.subheader(BACKENDS.get(plan.backend, plan.backend), anchor=False)
            kept = "keeps the targets" if plan.meets_slo else "misses a target"
            kept = "overload: more arrives than it can serve" if plan.prediction.is_saturated else kept
            with st.container(key=f"state-{names[found.index(plan)]}"):
                st.markdown(f"{mark}{plain(charts.layout(plan.deployment))}; {kept}")
            parts.serving_headline(plan.prediction, HEADLINE, n_columns=2, titles=TITLES)
            parts.command(plan.command, plan.backend)
            parts.notes((*plan.notes, *(n for n in plan.prediction.notes if n.level != "info")))
    for column, name in zip(columns[len(found) :], (n for n in ENGINES if n not in names), strict=True):
        with column, st.container(border=True):
            st.subheader(ENGINES[name], anchor=False)
            is_asked = not request.backends or any(backend.startswith(name) for backend in request.backends)
            if not is_asked:
                st.markdown("Only the engines chosen in the side bar are compared.")
                continue
            st.markdown("No plan of it runs this:")
            why = [r for r in answer.rejected if r.backend.startswith(name)][:MAX_REASONS]
            lines = [f"- {plain(BACKENDS.get(r.backend, r.backend))}: {clause(r.reason)}" for r in why]
            st.markdown("\n".join(lines))


def _mark(plan: Plan, found: list[Plan], answer: Recommendation) -> str:
    """Return the badge of the better side, or of the one ranked first where the intervals leave no winner."""
    if len(found) < 2 or answer.best is None or plan.rank != answer.best.rank:
        return ""
    is_tie = found[0].meets_slo == found[1].meets_slo and duel(found[0].prediction, found[1].prediction).is_tie
    return f"{NO_WINNER if is_tie else BETTER} "


def _numbers(found: list[Plan]) -> None:
    st.subheader("Number by number, with 90 % intervals")
    rows = []
    for name in NUMBERS:
        # nothing in host memory is no row; what is not known is none either
        if any(q.value for p in found if (q := p.prediction.quantities.get(name)) is not None):
            row = {"quantity": label(name)}
            for plan in found:
                row[BACKENDS[plan.backend]] = _cell(name, plan)
            rows.append(row)
    parts.text_table(rows, "numbers")


def _cell(name: str, plan: Plan) -> str:
    found = settled(plan.prediction).get(name)
    if found is None:
        return "no bound: overload" if name in plan.prediction.quantities else ""
    value = show(name, found.value)
    return value if found.low == found.high else f"{value} ({show_range(name, found)})"


def _memory(found: list[Plan]) -> None:
    bars = {BACKENDS[p.backend]: b for p in found for b in p.prediction.breakdowns if b.unit == "bytes"}
    if bars:
        st.subheader("Memory of one GPU")
        parts.chart(
            charts.stacked(bars, limit=call.card_limit(found[0].deployment.gpu)),
            "memory",
            "Memory by purpose and engine",
        )
    for plan in found:
        steps = {part_name(b.name): b for b in plan.prediction.breakdowns if "step" in b.name and b.unit == "s"}
        if steps:
            st.subheader(f"One decode step, {BACKENDS[plan.backend]}")
            parts.chart(charts.stacked(steps), f"step-{plan.backend}", "Parts of a decode step")


def _diff(answer: Recommendation, found: list[Plan]) -> None:
    """Show two plans of the answer, any two, as the difference of their configurations."""
    st.subheader("Two plans' configurations")
    plans = {f"{p.rank}. {charts.plan_name(p)}": p for p in answer.plans}
    names = list(plans)
    if len(names) < 2:
        st.caption("There is one plan only.")
        return
    first = next(n for n, p in plans.items() if p.rank == found[0].rank)
    other = next((n for n, p in plans.items() if len(found) > 1 and p.rank == found[1].rank), "")
    second = other or next(n for n in names if n != first)
    left, right = st.columns(2)
    with left:
        a = plans[state.choice("a", "Plan A", names, default=first, help="Any plan of the answer.")]
    with right:
        b = plans[state.choice("b", "Plan B", names, default=second, help="Any plan of the answer.")]
    with st.container(key="two-plans"):
        _two_plans(a, b)


def _two_plans(a: Plan, b: Plan) -> None:
    if a.rank == b.rank:
        st.info("Plans A and B are the same; choose another one.")
        return
    fields = [p.deployment.model_dump(mode="json") for p in (a, b)]
    rows = [
        {"setting": key.replace("_", " "), "plan A": _text(fields[0][key]), "plan B": _text(fields[1][key])}
        for key in fields[0]
        if fields[0][key] != fields[1][key]
    ]
    parts.text_table(rows, "settings", parts.FILE_PX)
    diff = config_diff(a, b)
    st.code(diff, language="diff", wrap_lines=True, height=parts.FILE_PX)
    parts.downloads({"Difference": ("plans.diff", "text/x-diff", diff)}, "diff")


def config_diff(a: Plan, b: Plan) -> str:
    """Return the launch commands and settings of two plans as a unified diff, one flag or setting a line."""
    texts: list[list[str]] = []
    for plan in (a, b):
        words = shlex.split(plan.command)
        lines: list[str] = []
        for word in words:
            is_value = lines and lines[-1].startswith("  --") and " " not in lines[-1].strip() and word[:2] != "--"
            if is_value:
                lines[-1] += f" {shlex.quote(word)}"
            else:
                lines.append(f"  {shlex.quote(word)}" if lines else shlex.quote(word))
        settings = json.dumps(plan.deployment.model_dump(mode="json"), indent=1).splitlines()
        texts.append([*lines, "", *settings])
    first, second = (f"plan {p.rank}: {charts.plan_name(p)}" for p in (a, b))
    return "\n".join(difflib.unified_diff(texts[0], texts[1], first, second, n=1, lineterm=""))


def _text(value: Any) -> str:
    return "yes" if value is True else "no" if value is False else "" if value is None else str(value)
