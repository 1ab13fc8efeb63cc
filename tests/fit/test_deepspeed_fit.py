"""The committed DeepSpeed coefficients are what their fit gives, and every one has an origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.fit.deepspeed import eager_coefficients, inject_coefficients, job_of, model_of, zero_coefficients
from advisor.fit.deepspeed_ranks import rank_coefficients, reduction_shares
from advisor.fit.deepspeed_training import training_coefficients, two_rates
from advisor.fit.deepspeed_training_power import training_power
from advisor.fit.deepspeed_zero import moved_bytes, zero_pass_coefficients
from advisor.predict.deepspeed_step import Rates
from advisor.predict.train import step_parts
from advisor.predict.train_memory import sizes_of
from advisor.predict.train_power import time_shares
from advisor.schema import Cluster
from benchmarks.deepspeed_left_out import left_out

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "deepspeed-0.19.8_h100.jsonl",
    "deepspeed-0.19.8_h100-2.jsonl",
    "deepspeed-0.19.8_h100-3.jsonl",
    "deepspeed-0.19.8_h100-4.jsonl",
    "micro-torch-2.11.0_h100.jsonl",
)
EVERY = [json.loads(x) for name in FILES for x in (ROOT / "data/runs" / name).read_text().splitlines()]
RECORDS = [r for r in EVERY if r["engine"] != "micro"]
PUBLIC = json.loads((ROOT / "data/golden/deepspeed_public.json").read_text())
COMMITTED = load_catalog().coefficients("deepspeed")
H100 = Cluster(gpu=load_catalog().gpu("h100-sxm-80gb"), gpus_per_node=8)


def test_the_committed_set_is_the_fit_s_output() -> None:
    found = eager_coefficients(RECORDS) | inject_coefficients(RECORDS)
    found |= zero_coefficients(RECORDS, PUBLIC) | training_coefficients(RECORDS, model_of) | rank_coefficients(EVERY)
    found |= zero_pass_coefficients(RECORDS, model_of, H100.gpu, found["zero_gather_eff"].value)
    values = {name: c.value for name, c in found.items()}
    found |= training_power(RECORDS, H100, values, model_of=model_of, job_of=job_of)
    for name, c in found.items():
        assert COMMITTED.coefficients[name].value == pytest.approx(c.value, rel=1e-3), name
        assert COMMITTED.coefficients[name].source == c.source


def test_every_coefficient_has_a_source_and_keeps_to_its_bounds() -> None:
    runs = {r["run_id"] for r in EVERY}
    for name, c in COMMITTED.coefficients.items():
        assert c.source, name
        assert c.bounds[0] <= c.low <= c.value <= c.high <= c.bounds[1], name
        for part in c.source.split("; "):
            if part.startswith("deepspeed-0.19.8__"):
                assert part.split(" ")[0] in runs


def test_held_out_errors_travel_with_the_set() -> None:
    assert COMMITTED.report is not None
    held = [e for g, e in COMMITTED.report.median_abs_error.items() if g.startswith("held out")]
    assert len(held) > 20
    assert np.median(held) < 0.10


def test_two_rates_find_what_made_the_data() -> None:
    # t = F / (0.5 peak) + 3 A / bandwidth on three made-up passes
    rows = [(f, a, f / (0.5 * 989.4e12) + 3 * a / 3350e9) for f, a in ((1e12, 1e9), (5e12, 2e9), (2e13, 1e10))]
    assert two_rates(rows) == pytest.approx((0.5, 3.0))


def two_gpu_record(link_share: float) -> list[dict[str, Any]]:
    """Return a stage 1 job on one GPU and on two whose link reaches a share of 450 GB/s."""
    common = {
        "engine": "deepspeed-zero-train",
        "model": "m",
        "zero_stage": 1,
        "micro_batch_size": 1,
        "sequence_length": 1,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "offload": "none",
        "n_params": 10**9,
    }
    reduced = 2 * 2e9 / 2  # 2 P elements of 2 bytes, half of them leave the GPU
    bare = {"device_used_bytes": 5e9, "reserved_bytes": 4e9}
    return [
        common | {"run_id": "a", "n_gpus": 1, "dp": 1, "measured": bare | {"backward_s": 0.1}},
        common
        | {
            "run_id": "b",
            "n_gpus": 2,
            "dp": 2,
            "measured": {
                "backward_s": 0.1 + reduced / (link_share * 450e9),
                "device_used_bytes": 5.5e9,
                "reserved_bytes": 4e9,
            },
        },
    ]


def test_the_link_s_share_that_made_the_records_is_found() -> None:
    assert reduction_shares(two_gpu_record(0.6)) == pytest.approx([0.6])
    found = rank_coefficients(two_gpu_record(0.6))
    assert found["train_link_eff"].value == pytest.approx(0.6)
    assert found["train_nccl_bytes"].value == pytest.approx(0.5e9)
    assert found["train_link_eff"].source == "b"


def test_one_gpu_alone_says_nothing_of_communication() -> None:
    with pytest.raises(ValueError, match="no training record of several ranks"):
        rank_coefficients(two_gpu_record(0.6)[:1])


def test_an_overlapped_reduction_is_not_read_as_a_fast_link() -> None:
    one, two = two_gpu_record(0.6)
    assert reduction_shares([one, two | {"cell": {"overlap_comm": True}}]) == []
    assert reduction_shares([one | {"zero_stage": 3}, two | {"zero_stage": 3}]) == []


def test_accumulated_reductions_are_compared_with_as_many_passes_alone() -> None:
    # four micro-steps take four backward passes of one GPU and four reductions
    alone, two = two_gpu_record(0.5)
    passes = {"backward_s": 4 * two["measured"]["backward_s"]}
    four = two | {"zero_stage": 2, "gradient_accumulation_steps": 4, "measured": two["measured"] | passes}
    assert reduction_shares([alone | {"zero_stage": 2}, four]) == pytest.approx([0.5])


def test_the_draws_that_made_the_meter_s_values_are_found() -> None:
    values = {name: c.value for name, c in COMMITTED.coefficients.items()}
    drawn, made = (0.9, 0.3, 0.1), []
    for r in RECORDS:
        if r["engine"] == "deepspeed-zero-train":
            model, job = model_of(r), job_of(r)
            shares = time_shares(job, step_parts(model, H100, job, sizes_of(model, job), Rates(values)))
            watts = r["n_gpus"] * (73 + sum(a * b for a, b in zip(shares, drawn, strict=True)) * (700 - 73))
            made.append(r | {"measured": r["measured"] | {"board_power_w": {"mean": watts}}})
    found = training_power(made, H100, values, model_of=model_of, job_of=job_of)
    assert [c.value for c in found.values()] == pytest.approx(drawn)
    with pytest.raises(ValueError, match="3 training records"):
        training_power(made[:3], H100, values, model_of=model_of, job_of=job_of)


def test_runs_that_the_fit_did_not_see_are_predicted_within_the_targets() -> None:
    rows, alone = left_out(EVERY)
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row.kind, []).append(abs(row.error))
    assert len(errors["training step"]) >= 10
    assert np.median(errors["training step"]) < 0.06
    assert np.median(errors["training peak memory"]) < 0.03
    for kind, found in errors.items():
        if "pass" in kind:
            assert np.median(found) < 0.15, kind
    # a run that nothing stands in for is named, not skipped in silence
    assert alone == ["zero2-1.3b-offload-optimizer"]


def zero_record(layers: int, *, offload: str = "parameters", batch: int = 1, dp: int = 1) -> dict[str, Any]:
    """Return a record of ZeRO-Inference made by the law: 30 ms a pass, 5 ms a layer, 51.2 GB/s, half of the shorter."""
    config = {
        "hidden_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 1000,
    }
    stored = 5e8 * layers
    host, stream = 0.03 + 0.005 * layers, (stored / 51.2e9 if offload != "none" else 0.0)
    if dp > 1:
        host, stream = host + 0.002 * layers, stored / dp / 51.2e9 + stored / 2 / (0.5 * 450e9)
    decode = max(host, stream) + 0.5 * min(host, stream)
    return {
        "run_id": f"r{layers}{offload}{dp}",
        "engine": "deepspeed-zero-inference",
        "model": "m",
        "hf_config": config,
        "n_warm_passes": 2,
        "dp": dp,
        "offload": offload,
        "kv_offload": "none",
        "stored_weights_bytes": stored,
        "load": {"batch_size": batch},
        "lengths": {"prompt_tokens": 512, "output_tokens": 6},
        "measured": {"decode_step_s": decode, "prefill_s": decode - 0.03},
    }


def test_the_pass_that_made_the_records_is_found() -> None:
    made = [zero_record(n) for n in (8, 24, 40)] + [zero_record(32, offload="none"), zero_record(32, dp=2)]
    # a host that is the longer and one that is the shorter tell both coefficients
    made.append(zero_record(8) | {"stored_weights_bytes": 1e8})
    made[-1]["measured"] = {"decode_step_s": 0.07 + 0.5 * 1e8 / 51.2e9, "prefill_s": 0.04 + 0.5 * 1e8 / 51.2e9}
    found = zero_pass_coefficients(made, model_of, H100.gpu, 0.5)
    assert found["zero_pass_s"].value == pytest.approx(0.03)
    assert found["zero_hook_s_per_layer"].value == pytest.approx(0.005)
    assert found["zero_stream_eff"].value == pytest.approx(0.8, rel=1e-3)
    assert found["zero_serial_frac"].value == pytest.approx(0.5, rel=1e-2)
    assert found["zero_gather_s_per_layer"].value == pytest.approx(0.002, rel=0.02)
    with pytest.raises(ValueError, match="with its trace complete"):
        zero_pass_coefficients([zero_record(8) | {"n_warm_passes": 0}], model_of, H100.gpu, 0.5)


def test_a_cache_on_the_host_moves_whole_in_every_pass() -> None:
    record = zero_record(32, offload="none", batch=4) | {"kv_offload": "cpu"}
    # by hand: 32 layers, keys and values of 8 heads of 128 in two bytes, 4 x (512 + 3) tokens
    assert moved_bytes(record, model_of) == 32 * 2 * 8 * 128 * 2 * 4 * 515
    assert moved_bytes(record | {"offload": "parameters"}, model_of) - 5e8 * 32 == 32 * 2 * 8 * 128 * 2 * 4 * 515


def test_a_run_of_packed_weights_or_offloaded_cache_is_predicted_without_it() -> None:
    rows, _ = left_out(EVERY)
    passes = [
        r for r in rows if r.kind in ("decode pass, deepspeed-zero-inference", "prompt pass, deepspeed-zero-inference")
    ]
    assert len(passes) == 26
    assert np.median([abs(r.error) for r in passes]) < 0.09
    assert max(abs(r.error) for r in passes) < 0.25
