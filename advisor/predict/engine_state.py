"""What one simulated engine keeps: requests, limits, batches in flight, totals of the work done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop
from math import exp

from advisor.laws.kv import KvGroups, held_blocks
from advisor.laws.throttle import mean_stretch
from advisor.predict.gemm import TILE_ROWS
from advisor.predict.step import TERMS, StepCost

ONE_GROUP = KvGroups(n_layers=1, n_full=1, n_sliding=0)
"""All layers alike: one block table a sequence."""


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
    joined_tokens: int = 0
    """tokens that it held when its prompt was complete, 0 before"""
    opens: int = 1
    """blocks that it then takes at the begin of each, what it gives back deducted"""


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
    reserves_full_prompt: bool = True
    graph_sizes: tuple[int, ...] = ()
    tokens_per_step: float = 1.0
    verify_tokens: int = 1
    shared_prefix_blocks: int = 0
    graph_wait_frac: float = 0.0
    """Share of a running decode graph's rest that a step with prompts waits for before its launch goes on."""
    launch_paces: tuple[float, ...] = ()
    """Time of a launch over its mean, turn after turn (`pace.paces`), where prompts join decodes; none: always 1."""
    pace_s: float = 1.0
    """How long a turn lasts."""
    cold_heads: frozenset[int] = frozenset()
    """Kernels of the LM head (`head_of`) that this process is yet to load, as in a fresh engine's first bursts."""
    cold_rows: int = 0
    """Tokens of the smallest step whose matrix kernels this process is yet to load (`has_new_rows`); 0: none."""
    kv_groups: KvGroups = ONE_GROUP
    """Block tables of a sequence; those of layers that see a window give back what it has passed."""
    window_tokens: int = 0
    hot_context_tokens: float = 0.0
    """Context tokens of each decode that cost no memory traffic, because others read the same prefix."""

    @property
    def cache_tokens(self) -> int:
        """Return the tokens that all blocks hold while no window is passed."""
        return self.n_kv_blocks * self.kv_block_tokens // self.kv_groups.n_tables

    @property
    def queues_empty_batches(self) -> bool:
        """Return whether the turn of a group that has nobody is queued like any other: a pipeline, scheduled ahead."""
        return self.n_in_flight > self.pp > 1

    def blocks_held(self, n_tokens: int) -> int:
        """Return the blocks of a sequence of so many tokens."""
        return held_blocks(n_tokens, self.kv_block_tokens, self.kv_groups, self.window_tokens)

    def blocks_of(self, n_tokens: int, sequence: Sequence_) -> int:
        """Return the blocks of a sequence of so many tokens beyond those that it shares with others."""
        size, joined = self.kv_block_tokens, sequence.joined_tokens
        if self.kv_groups.n_sliding == 0:
            blocks = -(-n_tokens // size)
        elif n_tokens <= joined or not joined:
            blocks = self.blocks_held(n_tokens)
        else:
            blocks = self.blocks_held(joined) + sequence.opens * (-(-n_tokens // size) - -(-joined // size))
        blocks -= sequence.shared_blocks
        return blocks if blocks > 0 else 0

    def opens(self, n_tokens: int) -> int:
        """Return how many blocks more a sequence of so many tokens takes with each that it begins.

        One that has not passed its window yet is taken never to pass it: its tables then hold more than they need to.
        """
        groups = self.kv_groups
        return groups.n_full + groups.n_sliding * (n_tokens <= self.window_tokens)


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
    expert_reads: float = 0.0
    """the shares of a layer's experts that the steps touched, summed over steps"""
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


def head_of(n_sampled: int) -> int:
    """Return which kernel computes the logits of so many sequences; 0 for those that a start-up itself has loaded.

    vLLM captures its CUDA graphs without the LM head, so cuBLAS loads a kernel when a batch first needs it (CUDA's lazy
    loading). Seen in three instrumented starts of vLLM 0.26.0, 8B bf16 (25 November): each of these ranges once.
    """
    if n_sampled <= 8 or n_sampled > MOST_COLD or n_sampled == 129:
        return 0
    if n_sampled > 129:
        return 17
    return -(-n_sampled // 8) if n_sampled <= 80 or n_sampled > 112 else -(-n_sampled // 16) * 2


MOST_COLD = 192
"""Largest number of sequences whose kernel a start-up leaves to be loaded."""


def heads_beyond(n_most: int) -> frozenset[int]:
    """Return the kernels that an engine has yet to load which has run up to `n_most` sequences at once."""
    return frozenset(head_of(n) for n in range(n_most + 1, MOST_COLD + 1)) - {0}


LOAD_HEAD_S = 0.012
"""What loading one takes on an idle GPU [s]: 10 to 14 ms in the same starts. A busy one is waited for first."""


LOAD_ROWS_S = 0.009
"""What loading the matrix kernels of a first odd number of rows takes [s]: by so much the first of several equal
prompts of 600 to 900 tokens came later than the others, in the median of 31 fresh starts of bf16 models."""

MOST_COLD_ROWS = 2048
"""From there on the kernels are those that the memory profile of a start-up, a full budget of tokens, has loaded."""


def has_new_rows(n_tokens: int, cold_rows: int) -> bool:
    """Return whether a step needs matrix kernels that a start-up leaves to be loaded.

    The library picks kernels by the number of rows: those of the CUDA graphs and of multiples of the tile are there.
    """
    return cold_rows <= n_tokens <= MOST_COLD_ROWS and n_tokens % TILE_ROWS > 0


EMPTY_BATCH_S = 0.001
"""How long the engine core sleeps after a batch that holds nothing (vLLM 0.26.0, v1/engine/core.py): in a burst on a
pipeline, the requests that arrive meanwhile are the second group."""


class Stage:
    """One pipeline stage: when its GPUs and its worker are free, and how hot it ran (power over limit, averaged)."""

    __slots__ = ("free_s", "is_first", "power_ratio", "worker_free_s")

    def __init__(self) -> None:
        self.is_first = False
        self.free_s = 0.0
        self.power_ratio = 0.0
        self.worker_free_s = 0.0


class Part:
    """Neighbouring pipeline stages of equal cost: one clock, asked once a step."""

    __slots__ = ("clock", "exponent", "send_s", "stages", "throttle_s")

    def __init__(self, cost: StepCost, n_stages: int, send_s: float) -> None:
        self.clock = cost.clock()
        self.throttle_s = cost.throttle_s
        self.exponent = cost.clock_exponent
        self.send_s = send_s
        self.stages = [Stage() for _ in range(n_stages)]

    def run(
        self, ready_s: float, full_s: float, ratio: float, launched_s: float, host_s: float, prepare_s: float
    ) -> tuple[float, float, float, float, float]:
        """Run a step through the stages; return when the last begins and ends it, the seconds of all, the number of
        steps at full clock that they are worth, and when the last has been launched.

        ready_s    : when the first could begin; it may still be busy
        full_s     : a stage's time at full clock [s]
        ratio      : the power it draws meanwhile, over the limit; above 1 the clock falls (`laws.throttle`)
        launched_s : when the launch of the engine's first stage is over, or of the stage before these; no stage ends
                     earlier than its launch
        host_s, prepare_s : what a launch takes, and its part before the first kernel [s]; a later stage's worker begins
                     when the stage before has been launched: it waits for the shapes of what it will receive
        """
        begin_s = end_s = busy_s = weight = 0.0
        kept = exp(-full_s / self.throttle_s)
        for stage in self.stages:
            if not stage.is_first:
                launch_s = launched_s if launched_s > stage.worker_free_s else stage.worker_free_s
                stage.worker_free_s = launched_s = launch_s + host_s
                if launch_s + prepare_s > ready_s:
                    ready_s = launch_s + prepare_s
            begin_s, old = stage.free_s, stage.power_ratio
            if ready_s > begin_s:
                old *= exp((begin_s - ready_s) / self.throttle_s)
                begin_s = ready_s
            new = stage.power_ratio = ratio + (old - ratio) * kept
            if old > 1.0 or new > 1.0:
                stretch = mean_stretch(old, new, ratio, full_s / self.throttle_s, self.exponent)
                end_s = begin_s + full_s * stretch
                weight += stretch
            else:
                end_s = begin_s + full_s
                weight += 1.0
            if launched_s > end_s:
                end_s = launched_s
            stage.free_s = end_s
            busy_s += end_s - begin_s
            ready_s = end_s + self.send_s
        return begin_s, end_s, busy_s, weight, launched_s

    def heat(self, ratio: float, seconds: float) -> None:
        """Let the first stage draw `ratio` of the power limit for `seconds`."""
        stage = self.stages[0]
        stage.power_ratio = ratio + (stage.power_ratio - ratio) * exp(-seconds / self.throttle_s)


Step = tuple[float, Sequence["Sequence_"], Sequence["Sequence_"]]
"""A step in flight: when it ends [s], the prompts that are complete with it, the requests that are done with it."""


@dataclass(slots=True)
class Group:
    """Decoding sequences that run in the same batches (one group without pipeline parallelism)."""

    n: int = 0
    opens: int = 0
    """the sequences, each as often as it opens blocks at once"""
    context: float = 0.0
    steps: int = 0
    last_end_s: float = 0.0
    residues: list[int] = field(default_factory=list)
    finish: list[tuple[int, int, Sequence_]] = field(default_factory=list)

    def blocks_opened(self, n_steps: int, limits: EngineLimits) -> int:
        """Return how many KV blocks the sequences open in their next `n_steps` steps."""
        tokens, per_step = limits.kv_block_tokens, limits.tokens_per_step
        if per_step != 1.0:
            rate = self.opens * per_step / tokens
            return int(rate * (self.steps + n_steps)) - int(rate * self.steps)
        if n_steps == 1 < tokens:
            return self.residues[-self.steps % tokens]
        opened = n_steps // tokens * self.opens
        for step in range(self.steps, self.steps + n_steps % tokens):
            opened += self.residues[-step % tokens]
        return opened

    def join(self, sequence: Sequence_, slot: int) -> None:
        """Count a sequence in that opens blocks from now on; this is group number `slot`."""
        sequence.group = slot
        self.n += 1
        self.opens += sequence.opens
        self.residues[sequence.residue] += sequence.opens

    def leave(self, sequence: Sequence_) -> None:
        """Count a sequence out."""
        sequence.group = -1
        self.n -= 1
        self.opens -= sequence.opens
        self.residues[sequence.residue] -= sequence.opens

    def evict(self, victim: Sequence_, tokens_per_step: float) -> int:
        """Take a decode out before its end; note what it must compute again, and return the tokens that it held."""
        left = max(1, int((victim.finish_step - self.steps) * tokens_per_step))
        victim.done_tokens = max(1, victim.output_tokens - left)
        held = victim.prompt_tokens + victim.done_tokens - 1
        self.leave(victim)
        self.context = self.context - held if self.n else 0.0
        self.finish = [entry for entry in self.finish if entry[2] is not victim]
        heapify(self.finish)
        victim.to_compute_tokens = victim.prompt_tokens + victim.done_tokens - victim.cached_tokens
        return held

    def done(self) -> list[Sequence_]:
        """Take out the sequences that have all their tokens, and return them."""
        finished = []
        while self.finish and self.finish[0][0] <= self.steps:
            sequence = heappop(self.finish)[2]
            self.leave(sequence)
            self.context -= sequence.prompt_tokens + sequence.output_tokens - 1
            finished.append(sequence)
        if not self.n:
            self.context = 0.0
        return finished
