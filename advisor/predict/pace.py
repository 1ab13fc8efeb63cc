"""How fast a host launches from one moment to the next: at one of two paces, by turns."""

from __future__ import annotations

import math
from functools import lru_cache

N_TURNS = 512
"""Turns before the pattern repeats: minutes of an engine's time."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@lru_cache(maxsize=64)
def paces(slow_factor: float, slow_frac: float, phase: float = 0.0) -> tuple[float, ...]:
    """Return the time of a launch over its mean in turn after turn; the mean over the turns is 1.

    A launch takes `slow_factor` times as long in a share `slow_frac` of the turns: while the second hardware thread of
    its core has work, we take it. Which turns they are follows the golden ratio, so that any few in a row have nearly
    their share, and one question has one answer. `phase` (0 to 1) begins elsewhere in the pattern.

    Measured: a fixed loop of Python before each of 28,200 launches of three engines takes 24 or 44 us, seldom between;
    launches of more than 512 tokens of an 8B model take 15.6 and 16.9 ms (medians) after the first, 24.3 and 25.0 ms
    after the second; after 5 ms the state is still correlated by 0.6, after 0.3 s by 0.25, after 3 s by nothing (runs
    vllm-0.26.0 h200 8b-launches-b, 8b-launches, 1b-launches: data/runs/launches/vllm-0.26.0_h200-3.jsonl.gz).

    >>> [round(p, 3) for p in paces(1.5, 0.4)[:5]]
    [1.25, 0.833, 1.25, 0.833, 0.833]
    """
    fast = 1.0 / (1.0 + (slow_factor - 1.0) * slow_frac)
    slow = slow_factor * fast
    return tuple(slow if (k * GOLDEN + phase) % 1.0 < slow_frac else fast for k in range(N_TURNS))
