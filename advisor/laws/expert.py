"""How many experts a batch touches, and how many rows their matrices compute."""

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


def expert_rows(n_tokens: Real, n_touched: Real, n_experts_per_token: int, block_rows: int) -> Real:
    """Return the rows that the matrices of a layer's experts compute: ``T k + n B / 2``.

    Tokens are sorted by expert and computed in blocks of B rows; the last block of each of n touched experts is half
    empty on average. Kernels take smaller blocks where experts have few tokens: there this is an upper bound.

    n_touched  : distinct experts that the tokens use, as of `expected_experts`
    block_rows : rows of a block B

    Reference: vLLM 0.26.0, model_executor/layers/fused_moe/moe_align_block_size.py, which pads so.

    >>> expert_rows(3000.0, 128.0, 8, 64)
    28096.0
    """
    rows: Real = n_tokens * n_experts_per_token + n_touched * (block_rows / 2.0)
    return rows


COLUMNS, COLUMNS_EXPONENT = 2048, 0.09
"""With one rate for all experts, prompts and bursts of 8,000 tokens were told 7 % too short (768 and 1,024 columns:
Qwen3 30B-A3B with TP2, Granite 3.1 3B-A800M), right (1,536 to 3,072: four models), 17 % too long (14,336: Mixtral with
TP2)."""


def expert_rate(columns: float) -> float:
    """Return how fast an expert's matrices compute, over one whose up (and gate) matrix has 2,048 columns on a rank.

    Raises nothing; no columns (a model without experts) give 1. Source: kernels of ten models (data/runs/kernels).

    >>> round(expert_rate(14336), 2), expert_rate(2048)
    (1.19, 1.0)
    """
    return float((columns / COLUMNS) ** COLUMNS_EXPONENT) if columns else 1.0
