"""Requests as a client sends them: lengths and arrival times drawn from a workload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from advisor.errors import DomainError
from advisor.schema import (
    ClosedLoad,
    ConstantLoad,
    FixedLengths,
    GammaLoad,
    Lengths,
    LognormalLengths,
    OpenLoad,
    PoissonLoad,
    TraceLoad,
    Workload,
)

MAX_REQUESTS = 2_000_000


@dataclass(frozen=True)
class Traffic:
    """Drawn requests: lengths of each, arrival times [s] for an open loop or the client count for a closed one."""

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    shared_prefix_tokens: int
    arrival_s: NDArray[np.float64] | None
    concurrency: int


def draw_lengths(lengths: Lengths, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return prompt and output lengths of `n` requests [tokens]; a lognormal keeps its mean before clipping."""
    if isinstance(lengths, FixedLengths):
        return np.full(n, lengths.prompt_tokens), np.full(n, lengths.output_tokens)
    if isinstance(lengths, LognormalLengths):
        shift = -0.5 * lengths.sigma**2
        factors = np.exp(shift + lengths.sigma * rng.standard_normal((2, n)))
        prompt = np.clip((lengths.prompt_tokens_mean * factors[0]).astype(np.int64), *lengths.prompt_clip)
        output = np.clip((lengths.output_tokens_mean * factors[1]).astype(np.int64), *lengths.output_clip)
        return np.maximum(prompt, 1), np.maximum(output, 1)
    index = np.arange(n) % len(lengths.prompt_tokens)
    return np.asarray(lengths.prompt_tokens)[index], np.asarray(lengths.output_tokens)[index]


@lru_cache(maxsize=64)
def _even_normals(n: int) -> NDArray[np.float64]:
    """Return the standard normal at the middles of `n` equal shares of probability."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])


def even_lengths(lengths: Lengths, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return `n` prompt and output lengths whose distribution is the workload's own, in random order [tokens].

    Stratified sampling with one value a stratum, independent for prompt and output: the mean and the tail of some
    hundred requests are those of the long run, and only order and arrivals are left to chance (Law 2015, Simulation
    Modeling and Analysis, section 11.1: variance reduction).
    """
    if not isinstance(lengths, LognormalLengths):
        return draw_lengths(lengths, n, rng)
    z = _even_normals(n)
    factors = np.exp(-0.5 * lengths.sigma**2 + lengths.sigma * np.stack([rng.permutation(z), rng.permutation(z)]))
    prompt = np.clip((lengths.prompt_tokens_mean * factors[0]).astype(np.int64), *lengths.prompt_clip)
    output = np.clip((lengths.output_tokens_mean * factors[1]).astype(np.int64), *lengths.output_clip)
    return np.maximum(prompt, 1), np.maximum(output, 1)


@lru_cache(maxsize=256)
def mean_lengths(lengths: Lengths) -> tuple[float, float]:
    """Return the mean prompt and output length [tokens], clipping included (by quadrature over the lognormal)."""
    if isinstance(lengths, FixedLengths):
        return float(lengths.prompt_tokens), float(lengths.output_tokens)
    if isinstance(lengths, LognormalLengths):
        prompt, output = quantile_lengths(lengths, (np.arange(400) + 0.5) / 400)
        return float(prompt.mean()), float(output.mean())
    return float(np.mean(lengths.prompt_tokens)), float(np.mean(lengths.output_tokens))


def quantile_lengths(
    lengths: LognormalLengths, quantiles: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return prompt and output lengths at the given quantiles of their distributions [tokens]."""
    normal = NormalDist()
    z = np.array([normal.inv_cdf(float(q)) for q in quantiles])
    factors = np.exp(lengths.sigma * z - 0.5 * lengths.sigma**2)
    prompt = np.clip((lengths.prompt_tokens_mean * factors).astype(np.int64), *lengths.prompt_clip)
    output = np.clip((lengths.output_tokens_mean * factors).astype(np.int64), *lengths.output_clip)
    return np.maximum(prompt, 1), np.maximum(output, 1)


def arrival_times(load: OpenLoad, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return ascending arrival times [s] of an open load.

    With a realised count (`n_requests`) and a duration, Poisson arrivals are order statistics of uniforms: the count of
    a finite Poisson process is chance, not load. With a count alone the draw is stretched to the mean rate for the
    same reason. The generator of our runs stops after the first arrival past the end.
    """
    if isinstance(load, TraceLoad):
        times = np.asarray(load.arrival_s)
        return np.asarray(times - times[0], dtype=np.float64)
    mean_gap = 1.0 / load.arrivals_per_s
    if isinstance(load, PoissonLoad) and load.n_requests and load.duration_s:
        inside = np.sort(rng.uniform(0.0, load.duration_s, load.n_requests - 1))
        return np.append(inside, load.duration_s + 0.5 * mean_gap)
    n = load.n_requests or (int(load.duration_s * load.arrivals_per_s * 1.3) + 50 if load.duration_s else 2000)
    if n > MAX_REQUESTS:
        raise DomainError(f"{n} requests are too many to simulate; at most {MAX_REQUESTS}: shorten duration_s")
    if isinstance(load, ConstantLoad):
        gaps = np.full(n, mean_gap)
    elif isinstance(load, GammaLoad):
        shape = 1.0 / load.cv**2
        gaps = rng.gamma(shape, mean_gap / shape, n)
    else:
        gaps = rng.exponential(mean_gap, n)
    times = np.cumsum(gaps)
    if load.n_requests is None and load.duration_s is not None:
        times = times[: int(np.searchsorted(times, load.duration_s)) + 1]
    else:
        times *= n * mean_gap / max(float(times[-1]), 1e-300)
    return np.asarray(times, dtype=np.float64)


def draw(
    workload: Workload, seed: int, *, prefix_caching: bool, block_tokens: int = 16, is_even: bool = False
) -> Traffic:
    """Return the requests of `workload`, the same for the same seed.

    is_even : lengths as in the long run (a forecast), else drawn one by one as a client does (a measured run)

    Prefix hits are whole blocks: the shared prompt is cached after its first use, a share of the rest by conversation.
    """
    rng = np.random.default_rng(seed)
    load = workload.load
    concurrency = 0
    arrivals = None
    if isinstance(load, ClosedLoad):
        concurrency = load.concurrency
        n = load.n_requests or max(4 * concurrency, 64)
    else:
        arrivals = arrival_times(load, rng)
        n = len(arrivals)
    prompt, output = (even_lengths if is_even else draw_lengths)(workload.lengths, n, rng)
    cached = np.zeros(n, dtype=np.int64)
    shared = 0
    if prefix_caching:
        prefix = workload.prefix
        shared = prefix.shared_prefix_tokens // block_tokens * block_tokens
        rest = np.maximum(prompt - shared, 0)
        hit = shared + (rest * prefix.conversation_hit_frac).astype(np.int64) // block_tokens * block_tokens
        # the last token is always computed, so a full hit still leaves one block to compute (vLLM: num_tokens - 1)
        cached = np.maximum(0, np.minimum(hit, (prompt - 1) // block_tokens * block_tokens))
        if not prefix.is_warm:
            cached[0] = 0
    return Traffic(prompt.astype(np.int64), output.astype(np.int64), cached, shared, arrivals, concurrency)
