"""Commands train and mixed: DeepSpeed training plans, and one GPU budget for serving and offline work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from advisor.catalog import load_catalog
from advisor.cli.month import month_lines
from advisor.cli.parse import request_fields
from advisor.cli.show_plan import label
from advisor.cli.text import breakdown_lines, bullet, format_interval, out, print_json, table
from advisor.cli.training_options import fixed_fields
from advisor.emit.deepspeed_training import training_files
from advisor.errors import DomainError
from advisor.recommend.ask import ask
from advisor.recommend.day import Day, Offline, plan_day
from advisor.recommend.explain import layout_text
from advisor.recommend.month import month_of
from advisor.recommend.training import recommend_training
from advisor.recommend.training_flips import label as job_label
from advisor.schema import SCHEMA_VERSION, Cluster, Model, Request
from advisor.schema.mixed import HOURS, HourPlan, MixedPlan, OfflineJob
from advisor.schema.training import TrainAnswer, TrainPlan
from advisor.units import format_bytes, format_count, format_frac, format_j, format_rate, format_s, format_usd, plural

MAIN = (
    "step_s",
    "tokens_per_s",
    "mfu_frac",
    "bubble_frac",
    "duration_s",
    "allocated_bytes_per_gpu",
    "memory_bytes_per_gpu",
    "host_bytes_per_node",
    "drive_bytes_per_node",
    "sent_bytes_per_gpu",
    "board_power_w",
    "energy_j_per_token",
)


def _row(plan: TrainPlan) -> list[str]:
    job, q = plan.job, plan.prediction.quantities
    return [
        str(plan.rank),
        f"ZeRO-{job.zero_stage}" + (" ckpt" if job.is_checkpointed else ""),
        f"{job.offload_optimizer}/{job.offload_param}",
        f"{job.tp}/{job.pp}/{job.dp}",
        f"{job.micro_batch_size}x{job.gradient_accumulation_steps}",
        format_s(q["step_s"].value),
        format_count(q["tokens_per_s"].value),
        format_frac(q["mfu_frac"].value),
        format_bytes(q["allocated_bytes_per_gpu"].value),
        format_usd(plan.usd_per_million_tokens) if plan.usd_per_million_tokens else "-",
    ]


def _rejected_lines(answer: TrainAnswer, *, verbose: bool) -> list[str]:
    shown = answer.rejected if verbose else answer.rejected[:6]
    lines = []
    for r in shown:
        many = f"{r.count:,} plans such as " if r.count > 1 else ""
        nearest = f" Nearest that fits: {r.nearest}." if r.nearest else ""
        lines += bullet(f"{many}{job_label(r.job)}: {r.reason}.{nearest}")
    if len(shown) < len(answer.rejected):
        lines += bullet(f"and {plural(len(answer.rejected) - len(shown), 'more group')}: -v")
    return lines


def train(args: argparse.Namespace) -> int:
    """Print the ranked ways to train a model on the GPUs."""
    catalog = load_catalog()
    question = ask(Request.model_validate(request_fields(args)), catalog)
    pool = question.pools[0]
    if len(question.pools) > 1:
        raise DomainError(f"a training job runs on one pool, got {len(question.pools)}; give a single GPU spec")
    answer = recommend_training(
        question.model,
        pool.cluster,
        catalog.coefficients("deepspeed"),
        global_batch=args.global_batch,
        sequence_length=args.sequence_length,
        objective=args.objective or "throughput",
        lora_rank=args.lora_rank,
        total_tokens=args.tokens,
        fixed=fixed_fields(args),
        usd_per_gpu_h=pool.usd_per_gpu_h or 0.0,
    )
    if args.out:
        _write(Path(args.out), answer, question.model, pool.cluster)
    if args.json:
        print_json({"schema_version": SCHEMA_VERSION} | answer.model_dump(mode="json"))
        return 0
    out(f"{answer.model} on {pool.name}: batches of {args.global_batch} x {args.sequence_length:,} tokens")
    if not answer.plans:
        out("\nNo job of this kind can run; the reasons and what would are below.")
    if answer.plans:
        head = ("#", "plan", "offload", "tp/pp/dp", "batch", "step", "tok/s", "MFU", "memory", "$/Mtok")
        out("\n".join(["", *table(head, [_row(p) for p in answer.plans], left=2)]))
    texts_of = {
        "Why" if answer.plans else "What would do": answer.why,
        "What would flip it": answer.flips,
        "How far the others are behind": answer.alternatives,
    }
    for title, texts in texts_of.items():
        if texts:
            out("\n".join(["", title, *(line for text in texts for line in bullet(text))]))
    if answer.best is not None:
        q = answer.best.prediction.quantities
        rows = [f"  {label(n):<34} {format_interval(n, q[n])}" for n in MAIN if n in q and q[n].value]
        out("\n".join(["", "Best plan, value [90 % interval]", *rows]))
        for b in answer.best.prediction.breakdowns if args.verbose else answer.best.prediction.breakdowns[:1]:
            out("\n".join(["", *breakdown_lines(b)]))
    if answer.rejected:
        out("\n".join(["", "Rejected", *_rejected_lines(answer, verbose=args.verbose)]))
    remarks = [*question.model_notes, *answer.notes, *(answer.best.prediction.notes if answer.best else ())]
    out("\n".join(["", "Notes", *(line for n in remarks for line in bullet(n.text))]))
    if answer.best is not None:
        where = f"in {args.out}" if args.out else "--out FOLDER writes the files that it names, each line explained"
        out(f"\nRun it\n  {answer.best.command}\n  {where}")
    return 0


def _write(folder: Path, answer: TrainAnswer, model: Model, cluster: Cluster) -> None:
    """Write every file of the best plan. Raises DomainError when there is none or the folder cannot be written."""
    if answer.best is None:
        raise DomainError(f"nothing to write to {folder}: no job fits; {_nearest(answer)}")
    job = answer.best.job
    n_nodes = -(-job.n_gpus // cluster.gpus_per_node)
    files = training_files(job, model, n_nodes=n_nodes, gpus_per_node=min(job.n_gpus, cluster.gpus_per_node))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DomainError(f"cannot write to {folder}: {error.strerror}") from error


def _nearest(answer: TrainAnswer) -> str:
    """Return why the most frequent kind of job cannot run, and the nearest that would."""
    if not answer.rejected:
        return "no job was possible"
    first = answer.rejected[0]
    return f"{first.reason}; nearest that fits: {first.nearest or 'none'}"


def _doing(jobs: Sequence[OfflineJob], hour: HourPlan) -> str:
    """Return what works offline in an hour, such as '2 x vllm, 4 GPUs (TP 4)'."""
    words = []
    for job in jobs:
        for way, n in zip(job.ways, hour.job_groups[job.name], strict=True):
            if n:
                many = f"{n} x " if n > 1 else ""
                words.append(f"{many}{way.backend}" + (f", {way.plan}" if job.kind == "batch" else ""))
    return "; ".join(words)


def _hours(plan: MixedPlan, jobs: Sequence[OfflineJob]) -> list[str]:
    names = [job.name for job in jobs]
    rows = [
        (str(h.hour), str(h.serving_gpus), *(str(h.job_gpus[n]) for n in names), str(h.idle_gpus))
        for h in plan.hours[:HOURS]
    ]
    lines = table(("hour", "serving", *names, "idle"), rows)
    words = ["offline work by" if names else "", *(_doing(jobs, h) for h in plan.hours[:HOURS])]
    return [f"{line}  {text}".rstrip() for line, text in zip(lines, words, strict=True)]


def mixed(args: argparse.Namespace) -> int:
    """Print how one budget serves online and works offline, hour by hour: shared or split."""
    request = Request.model_validate(request_fields(args))
    if request.rate is None:
        raise DomainError("mixed needs the peak of the day: --rate REQUESTS_PER_S")
    day = Day(
        peak_requests_per_s=request.rate,
        night_frac=args.night_frac,
        peak_hour=args.peak_hour,
        headroom_frac=args.headroom,
        restart_s=args.restart,
    )
    wanted = Offline(
        batch_tokens=args.batch_tokens,
        batch_deadline=args.batch_deadline,
        train_tokens=args.train_tokens,
        train_deadline=args.train_deadline,
        train_gpus=args.train_gpus,
        train_model=args.train_model,
        lora_rank=args.lora_rank,
    )
    plan = plan_day(request, day, wanted)
    answer, need, jobs = plan.answer, plan.need, plan.jobs
    bill = month_of(request, plan)
    if args.json:
        parts = {"need": need.model_dump(mode="json"), "jobs": [j.model_dump(mode="json") for j in jobs]}
        parts["month"] = bill.model_dump(mode="json")
        print_json({"schema_version": SCHEMA_VERSION} | answer.model_dump(mode="json") | parts)
        return 0
    out(f"{plan.replica.model} on {request.gpus}: a replica is {layout_text(plan.replica)}")
    out("\n".join(bullet(f"a replica carries {format_rate(need.capacity_requests_per_s, 'requests')} in its targets")))
    for job in jobs:
        out("\n".join(bullet(f"{job.name}: {format_count(job.total_tokens)} tokens by hour {job.deadline_hour}")))
    best = answer.plan(answer.best)
    out(f"\nBest: {answer.best}" + ("" if best.meets_all else ", but it does not meet everything: see the end"))
    out("\n".join(line for text in answer.why for line in bullet(text)))
    out("\n".join(["", *_hours(best, jobs)]))
    cost = f"{format_usd(best.usd)}, " if best.usd else ""
    out(f"\n{cost}{format_j(best.energy_j)}, {plural(round(best.idle_gpu_hours), 'idle GPU hour')}")
    if best.notes:
        out("\n".join(line for n in best.notes for line in bullet(f"{n.level}: {n.text}")))
    out("\n".join(month_lines(bill)))
    return 0
