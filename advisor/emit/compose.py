"""A docker compose file: one service that runs every replica that fits one node."""

from __future__ import annotations

from typing import Any

from advisor.emit.launch import PORT, STARTUP_LIMIT_S, Launch, dump_yaml


def emit_compose(launch: Launch) -> str:
    """Return a compose file (Compose Specification) for one node; compose reads '$' as a variable, so it is doubled."""
    launch.need_one_node("docker compose")
    fits = max(1, launch.cluster.gpus_per_node // launch.gpus_per_replica)
    n_here = min(launch.n_replicas, fits)
    deployment = launch.replica if launch.is_one_engine else launch.replica.model_copy(update={"dp": n_here})
    args = launch.serve_args(deployment)
    gpu: dict[str, Any] = {"driver": "nvidia", "count": deployment.n_gpus, "capabilities": ["gpu"]}
    service: dict[str, Any] = {
        "image": launch.image(),
        "entrypoint": ["vllm"],
        "command": [arg.replace("$", "$$") for arg in args],
        "ports": [f"{PORT}:{PORT}"],
        "ipc": "host",
        "environment": {"HF_TOKEN": "${HF_TOKEN:-}", "VLLM_API_KEY": "${VLLM_API_KEY:-}"},
        "volumes": ["hf-cache:/root/.cache/huggingface"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{launch.drain_s}s",
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", "curl", "-fsS", f"http://localhost:{PORT}/health"],
            "interval": "10s",
            "timeout": "5s",
            "start_period": f"{STARTUP_LIMIT_S}s",
        },
        "deploy": {"resources": {"reservations": {"devices": [gpu]}}},
    }
    if launch.model.folder:
        path = launch.model.folder.replace("$", "$$")
        service["volumes"].append({"type": "bind", "source": path, "target": path, "read_only": True})
    usage = [
        "usage: docker compose -f compose.yaml up; VLLM_API_KEY makes clients show a key, without it none is asked for",
        "ipc: host is for NCCL and vLLM's processes, which hand tensors over in shared memory",
    ]
    if n_here < launch.n_replicas:
        usage.append(f"{n_here} of the plan's {launch.n_replicas} replicas fit one node: run this on every node")
    document = {"name": launch.name, "services": {"vllm": service}, "volumes": {"hf-cache": {}}}
    return launch.header("Docker compose", *usage, *launch.reasons()) + dump_yaml(document)
