"""Board power, power limits and the bill: parts, invariants, measured and published watts."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.catalog.files import data_root
from advisor.errors import DomainError
from advisor.predict.bill import HostedPrice, Ownership, Tariff, energy, money, rack_nodes
from advisor.predict.engine_state import Work
from advisor.predict.shapes import shapes_of
from advisor.predict.spend import (
    EXPERT,
    Activity,
    activity_of,
    board_power,
    demand_parts,
    node_power,
    power_limit_curve,
    power_parts,
    prefill_energy_frac,
)
from advisor.predict.step import StepCost, step_cost
from advisor.schema import CoefficientSet, Deployment, Gpu, Interval

CATALOG = load_catalog()
POWER: CoefficientSet = CATALOG.coefficients("power")
H100 = CATALOG.gpu("h100-sxm-80gb")
RATES = st.floats(0, 2e15)


def stage_of(model: str, gpu: Gpu = H100, **plan: Any) -> StepCost:
    found = CATALOG.model(model)[0]
    deployment = Deployment(model=found.name, gpu=gpu.name, **plan)
    return step_cost(shapes_of(found), gpu, deployment, defaultdict(lambda: 1.0), 0)


def decode_work(n_seqs: float, context: float, steps: float = 1000.0) -> Work:
    tokens = n_seqs * steps
    return Work(n_steps=steps, tokens=tokens, context_tokens=tokens * context, sampled=tokens, busy_s=1.0)


def test_activity_of_a_decode_is_weights_and_cache_by_hand() -> None:
    # Llama-3.1-8B, bf16: 8.03e9 parameters less 0.525e9 of the embedding look-up, 131072 bytes of KV a token
    activity = activity_of([stage_of("llama-3.1-8b")], decode_work(1, 500, steps=100), 1.0, "bf16")
    assert activity.bytes_per_s == pytest.approx(100 * (2 * 7.504e9 + 500 * 131_072), rel=2e-3)
    assert activity.cache_bytes_per_s == pytest.approx(100 * 500 * 131_072)
    assert activity.flops_per_s["bf16"] == pytest.approx(100 * 2 * 7.504e9, rel=2e-3)


def test_tensor_parallel_ranks_and_replicas_share_the_work() -> None:
    one = activity_of([stage_of("llama-3.1-70b")], decode_work(8, 100), 1.0, "bf16")
    four = activity_of([stage_of("llama-3.1-70b", tp=4)], decode_work(8, 100), 1.0, "bf16")
    assert four.flops_per_s["bf16"] == pytest.approx(one.flops_per_s["bf16"] / 4, rel=1e-3)
    assert four.link_bytes_per_s > 0 == one.link_bytes_per_s
    two_replicas = activity_of([stage_of("llama-3.1-70b")], decode_work(8, 100), 1.0, "bf16", n_replicas=2)
    assert two_replicas.bytes_per_s == pytest.approx(one.bytes_per_s / 2)


def test_experts_are_streamed_only_as_far_as_they_are_touched() -> None:
    # Mixtral, one token: 2 of 8 experts; 64 tokens: all of them
    one = activity_of([stage_of("mixtral-8x7b")], decode_work(1, 1, steps=1), 1.0, "bf16")
    many = activity_of([stage_of("mixtral-8x7b")], decode_work(64, 1, steps=1), 1.0, "bf16")
    assert one.bytes_per_s == pytest.approx(2 * 12.9e9, rel=0.03)
    assert many.bytes_per_s == pytest.approx(2 * 46.7e9, rel=0.03)


def test_experts_that_steps_read_are_counted_and_not_those_of_a_mean_step() -> None:
    # one prompt of 1,000 tokens reads all experts of Mixtral, 99 decodes of one sequence two of eight each
    stage, total = stage_of("mixtral-8x7b"), 100.0
    counted = stage.expert_reads(total, 1099.0, counted=1.0 + 99 * 2 / 8)
    mean = stage.expert_reads(total, 1099.0)
    assert counted == 25.75
    assert mean > 3 * counted, "the mean step has 11 tokens, which touch 96 % of the experts"
    assert stage_of("llama-3.1-8b").expert_reads(total, 1099.0) == 0.0
    work = Work(n_steps=total, tokens=1099.0, sampled=100.0, busy_s=1.0, expert_reads=25.75)
    fewer = activity_of([stage], work, 1.0, "bf16").bytes_per_s
    more = activity_of([stage], replace(work, expert_reads=0.0), 1.0, "bf16").bytes_per_s
    assert more - fewer == pytest.approx((mean - 25.75) * stage.expert_bytes, rel=1e-9)


def test_an_operation_of_an_expert_costs_its_factor() -> None:
    values = {name: c.value for name, c in POWER.coefficients.items()}
    dense, experts = (demand_parts(Activity({key: 1e14}, 1e12), H100, values) for key in ("bf16", EXPERT + "bf16"))
    assert experts["compute"] == pytest.approx(values["expert_energy_factor"] * dense["compute"], rel=1e-12)
    assert experts["memory"] == dense["memory"]
    # a set of coefficients from before has no such factor: experts cost what others do
    del values["expert_energy_factor"]
    old = demand_parts(Activity({EXPERT + "bf16": 1e14}, 1e12), H100, values)
    assert old["compute"] == dense["compute"]
    assert POWER.coefficients["expert_energy_factor"].low > 1.0
    found = activity_of([stage_of("mixtral-8x7b")], decode_work(4, 100), 1.0, "bf16").flops_per_s
    # 2 of 8 experts of 32 layers, three matrices of 4096 x 14336 each, two operations a weight, 4,000 tokens
    assert found[EXPERT + "bf16"] == pytest.approx(4000 * 2 * 2 * 3 * 4096 * 14336 * 32, rel=1e-12)
    assert EXPERT + "bf16" not in activity_of([stage_of("llama-3.1-8b")], decode_work(4, 100), 1.0, "bf16").flops_per_s


def test_the_lm_head_of_an_fp8_model_computes_in_bf16() -> None:
    activity = activity_of([stage_of("llama-3.1-8b", weight_dtype="fp8")], decode_work(1, 1), 1.0, "fp8")
    assert activity.flops_per_s["bf16"] == pytest.approx(1000 * 2 * 128_256 * 4096, rel=1e-3)
    assert activity.flops_per_s["fp8"] > 10 * activity.flops_per_s["bf16"]


@given(RATES, st.floats(0, 4e12), st.floats(0, 4.5e11), st.integers(1, 8))
def test_parts_sum_to_the_whole_and_the_interval_holds_it(flops: float, moved: float, sent: float, n: int) -> None:
    activity = Activity({"bf16": flops, "attention": flops / 10}, moved, moved / 2, sent)
    interval, parts = board_power(activity, H100, POWER, n)
    assert sum(p.value for p in parts.parts) == pytest.approx(parts.total)
    assert interval.low <= interval.value <= interval.high <= 700 * n + 1e-6
    assert interval.low >= min(interval.value, 73.0 * n) - 1e-9


def test_an_idle_gpu_draws_idle_power() -> None:
    interval, parts = board_power(Activity(), H100, POWER, 4)
    assert interval.value == pytest.approx(4 * H100.idle_power_w)
    assert {p.name: p.value for p in parts.parts}["compute"] == 0.0


def test_a_card_with_work_draws_more_than_idle_also_between_kernels() -> None:
    """Runs 8b-eager, 14b-eager and 3b-eager: a host that is too slow leaves the card waiting at its top clock."""
    nothing, little = (demand_parts(Activity({}, moved), H100, POWER)["awake"] for moved in (0.0, 1.0))
    assert nothing == 0.0
    assert 0.02 < float(little) / (H100.board_power_w - H100.idle_power_w) < 0.15
    assert np.allclose(
        demand_parts(Activity({}, np.array([0.0, 1.0, 1e12])), H100, POWER)["awake"], [0, little, little]
    )


@given(st.floats(0.05, 1), st.floats(0.05, 0.9))
def test_a_gpu_that_rests_half_the_time_draws_half_the_memory_power(busy: float, used: float) -> None:
    full = Activity({}, used * H100.memory_bandwidth_bytes_per_s)
    part = Activity({}, busy * used * H100.memory_bandwidth_bytes_per_s, busy_frac=busy)
    all_w = demand_parts(full, H100, POWER)["memory"]
    assert float(demand_parts(part, H100, POWER)["memory"]) == pytest.approx(busy * float(all_w), rel=1e-6)


def test_busy_time_comes_from_the_gpu_seconds_and_is_full_where_nobody_counted() -> None:
    stage = stage_of("llama-3.1-8b")
    work = decode_work(1, 1, steps=10)
    assert activity_of([stage], work, 1.0, "bf16").busy_frac == 1.0
    work.terms[0] = 0.25
    assert activity_of([stage], work, 1.0, "bf16").busy_frac == pytest.approx(0.25)
    assert activity_of([stage], work, 1.0, "bf16", n_replicas=5).busy_frac == pytest.approx(0.05)
    assert activity_of([stage, stage], work, 0.1, "bf16").busy_frac == 1.0


def test_measured_decode_of_one_client_on_an_h100() -> None:
    # vllm-0.26.0__h100-sxm-80gb__8b-bf16, 1 client, 1024 + 256 tokens: 443 W by the energy meter;
    # 149 steps/s stream 15.0 GB each and read about 1150 tokens of cache
    activity = activity_of([stage_of("llama-3.1-8b")], decode_work(1, 1150, steps=149), 1.0, "bf16")
    assert board_power(activity, H100, POWER)[0].value == pytest.approx(443, rel=0.08)


def test_published_powers_of_cards_that_we_never_ran() -> None:
    rows = json.loads((data_root() / "golden" / "power_public.json").read_text())["rows"]
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        gpu = CATALOG.gpu(row["gpu"])
        activity = Activity(row["flops_per_s"], row["bytes_per_s"], row["cache_bytes_per_s"], row["link_bytes_per_s"])
        watts = float(power_parts(activity, gpu, POWER)["total"])
        mean = watts * (1 - row["idle_share"]) + gpu.idle_power_w * row["idle_share"]
        errors[gpu.name].append(abs(mean / row["watts"] - 1))
    assert set(errors) == {"a100-sxm-40gb", "a100-sxm-80gb", "b200-sxm-180gb", "h100-sxm-80gb"}
    for card, found in errors.items():
        assert np.median(found) < 0.10, card


def test_arrays_give_what_numbers_give() -> None:
    flops, moved = np.array([1e14, 4e14]), np.array([1e12, 2e12])
    together = power_parts(Activity({"bf16": flops}, moved), H100, POWER)["total"]
    apart = [
        float(power_parts(Activity({"bf16": f}, m), H100, POWER)["total"]) for f, m in zip(flops, moved, strict=True)
    ]
    assert np.asarray(together).tolist() == pytest.approx(apart)


def test_every_card_of_the_catalogue_has_a_power() -> None:
    for gpu in CATALOG.gpus():
        half = gpu.peak_flops_per_s.get("bf16") or gpu.peak_flops_per_s["fp16"]
        busy = Activity(
            {"bf16": 0.4 * half, "fp8": 0.1 * half, "int4": 0.1 * half}, 0.5 * gpu.memory_bandwidth_bytes_per_s
        )
        interval, _ = board_power(busy, gpu, POWER)
        assert gpu.idle_power_w < interval.low < interval.high <= gpu.board_power_w


def test_unmeasured_architectures_have_the_widest_interval() -> None:
    def width(name: str) -> float:
        gpu = CATALOG.gpu(name)
        found = board_power(Activity({}, 0.2 * gpu.memory_bandwidth_bytes_per_s), gpu, POWER)[0]
        return (found.value - found.low) / found.value

    assert width("h100-sxm-80gb") < width("b200-sxm-180gb") < width("l40s") + 1e-9


@pytest.mark.parametrize("limit", [0.0, 73.0, 701.0, -5.0])
def test_a_limit_that_the_board_cannot_have_is_refused(limit: float) -> None:
    with pytest.raises(DomainError, match="power limit"):
        board_power(Activity(), H100, POWER, limit_w=limit)


BUSY = Activity({"bf16": 0.55 * 989.4e12, "attention": 5e12}, 0.8e12, 0.2e12)


def test_a_lower_limit_is_slower_and_at_first_saves_energy() -> None:
    curve = power_limit_curve(BUSY, H100, POWER, compute_frac=0.8)
    assert np.all(np.diff(curve.speed_frac) >= -1e-9)
    assert np.all(curve.power_w <= curve.limit_w + 1e-6)
    assert curve.speed_frac[-1] == curve.energy_frac[-1] == 1.0
    assert curve.energy_frac.min() < 0.97
    assert curve.best_limit_w < 700


def test_a_floor_on_speed_moves_the_best_limit_up() -> None:
    free = power_limit_curve(BUSY, H100, POWER, compute_frac=0.8)
    held = power_limit_curve(BUSY, H100, POWER, compute_frac=0.8, slowest_speed_frac=0.95)
    assert held.best_limit_w >= free.best_limit_w
    at = int(np.flatnonzero(held.limit_w == held.best_limit_w)[0])
    assert held.speed_frac[at] >= 0.95 - 1e-9


def test_power_beside_the_board_makes_deep_limits_pay_less() -> None:
    alone = power_limit_curve(BUSY, H100, POWER, compute_frac=0.8)
    in_node = power_limit_curve(BUSY, H100, POWER, compute_frac=0.8, other_w=360.0)
    assert in_node.energy_frac[0] > alone.energy_frac[0]
    assert in_node.best_limit_w >= alone.best_limit_w


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_outside_0_and_1_are_refused(share: float) -> None:
    with pytest.raises(DomainError, match="between 0 and 1"):
        power_limit_curve(BUSY, H100, POWER, compute_frac=share)


def test_prompts_cause_all_of_a_prefill_and_nothing_of_a_decode() -> None:
    stage = stage_of("llama-3.1-8b")
    decode = decode_work(4, 100)
    parts = board_power(activity_of([stage], decode, 1.0, "bf16"), H100, POWER)[1]
    assert prefill_energy_frac([stage], decode, 0.0, parts) == 0.0
    prefill = Work(n_steps=10, prefill_steps=10, tokens=40_960, pairs=10 * 4096**2 / 2, sampled=10, busy_s=1.0)
    parts = board_power(activity_of([stage], prefill, 1.0, "bf16"), H100, POWER)[1]
    assert prefill_energy_frac([stage], prefill, 40_960, parts) > 0.99


def interval(value: float, width: float = 0.1) -> Interval:
    return Interval(value=value, low=value * (1 - width), high=value * (1 + width))


def bill(**options: Any) -> dict[str, Interval]:
    rates = {"requests_per_s": interval(10.0), "output_tokens_per_s": interval(2000.0)}
    return money(rates, 36.0, input_tokens_per_s=8000.0, **options)


def test_energy_of_a_served_load_by_hand() -> None:
    tariff = Tariff(usd_per_kwh=0.2, kgco2e_per_kwh=0.4, pue=1.25)
    got = energy(
        interval(4000.0),
        n_gpus=8,
        requests_per_s=10.0,
        output_tokens_per_s=2000.0,
        coefficients=POWER,
        tariff=tariff,
        prefill_frac=0.25,
    )
    assert got["energy_j_per_output_token"].value == pytest.approx(2.0)
    assert got["energy_j_per_request"].value == pytest.approx(400.0)
    assert got["energy_wh_per_1000_requests"].value == pytest.approx(111.111, rel=1e-4)
    assert got["electricity_usd_per_h"].value == pytest.approx(1.0)
    assert got["kgco2e_per_1000_requests"].value == pytest.approx(0.111111 * 1.25 * 0.4, rel=1e-4)
    assert got["kgco2e_per_month"].value == pytest.approx(4 * 1.25 * 730 * 0.4)
    assert got["prefill_energy_j_per_request"].value == pytest.approx(100.0)
    assert got["decode_energy_j_per_output_token"].value == pytest.approx(1.5)
    assert all(i.low <= i.value <= i.high for i in got.values())


def test_whole_nodes_draw_what_boards_draw_and_more() -> None:
    node = node_power(interval(5600.0, 0.0), 8, POWER)
    assert node.value == pytest.approx(8480.0)
    assert node.low < node.value < node.high == pytest.approx(10_200.0)


def test_money_at_the_served_load_by_hand() -> None:
    got = bill(prefill_frac=0.5)
    assert got["usd_per_month"].value == pytest.approx(26_280.0)
    assert got["usd_per_1000_requests"].value == pytest.approx(1.0)
    assert got["usd_per_million_tokens"].value == pytest.approx(1.0)
    assert got["usd_per_million_input_tokens"].value == pytest.approx(0.625)
    assert got["usd_per_million_output_tokens"].value == pytest.approx(2.5)
    assert got["usd_per_1000_requests"].low == pytest.approx(1 / 1.1)
    assert got["usd_per_1000_requests"].high == pytest.approx(1 / 0.9)


def test_half_the_load_costs_twice_as_much_a_token() -> None:
    full, half = bill(), bill(utilization_frac=0.5)
    for name in ("usd_per_1000_requests", "usd_per_million_tokens", "usd_per_million_output_tokens"):
        assert half[name].value == pytest.approx(2 * full[name].value)
    assert half["usd_per_month"].value == full["usd_per_month"].value


def test_break_even_costs_the_same_on_both_sides() -> None:
    got = bill(hosted=HostedPrice(usd_per_million_in=0.6, usd_per_million_out=3.0))
    share = got["break_even_load_frac"].value
    assert share * got["hosted_usd_per_month"].value == pytest.approx(got["usd_per_month"].value)
    assert got["break_even_requests_per_s"].value == pytest.approx(10 * share)


def test_own_hardware_pays_back_against_rent() -> None:
    own = Ownership(capex_usd=262_800.0, years=3.0, running_usd_per_h=2.0)
    got = bill(own=own, electricity=interval(1.0))
    assert got["usd_per_h"].value == pytest.approx(13.0)
    assert got["pay_back_years"].value == pytest.approx(262_800 / 8760 / 33)
    with_no_rent = money(
        {"requests_per_s": interval(10.0), "output_tokens_per_s": interval(2000.0)},
        0.0,
        input_tokens_per_s=1.0,
        own=own,
    )
    assert "pay_back_years" not in with_no_rent


def test_what_makes_no_sense_is_refused_in_one_sentence() -> None:
    with pytest.raises(DomainError, match="PUE"):
        Tariff(pue=0.9)
    with pytest.raises(DomainError, match="years"):
        Ownership(capex_usd=1.0, years=0.0)
    with pytest.raises(DomainError, match="costs nothing"):
        HostedPrice(0.0, 0.0)
    with pytest.raises(DomainError, match="utilization_frac"):
        bill(utilization_frac=0.0)
    with pytest.raises(DomainError, match="idle deployment"):
        energy(interval(1.0), n_gpus=1, requests_per_s=0.0, output_tokens_per_s=1.0, coefficients=POWER)
    with pytest.raises(DomainError, match="power budget"):
        rack_nodes(0.0, H100, POWER, gpus_per_node=8)


@pytest.mark.parametrize(("kw", "nodes"), [(10.0, 0), (10.2, 1), (40.0, 3)])
def test_a_rack_reserves_the_rated_power_of_each_node(kw: float, nodes: int) -> None:
    assert rack_nodes(kw * 1e3, H100, POWER, gpus_per_node=8) == nodes
    assert rack_nodes(kw * 1.5e3, H100, POWER, gpus_per_node=8, pue=1.5) == nodes
