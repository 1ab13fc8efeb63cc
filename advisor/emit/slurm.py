"""A SLURM batch script: every replica of the plan as an array task, several nodes by vLLM's own launcher."""

from __future__ import annotations

import shlex

from advisor.emit.launch import PORT, Launch
from advisor.errors import DomainError

HOURS = 8


def emit_slurm(launch: Launch) -> str:
    """Return an sbatch script; a replica that spans nodes starts one vLLM process a node."""
    nodes = launch.nodes_per_replica
    serve = launch.shell(launch.replica, executor="mp" if nodes > 1 else "")
    directives = [
        f"--job-name={launch.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={launch.gpus_per_node}",
        "--exclusive"
        if launch.gpus_per_node == launch.cluster.gpus_per_node
        else f"--cpus-per-task={launch.cpus_per_node}",
        f"--time={HOURS:02d}:00:00",
        f"--output={launch.name}-%A-%a.log",
        f"--array=0-{launch.n_replicas - 1}",
    ]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {directive}" for directive in directives)]
    header = launch.header(
        f"SLURM: replicas x nodes of each: {launch.n_replicas} x {nodes}",
        "usage: sbatch slurm.sh; each replica prints its address to its log",
        *launch.reasons(),
    )
    body = [
        "set -euo pipefail",
        f"# Replicas may share a node, so each has a port of its own from {PORT} on.",
        f"port=$(({PORT} + ${{SLURM_ARRAY_TASK_ID:-0}}))",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'echo "endpoint http://$head:$port"',
    ]
    if nodes == 1:
        body.append(f'srun {serve} --port "$port"')
    else:
        if "--nnodes" not in launch.facts.flags:
            raise DomainError(f"vLLM {launch.facts.version} spans nodes only with Ray; use the ray artefact")
        if launch.replica.dp > 1:
            raise DomainError("experts spread over data-parallel ranks on several nodes need Ray; use the ray artefact")
        rank = '--nnodes "$SLURM_NNODES" --node-rank "$SLURM_PROCID" --master-addr "$1"'
        # The quoted inner script is one word for srun; every node gets its rank from SLURM.
        inner = (
            'if [ "$SLURM_PROCID" -gt 0 ]; then headless=--headless; else headless=; fi; '
            f'exec {serve} {rank} --port "$2" $headless'
        )
        body.append(f'srun bash -c {shlex.quote(inner)} replica "$head" "$port"')
    return "\n".join([*lines, header.rstrip("\n"), *body]) + "\n"
