"""The minimiser of the fit: linear problems exactly, outliers ignored, bounds kept, jumps survived."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from advisor.fit.minimise import minimise, soft_l1

Floats = NDArray[np.float64]


def solve(
    f: Callable[[Floats], Floats], start: Sequence[float], *, bound: float = 10.0, h: float = 1e-6, steps: int = 40
) -> Floats:
    def many(points: Sequence[Floats]) -> list[Floats]:
        return [f(x) for x in points]

    def jacobian(x: Floats, at: Floats) -> Floats:
        return np.array([(f(x + h * e) - at) / h for e in np.eye(len(x))]).T

    n = len(start)
    low, high = np.full(n, -bound), np.full(n, bound)
    return minimise(many, jacobian, np.array(start, dtype=float), low, high, max_steps=steps)[0]


def test_a_small_linear_problem_is_solved_as_numpy_solves_it() -> None:
    rng = np.random.default_rng(1)
    a, noise = rng.normal(size=(60, 3)), 0.02 * rng.normal(size=60)
    b = a @ [0.5, -1.0, 2.0] + noise
    found = solve(lambda x: a @ x - b, [0.0, 0.0, 0.0])
    assert np.allclose(found, np.linalg.lstsq(a, b, rcond=None)[0], atol=1e-3)


def test_agrees_with_scipys_robust_least_squares() -> None:
    from scipy.optimize import least_squares

    rng = np.random.default_rng(2)
    t = np.linspace(0.0, 3.0, 80)
    y = 2.0 * np.exp(-0.7 * t) + 0.02 * rng.normal(size=80)
    y[::9] += 3.0  # outliers

    def f(x: Floats) -> Floats:
        return (x[0] * np.exp(-x[1] * t) - y) / 0.02

    ours = solve(f, [1.0, 0.2])
    theirs = least_squares(f, [1.0, 0.2], loss="soft_l1").x
    assert np.allclose(ours, theirs, rtol=0.02)
    assert np.allclose(ours, [2.0, 0.7], rtol=0.05)


def test_bounds_hold() -> None:
    found = solve(lambda x: 10.0 * (x - 3.0), [0.0], bound=1.5)
    assert found[0] == pytest.approx(1.5)


def test_leaps_do_not_stop_the_search_far_from_the_least() -> None:
    """A tenth of the residuals leaps by a width wherever x crosses one of a thousand places."""
    places = np.random.default_rng(3).uniform(0.0, 1.0, 40)

    def f(x: Floats) -> Floats:
        smooth = (x[0] - np.full(400, 2.0)) / 0.05
        leaps = np.floor((x[0] + places) * 200) % 2 - 0.5
        return np.concatenate([smooth, leaps])

    assert solve(f, [0.0], h=2e-2)[0] == pytest.approx(2.0, abs=0.01)


def test_a_slope_that_points_the_wrong_way_ends_the_search_where_it_started() -> None:
    """When a leap turns the derivative round, every damped step is worse: none is taken, and nothing fails."""
    bound = np.array([10.0])
    start, residual = minimise(
        lambda points: [1.0 + np.abs(x) for x in points],
        lambda x, at: np.array([[-1.0]]),
        np.array([0.0]),
        -bound,
        bound,
        max_steps=5,
    )
    assert start[0] == 0.0
    assert residual[0] == 1.0


def test_the_cost_is_quadratic_for_small_and_linear_for_large_residuals() -> None:
    assert soft_l1(np.array([1e-3])) == pytest.approx(0.5e-6, rel=1e-3)
    assert soft_l1(np.array([1e6])) == pytest.approx(1e6, rel=1e-3)
