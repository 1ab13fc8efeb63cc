"""Compute coefficients of fused and Megatron training code from published step times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.predict.deepspeed_step import Rates
from advisor.predict.train import step_parts
from advisor.predict.train_memory import sizes_of
from advisor.schema import Cluster, Coefficient, Gpu, Model, Source
from advisor.schema.training import TrainJob

Raw = dict[str, Any]
Floats = NDArray[np.float64]
GIVEN = ("train_link_eff", "train_network_eff", "adam_bytes_per_param")
"""Coefficients from our own records that the published step times are fitted with."""
MEGATRON_ATTENTION_EFF = 0.3
"""Attention without flash kernels, causal operations counted; its share is 5 %, so the fit cannot see it."""
LOWER, UPPER = (0.2, 0.05, 0.0), (0.85, 0.8, 10.0)


def training_error(public: Raw, row: Raw, values: dict[str, float]) -> float:
    """Return ln(predicted / published step time) of one row of data/golden/training_public.json."""
    facts = public["gpus"][row["gpu"]]
    gpu = Gpu(
        name=row["gpu"].replace("_", "-"),
        label=row["gpu"],
        vendor="nvidia",
        family=facts["family"],
        memory_bytes=80e9,
        device_memory_bytes=80e9,
        memory_bandwidth_bytes_per_s=facts["memory_bandwidth_bytes_per_s"],
        peak_flops_per_s={"bf16": facts["peak_flops_per_s"]},
        board_power_w=400,
        idle_power_w=50,
        link="nvlink",
        link_bytes_per_s=facts["link_bytes_per_s"],
        host_link_bytes_per_s=31.5e9,
        sources=(Source(field="*", title=facts["source"]),),
    )
    cluster = Cluster(
        gpu=gpu,
        n_nodes=max(1, row["n_gpus"] // 8),
        gpus_per_node=min(8, row["n_gpus"]),
        internode_bytes_per_s_per_gpu=facts["internode_bytes_per_s_per_gpu"],
    )
    d = row["d_model"]
    model = Model(
        name=row["group"],
        family="gpt",
        n_layers=row["n_layers"],
        d_model=d,
        n_heads=row["n_heads"],
        n_kv_heads=row["n_heads"],
        d_head=d // row["n_heads"],
        d_ff=4 * d,
        vocab_size=row["vocab_size"],
        max_context_tokens=10**6,
        is_gated_mlp=False,
        has_tied_embeddings=True,
    )
    names = ("zero_stage", "micro_batch_size", "gradient_accumulation_steps", "sequence_length", "tp", "pp", "dp")
    job = TrainJob(
        model=model.name, stack=row["stack"], is_checkpointed=row["is_checkpointed"], **{n: row[n] for n in names}
    )
    parts = step_parts(model, cluster, job, sizes_of(model, job), Rates(values))
    return math.log(sum(parts.values()) / row["step_s"])


def _names(stack: str, family: str) -> tuple[str, str, str]:
    end = f"_{family}" if stack == "fused" and family != "hopper" else ""
    return f"train_{stack}_gemm_eff{end}", f"train_{stack}_attention_eff{end}", f"train_{stack}_passes{end}"


def published_training_coefficients(
    public: Raw, ours: Mapping[str, float]
) -> tuple[dict[str, Coefficient], dict[str, float]]:
    """Return the coefficients of each model code and GPU family, and the median error of each group of rows.

    ours : coefficient values that hold, at least those named in `GIVEN`.
    """
    found: dict[str, Coefficient] = {}
    values = {name: ours[name] for name in GIVEN}
    rows: Sequence[Raw] = public["rows"]
    family = {name: facts["family"] for name, facts in public["gpus"].items()}
    for stack, gpus in (("fused", "hopper"), ("fused", "ampere"), ("megatron", "ampere")):
        names = _names(stack, gpus)
        tuned = [r for r in rows if r["is_tuned"] and r["stack"] == stack and family[r["gpu"]] == gpus]

        def errors(x: Floats, names: tuple[str, ...] = names, tuned: Sequence[Raw] = tuned) -> Floats:
            trial = values | dict(zip(names, (float(v) for v in x), strict=True))
            return np.array([training_error(public, r, trial) for r in tuned])

        start = [0.65, 0.25, 3.5]
        lower, upper = list(LOWER), list(UPPER)
        if stack == "megatron":
            start[1], lower[1], upper[1] = (
                MEGATRON_ATTENTION_EFF,
                MEGATRON_ATTENTION_EFF * 0.999,
                MEGATRON_ATTENTION_EFF * 1.001,
            )
        fit = least_squares(errors, start, bounds=(lower, upper), loss="soft_l1", f_scale=0.1)
        spread = float(np.sqrt(np.mean(fit.fun**2)))
        for name, v, lo, hi in zip(names, fit.x, lower, upper, strict=True):
            value = float(v)
            found[name] = Coefficient(
                value=value,
                low=max(lo, value * (1 - 1.7 * spread)),
                high=min(hi, value * (1 + 1.7 * spread)) if value < hi else hi,
                unit="s passes" if "passes" in name else "1",
                bounds=(lo, hi),
                meaning=f"{stack} training code on {gpus}: {name.split('_', 2)[2]}",
                source=public["sources"]["bigscience" if stack == "megatron" else "llm-foundry"],
                is_at_bound=bool(value > hi * 0.99 or value < lo * 1.01),
            )
            values[name] = value
    errors_by: dict[str, list[float]] = {}
    for r in rows:
        kind = "tuned" if r["is_tuned"] else "held out"
        errors_by.setdefault(f"{kind}: {r['group']}", []).append(abs(training_error(public, r, values)))
    return found, {g: round(float(np.median(e)), 3) for g, e in errors_by.items()}
