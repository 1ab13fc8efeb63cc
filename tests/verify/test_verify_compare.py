"""Which coefficient a gap points at, and the statistics behind it, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.verify.compare import BLAME, LIGHT, LOAD, Row, blame, compare
from advisor.verify.measure import Traced, client_lag_s, flat, measured, read_results, spread


def rows(make: Any, cell: str, **factors: float) -> tuple[Row, ...]:
    """Rows of a prediction of 1 for each name, measured at a factor of it."""
    return compare(cell, make.prediction(**dict.fromkeys(factors, 1.0)), factors)


@pytest.mark.parametrize(
    ("light", "load", "points_at"),
    [
        ({"tpot_mean_s": 1.3, "ttft_mean_s": 1.1}, {"ttft_p50_s": 3.0}, "memory bandwidth"),
        ({"tpot_mean_s": 1.0, "ttft_mean_s": 0.7}, {"ttft_p50_s": 3.0}, "prefill compute"),
        ({"tpot_mean_s": 1.02, "ttft_mean_s": 1.02}, {"ttft_p50_s": 3.0, "e2e_p50_s": 5.0}, "queueing"),
        ({"tpot_mean_s": 1.0}, {"tpot_mean_s": 1.4, "ttft_mean_s": 1.2}, "attention over the KV cache"),
        ({"tpot_mean_s": 1.0}, {"requests_per_s": 0.6, "ttft_mean_s": 1.0}, "saturation"),
        ({"tpot_mean_s": 1.0}, {"ttft_mean_s": 1.0, "ttft_p99_s": 2.0}, "the tail is off: ttft_p99_s by +100%"),
        ({"tpot_mean_s": 1.01}, {"ttft_mean_s": 0.98}, "the prediction holds"),
    ],
)
def test_the_gap_points_at_its_coefficient(
    make: Any, light: dict[str, float], load: dict[str, float], points_at: str
) -> None:
    assert points_at in blame(rows(make, LIGHT, **light) + rows(make, LOAD, **load))


def test_nothing_to_compare_is_said() -> None:
    assert blame(()) == "nothing that was measured was predicted"


def test_a_gap_inside_its_interval_is_no_gap(make: Any) -> None:
    wide = make.prediction(tpot_mean_s=1.0).model_copy(update={"quantities": {}})
    assert compare(LIGHT, wide, {"tpot_mean_s": 2.0}) == ()
    (row,) = rows(make, LIGHT, tpot_mean_s=1.02)
    assert row.is_inside
    assert row.error_frac == pytest.approx(0.02)


@given(
    st.dictionaries(
        st.sampled_from(["ttft_mean_s", "tpot_p50_s", "e2e_mean_s", "requests_per_s"]), st.floats(0.01, 100)
    )
)
def test_every_set_of_gaps_has_a_verdict(make: Any, factors: dict[str, float]) -> None:
    verdict = blame(rows(make, LOAD, **factors))
    assert verdict
    if any(abs(factor - 1) > 0.06 for factor in factors.values()):
        assert any(text in verdict for text in BLAME.values())


def trace(arrival_s: float, first_s: float, last_s: float, n: int) -> Traced:
    return Traced(
        arrival_s=arrival_s,
        start_s=arrival_s + 0.001,
        first_s=first_s,
        last_s=last_s,
        end_s=last_s,
        n_events=n,
        itl_max_s=0.1,
        prompt_tokens=10,
        output_tokens=n,
    )


def test_statistics_by_hand() -> None:
    cell = measured([trace(0.0, 0.5, 1.5, 11), trace(1.0, 2.0, 2.0, 1)])
    assert cell.duration_s == 2.0
    assert cell.requests_per_s == 1.0
    assert cell.output_tokens_per_s == 6.0
    assert cell.input_tokens_per_s == 10.0
    assert cell.ttft_s is not None
    assert cell.ttft_s.mean == 0.75
    assert cell.tpot_s is not None
    assert cell.tpot_s.mean == pytest.approx(0.1)
    assert flat(cell)["e2e_p50_s"] == 1.25
    assert client_lag_s([trace(0.0, 0.5, 1.5, 11)]) == pytest.approx(0.001)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_inside_the_data(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    ordered = [found.p50, found.p90, found.p95, found.p99]
    assert ordered == sorted(ordered)
    assert min(values) <= found.p50 <= max(values)
    assert found.mean == pytest.approx(float(np.mean(values)))


def test_a_result_file_that_was_cut_short_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    good = trace(0.0, 0.5, 1.5, 11).model_dump_json()
    bad = json.dumps({"arrival_s": 0, "start_s": 0, "end_s": 1, "error": {"kind": "stall", "text": "x"}})
    path.write_text(f"{good}\n{bad}\n{good[:40]}")
    answered, failed = read_results(path)
    assert (len(answered), [f.kind for f in failed]) == (1, ["stall"])
    assert read_results(tmp_path / "none") == ([], [])
