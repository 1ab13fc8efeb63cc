"""Plans and recommendations as text of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advisor.cli.text import WIDTH, breakdown_lines, bullet, format_interval, format_quantity, table, wrapped
from advisor.predict.deepspeed_paths import path_of
from advisor.recommend.ask import Question
from advisor.recommend.compare import OWN_SHARE, OwnLimit, duels
from advisor.recommend.explain import DEEPSPEED_LABELS, layout_short, layout_text, workload_text
from advisor.recommend.form import settled
from advisor.schema import Breakdown, Note, Plan, Recommendation
from advisor.units import format_count, format_rate, format_s, format_usd, format_w

MAIN = (
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "e2e_p99_s",
    "requests_per_s",
    "output_tokens_per_s",
    "saturation_requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment_frac",
    "memory_bytes_per_gpu",
    "kv_cache_tokens",
    "kv_occupancy_frac",
    "board_power_w",
    "energy_j_per_output_token",
    "usd_per_h",
    "usd_per_million_output_tokens",
    "kgco2e_per_h",
    "kgco2e_per_million_output_tokens",
    "mfu_frac",
    "mbu_frac",
)
LABELS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end to end",
}


WHOLE_LABELS = {
    "step_s": "time of a step",
    "duration_s": "time of all tokens",
    "tokens_per_s": "tokens trained a second",
    "bubble_frac": "pipeline bubble",
    "allocated_bytes_per_gpu": "peak that torch allocates a GPU",
    "host_bytes_per_node": "host memory a node",
    "drive_bytes_per_node": "on drives a node",
    "sent_bytes_per_gpu": "sent by a GPU in a step",
    "energy_j_per_token": "energy per token",
    "kgco2e_per_h": "kgCO2e an hour",
    "kgco2e_per_million_output_tokens": "kgCO2e of a million output tokens",
    "usd_per_h": "cost an hour",
    "usd_per_million_output_tokens": "cost of a million output tokens",
}


def label(name: str) -> str:
    """Return a quantity's name for people, without its unit."""
    if name in WHOLE_LABELS:
        return WHOLE_LABELS[name]
    words = name.split("_")
    if words[0] in LABELS:
        return f"{LABELS[words[0]]}, {words[1]}"
    if name.startswith("n_"):
        return name[2:].replace("_", " ")
    for suffix in ("_bytes_per_gpu", "_per_s", "_frac", "_w", "_s"):
        if name.endswith(suffix):
            per = {"_bytes_per_gpu": " a GPU", "_per_s": " a second"}.get(suffix, "")
            return name.removesuffix(suffix).replace("_", " ") + per
    return name.replace("_", " ").replace(" j ", " ")


def backend_text(backend: str) -> str:
    """Return a backend's name for people."""
    return "vLLM" if backend == "vllm" else f"DS {DEEPSPEED_LABELS[backend]}"


def _state(plan: Plan) -> str:
    if plan.prediction.is_saturated:
        return "overload"
    return "yes" if plan.meets_slo else "no"


def _row(plan: Plan, *, with_gpu: bool) -> list[str]:
    p = plan.prediction
    q = p.quantities
    d = plan.deployment
    shape = layout_short(d)
    if d.backend == "vllm" and d.weight_dtype not in ("bf16", "fp16"):
        shape = f"{shape} {d.weight_dtype}".strip()
    name = f"{backend_text(plan.backend)} {shape}".rstrip()

    def latency(quantity: str) -> str:
        # the latency of a saturated plan grows with the time of watching: no number
        return "-" if p.is_saturated or quantity not in q else format_s(q[quantity].value)

    usd = q.get("usd_per_million_output_tokens")
    return [
        f"{plan.rank}{'*' if plan.is_pareto else ''}",
        name,
        f"{d.n_gpus}x {d.gpu}" if with_gpu else str(d.n_gpus),
        format_usd(plan.usd_per_h) if plan.usd_per_h else "-",
        format_usd(usd.value) if usd else "-",
        latency("ttft_p99_s"),
        latency("tpot_p99_s"),
        format_count(q["output_tokens_per_s"].value),
        format_w(q["board_power_w"].value) if "board_power_w" in q else "-",
        _state(plan) if p.method != "steady" else f"{_state(plan)}~",
    ]


HEAD = ("#", "plan", "GPUs", "$/h", "$/Mtok", "TTFT P99", "TPOT P99", "tok/s", "power", "meets")


def plan_table(plans: Sequence[Plan], *, with_gpu: bool) -> list[str]:
    """Return the ranked plans as a table."""
    return table(HEAD, [_row(p, with_gpu=with_gpu) for p in plans], left=2)


def numbers(plan: Plan, names: Sequence[str] = MAIN) -> list[str]:
    """Return the plan's main quantities with their 90 % intervals."""
    q = settled(plan.prediction)
    rows = [(f"  {label(n)}", format_interval(n, q[n])) for n in names if n in q]
    width = max((len(r[0]) for r in rows), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in rows]


def notes_lines(notes: Sequence[Note], *, verbose: bool) -> list[str]:
    """Return remarks, warnings first; without `verbose` each text once and only the first dozen."""
    order = {"error": 0, "warning": 1, "info": 2}
    unique = list({n.text: n for n in notes}.values())
    ranked = sorted(unique, key=lambda n: order[n.level])
    shown = ranked if verbose else ranked[:12]
    return [line for n in shown for line in bullet(f"{n.level}: {n.text}" if n.level != "info" else n.text)]


def _breakdowns(breakdowns: Sequence[Breakdown], *, verbose: bool) -> list[str]:
    chosen = breakdowns if verbose else breakdowns[:1]
    return [line for b in chosen for line in ["", *breakdown_lines(b)]]


def recommendation_lines(answer: Recommendation, *, verbose: bool = False) -> list[str]:
    """Return the whole answer."""
    with_gpu = "," in answer.gpus
    lines = [f"{answer.model} on {answer.gpus}"]
    lines += wrapped(answer.model_note, indent="") if answer.model_note else []
    if answer.plans:
        lines += ["", *plan_table(answer.plans, with_gpu=with_gpu)]
        lines += ["* on the Pareto front of cost, latency and energy; ~ closed form, not simulated"]
    else:
        lines += ["", "Nothing fits. What was tried and why it fails:"]
    best = answer.best
    if answer.why:
        lines += ["", "Why", *(line for text in answer.why for line in bullet(text))]
    if answer.flips:
        lines += ["", "What would flip it", *(line for text in answer.flips for line in bullet(text))]
    if best is not None:
        lines += ["", f"Best plan: {backend_text(best.backend)}, {layout_text(best.deployment)}, value [90 % interval]"]
        lines += numbers(best)
        lines += _breakdowns(best.prediction.breakdowns, verbose=verbose)
    lines += accuracy_lines(answer)
    if answer.rejected:
        lines += ["", "Rejected"]
        shown = answer.rejected if verbose else answer.rejected[:6]
        for r in shown:
            nearest = f" Nearest that fits: {r.nearest}." if r.nearest else ""
            many = f"{r.count:,} plans of " if r.count > 1 else ""
            text = f"{many}{backend_text(r.backend)} on {r.deployment.gpu}: {r.reason}.{nearest}"
            lines += bullet(text)
        if len(shown) < len(answer.rejected):
            lines += bullet(f"and {len(answer.rejected) - len(shown)} more groups: -v")
    remarks = [*answer.notes]
    if best is not None:
        remarks += [*best.notes, *best.prediction.notes]
    if remarks:
        lines += ["", "Notes", *notes_lines(remarks, verbose=verbose)]
    if best is not None:
        lines += ["", "Run it", *command_lines(best)]
    return lines


def accuracy_lines(answer: Recommendation) -> list[str]:
    """Return how far predictions were off on measured engine starts that the fit did not see."""
    report = answer.accuracy
    if not report:
        return []
    shown = (
        ("ttft_s.p50", "TTFT P50"),
        ("ttft_s.p99", "TTFT P99"),
        ("tpot_s.p50", "TPOT P50"),
        ("requests_per_s", "requests/s"),
        ("board_power_w.mean", "power"),
    )
    groups = {"all runs": report["overall"], **report["regimes"]}
    rows = [
        (name, *(f"{100 * e[m]['median']:.1f} / {100 * e[m]['p90']:.0f} %" if m in e else "-" for m, _ in shown))
        for name, e in groups.items()
    ]
    head = ("left-out runs, median / P90", *(label for _, label in shown))
    lines = ["", "How far off it was on measured runs", *(f"  {line}" for line in table(head, rows))]
    if report["unmeasured"]:
        lines += wrapped(f"no run of ours: {', '.join(report['unmeasured'])}")
    return lines


def command_lines(plan: Plan) -> list[str]:
    """Return the command to copy: on one line, so that it can be selected with three clicks."""
    return [f"  {plan.command}"]


def plan_lines(question: Question, plan: Plan, *, verbose: bool = False) -> list[str]:
    """Return one predicted deployment."""
    d = plan.deployment
    lines = [f"{question.model.name} on {question.pools[0].name}: {backend_text(plan.backend)}, {layout_text(d)}"]
    lines += wrapped(workload_text(question), indent="")
    lines += ["", "value [90 % interval]", *numbers(plan)]
    if verbose:
        rest = [n for n in plan.prediction.quantities if n not in MAIN]
        lines += numbers(plan, rest)
    lines += _breakdowns(plan.prediction.breakdowns, verbose=verbose)
    if plan.reasons:
        lines += ["", "Targets", *(line for text in plan.reasons for line in bullet(text))]
    remarks = [*question.model_notes, *question.notes, *plan.notes, *plan.prediction.notes]
    if remarks:
        lines += ["", "Notes", *notes_lines(remarks, verbose=verbose)]
    return [*lines, "", "Run it", *command_lines(plan)]


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the columns of each table: the first in all of them, as many others as fit the width."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    found: list[list[int]] = [[0]]
    for i in range(1, len(head)):
        if sum(widths[k] + 2 for k in found[-1]) + widths[i] > WIDTH and len(found[-1]) > 1:
            found.append([0])
        found[-1].append(i)
    return found


COMPARED = (
    "requests_per_s",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "e2e_p99_s",
    "memory_bytes_per_gpu",
    "host_memory_bytes_per_gpu",
    "board_power_w",
    "energy_j_per_output_token",
    "usd_per_h",
    "usd_per_million_output_tokens",
)


def _effort(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """Return what each plan asks of its user: processes to start, server or own script, batching, maintenance."""

    def of(plan: Plan, ours: str, yes: str, no: str, fact: str) -> str:
        return ours if plan.backend == "vllm" else yes if getattr(path_of(plan.backend), fact) else no

    alone = {"deepspeed-zero-inference"}
    copies = [1 if p.backend in alone else p.deployment.dp for p in plans]
    return [
        ("complexity: copies to start", *(str(n) for n in copies)),
        ("complexity: what runs", *(of(p, "server", "MII server", "own script", "has_server") for p in plans)),
        (
            "complexity: batching",
            *(of(p, "continuous", "continuous", "static", "has_continuous_batching") for p in plans),
        ),
        ("software maintained", *(of(p, "yes", "yes", "no", "is_maintained") for p in plans)),
    ]


OWN = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s", "e2e_p99_s")


def compare_lines(answer: Recommendation, own: Mapping[str, OwnLimit]) -> list[str]:
    """Return the best plan of each backend side by side.

    own : each backend's limit and what it does at the same share of it, by backend; empty = not needed.
    """
    with_gpu = "," in answer.gpus
    plans = sorted(answer.best_by_backend.values(), key=lambda p: (p.backend != "vllm", p.rank))
    lines = [f"{answer.model} on {answer.gpus}"]
    if not plans:
        return [*lines, "", "No backend can run it:", *(x for r in answer.rejected for x in bullet(r.reason))]
    rows = [("layout", *(f"{p.deployment.n_gpus}x {layout_short(p.deployment)}".strip() for p in plans))]
    for name in COMPARED:
        cells = [settled(p.prediction).get(name) for p in plans]
        if any(cells):
            rows.append((label(name), *(format_quantity(name, c.value) if c else "-" for c in cells)))
    if own:
        most = [own[p.backend].requests_per_s if p.backend in own else None for p in plans]
        rows.append(("most it can serve", *(format_rate(m, "requests") if m else "-" for m in most)))
    for name in OWN if own else ():
        cells = [own[p.backend].prediction.quantities.get(name) if p.backend in own else None for p in plans]
        metric, statistic, _ = name.upper().split("_")
        row = f"at {OWN_SHARE:.0%} of its limit: {metric} {statistic}"
        rows.append((row, *(format_quantity(name, c.value) if c else "-" for c in cells)))
    rows.append(("meets the targets", *(_state(p) for p in plans)))
    rows += _effort(plans)
    head = (
        "",
        *(f"{backend_text(p.backend)} {p.deployment.gpu}" if with_gpu else backend_text(p.backend) for p in plans),
    )
    for columns in _columns(head, rows):
        lines += ["", *table([head[i] for i in columns], [[row[i] for i in columns] for row in rows])]
    lines += ["", *(line for text in answer.why for line in bullet(text))]
    for one, other, found in duels(plans):
        if one is not plans[0]:
            continue
        name = f"{backend_text(one.backend)} against {backend_text(other.backend)}"
        lines += bullet(f"{name}: {found.text(backend_text(other.backend))}.")
    for plan in plans:
        lines += ["", f"{backend_text(plan.backend)}:", *command_lines(plan)]
        lines += notes_lines([n for n in (*plan.notes, *plan.prediction.notes) if n.level != "info"], verbose=False)
    return lines
