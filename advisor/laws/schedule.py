"""Who computes what when in a training pipeline: the 1F1B order, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Pass(NamedTuple):
    """One pass of one microbatch through one stage; times from the begin of the step [s]."""

    stage: int
    is_forward: bool
    microbatch: int
    begin_s: float
    end_s: float


def stage_order(stage: int, n_stages: int, n_microbatches: int) -> list[tuple[bool, int]]:
    """Return the passes of one stage in 1F1B order, as (is forward, microbatch).

    A stage first runs forward ``min(p - stage - 1, m)`` times, then one forward and one backward in turn, then what is
    left backward. stage from 0; n_stages p >= 1; n_microbatches m >= 1.
    Reference: Narayanan et al. 2019 (PipeDream), doi:10.1145/3341301.3359646, section 3.2; with flush, 2021,
    arXiv:2104.04473, section 2.2, figure 4 (top).

    >>> stage_order(1, 3, 3)
    [(True, 0), (True, 1), (False, 0), (True, 2), (False, 1), (False, 2)]
    """
    warm = min(n_stages - stage - 1, n_microbatches)
    order = [(True, i) for i in range(warm)]
    for i in range(n_microbatches - warm):
        order += [(True, warm + i), (False, i)]
    return order + [(False, i) for i in range(n_microbatches - warm, n_microbatches)]


def one_forward_one_backward(
    forward_s: Sequence[float], backward_s: Sequence[float], n_microbatches: int
) -> tuple[Pass, ...]:
    """Return every pass of a 1F1B step with its begin and end, sorted by begin and stage.

    forward_s, backward_s : time of one microbatch in each stage [s]; n_microbatches : m >= 1

    A forward pass waits for the one before it in the pipeline, a backward pass for the one after it, both for their own
    stage. With p equal stages the last pass ends at ``(m + p - 1) (f + b)``, as in `bubble.pipeline_s`.
    Notes: sends take no time of their own; with unequal stages the end differs by a few per cent from `pipeline_s`,
    which fills and drains the pipeline at the sum of the stages.
    Reference: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.

    >>> max(p.end_s for p in one_forward_one_backward([1.0] * 4, [2.0] * 4, 8))
    33.0
    """
    p = len(forward_s)
    todo = [stage_order(stage, p, n_microbatches) for stage in range(p)]
    at, free = [0] * p, [0.0] * p
    end: dict[tuple[bool, int, int], float] = {}
    found = []
    moved = True
    while moved:
        moved = False
        for stage in range(p):
            while at[stage] < len(todo[stage]):
                is_forward, i = todo[stage][at[stage]]
                before = stage - 1 if is_forward else stage + 1
                needs = end.get((is_forward, before, i)) if 0 <= before < p else 0.0
                if needs is None:
                    break
                begin = max(free[stage], needs)
                free[stage] = begin + (forward_s if is_forward else backward_s)[stage]
                end[is_forward, stage, i] = free[stage]
                found.append(Pass(stage, is_forward, i, begin, free[stage]))
                at[stage] += 1
                moved = True
    return tuple(sorted(found, key=lambda one: (one.begin_s, one.stage)))
