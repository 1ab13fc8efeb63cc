"""From which model size on vLLM no longer holds the model on these GPUs, and what DeepSpeed then still does."""

from __future__ import annotations

from advisor.predict.deepspeed import deepspeed_deployments, feasible_deepspeed
from advisor.predict.deepspeed_step import StepLaw, rates_of
from advisor.predict.footprint import footprint
from advisor.predict.shapes import shapes_of
from advisor.recommend.ask import Pool, Question, mean_tokens
from advisor.recommend.space import layouts
from advisor.schema import Model, Plan
from advisor.units import format_count, format_s

MOST_TIMES = 16
"""Models of up to so many times the layers are tried."""


def memory_flips(question: Question, best: Plan) -> list[str]:
    """Return the size above which a deeper model of the same width leaves vLLM for ZeRO-Inference, none when unknown.

    Depth is what grows: it changes neither heads nor their split. The 16-bit formats only, which ZeRO-Inference loads.
    """
    d = best.deployment
    pool = next(p for p in question.pools if p.cluster.gpu.name == d.gpu)
    if question.deepspeed is None or d.weight_dtype not in ("bf16", "fp16") or question.request.backends:
        return []
    model, cluster = question.model, pool.cluster
    widest = [at for at in layouts(model, cluster) if at.tp * at.pp == cluster.n_gpus] or [
        max(layouts(model, cluster), key=lambda at: at.tp * at.pp)
    ]

    def holds(n_layers: int) -> bool:
        deeper = _deeper(model, n_layers)
        shapes = (d.model_copy(update={"tp": at.tp, "pp": at.pp, "n_nodes": at.n_nodes, "dp": 1}) for at in widest)
        return any(footprint(deeper, cluster.gpu, one, question.facts).is_ok for one in shapes)

    low, high = model.n_layers, MOST_TIMES * model.n_layers
    if not holds(low) or holds(high):
        return []
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    found = _streamed(question, pool, _deeper(model, high))
    if found is None:
        return []
    place, seconds = found
    size = format_count(shapes_of(_deeper(model, low)).n_params)
    return [
        f"a model of this width above about {size} parameters: vLLM no longer holds it on {pool.name}, DeepSpeed"
        f" ZeRO-Inference runs it with its weights on {place}, at {format_s(seconds)} a token of the whole batch: for"
        " offline work only"
    ]


def _deeper(model: Model, n_layers: int) -> Model:
    return model.model_copy(update={"n_layers": n_layers})


def _streamed(question: Question, pool: Pool, model: Model) -> tuple[str, float] | None:
    """Return where ZeRO-Inference keeps the weights and the time of one decode pass, None where it does not run."""
    if question.deepspeed is None:
        return None
    cluster = pool.cluster
    rates = rates_of(question.deepspeed, cluster.gpu.name)[0]
    one = {"max_model_len": question.max_model_len, "backends": ("deepspeed-zero-inference",), "batches": (1,)}
    for d in deepspeed_deployments(model, cluster, **one):  # type: ignore[arg-type]
        if feasible_deepspeed(model, cluster, d, question.workload, question.deepspeed) is None:
            law = StepLaw(shapes_of(model), cluster, d, rates)
            return {"none": "the GPUs"}.get(d.offload, d.offload), law.decode_s(
                1, mean_tokens(question.workload.lengths)[0]
            )
    return None
