"""Writes what the last fit says about itself: docs/accuracy.md with its picture, the marked lines of other pages.

Reads data/fitted/accuracy*.json and data/fitted/vllm.json, as `advisor fit` writes them, and the law's own list of
coefficients. `--check` writes nothing and says which page is not current.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svg_plots import panels, scatter

from advisor.catalog.hf_layers import EXPERT_COUNTS
from advisor.fit.kernels import FIGURES
from advisor.fit.parameters import BY_NAME, PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
Table = Mapping[str, Mapping[str, float]]

METRICS = {
    "ttft_s.p50": "TTFT P50",
    "ttft_s.p99": "TTFT P99",
    "tpot_s.p50": "TPOT P50",
    "requests_per_s": "throughput",
    "board_power_w.mean": "board power",
    "kv_blocks": "KV blocks",
}
TARGETS = {
    "ttft_s.p50": (0.06, 0.15),
    "ttft_s.p99": (0.12, 0.30),
    "tpot_s.p50": (0.02, 0.06),
    "requests_per_s": (0.02, 0.06),
    "board_power_w.mean": (0.04, None),
    "kv_blocks": (0.01, 0.02),
}
"""Median and 90th percentile that we set ourselves for engine starts that the fit has not seen."""

REGIMES = {
    "load": "load",
    "lengths": "lengths",
    "parallelism": "parallelism",
    "weights": "number formats",
    "is_moe": "experts",
    "mode": "way of serving",
    "gpu": "GPU",
    "model": "model",
}


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def rows_of(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return rows_of([head, ["---"] * len(head), *lines])


def short(run: str) -> str:
    """Return an engine start without its engine: 'h100 8b-bf16'."""
    _, gpu, name = run.split("__")
    return f"{gpu.split('-')[0]} {name}"


def _goal(metric: str) -> str:
    median, p90 = TARGETS[metric]
    return percent(median, 0) + (f" / {percent(p90, 0)}" if p90 else "")


def overall(accuracy: Mapping[str, Any]) -> str:
    lines = []
    for metric, name in METRICS.items():
        e = accuracy["overall"].get(metric)
        if e is None:
            continue
        median, p90 = TARGETS[metric]
        is_met = e["median"] <= median and (p90 is None or e["p90"] <= p90)
        found = [f"{e['n']:.0f}", percent(e["median"]), percent(e["p90"]), signed(e["bias"])]
        lines.append([name, *found, _goal(metric), "yes" if is_met else "no"])
    return table(["quantity", "values", "median error", "P90", "bias", "our target, median / P90", "met"], lines)


def factor(width: float | None) -> str:
    return "-" if width is None else f"x/÷ {math.exp(width):.3f}"


def intervals(accuracy: Mapping[str, Any]) -> str:
    covered, widths = accuracy["coverage_of_90_percent_intervals"], accuracy["error_q90"]
    lines = []
    for metric, name in METRICS.items():
        if metric in widths:
            shown = [factor(widths[metric]), factor(widths.get(f"{metric}@eager"))]
            lines.append([name, *shown, percent(covered.get(metric), 0)])
    return table(["quantity", "90 % interval", "without CUDA graphs", "of left-out values inside"], lines)


def cells_table(first: str, groups: Mapping[str, Table], label: Callable[[str], str] = str) -> str:
    lines = []
    for group, errors in groups.items():
        n = max((e["n"] for e in errors.values()), default=0)
        row = [label(group), f"{n:.0f}"]
        for metric in METRICS:
            e = errors.get(metric)
            tail = f" / {100 * e['p90']:.0f}" if e and metric != "kv_blocks" else ""
            row.append(f"{100 * e['median']:.1f}{tail}" if e else "-")
        lines.append(row)
    return table([first, "cells", *METRICS.values()], lines)


def number(value: float) -> str:
    return f"{value:.3g}"


def coefficients(fitted: Mapping[str, Any]) -> str:
    lines = []
    for name, c in fitted["coefficients"].items():
        if "@" in name:
            continue
        is_fitted = c["low"] < c["value"] < c["high"]
        spread = f"{number(c['low'])} to {number(c['high'])}" if is_fitted else "fixed"
        remark = "at its bound" if c["is_at_bound"] else ("" if is_fitted else c["source"])
        if any(note.startswith(f"{name}:") for note in fitted["report"]["notes"]):
            remark = "not determined by these runs"
        lines.append([f"`{name}`", number(c["value"]), spread, c["unit"], remark])
    return table(["coefficient", "value", "90 % interval", "unit", "remark"], lines)


def hosts(fitted: Mapping[str, Any]) -> str:
    lines = []
    for name, c in fitted["coefficients"].items():
        if "@" in name:
            kind, host = name.split("@")
            what = "CPU time of a launch" if kind == "host" else "energy of an operation"
            lines.append([host, what, f"{c['value']:.2f}", f"{c['low']:.2f} to {c['high']:.2f}"])
    return table(["host", "factor on", "value", "90 % interval"], lines)


def law_table() -> str:
    lines = []
    for p in PARAMETERS:
        kind = "fixed" if not p.is_fitted else (f"prior ± {100 * p.prior_rel:.0f} %" if p.prior_rel else "data alone")
        lines.append([f"`{p.name}`", p.unit, f"{p.low:g} to {p.high:g}", kind, p.meaning])
    return table(["coefficient", "unit", "bounds", "fitted by", "what it is"], lines)


def headline(accuracy: Mapping[str, Any], fitted: Mapping[str, Any]) -> str:
    lines = []
    for metric, name in METRICS.items():
        e = accuracy["overall"].get(metric)
        if e is not None:
            inside = percent(accuracy["coverage_of_90_percent_intervals"].get(metric), 0)
            lines.append([name, percent(e["median"]), percent(e["p90"]), inside])
    report = fitted["report"]
    text = (
        f"{report['n_cells']} measured cells of {len(report['run_ids'])} engine starts, each start predicted by"
        " coefficients that never saw it:"
    )
    head = ["", "median error", "90th percentile", "inside the 90 % interval"]
    return f"{text}\n\n{table(head, lines)}"


def changelog_line(accuracy: Mapping[str, Any]) -> str:
    said = []
    for metric in ("tpot_s.p50", "requests_per_s", "ttft_s.p50", "ttft_s.p99", "board_power_w.mean", "kv_blocks"):
        e = accuracy["overall"].get(metric)
        if e is not None:
            said.append(f"{METRICS[metric]} {percent(e['median'])} / {percent(e['p90'])}")
    return "- Errors on engine starts left out of the fit, median / 90th percentile: " + ", ".join(said) + "."


def extremes(accuracy: Mapping[str, Any]) -> str:
    """Return the engine start with the largest median error of each quantity, as a list."""
    lines = []
    for metric, name in METRICS.items():
        found = [(e[metric]["median"], run) for run, e in accuracy["by_run"].items() if metric in e]
        if found:
            worst, run = max(found)
            best, other = min(found)
            lines.append([name, f"{short(other)}: {percent(best)}", f"{short(run)}: {percent(worst)}"])
    return table(["quantity", "best predicted start (median)", "worst predicted start (median)"], lines)


KINDS = {
    "4-bit weights": lambda r: r["weight_dtype"].endswith(("int4", "fp4")),
    "experts": lambda r: any(r["hf_config"].get(k) for k in EXPERT_COUNTS),
    "an fp8 cache": lambda r: r["kv_dtype"] == "fp8",
    "pipeline stages": lambda r: r["pp"] > 1,
    "fp8 weights": lambda r: r["weight_dtype"] == "fp8",
    "tensor parallelism": lambda r: r["tp"] > 1,
    "no CUDA graphs": lambda r: r["enforce_eager"],
    "prefix caching": lambda r: r["prefix_caching"],
    "an HTTP server": lambda r: str(r.get("client", "")).startswith("http"),
}
"""What has coefficients of its own; the fewer engine starts, the less is left when one is left out."""


def starts_of_kinds(fitted: Collection[str]) -> str:
    """Return how many of the engine starts in the fit are of each kind that has coefficients of its own, as text."""
    runs: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for path in sorted((ROOT / "data" / "runs").glob("vllm-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for kind, has in KINDS.items():
                if record["run_id"] in fitted and has(record):
                    runs[kind].add(record["run_id"])
    return ", ".join(f"{kind} {len(found)}" for kind, found in sorted(runs.items(), key=lambda item: len(item[1])))


def paces(accuracy: Mapping[str, Any]) -> str:
    """Return the errors apart by who paces a figure, with the share of values inside their intervals."""
    lines = []
    for metric, name in METRICS.items():
        for pace, errors in accuracy["by_pace"].items():
            if e := errors.get(metric):
                inside = percent(accuracy["coverage_by_pace"][pace].get(metric), 0)
                lines.append([name, pace, f"{e['n']:.0f}", percent(e["median"]), percent(e["p90"]), inside])
    return table(["quantity", "paced by", "values", "median error", "P90", "inside their interval"], lines)


def open_loops(accuracy: Mapping[str, Any]) -> str:
    """Return the errors of open loops whose requests are drawn anew, as text."""
    mine, drawn = accuracy["by_regime"]["load"]["open loop"], accuracy["open_loops_drawn_anew"]
    said = [
        f"{METRICS[m]} is {percent(drawn[m]['median'])} / {percent(drawn[m]['p90'])} off instead of"
        f" {percent(mine[m]['median'])} / {percent(mine[m]['p90'])}"
        for m in ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s")
        if m in mine and m in drawn
    ]
    return ", ".join(said)


def noise_floor(accuracy: Mapping[str, Any]) -> str:
    """Return how far two starts of the same engine are apart, on one host and on two, beside the error of the law."""
    two = accuracy["noise_floor"]
    one = two["one_host"]
    lines = []
    for metric, name in METRICS.items():
        found = [part["metrics"].get(metric) for part in (one, two)]
        error = accuracy["overall"].get(metric)
        if any(found) and error:
            shown = [*_apart(found[0]), *_apart(found[1]), percent(error["median"]), percent(error["p90"])]
            lines.append([name, *shown])
    apart = ["pairs", "one host, median", "P90", "pairs", "two hosts, median", "P90"]
    return table(["quantity", *apart, "our error, median", "P90"], lines)


def known_hosts(accuracy: Mapping[str, Any]) -> str:
    """Return the errors of left-out starts with and without the factors of their hosts."""
    known, unknown = accuracy["known_hosts"]["known"], accuracy["known_hosts"]["unknown"]
    lines = []
    for metric in ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s"):
        shown = [percent(part[metric][key]) for part in (unknown, known) for key in ("median", "p90")]
        lines.append([METRICS[metric], f"{known[metric]['n']:.0f}", *shown, _goal(metric)])
    heads = ["quantity", "values", "host unknown, median", "P90", "host known, median", "P90", "our target"]
    return table(heads, lines)


def kernels(accuracy: Mapping[str, Any]) -> str:
    """Return how far the law's terms are from the kernels that starts recorded, each start left out."""
    lines = []
    for name, e in accuracy["kernels"].items():
        figure, what = name.split(", ")
        shown = [percent(e["median"]), percent(e["p90"]), signed(e["bias"])]
        lines.append([FIGURES[figure], what, f"{e['n']:.0f}", *shown])
    return table(["kernels of a step", "step", "steps", "median error", "P90", "bias"], lines)


def kernel_steps() -> str:
    """Return which starts recorded the kernels of their steps, and of how many."""
    n_steps: dict[str, int] = {}
    for path in sorted((ROOT / "data" / "runs" / "kernels").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                run = json.loads(line)["run_id"]
                n_steps[run] = n_steps.get(run, 0) + 1
    of_card = [f"{sum(f'__{card}-' in run for run in n_steps)} on {card.upper()} hosts" for card in ("h100", "h200")]
    starts = f"{len(n_steps)} starts ({', '.join(of_card)})"
    return f"{starts} recorded which GPU kernels ran in {sum(n_steps.values())} of their steps"


def _apart(found: Mapping[str, float] | None) -> list[str]:
    """Return pairs, median and P90 of how far they are apart, or dashes."""
    if not found:
        return ["-"] * 3
    return [f"{found['n']:.0f}", *(percent(math.expm1(found[key])) for key in ("median", "p90"))]


def page(accuracy: Mapping[str, Any], fitted: Mapping[str, Any], has_points: bool) -> str:
    report = fitted["report"]
    versions = ", ".join(fitted["engine_versions"])
    repeated = accuracy["noise_floor"]
    n_repeated = len({*repeated["runs"], *repeated["one_host"]["runs"]})
    points = (
        "\n![predicted against measured, each engine start left out of the fit](images/accuracy-points.svg)\n"
        if has_points
        else ""
    )
    regimes = "\n\n".join(
        f"### By {title}\n\n{cells_table(title, accuracy['by_regime'][key])}"
        for key, title in REGIMES.items()
        if key in accuracy["by_regime"]
    )
    return f"""# Accuracy

Written by `scripts/gen_accuracy.py` from `data/fitted/accuracy.json`; a test compares the two. Do not edit.

**How it is measured.** {report["n_cells"]} cells of {len(report["run_ids"])} engine starts of vLLM {versions}
(`data/runs/`). Each start is left out in turn: the coefficients take one Gauss-Newton step from the full fit on the
cells of the others (`Estimate.without`), and the start is predicted from its configuration alone, as a stranger's would
be: no factor for its host. The size of the KV cache that its start-up printed is used for the latencies and judged
apart in the line "KV blocks". Open loops are replayed with the requests that their client sent: which they were is its
draw, not the engine's answer. Drawn anew from the same distributions (mean of five draws), {open_loops(accuracy)};
what a draw adds is in the intervals of a forecast, beside the widths below. Throughput is compared in cells of a
second or more: a prompt or two in less are their latency over again (until the fit of 88 starts they counted, and
random loads were drawn anew: its figures are not comparable with these to the last digit).

**Few in their kind.** Engine starts of each kind that has coefficients of its own:
{starts_of_kinds(accuracy["by_run"])}.
Where a kind has two, leaving one out leaves little that tells of it; the coefficients that the advisor
ships have seen both, so its own error there lies below the table's. One number is not left out:
the H200's factor on the time of its hosts in `data/fitted/transfer.toml` (the mean of five hosts). Board power is
compared in cells of a second or more; in a shorter one the meter has not settled.

Error = predicted / measured - 1. Median and P90 are of its absolute value, bias is its mean.

## Overall

{overall(accuracy)}

![median and 90th percentile of the error of each engine start](images/accuracy-by-start.svg)
{points}
## Who sets the pace

A GPU that is never kept waiting does the same on every host; where the CPU launches kernels more slowly than they
run, or a prompt is shorter than its launch, the host decides, and which host one gets is not known. The closed form
says which it is: a figure is paced by the host's CPU where a host that takes 30 % less CPU time would change it by 3 %
or more (`predict/host_pace.py`).

{paces(accuracy)}

## On a host that is known

Above, a left-out start is predicted as on a stranger's host. The other starts of its host are in the fit, though, and
tell how fast that host is: with its factor ({accuracy["known_hosts"]["n_starts"]} starts of hosts that have at least
two) the same starts, left out as before, are predicted as follows. That is what one gets who has measured one engine
on a host and asks for another one there (the app's page Calibrate refits a host's factors from one start's records):

{known_hosts(accuracy)}

## How far two starts of one engine are apart

The same model, plan, lengths and clients, started twice on one host, and on two hosts ({n_repeated} starts, all pairs;
closed loops only, since random requests differ from draw to draw). The second is what one gets who measures on one
host and deploys on another, and no prediction that does not know the host can be much better:

{noise_floor(accuracy)}

What lies behind it is the CPU: a step with more tokens than the largest CUDA graph is launched kernel by kernel, 0.5
to 1.3 ms a layer from host to host, from process to process and from one second to the next. In six engines whose
every launch was timed (53,000 of them) a fixed loop of Python just before took 24 or 44 us and seldom anything
between, as on a core whose second hardware thread has work or not (we take that for the cause). Launches of more than
512 tokens of an 8B model took 15 to 17 ms (medians) after the fast loops and 22 to 25 ms after the slow ones, on H100
and on H200 hosts; 31 to 69 % were slow.
The replay has these two paces ([methodology](methodology.md#launching-it-the-host)), but which of them a short
measurement meets is chance. Prompts shorter than their launch (some 1,000 tokens of an 8B model) are as uncertain as
that; longer ones hide it. Keeping an engine to one hardware thread of each pair did not help where we tried it: a
virtual machine that calls each of its 64 threads a core, as clouds do, among which a search by timing found 12 pairs
without a pattern (three engines started with and without: of 1,024 tokens the 8B's TTFT was 28 and 29 ms, the 3B's 16
and 20; without CUDA graphs a token of the 8B took 18.0 and 13.6 ms). It may where the threads of the guest are those of
the machine.

**First bursts of a fresh engine.** vLLM captures its CUDA graphs without the LM head, and CUDA loads a kernel when it
is first needed, on an idle GPU: the first step of 17 to 24 sequences, of 25 to 32, and so on (`engine_state.head_of`)
waits until all before it has run, and the tokens of the step before it are handed out that much late. A dozen sizes up
to 192 do this once in the life of a process. Replays of records have it, for the batches that the start had not met
before (a quarter of the cells; their median first token was 8 % early without it); predictions do not: a server that
has run a while has loaded its kernels. Load a fresh one with a burst of 200 short requests before you measure it. The
first prompt step beyond the CUDA graphs whose tokens fill no whole tiles (bf16, up to 2,048 tokens) loads kernels for
such numbers of rows (`engine_state.has_new_rows`): it is some 9 ms late, in replays too.

## Intervals

A 90 % interval is the prediction times and over a factor: the 90th percentile of |ln(predicted / measured)| over
left-out starts (split conformal prediction; Vovk, Gammerman, Shafer 2005), each error divided by how much its cell
hangs on its host: the root of 1 + (g / 0.1)^2 for a figure that a host with 30 % less CPU time would change by g
(normalised scores; Papadopoulos, Gammerman, Vovk 2008). A forecast multiplies the factor's logarithm by the same root,
so a figure that the GPU paces has a narrow interval, and one that the host paces a wide one; the factors below are for
a figure that no host changes. The last column checks it: how many values
of a start lie inside when the factor comes from the *other* starts. Plans without CUDA graphs take a factor of their
own, from their starts alone: the host launches every kernel of every step, and one start differs from the next by more
than the root says. E2E takes the factor of TPOT;
P95 and P99 of both, and all of ITL, take its square. On a GPU without runs the logarithm of the factor is joined with
the `rel` of `data/fitted/transfer.toml` as a root of squares. Board power carries the interval of its own law, given
what the GPUs do ([power](power.md)); the line here is its error end to end.

{intervals(accuracy)}

## Kernels of single steps

A sum can be right for the wrong reasons. {kernel_steps()}
(`data/runs/kernels`; 1 to 256 decodes, prompts of 128 to 8,000 tokens, bursts, prompts among decodes), and the fit is
held to them. Terms of the law against the kernels that they describe, the start left out as above; of prompts only
norms of 1,024 tokens and more, which are longer than a kernel's beginning:

{kernels(accuracy)}

Short prompts' attention is told too fast: its kernels take some 15 us a layer to begin and end, decodes' 8 to 11, and
the law has one time for both (5 us a layer, about 1 % of the time to a first token).

## By engine start

Median / 90th percentile of the absolute error in per cent; of KV blocks, one value a start, the median alone.

{cells_table("engine start", accuracy["by_run"], short)}

{extremes(accuracy)}

## By regime

{regimes}

## The coefficients of this fit

{report["n_coefficients"]} coefficients; condition number of the scaled Jacobian {report["condition_number"]:.3g}.
Intervals come from the Jacobian with a robust scale of the residuals: they say how well these runs determine a number
inside this law, not how true the law is; the tables above do that. What each coefficient is:
[methodology](methodology.md#coefficients).

{coefficients(fitted)}

Factors of the hosts against the reference host (`data/runs/manifest.toml`). A prediction for a stranger's host takes 1.

{hosts(fitted)}
"""


def power_coefficients(power: Mapping[str, Any]) -> str:
    """Return the coefficients of the power law as a table; the parts of a joule as pJ."""
    lines = []
    for name, c in power["coefficients"].items():
        if name.startswith("error_frac"):
            continue
        scale, unit = (1e12, f"p{c['unit']}") if c["unit"].startswith("J/") else (1.0, c["unit"])
        low, high = (f"{scale * c[end]:.3g}" for end in ("low", "high"))
        bound = " (at its bound)" if c["is_at_bound"] else ""
        lines.append([f"`{name}`", f"{scale * c['value']:.3g}", f"{low} to {high}", unit, c["meaning"] + bound])
    return table(["coefficient", "value", "90 % interval", "unit", "what it is"], lines)


def power_starts(power: Mapping[str, Any]) -> str:
    """Return the left-out error of the power law of each engine start, given the activity."""
    errors = power["report"]["median_abs_error"]
    starts = {k.partition(" ")[2]: v for k, v in errors.items() if "__" in k}
    lines = [[short(run), percent(error)] for run, error in sorted(starts.items(), key=lambda item: short(item[0]))]
    whole, p90 = percent(errors["board_power_w"]), percent(errors["board_power_w p90"])
    lines.append(["**all cells**", f"**{whole}**, P90 {p90}"])
    return table(["engine start left out", "median error of board power, given the activity"], lines)


def with_block(text: str, name: str, content: str) -> str:
    """Return a page with the lines between its two markers replaced. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page needs the two markers {begin} and {end}, once each")
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def pages(folder: Path = ROOT / "data" / "fitted") -> dict[Path, str]:
    """Return every generated page with its text, from the fit in `folder`."""
    accuracy = {}
    for name in ("accuracy", "accuracy_cells"):
        accuracy |= json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    fitted = json.loads((folder / "vllm.json").read_text(encoding="utf-8"))
    power = json.loads((folder / "power.json").read_text(encoding="utf-8"))
    unknown = sorted({n for n in fitted["coefficients"] if "@" not in n} - set(BY_NAME))
    if unknown:
        raise ValueError(f"data/fitted/vllm.json has coefficients that the law does not know: {', '.join(unknown)}")
    found = {
        ROOT / "docs/images/accuracy-by-start.svg": panels(
            {
                name: {short(run): (e[m]["median"], e[m]["p90"]) for run, e in accuracy["by_run"].items() if m in e}
                for m, name in METRICS.items()
                if m != "kv_blocks"
            },
            targets={name: TARGETS[m][0] for m, name in METRICS.items()},
        )
    }
    points = accuracy.get("rows", [])
    if points:
        found[ROOT / "docs/images/accuracy-points.svg"] = scatter(
            {
                name: [(p["measured"], p["predicted"], short(p["run_id"])) for p in points if p["metric"] == m]
                for m, name in METRICS.items()
                if m != "kv_blocks"
            }
        )
    found[ROOT / "docs/accuracy.md"] = page(accuracy, fitted, bool(points))
    blocks = {
        "README.md": {"accuracy": headline(accuracy, fitted)},
        "CHANGELOG.md": {"accuracy": changelog_line(accuracy)},
        "docs/methodology.md": {"coefficients": law_table()},
        "docs/power.md": {"power-coefficients": power_coefficients(power), "power-starts": power_starts(power)},
    }
    for name, contents in blocks.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for block, content in contents.items():
            text = with_block(text, block, content)
        found[ROOT / name] = text
    return found


def main() -> int:
    stale = []
    for path, text in pages().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv[1:]:
            stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"not what the last fit says: {', '.join(stale)}; run scripts/gen_accuracy.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
