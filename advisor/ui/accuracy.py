"""Predicted against measured: the error grid, one metric in detail, and the rows to download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from advisor.catalog import load_catalog
from advisor.catalog.files import data_root
from advisor.errors import BadData, DomainError
from advisor.fit.records import read_records
from advisor.fit.validate import METRICS, Row, by_regime, summary, validate
from advisor.schema import RunRecord
from advisor.ui import charts, parts, state
from advisor.ui.text import plain, sentence
from advisor.units import MIB

Errors = Mapping[str, Mapping[str, float]]
"""Metric to its median, P90, bias and count."""
MAX_UPLOAD_BYTES = 5 * MIB
MAX_CELLS = 400
TITLES = {
    "ttft_s.p50": "TTFT P50",
    "ttft_s.p99": "TTFT P99",
    "tpot_s.p50": "TPOT P50",
    "requests_per_s": "Requests/s",
    "board_power_w.mean": "Board power",
    "kv_blocks": "KV blocks",
}
QUANTITY = {"ttft_s.p50": "s", "ttft_s.p99": "s", "tpot_s.p50": "s", "requests_per_s": "requests_per_s"}
QUANTITY |= {"board_power_w.mean": "W", "kv_blocks": "blocks"}


def run_files() -> dict[str, Path]:
    """Return the vLLM run records that come with the package, by name."""
    return {p.stem: p for p in sorted((data_root() / "runs").glob("vllm*.jsonl"))}


@st.cache_data(max_entries=32, show_spinner="Predicting every measured cell ...")
def validate_file(name: str) -> list[Row]:
    """Return predictions against measurements for one file of the package."""
    return validate([run_files()[name]], load_catalog())


def parse_upload(name: str, content: bytes) -> list[RunRecord]:
    """Return the run records of an uploaded file; raises BadData with the line and the rule that it breaks.

    The content is only parsed, never run; it exists as a file as long as it is read.
    """
    if len(content) > MAX_UPLOAD_BYTES:
        raise BadData(name, f"has {len(content):,} bytes; at most {MAX_UPLOAD_BYTES:,} are read here")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "upload.jsonl"
        file.write_bytes(content)
        try:
            records = read_records(file)
        except BadData as error:
            raise BadData(str(error.path).replace(str(file), name), error.why) from None
    if len(records) > MAX_CELLS:
        raise DomainError(f"{name} has {len(records)} records; at most {MAX_CELLS} here, the command line takes all")
    return records


@st.cache_data(max_entries=8, show_spinner="Predicting every measured cell ...")
def validate_upload(name: str, content: bytes) -> list[Row]:
    """Return predictions against measurements for an uploaded file."""
    return validate(parse_upload(name, content), load_catalog())


def grid(overall: Errors, regimes: Mapping[str, Mapping[str, Errors]], key: str, usual: str) -> str:
    """Show the median error of each metric by regime; return the regime that the user chose."""
    wanted = state.choice(f"{key}_by", "Group by", tuple(regimes), default=usual)
    heat_map(
        {"all of them": overall, **regimes[wanted]}, f"{key}-grid", f"Median relative error by {wanted} and metric"
    )
    return wanted


def heat_map(groups: Mapping[str, Errors], key: str, alt: str) -> None:
    """Show the median error of groups, one row each, by metric."""
    metrics = [m for m in METRICS if any(m in errors for errors in groups.values())]
    errors = [[groups[g].get(m, {}).get("median") for m in metrics] for g in groups]
    parts.chart(charts.heat_map(list(groups), [TITLES[m] for m in metrics], errors), key, alt)


def beside(found: Mapping[str, Any]) -> None:
    """Show, next to an answer, the errors on measured runs of its regimes that the fit had not seen."""
    if not found.get("regimes"):
        return
    st.subheader("How far off such answers were")
    groups = {"all measured runs": found["overall"], **found["regimes"]}
    heat_map(groups, "beside", "Median relative error on measured runs like this plan")
    st.caption("Median error on measured runs that the fit had not seen, by what they share with the best plan.")


def show_rows(rows: list[Row], key: str) -> None:
    """Show the error grid by regime, one metric in detail and the downloads."""
    found, regimes = summary(rows), by_regime(rows)
    st.subheader("Median error by regime")
    wanted = grid(found["overall"], regimes, key, "model" if "model" in regimes else next(iter(regimes)))
    metrics = [m for m in METRICS if m in found["overall"]]
    st.subheader("Predicted against measured")
    title = state.choice(f"{key}_metric", "Metric", [TITLES[m] for m in metrics], default=TITLES[metrics[0]])
    metric = next(m for m in metrics if TITLES[m] == title)
    chosen = [r for r in rows if r.metric == metric]
    points = {
        group: [(r.measured, r.predicted, f"{r.load}; {r.lengths}") for r in chosen if r.regime.get(wanted) == group]
        for group in regimes[wanted]
    }
    figure = charts.against(points, QUANTITY[metric], title)
    parts.chart(figure, f"{key}-scatter", f"{title}: predicted against measured, one mark a cell")
    table = [row_of(r) for r in rows]
    parts.downloads(
        {
            "Errors (JSON)": ("validation.json", "application/json", json.dumps(found, indent=1)),
            "Rows (CSV)": ("validation.csv", "text/csv", parts.to_csv(table)),
        },
        key,
    )


def held_out() -> None:
    """Show the errors on engine starts that were left out of the fit, and how often the intervals held."""
    report = load_catalog().accuracy()
    if not report:
        return
    st.subheader("Errors on runs that the fit had not seen")
    st.caption(sentence(f"{report['held_out']}. All our measured vLLM cells; relative errors."))
    coverage = report.get("coverage_of_90_percent_intervals", {})
    headline(report["overall"], coverage)
    grid(report["overall"], {"engine start": report["by_run"], **report["by_regime"]}, "held", "engine start")
    text = json.dumps(report, indent=1)
    parts.downloads({"Held-out errors (JSON)": ("accuracy.json", "application/json", text)}, "held")


def row_of(row: Row) -> dict[str, Any]:
    """Return one row for a CSV file, in SI units."""
    return {
        "run_id": row.run_id,
        "cell": row.cell,
        "metric": row.metric,
        "measured": row.measured,
        "predicted": row.predicted,
        "relative_error": row.error,
        "load": row.load,
        "lengths": row.lengths,
    } | row.regime


def in_fit(rows: list[Row], name: str) -> str:
    """Return a sentence on whether the runs of these rows were in the fit of a set of coefficients."""
    report = load_catalog().coefficients(name).report
    fitted = set(report.run_ids) if report else set()
    runs = {r.run_id for r in rows}
    law = {"vllm": "the serving law", "power": "board power"}[name]
    both = len(runs & fitted)
    if both == 0:
        return f"Fit of {law}: none of these {len(runs)} engine starts was in it, so these are errors of prediction."
    return f"Fit of {law}: {both} of these {len(runs)} engine starts were in it; for those, the errors are residuals."


def headline(overall: Errors, coverage: Mapping[str, float] | None = None) -> None:
    """Show the median error of each metric, and the share of measurements that its 90 % interval held."""
    metrics = [m for m in METRICS if m in overall]
    for begin in range(0, len(metrics), 3):
        for column, metric in zip(st.columns(3), metrics[begin : begin + 3], strict=False):
            e = overall[metric]
            held = (coverage or {}).get(metric)
            tail = f"bias {e['bias']:+.1%}, {e['n']:.0f} cells" if held is None else f"interval held {held:.0%}"
            column.metric(
                f"{TITLES[metric]}, median error",
                f"{e['median']:.1%}",
                f"P90 {e['p90']:.1%}, {tail}",
                delta_color="off",
                delta_arrow="off",
                border=True,
                height="stretch",
            )


def of_the_fit(rows: list[Row]) -> None:
    """Say which of these runs the fits have used."""
    st.caption("  \n".join(plain(in_fit(rows, name)) for name in ("vllm", "power")))
