"""Trust: what the numbers rest on - measured error, and every fitted coefficient with its interval and source."""

from __future__ import annotations

import streamlit as st

from advisor.schema import CoefficientSet
from advisor.ui import accuracy, call, parts, state
from advisor.ui.command import shell
from advisor.ui.text import plain

VLLM = "vllm"


def render() -> None:
    """Show the page."""
    st.title("What the numbers rest on")
    names = call.fitted_names()
    with st.sidebar:
        name = state.choice("engine", "Coefficients of", names, default=names[0])
        files = accuracy.run_files()
        chosen = state.choice("runs", "Measured runs (vLLM)", tuple(files), default=min(files, key=_not_h200))
    fitted = call.coefficients(name)
    if name == VLLM:
        accuracy.held_out()
        st.subheader(f"Run by run: {plain(chosen)}")
        rows = accuracy.validate_file(chosen)
        accuracy.of_the_fit(rows)
        accuracy.show_rows(rows, "trust")
    _report(fitted)
    _coefficients(fitted)
    st.subheader("Sources")
    st.markdown("\n".join(f"- {plain(f'{s.title} {s.url} {s.quote}'.strip())}" for s in fitted.sources) or "- own runs")
    table = coefficient_rows(fitted)
    parts.downloads(
        {
            "Coefficients (JSON)": (f"{name}.json", "application/json", fitted.model_dump_json(indent=1)),
            "Coefficients (CSV)": (f"{name}.csv", "text/csv", parts.to_csv(table)),
        },
        "coefficients",
    )
    commands = [shell(["advisor", "show", "coefficients"])]
    if name == VLLM:
        commands.append(shell(["advisor", "validate", f"data/runs/{chosen}.jsonl"]))
    parts.equal_command("\n".join(commands))


def _not_h200(name: str) -> bool:
    # a card that the fit did not use says most about trust
    return "h200" not in name


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
    left.metric("Measured cells in the fit", f"{report.n_cells:,}", border=True)
    middle.metric("Coefficients", f"{report.n_coefficients:,}", border=True)
    right.metric(
        "Condition number",
        f"{report.condition_number:,.3g}",
        border=True,
        help="How well the data tell the coefficients apart; above 1e6 some of them can trade places.",
    )
    if report.median_abs_error:
        st.subheader("Median error on the runs of the fit")
        rows = [{"quantity": k, "median error": v} for k, v in report.median_abs_error.items()]
        parts.table(rows, {"median error": "{:.1%}".format}, "fit-error")
    for note in report.notes:
        st.caption(plain(note))


def coefficient_rows(fitted: CoefficientSet) -> list[dict[str, object]]:
    """Return the coefficients as rows of a table."""
    return [
        {
            "coefficient": name,
            "value": c.value,
            "low": c.low,
            "high": c.high,
            "unit": c.unit,
            "at its bound": "yes" if c.is_at_bound else "",
            "meaning": c.meaning,
            "source": c.source,
        }
        for name, c in fitted.coefficients.items()
    ]


def _coefficients(fitted: CoefficientSet) -> None:
    st.subheader("Coefficients with 90 % intervals")
    number = "{:.4g}".format
    parts.table(coefficient_rows(fitted), {"value": number, "low": number, "high": number}, "coefficients")
