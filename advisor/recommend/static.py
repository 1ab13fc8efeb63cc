"""DeepSpeed's best deployment of each path: chosen by its pass times, predicted by its replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from advisor.predict.deepspeed import deepspeed_deployments, predict_deepspeed
from advisor.predict.deepspeed_paths import (
    DEEPSPEED_BACKENDS,
    SPLITFUSE_TOKENS,
    feasible_with,
    path_of,
    peak_lengths,
)
from advisor.predict.deepspeed_step import Rates, StepLaw, rates_of
from advisor.predict.shapes import shapes_of
from advisor.recommend.ask import Pool, Question, mean_tokens
from advisor.recommend.feasible import Rejections
from advisor.schema import Backend, ClosedLoad, Deployment, Prediction, Rejected

CAPACITY_MARGIN = 1.3
"""Replicas are cut to what carries the load with this margin; the replay then says what they really do."""


@dataclass(frozen=True)
class Offer:
    """A DeepSpeed deployment of one pool with its prediction."""

    pool: Pool
    deployment: Deployment
    prediction: Prediction


def _cycle(law: StepLaw, d: Deployment, prompt: float, output: float) -> tuple[float, float]:
    """Return (requests/s of the deployment at full batches, seconds from batch start to its last token)."""
    if d.backend == "deepspeed-fastgen":
        decodes = min(d.max_num_seqs, 256)
        chunk = max(1.0, min(SPLITFUSE_TOKENS - decodes, decodes * prompt / max(output, 1.0)))
        step = law.mixed_s(chunk, decodes, decodes * (prompt + output / 2))
        return d.dp * decodes / max(output, 1.0) / step, step * output
    batch = max(1, d.static_batch)
    span = law.prefill_s(batch, prompt) + output * law.decode_s(batch, prompt + output / 2)
    return d.dp * batch / span, span


def _choose(question: Question, pool: Pool, found: list[Deployment], rates: Rates, is_far: bool) -> Deployment:
    """Return the deployment of one path to predict: the fastest for latency, else the one with the most capacity."""
    prompt, output = mean_tokens(question.workload.lengths)
    shapes = shapes_of(question.model)
    rows = []
    for d in found:
        law = StepLaw(shapes, pool.cluster, d, rates, is_far, prompt)
        rows.append((*_cycle(law, d, prompt, output), d))
    if question.request.objective == "latency":
        return min(rows, key=lambda row: (row[1], -row[0]))[2]
    capacity, _, best = max(rows, key=lambda row: (row[0], -row[1]))
    load = question.workload.load
    if path_of(best.backend).can_split and not isinstance(load, ClosedLoad):
        enough = max(1, math.ceil(CAPACITY_MARGIN * load.arrivals_per_s * best.dp / max(capacity, 1e-12)))
        return best.model_copy(update={"dp": min(best.dp, enough)})
    return best


def offers(question: Question, pool: Pool, backends: tuple[Backend, ...], rejections: Rejections) -> list[Offer]:
    """Return one predicted deployment for each DeepSpeed path that can run, and reject those that cannot."""
    coefficients = question.deepspeed
    if coefficients is None:
        return []
    model, cluster = question.model, pool.cluster
    rates = rates_of(coefficients, cluster.gpu.name)[0]
    peak = peak_lengths(question.workload, question.max_model_len)
    made = []
    for backend in DEEPSPEED_BACKENDS:
        if backend not in backends:
            continue
        able = []
        every = deepspeed_deployments(
            model,
            cluster,
            max_model_len=question.max_model_len,
            backends=(backend,),
            has_int4="int4" in question.request.weight_dtypes,
        )
        for d in every:
            fault = question.context_fault or feasible_with(model, cluster, d, rates, peak)
            if fault is None:
                able.append(d)
            else:
                rejected = Rejected(backend=backend, deployment=d, reason=fault[0], nearest=fault[1])
                rejections.add(pool.name, "static", d.static_batch - 1e-3 * d.tp, rejected)
        if able:
            is_far = cluster.gpu.name != coefficients.gpu
            chosen = _choose(question, pool, able, rates, is_far)
            prediction = question.kept.get(
                ("static", pool.name, chosen, question.workload),
                partial(predict_deepspeed, model, cluster, chosen, question.workload, coefficients),
            )
            made.append(Offer(pool, chosen, prediction))
    return made
