"""Time of work that is limited by arithmetic, by memory, or by both."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", float, NDArray[np.float64])


def smooth_max(first: Real, second: Real, sharpness: float) -> Real:
    """Return the time of two overlapping limits: ``(a^k + b^k)^(1/k)``.

    first, second : times a, b >= 0 that each limit alone would take [s], scalars or arrays
    sharpness     : k >= 1; 1 adds the two, infinity takes the larger

    Written without `max` so that it serves scalars and arrays alike and is differentiable; the larger of the two is
    factored out, so that it neither overflows nor underflows. Real kernels sit between sum and maximum near the ridge:
    k about 4 to 8 on H100 GEMMs.

    Raises nothing; both zero gives zero.

    Reference: Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785 (roofline); p-norm joining.

    >>> round(smooth_max(3.0, 4.0, 2.0), 6)
    5.0
    """
    larger = 0.5 * (first + second + abs(first - second))
    smaller = first + second - larger
    joined: Real = larger * (1.0 + (smaller / (larger + 1e-300)) ** sharpness) ** (1.0 / sharpness)
    return joined


def larger_of(first: Real, second: Real) -> Real:
    """Return the larger of two times; one expression for scalars and arrays.

    >>> larger_of(2.0, 5.0)
    5.0
    """
    return 0.5 * (first + second + abs(first - second))


def gemm_flops(n_tokens: Real, n_params: float) -> Real:
    """Return the floating-point operations of `n_tokens` through matrices with `n_params` elements: ``2 T N``.

    Reference: Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (forward pass 2N a token).

    >>> gemm_flops(1.0, 7e9)
    14000000000.0
    """
    return 2.0 * n_tokens * n_params


def attention_flops(n_pairs: Real, n_heads: int, d_qk: int, d_value: int) -> Real:
    """Return the operations of attention over `n_pairs` (query, key) pairs of one layer: ``2 pairs H (d_qk + d_v)``.

    A causal chunk of c tokens after x cached ones has ``c (x + (c + 1) / 2)`` pairs, see `causal_pairs`.

    Reference: Dao 2023, arXiv:2307.08691, section 4.1 (4 s^2 d H for the forward pass, halved when causal).

    >>> attention_flops(1024.0 * 1024.0, 32, 128, 128) / 1e9
    17.179869184
    """
    return 2.0 * n_pairs * n_heads * (d_qk + d_value)


def causal_pairs(n_new: Real, n_context: Real) -> Real:
    """Return the (query, key) pairs of `n_new` causal queries after `n_context` cached tokens.

    >>> causal_pairs(4.0, 0.0)  # 1 + 2 + 3 + 4
    10.0
    """
    return n_new * (n_context + 0.5 * (n_new + 1.0))
