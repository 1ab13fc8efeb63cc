"""How long a group of GPUs is lost when it starts other work: an engine's start, and its weights out of host memory."""

from __future__ import annotations

from advisor.predict.footprint import weights_bytes_per_gpu
from advisor.schema import Deployment, Gpu, Model
from advisor.schema.mixed import START_S
from advisor.units import format_s

PAGEABLE_SHARE = 0.25
"""Share of the host link at which a GPU takes memory that is not pinned, as the page cache is: 15.9 GB/s of 64
(runs torch-2.11.0+cu130__h100-sxm-80gb__micro-*, host_to_device of 16 and 256 MiB; 14.5 to 16.9)."""


def weights_load_s(model: Model, replica: Deployment, gpu: Gpu) -> float:
    """Return the time in which a replica's weights go from host memory to its GPUs, each over a link of its own [s]."""
    return weights_bytes_per_gpu(model, replica) / (PAGEABLE_SHARE * gpu.host_link_bytes_per_s)


def restart_s(model: Model, replica: Deployment, gpu: Gpu) -> float:
    """Return the time that a replica's GPUs lose at a start [s]: `START_S` and its weights."""
    return START_S + weights_load_s(model, replica, gpu)


def restart_text(model: Model, replica: Deployment, gpu: Gpu) -> str:
    """Return one sentence that says what a start is made of, and what it leaves out."""
    load, whole = format_s(weights_load_s(model, replica, gpu)), format_s(restart_s(model, replica, gpu))
    return (
        f"a start is counted with {whole}: {format_s(START_S)} in which nine of ten of"
        f" our vLLM starts were ready (imports, compilation, CUDA graphs) and {load} for weights from host memory;"
        " weights from a disk or over a network, and a training job's checkpoint, take longer: --restart says yours"
    )
