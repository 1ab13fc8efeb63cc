"""FastGen coefficients from published figures; errors of the inference laws on data/golden/deepspeed_public.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.laws.offload import nvme_bytes_per_s_per_gpu, overlapped_s, weight_stream_s
from advisor.predict.deepspeed_step import Rates, StepLaw, kv_bytes_per_token, on_card, weight_bytes_of
from advisor.predict.shapes import BYTES_PER_WEIGHT, Shapes, shapes_of
from advisor.predict.splitfuse import serve_splitfuse
from advisor.schema import Cluster, Coefficient, Deployment, Gpu, Model, Source

Raw = dict[str, Any]
Floats = NDArray[np.float64]

FASTGEN_BUDGET_TOKENS = 768
PUT_TOKENS = 2048
"""Longest piece of a prompt that our step records put into one pass."""
HELD_OUT_SEQS = 32
"""Step records with this many sequences (decode, long context, with a prompt) are not fitted on."""
FASTGEN_MAX_SEQS = 512
LENGTH_SPREAD = 0.3
"""Standard deviation over mean of the lengths in the FastGen post."""


def model_of(public: Raw, name: str) -> Model:
    """Return the architecture that a row names."""
    fields = dict(zip(public["model_fields"], public["models"][name], strict=True))
    family = name.split("-")[0].lower()
    return Model(name=name, family=family, max_context_tokens=4096, **fields)


def cluster_of(public: Raw, name: str, n_gpus: int) -> Cluster:
    """Return the node that a row names."""
    facts = public["gpus"][name]
    link = facts["link_bytes_per_s"]
    gpu = Gpu(
        name=name.lower(),
        label=name,
        vendor="nvidia",
        family="published",
        memory_bytes=facts["memory_bytes"],
        device_memory_bytes=facts["memory_bytes"] * 1.06,
        memory_bandwidth_bytes_per_s=facts["memory_bandwidth_bytes_per_s"],
        peak_flops_per_s={"fp16": facts["peak_flops_per_s"]},
        board_power_w=300,
        idle_power_w=50,
        link="pcie" if link < 50e9 else "nvlink",
        link_bytes_per_s=link,
        host_link_bytes_per_s=facts["host_link_bytes_per_s"],
        sources=(Source(field="*", title=facts["source"]),),
    )
    return Cluster(gpu=gpu, gpus_per_node=max(1, n_gpus), nvme_bytes_per_s=facts["nvme_bytes_per_s"])


def fastgen_pool_tokens(shapes: Shapes, gpu: Gpu, tp: int, weight_dtype: str, context_bytes: float = 0.75e9) -> float:
    """Return the tokens that FastGen's cache holds: all free memory but 1 GB."""
    free = gpu.device_memory_bytes - context_bytes - 1e9 - weight_bytes_of(shapes, weight_dtype) / tp
    return max(0.0, free) / kv_bytes_per_token(shapes, tp)


Transfer = Mapping[str, Mapping[str, float]]


def fastgen_error(public: Raw, row: Raw, values: Mapping[str, float], transfer: Transfer) -> float:
    """Return ln(predicted / published mean latency) of one FastGen row; `transfer` has kernel figures by card."""
    shapes = shapes_of(model_of(public, row["model"]))
    cluster = cluster_of(public, row["gpu"], 8)
    deployment = Deployment(
        backend="deepspeed-fastgen", model=row["model"], gpu=cluster.gpu.name, tp=row["tp"], weight_dtype="fp16"
    )
    prompt, output, clients = row["prompt_tokens"], row["output_tokens"], row["clients"]
    is_batch = row["path"] == "fastgen-batch"
    card = on_card(values, transfer.get(CARDS.get(row["gpu"], ""), {}))
    law = StepLaw(shapes, cluster, deployment, Rates(card), mean_prompt_tokens=prompt)
    n = clients if is_batch else max(60, 4 * clients)
    spread = 0.0 if is_batch else LENGTH_SPREAD
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.normal(prompt, spread * prompt, n), 1, None).astype(np.int64)
    outputs = np.clip(rng.normal(output, spread * output, n), 1, None).astype(np.int64)
    served = serve_splitfuse(
        prompts,
        outputs,
        arrivals=None,
        clients=clients,
        budget_tokens=FASTGEN_BUDGET_TOKENS,
        max_seqs=FASTGEN_MAX_SEQS,
        kv_tokens=fastgen_pool_tokens(shapes, cluster.gpu, row["tp"], "fp16"),
        step_s=law.mixed_s,
    )
    predicted = served.duration_s if is_batch else float(served.e2e_s.mean())
    return math.log(predicted / row["mean_e2e_s"])


def zero_inference_error(
    public: Raw,
    row: Raw,
    *,
    host: float,
    gather: float,
    nvme: float,
    serial: float,
    gemm_eff: float = 0.45,
    kv_eff: float = 0.7,
) -> float:
    """Return ln(predicted / published tokens/s) of one ZeRO-Inference row."""
    shapes = shapes_of(model_of(public, row["model"]))
    cluster = cluster_of(public, row["gpu"], row["n_gpus"])
    gpu, batch = cluster.gpu, row["batch"]
    host_rate = host * gpu.host_link_bytes_per_s
    is_packed = row.get("weight_bits", 16) == 4
    bytes_per_weight = BYTES_PER_WEIGHT["int4"] if is_packed else 2.0
    rate = host_rate
    if row["offload"] == "nvme":
        rate = float(nvme_bytes_per_s_per_gpu(nvme * cluster.nvme_bytes_per_s, row["n_gpus"], host_rate, serial))
    weights = (shapes.n_params - row.get("pinned_params", 0.0)) * bytes_per_weight
    stream = float(weight_stream_s(weights, row["n_gpus"], rate, gather * gpu.link_bytes_per_s))
    peak = gpu.peak_flops_per_s["fp16"] * gemm_eff
    # unpacked to 16 bits before every product: read packed, written once, read once
    unpacked = shapes.n_params * (bytes_per_weight + 4.0) / (kv_eff * gpu.memory_bandwidth_bytes_per_s)
    memory = unpacked if is_packed else 0.0
    prompt, output = row["prompt_tokens"], row["output_tokens"]
    context = batch * (prompt + output / 2)
    kv = context * kv_bytes_per_token(shapes, 1)
    if row.get("is_kv_on_host"):
        kv *= shapes.n_heads / shapes.n_kv_heads  # that patch keeps the cache of every query head
    on_link, on_gpu = (kv / host_rate, 0.0) if row.get("is_kv_on_host") else (0.0, 3 * kv)
    kv_s = on_gpu / (kv_eff * gpu.memory_bandwidth_bytes_per_s)
    prefill = float(overlapped_s(stream, 2 * shapes.n_params * batch * prompt / peak, memory))
    decode = float(overlapped_s(stream + on_link, 2 * shapes.n_params * batch / peak, memory)) + kv_s
    total = prefill + decode * (output - 1)
    return math.log(batch * output / total / row["tokens_per_s_per_gpu"])


FASTGEN = {
    "fastgen_launch_s_per_layer": (1e-5, 1.0e-4, 1e-3, "s", "launch gaps of one layer"),
    "fastgen_gemm_eff": (0.1, 0.6, 0.9, "1", "share of the dense peak in a full pass"),
    "fastgen_group_exponent": (
        0.3,
        0.9,
        1.0,
        "1",
        "how the cache's traffic grows with query heads a KV head: 1 = each reads it anew",
    ),
    "allreduce_s": (5e-6, 6e-5, 3e-4, "s", "fixed time of one all-reduce"),
    "fastgen_host_s_per_seq": (1e-7, 5e-5, 1e-3, "s", "host time of one sequence in one pass"),
    "fastgen_mii_s": (1e-5, 2e-3, 2e-2, "s", "time of MII's loop around one pass: scheduling, sampling, sending"),
}
"""Coefficient -> lower bound, start, upper bound, unit, meaning."""


FIXED = {
    "fastgen_weight_eff": (0.88, 0.78, 0.94, "share of memory bandwidth that reads weights"),
    "fastgen_kv_eff": (0.905, 0.75, 0.98, "share of memory bandwidth that reads the cache"),
    "allreduce_eff": (0.6, 0.4, 0.8, "share of the GPU link in an all-reduce"),
}
"""Coefficient -> value, interval, meaning: H100 kernels alone, weights at m = 1, attention over 1 GB of cache."""
CARDS = {"A100-80GB": "a100-sxm-80gb", "A100-40GB": "a100-sxm-40gb"}
"""Card of the published rows -> card of data/fitted/transfer.toml; others have no kernel figures there."""


def step_error(record: Raw, values: Mapping[str, float], gpu: Gpu, model: Model) -> float:
    """Return ln(predicted / measured) of one FastGen step record: the bare engine, no MII around it."""
    load = record["load"]
    deployment = Deployment(
        backend="deepspeed-fastgen", model=model.name, gpu=gpu.name, weight_dtype=record["weight_dtype"]
    )
    law = StepLaw(shapes_of(model), Cluster(gpu=gpu, gpus_per_node=1), deployment, Rates(values), is_bare=True)
    n, new = load["n_seqs"], load["n_prompt_tokens"]
    # a prompt above PUT_TOKENS goes in as several, and a token of each sees half of it
    step = law.parts(new, n, n * load["context_tokens"], min(new, PUT_TOKENS) / 2)
    return math.log(step.total_s / record["measured"]["step_s"])


def fastgen_coefficients(
    public: Raw, steps: Sequence[tuple[Raw, Gpu, Model]], transfer: Transfer
) -> tuple[dict[str, Coefficient], float, dict[str, float]]:
    """Return FastGen's coefficients, the condition number and the median error of each group of rows.

    steps : our step records, which see the engine alone; published latencies add MII's loop and the all-reduce.
    transfer : kernel figures of other cards. Bandwidth shares are those of kernels measured alone, so that what the
    fit cannot tell apart (cache, weights, gaps) stays physical.
    """
    fixed = {name: value for name, (value, *_) in FIXED.items()}
    rows = [r for r in public["rows"] if r["path"].startswith("fastgen")]
    tuned = [r for r in rows if r["is_tuned"]]
    seen = [step for step in steps if step[0]["load"]["n_seqs"] != HELD_OUT_SEQS]

    def errors(x: Floats, some: Sequence[Raw], ours: Sequence[tuple[Raw, Gpu, Model]]) -> Floats:
        values = fixed | dict(zip(FASTGEN, (float(v) for v in np.exp(x)), strict=True))
        return np.array(
            [fastgen_error(public, r, values, transfer) for r in some]
            + [step_error(r, values, gpu, model) for r, gpu, model in ours]
        )

    lower, start, upper = (np.log([spec[i] for spec in FASTGEN.values()]) for i in range(3))
    fit = least_squares(
        lambda x: errors(x, tuned, seen), start, bounds=(lower, upper), loss="soft_l1", f_scale=0.1, diff_step=0.02
    )
    freedom = len(tuned) + len(seen) - len(FASTGEN)
    covariance = np.linalg.inv(fit.jac.T @ fit.jac) * float(np.sum(fit.fun**2)) / freedom
    half = 1.7 * np.sqrt(np.diag(covariance))
    ours = "; ".join(dict.fromkeys(r["run_id"] for r, *_ in steps))
    cited = f"{ours}; {public['sources']['fastgen']}; {public['sources']['argonne']}"
    found = {}
    for (name, (low, _, high, unit, meaning)), v, h in zip(FASTGEN.items(), fit.x, half, strict=True):
        found[name] = Coefficient(
            value=float(np.exp(v)),
            low=max(low, float(np.exp(v - h))),
            high=min(high, float(np.exp(v + h))),
            unit=unit,
            bounds=(low, high),
            meaning=meaning,
            source=cited,
            is_at_bound=bool(np.exp(v) < low * 1.01 or np.exp(v) > high * 0.99),
        )
    for name, (value, low, high, meaning) in FIXED.items():
        found[name] = Coefficient(
            value=value,
            low=low,
            high=high,
            unit="1",
            bounds=(0.05, 1),
            meaning=meaning,
            source="fixed in the fit: kernel measurements of A100 and H100 (aiconfigurator's published tables)",
        )
    groups: dict[str, list[float]] = {}
    fitted = {r["group"] for r in tuned}
    for r, e in zip(rows, errors(fit.x, rows, ()), strict=True):
        kind = "tuned" if r["is_tuned"] else "same curve" if r["group"] in fitted else "held out"
        groups.setdefault(f"{kind}: {r['group']}", []).append(abs(float(e)))
    for (record, *_), e in zip(steps, errors(fit.x, (), steps), strict=True):
        kind = "held out" if record["load"]["n_seqs"] == HELD_OUT_SEQS else "tuned"
        groups.setdefault(f"{kind}: FastGen steps on our H100", []).append(abs(float(e)))
    condition = float(np.linalg.cond(fit.jac))
    return found, condition, {g: round(float(np.median(e)), 3) for g, e in groups.items()}
