"""FastGen's scheduler: by hand, against a step-by-step copy, with a full cache, and at its edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.predict.batching import Served
from advisor.predict.splitfuse import serve_splitfuse

Step = Callable[[float, float, float], float]


def splitfuse(
    prompts: list[int],
    outputs: list[int],
    *,
    clients: int,
    budget: int = 8,
    kv: float = 1e9,
    block: int = 1,
    step: Step = lambda prefill, decodes, context: 1.0,
    arrivals: list[float] | None = None,
) -> Served:
    return serve_splitfuse(
        np.array(prompts),
        np.array(outputs),
        arrivals=None if arrivals is None else np.array(arrivals),
        clients=clients,
        budget_tokens=budget,
        max_seqs=64,
        kv_tokens=kv,
        step_s=step,
        block_tokens=block,
    )


class Request:
    """A request of the step-by-step copy."""

    def __init__(self, prompt: int, output: int) -> None:
        self.pending, self.cached, self.blocks, self.answered, self.left = prompt, 0, 0, False, output


def step_by_step(
    prompts: list[int], outputs: list[int], *, budget: int, n_blocks: int, block: int, step: Step, max_seqs: int = 64
) -> float:
    """Return the time of one batch by MII's own loop, one step and one buffer at a time."""
    buffer = [Request(p, o) for p, o in zip(prompts, outputs, strict=True)]
    free, clock = n_blocks, 0.0
    while buffer:
        run: list[tuple[Request, int]] = []
        opened = 0
        for r in [r for r in buffer if r.answered][: min(max_seqs, budget)]:
            if r.blocks * block > r.cached:
                run.append((r, 1))
            elif opened < free:
                opened += 1
                run.append((r, 1))
        n_decodes, room = len(run), budget - len(run)
        for r in [r for r in buffer if not r.answered]:
            if free == 0 or len(run) >= max_seqs or room <= 0:
                break
            if r.pending > 1 and -(-(r.cached + r.pending) // block) - r.blocks > free - opened:
                break
            chunk = min(r.pending, room)
            more = max(0, -(-(r.cached + chunk) // block) - r.blocks)
            if more > free - opened:
                continue
            opened, room = opened + more, room - chunk
            run.append((r, chunk))
        if not run:
            last = [r for r in buffer if r.cached][-1]
            buffer.remove(last)
            last.pending += last.cached + last.answered
            free += last.blocks
            last.cached = last.blocks = 0
            last.answered = False
            buffer.append(last)
            continue
        context = sum(r.cached for r, _ in run[:n_decodes])
        clock += step(sum(size for _, size in run[n_decodes:]), n_decodes, context)
        chosen = [r for r, _ in run]
        rest = [r for r in buffer if r not in chosen]
        for i, (r, size) in enumerate(run):
            r.cached += size
            blocks = -(-r.cached // block)
            free -= blocks - r.blocks
            r.blocks = blocks
            r.pending -= 0 if i < n_decodes else size
            if i < n_decodes or r.pending == 0:
                r.answered = True
                r.left -= 1
                free += r.blocks if r.left == 0 else 0
        half_way = [r for r in chosen if not r.answered]
        buffer = half_way + rest + [r for r in chosen if r.answered and r.left > 0]
    return clock


def test_splitfuse_by_hand() -> None:
    # budget 8: prompt of 10 takes 8 + 2; then the first token; two more steps of decode
    served = splitfuse([10], [3], clients=1)
    assert served.duration_s == pytest.approx(4.0)
    assert served.ttft_s[0] == pytest.approx(2.0)
    # a second prompt shares the second step: 2 + 6 tokens fit the budget
    both = splitfuse([10, 6], [3, 3], clients=2)
    assert list(both.ttft_s) == pytest.approx([2.0, 2.0])


def test_a_full_cache_lets_some_wait_before_it_throws_one_out() -> None:
    # blocks of 2, three of them, two requests of 2 + 4. Step 1 computes both prompts; steps 2 and 3 only A decodes (one
    # block was left); then neither can, A is last in the buffer and loses its cache. B ends in steps 4 to 6, and A
    # computes its 5 tokens in step 7, which also gives its last one.
    served = splitfuse([2, 2], [4, 4], clients=2, kv=6.0, block=2)
    assert served.duration_s == pytest.approx(7.0)
    assert splitfuse([2, 2], [4, 4], clients=2, kv=60.0, block=2).duration_s == pytest.approx(4.0)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=24),
    n_blocks=st.integers(18, 120),
    block=st.sampled_from([4, 8, 16]),
    budget=st.integers(4, 64),
)
def test_jumps_give_what_single_steps_give(
    lengths: list[tuple[int, int]], n_blocks: int, block: int, budget: int
) -> None:
    prompts, outputs = [list(x) for x in zip(*lengths, strict=True)]

    def step(prefill: float, decodes: float, context: float) -> float:
        return 1.0 + 0.1 * prefill + 0.01 * decodes + 1e-4 * context

    served = splitfuse(
        prompts, outputs, clients=len(prompts), budget=budget, kv=n_blocks * block, block=block, step=step
    )
    alone = step_by_step(prompts, outputs, budget=budget, n_blocks=n_blocks, block=block, step=step)
    # a jump takes the context at its middle, half a token a sequence beside the sum of its steps
    assert served.duration_s == pytest.approx(alone, rel=2e-3)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=5, max_size=40),
    clients=st.integers(1, 20),
    kv=st.integers(80, 2000),
)
def test_all_are_served_even_when_the_cache_overflows(lengths: list[tuple[int, int]], clients: int, kv: int) -> None:
    prompts, outputs = [list(x) for x in zip(*lengths, strict=True)]
    served = splitfuse(prompts, outputs, clients=clients, kv=float(kv))
    assert served.n_requests == len(lengths)
    assert served.n_output_tokens == sum(outputs)
    assert (served.e2e_s > 0).all()
    assert (served.tpot_s[np.isfinite(served.tpot_s)] >= 0).all()


def test_a_full_cache_costs_time() -> None:
    roomy, tight = (splitfuse([30] * 20, [30] * 20, clients=10, budget=64, kv=kv) for kv in (1e9, 130.0))
    assert tight.duration_s > 1.5 * roomy.duration_s


def test_late_arrivals_wait_for_nobody_when_there_is_room() -> None:
    served = splitfuse([4, 4], [50, 2], clients=0, arrivals=[0.0, 10.0])
    assert served.ttft_s[-1] == pytest.approx(1.0)


def test_a_request_larger_than_the_cache_is_refused_not_looped_on() -> None:
    with pytest.raises(DomainError, match="a request of 70 tokens needs more than the cache's 64"):
        splitfuse([40], [30], clients=1, kv=64.0, block=16)
