"""Estimate data/fitted/deepspeed.json from our H100 records and a selection of published figures.

Run ``python -m advisor.fit.deepspeed RUNS.jsonl ... PUBLIC.json TRAINING.json OUT.json`` with
data/runs/deepspeed-*.jsonl, data/runs/micro-*.jsonl, data/golden/deepspeed_public.json and
data/golden/training_public.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.catalog import load_catalog
from advisor.fit.deepspeed_public import fastgen_coefficients, zero_inference_error
from advisor.fit.deepspeed_ranks import rank_coefficients
from advisor.fit.deepspeed_raw import Raw, cells_with, coefficient, run_ids
from advisor.fit.deepspeed_training import training_coefficients
from advisor.fit.deepspeed_training_power import training_power
from advisor.fit.deepspeed_training_public import published_training_coefficients
from advisor.fit.deepspeed_zero import zero_pass_coefficients
from advisor.fit.run import read_transfer
from advisor.predict.deepspeed_step import injected_passes_bytes
from advisor.predict.shapes import Shapes, shapes_of
from advisor.schema import Cluster, Coefficient, CoefficientSet, FitReport, Model, Source
from advisor.schema.training import TrainJob

Floats = NDArray[np.float64]

GPU = "h100-sxm-80gb"
H100_FLOPS_PER_S = 989.4e12
H100_IDLE_W = 73.0
"""Board power of our H100 with a driver loaded and no work (NVML, same host)."""
H100_HOST_LINK_BYTES_PER_S = 64e9
H100_BYTES_PER_S = 3.35e12
INJECT_WEIGHT_EFF, INJECT_KV_EFF = (0.8, 0.5, 0.95), (0.6, 0.3, 0.9)
"""Bounds (value, low, high): with these the gaps of injected layers are what decode passes leave."""


def model_of(record: Raw) -> Model:
    """Return the architecture that a record's config.json describes (Llama shapes only, as our runs use)."""
    config = record["hf_config"]
    heads = config["num_attention_heads"]
    return Model(
        name=record["model"],
        family="llama",
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads", heads),
        d_head=config.get("head_dim") or config["hidden_size"] // heads,
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_context_tokens=config.get("max_position_embeddings", 8192),
        has_tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def job_of(record: Raw) -> TrainJob:
    """Return the job of a training record."""
    cell = record.get("cell", {})
    return TrainJob(
        model=record["model"],
        zero_stage=record["zero_stage"],
        offload_optimizer="cpu" if "optimizer" in record["offload"] else "none",
        offload_param="cpu" if "parameters" in record["offload"] else "none",
        micro_batch_size=record["micro_batch_size"],
        sequence_length=record["sequence_length"],
        gradient_accumulation_steps=record["gradient_accumulation_steps"],
        tp=record["tp"],
        pp=record["pp"],
        dp=record["dp"],
        is_checkpointed=record["activation_checkpointing"],
        has_overlap=cell.get("overlap_comm"),
    )


def _forward_flops(shapes: Shapes, batch: int, prompt: int) -> float:
    matrix = 2 * (shapes.n_active_params - shapes.head_params) * batch * prompt
    attention = 4 * shapes.n_heads * shapes.d_head * shapes.n_layers * batch * prompt * prompt / 2
    return matrix + attention + 2 * shapes.head_params * batch


def _spread(values: Sequence[float], *, least: float = 0.05) -> tuple[float, float, float]:
    """Return (median, 5 % and 95 % quantile), at least `least` wide on either side."""
    v = np.asarray(values, dtype=float)
    mid = float(np.median(v))
    return mid, min(float(np.quantile(v, 0.05)), mid * (1 - least)), max(float(np.quantile(v, 0.95)), mid * (1 + least))


def _size(record: Raw) -> tuple[int, int, int]:
    """Return batch, prompt tokens and output tokens of a static batch."""
    lengths = record["lengths"]
    return record["load"]["batch_size"], lengths["prompt_tokens"], lengths["output_tokens"]


def power_coefficient(cells: Sequence[Raw]) -> Coefficient:
    """Return the share of the way from idle to the limit that the board drew in decode passes."""
    shares = [
        (r["measured"]["board_power_w"]["mean"] - H100_IDLE_W) / (r["power_limit_w_per_gpu"] - H100_IDLE_W)
        for r in cells
        if r["measured"].get("board_power_w")
    ]
    meaning = "board power while decoding, 0 = idle, 1 = limit"
    return coefficient(_spread(shares, least=0.1), "1", (0, 1), meaning, run_ids(cells))


def prefill_eff(
    cells: Sequence[Raw], least_tokens: int, beside_s: Callable[[Shapes, int, int], float] | None = None
) -> list[float]:
    """Return the share of the peak that the matrix kernels of each prompt pass of at least `least_tokens` reach.

    beside_s : seconds of a pass that are not theirs, of (shapes, sequences, prompt tokens)
    """
    found = []
    for r in cells:
        batch, prompt, _ = _size(r)
        if batch * prompt >= least_tokens:
            shapes = shapes_of(model_of(r))
            beside = beside_s(shapes, batch, prompt) if beside_s else 0.0
            flops = _forward_flops(shapes, batch, prompt)
            found.append(flops / (r["measured"]["prefill_s"] - beside) / H100_FLOPS_PER_S)
    return found


def eager_coefficients(records: Sequence[Raw]) -> dict[str, Coefficient]:
    """Return launch times, prefill efficiency and memory factors of the transformers eager path."""
    cells = cells_with(records, mode="eager", tp=1) + cells_with(records, mode="autotp", tp=1)
    decode, small, held, work, extra, context = [], [], [], [], [], []
    for r in cells:
        s, m = shapes_of(model_of(r)), r["measured"]
        batch, prompt, output = _size(r)
        decode.append(m["decode_step_s"] / s.n_layers)
        if batch * prompt <= 1024:
            small.append(m["prefill_s"] / s.n_layers)
        cache = batch * (prompt + output) * s.kv_elements_per_token_layer * s.n_layers * 2
        held.append(cache)
        work.append(batch * prompt * s.d_model)
        extra.append(m["reserved_bytes"] - s.n_params * 2 - cache)
        context.append(m["device_used_bytes"] - m["reserved_bytes"])
    (copies, activation), *_ = np.linalg.lstsq(np.column_stack([held, work]), np.asarray(extra), rcond=None)
    source = run_ids(cells)
    unseen = "bound: not visible in our host-bound runs; kernel measurements of H100 weight streaming give 0.75 to 0.92"
    return {
        "eager_power_frac": power_coefficient(cells),
        "eager_decode_launch_s_per_layer": coefficient(
            _spread(decode), "s", (1e-5, 2e-2), "host time to launch one layer of a decode pass (transformers)", source
        ),
        "eager_prefill_launch_s_per_layer": coefficient(
            _spread(small), "s", (1e-5, 2e-2), "host time to launch one layer of a prompt pass (transformers)", source
        ),
        "eager_gemm_eff": coefficient(
            _spread(prefill_eff(cells, 4096)), "1", (0.05, 1), "share of the dense peak in a large prompt pass", source
        ),
        "eager_weight_eff": coefficient(
            (0.8, 0.6, 0.95), "1", (0.2, 1), "share of memory bandwidth that reads weights", unseen
        ),
        "eager_kv_eff": coefficient(
            (0.7, 0.4, 0.9), "1", (0.1, 1), "share of memory bandwidth that moves the cache", unseen
        ),
        "eager_kv_copy_frac": coefficient(
            _spread([float(copies)], least=0.15),
            "1",
            (0, 3),
            "cache copies in the allocator, per byte of cache",
            source,
        ),
        "eager_activation_bytes_per_token_dim": coefficient(
            _spread([float(activation)], least=0.3),
            "bytes",
            (0, 100),
            "activation per prompt token and d_model",
            source,
        ),
        "context_bytes": coefficient(
            _spread(context, least=0.2), "bytes", (1e8, 4e9), "driver context and libraries outside torch", source
        ),
    }


def inject_coefficients(records: Sequence[Raw]) -> dict[str, Coefficient]:
    """Return the coefficients of kernel injection driven by hand (it fails as normally used)."""
    cells = cells_with(records, mode="kernel-injection")
    s = shapes_of(model_of(cells[0]))
    source = run_ids(cells)
    longest = max(sum(_size(r)[1:]) for r in cells)
    token = s.kv_elements_per_token_layer * s.n_layers * 2
    gaps = []
    for r in cells:
        batch, prompt, output = _size(r)
        kernels = s.n_params * 2 / INJECT_WEIGHT_EFF[0] + batch * (prompt + output / 2) * token / INJECT_KV_EFF[0]
        gaps.append((r["measured"]["decode_step_s"] - kernels / H100_BYTES_PER_S) / s.n_layers)

    def beside(shapes: Shapes, batch: int, prompt: int) -> float:
        moved = injected_passes_bytes(shapes, batch * prompt, prompt) / (INJECT_WEIGHT_EFF[0] * H100_BYTES_PER_S)
        return float(np.median(gaps)) * shapes.n_layers + moved

    by_batch = {_size(r)[0]: r["measured"]["device_used_bytes"] - r["measured"]["reserved_bytes"] for r in cells}
    small, big = min(by_batch), max(by_batch)
    workspace = (by_batch[big] - by_batch[small]) / ((big - small) * longest * token)
    weights = cells[0]["measured"]["allocated_bytes"] / (s.n_params * 2)
    return {
        "inject_power_frac": power_coefficient(cells),
        "inject_launch_s_per_layer": coefficient(
            _spread(gaps, least=0.2), "s", (1e-5, 5e-3), "gaps between the kernels of one injected layer", source
        ),
        "inject_gemm_eff": coefficient(
            _spread(prefill_eff(cells, 512, beside)),
            "1",
            (0.05, 1),
            "share of the dense peak in a large prompt pass",
            source,
        ),
        "inject_weight_eff": coefficient(
            INJECT_WEIGHT_EFF,
            "1",
            (0.2, 1),
            "share of memory bandwidth that reads weights",
            f"bound: {source} decode at 0.42 of it or better",
        ),
        "inject_kv_eff": coefficient(
            INJECT_KV_EFF,
            "1",
            (0.1, 1),
            "share of memory bandwidth that reads the cache",
            "bound: 8 x 512 tokens show no growth",
        ),
        "inject_weight_frac": coefficient(
            _spread([weights], least=0.03), "1", (1, 2), "allocated bytes per byte of weights", source
        ),
        "inject_workspace_frac": coefficient(
            _spread([float(workspace)], least=0.2),
            "1",
            (0.5, 3),
            "workspace per byte of cache at max_out_tokens",
            source,
        ),
    }


def zero_coefficients(records: Sequence[Raw], public: Raw) -> dict[str, Coefficient]:
    """Return coefficients of ZeRO-Inference that its first records and published runs give; a pass has its own fit.

    Those records timed passes without a complete trace on a host that others used: training's rates rest on them.
    """
    warm = [r for r in records if r.get("n_warm_passes")]
    records = [r for r in records if not r.get("n_warm_passes")]
    resident = cells_with(records, engine="deepspeed-zero-inference", offload="none", dp=1)
    streamed = [r for r in cells_with(records, engine="deepspeed-zero-inference", dp=1) if r["offload"] != "none"]
    s = shapes_of(model_of(resident[0]))
    weights = s.n_params * 2
    hooks = [r["measured"]["decode_step_s"] / s.n_layers for r in resident]
    shares = []
    for r in streamed:
        total = r["measured"]["decode_step_s"]
        alone = total * (1 - (float(np.median(hooks)) * s.n_layers / total) ** 6) ** (1 / 6)
        shares.append(weights / alone / H100_HOST_LINK_BYTES_PER_S)
    base = resident[0]["measured"]["host_rss_bytes"]
    pinned = [(r["measured"]["host_rss_bytes"] - base) / weights for r in streamed]
    still = cells_with(warm, offload="parameters", kv_offload="none", weight_bits=16, dp=1)
    pinned += [r["measured"]["host_pinned_bytes"] / r["stored_weights_bytes"] for r in still]
    rows = [r for r in public["rows"] if r["path"] == "zero-inference" and r["is_tuned"]]

    def residuals(x: Floats) -> Floats:
        host, gather, nvme, serial = np.exp(x)
        return np.array(
            [zero_inference_error(public, r, host=host, gather=gather, nvme=nvme, serial=serial) for r in rows]
        )

    lower, upper = np.log([0.1, 0.05, 0.05, 0.01]), np.log([1, 1, 1, 1])
    fit = least_squares(residuals, np.log([0.65, 0.6, 0.9, 0.5]), bounds=(lower, upper))
    host, gather, nvme, serial = (float(v) for v in np.exp(fit.x))
    cited = f"{public['sources']['zero-inference-2022']} (OPT-30B rows)"
    elsewhere = (host, min(float(np.median(shares)) * 0.9, host * 0.7), host * 1.15)
    return {
        "zero_power_frac": power_coefficient(resident + streamed),
        "host_stream_eff": coefficient(
            _spread(shares, least=0.1),
            "1",
            (0.05, 1),
            "share of the host link that parameters reach in a training step, hooks included (H100 host)",
            run_ids(streamed),
        ),
        "host_stream_eff_elsewhere": coefficient(
            elsewhere, "1", (0.05, 1), "the same on other hosts", f"{cited}; low end: our H100 host"
        ),
        "zero_gather_eff": coefficient(
            (gather, gather * 0.5, min(1.0, gather * 1.6)),
            "1",
            (0.02, 1),
            "share of the GPU link in the all-gather",
            cited,
        ),
        "nvme_eff": coefficient(
            (nvme, nvme * 0.7, min(1.0, nvme * 1.4)), "1", (0.05, 1), "share of the drives' read rate", cited
        ),
        "nvme_serial_frac": coefficient(
            (serial, serial * 0.5, min(1.0, serial * 1.6)),
            "s share",
            (0.01, 1),
            "share of the shorter of reading and copying that does not hide behind the longer",
            cited,
        ),
        "host_pinned_frac": coefficient(
            _spread(pinned, least=0.1),
            "1",
            (1, 2.5),
            "host bytes per byte of offloaded weights (pinned rounding)",
            run_ids([*streamed, *still]),
        ),
    }


def estimate(
    records: Sequence[Raw], public: Raw, training: Raw, transfer: dict[str, dict[str, float]]
) -> CoefficientSet:
    """Return every coefficient of the DeepSpeed predictions with interval, source and the errors of the fit.

    records : of DeepSpeed on one and on several GPUs, and micro-runs of all-reduces.
    transfer : kernel figures of other cards as shares of the H100's, as for vLLM
    """
    runs = [r for r in records if r["engine"] != "micro"]
    card = load_catalog().gpu(GPU)
    steps = [(r, card, model_of(r)) for r in cells_with(runs, engine="deepspeed-fastgen")]
    fastgen, condition, errors = fastgen_coefficients(public, steps, transfer)
    found = eager_coefficients(runs) | inject_coefficients(runs) | zero_coefficients(runs, public) | fastgen
    found |= training_coefficients(runs, model_of) | rank_coefficients(records)
    found |= zero_pass_coefficients(runs, model_of, card, found["zero_gather_eff"].value)
    found["fastgen_power_frac"] = power_coefficient([r for r, *_ in steps if r["load"]["n_seqs"]])
    cluster = Cluster(gpu=card, gpus_per_node=card.max_gpus_per_node)
    values = {name: c.value for name, c in found.items()}
    found |= training_power(runs, cluster, values, model_of=model_of, job_of=job_of)
    published, training_errors = published_training_coefficients(training, {name: c.value for name, c in found.items()})
    found |= published
    held_out = [e for g, e in errors.items() if g.startswith("held out")]
    error = float(np.quantile(held_out, 0.9))
    found["model_error_frac"] = coefficient(
        (error, error / 2, 2 * error), "1", (0, 1), "error of the law itself, added to each interval", "held-out groups"
    )
    train_error = float(np.quantile([e for g, e in training_errors.items() if g.startswith("held out")], 0.9))
    found["train_error_frac"] = coefficient(
        (train_error, train_error / 2, 2 * train_error), "1", (0, 1), "error of the step-time law", "held-out groups"
    )
    used = [r for r in records if r["engine"] != "micro" or r["cell"]["what"] == "all_reduce"]
    ids = tuple(dict.fromkeys(r["run_id"] for r in used))
    return CoefficientSet(
        name="deepspeed",
        version=1,
        engine="deepspeed",
        engine_versions=("0.19.8",),
        gpu=GPU,
        coefficients=found,
        transfer={card: figures for card, figures in transfer.items() if card != "default"},
        report=FitReport(
            run_ids=ids,
            n_cells=len(used),
            n_coefficients=len(found),
            condition_number=condition,
            median_abs_error=errors | training_errors,
            notes=("condition number of the FastGen fit; the other coefficients are estimated one by one",),
        ),
        sources=tuple(Source(field="*", title=text) for text in public["sources"].values()),
    )


def main(argv: Sequence[str]) -> None:
    """Write the coefficient set that RUNS, PUBLIC and TRAINING determine to OUT."""
    *runs_paths, public_path, training_path, out_path = argv
    runs = [json.loads(line) for path in runs_paths for line in Path(path).read_text().splitlines() if line.strip()]
    transfer = read_transfer(Path(out_path).parent / "transfer.toml")
    public = json.loads(Path(public_path).read_text())
    training = json.loads(Path(training_path).read_text())
    Path(out_path).write_text(estimate(runs, public, training, transfer).model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
