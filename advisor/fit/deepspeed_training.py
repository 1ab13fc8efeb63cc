"""Coefficients of DeepSpeed training from our H100 records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from advisor.fit.deepspeed_raw import run_ids
from advisor.laws.training import forward_flops, layer_activation_bytes
from advisor.predict.shapes import Shapes, shapes_of
from advisor.schema import Coefficient, Model

Raw = dict[str, Any]
H100_FLOPS_PER_S = 989.4e12
H100_BANDWIDTH_BYTES_PER_S = 3350e9
H100_HOST_LINK_BYTES_PER_S = 64e9
LOGIT_BYTES = 10.0
ATTENTION_EFF = 0.34
"""FlashAttention-2 on an H100: 335 of 989 TFLOP/s (arXiv:2307.08691)."""


def _work(shapes: Shapes, tokens: int, length: int, n_layers: float, has_loss: bool) -> tuple[float, float, float]:
    """Return (matrix operations, attention operations, activation bytes written) of a forward pass."""
    q, kv = shapes.n_heads * shapes.d_head, shapes.n_kv_heads * shapes.d_head
    per_layer = (shapes.n_active_params - shapes.head_params) / shapes.n_layers
    params = per_layer * n_layers + (shapes.head_params if has_loss else 0)
    flops = float(forward_flops(tokens, params, 0, q, 0))
    scores = float(forward_flops(0, 0, tokens * length / 2, q, n_layers))
    moved = n_layers * layer_activation_bytes(tokens, shapes.d_model, q, kv, shapes.d_ff)
    return flops, scores, moved + (LOGIT_BYTES * tokens * shapes.vocab_size if has_loss else 0.0)


def compute_rows(records: Sequence[Raw], model_of: Callable[[Raw], Model]) -> list[tuple[float, float, float]]:
    """Return (matrix operations, bytes, seconds without attention) of every transformers pass that the GPU bounds."""
    rows = []
    at_peak = 1 / (ATTENTION_EFF * H100_FLOPS_PER_S)
    for r in records:
        s, m = shapes_of(model_of(r)), r["measured"]
        if r["engine"] == "deepspeed-zero-train" and r["zero_stage"] < 3 and r["n_gpus"] == 1:
            length = r["sequence_length"]
            flops, scores, moved = _work(s, r["micro_batch_size"] * length, length, s.n_layers, True)
            rows.append((flops, moved, m["forward_s"] - at_peak * scores))
            if not r["activation_checkpointing"] and r["offload"] == "none":
                rows.append((2 * flops, 2 * moved, m["backward_s"] - 2 * at_peak * scores))
        if r.get("mode") in ("eager", "autotp") and r["tp"] == 1:
            batch, prompt = r["load"]["batch_size"], r["lengths"]["prompt_tokens"]
            if batch * prompt >= 8192:
                flops, scores, moved = _work(s, batch * prompt, prompt, s.n_layers, False)
                rows.append((flops, moved, m["prefill_s"] - at_peak * scores))
    return rows


def two_rates(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return (share of the peak e, passes k) by relative least squares of ``t = F / (e peak) + k A / bandwidth``."""
    flops, moved, seconds = (np.asarray(x, dtype=float) for x in zip(*rows, strict=True))
    design = np.column_stack([flops / H100_FLOPS_PER_S, moved / H100_BANDWIDTH_BYTES_PER_S]) / seconds[:, None]
    (inverse, passes), *_ = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)
    return 1 / float(inverse), float(passes)


def training_coefficients(records: Sequence[Raw], model_of: Callable[[Raw], Model]) -> dict[str, Coefficient]:
    """Return the coefficients of the training step: compute, optimizer, offload, memory slack."""
    cells = [r for r in records if r["engine"] == "deepspeed-zero-train" and r["n_gpus"] == 1]
    cited = run_ids(cells)
    eff, passes = two_rates(compute_rows(records, model_of))
    plain = [r for r in cells if r["offload"] == "none"]
    offloaded = [r for r in cells if r["offload"] != "none"]
    adam = [r["measured"]["optimizer_s"] * H100_BANDWIDTH_BYTES_PER_S / r["n_params"] for r in plain]
    kept = [r for r in plain if r["zero_stage"] < 3 and not r["activation_checkpointing"]]
    backward = float(np.median([r["measured"]["backward_s"] for r in kept]))
    opt = next(r for r in offloaded if r["zero_stage"] < 3)
    third = [r for r in cells if r["zero_stage"] == 3]
    hooks = [r["measured"]["forward_s"] / model_of(r).n_layers for r in third]
    hooks += [r["measured"]["backward_s"] / model_of(r).n_layers for r in third if r["offload"] == "none"]
    host = 0.4 * H100_HOST_LINK_BYTES_PER_S
    down = 2 * opt["n_params"] / (opt["measured"]["backward_s"] - backward) / H100_HOST_LINK_BYTES_PER_S
    updates = [r["n_params"] / (r["measured"]["optimizer_s"] - 2 * r["n_params"] / host) for r in offloaded]
    memory = [r["measured"] for r in cells]
    slack = [m["reserved_bytes"] / m["peak_allocated_bytes"] - 1 for m in memory]
    context = [m["device_used_bytes"] - m["reserved_bytes"] for m in memory]

    def made(value: float, low: float, high: float, unit: str, meaning: str, source: str = cited) -> Coefficient:
        return Coefficient(
            value=value,
            low=low,
            high=high,
            unit=unit,
            bounds=(0.0, max(1.0, high * 10)),
            meaning=meaning,
            source=source,
        )

    published = (
        "llm-foundry @8c8dd48f scripts/train/benchmarking (Apache-2.0) and bigscience @9e64edec train/tr11-176B-ml"
        " (Apache-2.0): see docs/deepspeed.md"
    )
    return {
        "train_transformers_gemm_eff": made(
            eff, eff * 0.92, eff * 1.08, "1", "share of the dense peak, transformers layers"
        ),
        "train_transformers_passes": made(
            passes, passes * 0.8, passes * 1.2, "s passes", "passes over kept activations, transformers"
        ),
        "train_transformers_attention_eff": made(
            ATTENTION_EFF,
            0.25,
            0.45,
            "1",
            "share of the dense peak in causal attention",
            "arXiv:2307.08691, figure 4 and section 4.1: FlashAttention-2 reaches 335 TFLOP/s on an H100",
        ),
        "train_network_eff": made(0.6, 0.4, 0.85, "1", "share of the network between nodes", published),
        "train_hook_s_per_layer": made(
            float(np.median(hooks)),
            min(hooks) * 0.8,
            max(hooks) * 1.1,
            "s",
            "host time of stage 3's hooks in a layer and pass",
        ),
        "adam_bytes_per_param": made(
            float(np.median(adam)), float(min(adam)), float(max(adam)), "s bytes", "memory traffic of one update"
        ),
        "cpu_adam_params_per_s": made(
            float(np.mean(updates)), min(updates) * 0.7, max(updates) * 1.5, "1/s", "update rate of a host's CPUs"
        ),
        "grad_offload_eff": made(down, down * 0.7, down * 1.5, "1", "share of the host link, gradients to the host"),
        "allocator_slack_frac": made(
            float(np.median(slack)), float(min(slack)), float(max(slack)), "s share", "reserved beyond the peak"
        ),
        "train_context_bytes": made(
            float(np.median(context)), min(context) * 0.8, max(context) * 1.2, "s bytes", "CUDA context and libraries"
        ),
        "train_memory_error_frac": made(0.02, 0.01, 0.04, "1", "error of the memory law on our records", cited),
    }
