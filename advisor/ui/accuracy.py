"""Predicted against measured: the error grid, one metric in detail, and the rows to download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from advisor.catalog import load_catalog
from advisor.catalog.files import data_root, read_json
from advisor.errors import BadData, DomainError
from advisor.fit.records import read_records
from advisor.fit.validate import METRICS, Row, by_regime, summary, validate
from advisor.schema import RunRecord
from advisor.ui import charts_trust, memory, parts, pool, state
from advisor.ui.text import HELP, plain
from advisor.units import MIB

ALL = "all of them"
Errors = Mapping[str, Mapping[str, float]]
"""Metric to its median, P90, bias and count."""
MAX_UPLOAD_BYTES = 5 * MIB
MAX_CELLS = 400
BESIDE = 5
"""Rows that the grid next to an answer has at most."""
MAX_NAMES = 8
"""Names in the legend of a chart of cells."""
TITLES = {
    "ttft_s.p50": "TTFT P50",
    "ttft_s.p99": "TTFT P99",
    "tpot_s.p50": "TPOT P50",
    "requests_per_s": "Requests/s",
    "board_power_w.mean": "Board power",
    "kv_blocks": "KV blocks",
}
MEANING = {
    "ttft_s.p50": f"{HELP['ttft']} Half of the requests are faster.",
    "ttft_s.p99": f"{HELP['ttft']} {HELP['p99']}",
    "tpot_s.p50": HELP["tpot"],
    "requests_per_s": "Requests that were completed a second.",
    "board_power_w.mean": HELP["power"],
    "kv_blocks": "Blocks of the KV cache that the engine reports when it starts: how many tokens fit.",
}
QUANTITY = {"ttft_s.p50": "s", "ttft_s.p99": "s", "tpot_s.p50": "s", "requests_per_s": "requests_per_s"}
QUANTITY |= {"board_power_w.mean": "W", "kv_blocks": "blocks"}


def run_files() -> dict[str, Path]:
    """Return the vLLM run records that come with the package, by name."""
    return {p.stem: p for p in sorted((data_root() / "runs").glob("vllm*.jsonl"))}


def usual_file() -> str:
    """Return the file that Trust shows first: of a card that the fit did not start from, which says most."""
    return min(run_files(), key=lambda name: "h200" not in name)


@st.cache_data(max_entries=32, show_spinner="Predicting every measured cell ...")
def validate_file(name: str, _run: Callable[..., Any] = pool.run) -> list[Row]:
    """Return predictions against measurements for one file of the package; `_run` says where the work is done."""
    rows: list[Row] = _run(validate, [run_files()[name]])
    return rows


def peers() -> list[dict[str, Any]]:
    """Return the error tables of other predictors on our measured runs, one a file of `data/peers/`."""
    return [read_json(p) for p in sorted((data_root() / "peers").glob("*.json"))]


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
    return pool.run(validate, parse_upload(name, content))


def heat_map(groups: Mapping[str, Errors], key: str, alt: str, n_rows: int = 0) -> None:
    """Show the median error of groups, one row each, by metric; there is room for `n_rows` at least."""
    metrics = metrics_of(groups)
    errors = [[groups[g].get(m, {}).get("median") for m in metrics] for g in groups]
    figure = charts_trust.heat_map(list(groups), [TITLES[m] for m in metrics], errors, n_rows=n_rows)
    parts.chart(figure, key, alt)


def metrics_of(groups: Mapping[str, Errors]) -> list[str]:
    """Return the metrics that any of the groups has, in their usual order."""
    return [m for m in METRICS if any(m in errors for errors in groups.values())]


def clickable(groups: Mapping[str, Errors], key: str, alt: str, first: int = 0) -> tuple[str, str]:
    """Show the grid of groups by metric; return the (group, metric) of the cell that was clicked or chosen below it.

    first : the group that is chosen before any click

    A click sets the two lists, which the URL holds and a keyboard reaches.
    """
    names, metrics = list(groups), metrics_of(groups)
    titles = [TITLES[m] for m in metrics]
    row_key, metric_key = f"{key}_row", f"{key}_metric"

    def clicked() -> None:
        points = st.session_state[f"{key}-grid"].selection.points
        if points:
            i, j = points[0]["customdata"]
            if i < len(names) and j < len(titles):
                state.set_all({row_key: names[i], metric_key: titles[j]})

    errors = [[groups[g].get(m, {}).get("median") for m in metrics] for g in names]
    counts = [[int(groups[g].get(m, {}).get("n", 0)) for m in metrics] for g in names]
    row = names.index(state.peek(row_key, names, names[first]))
    chosen = (row, titles.index(state.peek(metric_key, titles, titles[0])))
    figure = charts_trust.heat_map(names, titles, errors, counts=counts, chosen=chosen)
    parts.chart(figure, f"{key}-grid", alt, on_select=clicked)
    left, right = st.columns(2)
    with left:
        text = "Or click a cell of the grid."
        name = state.choice(row_key, "Measured against predicted, for", names, default=names[first], help=text)
    with right:
        title = state.choice(metric_key, "Metric", titles, default=titles[0], help="Column of the grid.")
    return name, metrics[titles.index(title)]


def scatter(rows: list[Row], by: str, metric: str, key: str) -> None:
    """Show predicted against measured values of one metric, one mark a cell, coloured by a regime or by the GPU.

    More names than MAX_NAMES nobody can tell apart, and on a phone they would leave no room for the marks.
    """
    shown = [r for r in rows if r.metric == metric]
    names = next((n for n in (by, "gpu") if len({r.regime.get(n) for r in shown}) <= MAX_NAMES), "")
    points: dict[str, list[tuple[float, float, str]]] = {}
    for r in shown:
        words = f"{r.run_id}: {r.load}; {r.lengths}"
        points.setdefault(r.regime.get(names, "all"), []).append((r.measured, r.predicted, words))
    figure = charts_trust.against(points, QUANTITY[metric], TITLES[metric])
    parts.chart(figure, key, f"{TITLES[metric]}: predicted against measured, one mark a cell")


def beside(found: Mapping[str, Any]) -> None:
    """Show, next to an answer, the errors on measured runs of its regimes that the fit had not seen."""
    if not found.get("regimes"):
        return
    st.subheader("How far off such answers were")
    groups = {"all measured runs": found["overall"], **found["regimes"]}
    heat_map(groups, "beside", "Median relative error on measured runs like this plan", n_rows=BESIDE)
    st.caption("Median error on measured runs that the fit had not seen, by what they share with the best plan.")


@memory.remembered
def _tables(rows: list[Row]) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Errors]]]:
    return summary(rows), by_regime(rows)


def _rows_csv(rows: list[Row]) -> str:
    return parts.to_csv([row_of(r) for r in rows])


def show_rows(rows: list[Row], key: str) -> None:
    """Show the error grid by regime, one of its cells in detail and the downloads."""
    found, regimes = _tables(rows)
    st.subheader("Median error by regime")
    usual = "model" if "model" in regimes else next(iter(regimes))
    text = "What the rows of the grid have in common."
    wanted = state.choice(f"{key}_by", "Group by", tuple(regimes), default=usual, help=text)
    groups = {ALL: found["overall"], **regimes[wanted]}
    group, metric = clickable(groups, key, f"Median relative error by {wanted} and metric")
    chosen = rows if group == ALL else [r for r in rows if r.regime.get(wanted) == group]
    scatter(chosen, wanted if group == ALL else "load", metric, f"{key}-scatter")
    parts.downloads(
        {
            "Errors (JSON)": ("validation.json", "application/json", json.dumps(found, indent=1)),
            "Rows (CSV)": ("validation.csv", "text/csv", partial(_rows_csv, rows)),
        },
        key,
    )


def held_out_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return the left-out cells of an accuracy report as rows; empty for a report without them."""
    return [
        Row(c["run_id"], c["cell"], metric, measured, predicted, c["load"], c["lengths"], c["regime"])
        for c in report.get("cells", ())
        for metric, (measured, predicted) in c["values"].items()
    ]


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
            held_text = "" if held is None else " Held: share of measured values inside the 90 % interval."
            text = f"{MEANING[metric]} {HELP['gaps']}{held_text}"
            parts.metric(
                column, f"{TITLES[metric]}, median error", f"{e['median']:.1%}", f"P90 {e['p90']:.1%}, {tail}", text
            )


def of_the_fit(rows: list[Row]) -> None:
    """Say which of these runs the fits have used."""
    st.caption("  \n".join(plain(in_fit(rows, name)) for name in ("vllm", "power")))
