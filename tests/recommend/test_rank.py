"""Scores, targets, ranking and the Pareto front, against hand computation and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.predict.capacity import MAX_LOAD_FRAC
from advisor.recommend.rank import (
    SATURATED,
    badness,
    first_of_each,
    missed,
    order,
    pareto,
    score,
    target_value,
    usd_per_h,
    usd_per_million_tokens,
)
from advisor.schema import Request, Slo, Target

VALUES = {
    "ttft_p50_s": 0.1,
    "ttft_p99_s": 0.4,
    "tpot_p50_s": 0.02,
    "tpot_p99_s": 0.03,
    "e2e_p50_s": 2.0,
    "requests_per_s": 5.0,
    "output_tokens_per_s": 1000.0,
    "saturation_requests_per_s": 8.0,
    "board_power_w": 1500.0,
}


def slo(**targets: float) -> Slo:
    pairs = [(name.split("_"), bound) for name, bound in targets.items()]
    return Slo(targets=tuple(Target.model_validate({"metric": m, "statistic": s, "max_s": b}) for (m, s), b in pairs))


def test_costs_by_hand() -> None:
    request = Request(model="8b", gpus="1xH100", electricity_usd_per_kwh=0.2, pue=1.5)
    # 4 GPUs at $2.50 and 3 kW at the wall for $0.20 a kWh
    assert usd_per_h(4, 2000.0, 2.5, request) == pytest.approx(10 + 3 * 0.2)
    # $10.60 an hour, 1000 tokens a second: 3.6 million tokens an hour
    assert float(usd_per_million_tokens(10.6, 1000.0)) == pytest.approx(10.6 / 3.6)


def test_scores_by_hand() -> None:
    assert float(score("cost", VALUES, 36.0, is_open=True)) == pytest.approx(10.0)
    assert score("latency", VALUES, 36.0, is_open=True) == 2.0
    assert float(score("energy", VALUES, 36.0, is_open=True)) == pytest.approx(1.5)
    assert score("throughput", VALUES, 36.0, is_open=True) == -8.0
    assert float(score("throughput", VALUES, 36.0, is_open=False)) == -1000.0


def test_badness_is_the_worst_ratio_and_saturation_outweighs_it() -> None:
    assert float(badness(VALUES, slo(ttft_p99=0.5, tpot_p99=0.02), False, 5.0)) == pytest.approx(1.5)
    assert float(badness(VALUES, slo(ttft_p99=0.5), False, 5.0)) == pytest.approx(0.8)
    # twice the load that saturates it
    assert float(badness(VALUES, slo(ttft_p99=0.5), True, 16.0)) == pytest.approx(2 * SATURATED)
    # without targets: the share of saturation over the share that leaves headroom
    assert float(badness(VALUES, Slo(), False, 5.0)) == pytest.approx(5 / 8 / MAX_LOAD_FRAC)
    assert float(badness(VALUES, Slo(), False, None)) == 0.0


def test_stand_ins_lie_between_median_and_tail() -> None:
    p90, p95 = (float(target_value(VALUES, slo(**{f"ttft_p{p}": 1}).targets[0])) for p in (90, 95))
    assert 0.1 < p90 < p95 < 0.4
    # a lognormal through both points: ln(p90) = ln(0.1) + 1.2816 / 2.3263 * ln 4
    assert p90 == pytest.approx(0.1 * 4 ** (1.2816 / 2.3263))
    assert target_value(VALUES, slo(itl_mean=1).targets[0]) == 0.02
    assert [t.name for t in missed(VALUES, slo(ttft_p99=0.3, tpot_p99=0.05))] == ["ttft_p99"]


def test_order_by_hand() -> None:
    #                   misses      cheap       same cost, slower   same cost, faster   dear
    scores = np.array([1.0, 5.0, 2.0, 2.002, 9.0])
    bad = np.array([1.4, 0.5, 0.9, 0.2, 0.1])
    latency = np.array([1.0, 1.0, 3.0, 2.0, 0.5])
    n = np.ones(5)
    assert order(scores, bad, latency, n).tolist() == [3, 2, 1, 4, 0]
    # unmaintained software comes after what is maintained, but before what misses
    assert order(scores, bad, latency, n, np.array([0.0, 0, 0, 1, 0])).tolist() == [2, 1, 4, 3, 0]
    # of two that miss, the one that serves the load comes first, maintained or not
    over = np.array([1.4, SATURATED * 23])
    assert order(np.ones(2), over, np.ones(2), np.ones(2), np.array([2.0, 0])).tolist() == [0, 1]
    # to be maximised: the more negative the better
    assert order(-scores, np.zeros(5), latency, n).tolist() == [4, 1, 3, 2, 0]


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 50), st.floats(0.01, 100), st.integers(1, 64)),
        min_size=1,
        max_size=30,
    )
)
def test_a_plan_that_misses_never_ranks_before_one_that_meets(rows: list[tuple[float, float, float, int]]) -> None:
    scores, bad, latency, n = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    ranked = order(scores, bad, latency, n).tolist()
    assert sorted(ranked) == list(range(len(rows)))
    states = [bad[i] > 1 for i in ranked]
    assert states == sorted(states)
    meeting = [scores[i] for i in ranked if bad[i] <= 1]
    assert all(a <= b * 1.0051 for a, b in itertools.pairwise(meeting))


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=25))
def test_the_pareto_front_is_what_brute_force_finds(points: list[tuple[int, int, int]]) -> None:
    found = pareto(np.array(points, dtype=float)).tolist()
    for i, mine in enumerate(points):
        beaten = any(all(a <= b for a, b in zip(p, mine, strict=True)) and p != mine for p in points)
        assert found[i] is not beaten
    assert any(found)


def test_first_of_each_keeps_the_best_of_a_key() -> None:
    assert first_of_each(["a", "b", "a", "c"], [2, 3, 0, 1]) == [2, 3, 1]
