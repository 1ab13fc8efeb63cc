"""Many equal decode steps of the scheduler copy at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.laws.roofline import larger_of
from advisor.predict.engine_state import Group, Step

if TYPE_CHECKING:
    from advisor.predict.engine import Engine

MAX_STRETCH_STEPS = 256
"""Longest stretch summed by one trapezoid; step time is linear in context but for windows and the host's floor."""


def fast_forward(engine: Engine, group: Group, until_s: float) -> None:
    """Run decode steps in closed form while nobody finishes, nobody can be admitted and blocks last.

    Step i of the stretch takes ``d_1 + (i - 1) slope`` and ends at E_i; it is fixed at E_{i-2} with two batches in
    flight (E_{i-1} with one), which must lie before `until_s`.
    """
    limits = engine.limits
    m = min(group.finish[0][0] - group.steps - 1, MAX_STRETCH_STEPS)
    if m < 2 or any(step.finished for step in engine.in_flight):
        return
    while m > 1 and group.blocks_opened(m, limits) > engine.free_blocks:
        m //= 2
    stage = engine.stages[0]
    clock = stage.clock
    n = group.n
    n_tokens = n * limits.verify_tokens
    n_padded = engine.graph(n_tokens)
    per_step = n * limits.tokens_per_step
    first_context = group.context + n - (n - 1) * limits.hot_context_tokens
    full_s, ratio, host_s = clock.step(0, 0.0, n_tokens, n_padded, first_context, n)
    prepare_s = clock.prepare_s(n)
    # with one batch in flight the GPU waits for each preparation, with more it is over when a step ends
    is_alone = limits.n_in_flight == 1
    wait_s = prepare_s if is_alone else 0.0
    first_s = larger_of(wait_s + full_s, host_s)
    ratio *= full_s / first_s
    last_full_s = clock.step(0, 0.0, n_tokens, n_padded, first_context + per_step * (m - 1), n)[0]
    last_s = larger_of(wait_s + last_full_s, host_s)
    slope_s = (last_s - first_s) / (m - 1) if m > 1 else 0.0
    launch_s = max(engine.now_s, engine.launch_free_s)
    is_host_bound = host_s >= full_s and not is_alone
    if is_host_bound and stage.free_s > launch_s + prepare_s:
        return  # the host works off its lead first, step by step
    # the GPU follows a slower host by one step; a slower GPU has the next launch ready when it is free
    lag_s, last_lag_s = (larger_of(prepare_s + s, host_s) - host_s for s in (full_s, last_full_s))
    lag_slope_s = (last_lag_s - lag_s) / (m - 1) if is_host_bound and m > 1 else 0.0
    start_s = launch_s + lag_s if is_host_bound else max(stage.free_s, launch_s + prepare_s - wait_s)

    def end_of(i: int) -> float:
        return float(start_s + i * first_s + 0.5 * slope_s * i * (i - 1) + lag_slope_s * (i - 1))

    # an engine that launches by itself sees no arrival before its launch is over
    is_blocked = is_host_bound and limits.blocks_on_launch
    behind = 1 if is_blocked else limits.n_in_flight

    def fixed_s(i: int) -> float:
        if is_blocked:
            return launch_s + (i - 1) * host_s
        return end_of(i - behind) if i > behind else max(stage.free_s, engine.now_s)

    if fixed_s(max(m, behind)) >= until_s:
        low, high = 0, m
        while low < high:  # find the last step that is fixed before `until_s`
            mid = (low + high + 1) // 2
            if mid < behind or fixed_s(mid) < until_s:
                low = mid
            else:
                high = mid - 1
        m = low
    if m < 2:
        return
    launched_s = launch_s + host_s if limits.blocks_on_launch else 0.0
    for step in engine.in_flight:
        step.end_s = max(step.end_s, launched_s)
        engine.process(step)
    engine.in_flight.clear()
    engine.free_blocks -= group.blocks_opened(m, limits)
    last_s = first_s + slope_s * (m - 1)
    if group.steps and start_s > group.last_end_s:
        engine.itl.append((start_s - group.last_end_s + first_s, start_s - group.last_end_s + first_s, float(n)))
        engine.itl.append((first_s + slope_s, last_s, float(n * (m - 1))))
    else:
        engine.itl.append((first_s, last_s, float(n * m)))
    end_s = end_of(m)
    stage.heat(ratio, end_s - start_s)
    group.steps += m
    group.context += per_step * m
    group.last_end_s = end_s
    engine.step_number += m
    stage.free_s = end_s
    engine.launch_free_s = max(
        engine.launch_free_s, launch_s + m * host_s if is_host_bound else end_of(m - 1) + is_alone * host_s
    )
    engine.is_graph_running = True
    total_context = m * first_context + per_step * m * (m - 1) / 2
    engine.counts.add(m, m * n_tokens, 0.0, total_context, m * n, end_s - start_s)
    clock.step(0, 0.0, n_tokens, n_padded, total_context / m, n)
    clock.count(m)
    if limits.n_in_flight > 1:
        engine.in_flight.append(Step(end_s, [], []))
        engine.now_s = max(engine.now_s, engine.launch_free_s if is_blocked else end_of(m - 1))
    else:
        engine.now_s = end_s
    if engine.sample_every_s:
        engine.sample(end_s)
