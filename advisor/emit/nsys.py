"""The `nsys profile` line that records one server run: kernels, CUDA graphs node by node, all worker processes."""

from __future__ import annotations

import shlex

from advisor.emit.launch import Launch

# Long enough to pass start-up's graph capture when the range is not controlled by the server.
DURATION_S = 60
WARMUP_S = 240


def nsys_command(launch: Launch) -> str:
    """Return the profiling line; `--profiler-config` lets /start_profile and /stop_profile bound the recording."""
    launch.need_one_node("nsys profile")
    options = [
        "nsys",
        "profile",
        f"--output={launch.name}",
        "--trace=cuda,nvtx",
        "--trace-fork-before-exec=true",
        "--cuda-graph-trace=node",
    ]
    serve = ["vllm", *launch.serve_args(launch.replica)]
    if "--profiler-config" in launch.facts.flags:
        options += ["--capture-range=cudaProfilerApi", "--capture-range-end=repeat"]
        serve += ["--profiler-config", '{"profiler": "cuda"}']
    else:
        options += [f"--delay={WARMUP_S}", f"--duration={DURATION_S}"]
    return shlex.join([*options, *serve])


def emit_nsys(launch: Launch) -> str:
    """Return a bash script that holds the profiling line and says how to bound and read the recording."""
    command = nsys_command(launch)
    if "--profiler-config" in launch.facts.flags:
        usage = [
            "while load runs: curl -X POST http://localhost:8000/start_profile",
            "10 s later:      curl -X POST http://localhost:8000/stop_profile",
        ]
    else:
        usage = [f"records {DURATION_S} s from {WARMUP_S} s after the start: have load running by then"]
    usage.append(f"read: nsys stats --report cuda_gpu_kern_sum {launch.name}.nsys-rep; nsys-ui for the timeline")
    return f"#!/usr/bin/env bash\n{launch.header('Nsight Systems recording of the plan', *usage)}exec {command}\n"
