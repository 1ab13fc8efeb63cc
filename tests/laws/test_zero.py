"""ZeRO's memory and traffic against the paper, DeepSpeed's own accounting and measured peaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.laws.zero import estimator_bytes, sent_bytes, zero_state

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs" / "deepspeed-0.19.8_h100.jsonl"
PARAMS = 1_345_423_360
# embedding of the 1.3B shape: 32000 x 2048, the largest module
LARGEST = 32000 * 2048


def records() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()]
    return [r for r in lines if r["engine"] == "deepspeed-zero-train"]


@pytest.mark.parametrize("record", records(), ids=lambda r: r["run_id"].split("__")[2])
def test_states_match_the_measured_phases_within_one_percent(record: dict[str, Any]) -> None:
    state = zero_state(
        PARAMS,
        1,
        record["zero_stage"],
        offload_optimizer="optimizer" in record["offload"],
        offload_param="parameters" in record["offload"],
        largest_module_params=LARGEST,
    )
    seen = record["measured"]["phase_bytes"]
    # 0.07 GB of inputs, rotary tables and workspaces belong to the model, not to ZeRO
    slack = 0.11e9
    assert state.between_steps_bytes == pytest.approx(seen["before"], abs=slack)
    assert state.backward_end_bytes == pytest.approx(seen["backward_end"], abs=slack)
    assert state.step_peak_bytes == pytest.approx(seen["optimizer_peak"], abs=slack)


@pytest.mark.parametrize(("stage", "bytes_per_param"), [(0, 16.0), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)])
def test_the_paper_s_table_for_64_gpus(stage: int, bytes_per_param: float) -> None:
    # Rajbhandari et al., figure 1: 7.5B parameters, N = 64: 120, 31.4, 16.6 and 1.9 GB of model states
    published = {0: 120e9, 1: 31.4e9, 2: 16.6e9, 3: 1.9e9}[stage]
    state = zero_state(7.5e9, 64, stage, bucket_params=1)
    got = (
        state.weights_bytes
        + state.optimizer_bytes
        + state.gradient_bytes
        + state.kept_bucket_bytes
        - (2 if stage == 3 else 0)
    )
    assert got == pytest.approx(7.5e9 * bytes_per_param, rel=1e-6)
    assert got == pytest.approx(published, rel=0.02)


@given(p=st.floats(1e8, 1e12), n=st.integers(1, 1024), stage=st.sampled_from([1, 2, 3]))
def test_more_sharding_never_takes_more_states(p: float, n: int, stage: int) -> None:
    def states(at: int) -> float:
        s = zero_state(p, n, at)
        return s.weights_bytes + s.optimizer_bytes

    assert states(stage) <= states(stage - 1) * (1 + 1e-9)
    s = zero_state(p, n, stage)
    assert 0 < s.between_steps_bytes <= s.backward_end_bytes <= s.step_peak_bytes


def test_small_models_take_more_with_stage_3_than_with_stage_2() -> None:
    # deepspeedai/DeepSpeed#5305: the kept bucket and live parameters can exceed what stage 3 saves
    two, three = zero_state(1e9, 8, 2), zero_state(1e9, 8, 3)
    assert three.forward_bytes > two.forward_bytes
    assert zero_state(70e9, 8, 3).forward_bytes < zero_state(70e9, 8, 2).forward_bytes


def test_offload_moves_eighteen_bytes_a_parameter_to_the_host() -> None:
    assert zero_state(7e9, 4, 2, offload_optimizer=True).host_bytes == 18 * 7e9 / 4
    both = zero_state(7e9, 4, 3, offload_optimizer=True, offload_param=True)
    assert both.host_bytes == 20 * 7e9 / 4
    assert both.weights_bytes == both.optimizer_bytes == 0


def test_nvme_takes_the_states_off_the_host_but_for_gradients_and_buffers() -> None:
    # 70B on 8 ranks: 8.75e9 parameters a rank; 16 + 2 bytes each rest on drives. The host holds the 16-bit gradients
    # (17.5 GB), four fp32 buffers of a 1e9 sub-group (16 GB), five of 1e8 parameters (1 GB) and max_in_cpu 1e9 (2 GB)
    state = zero_state(
        70e9, 8, 3, offload_optimizer=True, offload_param=True, is_optimizer_on_nvme=True, is_param_on_nvme=True
    )
    assert state.drive_bytes == 18 * 8.75e9
    assert state.host_bytes == 17.5e9 + 16e9 + 1e9 + 2e9
    cpu = zero_state(70e9, 8, 3, offload_optimizer=True, offload_param=True)
    assert (cpu.drive_bytes, cpu.host_bytes) == (0.0, 20 * 8.75e9)
    assert state.step_peak_bytes == cpu.step_peak_bytes


def test_small_tensors_stay_gathered_in_stage_3() -> None:
    # 65 norms of 4096 elements in a 7B: 2 bytes each on every rank instead of an eighth of it
    plain, kept = zero_state(7e9, 8, 3), zero_state(7e9, 8, 3, persistent_params=65 * 4096)
    assert kept.weights_bytes - plain.weights_bytes == pytest.approx(2 * 65 * 4096 * 7 / 8)
    assert zero_state(7e9, 8, 2, persistent_params=65 * 4096) == zero_state(7e9, 8, 2)
    assert zero_state(7e9, 1, 3, persistent_params=65 * 4096).weights_bytes == zero_state(7e9, 1, 3).weights_bytes


def test_lora_keeps_states_for_the_adapters_only() -> None:
    full, lora = zero_state(7e9, 1, 2), zero_state(7e9, 1, 2, n_trainable=20e6)
    assert lora.weights_bytes == full.weights_bytes
    assert lora.optimizer_bytes == 12 * 20e6


def test_hpz_adds_a_second_copy_over_the_node() -> None:
    assert zero_state(7e9, 64, 3, hpz_ranks=8).weights_bytes - zero_state(7e9, 64, 3).weights_bytes == 2 * 7e9 / 8


def test_traffic_is_the_code_s_not_the_paper_s() -> None:
    ddp = sent_bytes(1e9, 8, 0).total_bytes
    assert sent_bytes(1e9, 8, 1).total_bytes == pytest.approx(1.5 * ddp)
    assert sent_bytes(1e9, 8, 3).total_bytes == pytest.approx(1.5 * ddp)
    # stage 2 reduces in every micro-step: 2 P g + P
    assert sent_bytes(1e9, 8, 2, n_accumulation=4).total_bytes == pytest.approx(9 / 2 * ddp)
    assert sent_bytes(1e9, 1, 2).total_bytes == 0


def test_zero_plus_plus_quarters_the_stage_3_traffic_between_nodes() -> None:
    # Wang et al. 2023, table 1: 3 M to 0.75 M across nodes with all three: 0.5 + 0 + 0.25
    plain = sent_bytes(1e9, 64, 3)
    every = sent_bytes(1e9, 64, 3, has_quantized_weights=True, has_quantized_gradients=True, hpz_ranks=8)
    across = every.gathered_bytes + every.reduced_bytes
    assert across / plain.total_bytes == pytest.approx(0.25)
    # the backward gather goes on in the node, as int8 too: M / 2 times 7/8
    assert every.group_bytes == pytest.approx(0.5 * 2e9 * 7 / 8)


@given(n=st.integers(2, 512), k=st.integers(2, 16), g=st.integers(1, 32))
def test_hpz_gathers_once_a_step_over_all_ranks_and_never_gathers_less_often(n: int, k: int, g: int) -> None:
    plain = sent_bytes(1e9, n, 3, n_accumulation=g)
    hpz = sent_bytes(1e9, n, 3, n_accumulation=g, hpz_ranks=k)
    assert hpz.gathered_bytes * 2 * g == pytest.approx(plain.gathered_bytes)
    assert hpz.reduced_bytes == plain.reduced_bytes
    assert hpz.group_bytes == pytest.approx((2 * g - 1) * 2e9 * (k - 1) / k)


def test_the_estimator_is_below_the_peak_that_the_code_reaches() -> None:
    estimate = estimator_bytes(7e9, 4, 2)
    assert estimate / 2**30 == pytest.approx(42.4, abs=0.05)  # printed by DeepSpeed 0.19.8 for P = 7e9, N = 4
    assert zero_state(7e9, 4, 2).step_peak_bytes > estimate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"stage": 4}, "use 0"),
        ({"stage": 2, "offload_param": True}, "stage 3 only"),
        ({"stage": 0, "offload_optimizer": True}, "stage 1, 2 or 3"),
        ({"stage": 2, "hpz_ranks": 8}, "stage 3 option"),
    ],
)
def test_what_deepspeed_ignores_or_refuses_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(DomainError, match=says):
        zero_state(7e9, 4, **arguments)
    with pytest.raises(DomainError, match="no estimator for stage 1"):
        estimator_bytes(7e9, 4, 1)
