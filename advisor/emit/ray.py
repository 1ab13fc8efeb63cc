"""Ray: a script that starts or joins a Ray cluster and runs vLLM on it, and a KubeRay RayCluster."""

from __future__ import annotations

import shlex
from typing import Any

from advisor.emit.kubernetes import pod_spec
from advisor.emit.launch import PORT, RAY_PORT, Launch, dump_yaml
from advisor.emit.vllm import Flag

# vLLM required ray itself until 0.11; later releases leave it to the user.
RAY_PACKAGE = "ray[cgraph]>=2.48"
DASHBOARD_PORT = 8265


def _extra(launch: Launch) -> tuple[Flag, ...]:
    if launch.replica.dp == 1:
        return ()
    local = max(1, launch.gpus_per_node // (launch.replica.tp * launch.replica.pp))
    return (Flag("--data-parallel-backend", "ray", ""), Flag("--data-parallel-size-local", str(local), ""))


def emit_ray(launch: Launch) -> str:
    """Return a bash script: `ray.sh head` on the first node, `ray.sh worker HEAD` on the others."""
    nodes = launch.nodes_per_replica
    serve = launch.shell(launch.replica, _extra(launch), executor="ray")
    header = launch.header(
        f"Ray on {nodes} nodes with {launch.gpus_per_node} GPUs each, one replica of {launch.n_replicas}",
        "usage: bash ray.sh head          on the first node",
        "       bash ray.sh worker HEAD   on each of the others, HEAD = address of the first",
        *launch.reasons(),
    )
    return f"""#!/usr/bin/env bash
{header}set -euo pipefail
command -v ray >/dev/null || python3 -m pip install {shlex.quote(RAY_PACKAGE)}
case "${{1:-}}" in
  head)
    ray start --head --port={RAY_PORT} --num-gpus={launch.gpus_per_node}
    echo "waiting for {nodes} nodes"
    until [ "$(python3 -c 'import ray; ray.init(address="auto", log_to_driver=False, logging_level="error")
print(sum(node["Alive"] for node in ray.nodes()))' | tail -n 1)" -ge {nodes} ]; do sleep 5; done
    exec {serve}
    ;;
  worker)
    exec ray start --address="${{2:?address of the head node}}:{RAY_PORT}" --num-gpus={launch.gpus_per_node} --block
    ;;
  *)
    echo "usage: $0 head | worker HEAD_ADDRESS" >&2
    exit 2
    ;;
esac
"""


def emit_kuberay(launch: Launch) -> str:
    """Return a RayJob for the KubeRay operator: the RayCluster of one replica, vLLM as its job, and a Service."""
    nodes = launch.nodes_per_replica
    head = pod_spec(launch, [], launch.gpus_per_node, serves=False)
    worker = pod_spec(launch, [], launch.gpus_per_node, serves=False)
    for spec, name in ((head, "ray-head"), (worker, "ray-worker")):
        # The operator writes the command (ray start) itself.
        spec["containers"][0].pop("command")
        spec["containers"][0]["name"] = name
    head["containers"][0]["ports"] = [
        {"name": "gcs", "containerPort": RAY_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
        {"name": "http", "containerPort": PORT},
    ]
    start = {"num-gpus": str(launch.gpus_per_node)}
    cluster: dict[str, Any] = {
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0"} | start,  # noqa: S104
            "template": {"metadata": {"labels": {"app": launch.name}}, "spec": head},
        }
    }
    if nodes > 1:
        group = {"groupName": "gpu", "replicas": nodes - 1, "minReplicas": nodes - 1, "maxReplicas": nodes - 1}
        template = {"metadata": {"labels": {"app": f"{launch.name}-worker"}}, "spec": worker}
        cluster["workerGroupSpecs"] = [group | {"rayStartParams": start, "template": template}]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": launch.name},
        "spec": {
            "entrypoint": launch.shell(launch.replica, _extra(launch), executor="ray"),
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": cluster,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name},
        "spec": {"selector": {"app": launch.name}, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }
    header = launch.header(
        f"KubeRay: a Ray cluster of {nodes} nodes that runs vLLM, one replica of {launch.n_replicas}",
        "usage: kubectl apply -f raycluster.yaml; needs the KubeRay operator and an image that holds vLLM and ray",
        *launch.reasons(),
    )
    return header + dump_yaml(job, service)
