"""A board's power limit: how much longer a step takes that asks for more, from how hot the steps before it ran."""

from __future__ import annotations

from math import log


def mean_stretch(old: float, new: float, ratio: float, span: float, exponent: float) -> float:
    """Return by how much a step is stretched on average, >= 1, while its board's power average moves.

    The average r of what the steps ask for, over what the limit leaves above idle, follows the step's own `ratio` with
    a time constant: r(t) = ratio + (old - ratio) exp(-t). While r > 1 the clock is lowered; power goes with the clock
    and with its voltage, so time goes with r to the `exponent`. The mean is exact up to that power, which is taken of
    the mean r of the part above 1.

    old, new : r when the step begins and when it ends
    ratio    : the power that the step asks for at full clock, over the same
    span     : its duration at full clock, in time constants, > 0

    Raises nothing. Reference: first-order response of an averaging controller; that boards hold an average and not
    each instant shows in runs: prompts of 1,024 tokens run at full clock, of 8,000 do not (runs 8b-p, 14b-p).

    >>> mean_stretch(0.0, 0.9, 0.95, 3.0, 0.5)
    1.0
    >>> round(mean_stretch(1.44, 1.44, 1.44, 5.0, 0.5), 3)
    1.2
    """
    above = span
    if old >= 1.0 and new >= 1.0:
        mean = ratio + (old - new) / span
    elif new > 1.0:  # it heats up, and reaches the limit on the way
        above = span - log((ratio - old) / (ratio - 1.0))
        if above <= 0.0:
            return 1.0
        mean = ratio + (1.0 - new) / above
    elif old > 1.0:  # it cools down
        above = min(span, log((old - ratio) / (1.0 - ratio))) if ratio < 1.0 else span
        mean = ratio + (old - 1.0) / above if above > 0.0 else 1.0
    else:
        return 1.0
    stretch: float = 1.0 + (max(mean, 1.0) ** exponent - 1.0) * (above / span)
    return stretch
