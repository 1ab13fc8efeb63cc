"""One vLLM deployment looked at closely: its plan, its scheduler over time, its steps under the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from advisor.catalog import load_catalog
from advisor.predict.roofline import roofline
from advisor.predict.serving import Run, replay
from advisor.recommend.ask import Question, ask
from advisor.recommend.one import check_vllm, deployment_of, predict_one
from advisor.schema import ClosedLoad, Deployment, Noun, Plan, Request, TraceLoad
from advisor.schema.roofline import Roofline

N_SAMPLES = 300


class Look(Noun):
    """One replica under its share of the load."""

    samples: tuple[tuple[float, int, int, int], ...] = Field(
        description="time [s], running requests, waiting requests, KV blocks in use"
    )
    n_kv_blocks: int = Field(description="blocks that the replica has")
    kv_block_tokens: int
    roofline: Roofline


def look(question: Question, deployment: Deployment, *, n_samples: int = N_SAMPLES) -> Look:
    """Return one replica's timeline and roofline; raises DomainError for a deployment that cannot run."""
    load, n = question.workload.load, deployment.dp
    if isinstance(load, ClosedLoad):
        load = load.model_copy(update={"concurrency": max(1, load.concurrency // n), "n_requests": None})
    elif not isinstance(load, TraceLoad):
        load = load.model_copy(update={"arrivals_per_s": load.arrivals_per_s / n})
    one = deployment.model_copy(update={"dp": 1})
    run = replay(
        question.model,
        question.pools[0].cluster,
        one,
        question.workload.model_copy(update={"load": load}),
        check_vllm(question, one),
        seed=question.request.seed,
        facts=question.facts,
        n_samples=n_samples,
    )
    return Look(
        samples=run.simulation.timeline,
        n_kv_blocks=run.replica.limits.n_kv_blocks,
        kv_block_tokens=run.replica.limits.kv_block_tokens,
        roofline=roofline_of(question, deployment, run),
    )


def roofline_of(question: Question, deployment: Deployment, run: Run) -> Roofline:
    """Return the roofline of a replay of a deployment."""
    gpu = question.pools[0].cluster.gpu
    return roofline(run.replica, run.simulation, gpu, deployment, run.workload)


def plan_for(request: Request, chosen: Mapping[str, Any]) -> Plan:
    """Return the plan of the deployment with the fields `chosen` under the request's load, simulated."""
    question = ask(request, load_catalog())
    return predict_one(question, deployment_of(question, chosen))


def look_for(request: Request, chosen: Mapping[str, Any]) -> Look:
    """Return timeline and roofline of the deployment with the fields `chosen` under the request's load."""
    question = ask(request, load_catalog())
    return look(question, deployment_of(question, chosen))
