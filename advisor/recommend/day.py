"""A day on one GPU budget: what one replica carries, the offline work's speed, and the hour-by-hour schedule."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.predict.capacity import max_rate
from advisor.recommend.ask import Question, ask
from advisor.recommend.explain import layout_text
from advisor.recommend.feasible import Rejections
from advisor.recommend.hybrid import badness, daily_load, plan_mixed
from advisor.recommend.one import check_vllm, predict_one
from advisor.recommend.restart import restart_s, restart_text
from advisor.recommend.search import search, tabulate
from advisor.recommend.ways import batch_ways, training_ways
from advisor.schema import Deployment, Noun, PoissonLoad, Request
from advisor.schema.base import NonNegativeFloat
from advisor.schema.mixed import MixedAnswer, OfflineJob, OnlineNeed
from advisor.units import plural

MOST_REPLICA_SIZES = 3
"""Layouts of a replica with which a day is planned: the best plan's and the next smaller ones."""


class Offline(Noun):
    """Offline work that the user asks for; 0 tokens = none of that kind, and none at all is a day of serving alone.

    `train_gpus` 0 = in each hour the number that serves the day best; `train_model` empty = the served one;
    `lora_rank` 0 = all parameters.
    """

    batch_tokens: int = 0
    batch_deadline: int = 24
    train_tokens: int = 0
    train_deadline: int = 24
    train_gpus: int = 0
    train_model: str = ""
    lora_rank: int = 0


class Day(Noun):
    """The traffic of one day, and how long a group of GPUs is lost when it starts in another way [s].

    `restart_s` None = what starts of our runs took, with the served model's weights.
    """

    peak_requests_per_s: float
    night_frac: float
    peak_hour: float
    headroom_frac: float
    restart_s: NonNegativeFloat | None = None


class DayPlan(Noun):
    """The schedule of a day, with what it rests on."""

    need: OnlineNeed
    jobs: tuple[OfflineJob, ...]
    answer: MixedAnswer
    replica: Deployment
    usd_per_gpu_h: float
    restart_s: float = Field(description="what a start of an engine or a job is counted with [s]")


def _largest_rate(question: Question, replica: Deployment) -> float:
    vllm, cluster = check_vllm(question, replica), question.pools[0].cluster
    return max_rate(question.model, cluster, replica, question.workload, vllm, question.slo, facts=question.facts)


def _need(question: Question, replica: Deployment, day: Day) -> OnlineNeed:
    """Return the online side: the largest rate of one replica within the targets, by simulation."""
    # the load of the question is not used
    anywhere = question.workload.model_copy(update={"load": PoissonLoad(arrivals_per_s=1.0)})
    key = ("largest rate", replica, anywhere, question.slo)
    rate = question.kept.get(key, partial(_largest_rate, question, replica))
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


def _jobs(
    question: Question, replica: Deployment, wanted: Offline, trainings: tuple[OfflineJob, ...]
) -> list[OfflineJob]:
    """Return the offline work beside replicas of one layout, each job with the ways in which GPUs can do it."""
    if not wanted.batch_tokens:
        return list(trainings)
    ways = batch_ways(question.request, replica)
    batch = OfflineJob(name="batch", ways=ways, total_tokens=wanted.batch_tokens, deadline_hour=wanted.batch_deadline)
    return [batch, *trainings]


def _training(question: Question, wanted: Offline) -> tuple[OfflineJob, ...]:
    """Return the training job, none where none is asked for."""
    if not wanted.train_tokens:
        return ()
    name = wanted.train_model or question.request.model
    ways = training_ways(question, name, n_gpus=wanted.train_gpus, lora_rank=wanted.lora_rank)
    return (
        OfflineJob(
            name="training",
            kind="train",
            ways=ways,
            total_tokens=wanted.train_tokens,
            max_groups=1,
            deadline_hour=wanted.train_deadline,
        ),
    )


def replicas_for(question: Question) -> list[Deployment]:
    """Return the replicas to plan a day with: that of the best vLLM plan for the busiest hour, then smaller ones.

    Raises DomainError with the reason and what would fit, where vLLM runs nowhere.
    """
    found = search(ask(question.request.model_copy(update={"backends": ("vllm",)}), load_catalog()))
    if not found.options:
        first = next(iter(found.rejections.all()), None)
        reason = f": {first.reason}; nearest that fits: {first.nearest}" if first else ""
        raise DomainError(f"no vLLM plan runs {question.model.name} on these GPUs{reason}")
    first_replica = found.options[0].deployment.model_copy(update={"dp": 1})
    table = tabulate(question, Rejections(), has_prices=False)
    best: dict[int, tuple[tuple[float, float], Deployment]] = {}
    for i, d in enumerate(table.deployments):
        size, key = d.tp * d.pp, (max(1.0, float(table.badness[i])), float(table.score[i]))
        if size < first_replica.n_gpus and (size not in best or key < best[size][0]):
            best[size] = key, d.model_copy(update={"dp": 1})
    whole = [size for size in best if question.pools[0].cluster.n_gpus % size == 0] or list(best)
    smaller = [best[size][1] for size in sorted(whole, reverse=True)]
    return [first_replica, *smaller[: MOST_REPLICA_SIZES - 1]]


def plan_day(request: Request, day: Day, wanted: Offline) -> DayPlan:
    """Return the hour-by-hour schedule of the request's GPUs, its one pool; the request's load is not used.

    Tries replicas of several sizes: with small ones the load lets go more GPUs. Raises AdvisorError for what cannot be
    planned.
    """
    question = ask(request.model_copy(update={"rate": day.peak_requests_per_s, "concurrency": None}), load_catalog())
    if len(question.pools) > 1:
        raise DomainError(f"a day is planned on one pool, got {len(question.pools)}; give a single GPU spec")
    pool, trainings, fault = question.pools[0], _training(question, wanted), None
    price = pool.usd_per_gpu_h or 0.0
    tried: list[DayPlan] = []
    for replica in replicas_for(question):
        try:
            need = _need(question, replica, day)
            jobs = _jobs(question, replica, wanted, trainings)
        except DomainError as error:
            fault = fault or error
            continue
        gpu = pool.cluster.gpu
        switch = restart_s(question.model, replica, gpu) if day.restart_s is None else day.restart_s
        answer = plan_mixed(
            pool.cluster.n_gpus, need, jobs, usd_per_gpu_h=price, idle_power_w=gpu.idle_power_w, switch_s=switch
        )
        if day.restart_s is None and jobs:
            why = (*answer.why, restart_text(question.model, replica, gpu))
            answer = answer.model_copy(update={"why": why})
        tried.append(
            DayPlan(need=need, jobs=tuple(jobs), answer=answer, replica=replica, usd_per_gpu_h=price, restart_s=switch)
        )
    if fault is not None and not tried:
        raise fault
    # small differences in energy are no reason to leave the best plan's replica
    found = min(tried, key=lambda plan: badness(plan.answer.plan(plan.answer.best))[:3])
    return found.model_copy(update={"answer": _with_replicas(found, tried)})


def _with_replicas(found: DayPlan, tried: list[DayPlan]) -> MixedAnswer:
    """Return the answer with what the day would be with replicas of other sizes."""
    lines = []
    for other in (plan for plan in tried if plan is not found):
        best = other.answer.plan(other.answer.best)
        fewest = f"{plural(best.min_gpus, 'GPU')} needed" if best.min_gpus is not None else "no number of GPUs would do"
        state = "meets everything" if best.meets_all else "misses something"
        lines.append(f"with replicas of {layout_text(other.replica)}: {best.mode} {state}, {fewest}")
    return found.answer.model_copy(update={"why": (*found.answer.why, *lines)})
