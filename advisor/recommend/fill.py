"""Filling GPUs with groups that work: how many of each way of working, at the most tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Size = tuple[int, float]
"""GPUs and tokens/s of one group of a way."""
Groups = tuple[int, ...]
"""Groups of each way."""


def rate(sizes: Sequence[Size], groups: Groups) -> float:
    """Return the tokens/s of all groups together."""
    return sum(n * per_s for n, (_, per_s) in zip(groups, sizes, strict=True))


def gpus(sizes: Sequence[Size], groups: Groups) -> int:
    """Return the GPUs of all groups together."""
    return sum(n * each for n, (each, _) in zip(groups, sizes, strict=True))


@lru_cache(maxsize=4096)
def fullest(sizes: tuple[Size, ...], n_gpus: int, max_groups: int) -> Groups:
    """Return the groups that do the most tokens a second on `n_gpus`, `max_groups` of them at most; exact.

    >>> fullest(((4, 10.0), (1, 2.0)), 6, 100)
    (1, 2)
    """
    none = (0,) * len(sizes)
    if n_gpus <= 0 or max_groups <= 0:
        return none
    smallest = min(n for n, _ in sizes)
    if max_groups < n_gpus // smallest:
        return _few(sizes, min(n_gpus, max_groups * max(n for n, _ in sizes)), max_groups)
    # of the way with the most tokens a GPU (g GPUs a group) any g other groups hold some whose GPUs are a multiple of
    # g, so that its own groups can take their place at no loss: fewer than g other groups are ever needed
    best = max(range(len(sizes)), key=lambda i: (sizes[i][1] / sizes[i][0], -sizes[i][0]))
    each = sizes[best][0]
    rest = each * (max(n for n, _ in sizes) + 1)
    many = max(0, (n_gpus - rest) // each)
    filled = _table(sizes, n_gpus - many * each)[-1][1]
    return tuple(n + many * (i == best) for i, n in enumerate(filled))


@lru_cache(maxsize=512)
def _table(sizes: tuple[Size, ...], n_gpus: int) -> list[tuple[float, Groups]]:
    """Return the best (tokens/s, groups) on 0 to `n_gpus` GPUs."""
    none = (0,) * len(sizes)
    table: list[tuple[float, Groups]] = [(0.0, none)]
    for n in range(1, n_gpus + 1):
        found = table[n - 1]
        for i, (each, per_s) in enumerate(sizes):
            if each <= n and table[n - each][0] + per_s > found[0] * (1 + 1e-12):
                before = table[n - each]
                found = (before[0] + per_s, _one_more(before[1], i))
        table.append(found)
    return table


def _few(sizes: tuple[Size, ...], n_gpus: int, max_groups: int) -> Groups:
    """Return the best groups where their number is the limit."""
    none = (0,) * len(sizes)
    now: list[tuple[float, Groups]] = [(0.0, none)] * (n_gpus + 1)
    for _ in range(max_groups):
        before, now = now, []
        for n in range(n_gpus + 1):
            found = before[n]
            for i, (each, per_s) in enumerate(sizes):
                if each <= n and before[n - each][0] + per_s > found[0] * (1 + 1e-12):
                    found = (before[n - each][0] + per_s, _one_more(before[n - each][1], i))
            now.append(found)
        if now == before:
            break
    return now[-1][1]


def _one_more(groups: Groups, way: int) -> Groups:
    return tuple(n + (i == way) for i, n in enumerate(groups))


@lru_cache(maxsize=4096)
def options(sizes: tuple[Size, ...], n_gpus: int, max_groups: int) -> tuple[Groups, ...]:
    """Return the fillings worth a choice: nothing, the fullest, and of each way as many groups as fit.

    The latter alone and filled up with others. What restarts cost decides among them.
    """
    found = [(0,) * len(sizes), fullest(sizes, n_gpus, max_groups)]
    for i, (each, _) in enumerate(sizes):
        many = min(n_gpus // each, max_groups)
        alone = tuple(many * (k == i) for k in range(len(sizes)))
        rest = fullest(sizes, n_gpus - many * each, max_groups - many)
        found += [alone, tuple(a + b for a, b in zip(alone, rest, strict=True))]
    return tuple(dict.fromkeys(found))


def spare(sizes: Sequence[Size], keep: int = -1) -> list[int]:
    """Return the ways that no filling needs: others do as much on their GPUs. The way `keep` stays.

    >>> spare(((2, 10.0), (4, 19.0), (8, 50.0)))
    [1]
    """
    dropped: list[int] = []
    for i in sorted(set(range(len(sizes))) - {keep}, key=lambda i: (sizes[i][1] / sizes[i][0], -sizes[i][0])):
        others = tuple(s for k, s in enumerate(sizes) if k != i and k not in dropped)
        if others and rate(others, fullest(others, sizes[i][0], sizes[i][0])) >= sizes[i][1]:
            dropped.append(i)
    return sorted(dropped)
