"""Charts hold the numbers that they were given; what was drawn before is not drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.fit.run import cell_table
from advisor.fit.validate import Row, table
from advisor.schema import Breakdown, Interval, Part, Request, Slo, Target
from advisor.schema.power import LimitRow
from advisor.schema.training import TrainJob
from advisor.ui import accuracy, call, charts, charts_plans, charts_trust, memory
from advisor.ui.pages.compare import config_diff
from advisor.ui.pages.trust import KEPT, OWN, PUBLISHED, origin
from advisor.ui.text import sentence

SLO = Slo(targets=(Target(metric="tpot", statistic="p99", max_s=0.05),))


def points(figure: Any) -> list[tuple[float, float]]:
    """Coordinates of all marks that are data, the legend's own left out."""
    return [(x, y) for t in figure.data if t.x[0] is not None for x, y in zip(t.x, t.y, strict=True)]


def test_the_cloud_holds_every_plan_and_its_interval(a_plan: Callable[..., Any]) -> None:
    plans = [a_plan(1, "vllm", tpot_s=0.03, usd=3.0), a_plan(2, "deepspeed-autotp", tpot_s=0.09, usd=11.0)]
    figure = charts_plans.pareto(plans, "usd_per_million_output_tokens", "tpot_p99_s", SLO, charts_plans.ENERGY)
    assert points(figure) == [(3.0, 0.03), (11.0, 0.09)]
    first = figure.data[0]
    assert first.error_y.array[0] == pytest.approx(0.003)
    assert first.marker.color[0] == pytest.approx(math.log10(1.99))
    assert figure.layout.shapes[0].y0 == 0.05  # the target's line
    assert {t.name for t in figure.data if t.x[0] is None} == {"vLLM", "DeepSpeed AutoTP"}


def test_a_plan_without_the_third_quantity_is_grey_not_missing(a_plan: Callable[..., Any]) -> None:
    plan = a_plan(1, "vllm", tpot_s=0.03, usd=3.0)
    known = {k: v for k, v in plan.prediction.quantities.items() if k != charts_plans.ENERGY}
    bare = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"quantities": known})})
    figure = charts_plans.pareto([plan, bare], "usd_per_h", "tpot_p99_s", Slo(), charts_plans.ENERGY)
    assert len(points(figure)) == 2
    assert [t.marker.color for t in figure.data if t.marker.color == charts.GREY]


def test_the_pipeline_is_drawn_pass_by_pass_and_its_bubbles_are_the_laws() -> None:
    catalog = load_catalog()
    model, cluster = catalog.model("llama-3.1-8b")[0], catalog.clusters("8xH100").clusters[0]
    job = TrainJob(model=model.name, zero_stage=1, pp=4, dp=2, gradient_accumulation_steps=8, is_checkpointed=True)
    passes = call.pipeline(model, cluster, job)
    rows = [(f"stage {p.stage}", "forward" if p.is_forward else "backward", p.begin_s, p.end_s) for p in passes]
    drawn = charts_plans.slots(rows)
    computed = [t for t in drawn.data if t.name != "bubble"]
    assert sum(len(t.x) for t in computed) == 2 * 4 * 8
    step = call.train(model, cluster, job)[0]
    compute = next(b for b in step.breakdowns if b.unit == "s").parts[:2]
    end = max(base + width for t in computed for base, width in zip(t.base, t.x, strict=True))
    assert end == pytest.approx(sum(p.value for p in compute), rel=0.05)
    waits = charts_plans.bubbles(rows)
    busy = sum(end - begin for _, _, begin, end in rows)
    idle = sum(end - begin for _, _, begin, end in waits)
    assert busy + idle == pytest.approx(4 * end)
    # the law counts the bubble of the busiest stage, the one that no other stage can make up for
    assert 1 - charts_plans.busiest_frac(rows) == pytest.approx(step["bubble_frac"], rel=1e-6)
    # a balanced 1F1B schedule waits p - 1 of m + p - 1 slots (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1):
    # stages without the LM head wait longer, the one with it shorter
    assert 1 - charts_plans.busiest_frac(rows) < 3 / 11 < idle / (4 * end)


def test_bubbles_of_a_schedule_drawn_by_hand() -> None:
    rows = [("stage 0", "forward", 0.0, 1.0), ("stage 1", "forward", 1.0, 2.0), ("stage 1", "backward", 2.0, 4.0)]
    rows.append(("stage 0", "backward", 4.0, 6.0))
    assert charts_plans.bubbles(rows) == [
        ("stage 0", "bubble", 1.0, 4.0),
        ("stage 1", "bubble", 0.0, 1.0),
        ("stage 1", "bubble", 4.0, 6.0),
    ]
    assert charts_plans.bubbles([]) == []


def test_the_grid_says_where_it_was_clicked_and_frames_the_cell() -> None:
    figure = charts_trust.heat_map(["a", "b"], ["TTFT P50", "KV blocks"], [[0.1, None], [0.2, 0.3]], chosen=(1, 0))
    cells = [
        (i, j, z) for grid in figure.select_traces("heatmap") for i, row in enumerate(grid.z) for j, z in enumerate(row)
    ]
    assert sorted(cell for cell in cells if cell[2] is not None) == [(0, 0, 0.1), (1, 0, 0.2), (1, 1, 0.3)]
    assert [tuple(c) for c in figure.data[-1].customdata] == [(0, 0), (1, 0), (1, 1)]
    frame = figure.layout.shapes[0]
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (-0.5, 0.5, 0.5, 1.5)


def test_the_numbers_of_the_grid_are_legible_on_every_colour_of_its_scale() -> None:
    from plotly.colors import sample_colorscale

    for percent in range(61):
        error = percent / 100
        (shade,) = sample_colorscale("Cividis", [1 - min(error / charts_trust.WORST, 1)], colortype="tuple")
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade]
        ground = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        text = {"#000000": 0.0, "#FFFFFF": 1.0}[charts_trust.text_colour(error)]
        assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) >= 4.5
    figure = charts_trust.heat_map(["a"], ["TTFT P50", "KV blocks", "TPOT P50"], [[0.1, None, 0.3]])
    for grid, n, words in zip(figure.select_traces("heatmap"), (0, 2), ("10.0%", "30.0%"), strict=True):
        assert [(j, t) for j, t in enumerate(grid.text[0]) if t] == [(n, words)]
        assert [j for j, z in enumerate(grid.z[0]) if z is not None] == [n]
        assert grid.textfont.color == charts_trust.text_colour(grid.z[0][n])


def test_names_of_rows_are_shortened_and_cannot_bring_markup() -> None:
    assert charts_trust.short_row("vllm-0.26.0__h100-sxm-80gb__8b-awq") == "8b-awq<br>h100"
    assert charts_trust.short_row("qwen3-32b · h200-sxm-141gb") == "qwen3-32b<br>h200"
    assert "<b>" not in charts_trust.short_row("<b>x</b>__a__<i>y</i>")


def test_left_out_cells_survive_the_report() -> None:
    where = {"model": "m", "gpu": "g", "load": "closed, 1 client", "lengths": "fixed"}
    rows = [
        Row("run", 0, "ttft_s.p50", 0.1, 0.11, "kind=closed", "kind=fixed", where),
        Row("run", 0, "requests_per_s", 4.0, 3.0, "kind=closed", "kind=fixed", where),
        Row("run", 1, "ttft_s.p50", 0.2, 0.1, "kind=poisson", "kind=fixed", where),
    ]
    cells = cell_table(rows)
    assert len(cells) == 2
    assert accuracy.held_out_rows({"cells": cells}) == rows
    assert table(accuracy.held_out_rows({"cells": cells})) == table(rows)
    assert accuracy.held_out_rows({}) == []


def test_the_peers_table_of_the_docs_is_the_data(root: Path) -> None:
    (found,) = accuracy.peers()
    lines = (root / found["method"]).read_text(encoding="utf-8").splitlines()
    for row in found["rows"]:
        cells = [
            f"{e['median']:.1%} / {e['p90']:.1%} / {e['bias']:+.1%} ({e['n']})"
            for e in (row["errors"][m] for m in ("ttft_s.p50", "tpot_s.p50", "requests_per_s"))
        ]
        assert f"| {row['predictor']}, {row['loads']} | " + " | ".join(cells) + " |" in lines
    assert f"| date | {found['date']} |" in lines


def test_every_coefficient_has_one_of_three_origins() -> None:
    for name in call.fitted_names():
        fitted = call.coefficients(name)
        runs = fitted.report.run_ids if fitted.report else ()
        assert {origin(c.source, runs) for c in fitted.coefficients.values()} <= {OWN, PUBLISHED, KEPT}
    vllm = call.coefficients("vllm")
    assert origin(vllm.coefficients["gemm_eff_bf16"].source, ()) == OWN
    assert origin(call.coefficients("power").coefficients["link_j_per_byte"].source, ()) == PUBLISHED


def test_two_plans_differ_flag_by_flag(a_plan: Callable[..., Any]) -> None:
    a, b = a_plan(1, "vllm", tpot_s=0.03, usd=3.0, tp=4), a_plan(2, "vllm", tpot_s=0.02, usd=4.0, tp=8)
    lines = config_diff(a, b).splitlines()
    assert "-  --tensor-parallel-size 4" in lines
    assert "+  --tensor-parallel-size 8" in lines
    assert '- "tp": 4,' in lines
    assert '+ "tp": 8,' in lines
    assert not [line for line in lines if line.startswith("-") and "gpu" in line]
    assert config_diff(a, a) == ""


def test_a_chart_is_drawn_once_for_the_same_numbers() -> None:
    drawn = []

    @memory.remembered
    def draw(values: list[float], colour: str = "red") -> list[float]:
        drawn.append(colour)
        return list(values)

    assert draw([1.0]) is draw([1.0])
    assert draw([1.0]) is not draw([1.5])
    draw([1.0], colour="blue")
    assert drawn == ["red", "red", "blue"]


def test_a_chart_of_hours_does_not_change_the_one_of_seconds() -> None:
    lines = {"x": [1.0, 2.0]}
    before = charts.over_time([0.0, 1.0], lines, "W").to_json()
    charts.over_hours([0, 1], lines, "W")
    assert charts.over_time([0.0, 1.0], lines, "W").to_json() == before


def test_the_last_hour_is_drawn_to_its_end() -> None:
    figure = charts.over_hours([0, 1, 2], {"x": [1.0, 2.0, 3.0]}, "W")
    assert list(figure.data[0].x) == [0.0, 1.0, 2.0, 3.0]
    assert list(figure.data[0].y) == [1.0, 2.0, 3.0, 3.0]
    assert figure.data[0].text[-1] == "hour 2"


def test_two_engines_share_one_colour_for_the_same_part() -> None:
    ours = Breakdown(name="memory", unit="bytes", total=3.0, parts=(Part(name="KV cache", value=3.0),))
    theirs = Breakdown(name="memory", unit="bytes", total=2.0, parts=(Part(name="kv_cache", value=2.0),))
    figure = charts.stacked({"a": ours, "b": theirs})
    assert [(t.name, tuple(t.x)) for t in figure.data] == [("KV cache", (3.0, 2.0))]


def test_an_overload_has_no_place_on_an_axis_of_waiting(a_plan: Callable[..., Any]) -> None:
    plan = a_plan(1, "vllm", tpot_s=0.03, usd=3.0)
    over = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"is_saturated": True})})
    assert charts_plans.value_of(over, "ttft_p99_s") is None
    assert charts_plans.value_of(over, "tpot_p99_s") is not None
    free = over.model_copy(
        update={"usd_per_h": 0.0, "prediction": over.prediction.model_copy(update={"quantities": {}})}
    )
    assert charts_plans.value_of(free, "usd_per_h") is None  # no price is known: not free


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ttft_p99: met at 1 s", "TTFT P99\\: met at 1 s"),
        ("misses tpot_p99 and e2e_mean_s", "Misses TPOT P99 and E2E mean"),
        ("use tp 2", "Use TP 2"),
        ("http is no dp", "Http is no dp"),
        ("5 s; see --slo, --slo none", "5 s; set others in the side bar"),
        ("no load given; see --rate, --concurrency", "No load given; set another load in the side bar"),
        ("would hold it in fp8: --weight-dtype fp8.", "Would hold it in fp8\\: weight format fp8."),
        ("take longer: --restart says yours", "Take longer"),
        ("an older release: --engine-version 0.18.1", "An older release\\: 0.18.1"),
    ],
)
def test_sentences_write_terms_as_the_labels_do(text: str, shown: str) -> None:
    assert sentence(text) == shown


def test_curves_draw_targets_and_this_load() -> None:
    one = Interval(value=0.02, low=0.01, high=0.03)
    figure = charts.curves([(1.0, {"tpot_p99_s": one})], ("tpot_p99_s",), "offered_requests_per_s", SLO, now=0.5)
    assert {s.y0 for s in figure.layout.shapes} >= {0.05}
    assert {s.x0 for s in figure.layout.shapes} >= {0.5}


def test_offered_rate_is_the_requests_own() -> None:
    assert call.offered_rate(Request(model="8b", gpus="1xH100", rate=3.5)) == 3.5
    assert call.offered_rate(Request(model="8b", gpus="1xH100", concurrency=4)) is None


def test_an_axis_of_nearly_equal_numbers_has_two_ticks() -> None:
    (low, high) = charts.reach(30.0, 45.0)["range"]  # type: ignore[misc]
    assert (10**low, 10**high) == pytest.approx((20.0, 50.0))
    assert sum(low <= math.log10(t) <= high for t in charts.LOG_TICKS) >= 2
    assert charts.reach(3.0, 30.0) == {}
    assert charts.reach(0.0, 1.0) == {}


def test_words_of_lines_stand_in_the_legend_where_no_line_crosses_them(a_plan: Callable[..., Any]) -> None:
    plan = a_plan(1, "vllm", tpot_s=0.03, usd=3.0)
    figure = charts_plans.pareto([plan], "usd_per_million_output_tokens", "tpot_p99_s", SLO)
    load = charts.curves([(1.0, plan.prediction.quantities)], ("tpot_p99_s",), "offered_requests_per_s", SLO, 0.5)
    for drawn, words in ((figure, {"TPOT P99 at most 50.0 ms"}), (load, {"TPOT P99 target 50.0 ms", "this load"})):
        assert not drawn.layout.annotations
        assert {line.name for line in drawn.layout.shapes if line.showlegend} == words
    row = LimitRow(
        limit_w=300,
        clock_frac=0.9,
        speed_frac=0.95,
        board_power_w=250,
        requests_per_s=1.0,
        output_tokens_per_s=200.0,
        energy_j_per_output_token=1.0,
        node_energy_j_per_output_token=2.0,
        latency_s={},
        meets_slo=True,
        is_saturated=False,
    )
    limits = charts_plans.power_limits([row], {"best": 300.0})
    # a line through both parts of a chart, named once
    assert [line.name for line in limits.layout.shapes if line.showlegend] == ["best"]
    assert len(limits.layout.shapes) == 2


def test_a_chart_of_cells_names_no_more_groups_than_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(n_models: int, n_gpus: int) -> set[str]:
        rows = [
            Row("run", i, "ttft_s.p50", 0.1, 0.1, "", "", {"model": f"m{i % n_models}", "gpu": f"g{i % n_gpus}"})
            for i in range(60)
        ]
        drawn: list[Any] = []
        monkeypatch.setattr("advisor.ui.parts.chart", lambda figure, *_: drawn.append(figure))
        accuracy.scatter(rows, "model", "ttft_s.p50", "cells")
        return {trace.name for trace in drawn[0].data} - {"equal"}

    assert names(3, 2) == {"m0", "m1", "m2"}
    assert names(20, 2) == {"g0", "g1"}
    assert names(20, 10) == {"all"}
