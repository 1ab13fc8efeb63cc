"""Collectives against a ring run message by message, published bus factors, invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.collective import all_gather_bus_bytes, all_reduce_bus_bytes, all_reduce_s, point_to_point_s

WORLD = st.integers(1, 64)
BYTES = st.floats(0, 1e10)


def ring_bytes_sent(n_bytes: int, world: int) -> tuple[int, int]:
    """Bytes that rank 0 sends in the two halves of a ring all-reduce over `world` equal pieces."""
    piece = n_bytes // world
    held = [[{rank} for _ in range(world)] for rank in range(world)]
    sent = [0, 0]
    for half in (0, 1):
        for step in range(world - 1):
            moves = []
            for rank in range(world):
                k = (rank - step + half) % world
                moves.append(((rank + 1) % world, k, set(held[rank][k])))
                sent[half] += piece if rank == 0 else 0
            for to, k, what in moves:
                held[to][k] = held[to][k] | what
    assert all(held[rank][k] == set(range(world)) for rank in range(world) for k in range(world))
    return sent[0], sent[1]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_ring_all_reduce_by_hand(world: int) -> None:
    n_bytes = 24 * world
    reduce_scatter, gather = ring_bytes_sent(n_bytes, world)
    assert all_reduce_bus_bytes(float(n_bytes), world) == reduce_scatter + gather
    assert all_gather_bus_bytes(float(n_bytes), world) == gather


def test_published_bus_factors() -> None:
    # NCCL tests, doc/PERFORMANCE.md: all-reduce busbw = algbw * 2 (n - 1) / n, all-gather * (n - 1) / n
    assert all_reduce_bus_bytes(1.0, 8) == 1.75
    assert all_gather_bus_bytes(1.0, 8) == 0.875


@given(BYTES, BYTES, WORLD)
def test_time_is_monotone_and_at_least_the_latency(a: float, b: float, world: int) -> None:
    small, large = sorted((a, b))
    lower, upper = (all_reduce_s(n, world, 1e-5, 3e11) for n in (small, large))
    assert lower <= upper
    if world > 1:
        assert lower >= 1e-5


@given(BYTES, WORLD)
def test_more_ranks_send_more_but_never_twice_the_message(n: float, world: int) -> None:
    assert all_reduce_bus_bytes(n, world) <= all_reduce_bus_bytes(n, world + 1) <= 2 * n
    assert all_reduce_bus_bytes(n, world) == pytest.approx(2 * all_gather_bus_bytes(n, world))


def test_one_gpu_needs_no_message() -> None:
    assert all_reduce_s(1e9, 1, 1e-5, 3e11) == 0
    assert all_reduce_bus_bytes(1e9, 1) == 0
    assert all_gather_bus_bytes(1e9, 1) == 0


def test_alpha_dominates_small_and_beta_large_messages() -> None:
    assert all_reduce_s(8192.0, 4, 13e-6, 3e11) == pytest.approx(13e-6, rel=0.01)
    assert all_reduce_s(1e9, 4, 13e-6, 3e11) == pytest.approx(1.5e9 / 3e11, rel=0.01)
    assert point_to_point_s(0.0, 5e-6, 1e11) == 5e-6
