"""Requests through FastGen's scheduler: Dynamic SplitFuse over a cache of blocks, as DeepSpeed-MII runs it.

Each step takes one token of every sequence that has room in its last block or gets a new one, then prompt chunks up to
the token budget; a prompt starts only when the cache has blocks for all of it. A sequence without a block *waits* while
others go on; only when nothing at all can run is the last one thrown out, to be computed again behind the queue. So a
full cache does not cost one recomputation now and then: it runs few sequences a pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from advisor.errors import DomainError
from advisor.predict.batching import WARMUP_FRAC, Floats, Ints, Served

MAX_STEPS = 200_000
BLOCK_TOKENS = 64
"""Tokens of a cache block with heads of 128 (inference/v2/modules/implementations/attention/blocked_flash.py)."""


@dataclass
class _Cache:
    """Tokens and blocks that each request holds, and the blocks nobody holds."""

    free: int
    block_tokens: int
    tokens: Ints
    blocks: Ints

    def room(self, requests: list[int]) -> Ints:
        """Return the tokens that fit the blocks that each request already has."""
        return np.asarray(self.blocks[requests] * self.block_tokens - self.tokens[requests])

    def open(self, request: int, n_tokens: int) -> int:
        """Return how many more blocks `n_tokens` more tokens of a request need."""
        return max(0, -(-int(self.tokens[request] + n_tokens) // self.block_tokens) - int(self.blocks[request]))

    def grow(self, requests: list[int], n_tokens: int | Ints) -> None:
        """Store `n_tokens` more of each request, in new blocks where its own are full."""
        self.tokens[requests] += n_tokens
        blocks = -(-self.tokens[requests] // self.block_tokens)
        self.free -= int((blocks - self.blocks[requests]).sum())
        self.blocks[requests] = blocks

    def release(self, request: int) -> None:
        """Give all blocks of a request back."""
        self.free += int(self.blocks[request])
        self.tokens[request] = self.blocks[request] = 0


@dataclass
class _Queues:
    """Who decodes, in the scheduler's order, and whose prompt waits or is half way (that one is first)."""

    decoding: list[int]
    due: deque[int]
    to_compute: Ints

    def decodes(self, cache: _Cache, limit: int) -> tuple[list[int], list[int], int]:
        """Return (requests that decode in this step, requests that wait for a block, blocks opened)."""
        able, rest = self.decoding[:limit], self.decoding[limit:]
        full = cache.room(able) <= 0
        if int(full.sum()) <= cache.free:
            return able, rest, int(full.sum())
        running, stalled, opened = [], [], 0
        for request, is_full in zip(able, full.tolist(), strict=True):
            if is_full and opened >= cache.free:
                stalled.append(request)
                continue
            opened += is_full
            running.append(request)
        return running, stalled + rest, opened

    def prompts(self, cache: _Cache, opened: int, budget: int, slots: int) -> list[tuple[int, int]]:
        """Return (request, tokens) of the prompt chunks of this step."""
        chunks: list[tuple[int, int]] = []
        if cache.free == 0:
            return chunks
        for request in self.due:
            if len(chunks) >= slots or budget <= 0:
                break
            spare, wanted = cache.free - opened, int(self.to_compute[request])
            if wanted > 1 and cache.open(request, wanted) > spare:
                break
            chunk = min(wanted, budget)
            needed = cache.open(request, chunk)
            if needed > spare:
                continue
            opened += needed
            budget -= chunk
            chunks.append((request, chunk))
        return chunks

    def throw_out(self, cache: _Cache) -> None:
        """Take the cache of the last request that has any; its prompt and answer so far are computed again, last."""
        if self.decoding:
            victim = self.decoding.pop()
            self.to_compute[victim] = cache.tokens[victim] + 1
        else:
            victim = next(r for r in self.due if cache.tokens[r] > 0)
            self.due.remove(victim)
            self.to_compute[victim] += cache.tokens[victim]
        cache.release(victim)
        self.due.append(victim)


def serve_splitfuse(
    prompts: Ints,
    outputs: Ints,
    *,
    arrivals: Floats | None,
    clients: int,
    budget_tokens: int,
    max_seqs: int,
    kv_tokens: float,
    step_s: Callable[[float, float, float], float],
    block_tokens: int = BLOCK_TOKENS,
) -> Served:
    """Serve requests by Dynamic SplitFuse; steady stretches are taken in one jump.

    `step_s(prefill_tokens, n_decodes, context_tokens)` is the time of one step; `context_tokens` is summed over the
    decodes. With `arrivals` None, `clients` clients send their next request when their last one returns.
    Raises DomainError when one request alone needs more than the cache holds.

    Reference: DeepSpeed-MII 0.3.3, batching/ragged_batching.py (schedule_requests, reset_request_status);
    DeepSpeed-FastGen, arXiv:2401.08671.
    """
    n = len(prompts)
    cache = _Cache(int(kv_tokens // block_tokens), block_tokens, np.zeros(n, np.int64), np.zeros(n, np.int64))
    longest = int((prompts + outputs).max(initial=0))
    if -(-longest // block_tokens) > cache.free:
        raise DomainError(f"a request of {longest:,} tokens needs more than the cache's {int(kv_tokens):,}")
    ready = np.zeros(n) if arrivals is None else arrivals
    known = min(clients, n) if arrivals is None else n
    first, done = np.full(n, np.nan), np.full(n, np.nan)
    left = outputs.astype(np.int64).copy()
    queues = _Queues([], deque(), prompts.astype(np.int64).copy())
    clock = busy = batches = 0.0
    started = 0
    for _ in range(MAX_STEPS):
        if not (queues.decoding or queues.due):
            if started >= n:
                break
            clock = max(clock, float(ready[started]))
        while started < known and ready[started] <= clock:
            queues.due.append(started)
            started += 1
        running, stalled, opened = queues.decodes(cache, min(max_seqs, budget_tokens))
        chunks = queues.prompts(cache, opened, budget_tokens - len(running), max_seqs - len(running))
        if not running and not chunks:
            queues.throw_out(cache)
            continue
        n_decodes, context = len(running), float(cache.tokens[running].sum())
        jump = 1
        duration = step_s(sum(size for _, size in chunks), n_decodes, context)
        if not chunks:
            # blocks last for at least this many steps of all that run
            each = 0 if stalled else (cache.free - opened) // n_decodes
            lasting = int(np.where(cache.room(running) > 0, cache.room(running), block_tokens).min())
            jump = min(int(left[running].min()), lasting + each * block_tokens)
            if started < known and ready[started] > clock:
                jump = max(1, min(jump, math.ceil((ready[started] - clock) / duration)))
            duration = step_s(0, n_decodes, context + n_decodes * jump / 2) * jump
        clock += duration
        busy += duration
        cache.grow(running, jump)
        left[running] -= jump
        ended = []
        for request, size in chunks:
            cache.grow([request], size)
            queues.to_compute[request] -= size
            if queues.to_compute[request] == 0:
                queues.due.remove(request)
                left[request] -= 1
                ended.append(request)
                if np.isnan(first[request]):
                    first[request] = clock
        half_way = int(bool(queues.due) and cache.tokens[queues.due[0]] > 0)
        batches += duration * (n_decodes + len(ended) + half_way)
        queues.decoding = stalled + [r for r in (*running, *ended) if left[r] > 0]
        for request in (*running, *ended):
            if left[request] <= 0:
                done[request] = clock
                cache.release(request)
                if arrivals is None and known < n:
                    ready[known] = clock
                    known += 1
    served = np.flatnonzero(np.isfinite(done))
    ordered = served[int(len(served) * WARMUP_FRAC) :]
    gaps = np.maximum(outputs[ordered] - 1, 1)
    return Served(
        ttft_s=first[ordered] - ready[ordered],
        tpot_s=(done[ordered] - first[ordered]) / gaps,
        e2e_s=done[ordered] - ready[ordered],
        n_output_tokens=int(outputs[served].sum()),
        n_prompt_tokens=int(prompts[served].sum()),
        duration_s=clock,
        mean_batch=batches / busy if busy else 0.0,
        n_requests=len(served),
        busy_frac=busy / clock if clock else 0.0,
    )
