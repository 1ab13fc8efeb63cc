"""What one simulated engine keeps: requests, limits, batches in flight, totals of the work done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from advisor.predict.clock import Clock
from advisor.predict.step import TERMS


@dataclass(slots=True)
class Sequence_:
    """One request inside the engine; times in engine time [s]."""

    index: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    computed_tokens: int = 0
    to_compute_tokens: int = 0
    done_tokens: int = 0
    first_token_s: float = -1.0
    finish_step: int = 0
    residue: int = 0
    group: int = -1
    shared_blocks: int = 0
    is_running: bool = False


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the scheduler must respect."""

    max_num_batched_tokens: int
    max_num_seqs: int
    n_kv_blocks: int
    kv_block_tokens: int = 16
    n_in_flight: int = 2
    pp: int = 1
    blocks_on_launch: bool = False
    core_s: float = 1e-3
    reserves_full_prompt: bool = True
    graph_sizes: tuple[int, ...] = ()
    tokens_per_step: float = 1.0
    verify_tokens: int = 1
    shared_prefix_blocks: int = 0
    graph_wait_frac: float = 0.0
    """Share of a running decode graph's rest that a step with prompts waits for before its launch goes on."""
    hot_context_tokens: float = 0.0
    """Context tokens of each decode that cost no memory traffic, because others read the same prefix."""


@dataclass(slots=True)
class Work:
    """Totals that power, utilisation and breakdowns are computed from."""

    n_steps: float = 0.0
    prefill_steps: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    context_tokens: float = 0.0
    sampled: float = 0.0
    busy_s: float = 0.0
    n_preemptions: int = 0
    recomputed_tokens: float = 0.0
    terms: list[float] = field(default_factory=lambda: [0.0] * len(TERMS))

    def add(self, n_steps: float, tokens: float, pairs: float, context: float, sampled: float, busy_s: float) -> None:
        """Add `n_steps` steps; the other arguments are totals over them."""
        self.n_steps += n_steps
        self.tokens += tokens
        self.pairs += pairs
        self.context_tokens += context
        self.sampled += sampled
        self.busy_s += busy_s

    def add_terms(self, terms: Sequence[float], n_steps: float) -> None:
        """Add the GPU time of `n_steps` equal steps, term by term."""
        mine = self.terms
        for i, term in enumerate(terms):
            mine[i] += term * n_steps


class Stage:
    """One pipeline stage: when its GPUs are free, and how hot they ran lately."""

    __slots__ = ("clock", "free_s", "power_ratio")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.free_s = 0.0
        self.power_ratio = 0.0

    def begin(self, ready_s: float, full_s: float, ratio: float) -> tuple[float, float]:
        """Return when a step that is ready at `ready_s` begins [s], and by how much the power limit stretches it.

        full_s : its time at full clock [s]
        ratio  : the power it draws meanwhile, over the limit
        """
        clock, begin_s = self.clock, self.free_s
        if ready_s > begin_s:
            self.power_ratio *= math.exp((begin_s - ready_s) / clock.throttle_s)
            begin_s = ready_s
        mean = self.heat(ratio, full_s)
        return begin_s, clock.stretch(mean) if mean > 1.0 else 1.0

    def heat(self, ratio: float, seconds: float) -> float:
        """Draw `ratio` of the power limit for `seconds`; return the average that the limiter sees."""
        old = self.power_ratio
        new = self.power_ratio = ratio + (old - ratio) * math.exp(-seconds / self.clock.throttle_s)
        return 0.5 * (old + new)


@dataclass(slots=True)
class Step:
    end_s: float
    firsts: list[Sequence_]
    finished: list[Sequence_]


@dataclass(slots=True)
class Group:
    """Decoding sequences that run in the same batches (one group without pipeline parallelism)."""

    n: int = 0
    context: float = 0.0
    steps: int = 0
    last_end_s: float = 0.0
    residues: list[int] = field(default_factory=list)
    finish: list[tuple[int, int, Sequence_]] = field(default_factory=list)

    def blocks_opened(self, n_steps: int, limits: EngineLimits) -> int:
        """Return how many KV blocks the sequences open in their next `n_steps` steps."""
        tokens, per_step = limits.kv_block_tokens, limits.tokens_per_step
        if per_step != 1.0:
            rate = self.n * per_step / tokens
            return int(rate * (self.steps + n_steps)) - int(rate * self.steps)
        if n_steps == 1 < tokens:
            return self.residues[-self.steps % tokens]
        opened = n_steps // tokens * self.n
        for step in range(self.steps, self.steps + n_steps % tokens):
            opened += self.residues[-step % tokens]
        return opened
