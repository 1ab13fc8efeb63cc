"""The only way from a page to the API: cached calls, and an error that becomes a sentence."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

import streamlit as st
from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.catalog.files import data_root
from advisor.emit import emit, file_name
from advisor.emit.deepspeed_training import training_command, training_config, training_script
from advisor.errors import AdvisorError, BadData, DomainError, printable
from advisor.laws.schedule import Pass
from advisor.predict.train import feasible_train, predict_schedule, predict_train
from advisor.recommend.answer import recommend as find_plans
from advisor.recommend.ask import ask
from advisor.recommend.audit import audit as find_verdicts
from advisor.recommend.day import Day, DayPlan, Offline, plan_day
from advisor.recommend.form import recommendation_json
from advisor.recommend.look import Look, look_for, plan_for
from advisor.recommend.month import month_of
from advisor.recommend.power import Terms
from advisor.recommend.power import power as find_power
from advisor.recommend.training import recommend_training
from advisor.schema import (
    Cluster,
    CoefficientSet,
    Model,
    Plan,
    Recommendation,
    Request,
    Slo,
    first_error,
)
from advisor.schema.claims import AuditReport, ClaimsFile
from advisor.schema.month import Month
from advisor.schema.power import PowerReport
from advisor.schema.training import TrainAnswer, TrainJob, TrainPrediction
from advisor.ui import later, pool, state
from advisor.ui.text import plain
from advisor.units import KIB, format_bytes

Run = Callable[..., Any]
MAX_CLAIMS_BYTES = 128 * KIB
FOR_THE_COMMAND_LINE = " Run 'advisor "
"""How advice on names begins that a page cannot follow."""
LOAD_SHARES = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Points of a load curve, as shares of the rate at which the deployment saturates."""
DAY_S = 1.5
"""A page of a day waits for its plan for so long before it shows the load alone."""
MAX_ENTRIES = 256
"""Answers kept in memory for all sessions together; one is some tens of kB."""


def page(render: Callable[[], None]) -> Callable[[], None]:
    """Return a page that shows an AdvisorError as its sentence and ends there."""

    @wraps(render)
    def guarded() -> None:
        state.enter(render.__module__)
        above = st.container()
        try:
            render()
        except AdvisorError as error:
            st.error(said(error))
        if refused := state.refused():
            above.warning(f"Left out of the link, the default stands instead: {plain('; '.join(refused))}.")

    return guarded


def said(error: AdvisorError) -> str:
    """Return an error's sentence for a page: advice that only the command line can follow is left out."""
    text, advice, _ = str(error).partition(FOR_THE_COMMAND_LINE)
    return plain(
        f"{text} The lists of the side bar have every name; files are for the command line." if advice else text
    )


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner="Comparing plans ...")
def _brief(request_json: str) -> Recommendation:
    request = Request.model_validate_json(request_json)
    return pool.run(partial(find_plans, is_brief=True), request, near=_near(request))


def _near(request: Request) -> str:
    """Return what questions have in common whose answers share much work: a worker keeps it."""
    return f"{request.model} {request.gpus}"


def plans(request: Request) -> Recommendation:
    """Return the answer to a request without what would change it, which takes as long again."""
    found: Recommendation = _brief(request.model_dump_json())
    return found


def recommend(request: Request) -> tuple[Recommendation, str]:
    """Return the answer to a request and "", or its plans alone and the key of the whole answer (`later.fill_in`)."""
    key, found = f"answer {request.model_dump_json()}", None
    if pool.is_running():
        found = plans(request)
        whole = later.get(key, _near(request), find_plans, request)
    else:
        with st.spinner("Comparing plans ..."):
            whole = later.get(key, "", find_plans, request)
    return (whole, "") if whole is not None else (found or plans(request), key)


@lru_cache(maxsize=MAX_ENTRIES)
def _asked(request: Request) -> tuple[Slo, float | None]:
    question = ask(request, load_catalog())
    load = question.workload.load
    return question.slo, None if load.kind == "closed" else load.arrivals_per_s


def targets(request: Request) -> Slo:
    """Return the latency targets that an answer was judged by: the request's, or those assumed where it has none."""
    return _asked(request)[0]


def offered_rate(request: Request) -> float | None:
    """Return the requests a second that arrive, None where clients wait for their answers instead."""
    return _asked(request)[1]


def card_limit(gpu: str) -> tuple[str, float]:
    """Return what a card holds, with its name, to draw beside memory bars; raises UnknownName."""
    card = load_catalog().gpu(gpu)
    return f"{card.label}: {format_bytes(card.device_memory_bytes)}", card.device_memory_bytes


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner=False)
def _artefact(name: str, plan_json: str, request_json: str) -> tuple[str, str, str]:
    plan, request = Plan.model_validate_json(plan_json), Request.model_validate_json(request_json)
    question = ask(request, load_catalog())
    clusters = [pool.cluster for pool in question.pools if pool.cluster.gpu.name == plan.deployment.gpu]
    if not clusters:
        raise DomainError(f"'{printable(request.gpus)}' has no {plan.deployment.gpu}, which this plan uses")
    facts, saved_as = question.facts if plan.backend == "vllm" else None, file_name(name, plan.deployment)
    try:
        text = emit(name, plan, question.model, clusters[0], question.workload, question.slo, facts=facts)
    except AdvisorError as error:
        return "", saved_as, str(error)
    return text, saved_as, ""


def artefact(name: str, plan: Plan, request: dict[str, Any]) -> tuple[str, str, str]:
    """Return (text, file name, "") of an artefact, or the sentence that says why the plan has none."""
    return _artefact(name, plan.model_dump_json(), json.dumps(request))


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner=False)
def _train(model_json: str, cluster_json: str, job_json: str) -> tuple[TrainPrediction, tuple[str, str] | None]:
    model, cluster = Model.model_validate_json(model_json), Cluster.model_validate_json(cluster_json)
    job, coefficients = TrainJob.model_validate_json(job_json), load_catalog().coefficients("deepspeed")
    return predict_train(model, cluster, job, coefficients), feasible_train(model, cluster, job, coefficients)


def train(model: Model, cluster: Cluster, job: TrainJob) -> tuple[TrainPrediction, tuple[str, str] | None]:
    """Return the prediction of a training job, and (reason, what would fit) where its memory does not suffice."""
    return _train(model.model_dump_json(), cluster.model_dump_json(), job.model_dump_json())


def train_answer(model: Model, cluster: Cluster, job: TrainJob) -> tuple[TrainAnswer | None, str]:
    """Return the best jobs for the same model and batch as `job`, None while they are worked out, and their key."""
    ask_all = partial(
        recommend_training,
        global_batch=job.train_batch_size,
        sequence_length=job.sequence_length,
        lora_rank=job.lora_rank,
        stack=job.stack,
        total_tokens=job.total_tokens,
        fixed={"dtype": job.dtype},
    )
    shared = [job.train_batch_size, job.sequence_length, job.lora_rank, job.stack, job.total_tokens, job.dtype]
    key = f"training {shared} {model.model_dump_json()} {cluster.model_dump_json()}"
    return later.get(key, model.name, ask_all, model, cluster, load_catalog().coefficients("deepspeed")), key


def pipeline(model: Model, cluster: Cluster, job: TrainJob) -> tuple[Pass, ...]:
    """Return when each stage of a training pipeline computes which microbatch."""
    return predict_schedule(model, cluster, job, load_catalog().coefficients("deepspeed"))


def training_files(job: TrainJob, model: Model, cluster: Cluster) -> tuple[dict[str, Any], str, str]:
    """Return (ds_config, launch line, script) of a training job."""
    per_node = cluster.gpus_per_node
    return (
        training_config(job),
        training_command(job, model, gpus_per_node=per_node),
        training_script(job, model, gpus_per_node=per_node),
    )


@st.cache_data(max_entries=64, show_spinner="Judging the claims ...")
def audit(claims_toml: str, where: str, _run: Run = pool.run) -> AuditReport:
    """Return the verdicts on a publication's claims; raises BadData for text that is no claims file.

    _run : where the work is done
    """
    if len(claims_toml.encode()) > MAX_CLAIMS_BYTES:
        raise BadData(where, f"a claims file has at most {MAX_CLAIMS_BYTES // KIB} KiB")
    try:
        claims = ClaimsFile.model_validate(tomllib.loads(claims_toml))
    except tomllib.TOMLDecodeError as error:
        raise BadData(where, f"not TOML: {error}") from None
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    report: AuditReport = _run(find_verdicts, claims, load_catalog())
    return report


def claims_files() -> dict[str, str]:
    """Return the texts of the claims files that come with the package, by title."""
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted((data_root() / "claims").glob("*.toml"))}


def fitted_names() -> tuple[str, ...]:
    """Return the engines that have fitted coefficients, vLLM first."""
    return tuple(sorted(load_catalog().coefficient_sets(), key=lambda name: name != "vllm"))


def coefficients(name: str) -> CoefficientSet:
    """Return the fitted coefficients of an engine."""
    return load_catalog().coefficients(name)


def answer_json(request: Request) -> str:
    """Return the whole answer to a request as the command line's --json prints it."""
    found = later.get(f"answer {request.model_dump_json()}", _near(request), find_plans, request, patience_s=None)
    return json.dumps(recommendation_json(found or plans(request)), indent=1)


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner=False)
def _predict(request_json: str, chosen_json: str) -> Plan:
    request = Request.model_validate_json(request_json)
    return pool.run(plan_for, request, json.loads(chosen_json), near=_near(request))


def predict(request: Request, chosen: dict[str, Any]) -> Plan:
    """Return the plan of one deployment under the request's load, simulated."""
    return _predict(request.model_dump_json(), json.dumps(chosen, sort_keys=True))


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner=False)
def _load_curve(request_json: str, chosen_json: str, most: float) -> list[tuple[float, Plan]]:
    open_loop, chosen = Request.model_validate_json(request_json), json.loads(chosen_json)
    rates = [most * share for share in LOAD_SHARES]
    asked = [(open_loop.model_copy(update={"concurrency": None, "rate": rate}), chosen) for rate in rates]
    return list(zip(rates, pool.run_all(plan_for, asked), strict=True))


def load_curve(request: Request, chosen: dict[str, Any], most: float) -> list[tuple[float, Plan]]:
    """Return the plans of a deployment at shares of its saturation `most` [requests/s], with their rates."""
    anywhere = request.model_copy(update={"concurrency": None, "rate": None})
    return _load_curve(anywhere.model_dump_json(), json.dumps(chosen, sort_keys=True), most)


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner=False)
def _look(request_json: str, chosen_json: str) -> Look:
    request = Request.model_validate_json(request_json)
    return pool.run(look_for, request, json.loads(chosen_json), near=_near(request))


def look(request: Request, chosen: dict[str, Any]) -> Look:
    """Return what one replica's scheduler does over time, and its roofline, under its share of the request's load."""
    return _look(request.model_dump_json(), json.dumps(chosen, sort_keys=True))


def day_plan(request: Request, day: Day, wanted: Offline) -> tuple[DayPlan | None, str]:
    """Return the hour-by-hour schedule of the request's GPUs, None while it is worked out, and its key."""
    key = "day " + json.dumps([noun.model_dump(mode="json") for noun in (request, day, wanted)])
    with st.spinner("Planning the day ..."):
        return later.get(key, _near(request), plan_day, request, day, wanted, patience_s=DAY_S), key


def month(request: Request, found: DayPlan, mode: str, terms: Terms) -> Month:
    """Return the month of a day that repeats, in one of its ways to divide the GPUs."""
    return month_of(request, found, terms, mode)


@st.cache_data(max_entries=MAX_ENTRIES, show_spinner="Predicting power limits ...")
def _power(request_json: str, chosen_json: str, terms: Terms) -> PowerReport:
    request = Request.model_validate_json(request_json)
    return pool.run(find_power, request, json.loads(chosen_json), terms, near=_near(request))


def power(request: Request, chosen: dict[str, Any], terms: Terms) -> PowerReport:
    """Return power, energy, emissions and money of one deployment at the request's load, and its power limits."""
    return _power(request.model_dump_json(), json.dumps(chosen, sort_keys=True), terms)
