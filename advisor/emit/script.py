"""A shell script with the launch line, one option a line, and the reason for each option above it."""

from __future__ import annotations

import shlex

from advisor.emit.launch import Launch
from advisor.emit.names import comment, model_argument
from advisor.emit.vllm import explain_flags


def emit_vllm(launch: Launch) -> str:
    """Return a bash script that starts the plan on this machine."""
    deployment = launch.deployment.model_copy(update={"n_nodes": launch.nodes_per_replica})
    options = explain_flags(deployment, launch.model, launch.gpu, launch.facts)
    usage = [f"{option}: {why}" for option, why in options]
    lines = [f"exec vllm serve {shlex.quote(model_argument(launch.model))}", *(f"  {option}" for option, _ in options)]
    header = launch.header("Starts the plan", *(comment(line, 150) for line in usage))
    return f"#!/usr/bin/env bash\n{header}" + " \\\n".join(lines) + "\n"
