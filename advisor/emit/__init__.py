"""Artefacts: what a person runs to get the plan, one file an artefact.

`emit(name, ...)` returns the text of one artefact of `ARTEFACTS`. Every text is built by a dumper or quoted for its
reader; names that cannot be quoted safely are refused.
"""

from __future__ import annotations

from collections.abc import Callable

from advisor.catalog import load_catalog
from advisor.emit.compose import emit_compose
from advisor.emit.kubernetes import emit_kubernetes
from advisor.emit.launch import Launch
from advisor.emit.locust import emit_locust
from advisor.emit.nsys import emit_nsys, nsys_command
from advisor.emit.prometheus import emit_prometheus
from advisor.emit.ray import emit_kuberay, emit_ray
from advisor.emit.script import emit_vllm
from advisor.emit.slurm import emit_slurm
from advisor.emit.vllm import explain_flags, launch_notes, vllm_command, vllm_serve_args
from advisor.errors import DomainError, UnknownName
from advisor.schema import Cluster, EngineFacts, Model, Plan, Slo, Workload

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
}


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
    """Return the text of one artefact of a vLLM plan; `facts` default to the catalogue's for the plan's release.

    Raises:
        UnknownName: no artefact has this name, or the plan's release is not known.
        DomainError: the plan is not vLLM's, or it cannot be written as this artefact (the message says which can).
    """
    if name not in ARTEFACTS:
        raise UnknownName("artefact", name, ARTEFACTS, f"Artefacts: {', '.join(ARTEFACTS)}.")
    if plan.deployment.backend != "vllm" and name != "locust":
        raise DomainError(f"artefact '{name}' is for vLLM plans; this plan's backend is '{plan.deployment.backend}'")
    if facts is None:
        facts = EngineFacts.from_table(load_catalog().engine("vllm"), plan.deployment.engine_version)
    return ARTEFACTS[name](Launch(plan=plan, model=model, cluster=cluster, workload=workload, slo=slo, facts=facts))


__all__ = [
    "ARTEFACTS",
    "FILE_NAMES",
    "Launch",
    "emit",
    "explain_flags",
    "launch_notes",
    "nsys_command",
    "vllm_command",
    "vllm_serve_args",
]
