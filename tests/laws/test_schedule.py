"""The replayed 1F1B order against the closed form, its own rules, and the memory rule that it implies."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.bubble import pipeline_s
from advisor.laws.schedule import one_forward_one_backward, stage_order

TIMES = st.floats(min_value=0.01, max_value=10)


@given(p=st.integers(1, 8), m=st.integers(1, 24), forward=TIMES, backward=TIMES)
def test_equal_stages_end_when_the_closed_form_says(p: int, m: int, forward: float, backward: float) -> None:
    passes = one_forward_one_backward([forward] * p, [backward] * p, m)
    assert len(passes) == 2 * p * m
    assert max(one.end_s for one in passes) == pytest.approx(pipeline_s([forward + backward] * p, m))


@given(stages=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=6), m=st.integers(1, 12))
def test_a_stage_does_one_pass_at_a_time_and_waits_for_its_neighbours(
    stages: list[tuple[float, float]], m: int
) -> None:
    passes = one_forward_one_backward([f for f, _ in stages], [b for _, b in stages], m)
    by = {(one.stage, one.is_forward, one.microbatch): one for one in passes}
    assert len(by) == len(passes)
    for one in passes:
        before = (one.stage - 1 if one.is_forward else one.stage + 1, one.is_forward, one.microbatch)
        if before in by:
            assert one.begin_s >= by[before].end_s
        if not one.is_forward:
            assert one.begin_s >= by[one.stage, True, one.microbatch].end_s
    for stage in range(len(stages)):
        mine = [one for one in passes if one.stage == stage]
        assert all(a.end_s <= b.begin_s + 1e-12 for a, b in pairwise(mine))


@given(stages=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=6), m=st.integers(1, 12))
def test_a_step_is_bounded_by_each_stages_work_and_the_way_to_it_and_by_no_overlap_at_all(
    stages: list[tuple[float, float]], m: int
) -> None:
    stage_s = [f + b for f, b in stages]
    end = max(one.end_s for one in one_forward_one_backward([f for f, _ in stages], [b for _, b in stages], m))
    # before its first forward and after its last backward pass, the stages before it have one pass each to do
    assert all(end >= m * t + sum(stage_s[:k]) - 1e-9 for k, t in enumerate(stage_s))
    assert end <= m * sum(stage_s) + 1e-9


def test_stages_of_unequal_time_end_near_the_closed_form() -> None:
    stage_s = [1.0, 1.0, 1.0, 1.4]
    passes = one_forward_one_backward([t / 3 for t in stage_s], [2 * t / 3 for t in stage_s], 8)
    assert max(one.end_s for one in passes) == pytest.approx(pipeline_s(stage_s, 8), rel=0.05)


@pytest.mark.parametrize(("stage", "in_flight"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_a_stage_holds_at_most_as_many_microbatches_as_stages_follow_it(stage: int, in_flight: int) -> None:
    held = most = 0
    for is_forward, _ in stage_order(stage, 4, 16):
        held += 1 if is_forward else -1
        most = max(most, held)
    assert most == in_flight
    assert held == 0
