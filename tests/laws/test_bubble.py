"""Pipeline bubbles against our four-stage runs, a slot-by-slot schedule, and known limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.bubble import bubble_frac, idle_frac, in_flight_microbatches, pipeline_s, stage_layers

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs" / "deepspeed-0.19.8_h100.jsonl"


def records() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()]
    return [r for r in lines if r["engine"] == "deepspeed-pipe-train"]


@pytest.mark.parametrize("record", records(), ids=lambda r: f"m{r['n_microbatches']}")
def test_the_measured_bubble_is_the_law_s_within_two_points(record: dict[str, Any]) -> None:
    law = float(bubble_frac(record["pp"], record["n_microbatches"]))
    assert law == pytest.approx(record["measured"]["bubble_frac"], abs=0.02)


@pytest.mark.parametrize("record", records(), ids=lambda r: f"m{r['n_microbatches']}")
def test_the_measured_step_is_uneven_stages_plus_the_update(record: dict[str, Any]) -> None:
    m = record["n_microbatches"]
    stages = record["measured"]["stages"]
    times = [(s["forward_s"] + s["backward_s"]) / m for s in stages]
    update = min(s["optimizer_s"] for s in stages) + record["measured"]["reduce_s"]
    assert pipeline_s(times, m) + update == pytest.approx(record["measured"]["step_s"], rel=0.05)


def walked(times: list[float], m: int) -> float:
    """The end of a forward-only pipeline, microbatch by microbatch: an oracle without the closed form."""
    free = [0.0] * len(times)
    for _ in range(m):
        ready = 0.0
        for stage, t in enumerate(times):
            free[stage] = max(free[stage], ready) + t
            ready = free[stage]
    return free[-1]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 32))
def test_the_closed_form_is_the_walk_through_the_stages(times: list[float], m: int) -> None:
    assert pipeline_s(times, m) == pytest.approx(walked(times, m))


@given(p=st.integers(1, 64), m=st.integers(1, 512), v=st.integers(1, 8))
def test_equal_stages_give_the_bubble_law(p: int, m: int, v: int) -> None:
    total = pipeline_s([1.0] * p, m, v)
    assert 1 - m / total == pytest.approx(float(bubble_frac(p, m, v)), abs=1e-9)
    assert float(idle_frac([1.0] * p, m, v)[0]) == pytest.approx(float(bubble_frac(p, m, v)), abs=1e-9)


def test_interleaving_divides_the_bubble_time() -> None:
    one, four = (pipeline_s([1.0] * 8, 16, v) - 16 for v in (1, 4))
    assert four == pytest.approx(one / 4)


def test_deepspeed_holds_as_many_microbatches_as_stages_follow() -> None:
    assert [in_flight_microbatches(s, 4, 8) for s in range(4)] == [4, 3, 2, 2]
    assert in_flight_microbatches(0, 4, 1) == 2


@given(n=st.integers(1, 200), p=st.integers(1, 64))
def test_layers_are_all_placed_and_even(n: int, p: int) -> None:
    parts = stage_layers(n, p)
    assert sum(parts) == n
    assert max(parts) - min(parts) <= 1
