"""Time of collectives between the GPUs of one replica."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", float, NDArray[np.float64])


def all_reduce_bus_bytes(message_bytes: Real, world: int) -> Real:
    """Return the bytes that each GPU sends in an all-reduce: ``2 (p - 1) / p * message``.

    Reference: Thakur, Rabenseifner, Gropp 2005, doi:10.1177/1094342005051521; NCCL tests PERFORMANCE.md (busbw).

    >>> all_reduce_bus_bytes(1e6, 4)
    1500000.0
    """
    return 2.0 * (world - 1) / world * message_bytes


def all_reduce_s(message_bytes: Real, world: int, latency_s: float, busbw_bytes_per_s: float) -> Real:
    """Return the time of one all-reduce, latency plus bandwidth: ``alpha + bus bytes / busbw``; 0 for one GPU.

    Reference: Hockney 1994, doi:10.1016/S0167-8191(06)80021-9 (alpha-beta model).

    >>> round(all_reduce_s(8e6, 4, 10e-6, 300e9) * 1e6, 3)
    50.0
    """
    if world <= 1:
        return 0.0 * message_bytes
    return latency_s + all_reduce_bus_bytes(message_bytes, world) / busbw_bytes_per_s


def all_gather_bus_bytes(message_bytes: Real, world: int) -> Real:
    """Return the bytes that each GPU sends when all gather `message_bytes` in total: ``(p - 1) / p * message``.

    Reference: as for `all_reduce_bus_bytes`.

    >>> all_gather_bus_bytes(1e6, 4)
    750000.0
    """
    return (world - 1) / world * message_bytes


def point_to_point_s(message_bytes: Real, latency_s: float, bytes_per_s: float) -> Real:
    """Return the time to send `message_bytes` from one GPU to another: ``alpha + bytes / rate``.

    Reference: as for `all_reduce_s`.

    >>> round(point_to_point_s(1e6, 5e-6, 100e9) * 1e6, 3)
    15.0
    """
    return latency_s + message_bytes / bytes_per_s
