"""Compare: the best plan of vLLM and the best of DeepSpeed for one scenario, side by side, number by number."""

from __future__ import annotations

from typing import Any

import streamlit as st

from advisor.schema import Interval, Plan, Recommendation
from advisor.ui import call, charts, inputs, parts
from advisor.ui.command import compare_words, recommend_words, shell
from advisor.ui.text import BACKENDS, label, part_name, plain, show, show_range

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
    "kv_cache_tokens",
)
TITLES = {"usd_per_million_output_tokens": "$ per 1M output"}
HEADLINE = ("usd_per_million_output_tokens", "tpot_p99_s", "ttft_p99_s", "output_tokens_per_s")


def render() -> None:
    """Show the page."""
    st.title("vLLM or DeepSpeed")
    request = inputs.scenario()
    if request.backends:
        st.info("Only the engines chosen in the side bar are compared.")
    answer = call.recommend(request)
    found = sides(answer)
    if not found:
        st.error(f"Neither engine runs {plain(answer.model)} on {plain(answer.gpus)}.")
        _reasons(answer, ("vllm", "deepspeed"))
    else:
        _side_by_side(found, answer)
        missing = [name for name in ("vllm", "deepspeed") if not any(p.backend.startswith(name) for p in found)]
        _reasons(answer, missing)
        _numbers(found)
        _memory(found)
        _settings(found)
        parts.sentences("Why", answer.why)
        parts.sentences("What would change the answer", answer.flips)
    parts.downloads(
        {
            "Answer (JSON)": ("comparison.json", "application/json", call.answer_json(answer)),
            "Plans (CSV)": ("comparison.csv", "text/csv", parts.plans_csv(found)),
        },
        "compare",
    )
    is_narrowed = request.backends or request.weight_dtypes
    parts.equal_command(shell(recommend_words(request) if is_narrowed else compare_words(request)))
    parts.glossary("ttft", "tpot", "tp", "dp", "kv", "interval")


def sides(answer: Recommendation) -> list[Plan]:
    """Return the best plan of vLLM and the best of DeepSpeed, where there are such plans, the better one first."""
    ranked = sorted(answer.best_by_backend.values(), key=lambda p: p.rank)
    best = [next((p for p in ranked if p.backend.startswith(name)), None) for name in ("vllm", "deepspeed")]
    return sorted((p for p in best if p is not None), key=lambda p: p.rank)


def _side_by_side(found: list[Plan], answer: Recommendation) -> None:
    for column, plan in zip(st.columns(len(found)), found, strict=True):
        with column, st.container(border=True):
            is_best = answer.best is not None and plan.rank == answer.best.rank
            mark = ":green-badge[:material/check: better here]" if is_best and len(found) > 1 else ""
            st.subheader(BACKENDS.get(plan.backend, plan.backend), anchor=False)
            kept = "keeps the targets" if plan.meets_slo else "misses a target"
            st.markdown(f"{mark} {plain(charts.layout(plan.deployment))}; {kept}".strip())
            parts.headline(plan.prediction.quantities, HEADLINE, n_columns=2, titles=TITLES)
            st.code(plan.command, language="bash", wrap_lines=True)
            parts.notes((*plan.notes, *(n for n in plan.prediction.notes if n.level != "info")))


def _reasons(answer: Recommendation, missing: tuple[str, ...] | list[str]) -> None:
    for name in missing:
        why = [r for r in answer.rejected if r.backend.startswith(name)]
        lines = [f"{BACKENDS.get(r.backend, r.backend)}: {r.reason}" for r in why[:5]]
        parts.sentences(f"Why nothing from {'vLLM' if name == 'vllm' else 'DeepSpeed'}", lines)


def _numbers(found: list[Plan]) -> None:
    st.subheader("Number by number, with 90 % intervals")
    rows = []
    for name in NUMBERS:
        cells = [p.prediction.quantities.get(name) for p in found]
        if any(cells):
            row: dict[str, Any] = {"quantity": label(name)}
            for plan, cell in zip(found, cells, strict=True):
                row[BACKENDS[plan.backend]] = _cell(name, cell)
            rows.append(row)
    parts.table(rows, {}, "numbers")


def _cell(name: str, found: Interval | None) -> str:
    if found is None:
        return ""
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


def _settings(found: list[Plan]) -> None:
    if len(found) < 2:
        return
    st.subheader("What differs between the two configurations")
    fields = [p.deployment.model_dump(mode="json") for p in found]
    rows = [
        {"setting": key} | {BACKENDS[p.backend]: str(f[key]) for p, f in zip(found, fields, strict=True)}
        for key in fields[0]
        if len({str(f[key]) for f in fields}) > 1
    ]
    parts.table(rows, {}, "settings")
