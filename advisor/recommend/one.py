"""One deployment that the user fixed: completed with the engine's defaults, checked, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from advisor.errors import DomainError
from advisor.predict.deepspeed import deepspeed_deployments, feasible_deepspeed, predict_deepspeed
from advisor.predict.footprint import footprint
from advisor.predict.serving import predict_vllm
from advisor.recommend.ask import Pool, Question
from advisor.recommend.plan import Option, make_plan, with_offered_rates
from advisor.recommend.space import base_deployment, format_fault, kv_dtype_for, layouts, legal_tp, replicas
from advisor.schema import Backend, ClosedLoad, CoefficientSet, Deployment, Plan


def _pool(question: Question) -> Pool:
    if len(question.pools) > 1:
        raise DomainError(f"one deployment runs on one pool, got {len(question.pools)}; give a single GPU spec")
    return question.pools[0]


def deployment_of(question: Question, chosen: Mapping[str, Any]) -> Deployment:
    """Return the deployment with the fields of `chosen`; what is not given is the engine's default.

    Unset degrees: the fewest GPUs a replica that hold the model, and as many replicas as the GPUs hold. Raises
    DomainError for degrees that are not legal, with those that are.
    """
    pool = _pool(question)
    cluster, model = pool.cluster, question.model
    backend = chosen.get("backend", "vllm")
    if backend != "vllm":
        return _deepspeed(question, backend, chosen)
    base = base_deployment(model, cluster.gpu, question.facts, max_model_len=question.max_model_len)
    fields = base.model_dump() | dict(chosen)
    if "weight_dtype" in chosen and "kv_dtype" not in chosen:
        fields["kv_dtype"] = kv_dtype_for(chosen["weight_dtype"], model, cluster.gpu)
    one = Deployment.model_validate(fields)
    tps, spread = legal_tp(model, cluster), list(layouts(model, cluster))
    if "tp" in chosen and one.tp not in tps:
        shown = ", ".join(str(t) for t in tps)
        raise DomainError(
            f"tp {one.tp} is not legal for {model.name} ({model.n_heads} heads, {model.n_kv_heads} KV heads) on"
            f" nodes of {cluster.gpus_per_node} GPUs; legal: {shown}"
        )
    able = [
        at for at in spread if ("tp" not in chosen or at.tp == one.tp) and (at.pp == one.pp if "pp" in chosen else True)
    ]
    if "pp" not in chosen and any(at.pp == 1 for at in able):
        able = [at for at in able if at.pp == 1] if "tp" in chosen else able
    if not able:
        legal = ", ".join(str(at.pp) for at in spread if at.tp == one.tp)
        nodes = f", {cluster.n_nodes} nodes of {cluster.gpus_per_node}" if cluster.n_nodes > 1 else ""
        raise DomainError(
            f"tp {one.tp} x pp {one.pp} does not fit {cluster.n_gpus} GPUs{nodes}, with as many stages on every node;"
            f" legal pp: {legal}"
        )
    trials = [
        (at, one.model_copy(update={"tp": at.tp, "pp": at.pp, "n_nodes": at.n_nodes}))
        for at in sorted(able, key=lambda at: (at.tp * at.pp, at.pp))
    ]
    at, picked = next(
        ((at, d) for at, d in trials if footprint(model, cluster.gpu, d, question.facts).is_ok), trials[-1]
    )
    dp = one.dp if "dp" in chosen else replicas(at.max_dp)[-1]
    if dp > at.max_dp:
        raise DomainError(f"{dp} replicas of {at.tp * at.pp} GPUs exceed {cluster.n_gpus} GPUs; dp can be {at.max_dp}")
    return picked.model_copy(update={"dp": dp})


def _deepspeed(question: Question, backend: Backend, chosen: Mapping[str, Any]) -> Deployment:
    """Return a DeepSpeed deployment: unset, the first place of the weights that holds them and the largest batch.

    The batch is at most what the clients of a closed loop fill. Where nothing fits, the first one, so that its reason
    can be told.
    """
    model, pool, load = question.model, _pool(question), question.workload.load
    every = deepspeed_deployments(model, pool.cluster, max_model_len=question.max_model_len, backends=(backend,))
    asked = [Deployment.model_validate(d.model_dump() | dict(chosen)) for d in every]
    if question.deepspeed is None or "static_batch" in chosen:
        return asked[0]
    most = load.concurrency if isinstance(load, ClosedLoad) else asked[-1].static_batch
    for first in dict.fromkeys((d.offload, d.tp, d.dp) for d in asked):
        alike = [d for d in asked if (d.offload, d.tp, d.dp) == first]
        able = [
            d
            for d in alike
            if feasible_deepspeed(model, pool.cluster, d, question.workload, question.deepspeed) is None
        ]
        if able:
            fill = [d for d in able if d.static_batch * (1 if d.offload != "none" else d.dp) <= most]
            return max(fill or able[:1], key=lambda d: d.static_batch)
    return asked[0]


def check_vllm(question: Question, deployment: Deployment) -> CoefficientSet:
    """Return vLLM's coefficients when the deployment can run; else raise DomainError with the nearest that would."""
    if deployment.backend != "vllm":
        raise DomainError(f"only vllm is simulated step by step, not {deployment.backend}; use `advisor predict`")
    model, gpu = question.model, _pool(question).cluster.gpu
    fault = question.context_fault
    fault = fault or format_fault(model, gpu, deployment.weight_dtype, deployment.kv_dtype, question.facts)
    if fault is None:
        room = footprint(model, gpu, deployment, question.facts)
        fault = None if room.is_ok else (room.reason, room.nearest)
    if fault:
        raise DomainError(f"{fault[0]}; nearest that fits: {fault[1]}")
    if question.vllm is None:
        raise DomainError("there are no fitted coefficients for vLLM; run `advisor fit` on run records first")
    return question.vllm


def predict_one(
    question: Question, deployment: Deployment, *, method: Literal["simulated", "steady"] = "simulated"
) -> Plan:
    """Return the plan of one deployment.

    Raises DomainError, with the nearest number that would fit, for a deployment that cannot run.
    """
    pool = _pool(question)
    model, cluster = question.model, pool.cluster
    if deployment.backend == "vllm":
        vllm = check_vllm(question, deployment)
        prediction = predict_vllm(
            model,
            cluster,
            deployment,
            question.workload,
            vllm,
            method=method,
            slo=question.slo,
            seed=question.request.seed,
            facts=question.facts,
            power=question.power,
        )
        prediction = with_offered_rates(question, prediction)
    else:
        if question.deepspeed is None:
            raise DomainError("there are no fitted coefficients for DeepSpeed")
        fault = question.context_fault or feasible_deepspeed(
            model, cluster, deployment, question.workload, question.deepspeed
        )
        if fault:
            raise DomainError(f"{fault[0]}; nearest that fits: {fault[1]}")
        prediction = predict_deepspeed(model, cluster, deployment, question.workload, question.deepspeed)
    option = Option(pool, deployment, prediction)
    return make_plan(question, option, rank=1, has_prices=pool.usd_per_gpu_h is not None, is_pareto=False)
