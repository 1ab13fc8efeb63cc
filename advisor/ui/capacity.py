"""The calls behind the Capacity page: what one replica carries, and the day's schedule of one GPU budget."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.predict.serving import max_rate
from advisor.recommend.ask import Question, ask
from advisor.recommend.hybrid import batch_job, daily_load, plan_mixed, training_job
from advisor.recommend.one import predict_one
from advisor.recommend.training import recommend_training
from advisor.schema import Deployment, Noun, Plan, Request
from advisor.schema.mixed import MixedAnswer, OfflineJob, OnlineNeed
from advisor.ui.call import MAX_ENTRIES


class Offline(Noun):
    """Offline work that the user asks for."""

    kind: str
    total_tokens: int
    deadline_hour: int
    n_gpus: int = 1
    model: str = ""


class Day(Noun):
    """The traffic of one day."""

    peak_requests_per_s: float
    night_frac: float
    peak_hour: float
    headroom_frac: float


class Capacity(Noun):
    """The schedule of a day, with what it rests on."""

    need: OnlineNeed
    jobs: tuple[OfflineJob, ...]
    answer: MixedAnswer
    n_gpus: int
    usd_per_gpu_h: float


def _replica(plan: Plan) -> Deployment:
    return plan.deployment.model_copy(update={"dp": 1})


def _need(question: Question, plan: Plan, day: Day) -> OnlineNeed:
    """Return the online side: the largest rate of one replica within the targets, by simulation."""
    if question.vllm is None:
        raise DomainError("there are no fitted coefficients for vLLM; run `advisor fit` on run records first")
    one, cluster = _replica(plan), question.pools[0].cluster
    rate = max_rate(question.model, cluster, one, question.workload, question.vllm, question.slo, facts=question.facts)
    if rate <= 0:
        raise DomainError("one replica misses the targets at any rate; relax the latency targets")
    busy = predict_one(_with_rate(question, rate), one, method="simulated").prediction.quantities.get("board_power_w")
    return OnlineNeed(
        requests_per_s=daily_load(day.peak_requests_per_s, night_frac=day.night_frac, peak_hour=day.peak_hour),
        gpus_per_replica=one.n_gpus,
        capacity_requests_per_s=rate,
        headroom_frac=day.headroom_frac,
        board_power_w_per_gpu=busy.value / one.n_gpus if busy else 0.0,
    )


def _with_rate(question: Question, rate: float) -> Question:
    return ask(question.request.model_copy(update={"rate": rate, "concurrency": None}), load_catalog())


def _job(question: Question, plan: Plan, wanted: Offline) -> OfflineJob:
    """Return offline work at the predicted speed: a deep queue on one replica, or the best training job."""
    if wanted.kind == "batch":
        deep = question.request.model_copy(
            update={"workload": "batch", "rate": None, "concurrency": plan.deployment.max_num_seqs}
        )
        one = predict_one(ask(deep, load_catalog()), _replica(plan))
        return batch_job(
            "batch",
            one.deployment,
            one.prediction,
            total_tokens=wanted.total_tokens,
            deadline_hour=wanted.deadline_hour,
        )
    catalog, cluster = load_catalog(), question.pools[0].cluster
    if wanted.n_gpus > cluster.gpus_per_node:
        raise DomainError(f"a training job here runs on one node of {cluster.gpus_per_node} GPUs, got {wanted.n_gpus}")
    part = cluster.model_copy(update={"n_nodes": 1, "gpus_per_node": wanted.n_gpus})
    found = recommend_training(catalog.model(wanted.model)[0], part, catalog.coefficients("deepspeed"))
    if found.best is None:
        reason = found.rejected[0].reason if found.rejected else "no job divides the batch"
        raise DomainError(f"{wanted.model} cannot be trained on {wanted.n_gpus} GPUs: {reason}")
    best = found.best
    return training_job(
        "training", best.job, best.prediction, total_tokens=wanted.total_tokens, deadline_hour=wanted.deadline_hour
    )


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner="Planning the day ...")
def _plan(request_json: str, plan_json: str, day_json: str, jobs_json: str, n_gpus: int) -> Capacity:
    question = ask(Request.model_validate_json(request_json), load_catalog())
    plan, day = Plan.model_validate_json(plan_json), Day.model_validate_json(day_json)
    need = _need(question, plan, day)
    jobs = tuple(_job(question, plan, Offline.model_validate(j)) for j in json.loads(jobs_json))
    pool = question.pools[0]
    price = pool.usd_per_gpu_h or 0.0
    answer = plan_mixed(n_gpus, need, jobs, usd_per_gpu_h=price, idle_power_w=pool.cluster.gpu.idle_power_w)
    return Capacity(need=need, jobs=jobs, answer=answer, n_gpus=n_gpus, usd_per_gpu_h=price)


def capacity(request: Request, plan: Plan, day: Day, jobs: list[Offline], n_gpus: int) -> Capacity:
    """Return the hour-by-hour schedule of a budget; raises AdvisorError for what cannot be planned."""
    asked: list[dict[str, Any]] = [j.model_dump() for j in jobs]
    return _plan(request.model_dump_json(), plan.model_dump_json(), day.model_dump_json(), json.dumps(asked), n_gpus)
