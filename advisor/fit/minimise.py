"""Robust least squares for a function that jumps: damped Gauss-Newton steps, the best of several dampings taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DAMPINGS = (0.003, 0.03, 0.3, 3.0)
STRONGER = (30.0, 300.0)
"""Dampings that are tried when none of the others lowers the cost: short steps down the gradient."""
LONGEST_STEP = 0.3
"""Largest move of one parameter in one step (natural log)."""

ENOUGH = 0.95
"""Share of the largest gain that a more damped step must reach to be taken instead."""

MIN_GAIN = 2e-3
"""A step that lowers the cost by less than this share ends the search."""


def soft_l1(residuals: Floats) -> float:
    """Return the robust cost: half of squares for small residuals, linear for large ones."""
    return float((np.sqrt(1.0 + residuals**2) - 1.0).sum())


def minimise(
    residuals: Callable[[Sequence[Floats]], list[Floats]],
    jacobian: Callable[[Floats, Floats], Floats],
    start: Floats,
    low: Floats,
    high: Floats,
    *,
    max_steps: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Floats, Floats]:
    """Return the parameters of the least robust cost that was found, and their residuals.

    residuals : residuals of several parameter vectors (evaluated side by side)
    jacobian  : derivatives of the residuals at a vector with known residuals

    A replay is not smooth: requests fall into groups, and a median leaps when one changes sides. A trust region that
    believes one such leap shrinks to nothing, so each step tries dampings over three decades and keeps what is best.
    Reference: Levenberg (1944), Marquardt (1963); soft L1 as in Triggs et al. (2000), eq. 10.
    """
    x = np.clip(start, low, high)
    r = residuals([x])[0]
    cost = soft_l1(r)
    if progress:
        progress(0, cost)
    for step in range(1, max_steps + 1):
        slope = jacobian(x, r)
        weights = (1.0 + r**2) ** -0.25
        rows, aims = slope * weights[:, None], -r * weights
        normal, gradient = rows.T @ rows, rows.T @ aims
        scale = np.maximum(np.diag(normal), 1e-3 * np.diag(normal).max())
        gain = 0.0
        for dampings in (DAMPINGS, STRONGER):
            tried = []
            for damping in dampings:
                move = np.linalg.solve(normal + damping * np.diag(scale), gradient)
                tried.append(np.clip(x + np.clip(move, -LONGEST_STEP, LONGEST_STEP), low, high))
            found = residuals(tried)
            gains = [cost - soft_l1(r) for r in found]
            if max(gains) > 0:
                # what the data say nothing about stays where it is: of steps that gain about as much, the most damped
                best = max(k for k, gain in enumerate(gains) if gain >= ENOUGH * max(gains))
                gain = gains[best]
                x, r, cost = tried[best], found[best], cost - gain
                break
        if progress:
            progress(step, cost)
        if gain < MIN_GAIN * cost:
            break
    return x, r
