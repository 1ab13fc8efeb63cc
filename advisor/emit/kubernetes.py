"""Kubernetes: Deployment, Service and HorizontalPodAutoscaler, or a LeaderWorkerSet when one replica spans nodes."""

from __future__ import annotations

from typing import Any

from advisor.emit.launch import PORT, STARTUP_LIMIT_S, Launch, dump_yaml
from advisor.emit.vllm import Flag
from advisor.errors import DomainError, printable

PROBE_PERIOD_S = 10
# Requests that wait although KV cache and batch slots should take them mean that a replica is full.
WAITING_METRIC = "vllm_num_requests_waiting"
RUNNING_METRIC = "vllm_num_requests_running"
# NCCL and vLLM's processes hand tensors over in shared memory; Docker's 64 MB are too few.
SHM_GIB = 16
# Host memory of a worker process: CUDA context, pinned buffers, the shard that is being read.
HOST_GIB_PER_GPU = 8
# After the drain: vLLM ends its processes.
STOP_S = 30


def escape(arg: str) -> str:
    """Return an argument that Kubernetes passes on unchanged: it expands '$(NAME)' and turns '$$' into '$'."""
    return arg.replace("$", "$$")


def _secret(variable: str, name: str, key: str) -> dict[str, Any]:
    """Return an environment variable from a secret that may be missing."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key, "optional": True}}}


def pod_spec(launch: Launch, command: list[str], n_gpus: int, *, serves: bool = True) -> dict[str, Any]:
    """Return the pod: one container with its GPUs, cores, shared memory, checkpoint cache, probes and time to drain."""
    health = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": PROBE_PERIOD_S, "timeoutSeconds": 5}
    gpus = {"nvidia.com/gpu": str(n_gpus)}
    memory = {"memory": f"{SHM_GIB + n_gpus * HOST_GIB_PER_GPU}Gi"}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": launch.image(),
        "command": command,
        "env": [_secret("HF_TOKEN", "hf-token", "token"), _secret("VLLM_API_KEY", "vllm-api-key", "key")],
        "resources": {"limits": gpus, "requests": gpus | {"cpu": str(launch.cpus_per_node)} | memory},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "hf-cache", "mountPath": "/root/.cache/huggingface"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_GIB}Gi"}},
        {"name": "hf-cache", "emptyDir": {}},
    ]
    if folder := launch.model.folder:
        if ":" in folder:
            raise DomainError(
                f"Kubernetes mounts no path with ':', as '{printable(folder)}' has one; rename the folder"
            )
        container["volumeMounts"].append({"name": "model", "mountPath": folder, "readOnly": True})
        volumes.append({"name": "model", "hostPath": {"path": folder, "type": "Directory"}})
    if serves:
        container |= {
            "ports": [{"name": "http", "containerPort": PORT}],
            "startupProbe": health | {"failureThreshold": STARTUP_LIMIT_S // PROBE_PERIOD_S},
            "readinessProbe": health,
            "livenessProbe": health | {"failureThreshold": 6},
            # The pod leaves the Service at once; vLLM ends what runs when it is told to stop, so it is told late.
            "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(launch.drain_s)]}}},
        }
    return {
        "terminationGracePeriodSeconds": (launch.drain_s if serves else 0) + STOP_S,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    }


def _template(labels: dict[str, str], spec: dict[str, Any], *, serves: bool = True) -> dict[str, Any]:
    """Return a pod template that uses no Kubernetes API; one that serves tells Prometheus where its metrics are.

    Service links are off: variables such as VLLM_PORT of a neighbouring Service would be taken for vLLM's own.
    """
    metadata: dict[str, Any] = {"labels": labels}
    if serves:
        scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT), "prometheus.io/path": "/metrics"}
        metadata["annotations"] = scrape
    return {"metadata": metadata, "spec": {"automountServiceAccountToken": False, "enableServiceLinks": False} | spec}


def _service(launch: Launch, selector: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name, "labels": {"app": launch.name}},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }


def _autoscaler(launch: Launch, kind: str, api: str) -> dict[str, Any]:
    """Return an autoscaler on two of vLLM's metrics: requests in hand as planned, and none that wait.

    Below saturation none wait, because running requests take new ones in at every step; what runs follows the load.
    """
    room = launch.cluster.n_gpus // (launch.nodes_per_replica * launch.gpus_per_node)
    wanted = {WAITING_METRIC: 1}
    if launch.running_per_replica is not None:
        wanted = {RUNNING_METRIC: launch.running_per_replica} | wanted
    metrics = [
        {
            "type": "Pods",
            "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": str(value)}},
        }
        for name, value in wanted.items()
    ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": launch.name},
        "spec": {
            "scaleTargetRef": {"apiVersion": api, "kind": kind, "name": launch.name},
            "minReplicas": launch.n_replicas,
            "maxReplicas": max(launch.n_replicas, room),
            "metrics": metrics,
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": STARTUP_LIMIT_S}},
        },
    }


def _budget(launch: Launch, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return a disruption budget: a drained node takes one replica at a time. A single replica has none to spare."""
    if launch.n_replicas < 2:
        return []
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    return [{"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": launch.name}, "spec": spec}]


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
            "template": _template(labels, spec),
        },
    }
    scaler = _autoscaler(launch, "Deployment", "apps/v1")
    return [deployment, _service(launch, labels), scaler, *_budget(launch, labels)]


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
                "leaderTemplate": _template(labels, leader),
                "workerTemplate": _template({"app": launch.name, "role": "worker"}, worker, serves=False),
            },
        },
    }
    scaler = _autoscaler(launch, "LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1")
    return [workers, _service(launch, labels), scaler, *_budget(launch, labels)]


def emit_kubernetes(launch: Launch) -> str:
    """Return the manifests of the plan as one YAML stream for `kubectl apply -f`."""
    spans = launch.nodes_per_replica > 1
    documents = _leader_worker_set(launch) if spans else _deployment(launch)
    usage = [
        "usage: kubectl create secret generic hf-token --from-literal=token=$HF_TOKEN; kubectl apply -f FILE",
        "       secret vllm-api-key (key: key) makes clients show a key; without it the server asks for none",
        f"the autoscaler needs a metrics adapter that serves vllm:num_requests_running as {RUNNING_METRIC}, and so on;",
        f"  the plan has {launch.running_per_replica or 'an unknown number of'} requests in hand a replica,"
        " minReplicas is the plan's own: lower it for quiet hours",
        "hf-cache is lost with its pod: a PersistentVolumeClaim there spares a download at every start",
        f"preStop waits {launch.drain_s} s, the plan's slowest answers, before vLLM is told to stop",
    ]
    if spans:
        usage.append("needs the LeaderWorkerSet controller (lws.sigs.k8s.io), because one replica spans nodes")
    return launch.header("Kubernetes manifests", *usage, *launch.reasons()) + dump_yaml(*documents)
