"""Ways of doing offline work on a part of a pool: vLLM and DeepSpeed replicas of every size, training of every size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import lcm

from advisor.catalog import load_catalog
from advisor.errors import AdvisorError, DomainError, printable
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.explain import layout_text
from advisor.recommend.feasible import Rejections
from advisor.recommend.fill import spare
from advisor.recommend.forecast import forecast
from advisor.recommend.search import tabulate
from advisor.recommend.static import offers
from advisor.recommend.training import best_job
from advisor.recommend.training_flips import label
from advisor.schema import Backend, ClosedLoad, Cluster, Deployment, Model, Prediction, Request, Slo
from advisor.schema.mixed import Way
from advisor.units import plural

GLOBAL_BATCH = 64
"""Sequences of a training step, as `advisor train` takes by default; more where the GPUs do not divide it."""
QUEUE = 4096
"""Requests that wait for a group: a queue that never runs dry."""
ALIKE = 0.05
"""By how much a layout must do more than another of as many GPUs in the closed form to be taken without a replay."""
NOISE = 0.02
"""Share by which two replays of the same engine may differ."""
DEEPSPEED: tuple[Backend, ...] = ("deepspeed-zero-inference", "deepspeed-autotp")
"""DeepSpeed's maintained paths: a day is planned on no other."""


def sizes(cluster: Cluster) -> list[int]:
    """Return the numbers of GPUs that a group may have: powers of two and divisors within a node, then whole nodes."""
    whole = cluster.gpus_per_node
    found = {n for n in range(1, whole + 1) if n & (n - 1) == 0 or whole % n == 0}
    nodes = 2
    while nodes <= cluster.n_nodes:
        found.add(nodes * whole)
        nodes *= 2
    return sorted(found | {cluster.n_gpus})


def part(cluster: Cluster, n_gpus: int) -> Cluster:
    """Return `n_gpus` of a cluster: of one node, or whole nodes."""
    whole = cluster.gpus_per_node
    if n_gpus <= whole:
        return cluster.model_copy(update={"n_nodes": 1, "gpus_per_node": n_gpus})
    return cluster.model_copy(update={"n_nodes": n_gpus // whole})


def _way(d: Deployment, prediction: Prediction, *, n_groups: int, is_engine: bool = False) -> Way:
    power = prediction.quantities.get("board_power_w")
    group = d if d.backend == "deepspeed-zero-inference" else d.model_copy(update={"dp": 1})
    return Way(
        backend=d.backend,
        plan=layout_text(group),
        n_gpus=d.n_gpus // n_groups,
        tokens_per_s=prediction["total_tokens_per_s"] / n_groups,
        board_power_w_per_gpu=power.value / d.n_gpus if power else 0.0,
        is_serving_engine=is_engine,
    )


def _full(question: Question, pool: Pool, d: Deployment) -> Prediction:
    """Return what a vLLM replica does with all its sequences taken and more waiting."""
    load = ClosedLoad(concurrency=d.max_num_seqs)
    return forecast(question, pool, d, question.workload.model_copy(update={"load": load})).prediction


def _vllm(question: Question, pool: Pool) -> Iterator[Way]:
    """Yield the best vLLM replica of each number of GPUs: the closed form proposes, a replay says what it does."""
    table = tabulate(question, Rejections(), has_prices=False)
    best: dict[int, tuple[float, Deployment]] = {}
    for i, d in enumerate(table.deployments):
        rate = float(table.values["output_tokens_per_s"][i])
        if d.dp == 1 and rate > best.get(d.n_gpus, (0.0, d))[0]:
            best[d.n_gpus] = rate, d
    rows = sorted(best.items())
    # what is surely beaten on its own GPUs by others is not replayed
    unneeded = spare([(n, rate * (1 - ALIKE)) for n, (rate, _) in rows])
    for row, (_, (_, d)) in enumerate(rows):
        if row not in unneeded:
            try:
                yield _way(d, _full(question, pool, d), n_groups=1)
            except AdvisorError:
                # the closed form's choice does not run in its replay
                continue


def batch_ways(request: Request, replica: Deployment) -> tuple[Way, ...]:
    """Return the ways of working off a queue on a part of the request's pool: the serving engine first.

    The others are vLLM replicas and DeepSpeed's maintained paths on every number of GPUs, at their own plans; what
    others do as well on as many GPUs is left out.
    """
    deep = {"workload": "batch", "rate": None, "concurrency": QUEUE, "slo": Slo(), "task": "batch"}
    asked = request.model_copy(update=deep | {"objective": "throughput", "budget_usd_per_h": None})
    question = ask(asked, load_catalog())
    return question.kept.get(("batch ways", asked, replica), partial(_batch_ways, question, replica))


def _batch_ways(question: Question, replica: Deployment) -> tuple[Way, ...]:
    pool = question.pools[0]
    longest = {"max_model_len": max(replica.max_model_len, question.max_model_len)}
    engine = replica.model_copy(update=longest | {"dp": 1})
    found = [_way(engine, _full(question, pool, engine), n_groups=1, is_engine=True)]
    found += _vllm(question, pool)
    for n_gpus in sizes(pool.cluster):
        smaller = replace(pool, cluster=part(pool.cluster, n_gpus))
        for offer in offers(replace(question, pools=(smaller,)), smaller, DEEPSPEED, Rejections()):
            d = offer.deployment
            groups = 1 if d.backend == "deepspeed-zero-inference" else d.dp
            found.append(_way(d, offer.prediction, n_groups=groups))
    return needed(found)


def needed(found: list[Way]) -> tuple[Way, ...]:
    """Return the ways without those that others beat on as many GPUs.

    The serving engine always stays, and what is within the noise of a replay as fast does not take its place.
    """
    engine = next((i for i, way in enumerate(found) if way.is_serving_engine), -1)
    sizes = [(way.n_gpus, way.tokens_per_s * (1 + NOISE if i == engine else 1)) for i, way in enumerate(found)]
    dropped = spare(sizes, keep=engine)
    return tuple(way for i, way in enumerate(found) if i not in dropped)


def training_ways(question: Question, model_name: str, *, n_gpus: int, lora_rank: int) -> tuple[Way, ...]:
    """Return the best training job on every number of GPUs that may do it, all with one batch a step.

    n_gpus : the only number to try, 0 = every one. Raises DomainError where the model cannot be trained on any.
    """
    cluster = question.pools[0].cluster
    able = sizes(cluster)
    whole = cluster.gpus_per_node
    if n_gpus > cluster.n_gpus:
        raise DomainError(f"there are {cluster.n_gpus} GPUs to train on, got {n_gpus}; use at most {cluster.n_gpus}")
    if n_gpus > whole and n_gpus % whole:
        near = n_gpus // whole * whole
        raise DomainError(f"training on several nodes takes all {whole} GPUs of each, got {n_gpus}; use {near}")
    counts = [n_gpus] if n_gpus else able
    batch = lcm(*counts)
    batch *= -(-GLOBAL_BATCH // batch)
    model = load_catalog().model(model_name)[0]
    made = partial(_training_ways, cluster, model, counts, global_batch=batch, lora_rank=lora_rank)
    return question.kept.get(("training ways", model, tuple(counts), batch, lora_rank), made)


def _training_ways(
    cluster: Cluster, model: Model, counts: list[int], *, global_batch: int, lora_rank: int
) -> tuple[Way, ...]:
    fitted, fault = load_catalog().coefficients("deepspeed"), ""
    found: list[Way] = []
    for count in counts:
        group = part(cluster, count)
        try:
            job, prediction = best_job(model, group, fitted, global_batch=global_batch, lora_rank=lora_rank)
        except DomainError as error:
            fault = f"{printable(model.name)} cannot be trained on {plural(count, 'GPU')}: {error}"
            continue
        power = prediction.quantities.get("board_power_w")
        way = Way(
            backend=f"deepspeed-train-zero{job.zero_stage}",
            plan=label(job),
            n_gpus=count,
            tokens_per_s=prediction["tokens_per_s"],
            board_power_w_per_gpu=power.value / count if power else 0.0,
        )
        # more GPUs that are no faster are of no use
        if not found or way.tokens_per_s > max(w.tokens_per_s for w in found):
            found.append(way)
    if not found:
        raise DomainError(fault)
    return tuple(found)
