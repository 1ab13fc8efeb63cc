"""Errors of the DeepSpeed predictions on a user's own copy of the public tables.

``python -m benchmarks.public_deepspeed DIR`` reads, where they are in DIR: deepspeed_fastgen_figures_digitised.csv,
argonne_llm_inference_bench.csv, deepspeed_zero_inference_v100.csv, zero_inference_a6000.csv,
llmfoundry_training_fsdp.csv and bigscience_training_3d_topology.csv. All rows that a law can judge are used; rows in
data/golden that the fit was tuned on are counted apart.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advisor.catalog import load_catalog
from advisor.fit.deepspeed_public import fastgen_error, zero_inference_error
from advisor.fit.deepspeed_training_public import training_error

Row = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
HUB_NAMES = {
    "Llama-2-7b-hf": "Llama-2-7B",
    "Meta-Llama-3-8B": "Llama-3-8B",
    "Mistral-7B-v0.1": "Mistral-7B",
    "Llama-2-70b-hf": "Llama-2-70B",
}
MPT = {
    "70b": (80, 8192, 64),
    "30b": (48, 7168, 56),
    "13b": (40, 5120, 40),
    "7b": (32, 4096, 32),
    "3b": (32, 2560, 20),
    "1b": (24, 2048, 16),
    "760m": (24, 1536, 12),
    "350m": (24, 1024, 16),
    "125m": (12, 768, 12),
}
"""llm-foundry's MPT shapes: layers, d_model, heads."""
TUNED_CLIENTS = (1, 4, 8, 16, 24, 32)


def lines(folder: Path, name: str) -> Iterator[dict[str, str]]:
    path = folder / name
    if not path.exists():
        print(f"{name}: not in {folder}, left out")
        return
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def fastgen(folder: Path) -> Iterator[Row]:
    for r in lines(folder, "deepspeed_fastgen_figures_digitised.csv"):
        if "fastgen" in r["backend"]:
            clients = int(r["clients_inferred"])
            yield {
                "group": f"FastGen post, {r['model']} on {r['gpu']}",
                "path": "fastgen",
                "model": r["model"],
                "gpu": r["gpu"],
                "tp": int(r["tp"]),
                "prompt_tokens": int(r["prompt_len_mean"]),
                "output_tokens": int(r["gen_len_mean"]),
                "clients": clients,
                "mean_e2e_s": float(r["mean_latency_s"]),
                "is_tuned": r["gpu"] == "A100-80GB" and clients in TUNED_CLIENTS,
            }
    for r in lines(folder, "argonne_llm_inference_bench.csv"):
        model = HUB_NAMES.get(r["model"].split("/")[-1])
        if r["backend"] == "Deepspeed-MII" and model:
            some = r["isl"] in ("256", "1024") and r["batch_size"] in ("1", "16", "64")
            tuned = some and ((r["tp"] == "1" and "Llama" in model) or (r["tp"] == "4" and model == "Llama-2-7B"))
            yield {
                "group": f"Argonne MII, {model} tp {r['tp']}",
                "path": "fastgen-batch",
                "model": model,
                "gpu": "A100-40GB",
                "tp": int(r["tp"]),
                "prompt_tokens": int(r["isl"]),
                "output_tokens": int(r["osl"]),
                "clients": int(r["batch_size"]),
                "mean_e2e_s": float(r["latency_s"]),
                "is_tuned": tuned,
            }


def zero_inference(folder: Path) -> Iterator[Row]:
    for r in lines(folder, "deepspeed_zero_inference_v100.csv"):
        if r["batch_per_gpu"]:
            yield {
                "group": f"ZeRO-Inference V100, {r['model']} {r['offload']}",
                "model": r["model"],
                "gpu": "V100-32GB",
                "n_gpus": int(r["n_gpus"]),
                "batch": int(float(r["batch_per_gpu"])),
                "offload": r["offload"],
                "prompt_tokens": int(r["prompt_tokens"]),
                "output_tokens": int(r["output_tokens"]),
                "pinned_params": float(r["params_pinned_b"]) * 1e9,
                "tokens_per_s_per_gpu": float(r["tokens_per_s_per_gpu"]),
                "is_tuned": r["model"] == "OPT-30B"
                and not (r["table"] == "T3" or (r["offload"] == "nvme" and r["table"] == "T2")),
            }
    for r in lines(folder, "zero_inference_a6000.csv"):
        if r["framework"].startswith("DeepSpeed"):
            quantised, host = r["weight_quant_4bit"] == "True", r["kv_cache_offload_cpu"] == "True"
            kind = f"{'4-bit' if quantised else '16-bit'}{', cache on host' if host else ''}, {r['weights_offload']}"
            yield {
                "group": f"ZeRO-Inference A6000, {kind}",
                "model": r["model"],
                "gpu": "A6000",
                "n_gpus": 1,
                "batch": int(r["batch_size"]),
                "offload": r["weights_offload"],
                "prompt_tokens": int(r["isl"]),
                "output_tokens": int(r["osl"]),
                "weight_bits": 4 if quantised else 16,
                "is_kv_on_host": host,
                "tokens_per_s_per_gpu": float(r["output_tok_s"]),
                "is_tuned": False,
            }


def training(folder: Path) -> Iterator[Row]:
    for r in lines(folder, "llmfoundry_training_fsdp.csv"):
        name = r["model"].lower()
        if name in MPT and "fp8" not in r["precision"] and r["sharding_strategy"] == "FULL_SHARD":
            micro, steps, length = int(r["microbatchsize"]), int(r["gradaccum"]), int(r["seqlen_t"])
            yield {
                "group": f"llm-foundry {r['gpu']}",
                "stack": "fused",
                "gpu": r["gpu"],
                "n_layers": MPT[name][0],
                "d_model": MPT[name][1],
                "n_heads": MPT[name][2],
                "vocab_size": 50368,
                "n_gpus": int(r["n_gpus"]),
                "tp": 1,
                "pp": 1,
                "dp": int(r["n_gpus"]),
                "zero_stage": 3,
                "micro_batch_size": micro,
                "gradient_accumulation_steps": steps,
                "sequence_length": length,
                "is_checkpointed": r["activation_checkpointing"] == "True",
                "step_s": micro * steps * length / float(r["throughput_t_s_gpu"]),
                "is_tuned": name in ("7b", "1b"),
            }
    for r in lines(folder, "bigscience_training_3d_topology.csv"):
        if not r["sec_per_iter"] or "A100-80GB (SXM4" not in r["gpu"] or r["dp_tp_pp_matches_gpus"] != "True":
            continue
        shape = re.search(r"HIDDEN=(\d+)\s*[;/]\s*N?LAYERS=(\d+)", r["context"])
        d, n = (int(shape[1]), int(shape[2])) if shape else (14336, 72) if r["model_size"] == "181B" else (0, 0)
        if not d or (r["n_heads"] and float(r["n_heads"]) not in (64, 112)):
            continue
        dp, tp, pp, micro, batch = (int(float(r[k])) for k in ("dp", "tp", "pp", "micro_bs", "global_bs"))
        if batch % (dp * micro) == 0:
            heading = r["heading"].split(">")[-1].strip()
            yield {
                "group": f"BLOOM {heading}",
                "stack": "megatron",
                "gpu": "a100_80gb",
                "n_layers": n,
                "d_model": d,
                "n_heads": int(float(r["n_heads"] or 64)),
                "vocab_size": 50304,
                "n_gpus": int(float(r["n_gpus"])),
                "tp": tp,
                "pp": pp,
                "dp": dp,
                "zero_stage": 0 if r["zero_stage"] == "0.0" else 1,
                "micro_batch_size": micro,
                "gradient_accumulation_steps": batch // (dp * micro),
                "sequence_length": 2048,
                "is_checkpointed": True,
                "step_s": float(r["sec_per_iter"]),
                "is_tuned": "GBS" in heading,
            }


def table(title: str, rows: Sequence[Row], error: Callable[[Row], float]) -> None:
    """Print median absolute and median signed error a group, tuned and held-out rows apart."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        kind = "tuned" if row["is_tuned"] else "held out"
        for group in (row["group"], "ALL"):
            found.setdefault((group, kind), []).append(float(np.exp(error(row)) - 1))
    print(f"\n## {title}\n\n| group | rows | kind | median error | median signed |\n|---|---|---|---|---|")
    for (group, kind), errors in sorted(found.items(), key=lambda item: (item[0][0] == "ALL", item[0])):
        print(f"| {group} | {len(errors)} | {kind} | {np.median(np.abs(errors)):.1%} | {np.median(errors):+.1%} |")


def main(folder: Path) -> None:
    fitted = load_catalog().coefficients("deepspeed")
    values = {name: c.value for name, c in fitted.coefficients.items()}
    public = json.loads((GOLDEN / "deepspeed_public.json").read_text())
    steps = json.loads((GOLDEN / "training_public.json").read_text())
    host = {
        "host": values["host_stream_eff_elsewhere"],
        "gather": values["zero_gather_eff"],
        "nvme": values["nvme_eff"],
        "serial": values["nvme_serial_frac"],
    }
    table(
        "FastGen and MII: latency", list(fastgen(folder)), lambda r: fastgen_error(public, r, values, fitted.transfer)
    )
    table("ZeRO-Inference: tokens/s", list(zero_inference(folder)), lambda r: zero_inference_error(public, r, **host))
    table("Training: step time", list(training(folder)), lambda r: training_error(steps, r, values))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
