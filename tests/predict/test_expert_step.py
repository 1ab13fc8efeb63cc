"""Steps of models with experts: rows in blocks, sums of outputs, what the host launches, formats and graph sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import Catalog, load_catalog
from advisor.laws.expert import expected_experts
from advisor.predict import step
from advisor.predict.shapes import shapes_of
from advisor.predict.step import TERMS, StepCost, largest_graph, step_cost
from advisor.predict.transfer import transferred
from advisor.schema import Deployment

CATALOG: Catalog = load_catalog()
GPU = CATALOG.gpu("h100-sxm-80gb")
VALUES = transferred(CATALOG.coefficients("vllm"), GPU)
ROUTED, SHARED, MXFP4 = "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"


def deployment(model: str, **plan: Any) -> Deployment:
    return Deployment(model=model, gpu=GPU.name, **plan)


def cost(model: str, changed: dict[str, float] | None = None, **plan: Any) -> StepCost:
    return step_cost(shapes_of(CATALOG.model(model)[0]), GPU, deployment(model, **plan), {**VALUES, **(changed or {})})


def experts_s(c: StepCost, n_tokens: float) -> float:
    return float(dict(zip(TERMS, c.terms(n_tokens, 0.0, 0.0, 0.0, 0.0), strict=True))["experts"])


def test_operations_of_blocks_and_bytes_of_touched_experts_by_hand() -> None:
    c = cost(ROUTED)
    n, moe = 3000.0, CATALOG.model(ROUTED)[0].moe
    assert moe is not None
    assert (moe.n_experts, moe.n_experts_per_token) == (128, 8)
    touched = 128 * (1 - (1 - 8 / 128) ** n)
    rows = n * 8 + touched * 32
    arithmetic_s = 48 * rows * 6 * 2048 * 768 / c.expert_flops_per_s
    bytes_s = 48 * touched * 3 * 2048 * 768 * 2 / c.expert_bytes_per_s
    p = c.sharpness
    assert experts_s(c, n) == pytest.approx((arithmetic_s**p + bytes_s**p) ** (1 / p), rel=1e-9)


def test_recorded_kernels_of_small_and_large_experts() -> None:
    # runs h200 qwen3-30b-a3b-t and mixtral-tp2-t: 564 and 1,834 us a layer of 3,000 tokens
    h200 = CATALOG.gpu("h200-sxm-141gb")
    values = transferred(CATALOG.coefficients("vllm"), h200)
    for model, tp, n_layers, recorded_us in ((ROUTED, 1, 48, 564), ("mixtral-8x7b", 2, 32, 1834)):
        plan = Deployment(model=model, gpu=h200.name, tp=tp)
        c = step_cost(shapes_of(CATALOG.model(model)[0]), h200, plan, values)
        told_us = 1e6 * experts_s(c, 3000.0) / n_layers + step.N_EXPERT_GEMMS * 1e6 * values["gemm_s"]
        assert told_us == pytest.approx(recorded_us, rel=0.2)


@given(st.integers(1, 20_000))
def test_blocks_cost_least_where_experts_are_full(n: int) -> None:
    c = cost(ROUTED)
    spare_s = experts_s(c, float(n)) - n * c.expert_flops_per_token / c.expert_flops_per_s
    floor_s = expected_experts(float(n), 128, 8) / 128 * c.expert_bytes / c.expert_bytes_per_s
    assert experts_s(c, float(n)) >= floor_s * (1 - 1e-12)
    assert spare_s >= 0


def test_no_tokens_no_experts_and_arrays_as_scalars() -> None:
    c = cost(ROUTED)
    assert experts_s(c, 0.0) == 0
    n = np.array([0.0, 1.0, 300.0, 5000.0])
    zero = np.zeros(4)
    found = dict(zip(TERMS, c.terms(n, zero, zero, zero, zero), strict=True))["experts"]
    np.testing.assert_allclose(found, [experts_s(c, float(x)) for x in n], rtol=1e-12)


def test_outputs_of_a_tokens_experts_are_read_and_summed() -> None:
    model = CATALOG.model(ROUTED)[0]
    d, k, width = model.d_model, 8, model.n_heads * 2 * model.d_head
    by_hand = 2.0 * 48 * (4 * d + 3 * k * 768 + width + (k + 1) * d)
    assert cost(ROUTED).elementwise_bytes_per_token == pytest.approx(by_hand)


def test_shared_experts_and_latent_attention_are_launched_apart() -> None:
    def added_s(model: str, name: str, dtype: str = "bf16") -> float:
        more = cost(model, {name: VALUES[name] + 1e-3}, weight_dtype=dtype)
        return float(more.host_eager_s - cost(model, weight_dtype=dtype).host_eager_s)

    n_moe = shapes_of(CATALOG.model(SHARED)[0]).n_moe_layers
    assert n_moe == 26
    assert added_s(SHARED, "host_shared_layer_s") == pytest.approx(n_moe * 1e-3)
    assert added_s(SHARED, "host_mla_layer_s") == pytest.approx(27e-3)
    assert added_s(ROUTED, "host_shared_layer_s") == 0
    assert added_s(ROUTED, "host_moe_layer_s") == pytest.approx(48e-3)
    assert added_s("llama-3.1-8b", "host_moe_layer_s") == 0
    assert added_s(MXFP4, "host_moe_layer_s", "mxfp4") == 0
    assert added_s(MXFP4, "host_mxfp4_layer_s", "mxfp4") == pytest.approx(24e-3)


def test_graph_sizes_of_gpt_oss_and_others() -> None:
    def largest(model: str, **plan: Any) -> int:
        return largest_graph(deployment(model, **plan), shapes_of(CATALOG.model(model)[0]))

    # vLLM 0.26.0: config/vllm.py min(2 max_num_seqs, 512); model_executor/models/config.py 1024 for GptOssForCausalLM
    assert largest(ROUTED, max_num_seqs=256) == 512
    assert largest(ROUTED, max_num_seqs=64) == 128
    assert largest(MXFP4, max_num_seqs=64) == 1024
    assert largest(MXFP4, enforce_eager=True) == 0
    c = cost(MXFP4)
    assert c.host_s(1024.0, 0.0, 1.0) < c.host_s(1025.0, 0.0, 1.0)


def test_only_experts_quantised_while_they_load_pay_for_it() -> None:
    plain, quantised = cost(ROUTED), cost(ROUTED, weight_dtype="fp8")
    extra_s = (step.FP8_EXPERT_LAUNCHES - 1) * 48 * VALUES["host_moe_layer_s"]
    assert quantised.host_eager_s - plain.host_eager_s == pytest.approx(extra_s)

    def inputs(model: str) -> float:
        s = shapes_of(CATALOG.model(model)[0])
        return 2 * s.d_model + s.n_heads * s.d_attention_value + s.d_ff

    fixed_s = 48 * (step.FP8_EXPERT_LAYER_S + VALUES["fp8_input_s"] * inputs(ROUTED))
    assert quantised.fixed_s - plain.fixed_s == pytest.approx(fixed_s)
    # a dense model quantised so, and a checkpoint whose weights are fp8 themselves, do not
    dense, dense_fp8 = cost("llama-3.1-8b"), cost("llama-3.1-8b", weight_dtype="fp8")
    assert dense_fp8.fixed_s - dense.fixed_s == pytest.approx(32 * VALUES["fp8_input_s"] * inputs("llama-3.1-8b"))
    assert inputs("llama-3.1-8b") == 2 * 4096 + 32 * 128 + 14336
    # nor do cards without fp8 arithmetic, which keep inputs in 16 bits
    a100 = CATALOG.gpu("a100-sxm-80gb")
    plans = [Deployment(model=ROUTED, gpu=a100.name, weight_dtype=d) for d in ("bf16", "fp8")]
    bf16, fp8 = (step_cost(shapes_of(CATALOG.model(ROUTED)[0]), a100, plan, VALUES) for plan in plans)
    assert fp8.host_eager_s == bf16.host_eager_s
    assert fp8.fixed_s - bf16.fixed_s < 48 * step.FP8_EXPERT_LAYER_S
    native = CATALOG.model("deepseek-v3")[0]
    assert shapes_of(native).native_weight_dtype == "fp8"
    shapes = shapes_of(native)
    mine = step_cost(shapes, GPU, Deployment(model="deepseek-v3", gpu=GPU.name, weight_dtype="fp8"), VALUES)
    launches_s = (
        VALUES["host_moe_layer_s"] * shapes.n_moe_layers
        + VALUES["host_shared_layer_s"] * shapes.n_moe_layers
        + (VALUES["host_mla_layer_s"] + VALUES["host_large_layer_s"]) * shapes.n_layers
    )
    assert mine.host_eager_s == pytest.approx(launches_s)
