"""The noise floor: pairs of equal cells by hand, and what does not count as a pair."""

from __future__ import annotations

import math
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.fit.records import Cell, cell_of
from advisor.fit.repeats import noise_floor
from advisor.schema import RunRecord
from tests.fit.test_records import record

CATALOG = load_catalog()
NONE: dict[str, Any] = {"metrics": {}, "runs": [], "pairs": 0}


def cell(run: str, ttft_s: float, host: str, **changes: Any) -> Cell:
    raw = record(**changes)
    raw["run_id"] = run
    raw["measured"] = raw["measured"] | {
        "ttft_s": {"mean": ttft_s, "p50": ttft_s, "p90": ttft_s, "p95": ttft_s, "p99": ttft_s}
    }
    return cell_of(RunRecord.model_validate(raw), CATALOG, host)


def test_three_starts_make_three_pairs() -> None:
    cells = [cell("a", 0.1, "x"), cell("b", 0.2, "y"), cell("c", 0.4, "z")]
    found = noise_floor(cells)
    assert found["metrics"]["ttft_s.p50"]["n"] == 3
    assert found["metrics"]["ttft_s.p50"]["median"] == pytest.approx(math.log(2.0))
    assert found["metrics"]["ttft_s.p50"]["p90"] == pytest.approx(math.log(2.0) + 0.8 * math.log(2.0))
    assert found["runs"] == ["a", "b", "c"]
    assert found["pairs"] == 3
    assert found["one_host"] == NONE


def test_two_starts_on_one_host_are_a_pair_of_another_kind() -> None:
    cells = [cell("a", 0.1, "x"), cell("b", 0.2, "y"), cell("c", 0.6, "y")]
    found = noise_floor(cells)
    assert found["metrics"]["ttft_s.p50"]["n"] == found["pairs"] == 2
    assert found["one_host"]["metrics"]["ttft_s.p50"] == pytest.approx(
        {"median": math.log(3.0), "p90": math.log(3.0), "n": 1}
    )
    assert (found["one_host"]["runs"], found["one_host"]["pairs"]) == (["b", "c"], 1)


def test_two_cells_of_one_start_other_plans_and_random_loads_are_no_pairs() -> None:
    same_start = [cell("a", 0.1, "x"), cell("a", 0.2, "x")]
    other_plan = [cell("a", 0.1, "x"), cell("b", 0.2, "y", max_num_batched_tokens=4096)]
    poisson = {"kind": "poisson", "arrivals_per_s": 2.0, "duration_s": 10.0}
    random = [cell("a", 0.1, "x", load=poisson), cell("b", 0.2, "y", load=poisson)]
    for cells in (same_start, other_plan, random, []):
        assert noise_floor(cells) == {**NONE, "one_host": NONE}
