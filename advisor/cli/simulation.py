"""Command simulate: one deployment replayed request by request; capacity: what it carries within its targets."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from advisor.catalog import load_catalog
from advisor.cli.parse import request_fields
from advisor.cli.serve import chosen
from advisor.cli.show_plan import label
from advisor.cli.text import bullet, format_quantity, out, print_json, table, wrapped
from advisor.errors import DomainError
from advisor.predict.capacity import MAX_LOAD_FRAC, max_rate
from advisor.predict.serving import replay
from advisor.predict.simulate import STATISTICS, Simulation
from advisor.recommend.ask import Question, ask, fit_context
from advisor.recommend.explain import layout_text, workload_text
from advisor.recommend.look import roofline_of
from advisor.recommend.one import check_vllm, deployment_of
from advisor.schema import SCHEMA_VERSION, ClosedLoad, ConstantLoad, GammaLoad, PoissonLoad, Request, Workload
from advisor.schema.roofline import Roofline
from advisor.units import format_count, format_rate, format_s, format_usd, plural

METRICS = ("ttft", "tpot", "itl", "e2e")
N_SAMPLES = 300
SHOWN_SAMPLES = 12


def question_of(args: argparse.Namespace) -> Question:
    """Return the question with the traffic that only `simulate` knows: traces, bursts, counts."""
    fields = request_fields(args)
    fields.setdefault("is_best_effort", "slo" not in fields)
    question = ask(Request.model_validate(fields), load_catalog())
    if args.trace:
        from advisor.study.trace import read_trace

        asked = read_trace(Path(args.trace), args.trace_name, Path(args.trace).stem)
        asked = asked.model_copy(update={"prefix": question.workload.prefix})
        workload, length, fault, _ = fit_context(asked, question.model, question.request)
        return replace(question, workload=workload, max_model_len=length, context_fault=fault)
    return replace(question, workload=_shaped(question.workload, args))


def _shaped(workload: Workload, args: argparse.Namespace) -> Workload:
    load = workload.load
    extra = {"n_requests": args.requests} if args.requests is not None else {}
    if isinstance(load, ClosedLoad):
        if args.arrivals != "poisson" or args.duration is not None:
            raise DomainError("--arrivals and --duration shape an open load: give --rate instead of --concurrency")
        changed: Any = ClosedLoad.model_validate(load.model_dump() | extra)
    else:
        fields = {"arrivals_per_s": load.arrivals_per_s, "duration_s": args.duration} | extra
        if args.arrivals == "gamma":
            changed = GammaLoad.model_validate(fields | {"cv": args.cv})
        else:
            changed = (ConstantLoad if args.arrivals == "constant" else PoissonLoad).model_validate(fields)
    return workload.model_copy(update={"load": changed})


def _statistics(simulation: Simulation) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        values = {s: simulation.latency(metric, s) for s in STATISTICS}  # type: ignore[arg-type]
        found[f"{metric}_s"] = {s: v for s, v in values.items() if math.isfinite(v)}
    return found


def _timeline(simulation: Simulation, n: int) -> list[tuple[float, int, int, int]]:
    points = simulation.timeline
    return [points[i * len(points) // n] for i in range(min(n, len(points)))] if points else []


def _write(simulation: Simulation, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("submitted_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s"))
        columns = (simulation.submitted_s, simulation.prompt_tokens, simulation.output_tokens)
        for row in zip(*columns, simulation.ttft_s, simulation.tpot_s, simulation.e2e_s, strict=True):
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])


def simulate(args: argparse.Namespace) -> int:
    """Print what each request would have seen, and what the engine did."""
    question = question_of(args)
    deployment = deployment_of(question, chosen(args))
    vllm = check_vllm(question, deployment)

    def progress(share: float) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rsimulating {share:.0%}{chr(10) if share >= 1 else ''}")

    start = perf_counter()
    run = replay(
        question.model,
        question.pools[0].cluster,
        deployment,
        question.workload,
        vllm,
        seed=question.request.seed,
        facts=question.facts,
        n_samples=N_SAMPLES,
        progress=progress,
    )
    took_s = perf_counter() - start
    simulation = run.simulation
    if args.out:
        _write(simulation, Path(args.out))
    n = len(simulation.ttft_s)
    output_rate = float(simulation.output_tokens.sum()) / simulation.duration_s
    totals = {
        "n_requests": n,
        "duration_s": simulation.duration_s,
        "requests_per_s": simulation.requests_per_s,
        "output_tokens_per_s": output_rate,
        "n_preemptions": simulation.total("n_preemptions"),
        "n_steps": simulation.total("n_steps"),
    }
    if question.slo.targets:
        totals["slo_attainment_frac"] = float(simulation.attainment(question.slo).mean())
    timeline = _timeline(simulation, SHOWN_SAMPLES)
    roof = roofline_of(question, deployment, run)
    if args.json:
        form: dict[str, Any] = {"deployment": deployment.model_dump(mode="json"), "totals": totals}
        form["latency"] = _statistics(simulation)
        points = [dict(zip(("time_s", "n_running", "n_waiting", "n_blocks"), p, strict=True)) for p in timeline]
        form |= {"timeline": points, "roofline": roof.model_dump(mode="json")}
        print_json({"schema_version": SCHEMA_VERSION, "model": question.model.name} | form)
        return 0
    out(f"{question.model.name} on {question.pools[0].name}: vLLM, {layout_text(deployment)}")
    out("\n".join(wrapped(f"{workload_text(question)}; {n:,} requests replayed in {format_s(took_s)}", indent="")))
    out()
    rows = [
        (name.removesuffix("_s").upper(), *(format_s(values[s]) if s in values else "-" for s in STATISTICS))
        for name, values in _statistics(simulation).items()
    ]
    out("\n".join(table(("", *STATISTICS), rows)))
    out()
    out("\n".join(f"  {label(k):<24} {format_quantity(k, v)}" for k, v in totals.items()))
    if timeline:
        out()
        blocks = run.replica.limits.n_kv_blocks * deployment.dp
        rows = [(format_s(t), f"{a:,}", f"{b:,}", f"{c / max(blocks, 1):.1%}") for t, a, b, c in timeline]
        out("\n".join(table(("time", "running", "waiting", "KV used"), rows)))
    out("\n".join(["", *_roofline_lines(roof)]))
    return 0


def _roofline_lines(found: Roofline) -> list[str]:
    """Return where prefill, decode and the whole run lie under the card's roof."""
    rows = [
        (
            p.name,
            p.what,
            f"{p.flops_per_byte:.3g}",
            format_count(p.flops_per_s),
            f"{p.flops_per_s / found.peak_flops_per_s:.0%}",
            f"{p.flops_per_s / p.flops_per_byte / found.memory_bandwidth_bytes_per_s:.0%}",
        )
        for p in found.points
    ]
    head = ("roofline", "step", "FLOP/byte", "FLOP/s a GPU", "of peak", "of bandwidth")
    ridge = f"The card's ridge is at {found.ridge_flops_per_byte:.0f} FLOP/byte: left of it memory is the limit."
    return [*table(head, rows, left=2), *wrapped(ridge, indent="")]


def capacity(args: argparse.Namespace) -> int:
    """Print the largest rate within the targets, and the GPUs that a load needs."""
    fields = request_fields(args)
    question = ask(Request.model_validate(fields), load_catalog())
    if not question.slo.targets:
        raise DomainError("capacity needs targets: give --slo such as ttft_p99=500ms,tpot_p99=50ms")
    deployment = deployment_of(question, chosen(args) | {"dp": 1})
    vllm = check_vllm(question, deployment)
    pool = question.pools[0]
    rate = max_rate(
        question.model, pool.cluster, deployment, question.workload, vllm, question.slo, facts=question.facts
    )
    if rate <= 0:
        raise DomainError(f"one replica ({layout_text(deployment)}) misses the targets at any rate; relax them")
    load = question.workload.load
    offered = None if isinstance(load, ClosedLoad) else load.arrivals_per_s
    replicas = math.ceil(offered / rate - 1e-9) if offered is not None else None
    gpus = replicas * deployment.n_gpus if replicas is not None else None
    if args.json:
        form = {
            "deployment": deployment.model_dump(mode="json"),
            "slo": question.slo.model_dump(mode="json"),
            "max_requests_per_s_per_replica": rate,
            "offered_requests_per_s": offered,
            "n_replicas": replicas,
            "n_gpus": gpus,
            "usd_per_h": gpus * pool.usd_per_gpu_h if gpus and pool.usd_per_gpu_h else None,
        }
        print_json({"schema_version": SCHEMA_VERSION, "model": question.model.name} | form)
        return 0
    targets = ", ".join(f"{t.name} <= {format_s(t.max_s)}" for t in question.slo.targets)
    out(f"{question.model.name} on {pool.cluster.gpu.name}: vLLM, {layout_text(deployment)} a replica; {targets}")
    lines = [
        f"One replica carries {format_rate(rate, 'requests')} (Poisson arrivals, simulated; at most"
        f" {MAX_LOAD_FRAC:.0%} of saturation, beyond which queues grow without measure)."
    ]
    if replicas is not None and gpus is not None and offered is not None:
        cost = f", {format_usd(gpus * pool.usd_per_gpu_h)}/h" if pool.usd_per_gpu_h else ""
        lines.append(
            f"{format_rate(offered, 'requests')} need {plural(replicas, 'replica')}, {plural(gpus, 'GPU')}{cost}."
        )
    out("\n".join(line for text in lines for line in bullet(text)))
    return 0
