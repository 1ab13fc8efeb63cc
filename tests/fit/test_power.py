"""The power fit recovers what made its data, reports left-out starts, and refuses what does not determine it."""

from __future__ import annotations

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.fit.power import (
    PowerCell,
    Replay,
    clock_exponent,
    fit_family,
    fit_power,
    mean_work,
    names_for,
    power_cell,
    published_cell,
)
from advisor.fit.power_set import fit_power_set
from advisor.predict.engine_state import Work
from advisor.predict.spend import Activity, demand_parts, memory_core_frac, power_parts
from advisor.schema import RunRecord

H100 = load_catalog().gpu("h100-sxm-80gb")
H200 = load_catalog().gpu("h200-sxm-141gb")
B200 = load_catalog().gpu("b200-sxm-180gb")
TRUTH = {
    "bf16_j_per_flop": 1.0e-12,
    "fp8_j_per_flop": 0.55e-12,
    "memory_j_per_byte": 140e-12,
    "memory_j_per_byte__h200-sxm-141gb": 115e-12,
    "memory_exponent": 0.7,
    "cache_j_per_byte": 70e-12,
    "cap_sharpness": 10.0,
    "awake_frac": 0.06,
    "link_j_per_byte": 8.8e-11,
}
EXPONENT = 1.8


def cells(noise: float = 0.0, *, n: int = 16, seed: int = 0) -> list[PowerCell]:
    """Cells of five engine starts whose power the truth made."""
    rng = np.random.default_rng(seed)
    out = []
    for run, (gpu, kind) in enumerate([(H100, "bf16"), (H100, "bf16"), (H100, "fp8"), (H200, "bf16"), (H100, "fp8")]):
        for _ in range(n):
            moved = rng.uniform(0.05, 0.8) * gpu.memory_bandwidth_bytes_per_s
            flops = rng.uniform(0.0, 0.45) * 989.4e12
            activity = Activity({kind: flops, "attention": 0.02 * flops}, moved, moved * rng.uniform(0, 0.6))
            watts = float(power_parts(activity, gpu, TRUTH)["total"]) * float(np.exp(noise * rng.standard_normal()))
            out.append(PowerCell(f"run-{run}", gpu, kind, activity, watts, 8.0))
    return out


def test_exact_data_give_the_truth_back() -> None:
    fit = fit_power(cells())
    for name, value in TRUTH.items():
        assert fit.values[name] == pytest.approx(value, rel=0.02), name
    assert fit.median_error() < 0.002
    assert set(fit.left_out) == {"run-0", "run-1", "run-2", "run-4"}


def test_noise_comes_back_as_error_and_inside_the_intervals() -> None:
    fit = fit_power(cells(noise=0.03))
    assert 0.01 < fit.median_error() < 0.03
    assert 0.03 < fit.error_frac() < 0.08
    for name in ("bf16_j_per_flop", "memory_j_per_byte", "fp8_j_per_flop"):
        assert abs(np.log(fit.values[name] / TRUTH[name])) < 4 * fit.deviations[name], name


def test_the_only_start_of_a_kind_has_no_left_out_error() -> None:
    # without run-3 no cell of an H200 is left: nothing would say what its memory draws
    assert "run-3" not in fit_power(cells()).left_out
    assert "memory_j_per_byte__h200-sxm-141gb" in names_for(cells())[0]


def test_too_few_cells_or_starts_are_refused_with_the_numbers_needed() -> None:
    with pytest.raises(DomainError, match="at least 24 cells of 3 starts"):
        fit_power(cells(n=2))
    with pytest.raises(DomainError, match="2 engine starts"):
        fit_power([c for c in cells(n=40) if c.run_id in ("run-0", "run-1")])
    with pytest.raises(DomainError, match="20 are needed"):
        clock_exponent(cells()[:5], TRUTH)


def test_another_architecture_gets_its_own_energies_only() -> None:
    truth = TRUTH | {"bf16_j_per_flop__blackwell": 0.8e-12, "memory_j_per_byte__blackwell": 120e-12}
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(30):
        moved = rng.uniform(0.1, 0.8) * B200.memory_bandwidth_bytes_per_s
        activity = Activity({"bf16": rng.uniform(0.0, 0.3) * 2.25e15}, moved, 0.3 * moved)
        rows.append(
            PowerCell("table", B200, "table", activity, float(power_parts(activity, B200, truth)["total"]), 20.0)
        )
    fit = fit_family(rows, TRUTH, "blackwell", ("bf16_j_per_flop", "memory_j_per_byte"))
    assert fit.values["bf16_j_per_flop__blackwell"] == pytest.approx(0.8e-12, rel=0.01)
    assert fit.values["memory_j_per_byte__blackwell"] == pytest.approx(120e-12, rel=0.01)
    assert fit.error_frac() < 0.01


def test_the_clock_exponent_comes_back_from_throttled_cells() -> None:
    rng = np.random.default_rng(2)
    found = []
    for cell in cells(n=10):
        if cell.gpu is not H100:
            continue
        phi = float(rng.uniform(0.72, 1.0))
        parts = demand_parts(cell.activity, H100, TRUTH)
        core = float(parts["memory"]) * memory_core_frac(TRUTH, H100)
        watts = H100.idle_power_w + float(parts["awake"]) + float(parts["memory"]) - core
        watts += (float(parts["compute"]) + core) * phi ** (EXPONENT - 1)
        found.append(PowerCell(cell.run_id, H100, cell.kind, cell.activity, watts, 8.0, clock_frac=phi))
    value, deviation = clock_exponent(found, TRUTH)
    assert value == pytest.approx(EXPONENT, abs=0.02)
    assert deviation < 0.2


def test_the_set_holds_every_interval_and_says_where_numbers_come_from() -> None:
    with_clock = [
        PowerCell(c.run_id, c.gpu, c.kind, c.activity, c.watts, 8.0, clock_frac=0.95 if i % 2 else 0.8)
        for i, c in enumerate(cells(noise=0.03))
    ]
    found = fit_power_set(with_clock, [], ["a table"])
    assert found.report is not None
    assert found.report.n_cells == 80
    assert found.report.condition_number > 1
    for name, c in found.coefficients.items():
        assert c.bounds[0] <= c.low <= c.value <= c.high, name
        assert c.source, name
    assert {"error_frac", "error_frac__hopper", "clock_exponent", "node_other_w_per_gpu"} <= set(found.coefficients)


def record(**measured: object) -> RunRecord:
    base = {
        "schema": 1,
        "run_id": "r",
        "engine": "vllm",
        "engine_version": "0.26.0",
        "gpu": H100.name,
        "n_gpus": 2,
        "idle_power_w": 150.0,
        "model": "llama-3.1-8b",
        "hf_config": {},
        "tp": 2,
        "load": {"kind": "closed", "concurrency": 1},
        "measured": {
            "duration_s": 4.0,
            "input_tokens_per_s": 200.0,
            "output_tokens_per_s": 50.0,
            "board_power_w": {"mean": 900.0, "n_gpus": 2},
            "energy_j": 3200.0,
        }
        | measured,
    }
    return RunRecord.model_validate(base)


def replay() -> Replay:
    work = Work(n_steps=100.0, tokens=2000.0, busy_s=3.0)
    return Replay([], work, duration_s=5.0, n_tokens=2000.0)


def test_power_is_the_meter_of_energy_per_gpu_and_idle_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(stages: object, work: Work, duration_s: float, dtype: str, *, n_replicas: int) -> Activity:
        seen.update(work=work, duration_s=duration_s)
        return Activity({"bf16": 1e14})

    monkeypatch.setattr("advisor.fit.power.activity_of", spy)
    cell = power_cell(record(), H100, replay())
    assert cell is not None
    assert cell.watts == pytest.approx(3200 / 4 / 2)
    assert cell.gpu.idle_power_w == 75.0
    # 1000 tokens were measured, 2000 replayed: the work is halved, and set against the measured time
    assert seen["work"].n_steps == pytest.approx(50.0)
    assert seen["duration_s"] == 4.0


def test_a_meter_that_averages_over_a_second_needs_longer_cells() -> None:
    assert power_cell(record(duration_s=1.5), H100, replay()) is None
    assert power_cell(record(board_power_w=None), H100, replay()) is None


def test_published_rows_and_means_of_replays() -> None:
    row = {"gpu": H100.name, "row": "x", "watts": 444.0, "idle_share": 0.1, "flops_per_s": {"bf16": 1e13}}
    row |= {"bytes_per_s": 2e12, "cache_bytes_per_s": 1e11, "link_bytes_per_s": 0.0, "source": "some/repo @abc (MIT)"}
    cell = published_cell(row, H100)
    assert (cell.run_id, cell.watts, cell.idle_share) == ("some/repo", 444.0, 0.1)
    mean = mean_work([Work(n_steps=1.0, tokens=4.0), Work(n_steps=3.0, tokens=8.0)])
    assert (mean.n_steps, mean.tokens) == (2.0, 6.0)


def test_the_delivered_set_meets_its_target_on_left_out_starts() -> None:
    report = load_catalog().coefficients("power").report
    assert report is not None
    assert len(report.run_ids) >= 15
    assert report.median_abs_error["board_power_w"] <= 0.04
