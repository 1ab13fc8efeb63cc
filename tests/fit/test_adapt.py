"""The quick refit finds what was changed in the records, and nothing where nothing was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.fit.adapt import HOST, SPEED, refit
from advisor.fit.objective import predicted, run_cell
from advisor.fit.records import Cell, cells_of, read_records
from advisor.fit.validate import table
from advisor.predict.transfer import HOST_TIMES, transferred
from advisor.schema import RunRecord

CATALOG = load_catalog()


def of_a_host(records: list[RunRecord], speed: float) -> list[RunRecord]:
    """The records as the law says that a host with CPU times `speed` times longer would have written them."""
    return [_of_a_host(cell, speed) for cell in cells_of(records, CATALOG, HOST)]


def _of_a_host(cell: Cell, speed: float) -> RunRecord:
    record = cell.record
    values = transferred(CATALOG.coefficients("vllm"), cell.gpu)
    for name in HOST_TIMES:
        values[name] *= speed
    found = predicted(run_cell(cell, values))
    raw: dict[str, Any] = json.loads(record.model_dump_json(by_alias=True))
    for metric in ("ttft_s", "tpot_s"):
        if raw["measured"].get(metric):
            for statistic in ("mean", "p50", "p90", "p99"):
                raw["measured"][metric][statistic] = found.get(f"{metric}.{statistic}", 0.0)
    raw["measured"]["requests_per_s"] = found["requests_per_s"]
    return RunRecord.model_validate(raw)


@pytest.fixture(scope="module")
def records(root: Path) -> list[RunRecord]:
    """A few cells of two engine starts: a small model, which shows the host, and a larger one."""
    every = read_records(root / "data" / "runs" / "vllm-0.26.0_h100-2.jsonl")
    small = [r for r in every if r.model == "llama-3.2-1b"][:4]
    return small + [r for r in every if r.model == "qwen2.5-14b" and r.pp == 1][:3]


def test_a_slower_host_is_found_and_helps_on_starts_that_were_left_out(records: list[RunRecord]) -> None:
    found = refit(of_a_host(records, 1.4), CATALOG, "host")
    change = next(c for c in found.changes if c.name == "host")
    assert change.after == pytest.approx(1.4, rel=0.04)
    assert change.after_low < 1.4 < change.after_high * 1.02
    host = {n: found.coefficients.value(n) / CATALOG.coefficients("vllm").value(n) for n in HOST_TIMES}
    assert all(v == pytest.approx(change.after) for v in host.values())
    assert found.coefficients.value("gemm_eff_bf16") == CATALOG.coefficients("vllm").value("gemm_eff_bf16")
    assert found.groups == 2
    before, after, left_out = table(found.before), table(found.after), table(found.left_out)
    assert after["ttft_s.p50"]["median"] < 0.3 * before["ttft_s.p50"]["median"]
    assert left_out["ttft_s.p50"]["median"] < 0.5 * before["ttft_s.p50"]["median"]
    assert len(found.left_out) == len(found.before)


def test_records_of_the_reference_host_change_nothing(records: list[RunRecord]) -> None:
    found = refit(of_a_host(records, 1.0), CATALOG, "host")
    assert all(c.after == pytest.approx(1.0, abs=0.01) for c in found.changes)


def test_all_coefficients_stay_within_what_the_shipped_fit_knew(records: list[RunRecord]) -> None:
    said: list[float] = []
    found = refit(of_a_host(records, 1.2), CATALOG, "all", lambda share, text: said.append(share))
    assert said == sorted(said)
    assert said[-1] == 1.0
    assert len(found.changes) > 15
    for c in found.changes:
        if c.name == "host":
            assert c.after == pytest.approx(1.2, rel=0.06)
        else:  # nothing but the host was changed
            assert abs(math.log(c.after / c.before)) <= 2 * max(math.log(c.before_high / c.before), 2e-3), c
    note = found.coefficients.report.notes[0] if found.coefficients.report else ""
    assert "quick refit on 7 cells" in note


def test_records_that_cannot_be_fitted_are_refused_with_a_sentence(records: list[RunRecord], root: Path) -> None:
    with pytest.raises(DomainError, match="none of the records is a vLLM cell"):
        refit(read_records(root / "data" / "runs" / "deepspeed-0.19.8_h100.jsonl"), CATALOG)
    h200 = read_records(root / "data" / "runs" / "vllm-0.26.0_h200-1.jsonl")[:1]
    with pytest.raises(DomainError, match="one GPU type, got h100-sxm-80gb, h200-sxm-141gb"):
        refit([*records, *h200], CATALOG)


def test_a_card_that_was_not_measured_may_move_further_than_one_that_was(records: list[RunRecord]) -> None:
    from advisor.fit.adapt import _priors
    from advisor.fit.records import cells_of

    cells = cells_of(records, CATALOG, HOST)
    shipped = CATALOG.coefficients("vllm")
    known = _priors(cells, shipped, CATALOG.gpu("h100"), "all")
    other = _priors(cells, shipped, CATALOG.gpu("l40s"), "all")
    assert other["gemm_eff_bf16"][1] > 10 * known["gemm_eff_bf16"][1]
    assert other["host_step_s"] == known["host_step_s"]
    assert set(_priors(cells, shipped, CATALOG.gpu("h100"), "host")) == {SPEED, "power@new"}
