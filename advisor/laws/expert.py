"""How many experts a batch touches."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", float, NDArray[np.float64])


def expected_experts(n_tokens: Real, n_experts: int, n_experts_per_token: int) -> Real:
    """Return the expected number of distinct routed experts that a batch uses in one layer.

    ``E (1 - (1 - k / E)^T)`` for T tokens that each choose k of E experts uniformly and independently.

    Trained routers are less even than this, so real batches touch fewer experts; random weights come close to it.
    Reference: occupancy of E cells, Feller, An Introduction to Probability Theory I, chapter IV.2.

    >>> round(expected_experts(1.0, 8, 2), 9)
    2.0
    """
    touched: Real = n_experts * (1.0 - (1.0 - n_experts_per_token / n_experts) ** n_tokens)
    return touched
