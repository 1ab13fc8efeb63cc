"""Many equal decode steps of the scheduler copy at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.laws.roofline import larger_of
from advisor.predict.clock import Decodes
from advisor.predict.engine_state import EMPTY_BATCH_S, Group, Part, head_of
from advisor.predict.ledger import NO_GAP

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
    part = engine.parts[0]
    stage, clock = part.stages[0], part.clock
    if m < 2 or (limits.n_in_flight == 2 and not limits.blocks_on_launch and stage.free_s >= until_s):
        return  # the second step of a stretch is fixed when the GPU is free
    for _, _, finished in engine.in_flight:
        if finished:
            return
    while m > 1 and group.blocks_opened(m, limits) > engine.free_blocks:
        m //= 2
    n = group.n
    if engine.has_stood or (engine.cold and head_of(n) in engine.cold):
        return  # the first step of so many loads a kernel, and the one after it finds the GPU idle
    n_tokens = n * limits.verify_tokens
    n_padded = engine.graph(n_tokens)
    per_step = n * limits.tokens_per_step
    first_context = group.context + n - (n - 1) * limits.hot_context_tokens
    full_s, ratio, host_s, prepare_s = clock.step(0, 0.0, n_tokens, n_padded, first_context, n)
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
    for step_end_s, firsts, finished in engine.in_flight:
        engine.process(max(step_end_s, launched_s), firsts, finished)
    engine.in_flight.clear()
    engine.free_blocks -= group.blocks_opened(m, limits)
    last_s = first_s + slope_s * (m - 1)
    ledger = engine.ledger
    gap_s = NO_GAP
    if group.steps and start_s > group.last_end_s:
        gap_s = start_s - group.last_end_s + first_s
        ledger.ramps += (first_s + slope_s, last_s, n * (m - 1))
    else:
        ledger.ramps += (first_s, last_s, n * m)
    end_s = end_of(m)
    if engine.front:
        engine.front.step(end_of(1), end_s, m, n)
    part.heat(ratio, end_s - start_s)
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
    ledger.rows += (m, 0.0, 0.0, n, total_context / m, n, gap_s, end_s - start_s, m)
    if limits.n_in_flight > 1:
        engine.in_flight.append((end_s, (), ()))
        engine.now_s = max(engine.now_s, engine.launch_free_s if is_blocked else end_of(m - 1))
    else:
        engine.now_s = end_s
    if engine.sample_every_s:
        engine.sample(end_s)


def run_decodes(engine: Engine, until_s: float, n_most: int) -> int:
    """Launch up to `n_most` steps of decodes alone, one after the other; return how many.

    The same as `Engine.advance` and `Engine._step` would do, with what does not change looked up once. It ends where
    tokens must be handed out, blocks run out or `until_s` comes; no prompt may be able to join meanwhile.
    """
    limits, in_flight, groups, ready = engine.limits, engine.in_flight, engine.groups, engine.group_ready_s
    pp, n_in_flight, hot = limits.pp, limits.n_in_flight, limits.hot_context_tokens
    block = limits.kv_block_tokens if limits.tokens_per_step == 1.0 else 0
    now_s, free_s, number = engine.now_s, engine.launch_free_s, engine.step_number
    rows, front = engine.ledger.rows, engine.front
    n_launched = 0
    while n_launched != n_most and now_s < until_s:
        if len(in_flight) >= n_in_flight:
            end_s, firsts, finished = in_flight[0]
            if firsts or finished:
                break
            del in_flight[0]
            if end_s > now_s:
                now_s = end_s
                if end_s >= until_s:
                    break
        following = number + 1
        group = groups[following % pp]
        if not group.n and in_flight and limits.queues_empty_batches:
            number = following
            in_flight.append((in_flight[-1][0], (), ()))
            now_s += EMPTY_BATCH_S
            continue
        while not group.n and following < number + pp:
            following += 1
            group = groups[following % pp]
        n = group.n
        if not n or (engine.cold and head_of(n) in engine.cold):
            break
        steps = group.steps
        needed = group.residues[-steps % block] if block > 1 else group.blocks_opened(1, limits)
        if needed > engine.free_blocks:
            break
        engine.free_blocks -= needed
        number = following
        slot = number % pp
        context = group.context + n
        if hot:
            context -= (n - 1) * hot
        launch_s = now_s if now_s > free_s else free_s
        ready_s = ready[slot]
        busy_s = launched_s = 0.0
        weights: tuple[float, ...] = ()
        for (full_s, context_s, full_j, context_j, power_w, host_s, prepare_s), part in engine.laws.get(n) or _new_laws(
            engine, n
        ):
            if not weights:
                free_s = launched_s = launch_s + host_s
                if launch_s + prepare_s > ready_s:
                    ready_s = launch_s + prepare_s
            full_s += context * context_s
            ratio = (full_j + context * context_j) / (full_s * power_w)
            begin_s, end_s, spent_s, weight, launched_s = part.run(
                ready_s, full_s, ratio, launched_s, host_s, prepare_s
            )
            ready_s = end_s + part.send_s
            busy_s += spent_s
            weights += (weight,)
        ready[slot] = ready_s
        gap_s = end_s - (group.last_end_s if steps else begin_s)
        group.last_end_s = end_s
        group.steps = steps = steps + 1
        group.context += n * limits.tokens_per_step
        rows += (1.0, 0.0, 0.0, n, context, n, gap_s, busy_s / pp, *weights)
        in_flight.append((end_s, (), group.done() if group.finish[0][0] <= steps else ()))
        if front:
            front.step(end_s, end_s, 1, n)
        if limits.blocks_on_launch:
            now_s = free_s
        n_launched += 1
        engine.is_graph_running = True
        engine.has_stood = False
    engine.now_s, engine.launch_free_s, engine.step_number = now_s, free_s, number
    return n_launched


def _new_laws(engine: Engine, n: int) -> list[tuple[Decodes, Part]]:
    n_tokens = n * engine.limits.verify_tokens
    n_padded = engine.graph(n_tokens)
    laws = engine.laws[n] = [(part.clock.decodes(n_tokens, n_padded, n), part) for part in engine.parts]
    return laws
