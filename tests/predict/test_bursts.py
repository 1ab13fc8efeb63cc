"""Which requests of a burst share a step: what an engine sees when it wakes, and while it queues its first batches."""

from __future__ import annotations

import numpy as np
import pytest

from advisor.predict.simulate import Client, simulate
from tests.predict.test_engine import Cost, limits, run, traffic


def test_an_idle_engine_wakes_with_what_has_arrived_meanwhile() -> None:
    """Two requests 1 ms apart share the first step of an engine that takes 2 ms to wake, not that of a quick one."""
    cost, arrivals = Cost(), traffic([8, 8], [1, 1], [0.0, 1e-3])
    both, one = cost.gpu_s(16, 72, 0, 0, 2), cost.gpu_s(8, 36, 0, 0, 1)
    sleepy = simulate([Cost()], limits(), arrivals, Client(0.0, 0.0, 0.0, wake_s=2e-3))  # type: ignore[list-item]
    assert sleepy.ttft_s.tolist() == pytest.approx([2e-3 + both, 1e-3 + both])
    assert run(arrivals, limits()).ttft_s.tolist() == pytest.approx([one, 2 * one - 1e-3])


def test_a_burst_on_a_pipeline_makes_a_second_group_while_the_core_sleeps() -> None:
    """One starts at once; what arrives in the millisecond after the empty batch starts beside it, the rest later."""
    arrivals = [0.0, 3e-4, 9e-4, 2e-3]
    cell = traffic([4] * 4, [6] * 4, arrivals)
    ahead = run(cell, limits(pp=2, n_in_flight=3), n_stages=2)
    begun = ahead.ttft_s + np.array(arrivals)
    assert begun[1] == pytest.approx(begun[2])
    assert begun[0] < begun[1] < begun[3]
    # as many batches as stages: nothing is queued for a group without requests, and all three wait for the first
    waiting = run(cell, limits(pp=2, n_in_flight=2), n_stages=2)
    assert (waiting.ttft_s + np.array(arrivals))[1:] == pytest.approx([(waiting.ttft_s + np.array(arrivals))[1]] * 3)


def test_a_core_that_does_not_launch_fixes_two_steps_before_it_looks_for_requests() -> None:
    """The second step is that of the first one's decode; who arrived a moment after the first shares the third."""
    cost, arrivals = Cost(), [0.0, 1e-5, 2e-5]
    sim = run(traffic([4] * 3, [6] * 3, arrivals), limits())
    first, second = cost.gpu_s(4, 10, 0, 0, 1), cost.gpu_s(0, 0, 1, 5, 1)
    third = cost.gpu_s(8, 20, 1, 6, 3)
    assert (sim.ttft_s + np.array(arrivals)).tolist() == pytest.approx([first] + [first + second + third] * 2)


def test_a_client_sends_long_prompts_further_apart() -> None:
    """Of three clients the last two share a step when they are sent 1 ms apart, not when each token adds to it."""
    cell = traffic([10, 20, 30], [1, 1, 1], clients=3)
    close = simulate([Cost()], limits(), cell, Client(0.0, 0.0, 1e-3))  # type: ignore[list-item]
    apart = simulate([Cost()], limits(), cell, Client(0.0, 0.0, 1e-3, serial_token_s=1e-4))  # type: ignore[list-item]
    assert close.ttft_s[1] == pytest.approx(close.ttft_s[2])
    assert apart.ttft_s[1] < apart.ttft_s[2] - 4e-3


def test_an_http_front_end_reads_one_request_after_the_other() -> None:
    """A burst of prompts reaches the engine spread by the reading of those before; a lone one waits for its own."""
    per_token_s = 1e-4
    client = Client(0.0, 0.0, 0.0, front_s=(0.0, per_token_s, 0.0))
    lone = simulate([Cost()], limits(), traffic([50], [1], [0.0]), client)  # type: ignore[list-item]
    assert lone.ttft_s[0] == pytest.approx(50 * per_token_s + Cost().gpu_s(50, 50 * 51 / 2, 0, 0, 1))
    burst = simulate([Cost()], limits(), traffic([40, 2], [1, 1], [0.0, 0.0]), client)  # type: ignore[list-item]
    step = Cost().gpu_s(40, 40 * 41 / 2, 0, 0, 1)
    assert burst.ttft_s[0] == pytest.approx((40 + 1) * per_token_s + step), "the short one's first turn comes between"
    assert burst.ttft_s[1] > burst.ttft_s[0], "read after the long one, although short"
    apart = simulate([Cost()], limits(), traffic([40, 2], [1, 1], [0.0, 1.0]), client)  # type: ignore[list-item]
    assert apart.ttft_s[1] == pytest.approx(2 * per_token_s + Cost().gpu_s(2, 3, 0, 0, 1))


class SlowLaunch(Cost):
    """A step whose launch takes 10 ms of its host."""

    host_s = 1e-2


def test_a_request_that_is_taken_in_during_a_launch_makes_it_longer() -> None:
    """The first launch ends at 10 ms; one at 9 ms makes that 11 ms, so that one at 10.5 ms makes it 12 and shares the
    second step, whose launch ends at 22 ms. Without it each has a step, and tokens go out after the next launch. Where
    workers of their own launch, nothing changes."""
    arrivals = [0.0, 9e-3, 10.5e-3]
    cell = traffic([8] * 3, [1] * 3, arrivals)

    def firsts(intake_s: float, *, blocks: bool = True) -> list[float]:
        client = Client(0.0, 0.0, 0.0, intake_s=intake_s)
        sim = simulate([SlowLaunch()], limits(blocks_on_launch=blocks), cell, client)  # type: ignore[list-item]
        return (sim.ttft_s + np.array(arrivals)).tolist()  # type: ignore[no-any-return]

    assert firsts(0.0) == pytest.approx([20e-3, 30e-3, 30e-3])
    assert firsts(1e-3) == pytest.approx([22e-3] * 3)
    assert firsts(1e-3, blocks=False) == firsts(0.0, blocks=False)
