"""A slow, plain scheduler to judge the fast one by: one loop, token lists, numbered blocks, no closed form.

Written from vLLM 0.26.0 (v1/core/sched/scheduler.py `schedule`, `_preempt_request`, `update_from_output`;
async_scheduler.py; v1/engine/core.py `step` and `step_with_batch_queue`), one pipeline stage, first come first served.
Time comes from a cost object with `gpu_s(n_prefill, n_pairs, n_decode, n_context, n_sampled)`, `host_s(...)` and
`prepare_s(n_sampled)`, the part of the host's time before the first kernel.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """One request: its tokens so far, the blocks that it holds, the tokens that are still on the GPU."""

    index: int
    arrival_s: float
    prompt: int
    max_tokens: int
    cached: int = 0
    shared_blocks: int = 0
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    target: int = 0
    placeholders: int = 0
    status: str = "waiting"
    first_s: float = -1.0
    end_s: float = -1.0

    def __post_init__(self) -> None:
        self.tokens = list(range(self.prompt))

    @property
    def received(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass
class Batch:
    requests: list[tuple[Request, bool]]
    end_s: float


@dataclass
class Oracle:
    """The engine. `arrivals` is a heap of (time, index, request); `on_end` may add to it (closed loop)."""

    cost: Any
    budget: int
    max_num_seqs: int
    n_blocks: int
    block_tokens: int
    n_in_flight: int
    blocks_on_launch: bool = False
    reserves_full_prompt: bool = True
    graph_wait_frac: float = 0.0
    cold: set[int] = field(default_factory=set)
    head_of: Any = None
    load_s: float = 0.0
    last_was_graph: bool = False
    now_s: float = 0.0
    gpu_free_s: float = 0.0
    host_free_s: float = 0.0
    n_steps: int = 0
    n_preemptions: int = 0
    n_tokens: int = 0
    most_blocks: int = 0

    def __post_init__(self) -> None:
        self.free = list(range(self.n_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.queue: deque[Batch] = deque()

    # ---- blocks ----
    def short_of(self, request: Request, n_tokens: int) -> int:
        wanted = -(-n_tokens // self.block_tokens) - request.shared_blocks
        return max(0, wanted - len(request.blocks))

    def allocate(self, request: Request, n_tokens: int) -> bool:
        n = self.short_of(request, n_tokens)
        if n > len(self.free):
            return False
        for _ in range(n):
            request.blocks.append(self.free.pop())
        self.most_blocks = max(self.most_blocks, self.n_blocks - len(self.free))
        return True

    def release(self, request: Request) -> None:
        self.free += request.blocks
        request.blocks = []
        assert len(set(self.free)) == len(self.free) <= self.n_blocks

    # ---- one call of schedule() ----
    def schedule(self) -> tuple[list[tuple[Request, int]], bool]:
        budget = self.budget
        scheduled: list[tuple[Request, int]] = []
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            i += 1
            if request.placeholders and (
                request.computed + 2 - request.placeholders >= request.prompt + request.max_tokens
            ):
                continue  # its last token is on the way
            new = min(len(request.tokens) + request.placeholders - request.computed, budget)
            if new == 0:
                continue
            is_given = self.allocate(request, request.computed + new)
            while not is_given:
                victim = self.running.pop()
                self.preempt(victim)
                preempted = True
                if victim is request:
                    break
                is_given = self.allocate(request, request.computed + new)
            if not is_given:
                break
            scheduled.append((request, new))
            budget -= new
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            new = min(len(request.tokens) - request.cached, budget)
            if self.reserves_full_prompt and self.short_of(request, len(request.tokens)) > len(self.free):
                break
            if not self.allocate(request, request.cached + new):
                break
            self.waiting.popleft()
            request.computed = request.cached
            request.target = len(request.tokens)
            request.status = "running"
            self.running.append(request)
            scheduled.append((request, new))
            budget -= new
        return scheduled, preempted

    def preempt(self, victim: Request) -> None:
        self.release(victim)
        victim.computed = 0
        victim.status = "preempted"
        self.waiting.appendleft(victim)
        self.n_preemptions += 1

    # ---- time ----
    def launch(self, scheduled: list[tuple[Request, int]]) -> None:
        n_prefill = n_decode = n_context = n_sampled = 0
        pairs = 0.0
        members: list[tuple[Request, bool]] = []
        for request, new in scheduled:
            if request.computed < request.target:
                n_prefill += new
                pairs += sum(request.computed + k + 1 for k in range(new))
            else:
                n_decode += 1
                n_context += request.computed + 1
            request.computed += new
            samples = request.computed >= request.target
            if samples:
                n_sampled += 1
                request.placeholders += 1
            members.append((request, samples))
            self.n_tokens += new
        launch_s = max(self.now_s, self.host_free_s)
        if n_prefill and self.last_was_graph:
            launch_s += self.graph_wait_frac * max(0.0, self.gpu_free_s - launch_s)
        self.last_was_graph = not n_prefill
        self.host_free_s = launch_s + self.cost.host_s(n_prefill, n_decode, n_sampled)
        begin_s = max(launch_s + self.cost.prepare_s(n_sampled), self.gpu_free_s)
        gpu_s = self.cost.gpu_s(n_prefill, pairs, n_decode, n_context, n_sampled)
        self.gpu_free_s = max(begin_s + gpu_s, self.host_free_s)
        if self.cold and self.head_of(n_sampled) in self.cold:
            self.cold.remove(self.head_of(n_sampled))
            self.host_free_s = max(self.host_free_s, self.gpu_free_s) + self.load_s
        self.queue.append(Batch(members, self.gpu_free_s))
        self.n_steps += 1
        if self.blocks_on_launch:
            self.now_s = self.host_free_s

    def collect(self) -> list[Request]:
        batch = self.queue.popleft()
        self.now_s = max(self.now_s, batch.end_s)
        ended = []
        for request, samples in batch.requests:
            if not samples:
                continue
            request.placeholders -= 1
            request.tokens.append(-1)
            if request.first_s < 0:
                request.first_s = self.now_s
            if request.received == request.max_tokens:
                request.end_s = self.now_s
                if request.status == "running":
                    self.running.remove(request)
                else:
                    self.waiting.remove(request)  # preempted while its last token was on the way
                self.release(request)
                request.status = "done"
                ended.append(request)
        return ended

    def run(self, arrivals: list[tuple[float, int, Request]], on_end: Any = None) -> None:
        heapq.heapify(arrivals)
        while True:
            while arrivals and arrivals[0][0] <= self.now_s:
                self.waiting.append(heapq.heappop(arrivals)[2])
            if not (self.waiting or self.running or self.queue):
                if not arrivals:
                    return
                self.now_s = arrivals[0][0]
                continue
            if len(self.queue) < self.n_in_flight and (self.waiting or self.running):
                scheduled, preempted = self.schedule()
                if scheduled:
                    self.launch(scheduled)
                    continue
                if preempted and not self.queue:
                    continue
            assert self.queue, "nothing can run: a request larger than the cache"
            for request in self.collect():
                if on_end is not None:
                    for entry in on_end(request):
                        heapq.heappush(arrivals, entry)
