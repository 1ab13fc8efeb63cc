"""Filling GPUs with groups: the exact optimum, checked against trying everything."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.recommend.fill import fullest, gpus, options, rate, spare

SIZES = st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 100)), min_size=1, max_size=3).map(tuple)


def brute(sizes: tuple[tuple[int, float], ...], n_gpus: int, most: int) -> float:
    """Return the most tokens/s over every filling."""
    counts = itertools.product(*(range(n_gpus // each + 1) for each, _ in sizes))
    return max(rate(sizes, c) for c in counts if gpus(sizes, c) <= n_gpus and sum(c) <= most)


@settings(max_examples=100)
@given(sizes=SIZES, n_gpus=st.integers(0, 20), most=st.integers(0, 25))
def test_the_fullest_is_the_best_of_all(sizes: tuple[tuple[int, float], ...], n_gpus: int, most: int) -> None:
    found = fullest(sizes, n_gpus, most)
    assert gpus(sizes, found) <= n_gpus
    assert sum(found) <= most
    assert rate(sizes, found) >= brute(sizes, n_gpus, most) * (1 - 1e-9)


@settings(max_examples=50)
@given(sizes=SIZES, n_gpus=st.integers(100, 400))
def test_many_gpus_are_filled_as_a_table_of_all_would(sizes: tuple[tuple[int, float], ...], n_gpus: int) -> None:
    table = [0.0]
    for n in range(1, n_gpus + 1):
        table.append(max([table[n - 1], *(table[n - each] + per_s for each, per_s in sizes if each <= n)]))
    assert rate(sizes, fullest(sizes, n_gpus, 10**6)) >= table[-1] * (1 - 1e-9)


@given(sizes=SIZES, n_gpus=st.integers(0, 40), most=st.sampled_from([1, 2, 10**6]))
def test_choices_fit_and_hold_nothing_and_the_best(
    sizes: tuple[tuple[int, float], ...], n_gpus: int, most: int
) -> None:
    found = options(sizes, n_gpus, most)
    assert all(gpus(sizes, g) <= n_gpus and sum(g) <= most for g in found)
    assert (0,) * len(sizes) in found
    assert fullest(sizes, n_gpus, most) in found


@given(sizes=SIZES, n_gpus=st.integers(1, 40))
def test_what_is_left_out_is_missed_nowhere(sizes: tuple[tuple[int, float], ...], n_gpus: int) -> None:
    dropped = spare(sizes)
    left = tuple(size for i, size in enumerate(sizes) if i not in dropped)
    assert left
    assert rate(left, fullest(left, n_gpus, 10**6)) >= rate(sizes, fullest(sizes, n_gpus, 10**6)) * (1 - 1e-9)


def test_what_must_stay_stays() -> None:
    assert spare(((1, 10.0), (1, 10.0)), keep=0) == [1]
    assert spare(((1, 10.0), (1, 10.0)), keep=1) == [0]
