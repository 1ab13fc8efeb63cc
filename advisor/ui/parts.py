"""Pieces that several pages show: headline numbers, notes, tables, downloads, the equal command."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import plotly.graph_objects as go
import streamlit as st

from advisor.recommend.form import settled
from advisor.schema import Interval, Note, Plan, Prediction
from advisor.ui import call, charts, later, memory
from advisor.ui.text import BACKENDS, HELP, TERMS, label, part_name, plain, sentence, show, show_short, tooltip

METRIC_PX = 120
"""Height of a box with a big number: title, number, and one line below it; the same with and without that line."""
LIST_PX, NOTES_PX, PLANS_PX, BILLS_PX, FILE_PX = 340, 180, 400, 320, 360
"""Heights of boxes for lists, remarks and files and of tables of plans and bills: more or fewer lines move nothing."""
LEVELS = ("error", "warning", "info")
CHART = {"displaylogo": False, "responsive": True}
PLAN_COLUMNS = (
    "usd_per_million_output_tokens",
    "ttft_p99_s",
    "tpot_p99_s",
    "output_tokens_per_s",
    "ttft_p50_s",
    "tpot_p50_s",
    "requests_per_s",
    "board_power_w",
    "energy_j_per_output_token",
    "memory_bytes_per_gpu",
)

OFF_GPU = "not on the GPU"
HEADS = {label(name): tooltip(name) for name in (*PLAN_COLUMNS, "usd_per_h")} | {
    "TP": HELP["tp"],
    "PP": HELP["pp"],
    "DP": HELP["dp"],
    "KV": HELP["kv"],
    "weights": HELP["weights"],
    OFF_GPU: f"{HELP['zero_inference']} {HELP['kv_offload']}",
    "plan of a group": HELP["way"],
    "a GPU": "Prompt and output tokens, or training tokens, of one GPU a second.",
    "targets": HELP["targets"],
    "by": HELP["method"],
    "Pareto": HELP["pareto"],
    "ZeRO": HELP["zero"],
    "offload": "Where the optimizer states and the parameters rest: on the GPU (none), in host memory, on disk.",
    "micro batch": "Sequences that a GPU computes at once.",
    "micro-steps": "Micro batches whose gradients are summed before the optimizer steps.",
    "checkpointing": HELP["checkpointing"],
    label("step_s"): HELP["step"],
    label("tokens_per_s"): HELP["training"],
    label("allocated_bytes_per_gpu"): HELP["allocated"],
    label("mfu_frac"): HELP["mfu"],
    "FLOP/byte": HELP["intensity"],
    "of peak": "Share of the card's dense peak.",
    "of bandwidth": "Share of the card's memory bandwidth.",
    "half-width": "How far the end of the 90 % interval lies from the value.",
    "price read": "When the price was published or read.",
    "at its bound": "The fit wanted to go further than is physically sensible.",
}
"""What the heads of tables mean, shown under the mouse."""
OF_THE_LOAD = ("requests_per_s", "output_tokens_per_s", "usd_per_million_output_tokens")
"""Quantities that have no interval where all that arrives is served."""
MOST_ROWS = 16
"""Rows up to which a table shows all of them; streamlit shows ten of longer ones and rolls the rest."""
HOST_MEMORY = "host_memory_bytes_per_gpu"
WIDTHS = {"engine": 180}
"""Columns [pixels] whose longest text streamlit would cut."""


def headline(
    quantities: Mapping[str, Interval],
    names: Sequence[str],
    n_columns: int = 3,
    titles: Mapping[str, str] | None = None,
    endless: Collection[str] = (),
) -> None:
    """Show quantities as big numbers, each with its 90 % interval and a tooltip; absent ones are left out.

    endless : those that grow with the time of watching, for which there is no number
    """
    found = [name for name in names if name in quantities]
    for begin in range(0, len(found), n_columns):
        for column, name in zip(st.columns(n_columns), found[begin : begin + n_columns], strict=False):
            interval = quantities[name]
            is_exact = interval.low == interval.high
            value = show_short(name, interval.value)
            below = "from the load" if is_exact and name in OF_THE_LOAD else None
            if name in endless:
                value, below = "no bound", "overload"
            elif not is_exact:
                below = f"{show_short(name, interval.low)} to {show_short(name, interval.high)}"
            metric(column, (titles or {}).get(name, label(name)), value, below, tooltip(name))


def metric(column: Any, title: str, value: str, below: str | None, text: str) -> None:
    """Show one big number in a box with its tooltip; `below` is small, such as its interval."""
    column.metric(
        title, value, below, delta_color="off", delta_arrow="off", help=text or None, border=True, height=METRIC_PX
    )


def serving_headline(
    prediction: Prediction, names: Sequence[str], n_columns: int = 3, titles: Mapping[str, str] | None = None
) -> None:
    """Show quantities of a serving plan as big numbers; what an overload lets grow without end has no number."""
    shown, every = settled(prediction), prediction.quantities
    endless = {name for name in every if name not in shown and name != "saturation_requests_per_s"}
    headline(shown | {name: every[name] for name in endless}, names, n_columns, titles, endless)


def notes(found: Iterable[Note], height: int = NOTES_PX) -> None:
    """Show remarks in a box of one height, which rolls: warnings and errors first, then the rest."""
    said = sorted(dict.fromkeys((LEVELS.index(n.level), sentence(n.text)) for n in found), key=lambda s: s[0])
    with st.container(height=height, border=True):
        for level, text in said:
            if LEVELS[level] != "info":
                (st.error if LEVELS[level] == "error" else st.warning)(text)
        quiet = [f"- {text}" for level, text in said if LEVELS[level] == "info"]
        if quiet:
            st.markdown("\n".join(quiet))
        if not said:
            st.caption("No remarks.")


def listed(title: str, lines: Iterable[str], missing: str = "", height: int = LIST_PX) -> None:
    """Show lines of Markdown as a list under a head, in a box of one height, which rolls: nothing below it moves.

    missing : the key of what is still being worked out, "" for nothing
    """
    points = [f"- {line}" for line in lines]
    st.subheader(title)
    # other lines are another list, shown from its beginning: no word of the one before moves to a new place
    with st.container(height=height, border=True, key=f"list-{memory.content_key(title, points, missing)[:12]}"):
        if missing:
            later.fill_in(missing, "Being worked out ...")
        elif points:
            st.markdown("\n".join(points))
        else:
            st.caption("Nothing.")


def reasons(why: Iterable[str], flips: Iterable[str], missing: str = "", title: str = "Why") -> None:
    """Show beside each other why an answer is the best one, and what would change it (`missing` as in `listed`)."""
    left, right = st.columns(2)
    with left:
        listed(title, map(sentence, why))
    with right:
        listed("What would change the answer", map(sentence, flips), missing)


def chart(figure: go.Figure, key: str, alt: str, on_select: Callable[[], None] | None = None) -> None:
    """Show a chart that follows the theme and exports PNG; `on_select` is called when a point is clicked."""
    content = memory.key_of(figure)
    if content is None or on_select is not None:
        _chart(figure, key, alt, on_select)
    else:
        memory.replayed(f"{content} {key} {alt}", _chart, (figure, key, alt))


def _chart(figure: go.Figure, key: str, alt: str, on_select: Callable[[], None] | None = None) -> None:
    image = {"format": "png", "scale": 2, "filename": f"advisor-{key.replace(' ', '-')}"}
    config = CHART | {"toImageButtonOptions": image}
    height = int(figure.layout.height)  # said before it is drawn, so that what follows keeps its place
    if on_select is None:
        st.plotly_chart(figure, height=height, key=key, config=config, alt=alt)
    else:
        st.plotly_chart(
            figure, height=height, key=key, config=config, alt=alt, on_select=on_select, selection_mode="points"
        )


def taken_apart(plan: Plan) -> None:
    """Show each breakdown of a plan's prediction as one bar whose parts sum to its end, two beside each other."""
    columns = st.columns(2)
    n_parts = max((len(b.parts) for b in plan.prediction.breakdowns), default=0)
    for i, b in enumerate(plan.prediction.breakdowns):
        limit = call.card_limit(plan.deployment.gpu) if b.unit == "bytes" else None
        with columns[i % 2]:
            figure = charts.stacked({part_name(b.name): b}, limit=limit, n_parts=n_parts)
            chart(figure, f"part-{b.name}", f"Parts of {b.name}, which sum to the whole")
    held, host = charts.held_off_gpu(plan.deployment), plan.prediction.quantities.get(HOST_MEMORY)
    if held and host is not None:
        size = f"{show(HOST_MEMORY, host.value)} ({show(HOST_MEMORY, host.low)} to {show(HOST_MEMORY, host.high)})"
        st.caption(plain(f"Not on the GPU: {held}. That takes {size} of host memory a GPU."))


def table(
    rows: Sequence[Mapping[str, Any]], formats: Mapping[str, Callable[[Any], str]], key: str, height: int = 0
) -> None:
    """Show rows whose numbers sort as numbers and read as text with units; `formats` are functions that pickle.

    height : pixels however many rows there are; without it as many as they take
    """
    memory.replayed(memory.content_key(rows, formats, key, height), _table, (rows, formats, key, height))


def _table(rows: Sequence[Mapping[str, Any]], formats: Mapping[str, Callable[[Any], str]], key: str, px: int) -> None:
    frame = pd.DataFrame(list(rows))
    known = {column: form for column, form in formats.items() if column in frame.columns}
    heads = {c: st.column_config.Column(help=HEADS.get(c), width=WIDTHS.get(c)) for c in frame.columns}
    st.dataframe(
        frame.style.format(known, na_rep=""),
        hide_index=True,
        key=key,
        width="stretch",
        height=px or ("content" if len(frame) <= MOST_ROWS else "auto"),
        placeholder="–",
        column_config={c: head for c, head in heads.items() if c in HEADS or c in WIDTHS},
    )


def text_table(rows: Sequence[Mapping[str, str]], key: str, height: int = 0) -> None:
    """Show rows of words and of numbers with intervals; on a narrow screen they break, so that all stay in view.

    height : as in `table`
    """
    memory.replayed(memory.content_key(rows, key, height), _text_table, (rows, key, height))


def _text_table(rows: Sequence[Mapping[str, str]], key: str, px: int) -> None:
    frame = pd.DataFrame([{plain(c): plain(text) for c, text in row.items()} for row in rows])
    with st.container(key=f"table-{key}"):
        st.table(frame, hide_index=True, height=px or "content")


def plan_rows(plans: Sequence[Plan]) -> tuple[list[dict[str, Any]], dict[str, Callable[[Any], str]]]:
    """Return the ranked table of plans and how its columns read."""
    names = [n for n in PLAN_COLUMNS if any(n in p.prediction.quantities for p in plans)]
    is_any_off = any(charts.held_off_gpu(p.deployment) for p in plans)
    rows = []
    for p in plans:
        d, quantities = p.deployment, settled(p.prediction)
        row: dict[str, Any] = {
            "#": p.rank,
            "engine": BACKENDS.get(p.backend, p.backend),
            "GPU": d.gpu,
            "TP": d.tp,
            "PP": d.pp,
            "DP": d.dp,
            "targets": "overload" if p.prediction.is_saturated else "kept" if p.meets_slo else "missed",
        }
        for n in names:
            found = quantities.get(n)
            row[label(n)] = None if found is None else found.value
        row[label("usd_per_h")] = p.usd_per_h or None  # no price is known: zero would read as free
        rows.append(
            row
            | {"weights": d.weight_dtype, "KV": d.kv_dtype}
            | ({OFF_GPU: charts.held_off_gpu(d)} if is_any_off else {})
            | {
                "Pareto": "yes" if p.is_pareto else "",
                "by": "closed form" if p.prediction.method == "steady" else "simulation",
            }
        )
    return rows, {label(n): partial(show, n) for n in (*names, "usd_per_h")}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@\t\r" and v else v for k, v in row.items()})
    return out.getvalue()


def plans_csv(plans: Sequence[Plan]) -> str:
    """Return plans as CSV in SI units: every quantity with value, low and high."""
    rows = []
    for p in plans:
        row: dict[str, Any] = {"rank": p.rank, "meets_slo": p.meets_slo, "is_pareto": p.is_pareto}
        row |= p.deployment.model_dump(mode="json", exclude={"speculative"}) | {"usd_per_h": p.usd_per_h}
        for name, q in p.prediction.quantities.items():
            row |= {name: q.value, f"{name}_low": q.low, f"{name}_high": q.high}
        rows.append(row | {"command": p.command})
    return to_csv(rows)


Content = str | Callable[[], str]
"""Text of a file, or what makes it when somebody wants it."""


def downloads(files: Mapping[str, tuple[str, str, Content]], key: str) -> None:
    """Show download buttons of (label -> file name, MIME type, content); a click does not run the page again."""
    with st.container(horizontal=True, key=f"files-{key}"):
        for title, (name, mime, content) in files.items():
            st.download_button(
                title, content, name, mime, key=f"{key}-{name}", on_click="ignore", icon=":material/download:"
            )


def command(text: str, key: str) -> None:
    """Show a command to run, to copy."""
    with st.container(key=f"command-{key}"):
        st.code(text, language="bash", wrap_lines=True)


def equal_command(command: str, about: str = "") -> None:
    """Show the command line that gives the same answer; `about` says which line gives what. It may grow: it is last."""
    st.subheader("The same from the command line")
    if about:
        st.caption(about)
    with st.container(key="equal-command"):
        st.code(command, language="bash", wrap_lines=True)


OF_A_STEP = ("linear", "lm_head", "elementwise", "all_reduce", "overhead", "prompts_of_others")
"""Terms of the charts that take a prediction apart."""
OFF_GPU_TERMS = ("zero_inference", "int4", "kv_offload")
"""Terms of plans that keep weights or cache off the GPU, or in 4 bits."""


def glossary(*keys: str) -> None:
    """Show the terms of a page in one place, for readers who cannot hover."""
    with st.expander("What the words mean"):
        st.markdown("\n".join(f"- **{TERMS.get(k, k)}**: {plain(HELP[k])}" for k in keys))


def quantities_csv(quantities: Mapping[str, Interval]) -> str:
    """Return quantities as CSV in SI units: name, value, low, high."""
    return to_csv([{"quantity": n, "value": q.value, "low": q.low, "high": q.high} for n, q in quantities.items()])
