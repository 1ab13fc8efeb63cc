"""Audit: published claims, each with a verdict, our number and the source that it rests on."""

from __future__ import annotations

import streamlit as st

from advisor.schema import Interval
from advisor.schema.claims import AuditReport, Finding
from advisor.ui import call, parts, state
from advisor.ui.command import shell
from advisor.ui.text import plain, sentence, show

MARKS = {
    "consistent": ":green-badge[:material/check: consistent]",
    "implausible": ":orange-badge[:material/help: implausible]",
    "impossible": ":red-badge[:material/block: impossible]",
    "wrong": ":red-badge[:material/close: wrong]",
    "stale": ":orange-badge[:material/history: stale]",
    "undecided": ":gray-badge[:material/remove: undecided]",
}
PASTE = "paste my own"
TEMPLATE = """title = "My claims"

[setup]
model = "llama-3.1-8b"
gpu = "h100-sxm-80gb"
n_gpus = 1
backend = "vllm"

[[figures]]
id = "rate"
text = "40 requests/s with 512 prompt and 128 output tokens"
quantity = "requests_per_s"
value = 40
"""


def render() -> None:
    """Show the page."""
    st.title("Published claims, checked")
    files = call.claims_files()
    with st.sidebar:
        chosen = state.choice("claims", "Claims", (*files, PASTE), default=next(iter(files)))
    if chosen == PASTE:
        text = st.text_area(
            "Claims as TOML, in SI units",
            TEMPLATE,
            height=300,
            max_chars=call.MAX_CLAIMS_BYTES,
            key="claims_text",
            help="Fields and quantities are those of the files that come with the package; nothing of it is run.",
        )
        report = call.audit(text, "the pasted text")
    else:
        report = call.audit(files[chosen], chosen)
    _report(report)
    rows = [_row(f) for f in report.findings]
    parts.downloads(
        {
            "Verdicts (JSON)": ("audit.json", "application/json", report.model_dump_json(indent=1)),
            "Verdicts (CSV)": ("audit.csv", "text/csv", parts.to_csv(rows)),
        },
        "audit",
    )
    name = f"data/claims/{chosen}.toml" if chosen != PASTE else "claims.toml"
    parts.equal_command(shell(["advisor", "audit", name]))


def _report(report: AuditReport) -> None:
    st.markdown(f"**{plain(report.title)}**")
    verdicts = [v for v in MARKS if report.count(v)]  # type: ignore[arg-type]
    with st.container(horizontal=True):
        for verdict in verdicts:
            st.markdown(f"{MARKS[verdict]} {report.count(verdict)}", width="content")  # type: ignore[arg-type]
    wanted = state.several("verdicts", "Show only", verdicts, hint="all verdicts")
    for found in report.findings:
        if wanted and found.verdict not in wanted:
            continue
        with st.container(border=True):
            st.markdown(f"{MARKS[found.verdict]} **{plain(found.text)}**")
            st.markdown(sentence(found.why))
            st.caption("  \n".join(_details(found)))


def _details(found: Finding) -> list[str]:
    lines = []
    if found.claimed is not None:
        lines.append(f"Claimed: {_number(found.quantity, found.claimed)}")
    if found.ours is not None:
        lines.append(f"Ours, 90 % interval: {_number(found.quantity, found.ours)}")
    if found.scenario:
        lines.append(f"Holds for: {plain(found.scenario)}")
    return [*lines, f"Source: {plain(found.source)}"]


def _number(quantity: str, interval: Interval) -> str:
    value = plain(show(quantity, interval.value))
    if interval.low == interval.high:
        return value
    return f"{value} ({plain(show(quantity, interval.low))} to {plain(show(quantity, interval.high))})"


def _row(found: Finding) -> dict[str, object]:
    row: dict[str, object] = {"id": found.id, "claim": found.text, "verdict": found.verdict, "why": found.why}
    row["quantity"] = found.quantity
    for name, interval in (("claimed", found.claimed), ("ours", found.ours)):
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row | {"scenario": found.scenario, "source": found.source}
