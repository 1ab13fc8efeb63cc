"""Kubernetes: Deployment, Service and HorizontalPodAutoscaler, or a LeaderWorkerSet when one replica spans nodes."""

from __future__ import annotations

from typing import Any

from advisor.emit.launch import PORT, STARTUP_LIMIT_S, Launch, dump_yaml
from advisor.emit.vllm import Flag
from advisor.errors import DomainError

PROBE_PERIOD_S = 10
# Requests that wait although KV cache and batch slots should take them mean that a replica is full.
WAITING_METRIC = "vllm_num_requests_waiting"


def escape(arg: str) -> str:
    """Return an argument that Kubernetes passes on unchanged: it expands '$(NAME)' and turns '$$' into '$'."""
    return arg.replace("$", "$$")


def pod_spec(launch: Launch, command: list[str], n_gpus: int, *, serves: bool = True) -> dict[str, Any]:
    """Return the pod: one container with its GPUs, shared memory, checkpoint cache and probes."""
    health = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": PROBE_PERIOD_S}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": launch.image(),
        "command": command,
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}},
            }
        ],
        "resources": {"limits": {"nvidia.com/gpu": str(n_gpus)}, "requests": {"nvidia.com/gpu": str(n_gpus)}},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "hf-cache", "mountPath": "/root/.cache/huggingface"},
        ],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if serves:
        container |= {
            "ports": [{"name": "http", "containerPort": PORT}],
            "startupProbe": health | {"failureThreshold": STARTUP_LIMIT_S // PROBE_PERIOD_S},
            "readinessProbe": health,
            "livenessProbe": health | {"failureThreshold": 6},
        }
    return {
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
            {"name": "hf-cache", "emptyDir": {}},
        ],
    }


def _service(launch: Launch, selector: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name, "labels": {"app": launch.name}},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }


def _autoscaler(launch: Launch, kind: str, api: str) -> dict[str, Any]:
    room = launch.cluster.n_gpus // (launch.nodes_per_replica * launch.gpus_per_node)
    metric = {"name": WAITING_METRIC}
    target = {"type": "AverageValue", "averageValue": "1"}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": launch.name},
        "spec": {
            "scaleTargetRef": {"apiVersion": api, "kind": kind, "name": launch.name},
            "minReplicas": launch.n_replicas,
            "maxReplicas": max(launch.n_replicas, room),
            "metrics": [{"type": "Pods", "pods": {"metric": metric, "target": target}}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": STARTUP_LIMIT_S}},
        },
    }


def _deployment(launch: Launch) -> list[dict[str, Any]]:
    labels = {"app": launch.name}
    command = ["vllm", *(escape(arg) for arg in launch.serve_args(launch.replica))]
    spec = pod_spec(launch, command, launch.gpus_per_replica)
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": launch.name, "labels": labels},
        "spec": {
            "replicas": launch.n_replicas,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    return [deployment, _service(launch, labels), _autoscaler(launch, "Deployment", "apps/v1")]


def _leader_worker_set(launch: Launch) -> list[dict[str, Any]]:
    if launch.replica.dp > 1:
        raise DomainError(
            "experts spread over data-parallel ranks on several nodes need Ray here; use the ray artefact"
        )
    if "--nnodes" not in launch.facts.flags:
        raise DomainError(f"vLLM {launch.facts.version} spans nodes only with Ray; use the ray artefact")
    # The set's controller puts these variables into every container; Kubernetes expands them in arguments.
    group = (
        Flag("--nnodes", "$(LWS_GROUP_SIZE)", ""),
        Flag("--node-rank", "$(LWS_WORKER_INDEX)", ""),
        Flag("--master-addr", "$(LWS_LEADER_ADDRESS)", ""),
    )
    own = [escape(arg) for arg in launch.serve_args(launch.replica, executor="mp")]
    shared = [text for flag in group for text in (flag.name, flag.value)]
    leader = pod_spec(launch, ["vllm", *own, *shared], launch.gpus_per_node)
    worker = pod_spec(launch, ["vllm", *own, *shared, "--headless"], launch.gpus_per_node, serves=False)
    labels = {"app": launch.name, "role": "leader"}
    workers = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": launch.name},
        "spec": {
            "replicas": launch.n_replicas,
            "leaderWorkerTemplate": {
                "size": launch.nodes_per_replica,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {"metadata": {"labels": labels}, "spec": leader},
                "workerTemplate": {"metadata": {"labels": {"app": launch.name, "role": "worker"}}, "spec": worker},
            },
        },
    }
    scaler = _autoscaler(launch, "LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1")
    return [workers, _service(launch, labels), scaler]


def emit_kubernetes(launch: Launch) -> str:
    """Return the manifests of the plan as one YAML stream for `kubectl apply -f`."""
    spans = launch.nodes_per_replica > 1
    documents = _leader_worker_set(launch) if spans else _deployment(launch)
    usage = [
        "usage: kubectl create secret generic hf-token --from-literal=token=$HF_TOKEN; kubectl apply -f FILE",
        f"the autoscaler needs a metrics adapter that serves vllm:num_requests_waiting as {WAITING_METRIC}",
    ]
    if spans:
        usage.append("needs the LeaderWorkerSet controller (lws.sigs.k8s.io), because one replica spans nodes")
    return launch.header("Kubernetes manifests", *usage) + dump_yaml(*documents)
