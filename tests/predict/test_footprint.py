"""Memory of a replica against the engine's own start-up figures, and what it says when a plan does not fit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.fit.records import Cell, cell_of, is_serving, read_records, spreads_experts
from advisor.predict.footprint import (
    Footprint,
    block_bytes_per_gpu,
    blocks_of_longest,
    cache_tokens,
    footprint,
    kv_cache_tokens,
    weights_bytes_per_gpu,
)
from advisor.predict.shapes import shapes_of
from advisor.schema import Deployment, EngineFacts

CATALOG = load_catalog()
FACTS = EngineFacts.from_table(CATALOG.engine("vllm"), "0.26.0")
ROOT = Path(__file__).resolve().parents[2]


@cache
def starts() -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for file in sorted((ROOT / "data" / "runs").glob("vllm-*.jsonl")):
        for record in read_records(file):
            if spreads_experts(record) or record.run_id in found:
                continue
            if is_serving(record) and record.startup and record.startup.n_kv_blocks:
                found[record.run_id] = cell_of(record, CATALOG, n_draws=1)
    return found


def of(model: str, gpu: str = "h100-sxm-80gb", **plan: Any) -> Footprint:
    deployment = Deployment(model=model, gpu=gpu, **plan)
    return footprint(CATALOG.model(model)[0], CATALOG.gpu(gpu), deployment, FACTS)


def test_there_are_enough_engine_starts_to_judge() -> None:
    assert len(starts()) >= 15


@pytest.mark.parametrize("run", sorted(starts()))
def test_cache_and_weights_of_every_engine_start(run: str) -> None:
    cell = starts()[run]
    startup = cell.record.startup
    assert startup is not None
    ours = footprint(cell.model, cell.gpu, cell.deployment, FACTS)
    assert ours.is_ok, ours.reason
    # quantising a 16-bit checkpoint on load leaves up to a gigabyte in the allocator, counted as weights
    is_on_load = cell.deployment.weight_dtype == "fp8"
    assert ours.n_kv_blocks == pytest.approx(startup.n_kv_blocks, rel=0.015 if is_on_load else 0.01)
    if startup.weights_bytes is None:
        return  # a server seen through HTTP tells its cache alone
    # two ranks' MXFP4 experts hold 85 MB (1.2 %), AWQ of a 7B 86 MB (1.5 %) that we cannot name
    is_split = cell.deployment.weight_dtype == "mxfp4" and cell.deployment.tp > 1
    is_split = is_split or cell.deployment.weight_dtype == "awq-int4"
    assert ours.weights_bytes == pytest.approx(
        startup.weights_bytes, rel=0.06 if is_on_load else 0.015 if is_split else 0.01
    )


def test_some_classes_build_the_embedding_table_on_each_pipeline_stage() -> None:
    # run h200 qwen3-30b-a3b-pp2: 31.166 GB on the fuller rank, 0.622 GB (151,936 x 2,048 in 16 bit) above half of all
    def weights(name: str, pp: int) -> float:
        return weights_bytes_per_gpu(CATALOG.model(name)[0], Deployment(model=name, gpu="h200-sxm-141gb", pp=pp))

    table = 2.0 * 151_936 * 2048
    # one GPU: table and head; two: half the layers and both again on the last stage
    assert 2 * weights("qwen3-30b-a3b", 2) - weights("qwen3-30b-a3b", 1) == pytest.approx(2 * table, rel=0.01)
    # Llama's class has a table on the first stage and a head on the last
    assert 2 * weights("llama-3.1-8b", 2) == pytest.approx(weights("llama-3.1-8b", 1), rel=0.01)
    # a tied head is the table of its own stage
    tied = weights("gemma-2-9b", 2)
    assert 2 * tied - weights("gemma-2-9b", 1) == pytest.approx(2.0 * 256_000 * 3584, rel=0.02)


def test_every_rank_holds_the_whole_entry_of_latent_attention() -> None:
    # not padded, as a log of March 2025 had it (640 elements): 87,643 blocks of 43.62 GB in run deepseek-v2-lite
    model = CATALOG.model("deepseek-v2-lite")[0]
    for tp in (1, 8):
        plan = Deployment(model="deepseek-v2-lite", gpu="h100-sxm-80gb", tp=tp)
        assert block_bytes_per_gpu(model, plan) == 576 * 2 * 27 * 16
    assert pytest.approx(87_643, rel=2e-4) == 43.62e9 / (576 * 2 * 27 * 16)


PLANS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4, 8]),
        "pp": st.sampled_from([1, 2, 4]),
        "weight_dtype": st.sampled_from(["bf16", "fp8", "awq-int4"]),
        "gpu_memory_utilization": st.sampled_from([0.5, 0.8, 0.9, 0.95]),
        "max_num_batched_tokens": st.sampled_from([512, 2048, 8192, 16384]),
    }
)


@given(
    plan=PLANS, model=st.sampled_from(["llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b", "gemma-2-9b", "deepseek-r1"])
)
def test_parts_sum_and_the_budget_holds(plan: dict[str, Any], model: str) -> None:
    found = of(model, **plan)
    parts = found.breakdown()
    assert sum(p.value for p in parts.parts) == pytest.approx(parts.total, rel=1e-12)
    assert parts.total == found.device_bytes
    if found.is_ok:
        inside = found.used_bytes - found.graph_bytes + found.counted_graph_bytes
        assert inside <= found.budget_bytes * (1 + 1e-12)
        assert inside + found.kv_block_bytes > found.budget_bytes * (1 - 1e-12), "one more block would not fit"
        assert found.used_bytes <= found.device_bytes
        assert not found.reason
    else:
        assert found.reason
        assert found.nearest


@given(plan=PLANS)
def test_splitting_never_makes_a_rank_fuller(plan: dict[str, Any]) -> None:
    model = CATALOG.model("llama-3.1-70b")[0]
    base = Deployment(model="llama-3.1-70b", gpu="h100-sxm-80gb", **plan)
    one = weights_bytes_per_gpu(model, base)
    for more in ({"tp": 2 * base.tp}, {"pp": 2 * base.pp}):
        assert weights_bytes_per_gpu(model, base.model_copy(update=more)) < one
    if base.pp == 1:
        total = weights_bytes_per_gpu(model, base) * base.tp
        exact = shapes_of(model).n_params * {"bf16": 2.0, "fp8": 1.0, "awq-int4": 0.536}[base.weight_dtype]
        assert total > exact


def test_weights_of_one_gpu_are_the_parameters() -> None:
    model = CATALOG.model("llama-3.1-8b")[0]
    plan = Deployment(model="llama-3.1-8b", gpu="h100-sxm-80gb")
    rotary = shapes_of(model).rotary_bytes
    assert weights_bytes_per_gpu(model, plan) == pytest.approx(2 * 8_030_261_248 + rotary, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "plan", "reason", "nearest"),
    [
        ("llama-3.1-70b", {}, "exceed", "GPUs a replica"),
        ("llama-3.1-8b", {"max_model_len": 10**6}, "less than one sequence", "--max-model-len"),
        ("llama-3.1-8b", {"gpu_memory_utilization": 1.0}, "CUDA graphs", "--gpu-memory-utilization"),
    ],
)
def test_what_does_not_fit_says_why_and_what_would(model: str, plan: dict[str, Any], reason: str, nearest: str) -> None:
    found = of(model, **plan)
    assert not found.is_ok
    assert reason in found.reason
    assert nearest in found.nearest


def test_the_nearest_length_fits() -> None:
    length = int(of("llama-3.1-8b", max_model_len=10**6).nearest.split()[-1])
    assert of("llama-3.1-8b", max_model_len=length).is_ok
    assert not of("llama-3.1-8b", max_model_len=length + 16).is_ok


def test_nothing_fits_in_no_memory() -> None:
    found = of("llama-3.1-405b")
    assert found.n_kv_blocks == 0
    assert found.kv_cache_tokens == 0
    assert "h100" in found.reason.lower()


def test_kv_heads_are_copied_when_ranks_outnumber_them() -> None:
    model = CATALOG.model("llama-3.1-8b")[0]
    plans = {tp: Deployment(model="llama-3.1-8b", gpu="h100-sxm-80gb", tp=tp) for tp in (1, 8, 16)}
    blocks = {tp: block_bytes_per_gpu(model, plan) for tp, plan in plans.items()}
    assert blocks[1] == 8 * blocks[8]
    assert blocks[16] == blocks[8]


def test_windows_free_what_lies_outside_them() -> None:
    model = CATALOG.model("gemma-3-12b")[0]  # one table of layers that see all, five of layers that see 1,024 tokens
    plan = Deployment(model=model.name, gpu="h100-sxm-80gb", max_model_len=131072, max_num_batched_tokens=8192)
    assert blocks_of_longest(model, plan) == 8192 + 5 * (-(-(1023 + 2 * 8192) // 16) + 1)
    within = plan.model_copy(update={"max_model_len": 1024})
    assert blocks_of_longest(model, within) == 64 + 5 * 65, "nothing is outside the window, and one block stands over"
    assert cache_tokens(model, plan, 10_000) > 1.5 * cache_tokens(model, within, 10_000)
    dense = Deployment(model="llama-3.1-8b", gpu="h100-sxm-80gb", max_model_len=131072)
    assert cache_tokens(CATALOG.model("llama-3.1-8b")[0], dense, 100) == 1600


@pytest.mark.parametrize("run", ["gemma-2-9b", "gemma-3-12b", "gemma-3-4b", "gpt-oss-20b"])
def test_tokens_that_an_engine_with_windows_said_it_can_cache(run: str) -> None:
    cell = starts()[f"vllm-0.26.0__h100-sxm-80gb__{run}"]
    startup = cell.record.startup
    assert startup is not None
    assert startup.n_kv_blocks is not None
    assert cache_tokens(cell.model, cell.deployment, startup.n_kv_blocks) == pytest.approx(
        startup.kv_cache_tokens, rel=1e-4
    )


def test_an_eager_engine_has_no_graphs_and_a_given_cache_is_kept() -> None:
    assert of("llama-3.1-8b", enforce_eager=True).graph_bytes == 0
    assert of("llama-3.1-8b", n_kv_blocks=1000).n_kv_blocks == 1000
    assert of("llama-3.1-8b", kv_dtype="fp8").n_kv_blocks == pytest.approx(2 * of("llama-3.1-8b").n_kv_blocks, abs=2)


def test_the_closed_form_gives_sequences_the_room_that_windows_leave() -> None:
    model, gpu = CATALOG.model("gemma-3-12b")[0], CATALOG.gpu("h100-sxm-80gb")
    plan = [Deployment(model=model.name, gpu=gpu.name)]
    short, none, long = (float(kv_cache_tokens(model, gpu, plan, FACTS, held)[0]) for held in (512.0, 0.0, 65536.0))
    assert short == none == pytest.approx(of(model.name).n_kv_blocks * 16 / 6, rel=1e-9)
    assert long == pytest.approx(none * 6 / (1 + 5 * 1024 / 65536), rel=1e-9)
    dense = [Deployment(model="llama-3.1-8b", gpu=gpu.name)]
    every = {float(kv_cache_tokens(CATALOG.model("llama-3.1-8b")[0], gpu, dense, FACTS, n)[0]) for n in (0.0, 1e5)}
    assert len(every) == 1
