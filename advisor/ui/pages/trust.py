"""Trust: measured errors by model and GPU, coverage, where every coefficient comes from, peers beside us."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from advisor.catalog import load_catalog
from advisor.fit.kernels import FIGURES
from advisor.fit.validate import METRICS, Row, table
from advisor.schema import CoefficientSet
from advisor.ui import accuracy, call, parts, state
from advisor.ui.command import shell
from advisor.ui.text import plain, sentence

VLLM = "vllm"
PAIR, START = "model and GPU", "engine start"
OWN, PUBLISHED, KEPT = "fitted on our runs", "published source", "kept: no run determines it"
INTERVAL_TEXT = "Half-width of the 90 % interval of a prediction: 90 % of left-out cells were within it."


def render() -> None:
    """Show the page."""
    st.title("What the numbers rest on")
    names = call.fitted_names()
    with st.sidebar:
        text = "vLLM's serving law, DeepSpeed's laws, or the power law of both."
        name = state.choice("engine", "Coefficients of", names, default=names[0], help=text)
        files = accuracy.run_files()
        text = "Predicted now, with the coefficients below."
        chosen = state.choice("runs", "Measured runs (vLLM)", tuple(files), default=accuracy.usual_file(), help=text)
    commands = [shell(["advisor", "show", "coefficients"])]
    fitted = call.coefficients(name)
    if name == VLLM:
        report = load_catalog().held_out()
        if report:
            _held_out(report)
            _coverage(report)
            _paces(report)
            _known_hosts(report)
            _kernels(report)
        _peers()
        _runs(chosen)
        commands.append(shell(["advisor", "validate", f"data/runs/{chosen}.jsonl"]))
    _report(fitted)
    _coefficients(fitted, name)
    parts.equal_command("\n".join(commands))


@dataclass(frozen=True)
class Held:
    """What the page says of one accuracy report, worked out once for all its visitors."""

    report: Mapping[str, Any]
    rows: list[Row]
    pairs: Mapping[str, accuracy.Errors]
    files: Mapping[str, tuple[str, str, str]]


_last: list[Held] = []


def _held(report: Mapping[str, Any]) -> Held:
    """Return what follows from a report; the catalogue returns the same one until its file changes."""
    for kept in _last:
        if kept.report is report:
            return kept
    rows = accuracy.held_out_rows(report)
    files = {"Held-out errors (JSON)": ("accuracy.json", "application/json", json.dumps(report, indent=1))}
    if rows:
        table_of = parts.to_csv([accuracy.row_of(r) for r in rows])
        files["Held-out cells (CSV)"] = ("held-out.csv", "text/csv", table_of)
    found = Held(report, rows, _pairs(rows), files)
    _last[:] = [found]
    return found


def _held_out(report: Mapping[str, Any]) -> None:
    """Show the errors on engine starts that were left out of the fit; a click on one shows its cells."""
    st.subheader("Errors on runs that the fit had not seen")
    st.caption(sentence(f"{report['held_out']}. All our measured vLLM cells; relative errors."))
    accuracy.headline(report["overall"], report.get("coverage_of_90_percent_intervals", {}))
    held = _held(report)
    rows = held.rows
    groupings: dict[str, Mapping[str, accuracy.Errors]] = {}
    if rows:
        groupings[PAIR] = held.pairs
    groupings |= {START: report["by_run"], **report["by_regime"]}
    text = "What the cells of a row have in common."
    by = state.choice("held_by", "Group by", tuple(groupings), default=next(iter(groupings)), help=text)
    groups = {accuracy.ALL: report["overall"], **groupings[by]}
    text = f"Median relative error by {by} and metric"
    group, metric = accuracy.clickable(groups, "held", text, first=0 if rows or by != START else 1)
    if rows:
        shown = [r for r in rows if group in (accuracy.ALL, _group(r, by))]
        accuracy.scatter(shown, "model" if group == accuracy.ALL else "load", metric, "held-scatter")
    elif by == START and group != accuracy.ALL:
        _start(group, metric)
    else:
        st.caption("This fit kept no single cells: group by engine start and choose one to see them predicted now.")
    parts.downloads(held.files, "held")


def _pairs(rows: list[Row]) -> dict[str, accuracy.Errors]:
    """Return the error table of every model on every GPU, in the order of their names."""
    groups = sorted({_group(r, PAIR) for r in rows})
    return {g: table(r for r in rows if _group(r, PAIR) == g) for g in groups}


def _group(row: Row, by: str) -> str:
    if by == PAIR:
        return f"{row.regime.get('model', '')} · {row.regime.get('gpu', '')}"
    return row.run_id if by == START else row.regime.get(by, "")


def _start(run_id: str, metric: str) -> None:
    """Show the cells of one engine start as the shipped coefficients predict them, where its records are there."""
    for name, path in accuracy.run_files().items():
        if json.dumps(run_id) not in path.read_text(encoding="utf-8"):
            continue
        rows = [r for r in accuracy.validate_file(name) if r.run_id == run_id]
        if rows:
            accuracy.scatter(rows, "load", metric, "held-scatter")
            accuracy.of_the_fit(rows)
            return
    st.caption("The records of this engine start are not in this installation.")


def _coverage(report: Mapping[str, Any]) -> None:
    st.subheader("Do the 90 % intervals hold?")
    held = report.get("coverage_of_90_percent_intervals", {})
    widths = report.get("error_q90", {})
    rows = [
        {
            "metric": accuracy.TITLES[m],
            "measured values inside": held[m],
            "measured cells": report["overall"][m]["n"],
            "half-width": _half(widths.get(m)),
            "half-width without CUDA graphs": _half(widths.get(f"{m}@eager")),
        }
        for m in METRICS
        if m in held
    ]
    share = "{:.0%}".format
    names = ("measured values inside", "half-width", "half-width, kinds of one start")
    parts.table(rows, dict.fromkeys(names, share) | {"measured cells": "{:,.0f}".format}, "coverage")
    st.caption(
        f"{INTERVAL_TEXT} Each start's cells were held against the width that the other starts give. Kinds that one"
        " start stands for (4-bit weights, fp8 cache, experts, pipelines) have a width of their own; cards that were"
        " not measured get a wider one."
    )


def _paces(report: Mapping[str, Any]) -> None:
    """Show the errors apart by who sets the pace, the GPU or the host's CPU."""
    st.subheader("Who sets the pace")
    share = "{:.1%}".format
    rows = []
    for m in METRICS:
        for pace, errors in report.get("by_pace", {}).items():
            if m in errors:
                held = report["coverage_by_pace"][pace].get(m)
                row = {"metric": accuracy.TITLES[m], "paced by": pace, "median error": errors[m]["median"]}
                rows.append(row | {"P90": errors[m]["p90"], "inside their interval": held, "cells": errors[m]["n"]})
    parts.table(rows, {"median error": share, "P90": share, "inside their interval": "{:.0%}".format}, "paces")
    st.caption(
        "Paced by the host's CPU: a host that takes 30 % less CPU time would change the figure by 3 % or more. Which"
        " host you get is not known before you measure on it, so these intervals are wider."
    )


def _known_hosts(report: Mapping[str, Any]) -> None:
    """Show left-out starts predicted with and without the factor of their host, which other starts tell."""
    found = report.get("known_hosts")
    if not found:
        return
    st.subheader("On a host that is known")
    rows = []
    for m in METRICS:
        for host in ("unknown", "known"):
            if m in found["known"] and m != "kv_blocks":
                e = found[host][m]
                row = {"metric": accuracy.TITLES[m], "host": host, "median error": e["median"], "P90": e["p90"]}
                rows.append(row | {"cells": e["n"]})
    share = dict.fromkeys(("median error", "P90"), "{:.1%}".format)
    parts.table(rows, share, "known hosts")
    st.caption(
        "The same starts, left out as above, with the speed of their host from other starts on it. One start of yours"
        " tells it: the page Calibrate refits your host's factor from its records."
    )


def _kernels(report: Mapping[str, Any]) -> None:
    """Show the law's terms against the GPU kernels that some starts recorded, each start left out of the fit."""
    if not report.get("kernels"):
        return
    st.subheader("Kernels of single steps")
    rows = []
    for name, e in report["kernels"].items():
        figure, _, step = name.partition(", ")
        row = {"kernels of a step": FIGURES.get(figure, figure), "step": step, "median error": e["median"]}
        rows.append(row | {"P90": e["p90"], "bias": e["bias"], "steps": e["n"]})
    parts.table(rows, {"median error": "{:.1%}".format, "P90": "{:.1%}".format, "bias": "{:+.1%}".format}, "kernels")
    st.caption(
        "A sum can be right for the wrong reasons: some engine starts recorded which GPU kernels ran in their steps and"
        " for how long. Each term of the law beside the kernels that it describes."
    )


def _half(width: float | None) -> float | None:
    # kept as a natural logarithm; shown as the share that the upper end lies above the value
    return None if width is None else math.expm1(width)


def _peers() -> None:
    """Show the errors of other predictors on the same measured runs."""
    for found in accuracy.peers():
        st.subheader("Beside another predictor")
        metrics = [m for m in METRICS if any(m in row["errors"] for row in found["rows"])]
        loads = list(dict.fromkeys(row["loads"] for row in found["rows"]))
        # the loads for which most predictors have an answer: our own left-out starts are not there for all of them
        usual = max(loads, key=lambda name: sum(row["loads"] == name for row in found["rows"]))
        load = state.choice("peer_load", "Loads", loads, default=usual, help="Clients that wait for their answers.")
        rows: list[dict[str, Any]] = []
        for row in (r for r in found["rows"] if r["loads"] == load):
            shown: dict[str, Any] = {"predictor": row["predictor"]}
            for m in metrics:
                e = row["errors"].get(m)
                shown[f"{accuracy.TITLES[m]}, median"] = e["median"] if e else None
                shown[f"{accuracy.TITLES[m]}, P90"] = e["p90"] if e else None
            shown["cells"] = max((e["n"] for e in row["errors"].values()), default=0)
            rows.append(shown)
        share = "{:.1%}".format
        parts.table(rows, {name: share for row in rows for name in row if "," in name}, "peers")
        st.caption(
            plain(f"{found['peer']}, {found['data']}, on the same measured runs, {found['date']}. How to read it: ")
            + f"{plain(found['method'])} in the repository; there it also says what the peer cannot be asked."
        )
        parts.downloads({"Peers (JSON)": ("peers.json", "application/json", json.dumps(found, indent=1))}, "peers")


def _runs(chosen: str) -> None:
    st.subheader(f"Run by run: {plain(chosen)}")
    rows = accuracy.validate_file(chosen)
    accuracy.of_the_fit(rows)
    accuracy.show_rows(rows, "trust")


def _report(fitted: CoefficientSet) -> None:
    versions = ", ".join(fitted.engine_versions)
    st.subheader("The fit")
    st.markdown(
        f"**{plain(fitted.engine)} {plain(versions)}**, fitted on {plain(fitted.gpu)};"
        " other cards are transferred by their datasheets, with wider intervals."
    )
    report = fitted.report
    if report is None:
        return
    left, middle, right = st.columns(3)
    text = "A cell is one load on one started engine: so many requests of some lengths."
    parts.metric(
        left, "Measured cells in the fit", f"{report.n_cells:,}", f"of {len(report.run_ids)} engine starts", text
    )
    text = "Numbers of the model that the cells decide; each has a meaning, a bound and an interval."
    parts.metric(middle, "Coefficients", f"{report.n_coefficients:,}", "of all listed below", text)
    text = "How well the data tell the coefficients apart; above 1e6 some of them can trade places."
    apart = "the data tell them apart" if report.condition_number < TOLD_APART else "some can trade places"
    parts.metric(right, "Condition number", f"{report.condition_number:,.3g}", apart, text)
    errors = {k: v for k, v in report.median_abs_error.items() if k != RESIDUAL}
    if RESIDUAL in report.median_abs_error:
        value = report.median_abs_error[RESIDUAL]
        st.caption(f"Median residual: {value:.2f} of the noise between two equal cells.")
    if errors:
        st.subheader("Median error, run by run or source by source")
        rows = [{"quantity": k.replace("_", " "), "median error": v} for k, v in errors.items()]
        parts.table(rows, {"median error": "{:.1%}".format}, "fit-error")
    for note in report.notes:
        st.caption(plain(note))


RESIDUAL = "residual_in_widths"
TOLD_APART = 1e6
"""Condition number below which the data tell the coefficients apart."""


def origin(source: str, run_ids: tuple[str, ...]) -> str:
    """Return what kind of source a coefficient has: our runs, something published, or its start value."""
    if source.startswith("kept at its start value"):
        return KEPT
    is_own = source.startswith(("fit over", "own runs", "cells of engine starts")) or source.split("; ")[0] in run_ids
    return OWN if is_own or source.startswith("deepspeed-0") else PUBLISHED


def coefficient_rows(fitted: CoefficientSet) -> list[dict[str, object]]:
    """Return the coefficients as rows of a table."""
    run_ids = fitted.report.run_ids if fitted.report else ()
    return [
        {
            "coefficient": name,
            "value": c.value,
            "low": c.low,
            "high": c.high,
            "unit": c.unit,
            "origin": origin(c.source, run_ids),
            "at its bound": "yes" if c.is_at_bound else "",
            "meaning": c.meaning,
            "source": c.source,
        }
        for name, c in fitted.coefficients.items()
    ]


def _coefficients(fitted: CoefficientSet, name: str) -> None:
    st.subheader("Where each coefficient comes from, with 90 % intervals")
    rows = coefficient_rows(fitted)
    origins = [o for o in (OWN, PUBLISHED, KEPT) if any(r["origin"] == o for r in rows)]
    counts = ", ".join(f"{sum(r['origin'] == o for r in rows)} {o}" for o in origins)
    st.caption(f"{len(rows)} coefficients: {counts}.")
    text = "Only coefficients of this kind of source."
    wanted = state.several("origin", "Show only", origins, hint="all of them", help=text)
    number = "{:.4g}".format
    shown = [r for r in rows if not wanted or r["origin"] in wanted]
    parts.table(shown, {"value": number, "low": number, "high": number}, "coefficients")
    st.subheader("Sources")
    st.markdown("\n".join(f"- {plain(f'{s.title} {s.url} {s.quote}'.strip())}" for s in fitted.sources) or "- own runs")
    parts.downloads(
        {
            "Coefficients (JSON)": (f"{name}.json", "application/json", fitted.model_dump_json(indent=1)),
            "Coefficients (CSV)": (f"{name}.csv", "text/csv", parts.to_csv(rows)),
        },
        "coefficients",
    )
