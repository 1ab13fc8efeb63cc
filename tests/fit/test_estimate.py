"""The fit finds coefficients again that made its data, stays within bounds, and refuses data that cannot tell."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.errors import BadData, DomainError
from advisor.fit.estimate import (
    MOST_ELASTIC,
    Estimate,
    as_coefficients,
    depends,
    estimate,
    fitted_names,
    of_typical_host,
    tellers,
)
from advisor.fit.objective import exact_traffic, measured, predicted, read_rows, run_cell, targets, values_for
from advisor.fit.parameters import PARAMETERS
from advisor.fit.records import Cell, cells_of, read_records
from advisor.fit.run import load_data, read_manifest
from advisor.schema.run_record import Measured, Percentiles, RunRecord

CATALOG = load_catalog()
RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
START = {p.name: p.start for p in PARAMETERS}


def measured_cells(n: int = 14) -> list[Cell]:
    """Closed-loop cells of the first start of our first file."""
    records = [r for r in read_records(RUNS / "vllm-0.26.0_h100.jsonl") if (r.load or {}).get("kind") == "closed"]
    first = records[0].run_id
    return cells_of([r for r in records if r.run_id == first][:n], CATALOG, "a-host")


def as_if_true(cells: list[Cell], theta: dict[str, float]) -> list[Cell]:
    """The cells with what the law itself gives for `theta` in place of their measurements."""
    made = []
    for cell in cells:
        found = predicted(run_cell(cell, values_for(cell, theta, {})))

        def stats(name: str, found: dict[str, float] = found) -> Percentiles | None:
            if f"{name}.p50" not in found:
                return None
            values = {s: found[f"{name}.{s}"] for s in ("mean", "p50", "p90", "p99")}
            return Percentiles(**values, p95=values["p90"])

        m = Measured(
            n_requests=100, requests_per_s=found["requests_per_s"], ttft_s=stats("ttft_s"), tpot_s=stats("tpot_s")
        )
        made.append(replace(cell, record=cell.record.model_copy(update={"measured": m})))
    return made


def test_a_fit_finds_the_coefficients_that_made_its_data() -> None:
    truth = START | {"stream_eff_bf16": START["stream_eff_bf16"] * 0.9, "gemm_eff_bf16": START["gemm_eff_bf16"] * 0.92}
    # of one model, streaming its weights and a constant a layer look alike: it takes models of two sizes
    records = [r for r in read_records(RUNS / "vllm-0.26.0_h100-2.jsonl") if (r.load or {}).get("kind") == "closed"]
    pair = [r for r in records if r.run_id.endswith(("14b-bf16", "1b-bf16"))]
    cells = as_if_true(cells_of(pair, CATALOG, "a-host"), truth)
    costs: list[float] = []
    fit = estimate(cells, max_steps=8, progress=lambda _, cost: costs.append(cost))
    assert costs[-1] < 0.1 * costs[0]
    for name in ("stream_eff_bf16", "gemm_eff_bf16"):
        assert fit.theta[name] == pytest.approx(truth[name], rel=0.03), name
    widths = np.array([target.width for cell in cells for target in targets(cell)])
    assert np.all(np.abs(fit.jacobian[: len(widths)]) <= MOST_ELASTIC / widths[:, None] + 1e-9)
    by_name = {p.name: p for p in PARAMETERS}
    for name in set(fit.names) & set(by_name):
        assert by_name[name].low <= fit.theta[name] <= by_name[name].high
    for name in set(START) - set(fit.names):
        # but for the typical host's speed, which all host times share
        assert fit.theta[name] == pytest.approx(START[name], rel=0.02), "what nothing determines stays where it was"
    found = as_coefficients(fit, cells, {}, {"tpot_s.p50": 0.05})
    assert set(found.coefficients) >= set(START)
    for name, c in found.coefficients.items():
        assert c.low <= c.value <= c.high, name
        assert c.source
    assert found.report is not None
    assert found.report.n_cells == len(cells)
    assert found.report.condition_number >= 1


def test_recorded_kernels_tell_what_clients_cannot() -> None:
    """Streaming and a constant a layer look alike to the clients of few models; their kernels tell them apart."""
    data = load_data(RUNS, CATALOG)
    runs = [f"vllm-0.26.0__h200-sxm-141gb__{tag}" for tag in ("8b-p", "3b-p")]
    cells = [c for c in data.cells if c.run_id in runs]
    steps = [step for step in data.kernels if step.run_id in runs]
    transfer = CATALOG.coefficients("vllm").transfer
    alone = estimate(cells, transfer=transfer, max_steps=1)
    both = estimate(cells, kernels=steps, transfer=transfer, max_steps=1)
    assert len(both.owners) == len(alone.owners) + sum(len(step.figures) for step in steps)
    assert set(both.owners) == set(range(len(cells) + len(steps)))
    for name in ("gemm_s", "attention_s", "step_s", "stream_eff_bf16"):
        assert both.relative_widths()[name] < 0.7 * alone.relative_widths()[name], name
    without = both.without(set(range(len(cells), len(cells) + len(steps))))
    assert all(value > 0 for value in without.values())


def test_too_few_numbers_are_refused() -> None:
    with pytest.raises(DomainError, match="measure at least"):
        estimate(measured_cells(2))


def test_only_what_cells_can_tell_is_fitted() -> None:
    cells = measured_cells(3)
    names = fitted_names(cells)
    assert "stream_eff_bf16" in names
    assert not {"gemm_eff_fp8", "gemm_eff_int4", "moe_gemm_factor", "link_eff", "send_s", "kv_fp8_factor"} & set(names)
    fp8 = replace(cells[0], deployment=cells[0].deployment.model_copy(update={"weight_dtype": "fp8"}))
    wide = replace(cells[0], deployment=cells[0].deployment.model_copy(update={"tp": 4, "pp": 2}), host="another")
    more = fitted_names([*cells, fp8, wide])
    assert {"gemm_eff_fp8", "link_eff", "send_s", "host@another", "power@another"} <= set(more)
    assert {"host@a-host", "power@a-host"} <= set(names), "every host differs from the typical one"
    assert "http_s" not in more
    served = replace(cells[0], record=cells[0].record.model_copy(update={"client": "http"}))
    assert {"http_s", "http_token_s"} <= set(fitted_names([*cells, served]))


def test_servers_tell_of_servers_and_hosts_where_engines_in_process_tell_of_the_engine() -> None:
    inside = measured_cells(3)
    served = [replace(c, record=c.record.model_copy(update={"client": "http"})) for c in measured_cells(2)]
    cells = [*inside, *served]
    assert tellers("stream_eff_bf16", cells) == [0, 1, 2]
    assert tellers("http_token_s", cells) == [3, 4]
    assert tellers("host@a-host", cells) == tellers("power@a-host", cells) == [0, 1, 2, 3, 4]
    assert tellers("gemm_eff_fp8", cells) == []
    # nobody else tells: somebody's own records of a server alone
    assert tellers("stream_eff_bf16", served) == [0, 1]
    slopes = estimate([*measured_cells(), *served], max_steps=1)
    of_server = np.array([owner >= 14 for owner in slopes.owners])
    column = slopes.jacobian[: len(of_server), slopes.names.index("stream_eff_bf16")]
    assert np.all(column[of_server] == 0)
    assert np.any(column[~of_server] != 0)


def test_cells_that_do_not_depend_on_a_coefficient_replay_the_same_without_it() -> None:
    """`depends` decides which cells a derivative replays: leaving one out wrongly would bend the fit."""
    files = ("vllm-0.26.0_h100-4.jsonl", "vllm-0.26.0_h100-6.jsonl", "vllm-0.26.0_h100-http.jsonl")
    cells = [c for f in files for c in cells_of(read_records(RUNS / f)[:9:4], CATALOG, f)]
    theta = START | {f"{kind}@{f}": 1.0 for f in files for kind in ("host", "power")}
    told = 0
    for cell in cells:
        base = predicted(run_cell(cell, values_for(cell, theta, {})))
        for name in theta:
            if not depends(name, cell):
                moved = predicted(run_cell(cell, values_for(cell, theta | {name: theta[name] * 1.3}, {})))
                assert moved == base, (name, cell.run_id)
                told += 1
    assert told > 50


def test_targets_are_the_measured_numbers_and_few_requests_count_less() -> None:
    cell = measured_cells(3)[0]
    many = replace(
        cell,
        record=cell.record.model_copy(update={"measured": cell.record.measured.model_copy(update={"n_requests": 500})}),
    )
    few = replace(
        cell,
        record=cell.record.model_copy(update={"measured": cell.record.measured.model_copy(update={"n_requests": 2})}),
    )
    assert {t.metric: t.value for t in targets(many)}.items() <= measured(cell).items()
    for a, b in zip(targets(many), targets(few), strict=True):
        assert a.width <= b.width
    assert all(t.value > 0 for t in targets(many))


def test_interval_widths_are_those_of_linear_least_squares() -> None:
    """y = X b with unit noise: the half-width of a 90 % interval is 1.645 sigma sqrt(diag((X'X)^-1))."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2)) * [1.0, 10.0]
    fit = Estimate({"a": 1.0, "b": 1.0}, ("a", "b"), x, rng.normal(size=4000))
    widths = fit.relative_widths()
    assert widths["a"] == pytest.approx(1.645 / math.sqrt(4000), rel=0.06)
    assert widths["b"] == pytest.approx(0.1 * widths["a"], rel=0.06)
    assert fit.condition_number == pytest.approx(1.0, abs=0.1)  # columns scaled to length one
    twins = Estimate({}, ("a", "b"), np.column_stack([x[:, 0], x[:, 0] * 2 + 1e-6 * x[:, 1]]), np.ones(4000))
    assert twins.condition_number > 1e4


def test_rows_give_a_cell_the_requests_that_were_sent() -> None:
    rows = read_rows(next((RUNS / "rows").glob("vllm-*.gz")))
    assert rows
    records = [r for r in read_records(RUNS / "vllm-0.26.0_h100-2.jsonl") if (r.load or {}).get("kind") == "poisson"]
    for cell in cells_of(records[:3], CATALOG):
        exact = exact_traffic(cell, rows)
        assert len(exact.traffics) == 1
        (traffic,) = exact.traffics
        assert traffic.arrival_s is not None
        assert len(traffic.prompt_tokens) == cell.record.measured.n_requests
        assert (np.diff(traffic.arrival_s) >= 0).all()
    closed = measured_cells(1)[0]
    assert exact_traffic(closed, rows) is closed


@pytest.mark.parametrize(
    "content", [b"", b"not gzip", gzip.compress(b"{}", mtime=0), gzip.compress(b"[1, 2]", mtime=0)[:-6]]
)
def test_a_broken_rows_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(content)
    if content == b"":
        assert read_rows(file) == {}  # an empty archive holds no rows
    else:
        with pytest.raises(BadData, match="request rows"):
            read_rows(file)


def test_what_hosts_have_in_common_belongs_to_the_coefficients() -> None:
    """Predictions on each host stay as they were; the factors' geometric mean, variants left out, becomes 1."""
    cells = cells_of(read_records(RUNS / "vllm-0.26.0_h100.jsonl")[:1], CATALOG, "a")
    theta = START | {
        "host@a": 1.2,
        "host@b": 1.8,
        "host@b+busy": 3.0,
        "power@a": 0.9,
        "power@b": 1.3,
        "power@b+busy": 1.0,
    }
    found = of_typical_host(theta)
    assert found["host@a"] * found["host@b"] == pytest.approx(1.0)
    assert found["power@a"] * found["power@b"] == pytest.approx(1.0)
    for host in ("a", "b", "b+busy"):
        cell = replace(cells[0], host=host)
        before, after = values_for(cell, theta, {}), values_for(cell, found, {})
        assert after == pytest.approx(before), host
    assert of_typical_host(START) == START


def test_cells_that_the_manifest_leaves_out_are_not_fitted() -> None:
    manifest = read_manifest(RUNS / "manifest.toml")
    out = {cell for entry in manifest.values() if isinstance(entry, dict) for cell in entry.get("left_out", {})}
    assert out

    def name(record: RunRecord) -> str:
        return f"{record.run_id.rpartition('__')[2]}/{(record.model_extra or {}).get('cell_id')}"

    assert not out & {name(c.record) for c in load_data(RUNS, CATALOG).cells}
    files = [RUNS / f for f, entry in manifest.items() if isinstance(entry, dict)]
    assert out <= {name(r) for file in files for r in read_records(file)}, "the records themselves stay"
