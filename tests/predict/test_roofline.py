"""Operating points against hand arithmetic: under the roof, and a single sequence moves a byte an operation."""

from __future__ import annotations

import pytest

from advisor.catalog import load_catalog
from advisor.recommend.ask import Question, ask
from advisor.recommend.look import look, look_for, plan_for
from advisor.recommend.one import deployment_of, predict_one
from advisor.schema import Deployment, Request
from advisor.schema.roofline import Roofline


def case(model: str, gpus: str, **chosen: object) -> tuple[Question, Deployment]:
    question = ask(Request(model=model, gpus=gpus), load_catalog())
    return question, deployment_of(question, chosen)


@pytest.fixture(scope="module")
def llama() -> Roofline:
    return look(*case("llama-3.1-8b", "1xH100")).roofline


@pytest.mark.parametrize(
    ("model", "gpus", "chosen"),
    [
        ("llama-3.1-8b", "1xH100", {"tp": 1}),
        ("llama-3.1-8b", "1xH100", {"tp": 1, "weight_dtype": "fp8"}),
        ("llama-3.3-70b", "8xA100", {"tp": 4, "pp": 2}),
        ("mixtral", "4xH100", {"tp": 4}),
    ],
)
def test_no_point_lies_above_the_roof(model: str, gpus: str, chosen: dict[str, object]) -> None:
    found = look(*case(model, gpus, **chosen)).roofline
    for p in (*found.points, *found.prefill, *found.decode):
        roof = min(found.peak_flops_per_s, found.memory_bandwidth_bytes_per_s * p.flops_per_byte)
        assert p.flops_per_s < roof, p
    assert found.reached_flops_per_s < found.peak_flops_per_s
    assert found.reached_bytes_per_s < found.memory_bandwidth_bytes_per_s


def test_ceilings_are_the_datasheets(llama: Roofline) -> None:
    # H100 SXM: 989.4 TFLOP/s dense bf16, 3.35 TB/s (datasheet)
    assert llama.peak_flops_per_s == 989.4e12
    assert llama.memory_bandwidth_bytes_per_s == 3.35e12
    assert llama.ridge_flops_per_byte == pytest.approx(295.3, rel=1e-3)


def test_one_bf16_sequence_does_one_operation_a_byte(llama: Roofline) -> None:
    # each weight of 2 bytes is multiplied and added once; the cache and the activations add a few per cent of bytes
    assert llama.decode[0].n_tokens == 1
    assert llama.decode[0].flops_per_byte == pytest.approx(1.0, abs=0.06)


def test_a_batch_raises_the_intensity_and_a_long_prompt_is_bound_by_arithmetic(llama: Roofline) -> None:
    for trail in (llama.decode, llama.prefill):
        assert [p.flops_per_byte for p in trail] == sorted(p.flops_per_byte for p in trail)
    assert llama.decode[-1].flops_per_byte < llama.ridge_flops_per_byte < llama.prefill[-1].flops_per_byte


def test_the_work_of_a_prompt_is_two_operations_a_parameter_and_token(llama: Roofline) -> None:
    point = next(p for p in llama.prefill if p.n_tokens == 1024)
    flops = point.flops_per_s * point.seconds
    # 7.50e9 parameters without the embedding table, of which the LM head (0.525e9) runs for one token; causal
    # attention adds 1024 x 1025 / 2 pairs x 4 x 4096 x 32 layers
    matrices = 2 * 1024 * (7.504e9 - 0.525e9) + 2 * 0.525e9
    attention = 1024 * 1025 / 2 * 4 * 4096 * 32
    assert flops == pytest.approx(matrices + attention, rel=0.01)


def test_the_whole_run_is_what_mfu_says() -> None:
    question, deployment = case("llama-3.1-8b", "1xH100", tp=1)
    point = look(question, deployment).roofline.points[2]
    plan = predict_one(question, deployment)
    peak = question.pools[0].cluster.gpu.peak_flops_per_s["bf16"]
    assert point.flops_per_s == pytest.approx(plan.prediction["mfu_frac"] * peak, rel=0.02)


def test_a_small_model_waits_for_its_host() -> None:
    found = look(*case("llama-3.2-1b", "1xH100")).roofline
    assert found.decode[0].is_host_bound


def test_timeline_and_plan_are_those_of_the_request() -> None:
    request = Request(model="llama-3.1-8b", gpus="2xH100", rate=4.0)
    found = look_for(request, {"tp": 1, "dp": 2})
    assert found.n_kv_blocks == look_for(request, {"tp": 1, "dp": 1}).n_kv_blocks
    assert all(0 <= blocks <= found.n_kv_blocks for _, _, _, blocks in found.samples)
    assert plan_for(request, {"tp": 1, "dp": 2}).deployment.dp == 2
