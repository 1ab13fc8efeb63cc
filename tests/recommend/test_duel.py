"""Two predictions against each other: joined intervals, ties said as ties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.recommend.answer import recommend
from advisor.recommend.compare import duels, duels_json
from advisor.recommend.duel import duel, ratio_of
from advisor.schema import Interval, Prediction, Request


def near(value: float, share: float) -> Interval:
    return Interval(value=value, low=value / (1 + share), high=value * (1 + share))


def prediction(tokens: float, e2e: float, share: float = 0.1, *, is_saturated: bool = False) -> Prediction:
    quantities = {"output_tokens_per_s": near(tokens, share), "e2e_p50_s": near(e2e, share)}
    return Prediction(quantities=quantities, is_saturated=is_saturated)


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_ratio_is_no_surer_than_either_and_turns_round(a: float, b: float, wide: float, other: float) -> None:
    one, two = near(a, wide), near(b, other)
    ratio, back = ratio_of(one, two), ratio_of(two, one)
    assert ratio.value == pytest.approx(a / b)
    assert ratio.low == pytest.approx(1 / back.high)
    assert math.log(ratio.high / ratio.value) >= math.log1p(max(wide, other)) - 1e-9
    assert math.log(ratio.high / ratio.value) <= math.log1p(wide) + math.log1p(other) + 1e-9


def test_a_difference_within_the_intervals_has_no_winner() -> None:
    close = duel(prediction(100, 1.0), prediction(90, 1.1))
    assert close.is_tie
    assert "no winner" in close.text("MII")
    far = duel(prediction(100, 1.0), prediction(50, 2.0))
    assert not far.is_tie
    # by hand: 2 times, and joined 1.1 ** sqrt(2) on both sides
    assert far.times.low == pytest.approx(2 / 1.1 ** math.sqrt(2))
    assert "MII is 2 times as slow" in far.text("MII")
    assert "MII is 2 times as fast" in duel(prediction(50, 2.0), prediction(100, 1.0)).text("MII")


def test_latency_decides_where_both_serve_the_load_and_tokens_where_one_does_not() -> None:
    both = duel(prediction(100, 1.0), prediction(100, 3.0))
    assert both.is_time
    assert both.times.value == pytest.approx(3)
    over = duel(prediction(100, 1.0), prediction(20, 3.0, is_saturated=True))
    assert not over.is_time
    assert over.times.value == pytest.approx(5)


def test_an_answer_says_a_tie_and_its_json_names_no_winner() -> None:
    answer = recommend(Request(model="llama-2-7b", gpus="1xA100", workload="batch", concurrency=16, n_finalists=1))
    plans = list(answer.best_by_backend.values())
    rows = {row["second"]: row for row in duels_json(plans) if row["first"] == "vllm"}
    found = {other.backend: d for one, other, d in duels(plans) if one.backend == "vllm"}
    assert set(rows) == {p.backend for p in plans} - {"vllm"}
    for backend, row in rows.items():
        t = row["times"]
        assert (row["winner"] is None) == (t["low"] <= 1 <= t["high"]) == found[backend].is_tie
    assert rows["deepspeed-zero-inference"]["winner"] == "vllm"
    assert any(found["deepspeed-autotp"].text("it") in line for line in answer.why)
