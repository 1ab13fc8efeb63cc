"""Where the best training job stops being the best, and how far behind the best of each other kind is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from advisor.errors import DomainError
from advisor.predict.shapes import shapes_of
from advisor.predict.train import feasible_train
from advisor.schema import Cluster, CoefficientSet, Model
from advisor.schema.training import TrainJob, TrainPrediction
from advisor.units import format_bytes, format_count, format_s, times

TrainObjective = Literal["throughput", "cost", "energy"]
Ranked = Sequence[tuple[TrainJob, TrainPrediction]]
LENGTH_STEP = 128
"""Tokens to which a longest sequence is found."""
MOST_LAYERS = 16
"""Models of up to so many times the layers are tried."""
AS_GOOD = 0.01
KINDS: tuple[Callable[[TrainJob], str], ...] = (
    lambda j: f"ZeRO-{j.zero_stage}",
    lambda j: "offload" if j.offload_optimizer != "none" else "no offload",
    lambda j: "checkpointing" if j.is_checkpointed else "no checkpointing",
    lambda j: "a pipeline" if j.pp > 1 else "no pipeline",
    lambda j: "a tensor split" if j.tp > 1 else "no tensor split",
    lambda j: "hpZ" if j.hpz_ranks else "no hpZ",
)


def cost_of(prediction: TrainPrediction, objective: TrainObjective) -> float:
    """Return what the objective makes small: seconds or joules a token."""
    if objective == "energy":
        return prediction["energy_j_per_token"]
    return 1 / prediction["tokens_per_s"]


def outside_of(prediction: TrainPrediction) -> float:
    """Return the bytes of a GPU that CUDA and NCCL take outside torch's allocator."""
    memory = next(b for b in prediction.breakdowns if b.name == "memory_bytes_per_gpu")
    return next(p.value for p in memory.parts if p.name == "context")


def is_tight(prediction: TrainPrediction, room: float) -> bool:
    """Return whether the upper end of the peak may not fit a GPU of `room` bytes."""
    return prediction.quantities["allocated_bytes_per_gpu"].high + outside_of(prediction) > room


def label(job: TrainJob) -> str:
    """Return a job in words, with all that sets it apart from the others."""
    words = [f"ZeRO-{job.zero_stage}"]
    if job.offload_param != "none":
        words.append(f"optimizer and parameters on {job.offload_param}")
    elif job.offload_optimizer != "none":
        words.append(f"optimizer on {job.offload_optimizer}")
    words.append(f"tp {job.tp} pp {job.pp} dp {job.dp}")
    words.append(f"micro batch {job.micro_batch_size} x {job.gradient_accumulation_steps}")
    if job.is_checkpointed:
        words.append("checkpointing")
    if job.hpz_ranks:
        words.append(f"hpZ over {job.hpz_ranks}")
    quantized = (("qwZ", job.has_quantized_weights), ("qgZ", job.has_quantized_gradients))
    words += [name for name, is_on in quantized if is_on]
    return ", ".join(words)


def _parts(prediction: TrainPrediction) -> dict[str, float]:
    return {p.name: p.value for b in prediction.breakdowns if b.name == "step_s" for p in b.parts}


def _extra(other: TrainPrediction, best: TrainPrediction) -> str:
    """Return the part of a step that takes most longer than in the best plan, empty when none does."""
    ours = _parts(best)
    more = {name: value - ours.get(name, 0.0) for name, value in _parts(other).items()}
    most = max(more, key=lambda name: more[name], default="")
    return f", mostly {most.replace('_', ' ')} (+{format_s(more[most])} a step)" if most and more[most] > 0 else ""


def behind(ranked: Ranked, objective: TrainObjective, room: float) -> tuple[str, ...]:
    """Say how far the best plan of each other kind is behind, and in which part of the step.

    room : bytes of a GPU, for the plan that would be faster were its memory sure to suffice
    """
    best_job, best = ranked[0]
    what = "energy" if objective == "energy" else "time"
    lines = []
    if not is_tight(best, room):
        tight = [f for f in ranked if is_tight(f[1], room)]
        job, prediction = min(tight, key=lambda f: cost_of(f[1], objective), default=ranked[0])
        less = 1 - cost_of(prediction, objective) / cost_of(best, objective)
        if less >= AS_GOOD:
            peak, outside = prediction.quantities["allocated_bytes_per_gpu"].high, outside_of(prediction)
            text = f"its peak may reach {format_bytes(peak)} beside {format_bytes(outside)} of CUDA and NCCL"
            lines.append(
                f"{less:.0%} less {what} a token, but it may run out of memory ({text}, {format_bytes(room)} are"
                f" there): {label(job)}."
            )
        ranked = [f for f in ranked if not is_tight(f[1], room)]
    for of in KINDS:
        seen = {of(best_job)}
        for job, prediction in ranked[1:]:
            if of(job) in seen:
                continue
            seen.add(of(job))
            more = cost_of(prediction, objective) / cost_of(best, objective) - 1
            if abs(more) < AS_GOOD:
                text = f"as good within {AS_GOOD:.0%}"
            elif more < 0:
                text = f"{-more:.0%} less {what} a token, but asks more of its user"
            else:
                text = times(1 + more, f"{what} a token") + _extra(prediction, best)
            lines.append(f"Best with {of(job)}: {text} ({label(job)}).")
    return tuple(lines)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest whole number in [low, high) that fits, None where `high` does; `low` must."""
    if fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def limits(
    model: Model,
    cluster: Cluster,
    coefficients: CoefficientSet,
    ranked: Ranked,
    best_on: Callable[[Cluster], tuple[TrainJob, TrainPrediction] | None],
) -> Iterator[str]:
    """Yield from which sequence length and model size on the best job does not fit, and what wins on half the GPUs.

    best_on : the best job of the same question on another cluster.
    """
    best = ranked[0][0]

    def fits(job: TrainJob, other: Model) -> bool:
        return feasible_train(other, cluster, job, coefficients) is None

    def then(other: Model, length: int) -> str:
        jobs = (job.model_copy(update={"sequence_length": length}) for job, _ in ranked)
        first = next((job for job in jobs if fits(job, other)), None)
        return f"the next in rank that does is {label(first)}" if first else "no plan shown does"

    def long(steps: int) -> int:
        return min(model.max_context_tokens, steps * LENGTH_STEP)

    def at(steps: int) -> bool:
        return fits(best.model_copy(update={"sequence_length": long(steps)}), model)

    now, most = best.sequence_length // LENGTH_STEP, -(-model.max_context_tokens // LENGTH_STEP)
    steps = _largest(at, now, most) if now < most else None
    if steps is not None:
        longest = max(long(steps), best.sequence_length)
        yield f"Sequences above {longest:,} tokens: this plan no longer fits; {then(model, long(steps + 1))}."
    if not best.stage_layers and best.n_chunks == 1:
        n = model.n_layers
        layers = _largest(lambda k: fits(best, _deeper(model, k)), n, MOST_LAYERS * n)
        if layers is not None:
            params = format_count(shapes_of(_deeper(model, layers)).n_params)
            after = then(_deeper(model, layers + 1), best.sequence_length)
            text = f"Models of this width above {params} parameters ({layers} layers)"
            yield f"{text}: this plan no longer fits; {after}."
    yield from _on_half(cluster, ranked[0], best_on)


def _deeper(model: Model, n_layers: int) -> Model:
    return model.model_copy(update={"n_layers": n_layers})


def _on_half(
    cluster: Cluster,
    best: tuple[TrainJob, TrainPrediction],
    best_on: Callable[[Cluster], tuple[TrainJob, TrainPrediction] | None],
) -> Iterator[str]:
    if cluster.n_nodes % 2 == 0:
        half = cluster.model_copy(update={"n_nodes": cluster.n_nodes // 2})
    elif cluster.n_nodes == 1 and cluster.gpus_per_node % 2 == 0:
        half = cluster.model_copy(update={"gpus_per_node": cluster.gpus_per_node // 2})
    else:
        return
    try:
        found = best_on(half)
    except DomainError:
        return
    if found is None:
        yield f"On {half.n_gpus} of these GPUs nothing of this kind fits."
        return
    job, prediction = found
    ratio = prediction["step_s"] / best[1]["step_s"]
    same = "the same kind of plan wins" if _kind(job) == _kind(best[0]) else f"{label(job)} wins"
    yield f"On {half.n_gpus} of these GPUs {same}, with steps {ratio:.2f} times as long."


def _kind(job: TrainJob) -> tuple[object, ...]:
    return (*(of(job) for of in KINDS), job.tp, job.pp)
