"""A day on one GPU budget: what one replica carries, the offline work's speed, and the hour-by-hour schedule."""

from __future__ import annotations

from advisor.catalog import load_catalog
from advisor.errors import DomainError, printable
from advisor.predict.capacity import max_rate
from advisor.recommend.answer import recommend
from advisor.recommend.ask import Pool, Question, ask
from advisor.recommend.hybrid import badness, batch_job, daily_load, plan_mixed, training_job
from advisor.recommend.one import check_vllm, predict_one
from advisor.recommend.training import best_job
from advisor.schema import Deployment, Noun, Request, Slo
from advisor.schema.mixed import MixedAnswer, OfflineJob, OnlineNeed
from advisor.units import plural

GLOBAL_BATCH = 64
"""Sequences of a training step, as `advisor train` takes by default; more where the GPUs do not divide it."""


class Offline(Noun):
    """Offline work that the user asks for; 0 tokens = none of that kind, and none at all is a day of serving alone.

    `train_gpus` 0 = the number that serves the day best; `train_model` empty = the served one; `lora_rank` 0 = all
    parameters.
    """

    batch_tokens: int = 0
    batch_deadline: int = 24
    train_tokens: int = 0
    train_deadline: int = 24
    train_gpus: int = 0
    train_model: str = ""
    lora_rank: int = 0


class Day(Noun):
    """The traffic of one day."""

    peak_requests_per_s: float
    night_frac: float
    peak_hour: float
    headroom_frac: float


class DayPlan(Noun):
    """The schedule of a day, with what it rests on."""

    need: OnlineNeed
    jobs: tuple[OfflineJob, ...]
    answer: MixedAnswer
    replica: Deployment
    usd_per_gpu_h: float


def _need(question: Question, replica: Deployment, day: Day) -> OnlineNeed:
    """Return the online side: the largest rate of one replica within the targets, by simulation."""
    vllm, cluster = check_vllm(question, replica), question.pools[0].cluster
    rate = max_rate(question.model, cluster, replica, question.workload, vllm, question.slo, facts=question.facts)
    if rate <= 0:
        raise DomainError("one replica misses the targets at any rate; relax the latency targets")
    busy = ask(question.request.model_copy(update={"rate": rate}), load_catalog())
    power = predict_one(busy, replica).prediction.quantities.get("board_power_w")
    return OnlineNeed(
        requests_per_s=daily_load(day.peak_requests_per_s, night_frac=day.night_frac, peak_hour=day.peak_hour),
        gpus_per_replica=replica.n_gpus,
        capacity_requests_per_s=rate,
        headroom_frac=day.headroom_frac,
        board_power_w_per_gpu=power.value / replica.n_gpus if power else 0.0,
    )


def _batch(question: Question, replica: Deployment, wanted: Offline) -> list[OfflineJob]:
    """Return the offline queue at the speed of one replica with many requests waiting; none where none is asked for."""
    if not wanted.batch_tokens:
        return []
    deep = {"workload": "batch", "rate": None, "concurrency": replica.max_num_seqs, "slo": Slo()}
    one = predict_one(ask(question.request.model_copy(update=deep), load_catalog()), replica)
    size = {"total_tokens": wanted.batch_tokens, "deadline_hour": wanted.batch_deadline}
    return [batch_job("batch", replica, one.prediction, **size)]


def _trainings(question: Question, wanted: Offline) -> list[OfflineJob]:
    """Return the best training job on every number of GPUs that may do it, fewest first.

    Without `train_gpus` these are the divisors of a node that are powers of two, and the whole node.
    """
    catalog, cluster = load_catalog(), question.pools[0].cluster
    whole = cluster.gpus_per_node
    name = wanted.train_model or question.request.model
    if wanted.train_gpus > whole:
        raise DomainError(f"training runs on one node of {whole} GPUs, got {wanted.train_gpus}; use at most {whole}")
    counts = [wanted.train_gpus] if wanted.train_gpus else [n for n in range(1, whole) if n & (n - 1) == 0] + [whole]
    model, fitted, jobs, fault = catalog.model(name)[0], catalog.coefficients("deepspeed"), [], ""
    for n_gpus in counts:
        part = cluster.model_copy(update={"n_nodes": 1, "gpus_per_node": n_gpus})
        batch = -(-GLOBAL_BATCH // n_gpus) * n_gpus
        try:
            job, prediction = best_job(model, part, fitted, global_batch=batch, lora_rank=wanted.lora_rank)
        except DomainError as error:
            fault = f"{printable(name)} cannot be trained on {plural(n_gpus, 'GPU')}: {error}"
            continue
        size = {"total_tokens": wanted.train_tokens, "deadline_hour": wanted.train_deadline}
        jobs.append(training_job("training", job, prediction, **size))
    if not jobs:
        raise DomainError(fault)
    return jobs


def _divided(
    need: OnlineNeed, batch: list[OfflineJob], trainings: list[OfflineJob], pool: Pool
) -> tuple[MixedAnswer, list[OfflineJob]]:
    """Return the better way to divide the budget and its jobs: over every number of GPUs that training may take."""
    price, idle = pool.usd_per_gpu_h or 0.0, pool.cluster.gpu.idle_power_w
    tried = []
    for jobs in [[*batch, job] for job in trainings] or [batch]:
        answer = plan_mixed(pool.cluster.n_gpus, need, jobs, usd_per_gpu_h=price, idle_power_w=idle)
        tried.append((badness(answer.plan(answer.best)), answer, jobs))
    _, answer, jobs = min(tried, key=lambda found: found[0])
    return answer, jobs


def replica_for(question: Question) -> Deployment:
    """Return the replica to plan a day with: that of the best vLLM plan for the busiest hour.

    Raises DomainError with the reason and what would fit, where vLLM runs nowhere.
    """
    answer = recommend(question.request.model_copy(update={"backends": ("vllm",)}))
    if answer.best is None:
        first = answer.rejected[0] if answer.rejected else None
        reason = f": {first.reason}; nearest that fits: {first.nearest}" if first else ""
        raise DomainError(f"no vLLM plan runs {question.model.name} on these GPUs{reason}")
    return answer.best.deployment.model_copy(update={"dp": 1})


def plan_day(request: Request, day: Day, wanted: Offline) -> DayPlan:
    """Return the hour-by-hour schedule of the request's GPUs, its one pool; the request's load is not used.

    Raises AdvisorError for what cannot be planned.
    """
    question = ask(request.model_copy(update={"rate": day.peak_requests_per_s, "concurrency": None}), load_catalog())
    if len(question.pools) > 1:
        raise DomainError(f"a day is planned on one pool, got {len(question.pools)}; give a single GPU spec")
    replica = replica_for(question)
    need, pool = _need(question, replica, day), question.pools[0]
    trainings = _trainings(question, wanted) if wanted.train_tokens else []
    answer, jobs = _divided(need, _batch(question, replica, wanted), trainings, pool)
    price = pool.usd_per_gpu_h or 0.0
    return DayPlan(need=need, jobs=tuple(jobs), answer=answer, replica=replica, usd_per_gpu_h=price)
