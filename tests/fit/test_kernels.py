"""Recorded kernels against the law: which figure a kernel counts for, what the law says of it, bad files refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.errors import BadData
from advisor.fit.kernels import KernelStep, Work, figures_of, kind_of, law_figures, read_kernels, works_of
from advisor.fit.records import Cell, cells_of, read_records
from advisor.fit.run import load_data
from advisor.predict.shapes import shapes_of
from advisor.predict.step import step_cost

CATALOG = load_catalog()
RUNS = CATALOG.root / "runs"
FILE = RUNS / "vllm-0.26.0_h200-7.jsonl"
KERNELS = RUNS / "kernels" / "vllm-0.26.0_h200-7.jsonl.gz"
VALUES = {name: c.value for name, c in CATALOG.coefficients("vllm").coefficients.items()}


def cells(tag: str) -> list[Cell]:
    records = [r for r in read_records(FILE) if r.run_id.endswith(f"__{tag}")]
    return cells_of(records[:1], CATALOG, "h")


def steps(tag: str) -> dict[tuple[str, int], KernelStep]:
    return {(step.what, step.n): step for step in read_kernels(KERNELS, cells(tag))}


def decode(n: int, context: float) -> tuple[Work, ...]:
    return (Work(0.0, 0.0, n, n * context, n),)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<...", "attention"),
        ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_TNT", "matrices"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float", "matrices"),
        ("void cutlass::device_kernel<vllm::cutlass_3x_gemm_sm90_fp8<...", "matrices"),
        ("fused_moe_kernel", "experts"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", "all-reduce"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "all-reduce"),
        ("triton_red_fused__to_copy_abs_clamp_cutlass_scaled_mm_div_0", "elementwise"),
        ("void vllm::reshape_and_cache_flash_kernel<...", "elementwise"),
    ],
)
def test_a_kernel_counts_for_what_it_does(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


LINE: dict[str, Any] = {
    "run_id": "r",
    "what": "decode",
    "n": 4,
    "n_context_tokens": 100,
    "layer": [["FlashAttnFwdSm90", 10.0], ["nvjet_a", 40.0], ["triton_norm", 5.0], ["nvjet_b", 20.0]],
    "layer_us": 80.0,
    "between": [["FlashAttnFwdSm90", 10.0], ["nvjet_a", 40.0], ["nvjet_b", 20.0], ["nvjet_head", 250.0], ["s", 9.0]],
    "between_us": 430.0,
    "idle_us": 5.0,
}


def test_oracle_figures_by_hand() -> None:
    (cell,) = cells("8b-p")
    found = figures_of(LINE, cell)
    assert found == pytest.approx(
        {"attention": 320e-6, "matrices": 32 * 60e-6, "head": 250e-6, "rest": 430e-6 - 80e-6 - 250e-6}
    )
    assert "rest" not in figures_of(LINE | {"idle_us": 500.0}, cell)
    assert "elementwise" not in figures_of(LINE | {"what": "prompt", "n": 512}, cell)
    assert figures_of(LINE | {"what": "prompt", "n": 4096}, cell)["elementwise"] == pytest.approx(32 * 5e-6)


def a_step(n_tokens: int, n_sequences: int, n_new: int, us: float = 40.0, **more: Any) -> dict[str, Any]:
    layer = [["FlashAttnFwdSm90", 10.0], ["nvjet_a", us], ["triton_norm", 5.0]]
    return {"n_tokens": n_tokens, "n_sequences": n_sequences, "n_new": n_new, "layer": layer} | more


BURST = {"run_id": "r", "what": "burst", "n": 5, "n_tokens": 1000}
BURST["steps"] = [a_step(1000, 1, 1), a_step(2500, 3, 3), a_step(1500, 2, 1, us=20.0)]


def test_oracle_prompts_of_a_burst_follow_one_another() -> None:
    first, second, third = works_of(BURST)
    whole = 1000 * 1001 / 2
    assert (first.n_pairs, second.n_pairs) == (whole, 2 * whole + 500 * 501 / 2)
    assert first.n_pairs + second.n_pairs + third.n_pairs == 5 * whole
    assert [w.is_counted for w in (first, second, third)] == [False, True, True]
    assert [w.n_sampled for w in (first, second, third)] == [1, 3, 2]
    assert works_of(BURST | {"steps": [a_step(5000, 5, 5)]})[0].is_counted
    (cell,) = cells("8b-p")
    found = figures_of(BURST, cell)
    assert found == pytest.approx({"attention": 640e-6, "matrices": 32 * 60e-6, "elementwise": 320e-6})


def test_oracle_a_prompt_among_decodes_is_a_step_of_both() -> None:
    among = [a_step(8, 8, 0), a_step(520, 9, 1), a_step(8, 8, 0)]
    line = {"run_id": "r", "what": "mixed", "n": 8, "n_tokens": 512, "n_context_tokens": 100, "steps": among}
    before, both, _ = works_of(line)
    assert both == Work(512, 512 * 513 / 2, 8, 800.0, 9, True)
    assert not before.is_counted
    assert before.n_prefill == 0
    (cell,) = cells("8b-p")
    assert figures_of(line, cell) == pytest.approx({"attention": 320e-6, "matrices": 32 * 40e-6})


def test_oracle_who_waits_for_its_peer_is_not_an_all_reduce() -> None:
    (cell,) = cells("qwen2.5-72b-tp4")
    reduces = [["ncclDevKernel_AllReduce", 180.0], ["ncclDevKernel_AllReduce", 900.0]]
    line = LINE | {"layer": LINE["layer"] + reduces}
    assert figures_of(line, cell)["all-reduce"] == pytest.approx(80 * 2 * 180e-6)
    assert "all-reduce" not in figures_of(line | {"what": "prompt", "n": 512}, cell)
    assert figures_of(line | {"what": "prompt", "n": 8000}, cell)["all-reduce"] == pytest.approx(80 * 360e-6)


def test_invariant_the_power_limit_stretches_what_is_computed_and_only_that() -> None:
    (cell,) = cells("codellama-34b")
    cost = step_cost(shapes_of(cell.model), cell.gpu, cell.deployment, VALUES)
    work = Work(8192, 8 * 1024 * 1025 / 2, 0.0, 0.0, 8)
    alone, late = (law_figures(cost, VALUES, [replace(work, is_counted=False)] * k + [work]) for k in (0, 4))
    slower = {name for name in alone if late[name] > alone[name] * (1 + 1e-9)}
    assert slower == {"matrices", "attention"}
    free = replace(cost, dynamic_power_w=1e9)
    unlimited = law_figures(free, VALUES, [work])
    assert law_figures(free, VALUES, [replace(work, is_counted=False)] * 4 + [work]) == unlimited
    assert {name for name in alone if alone[name] > unlimited[name] * (1 + 1e-9)} == slower, "half a second is too long"


def test_edge_the_first_of_several_stages_has_its_layers_and_no_head() -> None:
    (cell,) = cells("8b-p")
    staged = replace(cell, deployment=cell.deployment.model_copy(update={"pp": 2}))
    assert figures_of(LINE, staged) == pytest.approx({"attention": 160e-6, "matrices": 16 * 60e-6})


def test_oracle_the_law_of_a_decode_by_hand() -> None:
    (cell,) = cells("8b-p")
    cost = step_cost(shapes_of(cell.model), cell.gpu, cell.deployment, VALUES)
    found = law_figures(cost, VALUES, decode(1, 150.0))
    stream = 4.8e12 * VALUES["stream_eff_bf16"]
    n_bytes = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert found["matrices"] == pytest.approx(32 * (n_bytes / stream + 4 * VALUES["gemm_s"]), rel=0.01)
    assert found["head"] == pytest.approx(2 * 4096 * 128256 / stream + VALUES["gemm_s"], rel=0.01)
    reads = 150 * 2 * 8 * 128 * 2 / (4.8e12 * VALUES["kv_eff"])
    each = reads + VALUES["decode_wave_s"] * 8 / 132 + VALUES["attention_s"]
    assert found["attention"] == pytest.approx(32 * each, rel=0.01)
    assert found["rest"] == VALUES["step_s"] + VALUES["seq_s"]


def test_published_kernels_of_decodes_are_met() -> None:
    # torch's profiler on an H200, not this project's law: matrices of one token, within what kernel choice changes
    for tag in ("8b-p", "qwen2.5-14b-p", "internlm2.5-20b", "mistral-small-24b-p", "codellama-34b", "3b-p"):
        step = steps(tag)["decode", 1]
        predicted = step.predicted(VALUES)
        for name in ("matrices", "head"):
            assert predicted[name] == pytest.approx(step.figures[name], rel=0.08), (tag, name)


def test_invariant_more_sequences_never_take_less() -> None:
    for tag in ("8b-p", "8b-fp8-p", "14b-awq-p", "30b-a3b-tp2-p", "qwen2.5-72b-tp4"):
        (cell,) = cells(tag)
        cost = step_cost(shapes_of(cell.model), cell.gpu, cell.deployment, VALUES)
        small, large = (law_figures(cost, VALUES, decode(n, 200.0)) for n in (8, 64))
        assert all(large[name] >= small[name] for name in small), tag


def test_edge_a_step_moves_only_with_what_it_is_made_of() -> None:
    step = steps("8b-p")["decode", 8]
    before = step.residuals(VALUES)
    assert step.residuals(VALUES | {"host_step_s": 1.0, "http_s": 1.0}) == before
    slower = dict(zip(step.figures, step.residuals(VALUES | {"gemm_s": 2 * VALUES["gemm_s"]}), strict=True))
    moved = {name for name, r, b in zip(step.figures, slower.values(), before, strict=True) if r != b}
    assert moved == {"matrices", "head"}


def test_every_recorded_step_belongs_to_a_start_and_has_figures() -> None:
    data = load_data(RUNS, CATALOG)
    assert len(data.kernels) == 189 + 302 + 225 + 84 + 97
    assert all(step.figures for step in data.kernels)
    run = data.kernels[0].run_id
    mine = data.of(run_id=run)
    n_cells = sum(c.run_id == run for c in data.cells)
    assert len(mine) == n_cells + sum(s.run_id == run for s in data.kernels)
    assert max(mine) >= len(data.cells)
    assert mine < data.of(host=data.kernels[0].cell.host) < data.of()


def test_steps_of_an_unknown_start_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl.gz"
    (cell,) = cells("8b-p")
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(LINE) + "\n" + json.dumps(LINE | {"run_id": cell.run_id}) + "\n")
    assert len(read_kernels(path, [cell])) == 1
    assert read_kernels(path, [replace(cell, record=cell.record.model_copy(update={"run_id": "x"}))]) == []


@pytest.mark.parametrize("text", ["{}", "3", '{"run_id": "r", "what"', '{"run_id": ["r"]}'])
def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(text + "\n")
    with pytest.raises(BadData, match="not a file of condensed kernels"):
        read_kernels(path, cells("8b-p"))
    path.write_text("plain")
    with pytest.raises(BadData, match="not a file of condensed kernels"):
        read_kernels(path, [])
