"""How to train or fine-tune a model on a cluster with DeepSpeed: every legal job, the best first, and why."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError

from advisor.emit.deepspeed_training import training_command
from advisor.errors import DomainError
from advisor.predict.train import feasible_train, predict_train, refusal
from advisor.recommend.space import MOST_GPUS, doublings
from advisor.recommend.training_flips import TrainObjective, behind, cost_of, is_tight, label, limits, outside_of
from advisor.schema import Cluster, CoefficientSet, Model, Note
from advisor.schema.base import first_error
from advisor.schema.training import OffloadTarget, TrainAnswer, TrainJob, TrainPlan, TrainPrediction, TrainRejected
from advisor.units import HOUR_S, MILLION, format_bytes, format_frac, format_rate, format_s, format_usd

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
DEGREES = (1, 2, 4, 8, 16)
OFFLOADS: tuple[tuple[OffloadTarget, OffloadTarget], ...] = (
    ("none", "none"),
    ("cpu", "none"),
    ("cpu", "cpu"),
    ("nvme", "nvme"),
)
PLACES = ("offload_optimizer", "offload_param")
LORA_RANK = 16
"""Rank of the adapters that are offered where full training does not fit."""
NEAR_FRAC = 0.03
"""Plans within this share of the best are as good as it: then the simpler one comes first."""


SEARCHED = ("tp", "pp", "zero_stage", "offload_optimizer", "offload_param", "micro_batch_size", "is_checkpointed")
"""Fields of a job that the search chooses; what the user fixes is tried as it is, even where DeepSpeed refuses it."""
ZERO_PLUS_PLUS = ("hpz_ranks", "has_quantized_weights", "has_quantized_gradients")


def _is_legal(model: Model, cluster: Cluster, choice: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed takes these degrees, this stage and these places, and the cluster has the drives."""
    tp, pp, stage = choice["tp"], choice["pp"], choice["zero_stage"]
    optimizer, param = (choice[name] for name in PLACES)
    if tp > cluster.gpus_per_node or pp > model.n_layers or model.n_heads % tp or model.d_ff % tp:
        return False
    if pp > 1 and (stage > 1 or optimizer != "none"):
        return False
    if (stage == 0 and optimizer != "none") or (stage < 3 and (param != "none" or optimizer == "nvme")):
        return False
    return "nvme" not in (optimizer, param) or cluster.nvme_bytes_per_s > 0


def _choices(model: Model, cluster: Cluster, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the degrees, stages and places to try; where what the user fixed leaves nothing legal, all of that."""
    stages = (3,) if any(fixed.get(name) for name in ZERO_PLUS_PLUS) else (0, 1, 2, 3)

    def some(name: str, every: Sequence[Any]) -> Sequence[Any]:
        return (fixed[name],) if name in fixed else every

    places = [pair for pair in OFFLOADS if all(fixed.get(k, v) == v for k, v in zip(PLACES, pair, strict=True))]
    places = places or [(fixed.get("offload_optimizer", "none"), fixed.get("offload_param", "none"))]
    every = [
        {"tp": tp, "pp": pp, "zero_stage": stage} | dict(zip(PLACES, place, strict=True))
        for tp, pp, stage, place in itertools.product(
            some("tp", DEGREES), some("pp", DEGREES), some("zero_stage", stages), places
        )
        if cluster.n_gpus % (tp * pp) == 0
    ]
    return [choice for choice in every if _is_legal(model, cluster, choice)] or every


def training_jobs(
    model: Model,
    cluster: Cluster,
    *,
    global_batch: int,
    sequence_length: int,
    fixed: Mapping[str, Any] | None = None,
) -> Iterator[TrainJob]:
    """Yield every job that DeepSpeed would take on all GPUs and that divides the global batch exactly.

    Pipelines only with stage 0 or 1, tensor parallelism inside a node, offloads by the stages that have them.
    fixed : fields of TrainJob that the user chose; a combination that DeepSpeed refuses is yielded where they ask for
    it, so that its reason can be told.
    """
    given = dict(fixed or {})
    micros = (given["micro_batch_size"],) if "micro_batch_size" in given else MICRO_BATCHES
    checkpointing = (given["is_checkpointed"],) if "is_checkpointed" in given else (False, True)
    others = {name: value for name, value in given.items() if name not in SEARCHED}
    for choice in _choices(model, cluster, given):
        dp = cluster.n_gpus // (choice["tp"] * choice["pp"])
        hpz: tuple[int, ...] = (0,)
        if cluster.n_nodes > 1 and choice["zero_stage"] == 3 and choice["tp"] == 1 and "hpz_ranks" not in given:
            hpz = (0, cluster.gpus_per_node)
        for micro, is_checkpointed, group in itertools.product(micros, checkpointing, hpz):
            if global_batch % (micro * dp):
                continue
            stage = choice["zero_stage"]
            fields = {
                "model": model.name,
                "micro_batch_size": micro,
                "sequence_length": sequence_length,
                "gradient_accumulation_steps": global_batch // (micro * dp),
                "dp": dp,
                "is_checkpointed": is_checkpointed,
                "has_overlap": True if stage in (1, 2) and choice["pp"] == 1 and dp > 1 else None,
                "optimizer": "fused-adam" if choice["offload_optimizer"] == "none" else "cpu-adam",
                "hpz_ranks": group,
                "dtype": "bf16" if "bf16" in cluster.gpu.peak_flops_per_s else "fp16",
            }
            try:
                yield TrainJob.model_validate(fields | choice | others)
            except ValidationError as error:
                raise DomainError(first_error(error)) from None


def complexity(job: TrainJob) -> int:
    """Return how much a job asks of its user: pipeline code, tensor split, offload, stage, in that order."""
    offload = (job.offload_optimizer != "none") + (job.offload_param != "none") + 2 * (job.offload_param == "nvme")
    zeropp = (job.hpz_ranks > 0) + 2 * job.has_quantized_weights + 2 * job.has_quantized_gradients
    return 8 * (job.pp > 1) + 4 * (job.tp > 1) + 2 * offload + zeropp + (job.zero_stage == 3) + (job.zero_stage > 0)


def _rank(
    found: list[tuple[TrainJob, TrainPrediction]], objective: TrainObjective, room: float
) -> list[tuple[TrainJob, TrainPrediction]]:
    """Return plans by objective: first those that surely fit, then those that may run out of memory.

    Among those near the best, simpler first, then the one with more memory left. room : bytes of a GPU
    """
    ordered = sorted(found, key=lambda f: (is_tight(f[1], room), cost_of(f[1], objective)))
    if not ordered:
        return ordered
    (_, first), limit = ordered[0], cost_of(ordered[0][1], objective) * (1 + NEAR_FRAC)
    near = [f for f in ordered if cost_of(f[1], objective) <= limit and is_tight(f[1], room) == is_tight(first, room)]
    near.sort(key=lambda f: (complexity(f[0]), f[1]["allocated_bytes_per_gpu"]))
    return near + [f for f in ordered if f not in near]


def _reasons(job: TrainJob, prediction: TrainPrediction, cluster: Cluster) -> tuple[str, ...]:
    q = prediction.quantities
    step = q["step_s"]
    rate, mfu = format_rate(prediction["tokens_per_s"], "tokens"), format_frac(prediction["mfu_frac"])
    room = format_bytes(cluster.gpu.device_memory_bytes)
    lines = [
        f"a step of {job.train_batch_size} sequences takes {format_s(step.value)} ({format_s(step.low)} to"
        f" {format_s(step.high)}): {rate}, {mfu} of the peak",
        f"peak memory {format_bytes(prediction['allocated_bytes_per_gpu'])} of {room} a GPU",
    ]
    segments = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    if is_tight(prediction, cluster.gpu.device_memory_bytes):
        lines.append(
            f"it may run out of memory: the peak may reach {format_bytes(q['allocated_bytes_per_gpu'].high)} beside"
            f" {format_bytes(outside_of(prediction))} of CUDA and NCCL; {segments}, or take a smaller micro batch or"
            " checkpointing"
        )
    elif q["memory_bytes_per_gpu"].high >= cluster.gpu.device_memory_bytes:
        lines.append(f"the allocator's freed blocks fill the card; against fragmentation {segments}")
    parts = {p.name: p.value for b in prediction.breakdowns if b.name == "step_s" for p in b.parts}
    waiting = {k: v / step.value for k, v in parts.items() if k != "forward_backward" and v > 0.05 * step.value}
    if waiting:
        lines.append("not computing: " + ", ".join(f"{k.replace('_', ' ')} {v:.0%}" for k, v in waiting.items()))
    return tuple(lines)


def _no_job(cluster: Cluster, global_batch: int, fixed: Mapping[str, Any]) -> str:
    """Return why no job exists at all, with the nearest numbers that give one."""
    tp, pp, micro = (fixed.get(name, 1) for name in ("tp", "pp", "micro_batch_size"))
    if cluster.n_gpus % (tp * pp):
        legal = max(r for r in range(1, cluster.n_gpus + 1) if cluster.n_gpus % r == 0 and r <= max(1, tp * pp))
        return f"tp {tp} x pp {pp} is {tp * pp}, which does not divide {cluster.n_gpus} GPUs; use a product of {legal}"
    dp = cluster.n_gpus // (tp * pp)
    nearest = -(-global_batch // (dp * micro)) * dp * micro
    smaller = f" or micro_batch_size {global_batch // dp}" if micro > 1 and global_batch % dp == 0 else ""
    whole = f"{dp} data-parallel GPUs x micro_batch_size {micro}" if "micro_batch_size" in fixed else f"{dp} GPUs"
    return f"a global batch of {global_batch} is no multiple of {whole}; use global_batch {nearest}{smaller}"


@dataclass(frozen=True)
class _Found:
    """What a search gave: jobs that fit, groups that do not, the first rule that a job broke, how many were tried."""

    ranked: list[tuple[TrainJob, TrainPrediction]]
    rejected: tuple[TrainRejected, ...]
    rule: str
    n: int


@dataclass(frozen=True)
class _Search:
    """One training question on any cluster."""

    model: Model
    coefficients: CoefficientSet
    sequence_length: int
    objective: TrainObjective
    fixed: Mapping[str, Any]

    def on(self, cluster: Cluster, global_batch: int) -> _Found:
        """Return every job on a cluster, ranked, with those that cannot run."""
        found: list[tuple[TrainJob, TrainPrediction]] = []
        rejected: dict[tuple[str, int], TrainRejected] = {}
        rule, has_legal, n = "", False, 0
        jobs = training_jobs(
            self.model,
            cluster,
            global_batch=global_batch,
            sequence_length=self.sequence_length,
            fixed=self.fixed,
        )
        for n, job in enumerate(jobs, start=1):  # noqa: B007  the count outlives the loop
            fault = feasible_train(self.model, cluster, job, self.coefficients)
            if fault is None:
                found.append((job, predict_train(self.model, cluster, job, self.coefficients)))
                continue
            broken = "" if has_legal else refusal(self.model, cluster, job)
            has_legal, rule = has_legal or not broken, rule or broken
            # reasons that differ in their numbers only are one reason
            key = (re.sub(r"[\d.,]+ ?[kMGT]?B?", "#", fault[0]), job.zero_stage)
            known = rejected.get(key)
            if known is None:
                rejected[key] = TrainRejected(job=job, reason=fault[0], nearest=fault[1])
            else:
                rejected[key] = known.model_copy(update={"count": known.count + 1})
        groups = tuple(sorted(rejected.values(), key=lambda r: -r.count))
        return _Found(
            _rank(found, self.objective, cluster.gpu.device_memory_bytes), groups, "" if has_legal or found else rule, n
        )

    def best_on(self, cluster: Cluster, global_batch: int) -> tuple[TrainJob, TrainPrediction] | None:
        """Return the best job on a cluster, None where none fits."""
        ranked = self.on(cluster, global_batch).ranked
        return ranked[0] if ranked else None

    def would_do(self, cluster: Cluster, global_batch: int) -> Iterator[str]:
        """Yield what would train the model where nothing here does: more of these GPUs, or adapters on them."""
        frugal = {"micro_batch_size": 1, "is_checkpointed": True} | dict(self.fixed)
        for larger in doublings(cluster, MOST_GPUS):
            batch = -(-global_batch // larger.n_gpus) * larger.n_gpus
            found = replace(self, fixed=frugal).best_on(larger, batch)
            if found is not None:
                nodes = f"{larger.n_nodes} nodes of {larger.gpus_per_node}" if larger.n_nodes > 1 else larger.n_gpus
                yield f"{nodes} {larger.gpu.name} would do: {label(found[0])}."
                break
        if not self.fixed.get("lora_rank"):
            found = replace(self, fixed=frugal | {"lora_rank": LORA_RANK}).best_on(cluster, global_batch)
            if found is not None:
                yield f"Adapters fit here (lora_rank {LORA_RANK}): {label(found[0])}."


def best_job(
    model: Model,
    cluster: Cluster,
    coefficients: CoefficientSet,
    *,
    global_batch: int = 64,
    sequence_length: int = 2048,
    lora_rank: int = 0,
) -> tuple[TrainJob, TrainPrediction]:
    """Return the fastest training job on all GPUs of a cluster and its prediction.

    Raises DomainError where none can run, with the reason and the nearest that would.
    """
    length = min(sequence_length, model.max_context_tokens)
    found = _Search(model, coefficients, length, "throughput", {"lora_rank": lora_rank}).on(cluster, global_batch)
    if found.n == 0:
        raise DomainError(_no_job(cluster, global_batch, {}))
    if not found.ranked:
        first = found.rejected[0]
        raise DomainError(found.rule or f"{first.reason}; nearest that fits: {first.nearest}")
    return found.ranked[0]


def recommend_training(
    model: Model,
    cluster: Cluster,
    coefficients: CoefficientSet,
    *,
    global_batch: int = 64,
    sequence_length: int = 2048,
    objective: TrainObjective = "throughput",
    lora_rank: int = 0,
    stack: Literal["transformers", "fused", "megatron"] = "transformers",
    total_tokens: int = 0,
    fixed: Mapping[str, Any] | None = None,
    usd_per_gpu_h: float = 0.0,
    max_plans: int = 10,
) -> TrainAnswer:
    """Return the best ways to train a model on all GPUs of a cluster, with what cannot run and why.

    fixed : fields of TrainJob that are not searched, such as {"zero_stage": 3, "has_quantized_weights": True}.
    Raises DomainError when no job divides the global batch, naming the nearest batch that works, and when what is fixed
    breaks a rule of DeepSpeed's in every job, naming the rule and what it takes. No memory is an answer without plans.
    """
    if global_batch < 1 or sequence_length < 1:
        raise DomainError(
            f"global_batch and sequence_length must be positive, got {global_batch} and {sequence_length}"
        )
    if sequence_length > model.max_context_tokens:
        raise DomainError(
            f"sequence_length {sequence_length} exceeds the model's context; use at most {model.max_context_tokens}"
        )
    search = _Search(
        model,
        coefficients,
        sequence_length,
        objective,
        {"lora_rank": lora_rank, "stack": stack, "total_tokens": total_tokens} | dict(fixed or {}),
    )
    found = search.on(cluster, global_batch)
    if found.n == 0:
        raise DomainError(_no_job(cluster, global_batch, fixed or {}))
    if found.rule:
        raise DomainError(found.rule)
    ranked = found.ranked
    plans = []
    for rank, (job, prediction) in enumerate(ranked[:max_plans], start=1):
        usd = usd_per_gpu_h * job.n_gpus
        plans.append(
            TrainPlan(
                rank=rank,
                job=job,
                prediction=prediction,
                usd_per_h=usd,
                usd_per_million_tokens=usd / HOUR_S / prediction["tokens_per_s"] * MILLION,
                command=training_command(job, model, gpus_per_node=cluster.gpus_per_node),
                reasons=_reasons(job, prediction, cluster),
            )
        )
    why: tuple[str, ...]
    notes: list[Note] = []
    if plans:
        why = (label(plans[0].job), *plans[0].reasons)
        if total_tokens and usd_per_gpu_h:
            hours = plans[0].prediction["duration_s"] / HOUR_S
            why += (f"{format_s(hours * HOUR_S)} and {format_usd(hours * plans[0].usd_per_h)} for all tokens",)
        if any(p.job.pp > 1 for p in plans):
            notes.append(Note(level="warning", text="a pipeline needs the model as a PipelineModule: own code"))
    else:
        why = tuple(search.would_do(cluster, global_batch))
        why = why or (f"No number of these GPUs up to {MOST_GPUS:,} would do, nor would adapters on these.",)
    half = partial(search.best_on, global_batch=global_batch)
    return TrainAnswer(
        model=model.name,
        gpus=f"{cluster.n_gpus} x {cluster.gpu.label}",
        best=plans[0] if plans else None,
        plans=tuple(plans),
        rejected=found.rejected,
        n_considered=found.n,
        why=why,
        flips=tuple(limits(model, cluster, coefficients, ranked, half)) if ranked else (),
        alternatives=behind(ranked, objective, cluster.gpu.device_memory_bytes) if ranked else (),
        notes=tuple(notes),
    )
