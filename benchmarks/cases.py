"""What `make bench` times: inputs are built here, outside the clock."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product

import numpy as np

from advisor.catalog import load_catalog
from advisor.predict.serving import replay
from advisor.predict.steady import sweep as steady_sweep
from advisor.schema import Deployment, EngineFacts, LognormalLengths, PoissonLoad, Slo, Target, TraceLoad, Workload

MODEL, GPUS = "llama-2-70b", "8xA100-80GB"
CHAT = Workload(
    name="bench",
    lengths=LognormalLengths(
        prompt_tokens_mean=1024, output_tokens_mean=256, sigma=0.5, prompt_clip=(1, 6000), output_clip=(1, 2000)
    ),
    load=PoissonLoad(arrivals_per_s=4.0),
)
Case = tuple[int, Callable[[], object]]


def _slo(ttft_s: float, tpot_s: float) -> Slo:
    targets = (("ttft", ttft_s), ("tpot", tpot_s))
    return Slo(targets=tuple(Target(metric=m, statistic="p99", max_s=s) for m, s in targets))  # type: ignore[arg-type]


CHANGES: dict[str, list[dict[str, object]]] = {
    "another target": [{"slo": _slo(2.0 + 0.1 * k, 0.1 + 0.01 * k)} for k in range(5)],
    "another price": [{"price_usd_per_gpu_h": 1.1 + 0.1 * k} for k in range(5)],
    "another objective": [{"objective": name} for name in ("latency", "throughput", "energy")],
    "other traffic (lengths)": [{"prompt_tokens": 700 + 10 * k, "output_tokens": 200} for k in range(5)],
    "other traffic (rate)": [{"rate": 3.0 + 0.1 * k} for k in range(5)],
}
"""Changes of a question whose first answer is known, several of each: none is asked twice."""
REPLAYED = ("other traffic (lengths)", "other traffic (rate)")


def sweep(n: int) -> Case:
    """The closed form of `n` deployments that differ in degrees and engine settings."""
    catalog = load_catalog()
    model, _ = catalog.model(MODEL)
    gpu = catalog.clusters(GPUS).clusters[0].gpu
    facts = EngineFacts.from_table(catalog.engine("vllm"), "0.26.0")
    settings = product(
        ((8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2)),  # tp, pp, dp
        ("bf16", "fp8"),
        (0.85, 0.9, 0.92, 0.95),
        (4096, 8192),
        (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024),
        range(2048, 2048 + 125 * 64, 64),
    )
    base = Deployment(model=model.name, gpu=gpu.name)
    deployments = [
        base.model_copy(
            update={
                "tp": degrees[0],
                "pp": degrees[1],
                "dp": degrees[2],
                "kv_dtype": kv,
                "gpu_memory_utilization": memory,
                "max_model_len": length,
                "max_num_seqs": seqs,
                "max_num_batched_tokens": budget,
            }
        )
        for degrees, kv, memory, length, seqs, budget in islice(settings, n)
    ]
    coefficients = catalog.coefficients("vllm")
    return len(deployments), lambda: steady_sweep(model, gpu, deployments, CHAT, coefficients, facts)


def trace(n: int) -> TraceLoad:
    """Arrivals whose rate swings by half around 4 requests/s, as a day's traffic does, in ten minutes a swing."""
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1 / 6.0, 2 * n)
    times = np.cumsum(gaps)
    kept = times[rng.random(2 * n) < (4.0 + 2.0 * np.sin(times * 2 * np.pi / 600)) / 6.0][:n]
    return TraceLoad(arrival_s=tuple(kept.tolist()))


def scheduler(n: int) -> Case:
    """A trace of `n` requests through the copy of the scheduler, on TP 4 and two replicas."""
    catalog = load_catalog()
    model, _ = catalog.model(MODEL)
    cluster = catalog.clusters(GPUS).clusters[0]
    workload = CHAT.model_copy(update={"load": trace(n)})
    deployment = Deployment(model=model.name, gpu=cluster.gpu.name, tp=4, dp=2, max_model_len=8192)
    coefficients = catalog.coefficients("vllm")
    return n, lambda: replay(model, cluster, deployment, workload, coefficients)
