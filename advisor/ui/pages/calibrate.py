"""Calibrate: your own run records against the model, a quick refit on them, what it changed, the fit to download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import streamlit as st

from advisor.catalog import load_catalog
from advisor.fit.adapt import Refit, Scope, refit_shipped
from advisor.fit.validate import METRICS, Row, summary, table
from advisor.ui import accuracy, charts_trust, jobs, parts, state
from advisor.ui.command import shell
from advisor.ui.text import BACKENDS, plain, sentence
from advisor.units import MIB

MAX_REFIT_CELLS = 100
HOST, ALL = "this host: 2 factors", "all coefficients"
SCOPES: dict[str, Scope] = {HOST: "host", ALL: "all"}
PLANNED = "python -m calibration plan --model llama-3.1-8b --gpu h100-sxm-80gb --gpus 1 --minutes 6 --out jobs.json"


def render() -> None:
    """Show the page."""
    st.title("Your measurements against the model")
    with st.sidebar:
        _shipped()
    st.markdown(
        "Upload run records of vLLM (JSON lines, one measured cell a line). Every cell is predicted from its own"
        " configuration, nothing measured enters that prediction; then you can refit the model to your host. Records"
        " are parsed, never run, and nothing is kept on disk."
    )
    limit = accuracy.MAX_UPLOAD_BYTES // MIB
    upload = st.file_uploader(
        f"Run records (.jsonl, at most {limit} MiB)",
        type=["jsonl", "json"],
        key="records",
        max_upload_size=limit,
        help="What `python -m calibration run` and `advisor verify --record` write.",
    )
    if upload is None:
        _how_to_get_some()
        _command("results/records.jsonl")
        return
    content = upload.getvalue()
    rows = accuracy.validate_upload(upload.name, content)
    accuracy.headline(summary(rows)["overall"])
    accuracy.of_the_fit(rows)
    accuracy.show_rows(rows, "calibrate")
    _refit(upload.name, content)
    _command(upload.name)


def _command(records: str) -> None:
    words = [["advisor", "validate", records], ["advisor", "fit", records, "--out", "."]]
    about = (
        "The second line is the full fit: all our records and yours together, every engine start left out once,"
        " intervals from that. It takes some minutes on two cores and writes vllm.json, accuracy.json"
        " and accuracy_cells.json."
    )
    parts.equal_command("\n".join(shell(w) for w in words), about)


def _shipped() -> None:
    """Say what records are held against."""
    fitted = load_catalog().coefficients("vllm")
    st.markdown("**The fit that is shipped**")
    report = fitted.report
    rests = f", on {report.n_cells:,} measured cells of {len(report.run_ids)} engine starts" if report else ""
    name = f"{BACKENDS.get(fitted.engine, fitted.engine)} {', '.join(fitted.engine_versions)}"
    st.markdown(
        f"{plain(name)}, fitted on {plain(fitted.gpu)}{rests}. The Trust page shows how far off predictions of it were."
    )
    st.caption("Uploads are the one thing that the address does not hold.")


def _how_to_get_some() -> None:
    st.subheader("How to get records")
    st.markdown(
        "On a machine with your GPUs: plan a few minutes of measurements, run them, and upload"
        " `results/records.jsonl`. Weights are random, nothing is downloaded. The repository's docs/calibration.md has"
        " the details; the Trust page shows the same tables for the records that come with the package."
    )
    st.code(
        f"{PLANNED}\npython -m calibration run --jobs jobs.json --out-dir results", language="bash", wrap_lines=True
    )


def _refit(name: str, content: bytes) -> None:
    st.subheader("Refit the model to these records")
    text = (
        "Two factors: how fast your host's CPU launches steps, and what your cards' arithmetic draws. Or every"
        " coefficient that the cells can tell of, each held by its interval in the shipped fit."
    )
    scope = state.segments("scope", "What to fit", tuple(SCOPES), default=HOST, help=text)
    st.caption(
        "A quick refit, not the full one: it replays only your cells and lets the shipped coefficients and their"
        " intervals stand for our records. On a GPU type that the fit knows, the two factors are what usually differs;"
        " for a new GPU or number format fit all coefficients, or better run the full fit below."
    )
    records = accuracy.parse_upload(name, content)
    key = hashlib.sha256(content).hexdigest() + scope
    job = jobs.find(key)
    if len(records) > MAX_REFIT_CELLS:
        st.info(f"{len(records)} records are too many for a quick refit (at most {MAX_REFIT_CELLS}): use the full fit.")
        return
    if job is None:
        if st.button("Refit", type="primary", icon=":material/tune:", key="refit"):
            jobs.start(key, refit_shipped, records, SCOPES[scope])
            st.rerun()
        return
    if not job.is_done:
        _progress(key)
        return
    found: Refit = job.result()
    _what_changed(found)


@st.fragment(run_every=1.0)
def _progress(key: str) -> None:
    """Show how far a refit is, every second, without running the page again; then run it once."""
    job = jobs.find(key)
    if job is None or job.is_done:
        st.rerun()
        return
    share, text = job.progress()
    st.progress(share, f"{sentence(text)} ... {share:.0%}")
    st.caption("You can go on using the other pages; the result waits here as long as the app runs.")


def _what_changed(found: Refit) -> None:
    before, after, left_out = (table(rows) for rows in (found.before, found.after, found.left_out))
    parts_text = "engine starts" if len({r.run_id for r in found.before}) > 1 else "halves"
    st.markdown(
        f"**What changed**, on {found.n_cells} cells. The last column is the honest one: each of {found.groups}"
        f" {parts_text} predicted by a refit that had not seen it."
        if found.groups
        else f"**What changed**, on {found.n_cells} cells; a single cell leaves nothing to judge the refit by."
    )
    rows = [
        {
            "median error": accuracy.TITLES[m],
            "as shipped": before[m]["median"],
            "refitted, on the same cells": after[m]["median"],
            "refitted, on cells left out": left_out.get(m, {}).get("median"),
            "cells": before[m]["n"],
        }
        for m in METRICS
        if m in before and m in after
    ]
    share = "{:.1%}".format
    names = ("as shipped", "refitted, on the same cells", "refitted, on cells left out")
    parts.table(rows, dict.fromkeys(names, share), "refit-errors")
    st.markdown(f"- {sentence(verdict(found))}")
    factors = [
        (
            c.name,
            c.after / c.before,
            c.after_low / c.before,
            c.after_high / c.before,
            (c.before_high - c.before_low) / 2 / c.before,
        )
        for c in found.changes
    ]
    parts.chart(charts_trust.moved(factors), "moved", "Change of each coefficient beside its interval before")
    changes = [asdict(c) for c in found.changes]
    number = "{:.4g}".format
    shown = [{key.replace("_", " "): value for key, value in row.items()} for row in changes]
    numbers = [key for key in shown[0] if key.startswith(("before", "after"))]
    parts.table(shown, dict.fromkeys(numbers, number), "changes")
    parts.downloads(
        {
            "The fit (vllm.json)": ("vllm.json", "application/json", found.coefficients.model_dump_json(indent=1)),
            "What changed (CSV)": ("changes.csv", "text/csv", parts.to_csv(changes)),
            "Left-out cells (CSV)": (
                "left-out.csv",
                "text/csv",
                parts.to_csv([accuracy.row_of(r) for r in found.left_out]),
            ),
        },
        "refit",
    )
    st.caption(
        "Put vllm.json in the place of data/fitted/vllm.json and every command and page uses it. The intervals of"
        " predictions stay those of the shipped fit."
    )


def verdict(found: Refit) -> str:
    """Return whether the refit helps on cells that it did not see, as a sentence."""
    if not found.left_out:
        return "too few cells to say whether the refit helps on others"
    ratio = partial(_mean_error, [r.metric for r in found.left_out])
    was, now = ratio(found.before), ratio(found.left_out)
    shown = f"from {was:.1%} to {now:.1%} in the mean of these errors"
    if now < 0.95 * was:
        return f"on cells left out the refit helps, {shown}: use it for this host"
    if now > 1.05 * was:
        return f"on cells left out the refit makes it worse, {shown}: keep the shipped fit"
    return f"on cells left out the refit changes little, {shown}: this host is like ours"


def _mean_error(metrics: Sequence[str], rows: list[Row]) -> float:
    errors = table(rows)
    found = [errors[m]["median"] for m in METRICS if m in errors and m in metrics and m != "kv_blocks"]
    return sum(found) / max(1, len(found))
