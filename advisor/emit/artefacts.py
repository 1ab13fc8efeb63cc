"""All artefacts by name: which a plan has, how its file is called, its text."""

from __future__ import annotations

import json
from collections.abc import Callable

from advisor.catalog import load_catalog
from advisor.emit.compose import emit_compose
from advisor.emit.deepspeed import SCRIPT_NAMES, command_for, inference_script, zero_inference_config
from advisor.emit.kubernetes import emit_kubernetes
from advisor.emit.launch import Launch
from advisor.emit.locust import emit_locust, locust_file
from advisor.emit.nsys import emit_nsys
from advisor.emit.prometheus import emit_prometheus
from advisor.emit.ray import emit_kuberay, emit_ray
from advisor.emit.script import emit_vllm
from advisor.emit.slurm import emit_slurm
from advisor.errors import DomainError, UnknownName
from advisor.schema import Cluster, Deployment, EngineFacts, Model, Plan, Slo, Workload

ZERO_INFERENCE = "deepspeed-zero-inference"


def _deepspeed_command(deployment: Deployment, model: Model) -> str:
    return f"#!/usr/bin/env bash\nexec {command_for(deployment, model)}\n"


def _deepspeed_config(deployment: Deployment, model: Model) -> str:
    if deployment.backend != ZERO_INFERENCE:
        raise DomainError(f"backend '{deployment.backend}' has no configuration file; only '{ZERO_INFERENCE}' has one")
    return json.dumps(zero_inference_config(deployment, model), indent=2) + "\n"


ARTEFACTS: dict[str, Callable[[Launch], str]] = {
    "vllm": emit_vllm,
    "compose": emit_compose,
    "kubernetes": emit_kubernetes,
    "ray": emit_ray,
    "kuberay": emit_kuberay,
    "slurm": emit_slurm,
    "locust": emit_locust,
    "nsys": emit_nsys,
    "prometheus": emit_prometheus,
}
DEEPSPEED_ARTEFACTS: dict[str, Callable[[Deployment, Model], str]] = {
    "deepspeed": inference_script,
    "deepspeed-command": _deepspeed_command,
    "deepspeed-config": _deepspeed_config,
}
FILE_NAMES = {
    "vllm": "serve.sh",
    "compose": "compose.yaml",
    "kubernetes": "kubernetes.yaml",
    "ray": "ray.sh",
    "kuberay": "raycluster.yaml",
    "slurm": "slurm.sh",
    "locust": "locustfile.py",
    "nsys": "nsys.sh",
    "prometheus": "alerts.yaml",
    "deepspeed": "deepspeed.py",
    "deepspeed-command": "deepspeed.sh",
    "deepspeed-config": "ds_config.json",
}
PURPOSES = {
    "vllm": "Starts the server: the launch line, each option with its reason.",
    "compose": "Docker Compose for one node: its replicas behind one port.",
    "kubernetes": "Deployment, Service, autoscaler, disruption budget; a LeaderWorkerSet where a replica spans nodes.",
    "ray": "Starts or joins a Ray cluster, waits for its nodes and runs vLLM on them.",
    "kuberay": "A Ray cluster inside Kubernetes that runs vLLM, and its Service.",
    "slurm": "A batch script: one array task a replica.",
    "locust": "A load test with the workload's lengths and arrivals.",
    "nsys": "A profile with Nsight Systems around the launch line.",
    "prometheus": "Alert rules: one a latency target, and warnings for cache, queue and preemption.",
    "deepspeed": "The Python script that the launch line starts.",
    "deepspeed-command": "The launch line as a script.",
    "deepspeed-config": "DeepSpeed's configuration of ZeRO-Inference.",
}
"""What each artefact is for, in one sentence."""


def artefacts_for(backend: str) -> tuple[str, ...]:
    """Return the names of the artefacts that a plan of this backend has."""
    if backend == "vllm":
        return tuple(ARTEFACTS)
    names = ["deepspeed", "deepspeed-command"]
    if backend == ZERO_INFERENCE:
        names.append("deepspeed-config")
    # Only FastGen's server speaks the protocol of the load test.
    return tuple([*names, "locust"] if backend == "deepspeed-fastgen" else names)


def file_name(name: str, deployment: Deployment) -> str:
    """Return the name to save an artefact under; a DeepSpeed script has the one that its launch line asks for."""
    return SCRIPT_NAMES.get(deployment.backend, FILE_NAMES[name]) if name == "deepspeed" else FILE_NAMES[name]


def emit(
    name: str,
    plan: Plan,
    model: Model,
    cluster: Cluster,
    workload: Workload,
    slo: Slo,
    *,
    facts: EngineFacts | None = None,
) -> str:
    """Return the text of one artefact of a plan; `facts` default to the catalogue's for the plan's release of vLLM.

    Raises:
        UnknownName: no artefact has this name, or the plan's release is not known.
        DomainError: the plan's backend has no such artefact, or it cannot be written so (the message says which can).
    """
    known = [*ARTEFACTS, *DEEPSPEED_ARTEFACTS]
    if name not in known:
        raise UnknownName("artefact", name, known, f"Artefacts: {', '.join(known)}.")
    backend = plan.deployment.backend
    if name not in artefacts_for(backend):
        raise DomainError(f"a plan of '{backend}' has no artefact '{name}'; it has {', '.join(artefacts_for(backend))}")
    if name in DEEPSPEED_ARTEFACTS:
        return DEEPSPEED_ARTEFACTS[name](plan.deployment, model)
    if backend != "vllm":
        return locust_file(model, workload)
    if facts is None:
        facts = EngineFacts.from_table(load_catalog().engine("vllm"), plan.deployment.engine_version)
    return ARTEFACTS[name](Launch(plan=plan, model=model, cluster=cluster, workload=workload, slo=slo, facts=facts))
