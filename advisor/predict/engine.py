"""An event-driven copy of the vLLM V1 scheduler for one replica.

What is copied (vLLM 0.26.0: v1/core/sched/scheduler.py, async_scheduler.py, v1/engine/core.py):
decodes first, then the prompt chunk in progress, then waiting requests while token budget, sequence slots and KV blocks
last; a request is admitted only when blocks for its whole prompt are free; blocks are taken as tokens come and the
newest request is preempted and recomputed when none is left; and *several batches in flight*: while step k runs, step
k+1 is fixed already, so that what arrives during k starts in k+2.

Stretches in which nothing changes but the contexts (same decodes, no arrival, nobody to admit) are summed in closed
form, so the cost grows with events, not with tokens.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from itertools import groupby

from advisor.errors import DomainError
from advisor.predict.clock import Decodes
from advisor.predict.engine_state import (
    EMPTY_BATCH_S,
    LOAD_HEAD_S,
    LOAD_ROWS_S,
    EngineLimits,
    Group,
    Part,
    Sequence_,
    Step,
    Work,
    has_new_rows,
    head_of,
)
from advisor.predict.front import Front
from advisor.predict.ledger import MAX_NUMBERS, NO_GAP, Ledger
from advisor.predict.step import StepCost
from advisor.predict.stretch import fast_forward, run_decodes

ENDLESS = -1
WAITING_SCORE = 4  # vLLM's weight of a waiting request against a running one


class Engine:
    """One replica: give it requests with `enqueue`, let time pass with `advance`.

    `stages` is one `StepCost` a pipeline stage; `send_s` the time of a hand-over between stages.
    """

    def __init__(self, stages: Sequence[StepCost], limits: EngineLimits, send_s: float = 0.0) -> None:
        self.parts = [Part(cost, len([*same]), send_s) for cost, same in groupby(stages)]
        self.parts[0].stages[0].is_first = True
        self.first, self.limits = self.parts[0].stages[0], limits
        self.laws: dict[int, list[tuple[Decodes, Part]]] = {}
        self.has_windows = limits.kv_groups.n_sliding > 0
        self.cold, self.cold_rows = set(limits.cold_heads), limits.cold_rows
        self.has_stood = False
        """whether the last launch waited for the GPU, which is therefore idle"""
        self.now_s = 0.0
        self.paces, self.pace_s, self.first_turn_s = limits.launch_paces, limits.pace_s, -1.0
        self.front: Front | None = None
        self.ledger = Ledger([part.clock for part in self.parts], limits)
        self.waiting: deque[Sequence_] = deque()
        self.running: list[Sequence_] = []
        self.n_running = 0
        self.free_blocks = limits.n_kv_blocks - limits.shared_prefix_blocks
        self.partial: Sequence_ | None = None
        self.in_flight: deque[Step] = deque()
        self.launch_free_s = 0.0
        self.is_graph_running = False
        self.group_ready_s = [0.0] * limits.pp
        self.groups = [Group(residues=[0] * limits.kv_block_tokens) for _ in range(limits.pp)]
        self.step_number = 0
        self.timeline: list[tuple[float, int, int, int]] = []
        self.sample_every_s = 0.0
        self.takes_runs = all(part.clock.is_linear for part in self.parts)
        self._next_sample_s = 0.0

    def enqueue(self, sequence: Sequence_) -> None:
        """Add a request that has arrived; the next scheduling decision sees it."""
        sequence.to_compute_tokens = max(1, sequence.prompt_tokens - sequence.cached_tokens)
        self.waiting.append(sequence)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing waits, runs or is in flight."""
        return not (self.waiting or self.n_running or self.in_flight)

    @property
    def work(self) -> Work:
        """Return the totals of the work done so far."""
        return self.ledger.work()

    @property
    def load_score(self) -> int:
        """Return vLLM's data-parallel balancing score, ``4 waiting + running`` (v1/engine/core_client.py)."""
        return WAITING_SCORE * len(self.waiting) + self.n_running

    def advance(self, until_s: float) -> list[tuple[Sequence_, float]]:
        """Make the scheduling decisions before `until_s`; return the requests that finished, as soon as any did.

        An empty list means that the next decision is at or after `until_s` (everything that arrives by then must be
        enqueued first) or that the engine has nothing to do.
        """
        n_in_flight = self.limits.n_in_flight
        in_flight = self.in_flight
        only = self.groups[0] if self.limits.pp == 1 else None
        while self.now_s < until_s:
            if len(in_flight) < n_in_flight and (self.waiting or self.n_running):
                n_runs = 0
                if self.partial is not None:
                    pass
                elif only is None:
                    if self.takes_runs and not (self.waiting and self.n_running < self.limits.max_num_seqs):
                        n_runs = run_decodes(self, until_s, ENDLESS)
                elif only.n and not (self.waiting and self._can_admit(self._budget(only))):
                    if only.finish[0][0] > only.steps + 2:
                        fast_forward(self, only, until_s)
                    if self.takes_runs and len(in_flight) < n_in_flight:
                        n_runs = run_decodes(self, until_s, 1)
                if self.now_s >= until_s:  # decodes led up to the arrival: what is in flight stays there
                    return []
                if len(in_flight) < n_in_flight and (n_runs or self._schedule()):
                    continue
            if not in_flight:
                return []
            end_s, firsts, finished = in_flight.popleft()
            if end_s > self.now_s:
                self.now_s = end_s
            if (finished or firsts) and (done := self.process(self.now_s, firsts, finished)):
                return done
        return []

    def sample_every(self, seconds: float) -> None:
        """Note running, waiting and occupied blocks at most so often [s]; runs of decodes are then taken in steps."""
        self.sample_every_s = seconds
        self.takes_runs = False

    def idle_until(self, time_s: float) -> None:
        """Move the clock of an idle engine to an arrival."""
        if time_s > self.now_s:
            self.now_s = time_s

    def process(
        self, end_s: float, firsts: Sequence[Sequence_], finished: Sequence[Sequence_]
    ) -> list[tuple[Sequence_, float]]:
        """Hand out the tokens of a step that has ended; return the requests that finished with it, and when."""
        if self.front:
            end_s = self.front.tokens.sent_s(end_s)
        for sequence in firsts:
            if sequence.first_token_s < 0:
                sequence.first_token_s = end_s
        if not finished:
            return []
        for sequence in finished:
            if sequence.is_running:
                self._release(sequence, sequence.prompt_tokens + sequence.output_tokens - 1)
        if len(self.running) > 2 * self.n_running + 64:
            self.running = [s for s in self.running if s.is_running]
        if len(self.ledger.rows) > MAX_NUMBERS:
            self.ledger.settle()
        return [(sequence, end_s) for sequence in finished]

    def _release(self, sequence: Sequence_, n_tokens: int) -> None:
        sequence.is_running = False
        self.n_running -= 1
        self.free_blocks += self.limits.blocks_of(n_tokens, sequence)

    def _schedule(self) -> bool:
        """Launch the next step that has something to compute; return whether there is one."""
        n_preemptions = self.ledger.n_preemptions
        number = self.step_number
        for _ in self.groups:
            number += 1
            if self._step(number):
                return True
            if self.in_flight and self.limits.queues_empty_batches:
                self.step_number = number
                self.in_flight.append((self.in_flight[-1][0], (), ()))
                self.now_s += EMPTY_BATCH_S
                return True
        # blocks given back in an empty step can be taken in the next
        return n_preemptions != self.ledger.n_preemptions and not self.in_flight

    def _step(self, number: int) -> bool:
        """Fill and launch step `number`: decodes, the prompt in progress, then the queue; False when it is empty."""
        limits = self.limits
        slot = number % limits.pp
        group = self.groups[slot]
        n_preemptions = self.ledger.n_preemptions
        if group.n:
            needed = group.blocks_opened(1, limits)
            if needed <= self.free_blocks:
                self.free_blocks -= needed
            else:
                self._take_decode_blocks(group)
        n_decode = group.n
        n_tokens = n_decode * limits.verify_tokens
        firsts: list[Sequence_] = []
        n_prefill = 0
        pairs = 0.0
        if self.waiting or self.partial is not None:
            n_prefill, pairs = self._take_prompts(limits.max_num_batched_tokens - n_tokens, n_preemptions, firsts)
        if n_prefill:
            n_padded = n_tokens
            n_sampled = n_decode + len(firsts)
        elif n_decode:
            n_padded = self.graph(n_tokens)
            n_sampled = n_decode
        else:
            return False
        self.step_number = number
        context = group.context + n_decode
        if limits.hot_context_tokens and n_decode:
            context -= (n_decode - 1) * limits.hot_context_tokens
        launch_s = self.now_s if self.now_s > self.launch_free_s else self.launch_free_s
        if n_prefill and self.is_graph_running and self.first.free_s > launch_s:
            launch_s += limits.graph_wait_frac * (self.first.free_s - launch_s)
        self.is_graph_running = not n_prefill
        ready_s = self.group_ready_s[slot]
        begin_s = end_s = busy_s = launched_s = 0.0
        weights: list[float] = []
        pace, load_s = 1.0, 0.0
        if n_prefill and self.cold_rows and has_new_rows(n_prefill + n_tokens, self.cold_rows):
            self.cold_rows, load_s = 0, LOAD_ROWS_S
        if n_prefill and n_decode and self.paces:
            if self.first_turn_s < 0:
                self.first_turn_s = launch_s
            pace = self.paces[int((launch_s - self.first_turn_s) / self.pace_s) % len(self.paces)]
        for part in self.parts:
            full_s, ratio, host_s, prepare_s = part.clock.step(n_prefill, pairs, n_tokens, n_padded, context, n_sampled)
            if pace != 1.0:
                host_s = prepare_s + (host_s - prepare_s) * pace
            if load_s:
                host_s, prepare_s = host_s + load_s, prepare_s + load_s
            if not weights:
                self.launch_free_s = launched_s = launch_s + host_s
                if launch_s + prepare_s > ready_s:
                    ready_s = launch_s + prepare_s
            begin_s, end_s, spent_s, weight, launched_s = part.run(
                ready_s, full_s, ratio, launched_s, host_s, prepare_s
            )
            ready_s = end_s + part.send_s
            busy_s += spent_s
            weights.append(weight)
        self.group_ready_s[slot] = ready_s
        self.has_stood = False
        if self.cold and (head := head_of(n_sampled)) in self.cold:
            self.cold.remove(head)
            last = self.parts[-1].stages[-1]
            if last.is_first:
                self.launch_free_s = max(self.launch_free_s, end_s) + LOAD_HEAD_S
                self.has_stood = True
            else:  # the last stage's worker alone stands until the GPU is idle
                last.worker_free_s = max(last.worker_free_s, end_s) + LOAD_HEAD_S

        finished: Sequence[Sequence_] = ()
        gap_s = NO_GAP
        if n_decode:
            gap_s = end_s - (group.last_end_s if group.steps else begin_s)
            group.steps += 1
            group.context += n_decode * limits.tokens_per_step
            if group.finish[0][0] <= group.steps:
                finished = group.done()
        group.last_end_s = end_s
        self.ledger.rows += (1.0, n_prefill, pairs, n_decode, context, n_sampled, gap_s, busy_s / limits.pp, *weights)
        if firsts and (short := [s for s in firsts if self._join(s, group, slot)]):
            finished = [*finished, *short]
        self.in_flight.append((end_s, firsts, finished))
        if self.front:
            self.front.step(end_s, end_s, 1, n_sampled)
        if self.sample_every_s:
            self.sample(end_s)
        if limits.blocks_on_launch:
            self.now_s = self.launch_free_s
        return True

    def _take_prompts(self, budget: int, n_preemptions: int, firsts: list[Sequence_]) -> tuple[int, float]:
        """Fill a step's token budget with prompts; return their tokens and pairs, and note which are complete."""
        n_prefill = 0
        pairs = 0.0
        partial = self.partial
        if partial is not None and budget > 0:
            chunk = self._grow(partial, budget)
            if chunk:
                pairs += chunk * (partial.cached_tokens + partial.computed_tokens + 0.5 * (chunk + 1))
                n_prefill += chunk
                budget -= chunk
                self._after_chunk(partial, chunk, firsts)
            else:
                self._preempt()  # the newest request is the prompt itself: it gives its blocks back and starts again
        if self.partial is None and n_preemptions == self.ledger.n_preemptions:
            while self.waiting and self._can_admit(budget):
                chunk = min(self.waiting[0].to_compute_tokens, budget)
                sequence = self._admit(chunk)
                pairs += chunk * (sequence.cached_tokens + 0.5 * (chunk + 1))
                n_prefill += chunk
                budget -= chunk
                self._after_chunk(sequence, chunk, firsts)
        return n_prefill, pairs

    def _budget(self, group: Group) -> int:
        return self.limits.max_num_batched_tokens - group.n * self.limits.verify_tokens

    def _can_admit(self, budget: int) -> bool:
        if not self.waiting or budget <= 0 or self.n_running >= self.limits.max_num_seqs:
            return False
        head = self.waiting[0]
        first = head.to_compute_tokens
        if not self.limits.reserves_full_prompt:
            first = min(first, budget)
        return self.limits.blocks_of(head.cached_tokens + first, head) <= self.free_blocks

    def _admit(self, chunk: int) -> Sequence_:
        sequence = self.waiting.popleft()
        sequence.is_running = True
        sequence.computed_tokens = 0
        self.running.append(sequence)
        self.n_running += 1
        self.free_blocks -= self.limits.blocks_of(sequence.cached_tokens + chunk, sequence)
        return sequence

    def _grow(self, sequence: Sequence_, budget: int) -> int:
        """Take blocks for the next chunk of the prompt in progress; return the chunk, 0 when blocks are short."""
        chunk = min(sequence.to_compute_tokens - sequence.computed_tokens, budget)
        base = sequence.cached_tokens + sequence.computed_tokens
        needed = self.limits.blocks_of(base + chunk, sequence) - self.limits.blocks_of(base, sequence)
        if needed > self.free_blocks:
            return 0
        self.free_blocks -= needed
        return chunk

    def _after_chunk(self, sequence: Sequence_, chunk: int, firsts: list[Sequence_]) -> None:
        sequence.computed_tokens += chunk
        if sequence.computed_tokens >= sequence.to_compute_tokens:
            self.partial = None
            firsts.append(sequence)
        else:
            self.partial = sequence

    def _take_decode_blocks(self, group: Group) -> None:
        """Give each decode of this step its slot; preempt the newest request while blocks are short."""
        needed = group.blocks_opened(1, self.limits)
        while needed > self.free_blocks and self._preempt():
            needed = group.blocks_opened(1, self.limits)
        if needed > self.free_blocks:
            raise DomainError("a request needs more KV-cache blocks than the engine has")
        self.free_blocks -= needed

    def _preempt(self) -> bool:
        """Evict the newest request; it waits at the front and recomputes prompt and output so far.

        One whose last token is on the way loses its blocks as well, but has nothing left to compute.
        """
        while self.running and not self.running[-1].is_running:
            self.running.pop()
        if not self.running:
            return False
        victim = self.running.pop()
        self.ledger.n_preemptions += 1
        if victim is self.partial:
            self.partial = None
            self._release(victim, victim.cached_tokens + victim.computed_tokens)
        elif victim.group < 0:
            self._release(victim, victim.prompt_tokens + victim.output_tokens - 1)
            return True
        else:
            self._release(victim, self.groups[victim.group].evict(victim, self.limits.tokens_per_step))
        self.ledger.recomputed_tokens += victim.to_compute_tokens
        victim.computed_tokens = victim.joined_tokens = 0
        self.waiting.appendleft(victim)
        return True

    def graph(self, n: int) -> int:
        """Return the batch size of the CUDA graph that `n` decode tokens run in."""
        sizes = self.limits.graph_sizes
        return sizes[n] if n < len(sizes) else n

    def _join(self, sequence: Sequence_, group: Group, slot: int) -> bool:
        """Make a prefilled request a decode of `group`; return whether its first token was also its last."""
        held = sequence.prompt_tokens + sequence.done_tokens
        left = sequence.output_tokens - sequence.done_tokens - 1
        if left <= 0:
            return True
        sequence.finish_step = group.steps + math.ceil(left / self.limits.tokens_per_step)
        # after j further steps the request holds `held + j` tokens and opens a block when that is 1 modulo block size
        sequence.residue = (held - group.steps) % self.limits.kv_block_tokens
        if self.has_windows:
            sequence.joined_tokens, sequence.opens = held, self.limits.opens(held)
        group.join(sequence, slot)
        group.context += held
        heapq.heappush(group.finish, (sequence.finish_step, sequence.index, sequence))
        return False

    def sample(self, end_s: float) -> None:
        """Note running, waiting and occupied blocks for the timeline, when it is time for the next sample."""
        if end_s >= self._next_sample_s:
            self._next_sample_s = end_s + self.sample_every_s
            self.timeline.append((end_s, self.n_running, len(self.waiting), self.limits.n_kv_blocks - self.free_blocks))
