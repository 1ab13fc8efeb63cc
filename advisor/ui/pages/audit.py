"""Audit: published claims, each with a verdict, our number and the source that it rests on."""

from __future__ import annotations

import json

import streamlit as st

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.schema import Interval
from advisor.schema.claims import AuditReport, Finding
from advisor.ui import call, inputs, parts, state
from advisor.ui.command import shell
from advisor.ui.text import BACKENDS, HELP, clause, plain, sentence, show
from advisor.units import GB, MS

MARKS = {
    "consistent": ":green-badge[:material/check: consistent]",
    "implausible": ":orange-badge[:material/help: implausible]",
    "impossible": ":red-badge[:material/block: impossible]",
    "wrong": ":red-badge[:material/close: wrong]",
    "stale": ":orange-badge[:material/history: stale]",
    "undecided": ":gray-badge[:material/remove: undecided]",
}
PASTE, ONE, ANY, EVERY = "paste my own", "one figure", "not said", "all claims"
FIGURES: dict[str, tuple[str, float]] = {
    "Requests per second": ("requests_per_s", 1.0),
    "Output tokens per second": ("output_tokens_per_s", 1.0),
    "TTFT P50 [ms]": ("ttft_p50_s", MS),
    "TTFT P99 [ms]": ("ttft_p99_s", MS),
    "TPOT P50 [ms]": ("tpot_p50_s", MS),
    "TPOT P99 [ms]": ("tpot_p99_s", MS),
    "E2E P99 [ms]": ("e2e_p99_s", MS),
    "P99 latency, of what is not said [ms]": ("latency_p99_s", MS),
    "Memory of one GPU [GB]": ("memory_bytes_per_gpu", GB),
    "Board power, all GPUs [W]": ("board_power_w", 1.0),
    "Board power, one GPU [W]": ("board_power_w_per_gpu", 1.0),
}
"""What can be claimed in one figure: its quantity and its unit in SI."""
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
        text = "A publication that comes with the package, one figure of your own, or a claims file as text."
        chosen = state.choice("claims", "Claims", (*files, ONE, PASTE), default=next(iter(files)), help=text)
    if chosen == PASTE:
        with st.sidebar:
            text = st.text_area(
                "Claims as TOML, in SI units",
                TEMPLATE,
                height=360,
                max_chars=call.MAX_CLAIMS_BYTES,
                key="claims_text",
                help="Fields and quantities are those of the files that come with the package; nothing of it is run.",
            )
            st.caption("Pasted text is the one thing that the link to this page does not hold.")
        report = call.audit(text, "the pasted text")
    elif chosen == ONE:
        text = _one_figure()
        report = call.audit(text, "your figure")
    else:
        text = files[chosen]
        report = call.audit(text, chosen)
    shown = _summary(report)
    rows = [_row(f) for f in report.findings]
    parts.downloads(
        {
            "Verdicts (JSON)": ("audit.json", "application/json", report.model_dump_json(indent=1)),
            "Verdicts (CSV)": ("audit.csv", "text/csv", parts.to_csv(rows)),
            "The claims (TOML)": ("claims.toml", "application/toml", text),
        },
        "audit",
    )
    name = f"data/claims/{chosen}.toml" if chosen in files else "claims.toml"
    about = "" if chosen in files else "With the claims as the last button saves them."
    parts.equal_command(shell(["advisor", "audit", name]), about)
    # last: there are as many as one asks for
    for found in shown:
        with st.container(border=True, key=f"claim-card-{report.findings.index(found)}-{found.id}"):
            st.markdown(f"{MARKS[found.verdict]} **{plain(found.text)}**")
            st.markdown(sentence(found.why))
            st.caption("  \n".join(_details(found)))


def _one_figure() -> str:
    """Return a claims file with the one figure that the fields describe."""
    with st.sidebar:
        title = state.choice(
            "figure", "What was claimed", tuple(FIGURES), default=next(iter(FIGURES)), help="The kind."
        )
        quantity, unit = FIGURES[title]
        value = state.number("value", "How much", default=40.0, low=1e-6, high=1e12, help="In the unit of the kind.")
        model, spec = inputs.model_name(), inputs.gpu_spec()
        text = "What the figure was measured with, where the claim says it."
        engine = state.choice("claim_engine", "Engine", (ANY, *BACKENDS.values()), default="vLLM", help=text)
        weights = state.choice("claim_weights", "Weights", inputs.WEIGHTS, default="bf16", help=text)
        lengths = {
            f"{key}_tokens": state.maybe_whole(key, f"{title} [tokens]", hint="not said", help=HELP["lengths"])
            for key, title in inputs.LENGTHS.items()
        }
    parsed = load_catalog().clusters(spec)
    if len(parsed.clusters) > 1:
        raise DomainError("one figure is of one kind of GPU; give a single GPU spec such as 8xA100")
    cluster = parsed.clusters[0]
    found = load_catalog().model(model)[0]
    setup = {"model": found.name, "gpu": cluster.gpu.name, "n_gpus": cluster.n_gpus, "weight_dtype": weights}
    if engine != ANY:
        setup["backend"] = next(key for key, name in BACKENDS.items() if name == engine)
    setup |= {key: n for key, n in lengths.items() if n is not None}
    figure = {"id": "figure", "text": f"{title}: {value:g}", "quantity": quantity, "value": value * unit}
    lines = [f"{key} = {json.dumps(v)}" for key, v in figure.items()]
    about = [f"{key} = {json.dumps(v)}" for key, v in setup.items()]
    return "\n".join(['title = "One figure"', "", "[setup]", *about, "", "[[figures]]", *lines, ""])


def _summary(report: AuditReport) -> tuple[Finding, ...]:
    """Show how many claims have which verdict; return those that the user wants to see."""
    st.markdown(f"**{plain(report.title)}**")
    verdicts = [v for v in MARKS if report.count(v)]  # type: ignore[arg-type]
    with st.container(horizontal=True):
        for verdict in verdicts:
            st.markdown(f"{MARKS[verdict]} {report.count(verdict)}", width="content")  # type: ignore[arg-type]
    shown = report.findings
    if len(shown) > 1:
        # everything that comes and goes with the choice stands in the side bar: the page keeps its places
        with st.sidebar:
            wanted = state.several("verdicts", "Verdicts", verdicts, hint="all verdicts", help="Show only these.")
            ids = {f"{f.id}: {f.text}"[:120]: f.id for f in shown}
            one = state.choice("claim", "Claim", (EVERY, *ids), default=EVERY, help="Show one claim only.")
        shown = tuple(f for f in shown if (not wanted or f.verdict in wanted) and ids.get(one, f.id) == f.id)
        if not shown:
            st.info("No claim has this verdict; choose other verdicts or all claims.")
    return shown


def _details(found: Finding) -> list[str]:
    lines = []
    if found.claimed is not None:
        lines.append(f"Claimed: {_number(found.quantity, found.claimed)}")
    if found.ours is not None:
        lines.append(f"Ours, 90 % interval: {_number(found.quantity, found.ours)}")
    if found.scenario:
        lines.append(f"Holds for: {clause(found.scenario)}")
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
