"""Train: does a training job fit, which ZeRO stage, how long is a step, where does a pipeline wait."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import streamlit as st
from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.errors import AdvisorError, DomainError
from advisor.schema import Breakdown, Cluster, Model, Note, first_error
from advisor.schema.training import TrainJob, TrainPlan, TrainPrediction
from advisor.ui import call, charts, charts_plans, inputs, later, parts, state
from advisor.ui.command import shell, train_job_words, train_words
from advisor.ui.text import HELP, label, part_name, plain, sentence, show

HEADLINE = (
    *("step_s", "tokens_per_s", "allocated_bytes_per_gpu", "memory_bytes_per_gpu"),
    *("mfu_frac", "board_power_w", "bubble_frac", "duration_s"),
)
MAX_DRAWN = 16
"""Microbatches of a pipeline that are drawn; more are too thin to see."""
Stages = dict[int, tuple[TrainPrediction, tuple[str, str] | None]]
"""ZeRO stage to its prediction and (reason, what would fit) where its memory does not suffice."""
STAGES = {
    "0": "0: nothing sharded",
    "1": "1: optimizer states",
    "2": "2: + gradients",
    "3": "3: + parameters",
}


def render() -> None:
    """Show the page."""
    st.title("Training with DeepSpeed")
    with st.sidebar:
        name = state.catalogue_name(
            state.choice(
                "train_model",
                "Model",
                list(load_catalog().models()),
                default="llama-3.1-8b",
                help=HELP["model"],
                free=True,
            ),
            "model",
        )
        spec = inputs.gpu_spec()
    model, model_notes = load_catalog().model(name)
    parsed = load_catalog().clusters(spec)
    if len(parsed.clusters) > 1:
        raise DomainError(f"a training job runs on one pool, got {len(parsed.clusters)}; give a single GPU spec")
    cluster = parsed.clusters[0]
    wanted = _job(model, cluster)
    with st.container(key="job"):
        _wanted(wanted, model, cluster, spec, (*model_notes, *parsed.notes))
    # last, in a place of its own: what takes longest comes and goes without moving anything
    with st.container(key="best-jobs-place"):
        _best(model, cluster, wanted)


def _wanted(wanted: TrainJob, model: Model, cluster: Cluster, spec: str, remarks: Sequence[Note]) -> None:
    """Show the job of the side bar, or the same under a stage that runs where DeepSpeed refuses its own."""
    job = wanted
    stages, refused = _stages(model, cluster, job)
    if stages and wanted.zero_stage not in stages:
        job = at_stage(job, max(stages))
    chosen, misfit = stages.get(job.zero_stage, (None, None))
    is_running = chosen is not None and misfit is None and job is wanted
    mark = ":green-badge[:material/check: runs]" if is_running else ":red-badge[:material/block: does not run]"
    st.markdown(f"**{plain(model.name)}** on **{plain(spec)}**, ZeRO-{wanted.zero_stage} {mark}")
    if chosen:
        # four beside each other: with bubbles and a duration or without, they take two rows
        parts.headline(chosen.quantities, [n for n in HEADLINE if job.pp > 1 or n != "bubble_frac"], n_columns=4)
    # below the numbers, which so keep their place
    if job is not wanted or chosen is None:
        instead = f" All on this page is the same job under ZeRO-{job.zero_stage}." if chosen else ""
        st.error(plain(f"DeepSpeed refuses this job: {refused[wanted.zero_stage]}.{instead}"))
    if misfit:
        st.error(
            plain(
                f"This job does not run: {misfit[0]}. What would: {misfit[1]}. The numbers are what it would take if"
                " the memory were there."
            )
        )
    _bars(stages, cluster)
    if chosen:
        _step(chosen)
        _pipeline(model, cluster, job)
    told = [Note(text=f"Stage {stage}: {why}") for stage, why in refused.items()]
    parts.notes((*told, *remarks, *(chosen.notes if chosen else ())))
    if chosen:
        _files(chosen, job, model, cluster)
    commands = (train_job_words(job, spec), train_words(job, spec))
    parts.glossary("zero", "checkpointing", "bubble", "mfu", "tp", "pp", "dp", "interval")
    about = "The first line is this job, the second the search for the best ones."
    parts.equal_command("\n".join(shell(words) for words in commands), about)


def _job(model: Model, cluster: Cluster) -> TrainJob:
    """Return the job of the side bar; raises DomainError with a sentence."""
    with st.sidebar:
        stage = state.choice("stage", "ZeRO stage", tuple(STAGES.values()), default=STAGES["2"], help=HELP["zero"])
        fields: dict[str, Any] = {"zero_stage": int(stage[0])}
        fields["micro_batch_size"] = state.whole(
            "micro", "Micro batch [sequences/GPU]", default=1, high=4096, help="Sequences that a GPU computes at once."
        )
        fields["gradient_accumulation_steps"] = state.whole(
            "accumulate",
            "Accumulation [micro-steps]",
            default=8,
            help="Micro batches whose gradients are summed before the optimizer steps.",
        )
        fields["sequence_length"] = state.whole(
            "sequence", "Sequence [tokens]", default=2048, high=10**7, help=HELP["lengths"]
        )
        left, right = st.columns(2)
        with left:
            fields["tp"] = state.whole("train_tp", "TP [GPUs]", default=1, high=1024, help=HELP["tp"])
        with right:
            fields["pp"] = state.whole("train_pp", "PP [stages]", default=1, high=1024, help=HELP["pp"])
        fields["is_checkpointed"] = state.tick(
            "checkpointing", "Activation checkpointing", default=True, help=HELP["checkpointing"]
        )
        with st.expander("Offload, LoRA, software"):
            places = ("none", "cpu", "nvme")
            text = "Frees GPU memory for the price of moving it over the host's bus in every step."
            fields["offload_optimizer"] = state.choice(
                "offload", "Offload optimizer to", places, default="none", help=text
            )
            fields["offload_param"] = state.choice(
                "offload_param", "Offload parameters to", places, default="none", help=f"ZeRO stage 3 only. {text}"
            )
            text = "Trains small adapters of this rank beside frozen weights."
            fields["lora_rank"] = state.whole(
                "lora", "LoRA rank (0 = train all)", default=0, low=0, high=65536, help=text
            )
            stacks = ("transformers", "fused", "megatron")
            text = "Plain Hugging Face code, the same with fused kernels, or Megatron: they reach different speeds."
            fields["stack"] = state.choice("stack", "Model code", stacks, default="transformers", help=text)
            text = "Number format of weights and gradients; the optimizer keeps fp32 beside it."
            fields["dtype"] = state.choice("dtype", "Arithmetic", ("bf16", "fp16"), default="bf16", help=text)
            text = "Tokens of the whole run, for its duration, energy and cost."
            fields["total_tokens"] = (
                state.maybe_whole("tokens", "Train on [tokens]", high=10**15, hint="not asked", help=text) or 0
            )
    ranks = fields["tp"] * fields["pp"]
    if cluster.n_gpus % ranks:
        raise DomainError(f"TP x PP is {ranks}, which does not divide the {cluster.n_gpus} GPUs")
    try:
        job = TrainJob(model=model.name, dp=cluster.n_gpus // ranks, **fields)
    except ValidationError as error:
        raise DomainError(first_error(error)) from None
    return at_stage(job, job.zero_stage)


def at_stage(job: TrainJob, stage: int) -> TrainJob:
    """Return a job under a ZeRO stage, with the switches that the search for the best jobs sets there too."""
    can_overlap = stage in (1, 2) and job.pp == 1 and job.dp > 1
    optimizer = "fused-adam" if job.offload_optimizer == "none" else "cpu-adam"
    return job.model_copy(
        update={"zero_stage": stage, "has_overlap": True if can_overlap else None, "optimizer": optimizer}
    )


def _stages(model: Model, cluster: Cluster, job: TrainJob) -> tuple[Stages, dict[int, str]]:
    """Return the same job under each ZeRO stage, and why some stages are refused."""
    found: Stages = {}
    refused: dict[int, str] = {}
    for stage in range(4):
        try:
            found[stage] = call.train(model, cluster, at_stage(job, stage))
        except AdvisorError as error:
            refused[stage] = str(error)
    return found, refused


def _bars(stages: Stages, cluster: Cluster) -> None:
    st.subheader("Memory of one GPU under each ZeRO stage, at the peak of a step")
    bars = {f"ZeRO-{stage}": memory(p) for stage, (p, _) in stages.items()}
    if bars:
        limit, alt = call.card_limit(cluster.gpu.name), "Memory by purpose and ZeRO stage, beside the card"
        parts.chart(charts.stacked(bars, limit=limit, n_bars=len(STAGES)), "zero", alt)
        st.caption(
            "A job runs when everything but the allocator's slack fits: PyTorch keeps that memory for later tensors"
            " and gives it back when the card is full."
        )


def memory(prediction: TrainPrediction) -> Breakdown:
    """Return the memory breakdown of a training prediction."""
    return next(b for b in prediction.breakdowns if b.unit == "bytes")


def _step(prediction: TrainPrediction) -> None:
    st.subheader("Time of one optimizer step")
    step = next(b for b in prediction.breakdowns if b.unit == "s")
    parts.chart(charts.stacked({part_name(step.name): step}), "step", "Parts of the step time")


def _pipeline(model: Model, cluster: Cluster, job: TrainJob) -> None:
    st.subheader("The pipeline over time", help=HELP["bubble"])
    shown = job.model_copy(update={"gradient_accumulation_steps": min(job.gradient_accumulation_steps, MAX_DRAWN)})
    rows = [
        (f"stage {one.stage}", "forward" if one.is_forward else "backward", one.begin_s, one.end_s)
        for one in call.pipeline(model, cluster, shown)
    ]
    text = "Forward and backward passes of each stage over time; hatched gaps are bubbles"
    parts.chart(charts_plans.slots(rows), "pipeline", text)
    if job.pp == 1:
        st.caption("One stage: nothing waits for another one. Set PP to 2 or more in the side bar to see the bubbles.")
        return
    cut = f" Only {MAX_DRAWN} of {job.gradient_accumulation_steps} are drawn." if shown != job else ""
    st.caption(
        f"Each block is one microbatch; hatched is waiting. The busiest stage waits"
        f" {show('_frac', 1 - charts_plans.busiest_frac(rows))} of what is drawn, the others longer. More micro-steps"
        f" make the bubbles rarer.{cut}"
    )


def _files(prediction: TrainPrediction, job: TrainJob, model: Model, cluster: Cluster) -> None:
    st.subheader("What to run")
    config, command, script = call.training_files(job, model, cluster)
    st.code(command, language="bash", wrap_lines=True)
    parts.downloads(
        {
            "DeepSpeed config": ("ds_config.json", "application/json", json.dumps(config, indent=2)),
            "Training script": ("train_pipeline.py" if job.pp > 1 else "train.py", "text/x-python", script),
            "Prediction (JSON)": ("training.json", "application/json", prediction.model_dump_json(indent=1)),
            "Numbers (CSV)": ("training.csv", "text/csv", parts.quantities_csv(prediction.quantities)),
        },
        "train",
    )
    with st.expander("Read ds_config.json"):
        st.code(json.dumps(config, indent=2), language="json", height=parts.FILE_PX)


def _best(model: Model, cluster: Cluster, job: TrainJob) -> None:
    st.subheader("The best jobs with this batch and length")
    answer, key = call.train_answer(model, cluster, job)
    with st.container(key="best-jobs-state"):
        if answer is None:
            later.fill_in(key, "Comparing training jobs ...")
        else:
            st.caption("All GPUs, every ZeRO stage, degree, offload and micro batch; the fastest that fit.")
    if answer is None:
        return
    if answer.best is None:
        st.error(f"No job trains {plain(model.name)} on these GPUs.")
    rows = [_row(p) for p in answer.plans]
    names = ("step_s", "tokens_per_s", "allocated_bytes_per_gpu", "mfu_frac")
    parts.table(rows, {label(n): partial(show, n) for n in names}, "best-jobs")
    parts.downloads(
        {
            "Best jobs (JSON)": ("jobs.json", "application/json", answer.model_dump_json(indent=1)),
            "Best jobs (CSV)": ("jobs.csv", "text/csv", partial(_jobs_csv, answer.plans)),
        },
        "jobs",
    )
    parts.reasons(answer.why, answer.flips)
    parts.listed("How far the others are behind", map(sentence, answer.alternatives))
    if answer.rejected:
        with st.expander("Why not the others"):
            rejected = [{"reason": r.reason, "what would fit": r.nearest, "jobs": r.count} for r in answer.rejected]
            parts.table(rejected, {}, "rejected-jobs")


def _jobs_csv(plans: Sequence[TrainPlan]) -> str:
    """Return jobs as CSV in SI units: every setting, every quantity with value, low and high."""
    rows = []
    for p in plans:
        row: dict[str, Any] = {"rank": p.rank} | p.job.model_dump(mode="json", exclude={"stage_layers"})
        for name, q in p.prediction.quantities.items():
            row |= {name: q.value, f"{name}_low": q.low, f"{name}_high": q.high}
        rows.append(row | {"command": p.command})
    return parts.to_csv(rows)


def _row(plan: TrainPlan) -> dict[str, Any]:
    job, q = plan.job, plan.prediction
    row: dict[str, Any] = {
        "#": plan.rank,
        "ZeRO": job.zero_stage,
        "offload": f"{job.offload_optimizer} / {job.offload_param}",
        "TP": job.tp,
        "PP": job.pp,
        "DP": job.dp,
        "micro batch": job.micro_batch_size,
        "micro-steps": job.gradient_accumulation_steps,
        "checkpointing": "yes" if job.is_checkpointed else "",
    }
    return row | {label(n): q[n] for n in ("step_s", "tokens_per_s", "allocated_bytes_per_gpu", "mfu_frac")}
